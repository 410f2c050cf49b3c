"""The hybrid training loss: the mean's squared error, plus the variational bound that trains the variance.

Improved DDPM (arXiv:2102.09672), section 3.1; the bound's terms are those of DDPM (arXiv:2006.11239), eq. 5.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.parameterization import predict, split_output, target
from dit_jax.diffusion.process import Process, add_noise, at, posterior_mean
from dit_jax.types import Array, Conditions, ModelFn


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
    prediction = predict(process, output, x_t, step)
    true_mean = posterior_mean(process, x_0, x_t, step)
    true_log_variance = at(process.posterior_log_variance_clipped, step)
    mean = posterior_mean(process, prediction.x_0, x_t, step)
    kl = mean_per_example(gaussian_kl(true_mean, true_log_variance, mean, prediction.log_variance))
    nll = -mean_per_example(discretized_log_likelihood(x_0, mean, prediction.log_variance))
    return jnp.where(step == 0, nll, kl) / jnp.log(2.0)


def min_snr_weight(process: Process, gamma: float) -> np.ndarray:
    """Returns the weight [N] float64 of each step's squared error: min(SNR, gamma) on x_0's (arXiv:2303.09556).

    The error of x_0 is that of epsilon divided by the SNR, and that of v divided by SNR + 1.
    """
    snr = process.snr
    return np.minimum(snr, gamma) / {"x_0": 1.0, "epsilon": snr, "v": snr + 1.0}[process.prediction]


def hybrid_loss(
    process: Process,
    model_fn: ModelFn,
    x_0: Array,
    step: Array,
    noise: Array,
    conditions: Conditions,
    min_snr_gamma: float | None = None,
) -> dict[str, Array]:
    """Returns the loss and its terms, [B] float32 each: `loss` = weight * `mse` + `vlb`.

    Args:
      process: the training process; x_0: [B, H, W, C]; step: [B] int32; noise: like x_0; conditions: of the images.
      model_fn: called once, with (x_t, timestep, conditions).
      min_snr_gamma: of the weight (`min_snr_weight`); None: 1.

    With a fixed variance there is nothing for the bound to train, and `vlb` is left out.
    """
    x_t = add_noise(process, x_0, step, noise)
    output = model_fn(x_t, jnp.asarray(process.timesteps)[step], conditions)
    learned = process.variance == "learned_range"
    mean, v = split_output(output) if learned else (output, None)
    mse = mean_per_example((mean - target(process, x_0, step, noise)) ** 2)
    weight = 1.0 if min_snr_gamma is None else jnp.asarray(min_snr_weight(process, min_snr_gamma), jnp.float32)[step]
    if not learned:
        return {"loss": weight * mse, "mse": mse}
    # The bound trains the variance only: its mean is detached (section 3.1), or its noise would swamp the MSE.
    detached = jnp.concatenate([jax.lax.stop_gradient(mean), v], axis=-1)
    vlb = variational_bound(process, detached, x_0, x_t, step)
    return {"loss": weight * mse + vlb, "mse": mse, "vlb": vlb}
