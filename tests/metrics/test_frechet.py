import numpy as np
import pytest
import scipy.linalg
import torch

from dit_jax.metrics import frechet
from dit_jax.metrics.frechet import Statistics, StatisticsAccumulator, frechet_distance, statistics


def correlated(num_images, dimension, seed=0):
    """Returns features float32 [N, D], not negative, whose covariance's eigenvalues fall by five decades."""
    rng = np.random.default_rng(seed)
    mixing = scipy.linalg.qr(rng.standard_normal((dimension, dimension)))[0] * np.logspace(0, -2.5, dimension)
    return np.abs(rng.standard_normal((num_images, dimension)) @ mixing.T + 0.1 * seed).astype(np.float32)


@pytest.fixture(scope="module")
def pair():
    return correlated(3000, 64, 0), correlated(2500, 64, 1)


def test_the_distance_equals_torch_fidelitys(pair, fidelity):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    theirs = [fid_features_to_statistics(torch.from_numpy(features.astype(np.float64))) for features in pair]
    expected = fid_statistics_to_metric(*theirs, verbose=False)[fidelity.KEY_METRIC_FID]
    distance = frechet_distance(*map(statistics, pair))
    assert expected > 0.5
    assert abs(distance.value - expected) < 1e-6
    assert distance.ranks == (64, 64) and distance.notes == () and distance.residual < 1e-10


def test_the_distance_equals_the_published_formula_with_a_square_root_by_schurs_method(pair):
    (mean, covariance), (other_mean, other) = ((f.mean(0, np.float64), np.cov(f, rowvar=False)) for f in pair)
    root = scipy.linalg.sqrtm(covariance @ other).real
    expected = np.sum((mean - other_mean) ** 2) + np.trace(covariance + other - 2 * root)
    assert abs(frechet_distance(*map(statistics, pair)).value - expected) < 1e-6


@pytest.mark.parametrize("count", [2, 40, 64])
def test_singular_covariances_are_exact_and_said(count):
    """Gaussians on the same axes have a closed form, whatever the variances: a sum of (s1 - s2)^2."""
    rng = np.random.default_rng(0)
    axes = scipy.linalg.qr(rng.standard_normal((64, 64)))[0]
    ones, others = rng.uniform(0.1, 2, (2, 64))
    ones[count - 1 :] = 0
    one, other = (Statistics(np.zeros(64), axes * scales**2 @ axes.T, count) for scales in (ones, others))
    for pair in ((one, other), (other, one), (one, one)):
        scales = [ones if statistics is one else others for statistics in pair]
        distance = frechet_distance(*pair)
        assert abs(distance.value - np.sum((scales[0] - scales[1]) ** 2)) < 1e-9
        assert distance.ranks == tuple(np.count_nonzero(s) for s in scales)
        assert len(distance.notes) == distance.ranks.count(count - 1)
        assert all(f"of {count} images in 64 dimensions is singular, of rank {count - 1}" in n for n in distance.notes)


def test_fewer_images_than_dimensions_have_the_rank_of_their_number_less_one():
    few, many = correlated(50, 64, 0), correlated(3000, 64, 1)
    distance = frechet_distance(statistics(few), statistics(many))
    # |A^T B|_* by other means: the non-zero eigenvalues of S1 S2 are those of the 50 x 50 matrix X S2 X^T / 49.
    centered = few - few.mean(0, np.float64)
    other = np.cov(many, rowvar=False)
    roots = np.sqrt(np.maximum(np.linalg.eigvalsh(centered @ other @ centered.T / 49), 0))
    difference = few.mean(0, np.float64) - many.mean(0, np.float64)
    expected = difference @ difference + np.trace(np.cov(few, rowvar=False) + other) - 2 * roots.sum()
    assert abs(distance.value - expected) < 1e-6
    assert distance.ranks == (49, 64) and len(distance.notes) == 1


def test_equal_features_have_distance_zero_and_constant_ones_that_of_their_means(pair):
    one = statistics(pair[0])
    assert abs(frechet_distance(one, one).value) < 1e-9
    constant = np.ones((5, 64), np.float32)
    moved = frechet_distance(statistics(constant), statistics(constant + 1))
    assert (moved.value, moved.ranks) == (64, (0, 0))


def test_statistics_do_not_depend_on_the_calls_they_came_in(pair):
    whole = statistics(pair[0])
    np.testing.assert_allclose(whole.mean, pair[0].mean(0, np.float64), rtol=1e-13)
    np.testing.assert_allclose(whole.covariance, np.cov(pair[0], rowvar=False), rtol=0, atol=1e-14)
    for sizes in ([1] * 7, [1023, 2, 900], [2048], [5, 1500]):
        accumulator = StatisticsAccumulator()
        for part in np.split(pair[0], np.cumsum(sizes)):
            accumulator.add(part)
        parts = accumulator.statistics()
        assert parts.count == 3000
        assert np.array_equal(parts.mean, whole.mean) and np.array_equal(parts.covariance, whole.covariance), sizes


def test_a_mean_far_from_zero_costs_no_digits():
    features = correlated(2000, 16).astype(np.float64)
    expected = np.cov(features, rowvar=False)
    np.testing.assert_allclose(statistics(features + 1e6).covariance, expected, rtol=0, atol=1e-9)


def test_a_square_root_that_did_not_converge_is_an_error(pair, monkeypatch):
    one, other = map(statistics, pair)
    svdvals = scipy.linalg.svdvals
    monkeypatch.setattr(frechet.scipy.linalg, "svdvals", lambda matrix, **_: svdvals(matrix) * (1 + 1e-6))
    with pytest.raises(ValueError, match=r"did not converge: its square is off by \d"):
        frechet_distance(one, other)

    def fails(matrix, **_):
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(frechet.scipy.linalg, "svdvals", fails)
    with pytest.raises(ValueError, match="LAPACK says SVD did not converge"):
        frechet_distance(one, other)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: s._replace(mean=s.mean[:5]), "of one dimension, not 5 and 16"),
        (lambda s: s._replace(covariance=-s.covariance), "no negative eigenvalue, but this matrix has -"),
        (lambda s: s._replace(covariance=s.covariance * np.nan), "must be finite"),
    ],
)
def test_what_is_no_gaussian_is_an_error(make, message):
    good = statistics(correlated(100, 16))
    with pytest.raises(ValueError, match=message):
        frechet_distance(make(good), good)


def test_bad_features_are_named():
    accumulator, features = StatisticsAccumulator(), correlated(10, 4)
    accumulator.add(features)
    with pytest.raises(ValueError, match="must have 4 dimensions, not 3"):
        accumulator.add(features[:, :3])
    features[7, 2] = np.inf
    with pytest.raises(ValueError, match="those of image 7 are not"):
        accumulator.add(features)
    with pytest.raises(ValueError, match=r"floats \[N, D\], not uint8"):
        accumulator.add(np.zeros((2, 4), np.uint8))
    with pytest.raises(ValueError, match="at least 2 images, not 1"):
        statistics(np.ones((1, 4)))
