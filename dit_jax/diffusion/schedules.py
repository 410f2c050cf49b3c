"""Noise schedules and respacing: float64 tables, made once in NumPy.

Notation of DDPM (Ho et al., arXiv:2006.11239): beta_t, alpha_t = 1 - beta_t, alpha_bar_t = prod alpha.
"""

import math

import numpy as np

from dit_jax.config import DiffusionConfig


def linear_betas(num_timesteps: int, start: float, end: float) -> np.ndarray:
    """Returns beta_t [T] float64, linear in t (DDPM, section 4)."""
    return np.linspace(start, end, num_timesteps, dtype=np.float64)


def scaled_linear_betas(num_timesteps: int, start: float, end: float) -> np.ndarray:
    """Returns beta_t [T] float64, their square roots linear in t (the schedule of LDM's models)."""
    return np.linspace(start**0.5, end**0.5, num_timesteps, dtype=np.float64) ** 2


def cosine_betas(num_timesteps: int) -> np.ndarray:
    """Returns beta_t [T] float64 with alpha_bar(t) = f(t) / f(0), f(t) = cos^2((t / T + s) / (1 + s) pi / 2).

    s = 0.008 keeps the first betas from vanishing; betas stop at 0.999 (Improved DDPM, arXiv:2102.09672, eq. 17).
    """
    s, times = 0.008, np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
    f = np.cos((times + s) / (1 + s) * np.pi / 2) ** 2
    return np.minimum(1.0 - f[1:] / f[:-1], 0.999)


def make_betas(diffusion: DiffusionConfig) -> np.ndarray:
    """Returns the betas [T] float64 of a config."""
    num_timesteps, start, end = diffusion.num_timesteps, diffusion.beta_start, diffusion.beta_end
    return {
        "linear": lambda: linear_betas(num_timesteps, start, end),
        "scaled_linear": lambda: scaled_linear_betas(num_timesteps, start, end),
        "cosine": lambda: cosine_betas(num_timesteps),
    }[diffusion.schedule]()


def respaced_timesteps(num_timesteps: int, num_steps: int, spacing: str = "even") -> np.ndarray:
    """Returns the `num_steps` timesteps [num_steps] int32 of a shorter process, ascending.

    "even": evenly spaced from 0 to T - 1 and rounded (Nichol & Dhariwal, arXiv:2102.09672, section 4).
    "ddim": multiples of one whole stride (DDIM, arXiv:2010.02502, appendix D.2), known as "ddimN".
    "trailing": strides of T / N back from T - 1, which end a stride above 0 (Lin et al., arXiv:2305.08891, table 2).
    """
    if spacing == "ddim":
        return np.arange(0, num_timesteps, math.ceil(num_timesteps / num_steps), dtype=np.int32)
    if spacing == "trailing":
        return np.round(np.arange(1, num_steps + 1) * (num_timesteps / num_steps)).astype(np.int32) - 1
    if num_steps == 1:
        return np.array([num_timesteps - 1], np.int32)  # the one step must start from noise
    return np.round(np.linspace(0, num_timesteps - 1, num_steps)).astype(np.int32)


def respaced_betas(betas: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
    """Returns the betas [num_steps] of the process that visits only `timesteps`, with alpha_bar kept at each."""
    alphas_cumprod = np.cumprod(1.0 - betas)[timesteps]
    return 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
