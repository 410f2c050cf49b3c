"""The text of a compiled program, as XLA writes it: computations of instructions, loops and how often they run.

XLA's own cost analysis counts the body of a loop once, hence what is counted here (`collectives`, `traffic`).
"""

import dataclasses
import functools
import math
import re
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\](?:\{([^{}]*)\})?")


class Array(NamedTuple):
    """An array of a shape: its bytes, and whether it is in the device's main memory, rather than on the chip."""

    bytes: float
    is_in_memory: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation; `rest` is what follows its opening parenthesis: operands and attributes."""

    name: str
    shape: str
    op: str
    rest: str
    is_root: bool = False

    @functools.cached_property
    def operands(self) -> list[str]:
        """The names of its operands."""
        depth = 1
        for end, character in enumerate(self.rest):
            depth += (character == "(") - (character == ")")
            if not depth:
                return re.findall(r"%([\w.\-]+)", self.rest[:end])
        return []

    @functools.cached_property
    def called(self) -> list[str]:
        """The names of the computations that it calls; of a conditional, of its branches."""
        if branches := _BRANCHES.search(self.rest):
            return [branch.strip().lstrip("%") for branch in branches[1].split(",")]
        return _CALLED.findall(self.rest)

    @functools.cached_property
    def arrays(self) -> list[Array]:
        """The arrays of its result, those of a tuple in their order."""
        return arrays_of(self.shape)


Computations = dict[str, list[Instruction]]


def split(text: str) -> tuple[Computations, str]:
    """Returns the instructions of each computation, and the name of the one that is called first."""
    computations, entry, instructions = {}, None, []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            instructions = computations[match[2]] = []
            entry = match[2] if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            root, *fields = match.groups()
            instructions.append(Instruction(*fields, bool(root)))
    if entry is None:
        raise ValueError("the program's text has no ENTRY; give that of a compiled program")
    return computations, entry


def trip_count(computations: Computations, loop: Instruction) -> int:
    """Returns how often a loop runs: as XLA notes it, or the one number that its condition compares with.

    Raises:
      ValueError: where neither says it.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = computations[re.search(r"\bcondition=%?([\w.\-]+)", loop.rest)[1]]
    limits = {int(i.rest.split(")")[0]) for i in condition if i.op == "constant" and re.match(r"[su]\d+\[\]", i.shape)}
    if len(limits) != 1:
        raise ValueError(f"the loop {loop.name} does not say how often it runs; use lax.scan")
    return limits.pop()


def arrays_of(shape: str) -> list[Array]:
    """Returns the arrays of a shape, such as "(f32[2,3]{1,0:T(8,128)S(1)}, s32[])"; S(n) is a memory on the chip."""
    found = []
    for letters, bits, sizes, layout in _ARRAY.findall(shape):
        width = int(bits) / 8 if bits else (1 if letters == "pred" else 0)  # a token has no size
        size = width * math.prod(int(size) for size in sizes.split(",") if size)
        found.append(Array(size, re.search(r"S\([1-9]", layout) is None))
    return found
