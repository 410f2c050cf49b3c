"""The hybrid loss against float64 formulas, and who learns from which of its terms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import DiffusionConfig
from dit_jax.diffusion.losses import (
    discretized_log_likelihood,
    gaussian_kl,
    hybrid_loss,
    mean_per_example,
    normal_cdf,
)
from dit_jax.diffusion.parameterization import target
from dit_jax.diffusion.process import add_noise, make_process

PROCESS = make_process(DiffusionConfig())
STEPS = jnp.array([0, 1, 400, 999])
SHAPE = (4, 3, 2, 2)  # B, H, W, C
LABELS = jnp.arange(4)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X_0 = np.clip(0.5 * normal(*SHAPE), -1, 1)
NOISE = normal(*SHAPE, seed=1)


def constant_model(epsilon, v):
    return lambda x_t, t, labels: jnp.concatenate([jnp.asarray(epsilon), jnp.asarray(v)], axis=-1)


@jax.jit
def losses(epsilon, v):
    return hybrid_loss(PROCESS, constant_model(epsilon, v), X_0, STEPS, NOISE, LABELS)


# The terms


def test_kl_is_the_integral_of_its_definition():
    x = np.linspace(-30, 30, 200_001)
    for mean_1, std_1, mean_2, std_2 in ((0.0, 1.0, 0.0, 1.0), (0.3, 0.5, -0.4, 2.0), (1.0, 2.0, 0.0, 0.9)):
        log_p, log_q = (
            -0.5 * ((x - mean) / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))
            for mean, std in ((mean_1, std_1), (mean_2, std_2))
        )
        expected = np.trapezoid(np.exp(log_p) * (log_p - log_q), x)
        kl = gaussian_kl(mean_1, 2 * math.log(std_1), mean_2, 2 * math.log(std_2))
        np.testing.assert_allclose(kl, expected, rtol=1e-5, atol=1e-6)


def test_kl_is_zero_where_equal_and_positive_elsewhere():
    mean, log_variance = 3 * normal(1000), normal(1000, seed=1)
    np.testing.assert_array_equal(gaussian_kl(mean, log_variance, mean, log_variance), 0)
    assert (gaussian_kl(mean, log_variance, mean + 0.1, log_variance) > 1e-4).all()
    assert (gaussian_kl(mean, log_variance, mean, log_variance + 0.1) > 1e-4).all()
    assert (gaussian_kl(mean, log_variance, mean, log_variance - 0.1) > 1e-4).all()


def test_distribution_function_is_the_normals():
    x = np.linspace(-6, 6, 1001)
    exact = [0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x]
    np.testing.assert_allclose(normal_cdf(x), exact, atol=3e-4)  # the error of the tanh form
    np.testing.assert_allclose(normal_cdf(x) + normal_cdf(-x), 1, atol=1e-6)


@pytest.mark.parametrize("mean", [-1.2, -0.9, 0.0, 0.37, 1.0])
@pytest.mark.parametrize("std", [0.003, 0.05, 1.0])
def test_likelihoods_of_all_bytes_sum_to_1(mean, std):
    x = jnp.linspace(-1, 1, 256)
    likelihood = jnp.exp(discretized_log_likelihood(x, mean, 2 * math.log(std)))
    np.testing.assert_allclose(likelihood.sum(), 1, atol=1e-4)


def test_likelihood_is_the_density_times_the_bins_width():
    x, mean, std = np.linspace(-1, 1, 256)[1:-1], 0.1, 0.2
    density = np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
    likelihood = np.exp(discretized_log_likelihood(x, mean, 2 * math.log(std)))
    # The tanh form's density is within 0.11 % of the normal's peak.
    np.testing.assert_allclose(likelihood * 255 / 2, density, atol=0.002 * density.max())


def test_impossible_byte_has_a_finite_likelihood():
    assert discretized_log_likelihood(jnp.array(0.5), -1.0, -20.0) == pytest.approx(math.log(1e-12))


def test_mean_per_example_keeps_images_apart():
    np.testing.assert_allclose(mean_per_example(jnp.asarray(X_0)), X_0.reshape(4, -1).mean(axis=1), rtol=1e-5)


# The loss


def reference_vlb(epsilon, v):
    """Returns the bound's terms, in bits per dimension, of Improved DDPM's formulas in float64 (scalar by scalar)."""
    bits = np.zeros(len(STEPS))
    for b, t in enumerate(np.asarray(STEPS)):
        beta, alpha_bar = PROCESS.betas[t], PROCESS.alphas_cumprod[t]
        previous = PROCESS.alphas_cumprod[t - 1] if t else 1.0
        true_variance = beta * (1 - previous) / (1 - alpha_bar)
        clipped = PROCESS.betas[1] * (1 - PROCESS.alphas_cumprod[0]) / (1 - PROCESS.alphas_cumprod[1])
        lower = math.log(true_variance if t else clipped)

        def mean_of(x_0, x_t, beta=beta, alpha_bar=alpha_bar, previous=previous):
            return (math.sqrt(previous) * beta * x_0 + math.sqrt(1 - beta) * (1 - previous) * x_t) / (1 - alpha_bar)

        terms = []
        for x_0, noise, eps, fraction in zip(
            *(a[b].astype(np.float64).ravel() for a in (X_0, NOISE, epsilon)), (v[b].ravel() + 1.0) / 2, strict=True
        ):
            x_t = math.sqrt(alpha_bar) * x_0 + math.sqrt(1 - alpha_bar) * noise
            mean = mean_of((x_t - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar), x_t)
            log_variance = fraction * math.log(beta) + (1 - fraction) * lower
            if t:
                distance = (mean_of(x_0, x_t) - mean) ** 2
                ratio = (math.exp(lower) + distance) / math.exp(log_variance)
                terms.append(0.5 * (log_variance - lower - 1 + ratio))
                continue
            upper, below = (
                0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
                for z in ((x_0 - mean + edge) / math.exp(0.5 * log_variance) for edge in (1 / 255, -1 / 255))
            )
            upper, below = 1.0 if x_0 > 0.999 else upper, 0.0 if x_0 < -0.999 else below
            terms.append(-math.log(max(upper - below, 1e-12)))
        bits[b] = np.mean(terms) / math.log(2)
    return bits


def test_loss_is_mse_plus_the_bound_of_each_image():
    epsilon, v = NOISE + 0.3 * normal(*SHAPE, seed=2), normal(*SHAPE, seed=3)
    terms = losses(epsilon, v)
    for name in ("loss", "mse", "vlb"):
        assert terms[name].shape == (4,) and terms[name].dtype == jnp.float32
    np.testing.assert_allclose(terms["mse"], ((epsilon - NOISE) ** 2).reshape(4, -1).mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(terms["vlb"], reference_vlb(epsilon, v), rtol=1e-3)
    np.testing.assert_allclose(terms["loss"], terms["mse"] + terms["vlb"], rtol=1e-6)


def test_perfect_model_has_no_loss_beyond_the_first_steps_likelihood():
    """Exact epsilon and the posterior's own variance (v = -1): KL and MSE are 0, and step 0 costs its bits."""
    terms = losses(NOISE, -np.ones(SHAPE, np.float32))
    np.testing.assert_array_equal(terms["mse"], 0)
    np.testing.assert_allclose(terms["vlb"][1:], 0, atol=1e-5)
    assert terms["vlb"][0] > 0.1
    np.testing.assert_allclose(terms["vlb"][0], reference_vlb(NOISE, -np.ones(SHAPE))[0], rtol=1e-3)


def test_bound_trains_the_variance_alone_and_mse_the_mean_alone():
    epsilon, v = NOISE + 0.3 * normal(*SHAPE, seed=2), 0.5 * normal(*SHAPE, seed=3)

    @jax.jit
    def gradients(epsilon, v):
        return {
            name: jax.grad(lambda *outputs, name=name: losses(*outputs)[name].sum(), argnums=(0, 1))(epsilon, v)
            for name in ("mse", "vlb", "loss")
        }

    by_term = gradients(epsilon, v)
    (mse_epsilon, mse_v), (vlb_epsilon, vlb_v) = by_term["mse"], by_term["vlb"]
    assert not mse_v.any() and not vlb_epsilon.any()
    assert (mse_epsilon != 0).all() and (vlb_v != 0).all()
    np.testing.assert_allclose(mse_epsilon, 2 * (epsilon - NOISE) / 12, rtol=1e-5)
    np.testing.assert_allclose(by_term["loss"][0], mse_epsilon, rtol=1e-5)
    np.testing.assert_allclose(by_term["loss"][1], vlb_v, rtol=1e-5)


def test_model_is_called_once_with_x_t_its_timestep_and_the_labels():
    calls = []

    def model_fn(x_t, t, labels):
        calls.append((x_t, t, labels))
        return jnp.zeros((*SHAPE[:-1], 2 * SHAPE[-1]))

    hybrid_loss(PROCESS, model_fn, X_0, STEPS, NOISE, LABELS)
    ((x_t, t, labels),) = calls
    np.testing.assert_array_equal(t, STEPS)
    np.testing.assert_array_equal(labels, LABELS)
    np.testing.assert_allclose(x_t, add_noise(PROCESS, X_0, STEPS, NOISE), atol=1e-6)


# Other predictions and weights


@pytest.mark.parametrize("prediction", ["epsilon", "x_0", "v"])
def test_min_snr_weighs_every_prediction_as_min_of_snr_and_gamma_on_x_0(prediction):
    """The same error of x_0 costs the same, whatever the network predicts."""
    process = make_process(DiffusionConfig(prediction=prediction, variance="fixed_small"))
    error = 0.1
    alpha_bar = process.alphas_cumprod[np.asarray(STEPS)]
    in_units_of_x_0 = {"x_0": 1, "epsilon": np.sqrt(alpha_bar / (1 - alpha_bar)), "v": 1 / np.sqrt(1 - alpha_bar)}
    off = error * np.broadcast_to(in_units_of_x_0[prediction], 4).reshape(-1, 1, 1, 1)
    output = np.asarray(target(process, X_0, STEPS, NOISE)) + off
    terms = hybrid_loss(process, lambda *inputs: jnp.asarray(output), X_0, STEPS, NOISE, LABELS, min_snr_gamma=5.0)
    expected = np.minimum(alpha_bar / (1 - alpha_bar), 5.0) * error**2
    np.testing.assert_allclose(terms["loss"], expected, rtol=2e-3)  # float32's rounding of the target beside the error
    assert set(terms) == {"loss", "mse"}  # a fixed variance is not trained
