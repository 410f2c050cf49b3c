"""What the network's outputs mean."""

import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import DiffusionConfig
from dit_jax.diffusion.parameterization import (
    learned_log_variance,
    limit_x_0,
    predict,
    split_output,
    target,
    x_0_from_epsilon,
)
from dit_jax.diffusion.process import add_noise, make_process

PROCESS = make_process(DiffusionConfig())
STEPS = jnp.array([0, 1, 300, 999])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_first_channels_are_epsilon_and_the_others_v():
    output = normal(2, 3, 3, 8)
    epsilon, v = split_output(output)
    np.testing.assert_array_equal(epsilon, output[..., :4])
    np.testing.assert_array_equal(v, output[..., 4:])


def test_x_0_from_epsilon_inverts_add_noise():
    x_0, noise = normal(4, 3, 3, 2), normal(4, 3, 3, 2, seed=1)
    restored = x_0_from_epsilon(PROCESS, add_noise(PROCESS, x_0, STEPS, noise), STEPS, noise)
    error = abs(restored - x_0).max(axis=(1, 2, 3))
    # float32's rounding of x_t, 2^-23, is amplified by 1 / sqrt(alpha_bar): 157 at the last step.
    assert (error < 8 * 2**-23 / np.sqrt(PROCESS.alphas_cumprod[np.asarray(STEPS)])).all()


def test_log_variance_goes_from_beta_tilde_at_minus_1_to_beta_at_1_in_log_space():
    steps = np.asarray(STEPS)
    lower, upper = PROCESS.posterior_log_variance_clipped[steps], np.log(PROCESS.betas[steps])
    for v, expected in ((-1.0, lower), (1.0, upper), (0.0, (lower + upper) / 2), (3.0, 2 * upper - lower)):
        values = learned_log_variance(PROCESS, jnp.full((4, 2, 2, 1), v), STEPS)
        assert values.shape == (4, 2, 2, 1)
        np.testing.assert_allclose(values, np.broadcast_to(expected.reshape(4, 1, 1, 1), values.shape), rtol=1e-5)


def test_beta_tilde_is_below_beta_so_that_v_is_ordered():
    assert (PROCESS.posterior_log_variance_clipped[1:] < np.log(PROCESS.betas[1:])).all()


# Every prediction means the same x_0 and epsilon


def exact_output(prediction, x_0, noise):
    """Returns what a perfect network gives: the target from its definition, by the timestep's float64 alpha_bar."""
    alpha_bar = PROCESS.alphas_cumprod[np.asarray(STEPS)].reshape(-1, 1, 1, 1)
    return {"epsilon": noise, "x_0": x_0, "v": np.sqrt(alpha_bar) * noise - np.sqrt(1 - alpha_bar) * x_0}[prediction]


@pytest.mark.parametrize("prediction", ["epsilon", "x_0", "v"])
@pytest.mark.parametrize("variance", ["learned_range", "fixed_small", "fixed_large"])
def test_prediction_gives_x_0_and_epsilon_whatever_the_network_predicts(prediction, variance):
    process = make_process(DiffusionConfig(prediction=prediction, variance=variance))
    x_0, noise = normal(4, 3, 3, 2), normal(4, 3, 3, 2, seed=1)
    x_t = add_noise(process, x_0, STEPS, noise)
    output = np.asarray(exact_output(prediction, x_0, noise), np.float32)
    np.testing.assert_allclose(target(process, x_0, STEPS, noise), output, atol=1e-6)
    if variance == "learned_range":
        output = np.concatenate([output, np.ones_like(output)], axis=-1)
    x, epsilon, log_variance = predict(process, output, x_t, STEPS)
    scale = 1 / np.sqrt(process.alphas_cumprod[np.asarray(STEPS)]).reshape(-1, 1, 1, 1)
    assert (abs(x - x_0) < 8 * 2**-23 * scale).all()  # see above
    np.testing.assert_allclose(epsilon, noise, atol=1e-4)  # of x_0: divided by sqrt(1 - alpha_bar) = 0.01 at step 0
    steps = np.asarray(STEPS)
    large = np.where(steps == 0, PROCESS.posterior_variance[1], PROCESS.betas[steps])
    if variance == "learned_range":
        large = PROCESS.betas[steps]
    small = np.exp(PROCESS.posterior_log_variance_clipped[steps])
    expected = np.log(small if variance == "fixed_small" else large).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(log_variance, np.broadcast_to(expected, x_t.shape), rtol=1e-5)


def test_limits_of_x_0_clip_or_scale_and_move_epsilon_along():
    x_t, output = 3 * normal(4, 3, 3, 2), normal(4, 3, 3, 2, seed=1)
    process = make_process(DiffusionConfig(prediction="x_0", variance="fixed_small"))
    clipped = predict(process, 4 * output, x_t, STEPS, x_0_limit=1.0)
    np.testing.assert_array_equal(clipped.x_0, np.clip(4 * output, -1, 1))
    again = add_noise(process, np.asarray(clipped.x_0), STEPS, np.asarray(clipped.epsilon))
    np.testing.assert_allclose(again, x_t, atol=1e-4)
    scaled = np.asarray(limit_x_0(jnp.asarray(4 * output), 1.0, percentile=90.0))
    bounds = np.percentile(abs(4 * output), 90, axis=(1, 2, 3)).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(scaled, np.clip(4 * output, -bounds, bounds) / bounds, rtol=1e-5)
    within = 0.1 * np.tanh(output)
    np.testing.assert_array_equal(limit_x_0(jnp.asarray(within), 1.0, percentile=90.0), within)  # never enlarged
