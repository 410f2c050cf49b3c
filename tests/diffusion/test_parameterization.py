"""What the network's outputs mean."""

import jax.numpy as jnp
import numpy as np

from dit_jax.config import DiffusionConfig
from dit_jax.diffusion.parameterization import learned_log_variance, split_output, x_0_from_epsilon
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
