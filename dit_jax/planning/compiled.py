"""A program compiled ahead of time for a TPU topology, on a machine that has no TPU, and what it needs of a device.

`libtpu` compiles; JAX's `topologies` module gives it the devices of a slice that is not there.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable

import jax
from jax.experimental import topologies

from dit_jax.types import Params

EXAMPLES = "v4:4x4x4, v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4"
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program that fits: bytes of a device's memory, the text, and the seconds that compilation took."""

    arguments: int
    outputs: int  # those that do not take the place of a donated argument
    temporaries: int  # activations, gradients and the like at the moment when they need most
    code: int
    text: str
    seconds: float

    @property
    def needed(self) -> int:
        """Returns the bytes that the program needs."""
        return self.arguments + self.outputs + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class DoesNotFit:
    """What the compiler says of a program that does not fit: the bytes that it needs, and those that there are."""

    needed: int
    available: int
    seconds: float


def topology_devices(name: str) -> list[jax.Device]:
    """Returns the devices of a TPU slice by name, such as v5e:16x16: the generation and the chips along each side.

    Raises:
      ValueError: where libtpu is not installed or does not know the name.
    """
    # By default a chip of v4 is two devices; training uses it as one, which is called a megacore.
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--topology={name} is not a slice of TPUs ({reason}); such are {EXAMPLES}") from error
    except RuntimeError as error:  # a JaxRuntimeError is one too
        raise ValueError(
            f'compiling for a TPU needs libtpu, which is not installed ({error}); pip install -e ".[tpu]"'
        ) from error


def compile_program(function: Callable, args: tuple) -> Compiled | DoesNotFit:
    """Returns a jitted function compiled for abstract arguments with shardings over a topology's devices."""
    start = time.monotonic()
    try:
        compiled = function.lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:
        needed, available = sizes_of_error(str(error))
        return DoesNotFit(needed, available, time.monotonic() - start)
    seconds, memory = time.monotonic() - start, compiled.memory_analysis()
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        arguments=arguments,
        outputs=outputs,
        # `temp_size_in_bytes` adds up what is not alive at the same time: by it a program that fits may seem not to.
        temporaries=max(0, memory.peak_memory_in_bytes - arguments - outputs),
        code=memory.generated_code_size_in_bytes,
        text=compiled.as_text(),
        seconds=seconds,
    )


def sizes_of_error(message: str) -> tuple[int, int]:
    """Returns the bytes needed and available that the compiler's out-of-memory error states.

    Raises:
      ValueError: where the error is about something else.
    """
    size = r"\(?([\d.]+)([KMGT]?)i?B?\)?"
    for pattern in (rf"required for .*?{size} exceeds available .*?{size}\.", rf"Used {size} of {size} "):
        if match := re.search(pattern, message):
            return tuple(round(float(match[i]) * UNITS[match[i + 1]]) for i in (1, 3))
    raise ValueError(f"the compiler failed: {message[:500]}")


def bytes_per_device(tree: Params) -> int:
    """Returns what one device holds of a tree of abstract arrays with shardings."""
    return sum(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))
