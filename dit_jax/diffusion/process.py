"""The Gaussian forward process and its posterior (DDPM, arXiv:2006.11239, sections 2 and 3)."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from dit_jax.config import DiffusionConfig
from dit_jax.diffusion.schedules import make_betas, respaced_betas, respaced_timesteps
from dit_jax.types import Array


@dataclasses.dataclass(frozen=True, eq=False)
class Process:
    """Tables of a process of N steps, float64 [N] each; index i is the i-th step, not the timestep.

    `timesteps[i]` is the timestep that the network was trained to see at step i. `prediction` and `variance` say what
    the network's output means (`DiffusionConfig`).
    """

    betas: np.ndarray
    timesteps: np.ndarray
    prediction: str = "epsilon"
    variance: str = "learned_range"

    @property
    def num_steps(self) -> int:
        return len(self.betas)

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """alpha_bar_i."""
        return np.cumprod(1.0 - self.betas)

    @property
    def alphas_cumprod_prev(self) -> np.ndarray:
        """alpha_bar_{i-1}, 1 before the first step."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @property
    def snr(self) -> np.ndarray:
        """The signal-to-noise ratio alpha_bar_i / (1 - alpha_bar_i)."""
        return self.alphas_cumprod / (1.0 - self.alphas_cumprod)

    @property
    def posterior_variance(self) -> np.ndarray:
        """beta-tilde_i, the variance of q(x_{i-1} | x_i, x_0) (eq. 7); 0 at the first step."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @property
    def posterior_log_variance_clipped(self) -> np.ndarray:
        """Log of the posterior variance, the first entry (log 0) replaced by the second's."""
        return np.log(_second_for_first(self.posterior_variance, self.posterior_variance, self.betas))

    @property
    def fixed_large_log_variance(self) -> np.ndarray:
        """Log of beta, the first entry replaced by the posterior's second: beta_0 would blur the last step."""
        return np.log(_second_for_first(self.betas, self.posterior_variance, self.betas))

    @property
    def posterior_mean_coef_x_0(self) -> np.ndarray:
        """Factor of x_0 in the posterior's mean (eq. 7)."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @property
    def posterior_mean_coef_x_t(self) -> np.ndarray:
        """Factor of x_t in the posterior's mean (eq. 7)."""
        return (1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - self.betas) / (1.0 - self.alphas_cumprod)


def _second_for_first(table: np.ndarray, posterior_variance: np.ndarray, betas: np.ndarray) -> np.ndarray:
    """Returns the table with its first entry replaced; a single step has no second, and its noise is never added."""
    return np.append(posterior_variance[1], table[1:]) if len(betas) > 1 else betas


def make_process(diffusion: DiffusionConfig) -> Process:
    """Returns the training process of a config."""
    timesteps = np.arange(diffusion.num_timesteps, dtype=np.int32)
    return Process(make_betas(diffusion), timesteps, diffusion.prediction, diffusion.variance)


def respace(process: Process, num_steps: int | Sequence[int], spacing: str = "even") -> Process:
    """Returns the process of fewer steps that agrees with `process` at the timesteps it visits.

    Args:
      process: the training process; num_steps: how many, or the timesteps themselves, ascending.
      spacing: see `schedules.respaced_timesteps`.
    """
    if isinstance(num_steps, int):
        steps = respaced_timesteps(process.num_steps, num_steps, spacing)
    else:
        steps = np.asarray(num_steps, np.int32)
    betas = respaced_betas(process.betas, steps)
    return dataclasses.replace(process, betas=betas, timesteps=process.timesteps[steps])


def first_steps(process: Process, num_steps: int) -> Process:
    """Returns the process that ends after its first steps: of an image that was noised no further."""
    return dataclasses.replace(process, betas=process.betas[:num_steps], timesteps=process.timesteps[:num_steps])


def at(table: np.ndarray, step: Array) -> Array:
    """Returns table[step] as float32 [B, 1, 1, 1]: a coefficient per image; the one cast of the float64 tables."""
    return jnp.asarray(table, jnp.float32)[step].reshape(-1, 1, 1, 1)


def add_noise(process: Process, x_0: Array, step: Array, noise: Array) -> Array:
    """Returns x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise (eq. 4); x_0 [B, H, W, C], step [B]."""
    alphas_cumprod = process.alphas_cumprod
    return at(np.sqrt(alphas_cumprod), step) * x_0 + at(np.sqrt(1.0 - alphas_cumprod), step) * noise


def posterior_mean(process: Process, x_0: Array, x_t: Array, step: Array) -> Array:
    """Returns the mean of q(x_{t-1} | x_t, x_0) (eq. 7)."""
    return at(process.posterior_mean_coef_x_0, step) * x_0 + at(process.posterior_mean_coef_x_t, step) * x_t
