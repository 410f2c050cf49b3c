"""Adaptive layer norm: scale, shift and gate from a conditioning vector (DiT, section 3.2 and figure 3)."""

import flax.linen as nn
import jax.numpy as jnp

from dit_jax.nn.constraints import BATCH, constrain
from dit_jax.nn.linear import Linear
from dit_jax.types import Array


class Modulation(nn.Module):
    """`num_outputs` vectors [B, 1, D] from one [B, D]: SiLU, then a zero-initialised Linear."""

    num_outputs: int

    @nn.compact
    def __call__(self, c: Array) -> list[Array]:
        # float32 at any compute dtype: a small error here moves every token of the image.
        linear = Linear(self.num_outputs * c.shape[-1], kernel_init=nn.initializers.zeros, name="linear")
        outputs = constrain(linear(nn.silu(c)), (BATCH, None))
        return jnp.split(outputs[:, None], self.num_outputs, axis=-1)


class AffineNorm(nn.Module):
    """LayerNorm with a learned scale and shift, float32: the norm of a block that is not modulated."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return modulated_norm(x, bias, scale - 1)


def modulated_norm(x: Array, shift: Array, scale: Array) -> Array:
    """Returns LayerNorm(x) * (1 + scale) + shift in float32; the norm has no affine of its own.

    x: [B, T, D]; shift, scale: [B, 1, D] or [D].
    """
    norm = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=jnp.float32, parent=None)
    return norm.apply({}, x) * (1 + scale) + shift
