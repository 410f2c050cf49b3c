"""The schedule's tables against explicit loops, respacing, and the posterior against Bayes' rule; all in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import DiffusionConfig
from dit_jax.diffusion.process import add_noise, at, make_process, posterior_mean, respace
from dit_jax.diffusion.schedules import respaced_timesteps

PAPER = DiffusionConfig()
TABLES = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef_x_0",
    "posterior_mean_coef_x_t",
)


def loop_tables(num_timesteps, start, end):
    """Returns the tables of a linear schedule by a loop over t, with Python's floats alone."""
    rows, alpha_bar = [], 1.0
    for t in range(num_timesteps):
        beta = start + (end - start) * t / (num_timesteps - 1)
        previous, alpha_bar = alpha_bar, alpha_bar * (1.0 - beta)
        variance = (1.0 - previous) / (1.0 - alpha_bar) * beta
        coefficients = (
            math.sqrt(previous) * beta / (1.0 - alpha_bar),
            math.sqrt(1.0 - beta) * (1.0 - previous) / (1.0 - alpha_bar),
        )
        rows.append([beta, alpha_bar, previous, variance, math.log(variance) if t else math.nan, *coefficients])
    rows[0][4] = rows[1][4]  # log 0 is clipped to the next
    return dict(zip(TABLES, np.array(rows).T, strict=True))


@pytest.mark.parametrize("diffusion", [PAPER, DiffusionConfig(num_timesteps=10, beta_start=0.02, beta_end=0.4)])
def test_tables_equal_a_loop_in_float64(diffusion):
    process = make_process(diffusion)
    expected = loop_tables(diffusion.num_timesteps, diffusion.beta_start, diffusion.beta_end)
    for name in TABLES:
        table = getattr(process, name)
        assert table.dtype == np.float64
        np.testing.assert_allclose(table, expected[name], rtol=1e-12, atol=1e-12, err_msg=name)
    np.testing.assert_array_equal(process.timesteps, np.arange(diffusion.num_timesteps))
    assert process.num_steps == diffusion.num_timesteps


def test_papers_schedule_ends_in_noise():
    process = make_process(PAPER)
    assert process.betas[0] == 1e-4 and process.betas[-1] == 2e-2
    assert process.alphas_cumprod[0] == 1 - 1e-4 and process.alphas_cumprod[-1] < 5e-5
    assert (np.diff(process.alphas_cumprod) < 0).all()


# Respacing


@pytest.mark.parametrize("num_timesteps", [2, 10, 1000])
def test_respaced_timesteps_ascend_evenly_from_0_to_the_last(num_timesteps):
    for num_steps in range(2, num_timesteps + 1):
        timesteps = respaced_timesteps(num_timesteps, num_steps)
        assert len(timesteps) == num_steps and timesteps.dtype == np.int32
        assert timesteps[0] == 0 and timesteps[-1] == num_timesteps - 1
        gaps, even = np.diff(timesteps), (num_timesteps - 1) / (num_steps - 1)
        assert gaps.min() >= 1 and gaps.min() >= math.floor(even) and gaps.max() <= math.ceil(even)


def test_single_step_starts_from_noise():
    np.testing.assert_array_equal(respaced_timesteps(1000, 1), [999])


@pytest.mark.parametrize("num_steps", [1, 2, 7, 50, 250, 999])
def test_respaced_process_keeps_alpha_bar_at_each_timestep(num_steps):
    process = make_process(PAPER)
    shorter = respace(process, num_steps)
    assert shorter.num_steps == num_steps
    np.testing.assert_allclose(shorter.alphas_cumprod, process.alphas_cumprod[shorter.timesteps], rtol=1e-11)
    assert (shorter.betas > 0).all() and (shorter.betas < 1).all()
    for name in TABLES:
        assert np.isfinite(getattr(shorter, name)).all(), name


def test_respacing_to_every_step_is_the_identity():
    process = make_process(PAPER)
    same = respace(process, process.num_steps)
    np.testing.assert_array_equal(same.timesteps, process.timesteps)
    for name in TABLES:
        np.testing.assert_allclose(getattr(same, name), getattr(process, name), rtol=1e-11, err_msg=name)


def test_respacing_twice_keeps_the_timesteps_of_training():
    twice = respace(respace(make_process(PAPER), 100), 10)
    assert twice.timesteps[0] == 0 and twice.timesteps[-1] == 999
    np.testing.assert_allclose(twice.alphas_cumprod, make_process(PAPER).alphas_cumprod[twice.timesteps], rtol=1e-12)


# Posterior and noise


@pytest.mark.parametrize("num_steps", [1000, 25])
def test_posterior_is_bayes_rule(num_steps):
    """q(x_{t-1} | x_t, x_0) is N(sqrt(abar_{t-1}) x_0, 1 - abar_{t-1}) times N(x_t; sqrt(alpha_t) x_{t-1}, beta_t)."""
    process = respace(make_process(PAPER), num_steps)
    x_0, x_t = 0.7, -1.3
    for step in range(1, num_steps):
        beta, previous = process.betas[step], process.alphas_cumprod[step - 1]
        precision = 1 / (1 - previous) + (1 - beta) / beta
        mean = (math.sqrt(previous) * x_0 / (1 - previous) + math.sqrt(1 - beta) * x_t / beta) / precision
        ours = process.posterior_mean_coef_x_0[step] * x_0 + process.posterior_mean_coef_x_t[step] * x_t
        assert math.isclose(ours, mean, rel_tol=1e-9, abs_tol=1e-12)
        assert math.isclose(process.posterior_variance[step], 1 / precision, rel_tol=1e-9)
        assert math.isclose(process.posterior_log_variance_clipped[step], -math.log(precision), rel_tol=1e-9)


def test_posterior_of_the_first_step_is_x_0():
    process, step = make_process(PAPER), jnp.zeros(2, jnp.int32)
    x_0, x_t = (np.random.default_rng(i).normal(size=(2, 2, 2, 1)).astype(np.float32) for i in range(2))
    np.testing.assert_allclose(posterior_mean(process, x_0, x_t, step), x_0, atol=1e-6)
    assert process.posterior_variance[0] == 0


def test_table_is_read_per_image_as_float32():
    coefficients = at(np.array([0.1, 0.2, 0.3]), jnp.array([2, 0]))
    assert coefficients.shape == (2, 1, 1, 1) and coefficients.dtype == jnp.float32
    np.testing.assert_allclose(coefficients.reshape(-1), [0.3, 0.1], rtol=1e-6)


def test_noise_shrinks_the_image_and_adds_the_rest_of_the_variance():
    process, count = make_process(PAPER), 40_000
    step = jnp.array([0, 250, 999])
    x_0 = jnp.full((3, 200, 200, 1), 0.8)
    x_t = np.asarray(add_noise(process, x_0, step, jax.random.normal(jax.random.key(0), x_0.shape)), np.float64)
    for i, alpha_bar in enumerate(process.alphas_cumprod[np.asarray(step)]):
        std, error = math.sqrt(1 - alpha_bar), 5 / math.sqrt(count)  # five standard errors
        assert abs(x_t[i].mean() - math.sqrt(alpha_bar) * 0.8) < error * std
        assert abs(x_t[i].std() / std - 1) < error


def test_noise_keeps_unit_variance():
    process = make_process(PAPER)
    x_0 = jax.random.normal(jax.random.key(0), (1, 100, 100, 1))
    noise = jax.random.normal(jax.random.key(1), x_0.shape)
    for t in (0, 300, 999):
        assert abs(float(add_noise(process, x_0, jnp.array([t]), noise).var()) - 1) < 0.05
