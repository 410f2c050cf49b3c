"""The terms of the autoencoder's training loss (LDM, arXiv:2112.10752, appendix G), of each image, float32 [B].

A KL autoencoder's are summed over the image and over its latent, a VQ autoencoder's are means: so LDM weights them.
"""

import jax
import jax.numpy as jnp

from dit_jax.config import AutoencoderConfig, CodebookConfig
from dit_jax.types import Array

RECONSTRUCTION_ERRORS = {"l1": jnp.abs, "l2": jnp.square}


def sum_per_image(x: Array) -> Array:
    """Returns the sum over all axes but the first."""
    return x.sum(axis=tuple(range(1, x.ndim)))


def mean_per_image(x: Array) -> Array:
    """Returns the mean over all axes but the first."""
    return x.mean(axis=tuple(range(1, x.ndim)))


def likelihood_terms(
    config: AutoencoderConfig,
    images: Array,
    reconstructions: Array,
    perceptual: Array | None = None,
    log_variance: Array | float = 0.0,
) -> dict[str, Array]:
    """Returns the negative log-likelihood `nll`, up to constants, and the terms that make it.

    nll = error / exp(log_variance) + log_variance; the error is |x - x'| (or its square) + perceptual_weight * LPIPS.

    Args:
      images, reconstructions: [B, H, W, C].
      perceptual: LPIPS of each image, [B]; None: no such term.
      log_variance: scalar, learned or 0.
    """
    reduce = mean_per_image if config.codebook else sum_per_image
    error = RECONSTRUCTION_ERRORS[config.reconstruction_loss](images - reconstructions)
    terms = {"reconstruction": reduce(error)}
    if perceptual is not None:
        terms["perceptual"] = perceptual
        error = error + config.perceptual_weight * perceptual[:, None, None, None]
    return terms | {"nll": reduce(error * jnp.exp(-log_variance) + log_variance)}


def kl_to_standard_normal(mean: Array, log_variance: Array) -> Array:
    """Returns KL(N(mean, exp(log_variance)) || N(0, 1)) of each image, [B], in nats."""
    return 0.5 * sum_per_image(mean**2 + jnp.exp(log_variance) - 1.0 - log_variance)


def codebook_loss(config: CodebookConfig, latents: Array, codes: Array) -> Array:
    """Returns the loss of codes [B, h, w, c] and of the encoder's commitment to them (VQ-VAE, equation 3), [B].

    The commitment weight beta is on the encoder's side, as in the paper; VQGAN's code had it on the codes'. Codes that
    are moving averages have no loss of their own.
    """
    commitment = mean_per_image((latents - jax.lax.stop_gradient(codes)) ** 2)
    loss = config.commitment_weight * commitment
    if config.update == "gradient":
        loss = loss + mean_per_image((jax.lax.stop_gradient(latents) - codes) ** 2)
    return loss
