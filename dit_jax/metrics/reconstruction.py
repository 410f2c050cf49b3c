"""How close a reconstruction is to its image."""

import jax.numpy as jnp

from dit_jax.types import Array


def psnr(images: Array, reconstructions: Array) -> Array:
    """Returns the peak signal-to-noise ratio of each image, [B], in dB; both float in [-1, 1] (peak to peak 2)."""
    error = jnp.mean((images - jnp.clip(reconstructions, -1.0, 1.0)) ** 2, axis=tuple(range(1, images.ndim)))
    return 10.0 * jnp.log10(4.0 / jnp.maximum(error, 1e-10))  # 1e-10: a perfect image has 106 dB, not infinity
