"""Ranks of right captions: by hand, by chance, and of a model that has learnt pairs."""

import numpy as np
import pytest

from dit_jax.metrics.retrieval import num_top, retrieval_figures


def test_ranks_are_those_counted_by_hand():
    similarity = np.array([[3, 1, 2, 0], [0, 1, 2, 3], [1, 1, 0, 0]], np.float32)
    found = retrieval_figures(similarity, np.array([0, 1, 1]))
    # above the right one: none of three; two; one that is equal, which counts half
    assert found["median_rank"] == pytest.approx(0.5 / 3) and found["top_tenth"] == pytest.approx(2 / 3)


def test_a_model_that_knows_nothing_is_at_chance():
    rng, right = np.random.default_rng(0), np.arange(2000) % 50
    for similarity in (rng.standard_normal((2000, 50)), np.zeros((2000, 50))):
        found = retrieval_figures(similarity, right)
        assert abs(found["median_rank"] - 0.5) < 0.05
        assert found["top_tenth"] <= num_top(50) / 50 + 0.02


def test_the_first_tenth_is_at_least_one_caption():
    assert [num_top(n) for n in (2, 9, 10, 24, 413)] == [1, 1, 1, 2, 41]
