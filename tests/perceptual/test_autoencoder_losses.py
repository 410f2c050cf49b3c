"""The KL autoencoder's loss against formulas written per image and per element."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import AutoencoderConfig
from dit_jax.perceptual.autoencoder_losses import autoencoder_loss, kl_to_standard_normal


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
@pytest.mark.parametrize("kl_weight", [0.0, 1e-6, 0.5])
def test_loss_is_reconstruction_plus_weighted_kl_both_summed_per_image(name, error, kl_weight):
    config = AutoencoderConfig(reconstruction_loss=name, kl_weight=kl_weight)
    terms = autoencoder_loss(config, IMAGES, RECONSTRUCTIONS, MEAN, LOG_VARIANCE)
    reconstruction = error(IMAGES.astype(np.float64) - RECONSTRUCTIONS).reshape(3, -1).sum(axis=1)
    np.testing.assert_allclose(terms["reconstruction"], reconstruction, rtol=1e-5)
    np.testing.assert_allclose(terms["kl"], kl_to_standard_normal(MEAN, LOG_VARIANCE), rtol=1e-6)
    np.testing.assert_allclose(terms["loss"], reconstruction + kl_weight * terms["kl"], rtol=1e-5)
    assert {term.dtype for term in terms.values()} == {jnp.dtype("float32")}


def test_loss_of_an_image_does_not_depend_on_its_batch():
    config = AutoencoderConfig()
    together = autoencoder_loss(config, IMAGES, RECONSTRUCTIONS, MEAN, LOG_VARIANCE)
    alone = autoencoder_loss(config, *(x[1:2] for x in (IMAGES, RECONSTRUCTIONS, MEAN, LOG_VARIANCE)))
    for name, term in alone.items():
        np.testing.assert_allclose(term, together[name][1:2], rtol=1e-5)
