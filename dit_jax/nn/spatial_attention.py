"""Attention over the positions of an image: ADM's self-attention (arXiv:2105.05233, section 3), and LDM's transformer
blocks, which attend to other tokens too (arXiv:2112.10752, section 3.3 and appendix E.1).
"""

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange

from dit_jax.nn.attention import CrossAttention, SelfAttention
from dit_jax.nn.constraints import IMAGES, TOKENS, constrain
from dit_jax.nn.mlp import GatedMlp
from dit_jax.nn.resnet import RES_BLOCK_EPSILON, conv, conv_init, group_norm
from dit_jax.types import Array


class SpatialAttention(nn.Module):
    """Self-attention over the H * W positions, residual; it starts as the identity."""

    num_heads: int
    num_groups: int
    dtype: jnp.dtype = jnp.float32
    implementation: str = "xla"  # `nn.attention.attend`'s

    @nn.compact
    def __call__(self, x: Array) -> Array:
        tokens = _tokens(group_norm(self.num_groups, "norm", RES_BLOCK_EPSILON)(x))
        inits = {"qkv_init": conv_init, "proj_init": nn.initializers.zeros}
        attended = SelfAttention(self.num_heads, self.dtype, self.implementation, **inits, name="attn")(tokens)
        return constrain(x + attended.reshape(x.shape), IMAGES)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the H * W positions between two 1x1 convolutions, residual; it starts as the identity."""

    depth: int
    num_heads: int
    num_groups: int
    dtype: jnp.dtype = jnp.float32
    implementation: str = "xla"  # of self-attention: `nn.attention.attend`'s

    @nn.compact
    def __call__(self, x: Array, tokens: Array, mask: Array | None = None) -> Array:
        """x: [B, H, W, C]; tokens: [B, S, E]; mask: [B, S] bool, the tokens that may be attended to, None for all."""
        channels, settings = x.shape[-1], {"kernel": 1, "dtype": self.dtype}
        h = conv(channels, "proj_in", **settings)(group_norm(self.num_groups, "norm")(x))
        h = _tokens(h.astype(jnp.float32))  # [B, H * W, C]
        for i in range(self.depth):
            block = TransformerBlock(self.num_heads, self.dtype, self.implementation, name=f"block_{i}")
            h = block(h, tokens, mask)
        h = conv(channels, "proj_out", **settings, kernel_init=nn.initializers.zeros)(h.reshape(x.shape))
        return constrain(x + h, IMAGES)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and a gated MLP, each on a norm of x and added to x."""

    num_heads: int
    dtype: jnp.dtype
    implementation: str

    @nn.compact
    def __call__(self, x: Array, tokens: Array, mask: Array | None) -> Array:
        norm1, norm2, norm3 = (nn.LayerNorm(epsilon=1e-5, name=f"norm{i}") for i in (1, 2, 3))
        bias_and_init = {"qkv_bias": False, "qkv_init": conv_init, "proj_init": conv_init}
        attention = SelfAttention(self.num_heads, self.dtype, self.implementation, **bias_and_init, name="attn")
        cross_attention = CrossAttention(self.num_heads, self.dtype, False, conv_init, name="cross_attn")
        x = constrain(x + attention(norm1(x)), TOKENS)
        x = constrain(x + cross_attention(norm2(x), tokens, mask), TOKENS)
        return constrain(x + GatedMlp(4 * x.shape[-1], self.dtype, conv_init, name="mlp")(norm3(x)), TOKENS)


def _tokens(x: Array) -> Array:
    return constrain(rearrange(x, "b h w c -> b (h w) c"), TOKENS)
