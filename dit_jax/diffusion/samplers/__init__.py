"""Samplers: each a rule for one step, all walked by the one scan."""

from dit_jax.config import SamplingConfig
from dit_jax.diffusion.samplers.ancestral import ancestral
from dit_jax.diffusion.samplers.ddim import make_ddim
from dit_jax.diffusion.samplers.dpm_solver import dpm_solver
from dit_jax.diffusion.samplers.plms import plms
from dit_jax.diffusion.samplers.scan import Sampler


def make_sampler(sampling: SamplingConfig) -> Sampler:
    """Returns the sampler of a config."""
    samplers = {"ancestral": ancestral, "ddim": make_ddim(sampling.eta), "dpm_solver": dpm_solver, "plms": plms}
    return samplers[sampling.sampler]
