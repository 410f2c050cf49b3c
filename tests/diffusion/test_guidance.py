"""Classifier-free guidance."""

import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import DiffusionConfig
from dit_jax.diffusion.guidance import guidance_scales, guided
from dit_jax.diffusion.process import make_process

NULL = 10
PROCESS = make_process(DiffusionConfig())


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, T, LABELS = normal(2, 3, 3, 4), jnp.array([5, 900]), jnp.array([3, 7])


def model_fn(x_t, t, labels):
    """Returns an output that tells x, t, label and channel apart."""
    factor = 1 + 0.1 * labels.reshape(-1, 1, 1, 1) * (1 + jnp.arange(8))
    return jnp.concatenate([x_t, jnp.sin(x_t)], axis=-1) * factor + t.reshape(-1, 1, 1, 1) / 1000


def null(labels):
    """Returns labels of the null class, as many."""
    return jnp.full_like(labels, NULL)


def scales(cfg_scale, cfg_interval=None):
    return guidance_scales(PROCESS, cfg_scale, cfg_interval)


CONDITIONAL, UNCONDITIONAL = model_fn(X, T, LABELS), model_fn(X, T, jnp.full_like(LABELS, NULL))


@pytest.mark.parametrize("cfg_channels", [None, 3])
def test_scale_1_is_the_conditional_model_itself(cfg_channels):
    assert guided(model_fn, null, scales(1.0), cfg_channels) is model_fn


@pytest.mark.parametrize("cfg_scale", [0.0, 0.5, 1.25, 4.0])
@pytest.mark.parametrize("cfg_channels", [None, 1, 3, 4])
def test_epsilon_goes_from_unconditional_by_scale_times_the_difference(cfg_scale, cfg_channels):
    output = guided(model_fn, null, scales(cfg_scale), cfg_channels)(X, T, LABELS)
    expected = np.array(CONDITIONAL)  # the other channels, and the variance
    guided_part = slice(0, cfg_channels or 4)
    difference = (CONDITIONAL - UNCONDITIONAL)[..., guided_part]
    expected[..., guided_part] = UNCONDITIONAL[..., guided_part] + cfg_scale * difference
    if cfg_scale == 0:
        expected = UNCONDITIONAL  # without the condition no channel is the conditional one's, nor the variance
    np.testing.assert_allclose(output, expected, atol=1e-5)


def test_scale_1_plus_x_moves_three_channels_by_x_times_the_difference():
    x = 0.5
    moved = guided(model_fn, null, scales(1 + x), 3)(X, T, LABELS) - CONDITIONAL
    np.testing.assert_allclose(moved[..., :3], x * (CONDITIONAL - UNCONDITIONAL)[..., :3], atol=1e-5)
    np.testing.assert_array_equal(moved[..., 3:], 0)


def test_interval_guides_the_noise_levels_within_it_and_no_other():
    levels = np.sqrt(1 / np.cumprod(1 - PROCESS.betas) - 1)
    low, high = levels[300], levels[700]
    np.testing.assert_array_equal(np.flatnonzero(scales(2.5, (low, high)) == 2.5), np.arange(301, 701))
    assert set(scales(2.5, (low, high))) == {1.0, 2.5} and set(scales(2.5)) == {2.5}
    output = guided(model_fn, null, scales(2.5, (low, high)), None)(X, jnp.array([5, 600]), LABELS)
    expected = guided(model_fn, null, scales(2.5), None)(X, jnp.array([5, 600]), LABELS)
    np.testing.assert_allclose(output[0], model_fn(X, jnp.array([5, 600]), LABELS)[0], atol=1e-5)
    np.testing.assert_array_equal(output[1], expected[1])


def test_scale_0_is_no_condition_at_any_level():
    assert set(scales(0.0, (0.5, 2.0))) == {0.0}


def test_network_without_learned_variance_is_guided_alike():
    half_fn = lambda *inputs: model_fn(*inputs)[..., :4]  # noqa: E731
    whole = guided(model_fn, null, scales(1.5), None)(X, T, LABELS)
    np.testing.assert_array_equal(guided(half_fn, null, scales(1.5), None)(X, T, LABELS), whole[..., :4])


def test_both_branches_run_in_one_call():
    calls = []

    def recording_fn(*args):
        calls.append(args)
        return model_fn(*args)

    guided(recording_fn, null, scales(1.5), None)(X, T, LABELS)
    ((x_t, t, labels),) = calls
    np.testing.assert_array_equal(x_t, np.concatenate([X, X]))
    np.testing.assert_array_equal(t, [5, 900, 5, 900])
    np.testing.assert_array_equal(labels, [3, 7, NULL, NULL])


def two_conditions_fn(x_t, t, conditions):
    """Returns an output in which label and text interact."""
    label, text = (conditions[name].reshape(-1, 1, 1, 1) for name in ("label", "text"))
    return jnp.concatenate([x_t, x_t], axis=-1) * (1 + label) + label * text + jnp.sin(text)


def test_weight_of_each_condition_is_its_own():
    def without(*names):
        return lambda conditions: {k: v * 0 if k in names else v for k, v in conditions.items()}

    def output(label_scale, text_scale):
        model = guided(two_conditions_fn, without("text"), scales(text_scale), None)
        return guided(model, without("label"), scales(label_scale), None)(X, T, conditions)

    conditions = {"label": jnp.array([3.0, 7.0]), "text": jnp.array([2.0, -1.0])}
    for scale in (0.0, 1.0, 3.0):
        no_label = guided(two_conditions_fn, without("text"), scales(scale), None)(X, T, without("label")(conditions))
        np.testing.assert_array_equal(output(0.0, scale), no_label)
        no_text = guided(two_conditions_fn, without("label"), scales(scale), None)(X, T, without("text")(conditions))
        np.testing.assert_array_equal(output(scale, 0.0), no_text)
    np.testing.assert_array_equal(output(1.0, 1.0), two_conditions_fn(X, T, conditions))
    a, b, c, d = (
        two_conditions_fn(X, T, without(*names)(conditions)) for names in ((), ("text",), ("label",), ("label", "text"))
    )
    both = 6.0 * a + (3 - 6) * b + (2 - 6) * c + (1 - 3 - 2 + 6) * d  # label 3, text 2: every branch's factor
    np.testing.assert_allclose(output(3.0, 2.0)[..., :4], both[..., :4], atol=1e-4)
