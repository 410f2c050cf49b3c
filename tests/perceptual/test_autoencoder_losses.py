"""The terms of the autoencoder's loss against formulas written per image and per element."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import AutoencoderConfig, CodebookConfig
from dit_jax.perceptual.autoencoder_losses import codebook_loss, kl_to_standard_normal, likelihood_terms


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


IMAGES, RECONSTRUCTIONS = normal(3, 8, 6, 3), normal(3, 8, 6, 3, seed=1)
MEAN, LOG_VARIANCE = normal(3, 4, 3, 2, seed=2), normal(3, 4, 3, 2, seed=3)


def test_kl_is_summed_over_the_latent_of_each_image():
    expected = [
        sum(
            0.5 * (m * m + math.exp(v) - 1 - v)
            for m, v in zip(mean.ravel().tolist(), log_variance.ravel().tolist(), strict=True)
        )
        for mean, log_variance in zip(MEAN, LOG_VARIANCE, strict=True)
    ]
    np.testing.assert_allclose(kl_to_standard_normal(MEAN, LOG_VARIANCE), expected, rtol=1e-5)


def test_kl_is_zero_for_the_standard_normal_alone():
    zeros = jnp.zeros((1, 2, 2, 1))
    assert kl_to_standard_normal(zeros, zeros) == 0
    for mean, log_variance in ((0.1, 0.0), (0.0, 0.1), (0.0, -0.1)):
        assert kl_to_standard_normal(zeros + mean, zeros + log_variance) > 1e-3


@pytest.mark.parametrize(("name", "error"), [("l1", np.abs), ("l2", np.square)])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_likelihood_is_reduced_over_an_image_with_its_perceptual_term_at_each_pixel(name, error, reduce):
    codebook = CodebookConfig(num_codes=4) if reduce == "mean" else None
    config = AutoencoderConfig(reconstruction_loss=name, perceptual_weight=0.5, codebook=codebook)
    perceptual, log_variance = np.array([0.1, 0.2, 0.3], np.float32), np.float32(-0.7)
    terms = likelihood_terms(config, IMAGES, RECONSTRUCTIONS, perceptual, log_variance)
    reduced = lambda x: getattr(x.reshape(3, -1), reduce)(axis=1)  # noqa: E731
    distance = error(IMAGES.astype(np.float64) - RECONSTRUCTIONS)
    expected = reduced((distance + 0.5 * perceptual[:, None, None, None]) / math.exp(-0.7) - 0.7)
    np.testing.assert_allclose(terms["reconstruction"], reduced(distance), rtol=1e-5)
    np.testing.assert_allclose(terms["nll"], expected, rtol=1e-5)
    np.testing.assert_array_equal(terms["perceptual"], perceptual)
    assert {term.dtype for term in terms.values()} == {jnp.dtype("float32")}


def test_likelihood_without_further_terms_is_the_reconstruction_loss():
    terms = likelihood_terms(AutoencoderConfig(), IMAGES, RECONSTRUCTIONS)
    np.testing.assert_array_equal(terms["nll"], terms["reconstruction"])
    assert set(terms) == {"nll", "reconstruction"}


def test_likelihood_of_an_image_does_not_depend_on_its_batch():
    together = likelihood_terms(AutoencoderConfig(), IMAGES, RECONSTRUCTIONS)
    alone = likelihood_terms(AutoencoderConfig(), IMAGES[1:2], RECONSTRUCTIONS[1:2])
    for name, term in alone.items():
        np.testing.assert_allclose(term, together[name][1:2], rtol=1e-5)


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_beta_weighs_the_encoders_commitment_and_not_the_codes(update):
    config = CodebookConfig(num_codes=4, update=update, commitment_weight=0.25)
    latents, codes = jnp.array(MEAN), jnp.array(LOG_VARIANCE)
    of_latents, of_codes = jax.grad(lambda *x: codebook_loss(config, *x).sum(), argnums=(0, 1))(latents, codes)
    size = MEAN[0].size
    np.testing.assert_allclose(of_latents, 0.25 * 2 * (MEAN - LOG_VARIANCE) / size, rtol=1e-5)
    expected = 2 * (LOG_VARIANCE - MEAN) / size if update == "gradient" else np.zeros_like(MEAN)
    np.testing.assert_allclose(of_codes, expected, rtol=1e-5)
