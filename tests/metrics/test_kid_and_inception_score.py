"""KID and IS against torch-fidelity's functions in float64, within 1e-6 of the value."""

import numpy as np
import pytest
import torch

from dit_jax.metrics.inception_score import inception_score
from dit_jax.metrics.kid import kernel_distance


def features(num_images, dimension, seed):
    rng = np.random.default_rng(seed)
    return (np.abs(rng.standard_normal((num_images, dimension))) + 0.05 * seed).astype(np.float32)


@pytest.mark.parametrize("options", [{"num_subsets": 3}, {"num_subsets": 7, "subset_size": 300, "seed": 5}])
def test_kid_equals_torch_fidelitys(options, fidelity):
    from torch_fidelity.metric_kid import kid_features_to_metric

    theirs = {"num_subsets": "kid_subsets", "subset_size": "kid_subset_size", "seed": "rng_seed"}
    one, other = features(1300, 64, 0), features(1100, 64, 1)
    arrays = (torch.from_numpy(array.astype(np.float64)) for array in (one, other))
    expected = kid_features_to_metric(*arrays, verbose=False, **{theirs[name]: x for name, x in options.items()})
    found = kernel_distance(one, other, **options)
    np.testing.assert_allclose(found.mean, expected[fidelity.KEY_METRIC_KID_MEAN], rtol=1e-9)
    np.testing.assert_allclose(found.std, expected[fidelity.KEY_METRIC_KID_STD], rtol=1e-9)


def test_kid_is_the_definitions_sum_over_pairs():
    x, y = (array.astype(np.float64) for array in (features(6, 3, 0), features(6, 3, 1)))
    kernel = lambda a, b: (a @ b / 3 + 1) ** 3  # noqa: E731
    others = [(i, j) for i in range(6) for j in range(6) if i != j]
    expected = np.mean([kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in others])
    expected -= 2 * np.mean([kernel(a, b) for a in x for b in y])
    np.testing.assert_allclose(kernel_distance(x, y, num_subsets=1, subset_size=6).mean, expected, rtol=1e-12)


def test_kid_of_too_few_images_says_how_many_there_are():
    with pytest.raises(ValueError, match="subset_size=1000 of KID must be from 2 to the number of images, 900"):
        kernel_distance(features(900, 4, 0), features(1000, 4, 0))


@pytest.mark.parametrize(("num_images", "num_splits"), [(1000, 10), (1003, 10), (50, 1)])
@pytest.mark.parametrize("shuffle_seed", [None, 2020])
def test_the_inception_score_equals_torch_fidelitys(num_images, num_splits, shuffle_seed, fidelity):
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * np.random.default_rng(0).standard_normal((num_images, 1008)).astype(np.float32)
    shuffle = {"shuffle": False} if shuffle_seed is None else {"shuffle": True, "rng_seed": shuffle_seed}
    expected = isc_features_to_metric(torch.from_numpy(logits), splits=num_splits, **shuffle)
    score = inception_score(logits, num_splits, shuffle_seed)
    np.testing.assert_allclose(score.mean, expected[fidelity.KEY_METRIC_ISC_MEAN], rtol=1e-9)
    np.testing.assert_allclose(score.std, expected[fidelity.KEY_METRIC_ISC_STD], rtol=1e-9, atol=1e-12)


def test_the_inception_score_is_the_number_of_classes_that_are_drawn_surely_and_evenly():
    logits = np.repeat(1000 * np.eye(7), 30, axis=0)
    np.testing.assert_allclose(inception_score(logits, 1).mean, 7)
    np.testing.assert_allclose(inception_score(logits, 7).mean, 1)  # sorted by class: a split has one
    assert inception_score(logits, 7, shuffle_seed=0).mean > 5
    with pytest.raises(ValueError, match="num_splits=10 must be from 1 to the number of images, 5"):
        inception_score(logits[:5])
