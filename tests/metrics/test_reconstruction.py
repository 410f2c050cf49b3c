"""PSNR and SSIM at values that are known, and against their definitions."""

import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.metrics.reconstruction import psnr, ssim


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-0.9, 0.9, shape).astype(np.float32)


@pytest.mark.parametrize(("error", "decibels"), [(2.0, 0.0), (0.2, 20.0), (0.02, 40.0), (2 / 255, 48.1308)])
def test_constant_error_has_the_known_psnr(error, decibels):
    images = np.full((2, 8, 8, 3), -1.0, np.float32)
    np.testing.assert_allclose(psnr(images, images + error), [decibels] * 2, atol=1e-3)


def test_psnr_is_of_bytes_at_peak_255():
    """The definition for uint8 images: 10 log10(255^2 / MSE)."""
    images, others = (np.random.default_rng(seed).integers(0, 256, (4, 8, 8, 3)) for seed in range(2))
    expected = 10 * np.log10(255**2 / ((images - others) ** 2).reshape(4, -1).mean(axis=1))
    values = psnr((images / 127.5 - 1).astype(np.float32), (others / 127.5 - 1).astype(np.float32))
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_each_image_has_its_own_psnr():
    images = random_images(3, 4, 4, 1)
    errors = np.array([0.02, 0.002, 0.05], np.float32).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(psnr(images, images + errors), [40.0, 60.0, 32.0412], atol=1e-2)


def test_reconstruction_is_clipped_to_the_range_of_images():
    white = jnp.ones((1, 4, 4, 3))
    np.testing.assert_array_equal(psnr(white, 3 * white), psnr(white, white))


def test_perfect_image_has_a_finite_psnr():
    images = random_images(1, 4, 4, 3)
    np.testing.assert_allclose(psnr(images, images), 106.02, atol=0.01)


def ssim_of_bytes(image, other):
    """The definition for one channel of uint8 values: windows cut out one by one, weighted moments in float64."""
    y, x = np.mgrid[-5:6, -5:6]
    weights = np.exp(-(x**2 + y**2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for i in range(image.shape[0] - 10):
        for j in range(image.shape[1] - 10):
            a, b = (z[i : i + 11, j : j + 11].astype(np.float64) for z in (image, other))
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            spread = (weights * (a - mean_a) ** 2).sum() + (weights * (b - mean_b) ** 2).sum()
            covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
            likeness = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
            values.append(likeness * (2 * covariance + c2) / (spread + c2))
    return np.mean(values)


@pytest.mark.parametrize("spread", [3, 40])
def test_ssim_is_of_bytes_window_by_window(spread):
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, 3 * 20 * 14 * 3).reshape(3, 20, 14, 3)
    images = np.clip(ramp + rng.normal(0, 20, ramp.shape), 0, 255).astype(np.uint8)
    others = np.clip(images + rng.normal(0, spread, ramp.shape), 0, 255).astype(np.uint8)
    expected = [
        np.mean([ssim_of_bytes(image[..., c], other[..., c]) for c in range(3)])
        for image, other in zip(images, others, strict=True)
    ]
    values = ssim((images / 127.5 - 1).astype(np.float32), (others / 127.5 - 1).astype(np.float32))
    assert min(expected) > 0.1 and max(expected) < 0.999
    np.testing.assert_allclose(values, expected, atol=1e-5)


def test_ssim_of_equal_images_is_one_and_flat_ones_differ_by_brightness_alone():
    images = random_images(2, 16, 12, 3)
    np.testing.assert_allclose(ssim(images, images), 1, atol=1e-6)
    white, black = jnp.ones((1, 12, 12, 1)), -jnp.ones((1, 12, 12, 1))
    np.testing.assert_allclose(ssim(white, black), 0.0004 / 4.0004, rtol=1e-3)


def test_ssim_clips_the_reconstruction_and_refuses_images_without_a_window():
    white = jnp.ones((1, 12, 12, 3))
    np.testing.assert_array_equal(ssim(white, 3 * white), ssim(white, white))
    with pytest.raises(ValueError, match="at least 11 pixels a side, not 10 x 12"):
        ssim(white[:, :10], white[:, :10])
