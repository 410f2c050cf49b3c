"""The hybrid training loss: mean squared error of epsilon, plus the variational bound that trains the variance.

Improved DDPM (arXiv:2102.09672), section 3.1; the bound's terms are those of DDPM (arXiv:2006.11239), eq. 5.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.parameterization import learned_log_variance, split_output, x_0_from_epsilon
from dit_jax.diffusion.process import Process, add_noise, at, posterior_mean
from dit_jax.types import Array, ModelFn


def mean_per_example(x: Array) -> Array:
    """Returns the mean over all axes but the first."""
    return x.mean(axis=tuple(range(1, x.ndim)))


def gaussian_kl(mean_1: Array, log_variance_1: Array, mean_2: Array, log_variance_2: Array) -> Array:
    """Returns KL(N_1 || N_2), elementwise, in nats."""
    ratio = jnp.exp(log_variance_1 - log_variance_2)
    distance = (mean_1 - mean_2) ** 2 * jnp.exp(-log_variance_2)
    return 0.5 * (log_variance_2 - log_variance_1 - 1.0 + ratio + distance)


def normal_cdf(x: Array) -> Array:
    """Returns the standard normal's distribution function in its tanh form, as the released models were trained."""
    return 0.5 * (1.0 + jnp.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def discretized_log_likelihood(x: Array, mean: Array, log_variance: Array) -> Array:
    """Returns log p(x), elementwise in nats, of a Gaussian integrated over bins of half-width 1/255 (DDPM, eq. 13).

    The outermost bins reach to infinity.
    """
    inverse_std = jnp.exp(-0.5 * log_variance)
    upper = normal_cdf(inverse_std * (x - mean + 1 / 255))
    lower = normal_cdf(inverse_std * (x - mean - 1 / 255))
    probability = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1.0 - lower, upper - lower))
    return jnp.log(jnp.maximum(probability, 1e-12))


def variational_bound(process: Process, output: Array, x_0: Array, x_t: Array, step: Array) -> Array:
    """Returns the bound's term of each image's step, [B], in bits per dimension."""
    epsilon, v = split_output(output)
    true_mean = posterior_mean(process, x_0, x_t, step)
    true_log_variance = at(process.posterior_log_variance_clipped, step)
    mean = posterior_mean(process, x_0_from_epsilon(process, x_t, step, epsilon), x_t, step)
    log_variance = learned_log_variance(process, v, step)
    kl = mean_per_example(gaussian_kl(true_mean, true_log_variance, mean, log_variance))
    nll = -mean_per_example(discretized_log_likelihood(x_0, mean, log_variance))
    return jnp.where(step == 0, nll, kl) / jnp.log(2.0)


def hybrid_loss(
    process: Process, model_fn: ModelFn, x_0: Array, step: Array, noise: Array, labels: Array
) -> dict[str, Array]:
    """Returns the loss and its terms, [B] float32 each: `loss` = `mse` + `vlb`.

    Args:
      process: the training process; x_0: [B, H, W, C]; step: [B] int32; noise: like x_0; labels: [B] int32.
      model_fn: called once, with (x_t, timestep, labels).
    """
    x_t = add_noise(process, x_0, step, noise)
    output = model_fn(x_t, jnp.asarray(process.timesteps)[step], labels)
    epsilon, v = split_output(output)
    mse = mean_per_example((epsilon - noise) ** 2)
    # The bound trains the variance only: its mean is detached (section 3.1), or its noise would swamp the MSE.
    detached = jnp.concatenate([jax.lax.stop_gradient(epsilon), v], axis=-1)
    vlb = variational_bound(process, detached, x_0, x_t, step)
    return {"loss": mse + vlb, "mse": mse, "vlb": vlb}
