"""The dense layer of the transformer."""

import flax.linen as nn
import jax.numpy as jnp

from dit_jax.types import Array


class Linear(nn.Module):
    """`x @ kernel + bias` over the last axis, Xavier-uniform kernel and zero bias (DiT's initialisation).

    Leading axes are flattened around the matmul: XLA's gradient of a batched matmul transposes its operands,
    which costs a third of a training step on CPU; a plain two-dimensional one does not.
    """

    features: int
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        y = jnp.dot(x.reshape(-1, x.shape[-1]).astype(self.dtype), kernel.astype(self.dtype))
        return (y + bias.astype(self.dtype)).reshape(*x.shape[:-1], self.features)
