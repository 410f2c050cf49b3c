"""The samplers, driven by models that know the answer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import DiffusionConfig, SamplingConfig
from dit_jax.diffusion.parameterization import learned_log_variance, predict
from dit_jax.diffusion.process import at, make_process, respace
from dit_jax.diffusion.samplers import make_sampler
from dit_jax.diffusion.samplers.ancestral import ancestral
from dit_jax.diffusion.samplers.ddim import make_ddim
from dit_jax.diffusion.samplers.dpm_solver import dpm_solver
from dit_jax.diffusion.samplers.plms import plms
from dit_jax.diffusion.samplers.scan import Sampler, image_noise, sample
from dit_jax.diffusion.schedules import respaced_timesteps

PROCESS = make_process(DiffusionConfig())
SAMPLERS = {
    "ddim": make_ddim(0.0),
    "ddim, eta 1": make_ddim(1.0),
    "ancestral": ancestral,
    "dpm_solver": dpm_solver,
    "plms": plms,
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def image_keys(count, seed=0):
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(count))


def signal_and_noise(t):
    """Returns sqrt(alpha_bar) and sqrt(1 - alpha_bar) of the timestep that the model sees, one of training's."""
    alpha_bar = PROCESS.alphas_cumprod
    return at(np.sqrt(alpha_bar), t), at(np.sqrt(1 - alpha_bar), t)


def oracle(x_0):
    """Returns a model that knows x_0, and so the exact epsilon of any x_t; v = 0."""

    def model_fn(x_t, t, labels):
        signal, noise = signal_and_noise(t)
        epsilon = (x_t - signal * x_0) / noise
        return jnp.concatenate([epsilon, jnp.zeros_like(epsilon)], axis=-1)

    return model_fn


@functools.partial(jax.jit, static_argnames=("num_steps", "model_fn", "sampler", "shape", "keep_x_0"))
def draw_all(num_steps, model_fn, sampler, keys, labels, shape, x_T=None, keep_x_0=False):
    process = respace(PROCESS, num_steps)

    def predict_fn(x_t, step):
        return predict(process, model_fn(x_t, jnp.asarray(process.timesteps)[step], labels), x_t, step)

    return sample(process, predict_fn, sampler, keys, shape, x_T, keep_x_0)


def draw(*args):
    return draw_all(*args)[0]


# What the sampler ends in


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_steps", [1, 5, 50])
def test_oracle_leads_to_its_x_0(sampler, num_steps):
    x_0 = normal(2, 4, 4, 3)
    drawn = draw(num_steps, oracle(x_0), SAMPLERS[sampler], image_keys(2), jnp.zeros(2, jnp.int32), (4, 4, 3))
    # The first step divides float32's rounding by sqrt(alpha_bar) = 1 / 157; more steps end at alpha_bar near 1 and put
    # it right, except that the extrapolation of PLMS carries it along.
    np.testing.assert_allclose(drawn, x_0, atol=2e-4 if num_steps == 1 or sampler == "plms" else 1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_ideal_model_of_gaussian_data_draws_its_mean_and_variance(sampler):
    """For x_0 ~ N(mean, std^2), E[noise | x_t] is linear in x_t and the samples must have the data's moments.

    This sees every coefficient at every step: a wrong timestep, variance or respacing moves the moments.
    """
    mean, std, shape = 0.7, 0.5, (16, 16, 1)

    def ideal(x_t, t, labels):
        signal, noise = signal_and_noise(t)
        epsilon = noise * (x_t - signal * mean) / (signal**2 * std**2 + noise**2)
        return jnp.concatenate([epsilon, jnp.zeros_like(epsilon)], axis=-1)

    drawn = draw(250, ideal, SAMPLERS[sampler], image_keys(64), jnp.zeros(64, jnp.int32), shape)
    drawn = np.asarray(drawn, np.float64)  # 16384 values: standard errors 0.004 and 0.003
    assert abs(drawn.mean() - mean) < 0.02
    assert abs(drawn.std() / std - 1) < 0.05  # 250 steps with the lower variance (eta 1) are 3 % too narrow


# How it gets there


@pytest.mark.parametrize("num_steps", [1, 2, 10, 250])
def test_model_sees_the_original_timesteps_from_the_last_down_to_0(num_steps):
    """The step function is a shift register: after the walk it holds the timesteps that the model saw, in order."""

    def model_fn(x_t, t, labels):
        return jnp.broadcast_to(t.reshape(-1, 1, 1, 1), (*x_t.shape[:-1], 2 * x_t.shape[-1])).astype(jnp.float32)

    def register(process, prediction, x, step, noise, memory):
        return jnp.concatenate([x[..., 1:], prediction.epsilon[..., :1]], axis=-1), memory

    seen = draw(num_steps, model_fn, Sampler(register), image_keys(2), jnp.zeros(2, jnp.int32), (1, 1, num_steps))
    expected = respace(PROCESS, num_steps).timesteps[::-1]
    assert expected[0] == 999 and (num_steps == 1 or expected[-1] == 0)
    np.testing.assert_array_equal(seen[:, 0, 0], np.stack([expected, expected]))


def test_walk_keeps_the_predicted_x_0_on_request():
    x_0 = normal(2, 4, 4, 3)
    arguments = (5, oracle(x_0), SAMPLERS["ddim"], image_keys(2), jnp.zeros(2, jnp.int32), (4, 4, 3))
    drawn, kept = draw_all(*arguments, keep_x_0=True)
    assert kept.shape == (5, 2, 4, 4, 3)
    np.testing.assert_allclose(kept, np.broadcast_to(x_0, kept.shape), atol=2e-4)  # of the first: see above
    np.testing.assert_array_equal(kept[-1], drawn)  # DDIM ends in its last prediction
    assert draw_all(*arguments)[1] is None


def test_noise_of_an_image_is_its_keys_alone_and_new_at_every_draw():
    keys, shape = image_keys(3), (8, 8, 2)
    noise = np.stack([image_noise(keys, i, shape) for i in range(4)])
    np.testing.assert_array_equal(image_noise(keys[1:2], 2, shape)[0], noise[2, 1])
    flat = noise.reshape(12, -1)
    correlation = np.corrcoef(flat) - np.eye(12)
    assert abs(correlation).max() < 0.45  # 128 values: five standard deviations
    assert abs(flat.mean()) < 0.15 and abs(flat.std() - 1) < 0.1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_does_not_depend_on_its_batch(sampler):
    def model_fn(x_t, t, labels):
        epsilon = jnp.tanh(x_t * (1 + labels.reshape(-1, 1, 1, 1))) + t.reshape(-1, 1, 1, 1) / 1000
        return jnp.concatenate([epsilon, jnp.sin(epsilon)], axis=-1)

    keys, labels, shape = image_keys(6), jnp.arange(6), (4, 4, 2)
    together = draw(10, model_fn, SAMPLERS[sampler], keys, labels, shape)
    rows = np.array([5, 0, 3])
    apart = draw(10, model_fn, SAMPLERS[sampler], keys[rows], labels[rows], shape)
    np.testing.assert_allclose(apart, together[rows], rtol=1e-5, atol=1e-5)
    assert len(np.unique(np.asarray(together).reshape(6, -1).round(3), axis=0)) == 6


# One step

STEP_INPUTS = {
    "output": normal(3, 2, 2, 4, seed=1),
    "x": normal(3, 2, 2, 2, seed=2),
    "step": jnp.array([0, 1, 20]),
    "noise": normal(3, 2, 2, 2, seed=3),
}


def update(sampler, process, **inputs):
    """Returns x_{t-1} of one update of a sampler without memory."""
    inputs = STEP_INPUTS | inputs
    prediction = predict(process, inputs["output"], inputs["x"], inputs["step"])
    return sampler.update(process, prediction, inputs["x"], inputs["step"], inputs["noise"], None)[0]


def moved_by_noise(sampler, process):
    """Returns what a step adds to its mean, as a factor of the noise, and the mean."""
    mean = update(sampler, process, noise=np.zeros_like(STEP_INPUTS["noise"]))
    return (update(sampler, process) - mean) / STEP_INPUTS["noise"], mean


@pytest.mark.parametrize("num_steps", [1000, 25])
def test_ddim_adds_eta_times_the_posteriors_standard_deviation(num_steps):
    process = respace(PROCESS, num_steps)
    std = np.sqrt(process.posterior_variance[np.asarray(STEP_INPUTS["step"])]).reshape(3, 1, 1, 1)
    for eta in (0.0, 0.5, 1.0):
        factor, _ = moved_by_noise(make_ddim(eta), process)
        np.testing.assert_allclose(factor, np.broadcast_to(eta * std, factor.shape), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("num_steps", [1000, 25])
def test_ddim_with_eta_1_has_the_mean_of_ancestral_sampling(num_steps):
    process = respace(PROCESS, num_steps)
    _, ddim_mean = moved_by_noise(make_ddim(1.0), process)
    _, ancestral_mean = moved_by_noise(ancestral, process)
    np.testing.assert_allclose(ddim_mean, ancestral_mean, rtol=1e-4, atol=1e-5)


def test_ancestral_step_adds_the_learned_standard_deviation_and_none_at_step_0():
    factor, _ = moved_by_noise(ancestral, PROCESS)
    v = STEP_INPUTS["output"][..., 2:]
    std = np.exp(0.5 * learned_log_variance(PROCESS, v, STEP_INPUTS["step"]))
    np.testing.assert_array_equal(factor[0], 0)
    np.testing.assert_allclose(factor[1:], std[1:], rtol=1e-3)


def test_config_chooses_the_sampler_and_its_eta():
    def step_of(**fields):
        return update(make_sampler(SamplingConfig(**fields)), PROCESS)

    ddim = [update(make_ddim(eta), PROCESS) for eta in (0.0, 0.5)]
    np.testing.assert_array_equal(step_of(sampler="ddim"), ddim[0])
    np.testing.assert_array_equal(step_of(sampler="ddim", eta=0.5), ddim[1])
    np.testing.assert_array_equal(step_of(sampler="ancestral"), update(ancestral, PROCESS))
    assert (ddim[0] != ddim[1]).any() and (ddim[1] != step_of(sampler="ancestral")).any()
    assert make_sampler(SamplingConfig(sampler="plms")) is plms
    assert make_sampler(SamplingConfig(sampler="dpm_solver")) is dpm_solver


# Order of accuracy


def curved(x_t, t, labels):
    """The ideal model of x_0 ~ N(0.7, 0.5^2): the walk of its ODE is known in closed form."""
    signal, noise = signal_and_noise(t)
    epsilon = noise * (x_t - signal * 0.7) / (signal**2 * 0.5**2 + noise**2)
    return jnp.concatenate([epsilon, jnp.zeros_like(epsilon)], axis=-1)


def test_multistep_samplers_follow_the_ode_more_closely_than_ddim():
    """x_t - signal * mean shrinks with its standard deviation: the exact end is known, the residue the sampler's."""
    x_T, shape = normal(4, 4, 4, 1), (4, 4, 1)
    signal, noise = (float(x[0, 0, 0, 0]) for x in signal_and_noise(jnp.array([999])))
    exact = 0.7 + 0.5 * (x_T - signal * 0.7) / np.sqrt(signal**2 * 0.5**2 + noise**2)

    def error(sampler, num_steps):
        timesteps = tuple(respaced_timesteps(1000, num_steps, "trailing").tolist())
        drawn, _ = draw_all(timesteps, curved, SAMPLERS[sampler], image_keys(4), jnp.zeros(4, jnp.int32), shape, x_T)
        return abs(np.asarray(drawn) - exact).max()

    errors = {name: [error(name, n) for n in (20, 40)] for name in ("ddim", "dpm_solver", "plms")}
    assert errors["dpm_solver"][0] < 0.5 * errors["ddim"][0], errors
    assert errors["plms"][1] < 0.5 * errors["ddim"][1], errors
    assert errors["ddim"][0] < 0.3, errors
