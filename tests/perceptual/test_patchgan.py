"""The discriminator: its size, its statistics, its loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.models.cost import count_params
from dit_jax.perceptual.patchgan import PatchDiscriminator, adaptive_weight, generator_loss, hinge_loss


def test_has_the_parameters_of_the_published_one():
    shapes = jax.eval_shape(
        lambda: PatchDiscriminator(3, 64).init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=True)
    )
    assert count_params(shapes["params"]) == 2_765_633


def test_a_logit_sees_seventy_pixels():
    """Three layers: 70 x 70 px (arXiv:1611.07004, section 6.1.2), so a pixel reaches no logit that is further away."""
    model = PatchDiscriminator(3, 4)
    image = jnp.zeros((1, 256, 256, 3))
    variables = model.init(jax.random.key(0), image, train=True)
    middle = lambda x: model.apply(variables, x, train=False)[0, 15, 15, 0]  # noqa: E731
    seen = np.nonzero(np.abs(jax.grad(middle)(image)).sum(axis=(0, 2, 3)))[0]
    assert seen.max() - seen.min() + 1 == 70


def test_hinge_loss_against_its_definition():
    real, fake = jnp.array([2.0, 0.5, -1.0]), jnp.array([-2.0, 0.5, 0.0])
    assert float(hinge_loss(real, fake)) == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1.5 + 1) / 3))
    assert float(generator_loss(fake)) == pytest.approx(0.5)


def test_adaptive_weight_is_a_clipped_ratio_of_norms():
    assert float(adaptive_weight(jnp.full((3, 3), 2.0), jnp.full((3, 3), 4.0))) == pytest.approx(0.5, rel=1e-4)
    assert float(adaptive_weight(jnp.ones(4), jnp.zeros(4))) == 1e4


def test_statistics_are_those_of_the_batch():
    model, images = PatchDiscriminator(1, 4), jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    variables = model.init(jax.random.key(0), images, train=True)
    first, updates = model.apply(variables, images, train=True, mutable="batch_stats")
    shifted, _ = model.apply(variables | updates, images, train=True, mutable="batch_stats")
    np.testing.assert_array_equal(first, shifted)  # what was tracked is not read in training
    assert np.abs(updates["batch_stats"]["norm_1"]["mean"]).max() > 0
