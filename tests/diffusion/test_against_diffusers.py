"""The samplers against the schedulers of diffusers, an independent implementation, with the same model and noise."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm

from dit_jax.config import DiffusionConfig
from dit_jax.diffusion.parameterization import predict
from dit_jax.diffusion.process import make_process, respace
from dit_jax.diffusion.samplers.ancestral import ancestral
from dit_jax.diffusion.samplers.ddim import make_ddim
from dit_jax.diffusion.samplers.dpm_solver import dpm_solver
from dit_jax.diffusion.samplers.scan import sample
from dit_jax.diffusion.schedules import respaced_timesteps

SHAPE = (2, 8, 8, 4)
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def model_fn(xp, x, t):
    """A denoiser of either library: roughly the noise in x, with a curve in x and t."""
    return xp.tanh(x * (0.6 + 0.4 * t / 1000)) + 0.1 * xp.sin(3 * x + t / 200)


def ours(sampler, process, x_T):
    """Returns the end of our walk."""

    def predict_fn(x_t, step):
        t = jnp.asarray(process.timesteps)[step].reshape(-1, 1, 1, 1)
        return predict(process, model_fn(jnp, x_t, t), x_t, step)

    keys = jnp.zeros(len(x_T), jnp.uint32)  # deterministic samplers draw nothing with them
    return sample(process, predict_fn, sampler, jax.vmap(jax.random.key)(keys), x_T.shape[1:], jnp.asarray(x_T))[0]


def theirs(scheduler, num_steps, x_T):
    """Returns the end of a scheduler's walk, and its timesteps."""
    scheduler.set_timesteps(num_steps)
    x = torch.from_numpy(x_T)
    for t in scheduler.timesteps:
        x = scheduler.step(model_fn(torch, x, int(t)), t, x).prev_sample
    return x.numpy(), scheduler.timesteps.numpy()


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x_0"])
def test_50_steps_of_ddim(prediction):
    their_prediction = {"epsilon": "epsilon", "v": "v_prediction", "x_0": "sample"}[prediction]
    scheduler = diffusers.DDIMScheduler(**SCHEDULE, clip_sample=False, prediction_type=their_prediction)
    x_T = normal(*SHAPE)
    expected, timesteps = theirs(scheduler, 50, x_T)
    process = make_process(DiffusionConfig(prediction=prediction, variance="fixed_small"))
    process = respace(process, 50, "ddim")
    np.testing.assert_array_equal(process.timesteps[::-1], timesteps)
    np.testing.assert_allclose(ours(make_ddim(0.0), process, x_T), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_20_steps_of_dpm_solver(spacing):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **SCHEDULE, algorithm_type="dpmsolver++", solver_order=2, timestep_spacing=spacing, final_sigmas_type="zero"
    )
    x_T = normal(*SHAPE)
    expected, timesteps = theirs(scheduler, 20, x_T)
    if spacing == "trailing":
        np.testing.assert_array_equal(respaced_timesteps(1000, 20, "trailing")[::-1], timesteps)
    process = respace(make_process(DiffusionConfig(variance="fixed_small")), timesteps[::-1].tolist())
    np.testing.assert_allclose(ours(dpm_solver, process, x_T), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("variance", ["learned_range", "fixed_small", "fixed_large"])
@pytest.mark.parametrize("num_steps", [1000, 250])
def test_mean_and_variance_of_every_ancestral_step(variance, num_steps, monkeypatch):
    scheduler = diffusers.DDPMScheduler(
        **SCHEDULE, clip_sample=False, variance_type=variance, timestep_spacing="leading"
    )
    scheduler.set_timesteps(num_steps)
    process = respace(make_process(DiffusionConfig(variance=variance)), num_steps, "ddim")
    x, noise = normal(1, 4, 4, 2), normal(1, 4, 4, 2, seed=1)
    output = normal(1, 4, 4, 4 if variance == "learned_range" else 2, seed=2)

    def their_step(t, noise):
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: to_torch(noise))
        step = scheduler.step(to_torch(output), t, to_torch(x)).prev_sample
        return step.permute(0, 2, 3, 1).numpy()

    def our_step(step, noise):
        steps = jnp.array([step])
        return ancestral.update(process, predict(process, output, x, steps), x, steps, noise, None)[0]

    def to_torch(array):
        return torch.from_numpy(array).permute(0, 3, 1, 2)

    for step in [0, 1, 2, num_steps // 2, num_steps - 1]:
        t = int(process.timesteps[step])
        mean = their_step(t, 0 * noise)
        np.testing.assert_allclose(our_step(step, 0 * noise), mean, rtol=1e-4, atol=1e-4)
        spread = their_step(t, noise) - mean
        if step == 0:
            continue  # no noise is added at 0
        np.testing.assert_allclose(our_step(step, noise) - mean, spread, rtol=2e-3, atol=2e-4)
