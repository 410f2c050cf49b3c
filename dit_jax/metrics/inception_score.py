"""The Inception Score (Salimans et al., arXiv:1606.03498, section 4): exp of E KL(p(y|x) || p(y)), of a classifier's p.

The published numbers are of the Inception-v3 of 2015-12-05, whose 1,008 logits are taken without their bias, and the
means over 10 splits of 5,000 images, in the order of the samples.
"""

from typing import NamedTuple

import numpy as np
import scipy.special

from dit_jax.metrics.frechet import check_features


class InceptionScore(NamedTuple):
    """The mean over splits and their (population) standard deviation."""

    mean: float
    std: float


def inception_score(logits: np.ndarray, num_splits: int = 10, shuffle_seed: int | None = None) -> InceptionScore:
    """Returns the score of logits [N, classes], of any float dtype, computed in float64.

    Args:
      num_splits: consecutive parts, as equal as can be.
      shuffle_seed: None takes the images in their order, as ADM's evaluation (and the DiT paper's) does; images sorted
        by class need a shuffle. 2020 shuffles as the PyTorch package torch-fidelity does.
    """
    check_features(logits, "logits")
    if not 1 <= num_splits <= len(logits):
        raise ValueError(f"{num_splits=} must be from 1 to the number of images, {len(logits)}")
    if shuffle_seed is not None:
        logits = logits[np.random.RandomState(shuffle_seed).permutation(len(logits))]
    bounds = [i * len(logits) // num_splits for i in range(num_splits + 1)]
    scores = [_score(logits[start:end]) for start, end in zip(bounds, bounds[1:], strict=False)]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def _score(logits: np.ndarray) -> float:
    log_p = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
    log_marginal = scipy.special.logsumexp(log_p, axis=0) - np.log(len(log_p))
    return np.exp(np.sum(np.exp(log_p) * (log_p - log_marginal), axis=1).mean())
