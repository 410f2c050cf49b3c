"""The device mesh, and how batches get onto it."""

import collections
import concurrent.futures
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dit_jax.config import MeshConfig, round_to_multiple
from dit_jax.parallel.preemption import heed_alone
from dit_jax.terminal import silence_libtpu
from dit_jax.types import Batch

BATCH_AXES = ("data", "fsdp")  # the mesh axes that split the batch
LOOK_SECONDS = 0.2  # between looks at whether the program was asked to make way, while it waits for a batch


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of a config over some devices; None: all of all processes.

    Between slices only the data axis runs: its gradients are all that the slower network between them carries.

    Raises:
      ValueError: where the axes' sizes do not multiply to the number of devices, or the slices do not divide the data.
    """
    silence_libtpu()
    devices = jax.devices() if devices is None else devices
    sizes, num_devices = config.axes, len(devices)
    given = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values() and num_devices % given == 0:
        sizes = {axis: num_devices // given if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != num_devices:
        raise ValueError(
            f"config.mesh={config.axes} must multiply to the {num_devices} devices; "
            "set one axis to -1 to take what the others leave"
        )
    num_slices = count_slices(config, devices)
    if sizes["data"] % num_slices:
        raise ValueError(
            f"config.mesh.data={sizes['data']} must be divisible by the {num_slices} slices: only the data axis runs "
            f"between them; try {round_to_multiple(sizes['data'], num_slices)}"
        )
    shape = tuple(sizes.values())
    # A slice is a torus of two or three dimensions, which the axes of a config need not line up with: split, they do.
    if num_slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            (shape[0] // num_slices, *shape[1:]),
            (num_slices, 1, 1, 1),
            devices,
            process_is_granule=not hasattr(devices[0], "slice_index"),
            allow_split_physical_axes=True,
        )
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def count_slices(config: MeshConfig, devices: Sequence[jax.Device]) -> int:
    """Returns the number of slices: as the devices say (TPUs do); where they say nothing, the config's, or 1.

    Where only the config says it, each process is a slice: so are the nodes of a cluster grouped.

    Raises:
      ValueError: where the config says another number than the devices.
    """
    by_slice = hasattr(devices[0], "slice_index")
    found = len({device.slice_index if by_slice else device.process_index for device in devices})
    if config.slices is None:
        return found if by_slice else 1
    if config.slices not in (1, found) or (by_slice and config.slices != found):
        what = "slices" if by_slice else "processes"
        raise ValueError(f"config.mesh.slices={config.slices} must be {found}, the {what} of the devices; or None")
    return config.slices


def traced_on(mesh: Mesh, function: Callable) -> Callable:
    """Returns the function, to be traced for a mesh: its layers constrain activations to that mesh's axes."""

    @functools.wraps(function)
    def traced(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def check_batch_size(batch_size: int, mesh: Mesh, key: str) -> None:
    """Raises ValueError unless the mesh's batch axes divide `batch_size`, the value of the config key `key`."""
    shards = batch_shards(mesh)
    if batch_size % shards:
        near = round_to_multiple(batch_size, shards)
        sharing = mesh.shape["sequence"] * shards // math.gcd(batch_size, shards)
        raise ValueError(
            f"{key}={batch_size} must be divisible by the {shards} devices that split it; try {near}, "
            f"or let devices share an example: config.mesh.sequence={sharing}"
        )


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
    return jax.tree.map(lambda value: put(sharding, value, (batch_size, *value.shape[1:])), batch)


def to_host(array: jax.Array) -> np.ndarray:
    """Returns a whole array, of which this process may hold a part; every process must ask for it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def on_all_processes(fact: bool) -> bool:
    """Returns whether something holds on every process; every process must ask for it."""
    return bool(np.all(multihost_utils.process_allgather(np.array(fact))))


def prefetch(batches: Iterable[dict[str, np.ndarray]], mesh: Mesh, batch_size: int, depth: int = 2) -> Iterator[Batch]:
    """Yields batches on the mesh, `depth` of them put ahead of use so that the copy overlaps with the step.

    A thread puts them: for small steps, that takes as long as a few percent of one. A request to make way ends the
    wait for a batch, for a reader may hang (`preemption.heed_alone`).
    """
    iterator = iter(batches)

    def load() -> Batch | None:
        batch = next(iterator, None)
        return None if batch is None else put_batch(batch, mesh, batch_size)

    def wait(batch: concurrent.futures.Future) -> Batch | None:
        while not concurrent.futures.wait([batch], LOOK_SECONDS).done:
            heed_alone()
        return batch.result()

    thread = concurrent.futures.ThreadPoolExecutor(1, "prefetch")
    try:
        queue = collections.deque(thread.submit(load) for _ in range(depth))
        while (batch := wait(queue.popleft())) is not None:
            yield batch
            queue.append(thread.submit(load))
    finally:
        thread.shutdown(wait=False, cancel_futures=True)
