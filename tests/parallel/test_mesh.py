"""The mesh's sizes, and batches on it, over the eight virtual devices of the tests."""

import dataclasses
import queue

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from dit_jax.config import MeshConfig
from dit_jax.parallel.mesh import (
    batch_sharding,
    batch_shards,
    check_batch_size,
    local_rows,
    make_mesh,
    prefetch,
    put_batch,
)

MESHES = [MeshConfig(), MeshConfig(data=1, fsdp=8), MeshConfig(data=2, fsdp=4), MeshConfig(data=4, fsdp=-1)]


def batches(count, size=16):
    rng = np.random.default_rng(0)
    return [{"image": rng.normal(size=(size, 2, 3)), "label": np.arange(size) + 100 * i} for i in range(count)]


@pytest.mark.parametrize(
    ("data", "fsdp", "shape"),
    [
        (-1, 1, (8, 1)),
        (-1, 4, (2, 4)),
        (2, -1, (2, 4)),
        (1, -1, (1, 8)),
        (8, 1, (8, 1)),
        (2, 4, (2, 4)),
        (1, 8, (1, 8)),
    ],
)
def test_mesh_has_the_sizes_and_minus_1_takes_what_is_left(data, fsdp, shape):
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp))
    assert dict(mesh.shape) == {"data": shape[0], "fsdp": shape[1], "tensor": 1, "sequence": 1}
    assert set(mesh.devices.flat) == set(jax.devices())
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert batch_shards(mesh) == 8


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, 3), (2, 2), (4, 4), (-1, 16), (16, -1), (1, 1)])
def test_sizes_that_do_not_make_the_devices_are_an_error(data, fsdp):
    with pytest.raises(ValueError) as error:
        make_mesh(MeshConfig(data=data, fsdp=fsdp))
    axes = {"data": data, "fsdp": fsdp, "tensor": 1, "sequence": 1}
    assert str(error.value).startswith(f"config.mesh={axes} must multiply to the 8 devices")


@pytest.mark.parametrize(
    ("config", "shape", "shards"),
    [
        (MeshConfig(tensor=2), (4, 1, 2, 1), 4),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 2, 1), 4),
        (MeshConfig(data=2, sequence=-1), (2, 1, 1, 4), 2),
        (MeshConfig(data=1, tensor=-1, sequence=2), (1, 1, 4, 2), 1),
    ],
    ids=str,
)
def test_tensor_and_sequence_split_no_batch(config, shape, shards):
    mesh = make_mesh(config)
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor", "sequence"), shape, strict=True))
    assert batch_shards(mesh) == shards
    assert batch_sharding(mesh).shard_shape((8,)) == (8 // shards,)


@dataclasses.dataclass(frozen=True)
class TorusDevice:
    """As much of a TPU as the mesh looks at: its place in the slice."""

    id: int
    coords: tuple[int, ...]
    device_kind: str
    platform: str = "tpu"
    process_index: int = 0
    core_on_chip: int = 0


@pytest.mark.parametrize(
    "config", [MeshConfig(), MeshConfig(fsdp=8), MeshConfig(fsdp=4, sequence=2), MeshConfig(data=2, fsdp=-1, tensor=2)]
)
@pytest.mark.parametrize(("kind", "sides"), [("TPU v4", (4, 4, 4)), ("TPU v6 lite", (16, 16, 1))])
def test_axes_need_not_line_up_with_the_sides_of_a_slice(kind, sides, config):
    devices = [TorusDevice(i, coords, kind) for i, coords in enumerate(np.ndindex(*sides))]
    mesh = make_mesh(config, devices)
    assert set(mesh.devices.flat) == set(devices) and mesh.size == len(devices)
    assert {axis: mesh.shape[axis] for axis, size in config.axes.items() if size != -1} == {
        axis: size for axis, size in config.axes.items() if size != -1
    }


@dataclasses.dataclass(frozen=True)
class SliceDevice:
    """What `mesh_utils` reads of a device of several slices."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "fake"


@dataclasses.dataclass(frozen=True)
class ProcessDevice:
    """A device that does not know of slices."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "fake"


INTERLEAVED = [SliceDevice(i, i % 2) for i in range(8)]  # as processes of two slices may be numbered
NODES = [ProcessDevice(i, i // 4) for i in range(8)]


@pytest.mark.parametrize("slices", [None, 2])
def test_only_the_data_axis_runs_between_slices(slices):
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2, slices=slices), INTERLEAVED)
    assert tuple(mesh.shape.values()) == (4, 2, 1, 1)
    by_slice = [[device.slice_index for device in row.flat] for row in mesh.devices]
    assert by_slice == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert set(mesh.devices.flat) == set(INTERLEAVED)


def test_processes_are_slices_where_only_the_config_says_so():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2, slices=2), NODES)
    assert [{device.process_index for device in row.flat} for row in mesh.devices] == [{0}, {1}]
    assert tuple(make_mesh(MeshConfig(data=1, fsdp=8), NODES).shape.values()) == (1, 8, 1, 1)  # one network of all


@pytest.mark.parametrize(
    ("config", "devices", "message"),
    [
        (
            MeshConfig(data=1, fsdp=8),
            INTERLEAVED,
            "config.mesh.data=1 must be divisible by the 2 slices: only",
        ),
        (MeshConfig(slices=4), INTERLEAVED, "config.mesh.slices=4 must be 2, the slices of the devices; or None"),
        (MeshConfig(slices=1), INTERLEAVED, "config.mesh.slices=1 must be 2, the slices of the devices; or None"),
        (MeshConfig(slices=4), NODES, "config.mesh.slices=4 must be 2, the processes of the devices; or None"),
    ],
    ids=str,
)
def test_slices_that_the_devices_or_the_data_axis_do_not_have_are_an_error(config, devices, message):
    with pytest.raises(ValueError) as error:
        make_mesh(config, devices)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize(("batch_size", "near", "sequence"), [(4, 8, 2), (100, 96, 2), (30, 32, 4), (5, 8, 8)])
def test_batch_that_the_mesh_does_not_divide_is_an_error_with_what_it_does(batch_size, near, sequence):
    with pytest.raises(ValueError) as error:
        check_batch_size(batch_size, make_mesh(MeshConfig()), "config.training.global_batch_size")
    assert str(error.value) == (
        f"config.training.global_batch_size={batch_size} must be divisible by the 8 devices that split it; try {near}, "
        f"or let devices share an example: config.mesh.sequence={sequence}"
    )
    check_batch_size(batch_size, make_mesh(MeshConfig(sequence=sequence)), "config.training.global_batch_size")
    check_batch_size(near, make_mesh(MeshConfig()), "config.training.global_batch_size")


@pytest.mark.parametrize("config", MESHES)
def test_one_process_holds_every_row(config):
    assert local_rows(make_mesh(config), 24) == list(range(24))


@pytest.mark.parametrize("config", MESHES)
def test_batch_on_the_mesh_is_the_batch_and_each_device_holds_its_share(config):
    mesh, (batch,) = make_mesh(config), batches(1)
    arrays = put_batch(batch, mesh, 16)
    assert set(arrays) == set(batch)
    for name, value in batch.items():
        assert arrays[name].shape == value.shape
        assert arrays[name].sharding.is_equivalent_to(batch_sharding(mesh), value.ndim)
        np.testing.assert_allclose(arrays[name], value, rtol=1e-6)
    shards = sorted(arrays["label"].addressable_shards, key=lambda shard: shard.index[0].start)
    assert [shard.data.tolist() for shard in shards] == np.arange(16).reshape(8, 2).tolist()


def test_batch_is_split_over_both_axes():
    assert batch_sharding(make_mesh(MeshConfig(data=2, fsdp=4))).spec == PartitionSpec(("data", "fsdp"))


@pytest.mark.parametrize("count", [0, 1, 2, 5])
@pytest.mark.parametrize("depth", [1, 2, 8])
def test_prefetched_batches_come_whole_and_in_order(count, depth):
    given = batches(count)
    arrived = list(prefetch(given, make_mesh(MeshConfig()), 16, depth))
    assert len(arrived) == count
    for arrays, batch in zip(arrived, given, strict=True):
        for name, value in batch.items():
            np.testing.assert_allclose(arrays[name], value, rtol=1e-6)


def test_prefetch_reads_ahead_by_its_depth_and_no_further():
    read = queue.Queue()

    def source():
        for i, batch in enumerate(batches(10)):
            read.put(i)
            yield batch

    arrays = prefetch(source(), make_mesh(MeshConfig()), 16, depth=3)
    assert read.empty()  # nothing before the first is asked for
    for expected in ([0, 1, 2], [3], [4], [5], [6]):
        next(arrays)
        assert [read.get(timeout=60) for _ in expected] == expected
        assert read.empty()


def test_an_error_of_the_source_reaches_whoever_asks_for_its_batch():
    def source():
        yield batches(1)[0]
        raise ValueError("cannot read image 7")

    arrays = prefetch(source(), make_mesh(MeshConfig()), 16)
    next(arrays)
    with pytest.raises(ValueError, match="cannot read image 7"):
        next(arrays)
