"""Classifier guidance (ADM, arXiv:2105.05233, section 4): a classifier of noised images leads the sampler.

Its gradient is that of log p(y | x_t) with respect to x_t, at x_t, times a scale.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.parameterization import Prediction, epsilon_from_x_0, x_0_from_epsilon
from dit_jax.diffusion.process import Process, at
from dit_jax.types import Array


def class_gradient(logits_fn: Callable[[Array, Array], Array], x_t: Array, t: Array, labels: Array) -> Array:
    """Returns the gradient of log p(y | x_t), like x_t; 0 for labels beyond the classes, which ask for none.

    Args:
      logits_fn: (x_t, t [B] timesteps) -> [B, classes]; labels: [B] int32.
    """

    def log_probability(x_t: Array) -> Array:
        logs = jax.nn.log_softmax(logits_fn(x_t, t))
        chosen = jnp.take_along_axis(logs, jnp.minimum(labels, logs.shape[-1] - 1)[:, None], axis=1)[:, 0]
        return jnp.where(labels < logs.shape[-1], chosen, 0.0).sum()

    return jax.grad(log_probability)(x_t)


def led(
    process: Process, prediction: Prediction, x_t: Array, step: Array, gradient: Array, ancestral: bool
) -> Prediction:
    """Returns the prediction that the gradient (times its scale) leads to.

    For ancestral sampling the mean of p(x_{t-1} | x_t) moves by variance * gradient (algorithm 1); for the others
    epsilon becomes epsilon - sqrt(1 - alpha_bar) * gradient (algorithm 2).
    """
    if ancestral:
        shift = jnp.exp(prediction.log_variance) * gradient  # of the mean, which x_0 enters with this factor:
        x_0 = prediction.x_0 + shift / at(process.posterior_mean_coef_x_0, step)
        return Prediction(x_0, epsilon_from_x_0(process, x_t, step, x_0), prediction.log_variance)
    epsilon = prediction.epsilon - at(np.sqrt(1.0 - process.alphas_cumprod), step) * gradient
    return Prediction(x_0_from_epsilon(process, x_t, step, epsilon), epsilon, prediction.log_variance)
