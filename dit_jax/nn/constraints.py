"""Where activations live: constraints by the names of the mesh's axes, at the boundaries of blocks.

A layer names the axes that split its activations; which of them there are, the mesh says that the function is traced
for (`parallel.mesh.traced_on`). The batch is over "data" and "fsdp"; tokens, or an image's rows, over "sequence"; heads
and hidden units over "tensor". Left to the compiler, the residual stream of a network whose kernels are split over two
axes is moved about between them.
"""

import math

import jax
from jax.sharding import PartitionSpec

from dit_jax.types import Array

BATCH = ("data", "fsdp")
AXES = (*BATCH, "tensor", "sequence")
TOKENS = (BATCH, "sequence", None)  # [B, T, D], the residual stream
HIDDEN = (BATCH, "sequence", "tensor")  # [B, T, F], what a column-wise kernel makes and a row-wise one takes
QUERIES = (BATCH, "sequence", "tensor", None)  # [B, T, N, d]
KEYS = (BATCH, None, "tensor", None)  # [B, S, N, d], of keys and values: a query attends to all tokens
IMAGES = (BATCH, "sequence", None, None)  # [B, H, W, C]
HIDDEN_IMAGES = (BATCH, "sequence", None, "tensor")  # between a column-wise convolution and a row-wise one


def axis_size(*axes: str) -> int:
    """Returns the number of devices along some axes of the mesh that is traced for; 1 where it has none of them.

    An axis of a `shard_map` around us counts as none: there, activations are one device's part already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(axis, 1) for axis in axes if axis not in mesh.manual_axes)


def constrain(x: Array, axes: tuple) -> Array:
    """Returns x, each dimension split over its axes of the mesh and over no other.

    x itself on one device, and where there is no mesh. A dimension that its axes do not divide is left whole
    (`config.undivided_activations` tells where): the rows of an autoencoder's lowest levels, for one.
    """
    if axis_size(*AXES) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition(x.shape, axes))


def partition(shape: tuple[int, ...], axes: tuple) -> PartitionSpec:
    """Returns what `constrain` asks for an array of some shape."""
    spec = []
    for size, names in zip(shape, axes, strict=True):
        names = tuple(name for name in ((names,) if isinstance(names, str) else names or ()) if axis_size(name) > 1)
        spec.append(names if names and size % axis_size(*names) == 0 else None)
    return PartitionSpec(*spec)
