"""Convolutional blocks of the LDM autoencoder (arXiv:2112.10752, appendix G; VQGAN, arXiv:2012.09841, table 7)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.nn.constraints import BATCH, HIDDEN_IMAGES, IMAGES, constrain
from dit_jax.nn.convolution import convolve
from dit_jax.types import Array, PRNGKey


def conv_init(key: PRNGKey, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
    """Returns a kernel of U(-b, b), b = 1 / sqrt(fan_in): PyTorch's default, with which LDM trained.

    Drawn flat: XLA takes up to twenty seconds to compile one draw in a small kernel's four dimensions for CPU.
    """
    bound = math.prod(shape[:-1]) ** -0.5
    return jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound).reshape(shape)


def conv(features: int, name: str | None = None, kernel: int = 3) -> nn.Conv:
    """Returns a stride-1 convolution that keeps the size."""
    settings = {"kernel_init": conv_init, "conv_general_dilated": convolve, "name": name}
    return nn.Conv(features, (kernel, kernel), padding="SAME", **settings)


def group_norm(num_groups: int, name: str) -> nn.GroupNorm:
    """GroupNorm with LDM's epsilon; statistics in float32."""
    return nn.GroupNorm(num_groups=num_groups, epsilon=1e-6, name=name)


class ResBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with a 1x1 convolution on the skip where the width changes."""

    features: int
    num_groups: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = conv(self.features, "conv1")(nn.swish(group_norm(self.num_groups, "norm1")(x)))
        h = constrain(h, HIDDEN_IMAGES)
        h = conv(self.features, "conv2")(nn.swish(group_norm(self.num_groups, "norm2")(h)))
        if x.shape[-1] != self.features:
            x = conv(self.features, "nin_shortcut", kernel=1)(x)
        return constrain(x + h, IMAGES)


class AttentionBlock(nn.Module):
    """Single-head self-attention over the H * W positions, residual."""

    num_groups: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, height, width, channels = x.shape
        h = group_norm(self.num_groups, "norm")(x)
        # Queries stay with their rows, keys and values are of all rows. There is one head: over "tensor" only the
        # channels of the values can be split.
        axes = {"q": IMAGES, "k": (BATCH, None, None, None), "v": (BATCH, None, None, "tensor")}
        q, k, v = (
            constrain(conv(channels, name, kernel=1)(h), where).reshape(batch, height * width, 1, channels)
            for name, where in axes.items()
        )
        attended = constrain(jax.nn.dot_product_attention(q, k, v).reshape(x.shape), HIDDEN_IMAGES)
        return constrain(x + conv(channels, "proj_out", kernel=1)(attended), IMAGES)


class Downsample(nn.Module):
    """Halves height and width: one row and column of zeros at the bottom and right, then a stride-2 convolution."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        settings = {"kernel_init": conv_init, "conv_general_dilated": convolve, "name": "conv"}
        h = nn.Conv(x.shape[-1], (3, 3), strides=2, padding=((0, 1), (0, 1)), **settings)(x)
        return constrain(h, IMAGES)


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a convolution."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return constrain(conv(x.shape[-1], "conv")(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)), IMAGES)
