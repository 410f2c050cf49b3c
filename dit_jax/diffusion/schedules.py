"""Noise schedules and respacing: float64 tables, made once in NumPy.

Notation of DDPM (Ho et al., arXiv:2006.11239): beta_t, alpha_t = 1 - beta_t, alpha_bar_t = prod alpha.
"""

import numpy as np


def linear_betas(num_timesteps: int, start: float, end: float) -> np.ndarray:
    """Returns beta_t [T] float64, linear in t (DDPM, section 4)."""
    return np.linspace(start, end, num_timesteps, dtype=np.float64)


def respaced_timesteps(num_timesteps: int, num_steps: int) -> np.ndarray:
    """Returns the `num_steps` timesteps [num_steps] int32 of a shorter process, ascending, 0 and T - 1 included.

    Evenly spaced and rounded (Nichol & Dhariwal, arXiv:2102.09672, section 4).
    """
    if num_steps == 1:
        return np.array([num_timesteps - 1], np.int32)  # the one step must start from noise
    return np.round(np.linspace(0, num_timesteps - 1, num_steps)).astype(np.int32)


def respaced_betas(betas: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
    """Returns the betas [num_steps] of the process that visits only `timesteps`, with alpha_bar kept at each."""
    alphas_cumprod = np.cumprod(1.0 - betas)[timesteps]
    return 1.0 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
