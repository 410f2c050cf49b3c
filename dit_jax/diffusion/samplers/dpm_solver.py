"""DPM-Solver++ (2M): second-order multistep in x_0 (Lu et al., arXiv:2211.01095, algorithm 2)."""

import numpy as np

from dit_jax.diffusion.parameterization import Prediction
from dit_jax.diffusion.process import Process, at
from dit_jax.diffusion.samplers.scan import Sampler
from dit_jax.types import Array


def dpm_solver_update(
    process: Process, prediction: Prediction, x: Array, step: Array, noise: Array, previous_x_0: Array
) -> tuple[Array, Array]:
    """Returns x_{t-1} (eq. 9), and the predicted x_0 for the next update; the last step (0) returns x_0."""
    alphas_cumprod, previous = process.alphas_cumprod, process.alphas_cumprod_prev
    # lambda = log(alpha / sigma); a step goes up by h in it, and the last of all goes to infinity.
    x_0, extrapolation = prediction.x_0, at(_extrapolation(process), step)
    d = x_0 + extrapolation * (x_0 - previous_x_0)
    ratio = np.sqrt((1.0 - previous) / (1.0 - alphas_cumprod))  # sigma_{t-1} / sigma_t
    decay = np.sqrt(alphas_cumprod / previous) * ratio  # e^-h
    return at(ratio, step) * x + at(np.sqrt(previous) * (1.0 - decay), step) * d, x_0


def _extrapolation(process: Process) -> np.ndarray:
    """Returns 1 / (2 r) [N], r = h of the step before / h; 0 (first order) at the walk's first step and its last."""
    half_log_snr = 0.5 * np.log(process.snr)
    weights = np.zeros(process.num_steps)
    h = half_log_snr[:-1] - half_log_snr[1:]  # h[i] is step i + 1's
    weights[1:-1] = 0.5 * h[:-1] / h[1:]
    return weights


dpm_solver = Sampler(dpm_solver_update, memory=lambda x_T: x_T)
