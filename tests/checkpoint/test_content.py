"""The sum of an array's content: the same on any mesh and on the host, another for any change."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dit_jax.checkpoint.content import content_of, start_contents
from dit_jax.config import MeshConfig
from dit_jax.parallel.mesh import make_mesh

RNG = np.random.default_rng(0)
ARRAYS = {
    "matrix": RNG.normal(size=(8, 6, 4)).astype(np.float32),
    "brain": RNG.normal(size=(16, 4)).astype(ml_dtypes.bfloat16),
    "bytes": RNG.integers(0, 256, (8, 8)).astype(np.uint8),
    "flags": RNG.integers(0, 2, 16).astype(bool),
    "counter": np.array(-3, np.int32),
    "longer_than_a_block": np.arange(70_000, dtype=np.float32),
    "not_numbers": np.array([np.nan, -0.0, np.inf, 0.0], np.float32),
    "empty": np.zeros((0, 3), np.float32),
}
SPLIT = {
    "matrix": PartitionSpec("fsdp", None, "tensor"),
    "brain": PartitionSpec(("data", "fsdp")),
    "bytes": PartitionSpec(None, ("tensor", "data")),
    "flags": PartitionSpec("tensor"),
}


def test_the_sum_is_the_same_on_the_host_and_on_every_mesh():
    expected = {name: content_of(array) for name, array in ARRAYS.items()}
    assert len(set(expected.values())) == len(expected)
    split, whole = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), make_mesh(MeshConfig(data=8))
    for mesh, specs in ((split, SPLIT), (whole, {})):
        shardings = {name: NamedSharding(mesh, specs.get(name, PartitionSpec())) for name in ARRAYS}
        assert start_contents(jax.device_put(ARRAYS, shardings))() == expected
    assert start_contents(jax.tree.map(jnp.asarray, ARRAYS))() == expected


def test_the_program_that_adds_up_devices_has_one_collective_for_all_arrays_and_the_others_none():
    from dit_jax.checkpoint import content

    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    array = jax.device_put(ARRAYS["matrix"], NamedSharding(mesh, SPLIT["matrix"]))
    program = content._program(mesh, array.sharding.spec)
    assert "all-reduce" not in program.lower(array).compile().as_text()
    text = content._add_devices(mesh).lower([program(array)] * 5).compile().as_text()
    assert text.count(" all-reduce(") == 1 and " all-gather(" not in text


def changes():
    """Yields an array of zeros and ones and, each by name, changes of it that are hard to see."""
    array = np.zeros((64, 64), np.float32)
    array[::3] = 1.0
    yield "none", array.copy()
    for bit in range(32):
        other = array.copy()
        other.view(np.uint32)[17, 5] ^= np.uint32(1 << bit)
        yield f"bit {bit}", other
    signs = array.copy()
    signs[0, 0], signs[3, 1] = -1.0, -1.0
    yield "two signs", signs
    swapped = array.copy()
    swapped[0, 0], swapped[1, 0] = array[1, 0], array[0, 0]
    yield "two elements swapped", swapped
    yield "two rows swapped", array[[1, 0, *range(2, 64)]]
    yield "transposed", array.T.copy()
    yield "shifted", np.roll(array, 1)
    yield "zeros", np.zeros_like(array)
    yield "another shape", array.reshape(32, 128)
    yield "another type", array.view(np.int32)


def test_every_change_gives_another_sum():
    contents = [content_of(array) for _, array in changes()]
    assert len(set(contents)) == len(contents)


def test_sums_are_of_the_arrays_at_the_time_of_the_call():
    array = jnp.arange(1000.0)
    expected = content_of(np.asarray(array))
    fetch = start_contents({"x": array})
    jax.jit(lambda x: x * 0, donate_argnums=0)(array).block_until_ready()
    assert fetch() == {"x": expected}


def test_elements_of_eight_bytes_are_refused():
    with pytest.raises(ValueError, match="complex64 cannot be summed up"):
        content_of(np.zeros(3, np.complex64))
