"""DDIM (Song et al., arXiv:2010.02502)."""

from functools import partial

import numpy as np

from dit_jax.diffusion.parameterization import split_output, x_0_from_epsilon
from dit_jax.diffusion.process import Process, at
from dit_jax.diffusion.samplers.scan import StepFn
from dit_jax.types import Array


def make_ddim_step(eta: float) -> StepFn:
    """Returns the DDIM step with noise share `eta` (eq. 16): 0 is deterministic, 1 has DDPM's variance."""
    return partial(ddim_step, eta)


def ddim_step(eta: float, process: Process, output: Array, x: Array, step: Array, noise: Array) -> Array:
    """Returns x_{t-1} (eq. 12); the last step (0) returns the predicted x_0."""
    epsilon, _ = split_output(output)
    previous = process.alphas_cumprod_prev
    sigma = eta * np.sqrt(process.posterior_variance)  # eq. 16; 0 at step 0
    direction = at(np.sqrt(np.maximum(1.0 - previous - sigma**2, 0.0)), step) * epsilon
    return (
        at(np.sqrt(previous), step) * x_0_from_epsilon(process, x, step, epsilon) + direction + at(sigma, step) * noise
    )
