"""Features of images by a network, on all devices of a mesh: the same bits for any number of devices and processes."""

from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from dit_jax.metrics.feature_network import FeatureNetwork
from dit_jax.parallel.mesh import BATCH_AXES, batch_shards, local_rows, put_batch, replicated, to_host
from dit_jax.parallel.preemption import heed

DEVICE_ROWS = 16  # images that a device takes at once


def extract_features(
    network: FeatureNetwork, images: Iterable[np.ndarray], mesh: Mesh, outputs: tuple[str, ...] = ("pool",)
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the outputs of a network, {name: [n, D] float32}, in the order of the images.

    A device always takes 16 consecutive images, from a multiple of 16 on, the last ones filled up with black. So an
    image's features do not depend, by a bit, on how many devices or processes there are, nor on the sizes of the
    batches that images come in.

    Args:
      images: batches uint8 [n, H, W, 3] of any n, all of one size, in order; every process gives all of them.
      outputs: of `FeatureNetwork.apply`.
    """

    def apply(params, batch):
        found = network.apply(params, batch)
        return {name: found[name] for name in outputs}

    rows = PartitionSpec(BATCH_AXES)
    apply = jax.jit(jax.shard_map(apply, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False))
    params = jax.device_put(network.params, replicated(mesh))
    size = DEVICE_ROWS * batch_shards(mesh)
    local = local_rows(mesh, size)
    before = None
    for batch in rebatched(images, size):
        padded = np.pad(batch, [(0, size - len(batch)), (0, 0), (0, 0), (0, 0)])
        found = apply(params, put_batch({"image": padded[local]}, mesh, size)["image"]), len(batch)
        if before is not None:  # while the devices compute, the features before come back
            yield _real_rows(*before)
        before = found
        heed()
    if before is not None:
        yield _real_rows(*before)


def rebatched(batches: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Yields the rows of batches in their order, `size` at a time; the last batch has what is left."""
    pending: list[np.ndarray] = []
    for batch in batches:
        pending.append(batch)
        while sum(map(len, pending)) >= size:
            rows = np.concatenate(pending)
            yield rows[:size]
            pending = [rows[size:]]
    if sum(map(len, pending)):
        yield np.concatenate(pending)


def _real_rows(outputs: dict[str, jax.Array], count: int) -> dict[str, np.ndarray]:
    return {name: to_host(array)[:count] for name, array in outputs.items()}
