"""Sampling around what is known, and from what is given: RePaint's steps, and a walk that starts half way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.config import DiffusionConfig, SamplingConfig
from dit_jax.diffusion.parameterization import epsilon_from_x_0, predict
from dit_jax.diffusion.process import add_noise, at, first_steps, make_process, respace
from dit_jax.diffusion.samplers import make_sampler
from dit_jax.diffusion.samplers.scan import Known, image_noise, kept_shares, resampled, sample, slerp

# fixed_large is the exact variance of an ancestral step where the data is N(0, 1) (DDPM, section 3.2)
PROCESS = respace(make_process(DiffusionConfig(variance="fixed_large")), 50)
SHAPE = (4, 4, 2)
KEYS = jax.random.split(jax.random.key(0), 3)
X_0 = jax.random.normal(jax.random.key(1), (3, *SHAPE))
HOLE = jnp.zeros((3, 4, 4, 1)).at[:, 1:3].set(1.0)
SAMPLERS = ("ancestral", "ddim", "dpm_solver", "plms")


def normal_model(x_t, step):
    """Returns what the perfect network says of data that is N(0, 1) a pixel, whatever is known beside it."""
    alpha_bar = jnp.asarray(PROCESS.alphas_cumprod, jnp.float32)[step].reshape(-1, 1, 1, 1)
    return predict(PROCESS, jnp.sqrt(1 - alpha_bar) * x_t, x_t, step)


def constant_model(x_t, step):
    """Returns what the perfect network says of data that are all X_0."""
    return predict(PROCESS, epsilon_from_x_0(PROCESS, x_t, step, X_0), x_t, step)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_known_places_are_exact_and_the_network_sees_them_noised_to_its_step(sampler):
    seen = []

    def model(x_t, step):
        jax.debug.callback(lambda x, s: seen.append((int(s[0]), np.asarray(x))), x_t, step, ordered=True)
        return normal_model(x_t, step)

    sampling = make_sampler(SamplingConfig(sampler=sampler))
    x_0, _ = sample(PROCESS, model, sampling, KEYS, SHAPE, known=Known(X_0, HOLE))
    jax.effects_barrier()
    hole = np.broadcast_to(HOLE > 0, x_0.shape)
    np.testing.assert_array_equal(x_0[~hole], X_0[~hole])
    assert np.abs(x_0 - X_0)[hole].mean() > 0.5
    assert len(seen) == PROCESS.num_steps + (sampler == "plms")
    for step, x in seen:
        noise = image_noise(KEYS, step + PROCESS.num_steps + 1, SHAPE)
        expected = add_noise(PROCESS, X_0, jnp.full(3, step), noise)
        np.testing.assert_allclose(x[~hole], expected[~hole], atol=1e-5)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_resampling_visits_each_block_of_steps_again_with_other_noise(sampler):
    steps, visits = resampled(np.arange(6)[::-1], 2, 2)
    np.testing.assert_array_equal(steps, [5, 4, 5, 4, 3, 2, 3, 2, 1, 0, 1, 0])
    np.testing.assert_array_equal(visits, [0, 0, 1, 1] * 3)
    np.testing.assert_array_equal(resampled(np.arange(7)[::-1], 1, 3)[0], np.arange(7)[::-1])
    sampling = make_sampler(SamplingConfig(sampler=sampler))
    inputs = PROCESS, normal_model, sampling, KEYS, SHAPE
    once = sample(*inputs, known=Known(X_0, HOLE))[0]
    again = sample(*inputs, known=Known(X_0, HOLE), num_resamplings=2)[0]
    assert np.abs(once - again).max() > 0.1
    np.testing.assert_allclose(sample(PROCESS, constant_model, *inputs[2:], num_resamplings=3)[0], X_0, atol=1e-4)


def test_jump_back_noises_to_the_level_of_the_step_it_goes_to():
    """What is kept of x at step 3's result, alpha_bar_2, is alpha_bar_5 / alpha_bar_2 where 5 is next."""
    shares = kept_shares(PROCESS, np.array([5, 4, 3, 5, 4, 3, 2]))
    expected = PROCESS.alphas_cumprod[5] / PROCESS.alphas_cumprod[2]
    np.testing.assert_allclose(shares, [1, 1, expected, 1, 1, 1, 1], rtol=1e-6)


def test_network_sees_as_much_noise_after_a_jump_back_as_at_any_step():
    """Of data that are all X_0, what is over of x_t is the noise of its level, whichever way x_t was come by."""
    keys, levels = jax.random.split(jax.random.key(2), 64), []

    def model(x_t, step):
        alpha_bar = at(PROCESS.alphas_cumprod, step)
        noise = (x_t - jnp.sqrt(alpha_bar) * X_0[:1]) / jnp.sqrt(1 - alpha_bar)
        jax.debug.callback(lambda std: levels.append(float(std)), noise.std(), ordered=True)
        return predict(PROCESS, noise, x_t, step)

    sample(PROCESS, model, make_sampler(SamplingConfig(sampler="ddim")), keys, SHAPE, num_resamplings=3)
    jax.effects_barrier()
    assert len(levels) == 3 * PROCESS.num_steps
    np.testing.assert_allclose(levels, 1.0, atol=0.1)


def test_resampled_walk_keeps_the_datas_variance():
    """Of N(0, 1) data a perfect network's samples are N(0, 1), however often a walk goes back."""
    keys = jax.random.split(jax.random.key(3), 4000)
    sampling = make_sampler(SamplingConfig(sampler="ancestral"))
    x_0, _ = sample(PROCESS, normal_model, sampling, keys, (1, 1, 2), num_resamplings=3, jump_length=5)
    assert abs(float(x_0.std()) - 1) < 0.05 and abs(float(x_0.mean())) < 0.05


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_walk_from_a_noised_image_is_the_end_of_a_whole_one(sampler):
    """A perfect network leads back to the image that it knows, from any step; the tables are those of all steps."""
    head = first_steps(PROCESS, 20)
    np.testing.assert_array_equal(head.alphas_cumprod, PROCESS.alphas_cumprod[:20])
    np.testing.assert_array_equal(head.timesteps, PROCESS.timesteps[:20])
    x_T = add_noise(head, X_0, jnp.full(3, 19), image_noise(KEYS, 20, SHAPE))
    x_0, _ = sample(head, constant_model, make_sampler(SamplingConfig(sampler=sampler)), KEYS, SHAPE, x_T)
    np.testing.assert_allclose(x_0, X_0, atol=1e-4)


def test_noise_between_two_is_as_long_and_ends_at_both():
    a, b = jax.random.normal(jax.random.key(0), (2, 5, 8, 8, 4))
    weight = jnp.array([0.0, 0.25, 0.5, 0.75, 1.0])
    found = slerp(a, b, weight)
    np.testing.assert_allclose(found[0], a[0], atol=1e-6)
    np.testing.assert_allclose(found[-1], b[-1], atol=1e-6)
    lengths, own = (np.linalg.norm(np.asarray(x).reshape(5, -1), axis=1) for x in (found, a))
    np.testing.assert_allclose(lengths, own, rtol=0.2)
    assert lengths[2] > 1.2 * np.linalg.norm((a[2] + b[2]) / 2)  # a straight line is too short
    np.testing.assert_allclose(slerp(a, a, weight), a, atol=1e-6)
