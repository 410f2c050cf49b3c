"""Ancestral sampling (DDPM, arXiv:2006.11239, algorithm 2) with the network's variance or a fixed one."""

import jax.numpy as jnp

from dit_jax.diffusion.parameterization import Prediction
from dit_jax.diffusion.process import Process, posterior_mean
from dit_jax.diffusion.samplers.scan import Sampler
from dit_jax.types import Array


def ancestral_update(
    process: Process, prediction: Prediction, x: Array, step: Array, noise: Array, memory: None
) -> tuple[Array, None]:
    """Returns x_{t-1} ~ N(mean, variance) of p(x_{t-1} | x_t); the last step (0) adds no noise."""
    mean = posterior_mean(process, prediction.x_0, x, step)
    std = jnp.exp(0.5 * prediction.log_variance)
    return mean + jnp.where(step == 0, 0.0, 1.0).reshape(-1, 1, 1, 1) * std * noise, memory


ancestral = Sampler(ancestral_update)
