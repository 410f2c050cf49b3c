"""The Frechet distance of two sets of features, each seen as a Gaussian (Heusel et al., arXiv:1706.08500, equation 6).

    d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))

It is called FID where the features are `pool_3` of the Inception-v3 of 2015-12-05, sFID where they are the spatial ones
(arXiv:2103.03841, where they come from), and else is named after the network. Everything here is float64, on the host.
"""

from typing import NamedTuple

import numpy as np
import scipy.linalg

BLOCK_ROWS = 1024  # features are summed in blocks of so many: the same sums, however they arrive
MAX_RESIDUAL = 1e-8  # of the square roots, relative; they reach 1e-13
MIN_EIGENVALUE = -1e-5  # of a covariance, relative to its largest: float32 statistics reach -1e-7


class Statistics(NamedTuple):
    """The Gaussian of a set of features."""

    mean: np.ndarray  # [D] float64
    covariance: np.ndarray  # [D, D] float64, unbiased: the sum over N - 1
    count: int | None = None  # N, where it is known


class FrechetDistance(NamedTuple):
    """A squared Frechet distance: what is published as FID."""

    value: float
    ranks: tuple[int, int]  # of the two covariances
    residual: float  # relative, of the square roots: how far their squares are from what they are roots of
    notes: tuple[str, ...]  # what a reader must know: that a covariance is singular


class StatisticsAccumulator:
    """Sums features as they come; the statistics do not depend, by a bit, on how they were split into calls."""

    def __init__(self):
        self.count = 0
        self._pending: list[np.ndarray] = []
        self._num_pending = 0
        self._shift = self._sum = self._products = None

    def add(self, features: np.ndarray) -> None:
        """Adds features [n, D] of any float dtype, in the order of their images.

        Raises:
          ValueError: where they are not finite, or not of the dimension of those before.
        """
        features = np.asarray(features)
        dimension = self._pending[0].shape[1] if self._pending else features.shape[-1]
        if self._shift is not None:
            dimension = len(self._shift)
        check_features(features, "features", dimension)
        self._pending.append(features.astype(np.float64))
        self._num_pending += len(features)
        if self._num_pending >= BLOCK_ROWS:
            pending = np.concatenate(self._pending)
            whole = len(pending) // BLOCK_ROWS * BLOCK_ROWS
            for start in range(0, whole, BLOCK_ROWS):
                self._add_block(pending[start : start + BLOCK_ROWS])
            self._pending, self._num_pending = [pending[whole:]], len(pending) - whole

    def statistics(self) -> Statistics:
        """Returns the mean and covariance of all features added; no more can be added after.

        Raises:
          ValueError: where there are fewer than two.
        """
        if self._num_pending:
            self._add_block(np.concatenate(self._pending))
            self._pending, self._num_pending = [], 0
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, not {self.count}")
        mean = self._sum / self.count
        covariance = (self._products - np.outer(self._sum, mean)) / (self.count - 1)
        return Statistics(mean + self._shift, covariance, self.count)

    def _add_block(self, block: np.ndarray) -> None:
        if self._shift is None:  # near the mean, so that the products are not large numbers of small differences
            self._shift = block.mean(axis=0)
            self._sum = np.zeros_like(self._shift)
            self._products = np.zeros((len(self._shift),) * 2)
        block = block - self._shift
        self._sum += block.sum(axis=0)
        self._products += block.T @ block
        self.count += len(block)


def statistics(features: np.ndarray) -> Statistics:
    """Returns the mean and covariance of features [N, D], N >= 2, of any float dtype."""
    accumulator = StatisticsAccumulator()
    for start in range(0, len(features), BLOCK_ROWS):
        accumulator.add(features[start : start + BLOCK_ROWS])
    return accumulator.statistics()


def frechet_distance(one: Statistics, other: Statistics) -> FrechetDistance:
    """Returns the squared Frechet distance of two Gaussians.

    With S1 = A A^T and S2 = B B^T of eigendecompositions, the trace of (S1 S2)^(1/2) is the sum of the singular values
    of A^T B. Unlike the square root of the product, which the published implementations take, that neither becomes
    complex nor loses half of the digits where a covariance is singular. Each step is checked: A A^T against S1, B B^T
    against S2, and the sum of the squared singular values against tr(S1 S2).

    Raises:
      ValueError: where the dimensions differ, a matrix is no covariance, or a step did not converge.
    """
    if one.mean.shape != other.mean.shape:
        raise ValueError(f"features must be of one dimension, not {len(one.mean)} and {len(other.mean)}")
    first, first_residual = _root(one)
    second, second_residual = _root(other)
    products = first.T @ second  # [rank, rank]
    values = _converged(scipy.linalg.svdvals, products) if products.size else np.zeros(0)
    expected = np.vdot(one.covariance, other.covariance)  # tr(S1 S2)
    scale = np.linalg.norm(one.covariance) * np.linalg.norm(other.covariance)
    residual = max(first_residual, second_residual, abs(values @ values - expected) / scale if scale else 0.0)
    if not residual <= MAX_RESIDUAL:
        raise ValueError(
            f"the matrix square root did not converge: its square is off by {residual:.1e}, more than "
            f"{MAX_RESIDUAL:.0e}, of the covariances; are these statistics of real features?"
        )
    difference = one.mean - other.mean
    traces = np.trace(one.covariance) + np.trace(other.covariance)
    ranks = first.shape[1], second.shape[1]
    value = float(difference @ difference + traces - 2 * values.sum())
    notes = [_singular(s, rank) for s, rank in zip((one, other), ranks, strict=True) if rank < len(s.mean)]
    return FrechetDistance(value, ranks, float(residual), tuple(notes))


def check_features(features: np.ndarray, name: str, dimension: int | None = None) -> None:
    """Raises ValueError unless features are finite floats [N, D], of D = `dimension` where that is given."""
    if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating) or not features.shape[1]:
        raise ValueError(f"{name} must be floats [N, D], not {features.dtype} {list(features.shape)}")
    if dimension is not None and features.shape[1] != dimension:
        raise ValueError(f"{name} must have {dimension} dimensions, not {features.shape[1]}")
    for start in range(0, len(features), BLOCK_ROWS):  # block by block, for a mask of all would be a quarter of them
        finite = np.isfinite(features[start : start + BLOCK_ROWS]).all(axis=1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise ValueError(f"{name} must be finite, but those of image {row} are not; look at that image")


def _root(statistics: Statistics) -> tuple[np.ndarray, float]:
    """Returns A [D, rank] with A A^T = the covariance, and the relative residual of that."""
    covariance = statistics.covariance
    if not (np.isfinite(covariance).all() and np.isfinite(statistics.mean).all()):
        raise ValueError("the mean and covariance of features must be finite, but are not")
    eigenvalues, vectors = _converged(scipy.linalg.eigh, covariance)
    largest = eigenvalues[-1]
    if eigenvalues[0] < MIN_EIGENVALUE * max(largest, 0):
        raise ValueError(
            f"a covariance has no negative eigenvalue, but this matrix has {eigenvalues[0]:.3g} (the largest is "
            f"{largest:.3g}); are these statistics damaged?"
        )
    kept = eigenvalues > len(covariance) * np.finfo(np.float64).eps * largest  # the others are rounding
    root = vectors[:, kept] * np.sqrt(eigenvalues[kept])
    scale = np.linalg.norm(covariance)
    # What is negative by rounding, of float32 statistics, is no failure of the decomposition: it is left out here too.
    negative = np.linalg.norm(np.minimum(eigenvalues, 0))
    residual = np.linalg.norm(root @ root.T - covariance) - negative
    return root, max(residual, 0.0) / scale if scale else 0.0


def _converged(decompose, matrix: np.ndarray):
    try:
        return decompose(matrix, check_finite=False)
    except np.linalg.LinAlgError as error:
        raise ValueError(f"the matrix square root did not converge: LAPACK says {error}") from error


def _singular(statistics: Statistics, rank: int) -> str:
    count = f" of {statistics.count:,} images" if statistics.count else ""
    return (
        f"the covariance{count} in {len(statistics.mean):,} dimensions is singular, of rank {rank:,}: the distance is "
        "exact, but biased upwards, and compares only with distances of as many images"
    )
