"""Multi-head self-attention over tokens (Vaswani et al., arXiv:1706.03762, section 3.2)."""

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
    def __call__(self, x: Array) -> Array:
        qkv = Linear(3 * x.shape[-1], dtype=self.dtype, name="qkv")(x)
        q, k, v = rearrange(qkv, "b t (three n d) -> three b t n d", three=3, n=self.num_heads)
        attended = jax.nn.dot_product_attention(q, k, v)  # softmax in float32
        return Linear(x.shape[-1], dtype=self.dtype, name="proj")(rearrange(attended, "b t n d -> b t (n d)"))
