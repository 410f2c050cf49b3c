"""PLMS, or PNDM without its Runge-Kutta start (Liu et al., arXiv:2202.09778), as LDM samples with.

Adams-Bashforth extrapolation of epsilon, up to fourth order, then DDIM's deterministic step (section 3.3). The first
step has no history: it is made twice, the second time with the mean of epsilon at its two ends (Heun), so that the
network is evaluated once more than there are steps.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.parameterization import Prediction, x_0_from_epsilon
from dit_jax.diffusion.process import Process
from dit_jax.diffusion.samplers.ddim import ddim_mean
from dit_jax.diffusion.samplers.scan import Sampler, descending
from dit_jax.types import Array

# Factors of epsilon now, one step ago, two, three; a row for each evaluation, the last row from there on.
COEFFICIENTS = np.array(
    [
        [1, 0, 0, 0],  # the first step, tried
        [1 / 2, 1 / 2, 0, 0],  # the first step again, from where it started
        [3 / 2, -1 / 2, 0, 0],
        [23 / 12, -16 / 12, 5 / 12, 0],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24],
    ]
)


class Memory(NamedTuple):
    """The number of evaluations made, where the first step started, and epsilon one, two and three steps ago."""

    count: Array
    start: Array
    history: tuple[Array, Array, Array]


def plms_update(
    process: Process, prediction: Prediction, x: Array, step: Array, noise: Array, memory: Memory
) -> tuple[Array, Memory]:
    """Returns x_{t-1}, or at the second evaluation the first step's end once more."""
    count, start, history = memory
    again = count == 1
    coefficients = jnp.asarray(COEFFICIENTS, jnp.float32)[jnp.minimum(count, len(COEFFICIENTS) - 1)]
    epsilon = sum(c * e for c, e in zip(coefficients, (prediction.epsilon, *history), strict=True))
    x, step = jnp.where(again, start, x), step + again
    x = ddim_mean(process, x_0_from_epsilon(process, x, step, epsilon), epsilon, step)
    # The second evaluation is of a point that the walk leaves again: it is not history.
    shifted = (prediction.epsilon, *history[:2])
    history = tuple(jnp.where(again, old, new) for old, new in zip(history, shifted, strict=True))
    return x, Memory(count + 1, start, history)


def _memory(x_T: Array) -> Memory:
    return Memory(jnp.zeros((), jnp.int32), x_T, (jnp.zeros_like(x_T),) * 3)


def _evaluations(process: Process) -> np.ndarray:
    steps = descending(process)
    return np.insert(steps, 1, steps[1]) if len(steps) > 1 else steps


plms = Sampler(plms_update, memory=_memory, evaluations=_evaluations)
