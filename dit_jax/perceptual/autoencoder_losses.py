"""The training loss of the KL autoencoder (LDM, arXiv:2112.10752, appendix G)."""

import jax.numpy as jnp

from dit_jax.config import AutoencoderConfig
from dit_jax.types import Array

RECONSTRUCTION_ERRORS = {"l1": jnp.abs, "l2": jnp.square}


def sum_per_image(x: Array) -> Array:
    """Returns the sum over all axes but the first."""
    return x.sum(axis=tuple(range(1, x.ndim)))


def kl_to_standard_normal(mean: Array, log_variance: Array) -> Array:
    """Returns KL(N(mean, exp(log_variance)) || N(0, 1)) of each image, [B], in nats."""
    return 0.5 * sum_per_image(mean**2 + jnp.exp(log_variance) - 1.0 - log_variance)


def autoencoder_loss(
    config: AutoencoderConfig, images: Array, reconstructions: Array, mean: Array, log_variance: Array
) -> dict[str, Array]:
    """Returns the loss of each image and its terms, [B] float32: both summed over the image, as LDM weights them."""
    error = RECONSTRUCTION_ERRORS[config.reconstruction_loss]
    reconstruction = sum_per_image(error(images - reconstructions))
    kl = kl_to_standard_normal(mean, log_variance)
    return {"loss": reconstruction + config.kl_weight * kl, "reconstruction": reconstruction, "kl": kl}
