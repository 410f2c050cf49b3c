"""Convolutional blocks of LDM's autoencoder (arXiv:2112.10752, appendix G; VQGAN, arXiv:2012.09841, table 7), and of
its U-Net, which is ADM's (arXiv:2105.05233, section 3).
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import reduce

from dit_jax.nn.constraints import BATCH, HIDDEN_IMAGES, IMAGES, constrain
from dit_jax.nn.convolution import convolve
from dit_jax.nn.linear import Linear
from dit_jax.types import Array, PRNGKey

RES_BLOCK_EPSILON = 1e-5  # of the norms of the U-Net's residual blocks and of its last one (ADM's code)


def conv_init(key: PRNGKey, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
    """Returns a kernel of U(-b, b), b = 1 / sqrt(fan_in): PyTorch's default, with which LDM trained.

    Drawn flat: XLA takes up to twenty seconds to compile one draw in a small kernel's four dimensions for CPU.
    """
    bound = math.prod(shape[:-1]) ** -0.5
    return jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound).reshape(shape)


def conv(features: int, name: str | None = None, kernel: int = 3, **settings) -> nn.Conv:
    """Returns a stride-1 convolution that keeps the size; settings: of `nn.Conv`, such as dtype."""
    settings = {"kernel_init": conv_init, "conv_general_dilated": convolve, "name": name, **settings}
    return nn.Conv(features, (kernel, kernel), padding="SAME", **settings)


def group_norm(num_groups: int, name: str, epsilon: float = 1e-6) -> nn.GroupNorm:
    """GroupNorm, float32, with the epsilon of LDM's autoencoder."""
    return nn.GroupNorm(num_groups=num_groups, epsilon=epsilon, name=name)


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
    """Halves height and width: a row and a column of zeros, then a stride-2 convolution."""

    padding: tuple[int, int] = (0, 1)  # zeros before and behind: the autoencoder's, at the bottom and right
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        settings = {"kernel_init": conv_init, "conv_general_dilated": convolve, "dtype": self.dtype, "name": "conv"}
        return constrain(nn.Conv(x.shape[-1], (3, 3), strides=2, padding=(self.padding,) * 2, **settings)(x), IMAGES)


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a convolution."""

    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return constrain(conv(x.shape[-1], "conv", dtype=self.dtype)(doubled(x)), IMAGES)


def doubled(x: Array) -> Array:
    """Returns x [B, 2H, 2W, C] of x [B, H, W, C] by nearest neighbour."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def halved(x: Array) -> Array:
    """Returns x [B, H/2, W/2, C] of x [B, H, W, C]: means of 2 x 2."""
    return reduce(x, "b (h p) (w q) c -> b h w c", "mean", p=2, q=2)


class ConditionedResBlock(nn.Module):
    """A residual block of the U-Net, conditioned on a vector; its last convolution starts at zero.

    x + conv(swish(norm(conv(swish(norm(x))) + shift))); with `scale_shift` the second norm's output is scaled and
    shifted instead (ADM, section 3.1). `resize` is what happens to x and to what the first convolution takes.
    """

    features: int
    num_groups: int
    scale_shift: bool = False
    resize: Callable[[Array], Array] | None = None  # `doubled`, `halved`
    dtype: jnp.dtype = jnp.float32  # of the convolutions

    @nn.compact
    def __call__(self, x: Array, vector: Array) -> Array:
        """x: [B, H, W, C] float32; vector: [B, D] float32; returns [B, H, W, features] float32."""
        norm1, norm2 = (group_norm(self.num_groups, name, RES_BLOCK_EPSILON) for name in ("norm1", "norm2"))
        h = nn.swish(norm1(x))
        if self.resize:
            x, h = self.resize(x), self.resize(h)
        h = constrain(conv(self.features, "conv1", dtype=self.dtype)(h), HIDDEN_IMAGES)
        # float32 at any dtype: a small error here moves every pixel of the image.
        if self.scale_shift:
            outputs = Linear((2, self.features), conv_init, name="emb_scale_shift")(nn.swish(vector))  # [B, 2, F]
            scale, shift = jnp.split(constrain(outputs, (BATCH, None, "tensor"))[:, None], 2, axis=2)  # [B, 1, 1, F]
            h = norm2(h) * (1 + scale) + shift
        else:
            shift = Linear(self.features, conv_init, name="emb_shift")(nn.swish(vector))
            h = norm2(h + constrain(shift, (BATCH, "tensor"))[:, None, None])
        h = conv(self.features, "conv2", dtype=self.dtype, kernel_init=nn.initializers.zeros)(nn.swish(h))
        if x.shape[-1] != self.features:
            x = conv(self.features, "nin_shortcut", kernel=1, dtype=self.dtype)(x)
        return constrain(x.astype(jnp.float32) + h, IMAGES)
