"""What a denoiser is conditioned on: raw conditions, their nulls, and what a network makes of them.

Raw conditions are a dict, [B, ...] each, of those that the model was trained with:

    label    [B] int32 in [0, num_classes]; num_classes is the null class
    text     of a trained encoder: ids [B, L] int32, and mask [B, L] bool, False behind a caption's end
             of a frozen one: its states [B, L, E] and pooled [B, E] float32, and that mask; of the null all is False
    layout   boxes with classes (`data.layouts`): ids [B, L] int32, and mask [B, L] bool as of a text
    spatial  [B, H, W, K] float32, of the input's own H and W (`models.spatial`); zeros are the null

A network's conditioners turn them into one `Condition`, which its blocks read as they were built to. The null of a
condition is what it is replaced by in training at times, and in guidance (arXiv:2207.12598): none of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from dit_jax.config import Config
from dit_jax.models.autoencoder import Codec
from dit_jax.models.spatial import batch_spatial
from dit_jax.models.text_encoder import FrozenTextEncoder, TextEncoder, TextShape
from dit_jax.nn.embeddings import normal_init
from dit_jax.nn.linear import Linear
from dit_jax.types import Array, Batch, Conditions, PRNGKey


@flax.struct.dataclass
class Condition:
    """What a block is conditioned on, whatever it was made from; a block reads the parts that it was built for."""

    vector: Array | None  # [B, D], pooled: read by adaLN
    tokens: Array | None  # [B, S, D]: read by cross-attention, or carried in context
    mask: Array | None = None  # [B, S] bool, the tokens that are there; None: all


class SequenceConditioner(nn.Module):
    """A raw condition of tokens, such as a text, to those parts of a `Condition` that have a width here.

    Of the null it gives a vector and one token that are learned. Padding changes nothing.
    """

    encoder: TextShape | None  # trained here; None: the raw condition is what a frozen one gave
    vector_width: int | None
    token_width: int | None
    dtype: jnp.dtype = jnp.float32  # of the encoder's matmuls
    remat: str = "none"

    @nn.compact
    def __call__(self, raw: Conditions) -> Condition:
        mask, encoded, vector, tokens = jnp.asarray(raw["mask"]), raw, None, None
        there = mask.any(axis=1)
        if self.encoder is not None:
            encoded = TextEncoder(self.encoder, self.dtype, self.remat, name="encoder")(raw["ids"], mask)
        if self.vector_width is not None:
            null = self.param("null_vector", normal_init, (self.vector_width,))
            vector = jnp.where(there[:, None], Linear(self.vector_width, name="vector")(encoded["pooled"]), null)
        if self.token_width is not None:
            null = self.param("null_token", normal_init, (self.token_width,))
            tokens = jnp.where(there[:, None, None], Linear(self.token_width, name="tokens")(encoded["states"]), null)
            mask = mask.at[:, 0].set(True)  # of a text it is there anyway
        return Condition(vector, tokens, mask)


def join_conditions(conditions: Sequence[Condition]) -> Condition:
    """Returns the sum of the vectors, and the tokens one after another."""
    vectors = [c.vector for c in conditions if c.vector is not None]
    with_tokens = [c for c in conditions if c.tokens is not None]
    mask = None
    if any(c.mask is not None for c in with_tokens):
        masks = [jnp.ones(c.tokens.shape[:2], bool) if c.mask is None else c.mask for c in with_tokens]
        mask = jnp.concatenate(masks, axis=1)
    tokens = jnp.concatenate([c.tokens for c in with_tokens], axis=1) if with_tokens else None
    return Condition(sum(vectors) if vectors else None, tokens, mask)


def as_conditions(conditions: Array | Conditions) -> Conditions:
    """Returns raw conditions as a dict; labels alone may be given as their array."""
    return dict(conditions) if isinstance(conditions, Mapping) else {"label": conditions}


class FrozenNetworks(NamedTuple):
    """Networks that encode a batch in each step, where the config asks for that, and that no step changes."""

    codec: Codec | None = None  # of images
    text_encoder: FrozenTextEncoder | None = None  # of captions


def batch_conditions(config: Config, batch: Batch, frozen: FrozenNetworks | None) -> Conditions:
    """Returns the raw conditions of a batch of examples that the denoiser reads."""
    codec, text_encoder = frozen or FrozenNetworks()
    conditions = {name: batch.get(name) for name in config.condition_dropout}
    if "spatial" in conditions:
        conditions["spatial"] = batch_spatial(config, batch, codec)
    if text_encoder is not None:
        conditions["text"] = text_encoder.encode(**batch["text"])
    return conditions


def with_spatial(x_t: Array, conditions: Conditions) -> Array:
    """Returns x_t [B, H, W, C] with the channels of the spatial condition behind its own, where there is one."""
    return jnp.concatenate([x_t, conditions["spatial"]], axis=-1) if "spatial" in conditions else x_t


def null_conditions(conditions: Conditions, names: Iterable[str], num_classes: int) -> Conditions:
    """Returns the conditions with those named replaced by their nulls."""
    return {
        name: jax.tree.map(lambda leaf, name=name: _null(name, leaf, num_classes), value) if name in names else value
        for name, value in conditions.items()
    }


def draw_dropped(key: PRNGKey, rates: Mapping[str, float], batch_size: int) -> dict[str, Array]:
    """Returns by name which rows, [B] bool, of each condition training makes null: a share `rates[name]` of them.

    They are drawn for each condition alone, so that the network learns every branch of guidance.
    """
    # Labels have the key itself: what a run draws does not depend on which other conditions there could be.
    keys = {name: key if name == "label" else jax.random.fold_in(key, sum(name.encode())) for name in rates}
    return {name: jax.random.bernoulli(keys[name], rate, (batch_size,)) for name, rate in rates.items()}


def null_rows(conditions: Conditions, rows: Mapping[str, Array], num_classes: int) -> Conditions:
    """Returns the conditions, `rows[name]` [B] bool of each replaced by their nulls."""
    nulls = null_conditions(conditions, conditions, num_classes)
    return {
        name: jax.tree.map(
            lambda null, leaf, rows=rows[name]: jnp.where(rows.reshape(-1, *[1] * (leaf.ndim - 1)), null, leaf),
            nulls[name],
            value,
        )
        for name, value in conditions.items()
    }


def drop_conditions(key: PRNGKey, conditions: Conditions, rates: Mapping[str, float], num_classes: int) -> Conditions:
    """Returns the conditions with the rows that `draw_dropped` draws made null."""
    rates = {name: rates.get(name, 0.0) for name in conditions}
    batch_size = len(jax.tree.leaves(conditions)[0]) if conditions else 0
    return null_rows(conditions, draw_dropped(key, rates, batch_size), num_classes)


def _null(name: str, leaf: Any, num_classes: int) -> Array:
    return jnp.full_like(leaf, num_classes) if name == "label" else jnp.zeros_like(leaf)
