"""Text encoders: padding changes nothing, masks hold, and LDM's have the parameters of its text models."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from dit_jax.models.text_encoder import (
    FrozenTextEncoder,
    TextEncoder,
    TextShape,
    abstract_text_encoder,
    relative_buckets,
)

LDM = TextShape(vocab_size=40, max_length=12, width=32, depth=2, num_heads=2, head_dim=8)
FORMS = {
    "ldm": LDM,
    "bert": dataclasses.replace(LDM, biases="all", post_norm=True, normalized=True),
    "clip": dataclasses.replace(LDM, biases="all", causal=True, pooling="last", projection=24, activation="quick_gelu"),
    "t5": dataclasses.replace(LDM, biases="none", norm="rms", positions="relative", gated=True, activation="gelu_tanh"),
}

encode = jax.jit(FrozenTextEncoder.encode)


def make_encoder(shape):
    module = TextEncoder(shape)
    ids, mask = captions([3], 4)
    return FrozenTextEncoder(jax.jit(module.init)(jax.random.key(1), ids, mask)["params"], module)


def captions(lengths, padded_to, behind_the_end=0):
    """Returns ids and mask of captions whose tokens depend on their length alone."""
    ids = np.full((len(lengths), padded_to), behind_the_end, np.int32)
    mask = np.arange(padded_to) < np.array(lengths)[:, None]
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = np.random.default_rng(length).integers(1, 40, length)
    return ids, mask


@pytest.mark.parametrize("form", FORMS)
def test_padding_changes_nothing(form):
    encoder = make_encoder(FORMS[form])
    padded = encode(encoder, *captions([12, 7, 3], 12, behind_the_end=5))
    alone = encode(encoder, *captions([7], 7))
    # float32 sums over rows of another length: their last bits
    np.testing.assert_allclose(padded["states"][1, :7], alone["states"][0], atol=2e-6)
    np.testing.assert_allclose(padded["pooled"][1], alone["pooled"][0], atol=2e-6)
    assert not padded["states"][1, 7:].any()


def test_an_empty_caption_has_states_and_gradients_that_are_finite():
    encoder = make_encoder(LDM)
    ids, mask = captions([0, 2], 4)

    def total(params):
        encoded = FrozenTextEncoder(params, encoder.module).encode(ids, mask)
        return encoded["states"].sum() + encoded["pooled"].sum()

    encoded, gradients = encode(encoder, ids, mask), jax.jit(jax.grad(total))(encoder.params)
    assert not encoded["states"][0].any() and not encoded["pooled"][0].any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_only_a_causal_token_is_blind_to_what_follows():
    for form in ("ldm", "clip"):
        encoder = make_encoder(FORMS[form])
        ids, mask = captions([6], 6)
        changed = ids.copy()
        changed[0, 5] = 39 - ids[0, 5]
        before, after = (encode(encoder, x, mask)["states"][0, :5] for x in (ids, changed))
        assert np.array_equal(before, after) == (form == "clip"), form


def test_matmuls_in_bfloat16_stay_near():
    encoder = make_encoder(LDM)
    half = FrozenTextEncoder(encoder.params, TextEncoder(LDM, dtype=jax.numpy.bfloat16))
    ids, mask = captions([3, 7], 8)
    exact, near = (encode(each, ids, mask)["states"] for each in (encoder, half))
    assert near.dtype == np.float32 and 0 < np.abs(exact - near).max() < 0.05  # of states of deviation 1


def test_buckets_of_near_distances_are_their_own():
    buckets = relative_buckets(300)
    assert buckets.min() == 0 and buckets.max() == 31
    near = buckets[150, 150 - 7 : 150 + 8]
    assert near.tolist() == [7, 6, 5, 4, 3, 2, 1, 0, 17, 18, 19, 20, 21, 22, 23]
    assert set(buckets[0, 128:]) == {31} and set(buckets[299, :172]) == {15}  # a distance of 128 and more


@pytest.mark.parametrize(
    ("shape", "millions"),
    [
        # Its text-to-image model, and the tokens of its layouts (arXiv:2112.10752, appendix E.2): 32 and 16 layers
        (TextShape(vocab_size=30_522, max_length=77, width=1280, depth=32), 542.895),
        (TextShape(vocab_size=8192, max_length=92, width=512, depth=16), 54.656),
    ],
)
def test_parameters_of_the_encoders_that_ldm_trains(shape, millions):
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_text_encoder(shape)))
    assert round(count / 1e6, 3) == millions
