"""Embeddings of what a diffusion transformer reads: patches, positions, timesteps, labels."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from dit_jax.nn.linear import Linear
from dit_jax.types import Array

TIMESTEP_FEATURES = 256  # DiT, section 3.2
MAX_PERIOD = 10_000  # of the sinusoids (arXiv:1706.03762, section 3.5)

normal_init = nn.initializers.normal(0.02)  # of the label table and both timestep layers


def patchify(x: Array, patch_size: int) -> Array:
    """Returns [B, T, p*p*C] patches of [B, H, W, C], row by row."""
    return rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(tokens: Array, patch_size: int, height: int) -> Array:
    """Returns [B, height, W, C] from [B, T, p*p*C]; the inverse of `patchify`."""
    rows = height // patch_size
    return rearrange(tokens, "b (h w) (p q c) -> b (h p) (w q) c", h=rows, p=patch_size, q=patch_size)


def sincos_2d(height: int, width: int, features: int) -> np.ndarray:
    """Returns the fixed position table [height * width, features], float32 from float64.

    The first half of the channels encodes the column, the second the row; within a half sines, then cosines,
    of position * 10000^(-i / (features / 4)).
    """
    omega = 1.0 / MAX_PERIOD ** (np.arange(features // 4, dtype=np.float64) / (features // 4))
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    halves = [axis.reshape(-1, 1) * omega for axis in (columns, rows)]
    return np.concatenate([f(half) for half in halves for f in (np.sin, np.cos)], axis=1).astype(np.float32)


def timestep_features(t: Array, features: int = TIMESTEP_FEATURES) -> Array:
    """Returns [B, features] sinusoids of t [B], cosines first, float32."""
    half = features // 2
    frequencies = np.exp(-np.log(MAX_PERIOD) * np.arange(half) / half).astype(np.float32)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedder(nn.Module):
    """t [B] -> [B, D]: sinusoids, Linear, SiLU, Linear; float32."""

    width: int
    features: int = TIMESTEP_FEATURES  # of the sinusoids
    kernel_init: nn.initializers.Initializer = normal_init

    @nn.compact
    def __call__(self, t: Array) -> Array:
        hidden = Linear(self.width, self.kernel_init, name="mlp_0")(timestep_features(t, self.features))
        return Linear(self.width, self.kernel_init, name="mlp_2")(nn.silu(hidden))


class LabelEmbedder(nn.Module):
    """Labels [B] in [0, num_classes] -> [B, D]; row `num_classes` is the null class of guidance."""

    num_classes: int
    width: int

    @nn.compact
    def __call__(self, labels: Array) -> Array:
        table = self.param("embedding_table", normal_init, (self.num_classes + 1, self.width))
        return table[labels]
