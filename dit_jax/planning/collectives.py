"""What the devices exchange in one call of a compiled program, read from the program's text, and the least they must.

Bytes are those that a device sends when n devices exchange along rings, which no algorithm undercuts:

    all-gather      (n - 1) / n of the result
    reduce-scatter  (n - 1) / n of the operand
    all-reduce      2 (n - 1) / n of the operand: a reduce-scatter, then an all-gather
    all-to-all      (n - 1) / n of the operand
    collective-permute  the operand

The text says how often each is done. On TPU, XLA writes two of them in its own way. A reduce-scatter is a fusion named
`all-reduce-scatter`, of an all-reduce and a slice. An asynchronous collective may be a chain of fusions, each of them a
matmul or the like with a copy of the collective that goes on meanwhile: `async-collective-start`, fusions of
`async_collective_fusion`, `async-collective-done`. Where a SparseCore does it, it is a `call-start` of a computation of
its own.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence

import jax

from dit_jax.planning.program_text import Computations, Instruction, arrays_of, split, trip_count
from dit_jax.types import Params

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program: its kind, what a device sends in it, and how often a call of the program does it."""

    kind: str  # of KINDS
    sent_bytes: float  # each time
    times: int
    asynchronous: bool  # the devices compute meanwhile


def parse_collectives(text: str, num_devices: int) -> list[Collective]:
    """Returns the collectives of one call of a program, from its compiled text.

    Of a conditional, the branch that sends most is counted. Collectives among single devices send nothing, and are left
    out.

    Raises:
      ValueError: where a loop around a collective does not say how often it runs.
    """
    computations, entry = split(text)
    found = _collectives_of(computations, entry, 1, False, num_devices)
    return [collective for collective in found if collective.sent_bytes]


def _collectives_of(
    computations: Computations, name: str, times: int, asynchronous: bool, num_devices: int
) -> Iterator[Collective]:
    for instruction in computations[name]:
        op = instruction.op
        kind, is_start = op.removesuffix("-start"), op.endswith("-start")
        if kind in KINDS:
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # of which the text has the operand's shape, as of an all-reduce
                sent = _sent_bytes("all-gather", instruction, False, num_devices)
            else:
                sent = _sent_bytes(kind, instruction, is_start, num_devices)
            yield Collective(kind, sent, times, asynchronous or is_start)
        elif op == "while":
            (body,) = instruction.called
            inside = list(_collectives_of(computations, body, 1, asynchronous, num_devices))
            trips = trip_count(computations, instruction) if inside else 0
            yield from (dataclasses.replace(c, times=c.times * times * trips) for c in inside)
        elif op == "conditional":
            yield from _costliest(computations, instruction.called, times, asynchronous, num_devices)
        elif op in ("fusion", "call", "custom-call") or is_start:  # async-start; call-start: on a SparseCore
            for called in instruction.called:
                if called.startswith("async_collective_fusion") or "async-collective-done" in instruction.name:
                    continue  # goes on with what an async-collective-start has begun
                is_async = asynchronous or is_start or "async-collective-start" in instruction.name
                yield from _collectives_of(computations, called, times, is_async, num_devices)


def _costliest(computations, names: Sequence[str], times: int, asynchronous: bool, num_devices: int):
    branches = [list(_collectives_of(computations, name, times, asynchronous, num_devices)) for name in names]
    return max(branches, key=lambda branch: sum(c.times * c.sent_bytes for c in branch))


def _sent_bytes(kind: str, instruction: Instruction, is_start: bool, num_devices: int) -> float:
    shape = instruction.shape
    if is_start and kind != "all-reduce":
        shape = _elements(shape)[1]  # (operands, results, ...)
    size = sum(array.bytes for array in arrays_of(shape))
    if kind == "collective-permute":
        return size
    n = _group_size(instruction.rest, num_devices)
    return {
        "all-gather": (n - 1) / n * size,
        "reduce-scatter": (n - 1) * size,  # the text has the result: an n-th of the operand
        "all-reduce": 2 * (n - 1) / n * size,
        "all-to-all": (n - 1) / n * size,
    }[kind]


def _elements(shape: str) -> list[str]:
    """Returns the elements of a tuple's shape, "(f32[2]{0}, (f32[4]{0}, u32[]))"."""
    elements, depth, start = [], 0, 1
    for i, character in enumerate(shape):
        depth += character in "([{"
        depth -= character in ")]}"
        if (character == "," and depth == 1) or depth == 0:
            elements.append(shape[start:i])
            start = i + 1
        if depth == 0:
            break
    return elements


def _group_size(rest: str, num_devices: int) -> int:
    """Returns how many devices take part in each exchange, from the three ways in which XLA writes its groups."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):  # mesh['a'=4,'b'=2] {'b'}
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])  # 'a':(2)2 is a part of an axis
        return math.prod(int(part) if part else sizes[axis] for axis, part in parts)
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=", rest):  # [groups, devices of a group]
        return int(iota[1].split(",")[-1])
    if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):  # {{0,1},{2,3}}
        return len(groups[1].split(","))
    return num_devices  # none written: all


def summarize(collectives: Iterable[Collective]) -> dict[str, dict]:
    """Returns how many there are of each kind, how many of them asynchronous, and the bytes that a device sends."""
    summary = {}
    for c in collectives:
        entry = summary.setdefault(c.kind, {"count": 0, "asynchronous": 0, "bytes": 0.0})
        entry["count"] += c.times
        entry["asynchronous"] += c.times * c.asynchronous
        entry["bytes"] += c.times * c.sent_bytes
    return {kind: summary[kind] for kind in KINDS if kind in summary}


def least_bytes(
    params: Params, batch_axes: Sequence[str], gathered_itemsize: int, num_parts: int = 1
) -> dict[str, float]:
    """Returns the least that a device must send in a training step to train these parameters as they are placed.

    A parameter of P elements is split over f of the devices that split the batch (fsdp), and each of its parts is on r
    devices that see other examples (data); g is the size of an element when it is gathered, w of a gradient's:

        all-gather      2 (f - 1) / f  g P      before its use in the forward pass, and again in the backward pass:
                                                no device keeps what is not its own
        reduce-scatter  (f - 1) / f  w P        of its gradient, each device keeping its part
        all-reduce      2 (r - 1) / r  w P / f  of that part

    Accumulation over parts of a batch gathers and scatters for each, and sums over r once. Where a parameter is split
    over axes that do not split the batch, P is a device's share. Activations need not be sent where only the batch is
    split; where a batch is smaller than the parameters, XLA may send them instead, and less than this. It also sends
    less where it keeps what it gathered for the backward pass, at the price of memory.

    Args:
      params: of arrays, abstract or not, with a `NamedSharding` each.
      batch_axes: the mesh axes that split the batch.
      gathered_itemsize: bytes of an element that is gathered: 2 on TPU, which rounds to bfloat16 before it multiplies.
      num_parts: of a batch, by accumulation.
    """
    least = dict.fromkeys(("all-gather", "reduce-scatter", "all-reduce"), 0.0)
    for leaf in jax.tree.leaves(params):
        sizes = leaf.sharding.mesh.shape
        axes = [axis for entry in leaf.sharding.spec for axis in ((entry,) if isinstance(entry, str) else entry or ())]
        f = math.prod(sizes[axis] for axis in axes if axis in batch_axes)
        r = math.prod(sizes[axis] for axis in batch_axes) // f
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * f  # elements
        least["all-gather"] += num_parts * 2 * (f - 1) / f * size * gathered_itemsize
        least["reduce-scatter"] += num_parts * (f - 1) / f * size * leaf.dtype.itemsize
        least["all-reduce"] += 2 * (r - 1) / r * size / f * leaf.dtype.itemsize
    return least
