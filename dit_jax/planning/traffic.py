"""What a device reads and writes of its main memory in one call of a compiled program, from the program's text.

An instruction reads its operands and writes its result, a fusion as one of them, those of a loop as often as it runs.
Arrays that XLA keeps on the chip are not counted, nor what no instruction moves. Of an array that is sliced, gathered
from or updated in place, the part is counted: so a loop over stacked blocks reads each block's parameters once.
"""

import re

from dit_jax.planning.program_text import Computations, Instruction, split, trip_count

# They move nothing; of an asynchronous one the start does.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_FREE |= {"opt-barrier", "add-dependency", "domain"}
_FREE_CALL = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"')
_SLICES = ("slice", "dynamic-slice", "gather")


def memory_traffic(text: str) -> float:
    """Returns the bytes that one call of a program reads and writes, from its compiled text; of branches, the most.

    Raises:
      ValueError: where a loop does not say how often it runs.
    """
    computations, entry = split(text)
    return _traffic_of(computations, entry)


def _traffic_of(computations: Computations, name: str) -> float:
    instructions = {instruction.name: instruction for instruction in computations[name]}
    total = 0.0
    for instruction in computations[name]:
        op = instruction.op
        if op in _FREE or op.endswith(("-done", "-update")) or _FREE_CALL.search(instruction.rest):
            continue
        if op == "while":
            total += trip_count(computations, instruction) * _traffic_of(computations, instruction.called[0])
        elif op == "conditional":
            total += max(_traffic_of(computations, branch) for branch in instruction.called)
        elif op in ("call", "async-start", "call-start"):
            total += sum(_traffic_of(computations, called) for called in instruction.called)
        else:
            total += sum(
                _read(computations, instructions[operand], instruction, position)
                for position, operand in enumerate(instruction.operands)
                if operand in instructions
            )
            total += _written(computations, instruction, instructions)
    return total


def _read(computations: Computations, operand: Instruction, user: Instruction, position: int) -> float:
    """Returns the bytes of an operand, the one at a position, that an instruction reads."""
    whole = sum(array.bytes for array in operand.arrays if array.is_in_memory)
    if not whole:
        return 0.0
    return min(whole, _part(computations, user, position, whole))


def _part(computations: Computations, user: Instruction, position: int, whole: float) -> float:
    """Returns the bytes of its operand at a position that an instruction reads, of an operand of `whole` bytes."""
    if user.op == "tuple":  # handed on
        return 0.0
    if position == 0 and user.op.removesuffix("-start") in _SLICES:
        return user.arrays[user.op.endswith("-start")].bytes  # of (operand, result, context) the result
    if position == 0 and user.op in ("dynamic-update-slice", "scatter"):  # in place
        return 0.0
    if user.op == "fusion":
        inside = computations[user.called[0]]
        parameter = next(i.name for i in inside if i.op == "parameter" and i.rest.startswith(f"{position})"))
        return _part_inside(computations, inside, parameter, whole)
    return whole


def _part_inside(computations: Computations, inside: list[Instruction], name: str, whole: float) -> float:
    """Returns the bytes that a fused computation reads of one of its arrays."""
    total = 0.0
    for user in inside:
        for position, operand in enumerate(user.operands):
            if operand == name:
                total += (
                    _part_inside(computations, inside, user.name, whole)
                    if user.op in ("bitcast", "get-tuple-element")
                    else _part(computations, user, position, whole)
                )
    return min(total, whole)


def _written(computations: Computations, instruction: Instruction, instructions: dict[str, Instruction]) -> float:
    """Returns the bytes that an instruction writes, of an array that it updates in place those of the update."""
    arrays = instruction.arrays
    if instruction.op == "copy-start":  # (result, operand, context)
        arrays = arrays[:1]
    elif instruction.op.endswith("-start") and instruction.op != "all-reduce-start":  # (operands, results, contexts)
        arrays = arrays[sum(len(instructions[name].arrays) for name in instruction.operands if name in instructions) :]
    roots = [instruction]
    if instruction.op == "fusion":
        instructions = {i.name: i for i in computations[instruction.called[0]]}
        roots = [i for i in instructions.values() if i.is_root]
        if roots[0].op == "tuple":
            roots = [instructions[name] for name in roots[0].operands]
    if len(roots) != len(arrays):
        return sum(array.bytes for array in arrays if array.is_in_memory)
    return sum(
        min(array.bytes, _update(root, instructions, array.bytes))
        for array, root in zip(arrays, roots, strict=True)
        if array.is_in_memory
    )


def _update(root: Instruction, instructions: dict[str, Instruction], whole: float) -> float:
    """Returns the bytes that are written for the root of a computation: all but where it is updated in place."""
    while root.op == "bitcast" and root.operands[0] in instructions:
        root = instructions[root.operands[0]]
    if root.op in ("parameter", "get-tuple-element"):  # handed on
        return 0.0
    update = {"dynamic-update-slice": 1, "scatter": 2}.get(root.op)
    if update is None or len(root.operands) <= update or root.operands[update] not in instructions:
        return whole
    return sum(array.bytes for array in instructions[root.operands[update]].arrays)
