"""The diffusion transformer with adaLN-Zero blocks (DiT, arXiv:2212.09748, figure 3 and section 3.2).

    x [B, H, W, C] --patchify--> tokens [B, T, D] --depth blocks--> tokens --final layer--> [B, H, W, 2C]

The first C output channels predict epsilon, the others interpolate the log-variance (section 3.1).
"""

import flax.linen as nn
import jax.numpy as jnp

from dit_jax.nn.attention import SelfAttention
from dit_jax.nn.embeddings import LabelEmbedder, TimestepEmbedder, patchify, sincos_2d, unpatchify
from dit_jax.nn.linear import Linear
from dit_jax.nn.mlp import Mlp
from dit_jax.nn.modulation import Modulation, modulated_norm
from dit_jax.types import Array


class DiTBlock(nn.Module):
    """Attention and MLP, each modulated and gated by c; the gates start at zero, so the block starts as identity."""

    num_heads: int
    mlp_ratio: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, c: Array) -> Array:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = Modulation(6, name="adaLN_modulation")(c)
        attention = SelfAttention(self.num_heads, self.dtype, name="attn")
        mlp = Mlp(int(x.shape[-1] * self.mlp_ratio), self.dtype, name="mlp")
        x = x + gate_a * attention(modulated_norm(x, shift_a, scale_a))
        return x + gate_m * mlp(modulated_norm(x, shift_m, scale_m))


class FinalLayer(nn.Module):
    """Modulated norm, then a zero-initialised Linear to the pixels of a patch."""

    features: int

    @nn.compact
    def __call__(self, x: Array, c: Array) -> Array:
        shift, scale = Modulation(2, name="adaLN_modulation")(c)
        linear = Linear(self.features, kernel_init=nn.initializers.zeros, name="linear")
        return linear(modulated_norm(x, shift, scale))


class DiT(nn.Module):
    """The noise-prediction network of class-conditional diffusion.

    Call with x_t [B, H, W, C] float32, t [B] int32 in [0, num_timesteps), labels [B] int32 in [0, num_classes]
    (num_classes is the null class); returns [B, H, W, 2C] float32.
    """

    depth: int
    width: int
    num_heads: int
    patch_size: int
    num_classes: int
    mlp_ratio: float = 4.0
    dtype: jnp.dtype = jnp.float32  # of the matmuls; norms, modulation and the residual stream stay float32

    @nn.compact
    def __call__(self, x_t: Array, t: Array, labels: Array) -> Array:
        _, height, width, channels = x_t.shape
        p = self.patch_size
        x = Linear(self.width, name="x_embedder")(patchify(x_t, p))  # [B, T, D]
        x = x + sincos_2d(height // p, width // p, self.width)
        c = TimestepEmbedder(self.width, name="t_embedder")(t)  # [B, D]
        c = c + LabelEmbedder(self.num_classes, self.width, name="y_embedder")(labels)
        for i in range(self.depth):
            x = DiTBlock(self.num_heads, self.mlp_ratio, self.dtype, name=f"blocks_{i}")(x, c)
        x = FinalLayer(p * p * 2 * channels, name="final_layer")(x, c)  # [B, T, p * p * 2C]
        return unpatchify(x, p, height)  # [B, H, W, 2C]
