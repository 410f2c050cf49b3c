"""Multi-head attention over tokens (Vaswani et al., arXiv:1706.03762, section 3.2)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from dit_jax.nn.linear import Linear
from dit_jax.types import Array


class SelfAttention(nn.Module):
    """Attention of `num_heads` heads; the q, k, v projection is fused, which sets its Xavier bound (DiT's init)."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """x: [B, T, D]; mask: [B, T] bool, the tokens that may be attended to, None for all."""
        qkv = Linear(3 * x.shape[-1], dtype=self.dtype, name="qkv")(x)
        q, k, v = rearrange(qkv, "b t (three n d) -> three b t n d", three=3, n=self.num_heads)
        return Linear(x.shape[-1], dtype=self.dtype, name="proj")(attend(q, k, v, mask))


class CrossAttention(nn.Module):
    """Attention of `num_heads` heads from x to a sequence of other tokens."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, tokens: Array, mask: Array | None = None) -> Array:
        """x: [B, T, D]; tokens: [B, S, D]; mask: [B, S] bool, the tokens that may be attended to, None for all."""
        width = x.shape[-1]
        q = rearrange(Linear(width, dtype=self.dtype, name="q")(x), "b t (n d) -> b t n d", n=self.num_heads)
        kv = Linear(2 * width, dtype=self.dtype, name="kv")(tokens)
        k, v = rearrange(kv, "b s (two n d) -> two b s n d", two=2, n=self.num_heads)
        return Linear(width, dtype=self.dtype, name="proj")(attend(q, k, v, mask))


def attend(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """Returns [B, T, N * d] of q [B, T, N, d] and k, v [B, S, N, d]; softmax in float32; mask [B, S] bool or None."""
    mask = None if mask is None else mask[:, None, None]
    return rearrange(jax.nn.dot_product_attention(q, k, v, mask=mask), "b t n d -> b t (n d)")
