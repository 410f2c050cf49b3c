"""The device mesh, and how batches get onto it."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dit_jax.config import MeshConfig, round_to_multiple
from dit_jax.types import Batch

BATCH_AXES = ("data", "fsdp")  # the mesh axes that split the batch


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of a config over some devices; None: all of all processes.

    Raises:
      ValueError: where the axes' sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, num_devices = dataclasses.asdict(config), len(devices)
    given = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values() and num_devices % given == 0:
        sizes = {axis: num_devices // given if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != num_devices:
        raise ValueError(
            f"config.mesh={dataclasses.asdict(config)} must multiply to the {num_devices} devices; "
            "set one axis to -1 to take what the others leave"
        )
    axis_types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=axis_types, devices=devices)


def check_batch_size(batch_size: int, mesh: Mesh, key: str) -> None:
    """Raises ValueError unless the mesh's batch axes divide `batch_size`, the value of the config key `key`."""
    shards = batch_shards(mesh)
    if batch_size % shards:
        near = round_to_multiple(batch_size, shards)
        raise ValueError(f"{key}={batch_size} must be divisible by the {shards} devices that split it; try {near}")


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of parts that a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first axis over all batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Returns the rows of a global batch that this process's devices hold, ascending."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return sorted({row for (rows,) in indices.values() for row in range(batch_size)[rows]})


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, batch_size: int) -> Batch:
    """Returns the global batch as arrays on the mesh, from this process's `local_rows` of it."""
    sharding = batch_sharding(mesh)
    put = jax.make_array_from_process_local_data
    return {name: put(sharding, value, (batch_size, *value.shape[1:])) for name, value in batch.items()}


def to_host(array: jax.Array) -> np.ndarray:
    """Returns a whole array, of which this process may hold a part; every process must ask for it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def prefetch(batches: Iterable[dict[str, np.ndarray]], mesh: Mesh, batch_size: int, depth: int = 2) -> Iterator[Batch]:
    """Yields batches on the mesh, `depth` of them put ahead of use so that the copy overlaps with the step."""
    arrays = (put_batch(batch, mesh, batch_size) for batch in batches)
    queue = collections.deque(itertools.islice(arrays, depth))
    while queue:
        yield queue.popleft()
        queue.extend(itertools.islice(arrays, 1))
