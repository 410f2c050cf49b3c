"""What the network's output means: epsilon, x_0 or v, and a variance.

Epsilon and fixed variances: DDPM (arXiv:2006.11239), section 3.2. Learned range: Improved DDPM (arXiv:2102.09672),
eq. 15. v: Salimans & Ho (arXiv:2202.00512), appendix D.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.process import Process, at
from dit_jax.types import Array


class Prediction(NamedTuple):
    """What the network's output says of x_t, [B, H, W, C] each: two views of one mean, and the step's log-variance."""

    x_0: Array
    epsilon: Array
    log_variance: Array  # of p(x_{t-1} | x_t)


def predict(
    process: Process,
    output: Array,
    x_t: Array,
    step: Array,
    x_0_limit: float | None = None,
    x_0_percentile: float | None = None,
) -> Prediction:
    """Returns what an output [B, H, W, C or 2C] means at x_t; a limited x_0 changes its epsilon too."""
    mean, log_variance = output, fixed_log_variance(process, step)
    if process.variance == "learned_range":
        mean, v = split_output(output)
        log_variance = learned_log_variance(process, v, step)
    x_0 = {"epsilon": x_0_from_epsilon, "x_0": lambda process, x_t, step, x_0: x_0, "v": x_0_from_v}[
        process.prediction
    ](process, x_t, step, mean)
    if x_0_limit is not None:
        x_0 = limit_x_0(x_0, x_0_limit, x_0_percentile)
    unchanged = process.prediction == "epsilon" and x_0_limit is None
    epsilon = mean if unchanged else epsilon_from_x_0(process, x_t, step, x_0)
    return Prediction(x_0, epsilon, jnp.broadcast_to(log_variance, x_t.shape))


def target(process: Process, x_0: Array, step: Array, noise: Array) -> Array:
    """Returns what the network should predict: noise, x_0, or v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0."""
    if process.prediction == "v":
        return at(np.sqrt(process.alphas_cumprod), step) * noise - at(np.sqrt(1 - process.alphas_cumprod), step) * x_0
    return {"epsilon": noise, "x_0": x_0}[process.prediction]


def split_output(output: Array) -> tuple[Array, Array]:
    """Returns the mean's prediction and the variance's interpolation v, [B, H, W, C] each."""
    mean, v = jnp.split(output, 2, axis=-1)
    return mean, v


def x_0_from_epsilon(process: Process, x_t: Array, step: Array, epsilon: Array) -> Array:
    """Returns the x_0 that epsilon implies: x_t / sqrt(alpha_bar) - sqrt(1 / alpha_bar - 1) epsilon."""
    inverse = 1.0 / process.alphas_cumprod
    return at(np.sqrt(inverse), step) * x_t - at(np.sqrt(inverse - 1.0), step) * epsilon


def x_0_from_v(process: Process, x_t: Array, step: Array, v: Array) -> Array:
    """Returns the x_0 that v implies: sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v."""
    return at(np.sqrt(process.alphas_cumprod), step) * x_t - at(np.sqrt(1.0 - process.alphas_cumprod), step) * v


def epsilon_from_x_0(process: Process, x_t: Array, step: Array, x_0: Array) -> Array:
    """Returns the epsilon that x_0 implies: (x_t - sqrt(alpha_bar) x_0) / sqrt(1 - alpha_bar)."""
    alphas_cumprod = process.alphas_cumprod
    return (x_t - at(np.sqrt(alphas_cumprod), step) * x_0) / at(np.sqrt(1.0 - alphas_cumprod), step)


def limit_x_0(x_0: Array, limit: float, percentile: float | None = None) -> Array:
    """Returns x_0 within [-limit, limit]: clipped, or (with a percentile) scaled as well, image by image.

    Dynamic thresholding (Imagen, arXiv:2205.11487, section 2.3): s is the percentile of |x_0|, at least the limit;
    x_0 is clipped to [-s, s], then scaled by limit / s.
    """
    if percentile is None:
        return jnp.clip(x_0, -limit, limit)
    s = jnp.maximum(jnp.percentile(jnp.abs(x_0), percentile, axis=(1, 2, 3), keepdims=True), limit)
    return jnp.clip(x_0, -s, s) * (limit / s)


def learned_log_variance(process: Process, v: Array, step: Array) -> Array:
    """Returns the log-variance of p(x_{t-1} | x_t): (v + 1) / 2 of the way from log beta-tilde to log beta."""
    fraction = (v + 1.0) / 2.0
    upper, lower = at(np.log(process.betas), step), at(process.posterior_log_variance_clipped, step)
    return fraction * upper + (1.0 - fraction) * lower


def fixed_log_variance(process: Process, step: Array) -> Array:
    """Returns the log-variance [B, 1, 1, 1] of a process whose network does not learn it."""
    large = process.variance == "fixed_large"
    return at(process.fixed_large_log_variance if large else process.posterior_log_variance_clipped, step)
