"""Precision and recall of samples by their nearest neighbours (Kynkaanniemi et al., arXiv:1904.06991).

The manifold of a set of features is the union of balls around each, out to its k-th nearest neighbour in the set.
Precision is the share of samples in the references' manifold, recall that of references in the samples'. A ball's
surface belongs to it, as in ADM's evaluation and torch-fidelity.

Distances are computed in blocks on the devices, in float32, and answer most questions: which few references may be
nearest? Those few are measured anew in float64, and where the bound on float32's rounding leaves a doubt, all are. So
the shares are those of float64, to the image, on any device, in blocks of any size. (ADM's own evaluation computes
distances in float16 where it can: its shares differ by some images.)

Memory, beside the features: on each device two blocks of features, one of distances and its sorted copy, in all
`device_bytes`; on the host a few such blocks in float64, which do not grow with the number of images, and 16 candidates
an image. `tests/speed/sample_metrics.py` measures it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.metrics.frechet import check_features
from dit_jax.types import Array

NUM_NEIGHBORS = 3
BLOCK_QUERIES, BLOCK_REFERENCES = 2048, 4096
NUM_CANDIDATES = 16  # kept of each query's references: enough for the neighbours, and for all that rounding confuses


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    recall: float


def precision_recall(
    samples: np.ndarray, references: np.ndarray, num_neighbors: int = NUM_NEIGHBORS
) -> PrecisionRecall:
    """Returns precision and recall of samples [N, D] against references [M, D], of any float dtype.

    Every process of several computes the same, on its own devices.

    Raises:
      ValueError: where a set has no more than `num_neighbors` images.
    """
    check_features(samples, "samples' features")
    check_features(references, "references' features", samples.shape[1])
    smaller = min(len(samples), len(references))
    if not 1 <= num_neighbors < min(smaller, NUM_CANDIDATES):
        raise ValueError(f"{num_neighbors=} must be from 1 to {NUM_CANDIDATES - 1}, and less than {smaller} images")
    # Distances are between differences from a common centre, which float32 holds better than features far from 0.
    center = references.mean(axis=0, dtype=np.float64)
    sets = [_Set(features, center) for features in (samples, references)]
    samples_radii, references_radii = (squared_radii(features, num_neighbors) for features in sets)
    precision = in_manifold(sets[0], sets[1], references_radii).mean()
    recall = in_manifold(sets[1], sets[0], samples_radii).mean()
    return PrecisionRecall(float(precision), float(recall))


def device_bytes(dimension: int) -> int:
    """Returns the bytes on each device, at most, for features of a dimension."""
    features = (BLOCK_QUERIES + BLOCK_REFERENCES) * dimension
    return 4 * (2 * features + 3 * BLOCK_QUERIES * BLOCK_REFERENCES)  # the next block is put there ahead of use


class _Set:
    """Features with what the bounds need of them."""

    def __init__(self, features: np.ndarray, center: np.ndarray):
        self.features, self.center = features, center
        starts = range(0, len(features), BLOCK_QUERIES)
        self.norms = np.concatenate([(self.block(i, BLOCK_QUERIES, np.float64) ** 2).sum(axis=1) for i in starts])

    def block(self, start: int, size: int, dtype: type) -> np.ndarray:
        """Returns features less the centre, [<= size, D]."""
        return (self.features[start : start + size].astype(np.float64) - self.center).astype(dtype)

    def only(self, rows: np.ndarray) -> "_Set":
        """Returns the set of some of the rows."""
        return _Set(self.features[rows], self.center)


def squared_radii(features: _Set, num_neighbors: int) -> np.ndarray:
    """Returns the squared distance of each feature to its k-th nearest neighbour in the set, [N] float64."""

    def decide(lower: np.ndarray, upper: np.ndarray, rest: np.ndarray, exact) -> tuple[np.ndarray, np.ndarray]:
        # Itself is among the nearest, at distance 0.
        limit = np.partition(upper, num_neighbors, axis=1)[:, num_neighbors]
        radii = np.partition(exact(lower <= limit[:, None]), num_neighbors, axis=1)[:, num_neighbors]
        return radii, radii <= np.maximum(rest, 0)

    return _decided(features, features, np.zeros(len(features.norms)), decide)


def in_manifold(queries: _Set, references: _Set, radii: np.ndarray) -> np.ndarray:
    """Returns whether each query is in the ball of any reference, [N] bool; radii: squared, of the references."""

    def decide(lower: np.ndarray, upper: np.ndarray, rest: np.ndarray, exact) -> tuple[np.ndarray, np.ndarray]:
        doubtful = (lower <= 0) & ~(upper <= 0).any(axis=1)[:, None]
        inside = (upper <= 0).any(axis=1) | (exact(doubtful) <= 0).any(axis=1)
        return inside, inside | (rest > 0)

    return _decided(queries, references, radii, decide)


def _decided(queries: _Set, references: _Set, offsets: np.ndarray, decide) -> np.ndarray:
    """Returns what `decide` finds for each query of the smallest of |query - reference|^2 - offset.

    decide: (lower and upper bounds of the smallest [N, candidates], lower bound of all others [N], and a function that
      gives those that a mask selects exactly, infinity elsewhere) -> (values [N], whether they are sure [N]).
    """
    values, sure = decide(*_bounds(queries, references, offsets, np.float32))
    if not sure.all():
        doubtful = np.flatnonzero(~sure)
        # Beyond this, references are as near as float64 can tell.
        values[doubtful], _ = decide(*_bounds(queries.only(doubtful), references, offsets, np.float64))
    return values


def _bounds(queries: _Set, references: _Set, offsets: np.ndarray, dtype: type):
    """Returns the first three arguments of `_decided`'s `decide`, from sums in a dtype, and the function.

    |x - y|^2 - offset = |x|^2 + |y|^2 - offset - 2 x.y, where the rounding of a sum of D products is at most D units of
    their absolute sum, itself at most |x|^2 + |y|^2 (twice that, since an accelerator may make a float32 product of
    several roundings). Each term is reduced by its part of the bound, so the smallest sums are of lower bounds.
    """
    dimension, num_references = len(references.center), len(references.norms)
    unit = (dimension + 16) * float(np.finfo(dtype).eps)
    terms = references.norms * (1 - unit) - offsets * (1 + unit)
    smallest, indices = _smallest(queries, references, terms.astype(dtype), dtype)
    lower = smallest.astype(np.float64) + queries.norms[:, None] * (1 - unit)
    indices = np.minimum(indices, num_references - 1)  # where there are fewer: lower is infinite
    slack = queries.norms[:, None] + (references.norms + offsets)[indices]
    upper = lower + 2 * unit * slack

    def exact(mask: np.ndarray) -> np.ndarray:
        values = np.full(mask.shape, np.inf)
        rows, columns = np.nonzero(mask & np.isfinite(lower))
        for start in range(0, len(rows), BLOCK_QUERIES):
            row, column = rows[start : start + BLOCK_QUERIES], columns[start : start + BLOCK_QUERIES]
            index = indices[row, column]
            difference = queries.features[row].astype(np.float64) - references.features[index]
            values[row, column] = (difference * difference).sum(axis=1) - offsets[index]
        return values

    return lower, upper, lower[:, -1], exact


def _smallest(queries: _Set, references: _Set, terms: np.ndarray, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Returns the smallest of terms[j] - 2 x_i.y_j, [N, NUM_CANDIDATES] ascending, and their j; float64 on the host."""
    on_host = dtype == np.float64
    devices = [None] if on_host else jax.local_devices()
    put = (lambda arrays, device: arrays) if on_host else jax.device_put
    merge = _merge_on_host if on_host else _merge
    num_rows, num_columns = len(queries.norms), len(terms)
    rows, columns = min(BLOCK_QUERIES, num_rows), min(BLOCK_REFERENCES, num_columns)
    found = []
    for start in range(0, num_rows, rows * len(devices)):
        starts = range(start, min(start + rows * len(devices), num_rows), rows)
        places = devices[: len(starts)]
        blocks = [put(_padded(queries.block(i, rows, dtype), rows, 0), d) for i, d in zip(starts, places, strict=True)]
        none = np.full((rows, NUM_CANDIDATES), np.inf, dtype), np.zeros((rows, NUM_CANDIDATES), np.int32)
        best = [put(none, device) for device in places]
        for column in range(0, num_columns, columns):
            reference = (
                _padded(references.block(column, columns, dtype), columns, 0),
                _padded(terms[column : column + columns], columns, np.inf),
                np.int32(column),
            )
            before = best
            put_references = [put(reference, device) for device in places]
            best = [merge(*parts) for parts in zip(blocks, put_references, before, strict=True)]
            jax.block_until_ready(before)  # or all blocks would be put at once
        found += [jax.tree.map(np.asarray, one) for one in best]
    values, indices = (np.concatenate(parts)[:num_rows] for parts in zip(*found, strict=True))
    return values, indices


@jax.jit
def _merge(queries: Array, references: tuple[Array, Array, Array], best: tuple[Array, Array]) -> tuple[Array, Array]:
    block, terms, first = references
    values = terms - 2 * jnp.dot(queries, block.T, precision=jax.lax.Precision.HIGHEST)
    values = jnp.concatenate([best[0], values], axis=1)
    smallest, places = jax.lax.top_k(-values, NUM_CANDIDATES)
    before = jnp.take_along_axis(best[1], jnp.minimum(places, NUM_CANDIDATES - 1), axis=1)
    return -smallest, jnp.where(places < NUM_CANDIDATES, before, places - NUM_CANDIDATES + first)


def _merge_on_host(queries: np.ndarray, references: tuple, best: tuple) -> tuple[np.ndarray, np.ndarray]:
    block, terms, first = references
    values = np.concatenate([best[0], terms - 2 * queries @ block.T], axis=1)
    new = np.broadcast_to(np.arange(first, first + len(terms), dtype=np.int32), (len(queries), len(terms)))
    indices = np.concatenate([best[1], new], axis=1)
    places = np.argpartition(values, NUM_CANDIDATES - 1, axis=1)[:, :NUM_CANDIDATES]
    order = np.argsort(np.take_along_axis(values, places, axis=1), axis=1)
    places = np.take_along_axis(places, order, axis=1)
    return np.take_along_axis(values, places, axis=1), np.take_along_axis(indices, places, axis=1)


def _padded(array: np.ndarray, size: int, value: float) -> np.ndarray:
    """Returns the array with `size` rows, of which the last hold a value."""
    return np.pad(array, [(0, size - len(array))] + [(0, 0)] * (array.ndim - 1), constant_values=value)
