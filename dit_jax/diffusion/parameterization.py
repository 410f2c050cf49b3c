"""What the network's 2C outputs mean: epsilon, and a log-variance between two bounds.

Epsilon: DDPM (arXiv:2006.11239), section 3.2. Learned range: Improved DDPM (arXiv:2102.09672), eq. 15.
"""

import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.process import Process, at
from dit_jax.types import Array


def split_output(output: Array) -> tuple[Array, Array]:
    """Returns epsilon and the variance's interpolation v, [B, H, W, C] each."""
    epsilon, v = jnp.split(output, 2, axis=-1)
    return epsilon, v


def x_0_from_epsilon(process: Process, x_t: Array, step: Array, epsilon: Array) -> Array:
    """Returns the x_0 that epsilon implies: x_t / sqrt(alpha_bar) - sqrt(1 / alpha_bar - 1) epsilon."""
    inverse = 1.0 / process.alphas_cumprod
    return at(np.sqrt(inverse), step) * x_t - at(np.sqrt(inverse - 1.0), step) * epsilon


def learned_log_variance(process: Process, v: Array, step: Array) -> Array:
    """Returns the log-variance of p(x_{t-1} | x_t): (v + 1) / 2 of the way from log beta-tilde to log beta."""
    fraction = (v + 1.0) / 2.0
    upper, lower = at(np.log(process.betas), step), at(process.posterior_log_variance_clipped, step)
    return fraction * upper + (1.0 - fraction) * lower
