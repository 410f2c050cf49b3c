"""Ancestral sampling (DDPM, arXiv:2006.11239, algorithm 2) with the learned variance."""

import jax.numpy as jnp

from dit_jax.diffusion.parameterization import learned_log_variance, split_output, x_0_from_epsilon
from dit_jax.diffusion.process import Process, posterior_mean
from dit_jax.types import Array


def ancestral_step(process: Process, output: Array, x: Array, step: Array, noise: Array) -> Array:
    """Returns x_{t-1} ~ N(mean, variance) of p(x_{t-1} | x_t); the last step (0) adds no noise."""
    epsilon, v = split_output(output)
    mean = posterior_mean(process, x_0_from_epsilon(process, x, step, epsilon), x, step)
    std = jnp.exp(0.5 * learned_log_variance(process, v, step))
    return mean + jnp.where(step == 0, 0.0, 1.0).reshape(-1, 1, 1, 1) * std * noise
