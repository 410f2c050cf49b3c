"""PSNR at values that are known."""

import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.metrics.reconstruction import psnr


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
