"""The dense layer of the transformer."""

import math

import flax.linen as nn
import jax.numpy as jnp

from dit_jax.nn.constraints import axis_size
from dit_jax.types import Array, PRNGKey


class Linear(nn.Module):
    """`x @ kernel + bias` over the last axis, Xavier-uniform kernel and zero bias (DiT's initialisation).

    features: F of the outputs [..., F]; or (k, F) of k fused projections [..., k, F], whose kernel [D, k, F] starts as
    the one matrix [D, k * F]. They have an axis of their own so that each of them can be split over devices alike.
    """

    features: int | tuple[int, int]
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    dtype: jnp.dtype = jnp.float32
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        features = self.features if isinstance(self.features, tuple) else (self.features,)

        def fused_init(key: PRNGKey, shape: tuple[int, ...]) -> Array:
            return self.kernel_init(key, (width, math.prod(features))).reshape(shape)

        kernel = self.param("kernel", fused_init, (width, *features)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, features) if self.use_bias else jnp.zeros(features)
        bias = bias.astype(self.dtype)
        x = x.astype(self.dtype)
        if axis_size("tensor", "sequence") > 1:
            # One axis cannot be split as tokens and batch are, or as heads of q, k and v are: flattened, they would be
            # gathered.
            return jnp.tensordot(x, kernel, axes=1) + bias
        # Axes are flattened around the matmul: XLA's gradient of a batched matmul transposes its operands, which costs
        # a third of a training step on CPU; a plain two-dimensional one does not.
        y = jnp.dot(x.reshape(-1, width), kernel.reshape(width, -1)) + bias.reshape(-1)
        return y.reshape(*x.shape[:-1], *features)
