"""What a denoiser is conditioned on: raw conditions, their nulls, and what a network makes of them.

Raw conditions are a dict, [B, ...] each, of those that the model was trained with:

    label    [B] int32 in [0, num_classes]; num_classes is the null class

A network's conditioners turn them into one `Condition`, which its blocks read as they were built to. The null of a
condition is what it is replaced by in training at times, and in guidance (arXiv:2207.12598): none of it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from dit_jax.types import Array, Conditions, PRNGKey


@flax.struct.dataclass
class Condition:
    """What a block is conditioned on, whatever it was made from; a block reads the parts that it was built for."""

    vector: Array  # [B, D], pooled: read by adaLN
    tokens: Array  # [B, S, D]: read by cross-attention, or carried in context
    mask: Array | None = None  # [B, S] bool, the tokens that are there; None: all


def as_conditions(conditions: Array | Conditions) -> Conditions:
    """Returns raw conditions as a dict; labels alone may be given as their array."""
    return dict(conditions) if isinstance(conditions, Mapping) else {"label": conditions}


def null_conditions(conditions: Conditions, names: Iterable[str], num_classes: int) -> Conditions:
    """Returns the conditions with those named replaced by their nulls."""
    return {
        name: jax.tree.map(lambda leaf, name=name: _null(name, leaf, num_classes), value) if name in names else value
        for name, value in conditions.items()
    }


def drop_conditions(key: PRNGKey, conditions: Conditions, rates: Mapping[str, float], num_classes: int) -> Conditions:
    """Returns the conditions with a share `rates[name]` of the rows of each, drawn for each alone, made null.

    So the network learns every branch of guidance.
    """
    dropped = {}
    for name, value in conditions.items():
        # Labels have the key itself: what a run draws does not depend on which other conditions there could be.
        own_key = key if name == "label" else jax.random.fold_in(key, sum(name.encode()))
        nulls = null_conditions({name: value}, (name,), num_classes)[name]
        rows = jax.random.bernoulli(own_key, rates.get(name, 0.0), (len(jax.tree.leaves(value)[0]),))
        dropped[name] = jax.tree.map(
            lambda null, leaf, rows=rows: jnp.where(rows.reshape(-1, *[1] * (leaf.ndim - 1)), null, leaf), nulls, value
        )
    return dropped


def _null(name: str, leaf: Any, num_classes: int) -> Array:
    return jnp.full_like(leaf, num_classes) if name == "label" else jnp.zeros_like(leaf)
