"""Averages of the weights over training: exponential ones, and powers of the step from which any length is made later.

Power-function averages and their reconstruction: Karras et al., "Analyzing and Improving the Training Dynamics of
Diffusion Models", arXiv:2312.02696, section 3 and appendix C. An average's `length` is its profile's standard deviation
relative to the time trained (sigma_rel there): 0.05 averages over a shorter, later part than 0.10.
"""

from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
import optax

from dit_jax.config import TrainingConfig
from dit_jax.types import Array, Params

DecayFn = Callable[[Array], Array]  # the number of updates made, this one included -> decay
MAX_INITIAL_SHARE = 0.03  # of the initial weights in an average, from which on it is told


def average_decays(training: TrainingConfig) -> dict[str, DecayFn]:
    """Returns the decay of each average beside the main one, by its name: decay_0.999, length_0.05."""
    exponential = {f"decay_{decay}": _constant(decay) for decay in training.extra_ema_decays}
    return exponential | {length_name(length): _power(length) for length in training.ema_lengths}


def initial_share(training: TrainingConfig, step: int, average: str | None = None) -> float:
    """Returns how much of an average after `step` steps is still the weights that training began with.

    0 where `init_from` gave it trained ones, and of power-function averages, which begin with the first update.

    Args:
      average: one of `average_decays`; None: the main one.
    """
    decays = {None: training.ema_decay} | {f"decay_{decay}": decay for decay in training.extra_ema_decays}
    decay = decays.get(average)
    return 0.0 if decay is None or training.init_from else decay**step


def initial_share_note(training: TrainingConfig, step: int, average: str | None = None) -> str | None:
    """Returns a line on an average that still holds much of the initial weights; None of one that does not."""
    share = initial_share(training, step, average)
    if share <= MAX_INITIAL_SHARE:
        return None
    name = f"config.training.ema_decay={training.ema_decay}" if average is None else average
    lower = f", or with a decay such as {1 - 5 / step:.4g}" if step > 50 else ""  # holds 0.7 % of them
    return (
        f"the average of the weights ({name}) is after {step:,} steps still {share:.0%} the weights from before the "
        f"first step, and so are its figures and samples; train longer{lower}"
    )


def length_name(length: float) -> str:
    """Returns the name of a power-function average."""
    return f"length_{length}"


def update_averages(averages: dict[str, Params], params: Params, step: Array, decays: Mapping[str, DecayFn]) -> dict:
    """Returns the averages after the update number `step` (from 1) has made `params`."""
    return {
        name: optax.incremental_update(params, average, 1.0 - decays[name](step)) for name, average in averages.items()
    }


def exponent_of_length(length: float) -> float:
    """Returns gamma of the profile t^gamma whose relative standard deviation is `length` (algorithm 2).

    length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)); lengths are from 0 to 0.288, that of the plain mean.
    """
    inverse = length**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def reconstruction_weights(snapshots: Sequence[tuple[int, float]], step: int, length: float) -> np.ndarray:
    """Returns the factors [K] float64 that make, of K snapshots, the average of a length at a step (algorithm 3).

    They are the least-squares fit of the profiles.

    Args:
      snapshots: (step, length) of each; step: at which the average ends, none of the snapshots after it.
      length: of the average to make.
    """
    steps = np.array([s for s, _ in snapshots] + [step], np.float64)
    gammas = np.array([exponent_of_length(x) for _, x in snapshots] + [exponent_of_length(length)])
    products = _profile_product(steps[:, None], gammas[:, None], steps, gammas)
    return np.linalg.lstsq(products[:-1, :-1], products[:-1, -1], rcond=None)[0]


def _profile_product(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Returns the integral of the product of two profiles, (gamma + 1) t^gamma / T^(gamma + 1) for t up to T."""
    ratio = np.where(t_a < t_b, (t_a / t_b) ** gamma_b, (t_b / t_a) ** gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b)) * ratio


def _constant(decay: float) -> DecayFn:
    return lambda step: jnp.float32(decay)


def _power(length: float) -> DecayFn:
    exponent = exponent_of_length(length) + 1
    return lambda step: (1 - 1 / step.astype(jnp.float32)) ** exponent  # 0 at the first update
