"""Classifier-free guidance (Ho & Salimans, arXiv:2207.12598)."""

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion.process import Process, at
from dit_jax.types import Array, ModelFn, PRNGKey


def drop_labels(key: PRNGKey, labels: Array, rate: float, null_label: int) -> Array:
    """Returns labels [B] with a share `rate` replaced by the null class, so that the network learns both branches."""
    return jnp.where(jax.random.bernoulli(key, rate, labels.shape), null_label, labels)


def guidance_scales(process: Process, cfg_scale: float, cfg_interval: tuple[float, float] | None) -> np.ndarray:
    """Returns the guidance scale [T] of each timestep: `cfg_scale` at the noise levels of the interval, elsewhere 1.

    A noise level is sigma / alpha = sqrt(1 / alpha_bar - 1); the interval excludes its lower end (Kynkaanniemi et al.,
    arXiv:2404.07724). `process` is the training process.
    """
    low, high = cfg_interval or (0.0, np.inf)
    levels = process.snr**-0.5
    return np.where((low < levels) & (levels <= high), cfg_scale, 1.0)


def guided(model_fn: ModelFn, null_label: int, scales: np.ndarray, cfg_channels: int | None) -> ModelFn:
    """Returns a model_fn whose mean is uncond + scales[t] * (cond - uncond); both branches run in one batch.

    The variance is the conditional branch's. Guidance acts on the first `cfg_channels` channels (the released DiT
    guides 3 of its 4), None for all; the others keep the conditional mean. Scales of 1 return `model_fn` itself.
    """
    if np.all(scales == 1.0):
        return model_fn

    def guided_fn(x_t: Array, t: Array, labels: Array) -> Array:
        both_labels = jnp.concatenate([labels, jnp.full_like(labels, null_label)])
        output = model_fn(jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]), both_labels)
        conditional, unconditional = jnp.split(output, 2)
        channels = slice(0, cfg_channels or x_t.shape[-1])
        cond, uncond = conditional[..., channels], unconditional[..., channels]
        return conditional.at[..., channels].set(uncond + at(scales, t) * (cond - uncond))

    return guided_fn
