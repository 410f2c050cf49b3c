"""KID: the squared maximum mean discrepancy of two sets of features (Binkowski et al., arXiv:1801.01401).

The kernel is k(x, y) = (x.y / D + 1)^3 and the estimate unbiased, so that it may be negative. It is averaged over
random subsets, which are those of the PyTorch package torch-fidelity. So the number is that
of its functions on features in float64; on float32 features they compute in float32, which loses all but three or four
digits.
"""

from typing import NamedTuple

import numpy as np

from dit_jax.metrics.frechet import check_features

SEED = 2020  # of torch-fidelity


class KernelDistance(NamedTuple):
    """The mean over subsets and their (population) standard deviation."""

    mean: float
    std: float


def kernel_distance(
    features: np.ndarray, references: np.ndarray, num_subsets: int = 100, subset_size: int = 1000, seed: int = SEED
) -> KernelDistance:
    """Returns KID of features [N, D] and references [M, D], of any float dtype, computed in float64.

    Raises:
      ValueError: where N or M is less than `subset_size`.
    """
    check_features(features, "features")
    check_features(references, "references", features.shape[1])
    smaller = min(len(features), len(references))
    if not 2 <= subset_size <= smaller:
        raise ValueError(f"{subset_size=} of KID must be from 2 to the number of images, {smaller}")
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(num_subsets):
        x = features[rng.choice(len(features), subset_size, replace=False)].astype(np.float64)
        y = references[rng.choice(len(references), subset_size, replace=False)].astype(np.float64)
        values.append(_unbiased(x, y))
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def _unbiased(x: np.ndarray, y: np.ndarray) -> float:
    """Returns the unbiased estimate of MMD^2 (equation 4 there) of x and y [n, D]."""
    n = len(x)
    within = 0.0
    for z in (x, y):
        kernel = _kernel(z, z)
        within += kernel.sum() - np.trace(kernel)
    return within / (n * (n - 1)) - 2 * _kernel(x, y).mean()


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    values = x @ y.T / x.shape[1] + 1.0
    return values * values * values  # NumPy's power takes ten times as long
