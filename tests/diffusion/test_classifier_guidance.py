"""Classifier guidance where the answer is known: two normal classes, with their exact score and classifier."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import DiffusionConfig, SamplingConfig
from dit_jax.diffusion.classifier_guidance import class_gradient, led
from dit_jax.diffusion.parameterization import predict
from dit_jax.diffusion.process import at, make_process, posterior_mean, respace
from dit_jax.diffusion.samplers import make_sampler
from dit_jax.diffusion.samplers.scan import sample

PROCESS = respace(make_process(DiffusionConfig(variance="fixed_small")), 100)
MEANS, STD = np.array([-1.5, 1.5], np.float32), 0.4  # of every pixel of the two classes
SHAPE = (2, 2, 1)


def class_log_densities(x_t, step):
    """Returns log p(x_t | y) of each class, [B, 2], up to a constant: x_t is normal, too."""
    alpha_bar = at(PROCESS.alphas_cumprod, step)[..., None]
    distance = (x_t[..., None] - jnp.sqrt(alpha_bar) * MEANS) ** 2
    return -(distance / (2 * (alpha_bar * STD**2 + 1 - alpha_bar))).sum(axis=(1, 2, 3))


def epsilon(x_t, step, label=None):
    """Returns the exact epsilon, -sqrt(1 - alpha_bar) grad log p(x_t), of one class or of both together."""

    def log_density(x_t):
        logs = class_log_densities(x_t, step)
        return (jax.nn.logsumexp(logs, axis=1) if label is None else logs[:, label]).sum()

    return -jnp.sqrt(1 - at(PROCESS.alphas_cumprod, step)) * jax.grad(log_density)(x_t)


def predictions(label, ancestral):
    """Returns predict functions: the unconditional network led to a class, and the network of that class alone."""

    def by_classifier(x_t, step):
        labels = jnp.full(len(x_t), label)
        gradient = class_gradient(lambda x, _: class_log_densities(x, step), x_t, step, labels)
        return led(PROCESS, predict(PROCESS, epsilon(x_t, step), x_t, step), x_t, step, gradient, ancestral)

    return by_classifier, lambda x_t, step: predict(PROCESS, epsilon(x_t, step, label), x_t, step)


@pytest.mark.parametrize("label", [0, 1])
def test_gradient_of_scale_1_turns_the_unconditional_epsilon_into_the_conditional(label):
    """Bayes: grad log p(x_t | y) = grad log p(x_t) + grad log p(y | x_t)."""
    x_t, step = jax.random.normal(jax.random.key(0), (5, *SHAPE)), jnp.array([0, 10, 40, 70, 99])
    by_classifier, conditional = (predict_fn(x_t, step) for predict_fn in predictions(label, ancestral=False))
    np.testing.assert_allclose(by_classifier.epsilon, conditional.epsilon, atol=1e-4)
    np.testing.assert_allclose(by_classifier.x_0, conditional.x_0, rtol=1e-3, atol=1e-3)


def test_mean_of_an_ancestral_step_moves_by_variance_times_gradient():
    """Equation 10 and algorithm 1."""
    x_t, step = jax.random.normal(jax.random.key(0), (4, *SHAPE)), jnp.array([0, 10, 40, 99])
    gradient = jax.random.normal(jax.random.key(1), x_t.shape)
    before = predict(PROCESS, epsilon(x_t, step), x_t, step)
    after = led(PROCESS, before, x_t, step, gradient, ancestral=True)
    moved = posterior_mean(PROCESS, after.x_0, x_t, step) - posterior_mean(PROCESS, before.x_0, x_t, step)
    np.testing.assert_allclose(moved, jnp.exp(before.log_variance) * gradient, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpm_solver", "plms"])
def test_samples_are_of_the_class_that_is_asked_for(sampler):
    keys = jax.random.split(jax.random.key(0), 400)
    sampling, (led_to_1, _) = make_sampler(SamplingConfig(sampler=sampler)), predictions(1, sampler == "ancestral")
    x_0 = np.asarray(sample(PROCESS, led_to_1, sampling, keys, SHAPE)[0])
    assert (x_0 > 0).mean() > 0.99 and abs(x_0.mean() - 1.5) < 0.1 and abs(x_0.std() - STD) < 0.1
    unled = sample(PROCESS, lambda x, s: predict(PROCESS, epsilon(x, s), x, s), sampling, keys, SHAPE)[0]
    assert 0.3 < (unled > 0).mean() < 0.7


def test_labels_beyond_the_classes_are_not_led_to():
    x_t = jnp.ones((2, *SHAPE))
    gradient = class_gradient(
        lambda x, t: jnp.stack([x.sum((1, 2, 3)), -x.sum((1, 2, 3))], 1), x_t, None, jnp.array([0, 2])
    )
    assert np.abs(gradient[0]).min() > 0
    np.testing.assert_array_equal(gradient[1], 0)
