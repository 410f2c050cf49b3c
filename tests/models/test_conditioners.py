"""Raw conditions: dropping them, and their nulls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.models.conditioners import as_conditions, drop_conditions, null_conditions

NULL = 10


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_labels_are_dropped_at_the_rate_and_kept_otherwise(rate):
    labels = jnp.arange(20_000) % NULL
    dropped = drop_conditions(jax.random.key(0), {"label": labels}, {"label": rate}, NULL)["label"]
    is_null = np.asarray(dropped == NULL)
    assert abs(is_null.mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / len(labels)) + 1e-9
    np.testing.assert_array_equal(dropped[~is_null], labels[~is_null])
    assert dropped.dtype == labels.dtype


def test_labels_are_dropped_anew_with_each_key():
    labels = {"label": jnp.zeros(1000, jnp.int32)}
    one, other = (drop_conditions(jax.random.key(seed), labels, {"label": 0.5}, 1)["label"] for seed in (0, 1))
    assert (one != other).any()


def test_each_condition_is_dropped_by_itself_and_whole():
    conditions = {
        "label": jnp.zeros(4000, jnp.int32),
        "text": {"states": jnp.ones((4000, 3, 2)), "mask": jnp.ones((4000, 3), bool)},
    }
    dropped = drop_conditions(jax.random.key(0), conditions, {"label": 0.5, "text": 0.25}, NULL)
    labels, mask = np.asarray(dropped["label"] == NULL), np.asarray(~dropped["text"]["mask"])
    np.testing.assert_array_equal(mask.all(axis=1), mask.any(axis=1))
    np.testing.assert_array_equal(dropped["text"]["states"][..., 0] == 0, mask)
    texts = mask.any(axis=1)
    for share, expected in ((labels, 0.5), (texts, 0.25), (labels & texts, 0.125)):
        assert abs(share.mean() - expected) < 0.04  # 5 standard deviations


def test_nulls_are_of_the_named_conditions_alone():
    conditions = {"label": jnp.array([1, 2]), "text": {"mask": jnp.ones((2, 3), bool)}}
    nulls = null_conditions(conditions, ("text",), NULL)
    np.testing.assert_array_equal(nulls["label"], [1, 2])
    assert not nulls["text"]["mask"].any()
    np.testing.assert_array_equal(null_conditions(conditions, ("label",), NULL)["label"], [NULL, NULL])


def test_labels_alone_are_conditions():
    labels = jnp.array([1, 2])
    assert as_conditions(labels)["label"] is labels
    assert as_conditions({"label": labels})["label"] is labels
