"""A 64-bit sum of an array's content, the same however the array is split over devices.

Element i in row-major order, of which w is the bits, gives with all arithmetic modulo 2^32

    x = mix(w + 0x9E3779B1 i),    sum = (sum_i x, sum_i (2 i + 1) x)

where `mix`, a bijection, is the finalizer of MurmurHash3. So a change of one element always changes the first half; any
other change, such as elements swapped or set to zero, is missed with a chance of some 2^-63. Not against forgery.

On devices each adds up its own shards, in a program without communication for each shape; one program then adds up
what they found for all arrays, with a single all-reduce.
"""

import collections
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

STEP, MULTIPLIERS, SHIFTS = 0x9E3779B1, (0x85EBCA6B, 0xC2B2AE35), (16, 13, 16)
HOST_BLOCK = 1 << 16  # elements, few enough to stay in a core's cache

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def leaf_name(path: tuple) -> str:
    """Returns a leaf's name in a manifest, such as "0/mu/blocks_0/attn/qkv/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def describe_shape(array: Any) -> str:
    """Returns a dtype and shape as manifests have it, such as "float32[64,3,64]"."""
    return f"{np.dtype(array.dtype).name}[{','.join(map(str, array.shape))}]"


def start_contents(tree: Any) -> Callable[[], dict[str, str]]:
    """Starts to add up a tree's arrays on their devices; returns what waits for it and gives their contents by name.

    A content is the sum in hexadecimal digits, dtype and shape: "97b8af46609b559c float32[24]".

    The arrays may be donated or deleted meanwhile. Every process must call this with the same tree, and may then wait
    in any thread.
    """
    by_mesh, shapes = collections.defaultdict(dict), {}
    for path, array in jax.tree_util.tree_leaves_with_path(tree):
        array, name = jnp.asarray(array), leaf_name(path)
        mesh = array.sharding.mesh if isinstance(array.sharding, NamedSharding) else None
        by_mesh[mesh][name], shapes[name] = _sums_by_device(mesh, array), describe_shape(array)
    started = [(list(named), _add_devices(mesh)(list(named.values()))) for mesh, named in by_mesh.items()]

    def fetch() -> dict[str, str]:
        rows = ((name, row) for names, totals in started for name, row in zip(names, np.asarray(totals), strict=True))
        return {name: _text(*map(int, row), shapes[name]) for name, row in rows}

    return fetch


def content_of(array: np.ndarray) -> str:
    """Returns the content of an array in the host's memory."""
    words = np.ascontiguousarray(array).reshape(-1).view(_word_type(array.dtype))
    index = np.arange(HOST_BLOCK, dtype=np.uint32)
    steps, odd = index * np.uint32(STEP), 2 * index + np.uint32(1)
    mixed, shifted = np.empty_like(index), np.empty_like(index)
    first = second = 0
    for start in range(0, words.size, HOST_BLOCK):
        block = words[start : start + HOST_BLOCK]
        x, y = mixed[: block.size], shifted[: block.size]
        np.add(block, steps[: block.size], out=x)
        x += np.uint32(start * STEP % 2**32)
        for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, None), strict=True):
            np.right_shift(x, shift, out=y)
            x ^= y
            if multiplier:
                x *= np.uint32(multiplier)
        total = int(x.sum(dtype=np.uint32))
        x *= odd[: block.size]
        first, second = first + total, second + int(x.sum(dtype=np.uint32)) + 2 * start * total
    return _text(first % 2**32, second % 2**32, describe_shape(array))


def _text(first: int, second: int, shape: str) -> str:
    return f"{first:08x}{second:08x} {shape}"


def _word_type(dtype: np.dtype) -> type:
    if dtype.itemsize not in _WORDS:
        raise ValueError(f"an array of {dtype} cannot be summed up; checkpoints hold elements of 1, 2 or 4 bytes")
    return _WORDS[dtype.itemsize]


def _sums_by_device(mesh: Mesh | None, array: jax.Array) -> jax.Array:
    """Returns uint32 [devices, 2], each row where its device is; without a mesh [1, 2]."""
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    _word_type(array.dtype)
    return _program(mesh, array.sharding.spec if mesh else None)(array)


@functools.cache
def _program(mesh: Mesh | None, spec: PartitionSpec | None) -> Callable[[jax.Array], jax.Array]:
    if mesh is None:
        return jax.jit(lambda x: _shard_sums(x, [0] * x.ndim, x.shape)[None])

    def of_shard(x: jax.Array) -> jax.Array:
        axes = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in spec]
        axes += [()] * (x.ndim - len(axes))
        parts = [math.prod(mesh.shape[name] for name in names) for names in axes]
        starts = [jax.lax.axis_index(names) * size if names else 0 for names, size in zip(axes, x.shape, strict=True)]
        sums = _shard_sums(x, starts, [size * count for size, count in zip(x.shape, parts, strict=True)])
        copied = [name for name in mesh.axis_names if not any(name in names for names in axes)]
        first_copy = jax.lax.axis_index(copied) == 0 if copied else True
        return jnp.where(first_copy, sums, 0)[None]

    return jax.jit(
        jax.shard_map(
            of_shard, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(tuple(mesh.axis_names)), check_vma=False
        )
    )


def _shard_sums(x: jax.Array, starts: list, shape: Sequence[int]) -> jax.Array:
    """Returns uint32 [2] of the part of an array of `shape` that begins at `starts`."""
    index, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        position = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) + jnp.uint32(starts[axis])
        index, stride = index + position * jnp.uint32(stride % 2**32), stride * shape[axis]
    words = jax.lax.bitcast_convert_type(x, _word_type(x.dtype)).astype(jnp.uint32)
    mixed = words + index * jnp.uint32(STEP)
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(multiplier)
    return jnp.stack([mixed.sum(dtype=jnp.uint32), (mixed * (2 * index + 1)).sum(dtype=jnp.uint32)])


@functools.cache
def _add_devices(mesh: Mesh | None) -> Callable[[list[jax.Array]], jax.Array]:
    """Returns the jitted sum over devices, uint32 [arrays, 2] on all of them."""
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda sums: jnp.stack(sums).sum(1, dtype=jnp.uint32), out_shardings=everywhere)
