"""DDIM (Song et al., arXiv:2010.02502)."""

import numpy as np

from dit_jax.diffusion.parameterization import Prediction
from dit_jax.diffusion.process import Process, at
from dit_jax.diffusion.samplers.scan import Sampler
from dit_jax.types import Array


def make_ddim(eta: float) -> Sampler:
    """Returns DDIM with noise share `eta` (eq. 16): 0 is deterministic, 1 has DDPM's variance."""

    def update(
        process: Process, prediction: Prediction, x: Array, step: Array, noise: Array, memory: None
    ) -> tuple[Array, None]:
        mean = ddim_mean(process, prediction.x_0, prediction.epsilon, step, eta)
        return mean + at(sigma(process, eta), step) * noise, memory

    return Sampler(update)


def sigma(process: Process, eta: float) -> np.ndarray:
    """Returns the standard deviation [N] of the noise that a step adds (eq. 16); 0 at step 0."""
    return eta * np.sqrt(process.posterior_variance)


def ddim_mean(process: Process, x_0: Array, epsilon: Array, step: Array, eta: float = 0.0) -> Array:
    """Returns the mean of x_{t-1} (eq. 12); the last step (0) returns x_0."""
    previous = process.alphas_cumprod_prev
    direction = np.sqrt(np.maximum(1.0 - previous - sigma(process, eta) ** 2, 0.0))
    return at(np.sqrt(previous), step) * x_0 + at(direction, step) * epsilon
