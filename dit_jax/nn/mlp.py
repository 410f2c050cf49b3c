"""The two-layer perceptrons of a transformer block."""

import flax.linen as nn
import jax.numpy as jnp

from dit_jax.nn.constraints import HIDDEN, constrain
from dit_jax.nn.linear import Linear
from dit_jax.types import Array


class Mlp(nn.Module):
    """Linear, GELU (tanh form, as DiT), Linear back to the input's width."""

    hidden: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = nn.gelu(Linear(self.hidden, dtype=self.dtype, name="fc1")(x), approximate=True)
        return Linear(x.shape[-1], dtype=self.dtype, name="fc2")(constrain(hidden, HIDDEN))


class GatedMlp(nn.Module):
    """Linear to values and gates, values * GELU(gates) in its exact form, Linear back (GEGLU, arXiv:2002.05202)."""

    hidden: int
    dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        both = Linear((2, self.hidden), self.kernel_init, self.dtype, name="value_gate")(x)  # [B, T, 2, F]
        hidden = both[..., 0, :] * nn.gelu(both[..., 1, :], approximate=False)
        return Linear(x.shape[-1], self.kernel_init, self.dtype, name="fc2")(constrain(hidden, HIDDEN))
