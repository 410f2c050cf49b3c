"""Schedules and spacings against the papers' formulas, term by term."""

import math

import numpy as np
import pytest

from dit_jax.config import DiffusionConfig
from dit_jax.diffusion.process import make_process, respace
from dit_jax.diffusion.schedules import make_betas, respaced_timesteps


def test_scaled_linear_is_linear_in_the_square_root():
    betas = make_betas(DiffusionConfig(schedule="scaled_linear", beta_start=0.00085, beta_end=0.012))
    for t in (0, 1, 500, 999):
        root = math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * t / 999
        assert math.isclose(betas[t], root**2, rel_tol=1e-12)


def test_cosine_has_the_alpha_bar_of_its_formula_until_beta_is_clipped():
    process = make_process(DiffusionConfig(schedule="cosine"))

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    assert process.betas[-1] == 0.999 and (process.betas[:-1] < 0.999).all()
    for t in (0, 1, 500, 998):
        assert math.isclose(process.alphas_cumprod[t], f(t + 1) / f(0), rel_tol=1e-11)


@pytest.mark.parametrize(
    ("num_steps", "spacing", "expected"),
    [
        (5, "even", [0, 250, 500, 749, 999]),
        (5, "ddim", [0, 200, 400, 600, 800]),
        (3, "ddim", [0, 334, 668]),
        (5, "trailing", [199, 399, 599, 799, 999]),
        (3, "trailing", [332, 666, 999]),
        (1, "even", [999]),
        (1, "trailing", [999]),
    ],
)
def test_spacing(num_steps, spacing, expected):
    timesteps = respaced_timesteps(1000, num_steps, spacing)
    assert timesteps.dtype == np.int32
    np.testing.assert_array_equal(timesteps, expected)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_explicit_timesteps_keep_alpha_bar_at_each(schedule):
    process = make_process(DiffusionConfig(schedule=schedule))
    respaced = respace(process, (3, 500, 900))
    np.testing.assert_array_equal(respaced.timesteps, [3, 500, 900])
    np.testing.assert_allclose(respaced.alphas_cumprod, process.alphas_cumprod[[3, 500, 900]], rtol=1e-12)
