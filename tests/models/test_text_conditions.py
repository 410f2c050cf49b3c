"""Captions in a DiT: every way they reach it, padding, the null, and long skips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import config_from_dict
from dit_jax.models.build import abstract_conditions, build_denoiser
from dit_jax.models.conditioners import null_conditions

FUSIONS = {
    "cross-attention": ("adaln_zero", "cross_attention"),
    "in context": ("in_context",),
    "adaLN": ("adaln_zero",),
    "all": ("adaln_zero", "cross_attention", "in_context"),
}
LENGTH, CLASSES = 6, 3


def text_config(conditioning, trained, **dit):
    text = {"max_length": LENGTH, "vocab_size": 11, "frozen_width": 12}
    if trained:
        text["transformer"] = {"width": 16, "depth": 1, "num_heads": 2}
    return config_from_dict(
        {
            "stage": "diffusion",
            "data": {"name": "captioned", "image_size": 4, "num_classes": CLASSES},
            "dit": {"depth": 3, "width": 16, "num_heads": 2, "patch_size": 2, "conditioning": conditioning} | dit,
            "conditions": {"text": text},
            "training": {"num_train_steps": 1},
        }
    )


@functools.cache
def model_of(fusion, trained):
    """Returns apply(x, t, conditions) of random parameters, none of them zero."""
    config = text_config(FUSIONS[fusion], trained)
    model, rng = build_denoiser(config), np.random.default_rng(0)
    x, t = inputs(1)
    abstract = jax.eval_shape(model.init, jax.random.key(0), x, t, conditions_of([[1]], trained))
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype), abstract)
    return jax.jit(functools.partial(model.apply, params))


def inputs(count):
    return np.random.default_rng(1).standard_normal((count, 4, 4, 3), np.float32), jnp.full(count, 7)


def conditions_of(captions, trained, length=LENGTH):
    """Returns the raw conditions of captions, each a list of numbers of tokens."""
    mask = np.array([[i < len(caption) for i in range(length)] for caption in captions])
    ids = np.array([[*caption, *[0] * (length - len(caption))] for caption in captions], np.int32)
    text = {"mask": mask, "ids": ids}
    if not trained:
        table = np.random.default_rng(2).standard_normal((11, 12), np.float32)
        states = np.where(mask[..., None], table[ids], 0)
        text = {"mask": mask, "states": states, "pooled": states.sum(axis=1)}
    return {"label": np.zeros(len(captions), np.int32), "text": text}


CASES = [(fusion, trained) for fusion in FUSIONS for trained in (False, True)]


@pytest.mark.parametrize(("fusion", "trained"), CASES)
def test_padding_of_a_caption_changes_nothing(fusion, trained):
    apply, (x, t) = model_of(fusion, trained), inputs(1)
    unpadded = apply(x, t, conditions_of([[3, 1, 4]], trained, length=3))
    # Sums over more terms, all zero, in another order.
    np.testing.assert_allclose(apply(x, t, conditions_of([[3, 1, 4]], trained)), unpadded, atol=2e-5)
    assert np.abs(apply(x, t, conditions_of([[3, 1, 5]], trained)) - unpadded).max() > 1e-3


@pytest.mark.parametrize(("fusion", "trained"), CASES)
def test_captions_of_mixed_lengths_equal_one_by_one(fusion, trained):
    captions = [[1, 2, 3, 4, 5, 6], [7], [8, 9, 10], []]
    apply, (x, t) = model_of(fusion, trained), inputs(4)
    together = apply(x, t, conditions_of(captions, trained))
    for i, caption in enumerate(captions):
        alone = apply(x[i : i + 1], t[:1], conditions_of([caption], trained))
        np.testing.assert_allclose(together[i], alone[0], atol=2e-5)


@pytest.mark.parametrize(("fusion", "trained"), CASES)
def test_null_of_every_caption_is_the_same_and_that_of_the_empty_one(fusion, trained):
    apply, (x, t) = model_of(fusion, trained), inputs(1)
    outputs = [
        apply(x, t, null_conditions(conditions_of([caption], trained), ("text",), CLASSES))
        for caption in ([3, 1, 4], [2])
    ]
    np.testing.assert_array_equal(*outputs)
    np.testing.assert_array_equal(outputs[0], apply(x, t, conditions_of([[]], trained)))
    assert np.abs(outputs[0] - apply(x, t, conditions_of([[2]], trained))).max() > 1e-3


@pytest.mark.parametrize("trained", [False, True])
def test_abstract_conditions_are_those_of_captions(trained):
    abstract = abstract_conditions(text_config(("adaln_zero",), trained), 2)
    shapes = jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), abstract)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), conditions_of([[1], [2]], trained)) or trained
    assert set(abstract["text"]) == ({"ids", "mask"} if trained else {"states", "pooled", "mask"})


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_long_skips_join_each_block_of_the_first_half_to_its_mirror(depth):
    config = text_config(("in_context",), False, depth=depth, long_skips=True)
    model, (x, t) = build_denoiser(config), inputs(1)
    params = jax.eval_shape(model.init, jax.random.key(0), x, t, conditions_of([[1]], False))["params"]
    joined = [i for i in range(depth) if "skip" in params[f"blocks_{i}"]]
    assert joined == list(range((depth + 1) // 2, depth))
    for i in joined:
        assert params[f"blocks_{i}"]["skip"]["kernel"].shape == (32, 16)


def test_a_skip_carries_what_the_blocks_between_do_not():
    config = text_config(("in_context",), False, depth=3, long_skips=True)
    model, (x, t), rng = build_denoiser(config), inputs(1), np.random.default_rng(0)
    conditions = conditions_of([[1]], False)
    abstract = jax.eval_shape(model.init, jax.random.key(0), x, t, conditions)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype), abstract)

    def output(scale, x):
        kernel = params["params"]["blocks_2"]["skip"]["kernel"]
        changed = jax.tree.map(lambda leaf: leaf, params)  # a copy of the dicts
        changed["params"]["blocks_2"]["skip"]["kernel"] = kernel.at[:16].set(0).at[16:].multiply(scale)
        return model.apply(changed, x, t, conditions)

    # Of what the block between made nothing is read: without the skip, the image changes nothing.
    np.testing.assert_array_equal(output(0.0, x), output(0.0, x + 1))
    assert np.abs(output(1.0, x) - output(1.0, x + 1)).max() > 1e-3
