"""How close a reconstruction is to its image."""

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.types import Array

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels a side, and the Gaussian's deviation
SSIM_K1, SSIM_K2 = 0.01, 0.03


def psnr(images: Array, reconstructions: Array) -> Array:
    """Returns the peak signal-to-noise ratio of each image, [B], in dB; both float in [-1, 1] (peak to peak 2)."""
    error = jnp.mean((images - jnp.clip(reconstructions, -1.0, 1.0)) ** 2, axis=tuple(range(1, images.ndim)))
    return 10.0 * jnp.log10(4.0 / jnp.maximum(error, 1e-10))  # 1e-10: a perfect image has 106 dB, not infinity


def ssim(images: Array, reconstructions: Array) -> Array:
    """Returns the structural similarity of each image, [B] in [-1, 1]; 1 where they are equal.

    As published: a Gaussian window of 11 x 11 pixels at every place where it fits into the image, equation 13, and the
    mean over places; over colours too, each by itself. It compares mean brightnesses, so images are shifted to [0, 2]
    first: the figure is that of bytes in [0, 255].

    Args:
      images, reconstructions: [B, H, W, C] float in [-1, 1], at least 11 pixels a side; reconstructions are clipped.

    References:
      Wang, Bovik, Sheikh, Simoncelli: Image Quality Assessment: From Error Visibility to Structural Similarity, 2004.
    """
    _, height, width, _ = images.shape
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs images of at least {SSIM_WINDOW} pixels a side, not {height} x {width}")
    rows, columns = _windows(height), _windows(width)

    def local_mean(x: Array) -> Array:
        # In full precision: the variances below are differences of nearly equal numbers.
        return jnp.einsum("bhwc,hi,wj->bijc", x, rows, columns, precision=jax.lax.Precision.HIGHEST)

    x = images.astype(jnp.float32) + 1.0
    y = jnp.clip(reconstructions.astype(jnp.float32), -1.0, 1.0) + 1.0
    mean_x, mean_y = local_mean(x), local_mean(y)
    variance_x, variance_y = local_mean(x * x) - mean_x**2, local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = (SSIM_K1 * 2.0) ** 2, (SSIM_K2 * 2.0) ** 2  # 2: the range of values
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    denominator = (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return jnp.mean(numerator / denominator, axis=(1, 2, 3))


def _windows(size: int) -> Array:
    """Returns the weights of a row's pixels in each place of the window, [size, size - 10]."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    places = np.arange(size - SSIM_WINDOW + 1)
    windows = np.zeros((size, len(places)))
    windows[places + np.arange(SSIM_WINDOW)[:, None], places] = (weights / weights.sum())[:, None]
    return jnp.asarray(windows, jnp.float32)
