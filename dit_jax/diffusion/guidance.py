"""Classifier-free guidance (Ho & Salimans, arXiv:2207.12598)."""

import jax
import jax.numpy as jnp

from dit_jax.diffusion.parameterization import split_output
from dit_jax.types import Array, ModelFn, PRNGKey


def drop_labels(key: PRNGKey, labels: Array, rate: float, null_label: int) -> Array:
    """Returns labels [B] with a share `rate` replaced by the null class, so that the network learns both branches."""
    return jnp.where(jax.random.bernoulli(key, rate, labels.shape), null_label, labels)


def guided(model_fn: ModelFn, null_label: int, cfg_scale: float, cfg_channels: int | None) -> ModelFn:
    """Returns a model_fn whose epsilon is uncond + cfg_scale * (cond - uncond); both branches run in one batch.

    The variance is the conditional branch's. Guidance acts on the first `cfg_channels` channels (the released DiT
    guides 3 of its 4), None for all; the others keep the conditional epsilon. cfg_scale 1 returns `model_fn` itself.
    """
    if cfg_scale == 1.0:
        return model_fn

    def guided_fn(x_t: Array, t: Array, labels: Array) -> Array:
        both_labels = jnp.concatenate([labels, jnp.full_like(labels, null_label)])
        output = model_fn(jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t]), both_labels)
        conditional, unconditional = jnp.split(output, 2)
        epsilon, v = split_output(conditional)
        null_epsilon, _ = split_output(unconditional)
        mixed = null_epsilon + cfg_scale * (epsilon - null_epsilon)
        mixed = mixed.at[..., cfg_channels:].set(epsilon[..., cfg_channels:]) if cfg_channels else mixed
        return jnp.concatenate([mixed, v], axis=-1)

    return guided_fn
