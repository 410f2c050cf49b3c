"""Classifier-free guidance (Ho & Salimans, arXiv:2207.12598), of one condition or of several, each with its weight."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.process import Process, at
from dit_jax.types import Array, Conditions, ModelFn


def guidance_scales(process: Process, cfg_scale: float, cfg_interval: tuple[float, float] | None) -> np.ndarray:
    """Returns the guidance scale [T] of each timestep: `cfg_scale` at the noise levels of the interval, elsewhere 1.

    A noise level is sigma / alpha = sqrt(1 / alpha_bar - 1); the interval excludes its lower end (Kynkaanniemi et al.,
    arXiv:2404.07724). A scale of 0, no condition at all, is one at every level. `process` is the training process.
    """
    if cfg_scale == 0:
        return np.zeros(process.num_steps)
    low, high = cfg_interval or (0.0, np.inf)
    levels = process.snr**-0.5
    return np.where((low < levels) & (levels <= high), cfg_scale, 1.0)


def guided(
    model_fn: ModelFn, null: Callable[[Conditions], Conditions], scales: np.ndarray, cfg_channels: int | None
) -> ModelFn:
    """Returns a model_fn whose mean is uncond + scales[t] * (cond - uncond); both branches run in one batch.

    The variance is the conditional branch's. Guidance acts on the first `cfg_channels` channels (the released DiT
    guides 3 of its 4), None for all; the others keep the conditional mean. Scales of 1 return `model_fn` itself, and
    scales of 0 the unconditional model, with all its channels and its variance.

    Guided again for another condition, a guided model_fn has a weight for each: weight 0 is then exactly the
    prediction without that condition, whatever the weights of others, and weights of 1 exactly the conditional one.

    Args:
      null: conditions -> the same without those that this weight is for.
    """
    if np.all(scales == 1.0):
        return model_fn
    if np.all(scales == 0.0):
        return lambda x_t, t, conditions: model_fn(x_t, t, null(conditions))

    def guided_fn(x_t: Array, t: Array, conditions: Conditions) -> Array:
        both = jax.tree.map(lambda *branches: jnp.concatenate(branches), conditions, null(conditions))
        output = model_fn(jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]), both)
        conditional, unconditional = jnp.split(output, 2)
        channels = slice(0, cfg_channels or x_t.shape[-1])
        cond, uncond = conditional[..., channels], unconditional[..., channels]
        return conditional.at[..., channels].set(uncond + at(scales, t) * (cond - uncond))

    return guided_fn


def between(model_fn: ModelFn, towards: Conditions, weight: Array) -> ModelFn:
    """Returns a model_fn whose output lies between those for its conditions and for others, linearly.

    Of epsilons that is the score of the geometric mean of both conditional densities. It needs nothing of the network,
    so that any condition goes over into any other of its kind, and is exact at both ends.

    Args:
      towards: the other conditions, [B, ...]; weight: [B], 0 for its own, 1 for the others. Both run in one batch.
    """

    def between_fn(x_t: Array, t: Array, conditions: Conditions) -> Array:
        both = jax.tree.map(lambda *ends: jnp.concatenate(ends), conditions, towards)
        own, other = jnp.split(model_fn(jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]), both), 2)
        share = weight.reshape(-1, 1, 1, 1)
        return (1.0 - share) * own + share * other

    return between_fn
