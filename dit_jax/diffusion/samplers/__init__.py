"""Samplers: each a step function, all walked by the one scan."""

from dit_jax.config import SamplingConfig
from dit_jax.diffusion.samplers.ancestral import ancestral_step
from dit_jax.diffusion.samplers.ddim import make_ddim_step
from dit_jax.diffusion.samplers.scan import StepFn


def make_sampler_step(sampling: SamplingConfig) -> StepFn:
    """Returns the step function of a config."""
    return {"ancestral": lambda: ancestral_step, "ddim": lambda: make_ddim_step(sampling.eta)}[sampling.sampler]()
