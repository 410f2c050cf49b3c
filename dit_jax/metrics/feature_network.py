"""What a network must be to have its features compared: a name, parameters, and a pure function of images.

Any `images -> [N, D]` can be one. The distance of its features is named after it (`distance`): FID is the name of the
Inception-v3 of 2015-12-05's alone, whose number no other network's compares with.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.types import Array, Params


class FeatureNetwork(NamedTuple):
    """A network and what its figures are called."""

    name: str  # of the network
    distance: str  # of the Frechet distance of its features: "FID", or "FD-" and the network's name
    params: Params
    # (params, uint8 [B, H, W, 3]) -> float32: "pool" [B, D], the features; from Inception-v3 also "spatial", those
    # of sFID; from a classifier "logits" [B, classes], those of the Inception Score. No row depends on another.
    apply: Callable[[Params, Array], dict[str, Array]]


class FrozenBatchNorm(nn.Module):
    """Batch normalisation by the moments of training, which are parameters here."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = x.shape[-1:]
        scale, variance = (self.param(name, nn.initializers.ones, shape) for name in ("scale", "var"))
        bias, mean = (self.param(name, nn.initializers.zeros, shape) for name in ("bias", "mean"))
        return (x - mean) * (scale * jax.lax.rsqrt(variance + self.epsilon)) + bias


def resize_bilinear(images: Array, height: int, width: int) -> Array:
    """Returns images [B, H, W, C] resized as TensorFlow 1 did by default, [B, height, width, C] float32.

    Output pixel i interpolates the input at i * H / height (not at the pixel's centre), between the two pixels there
    alone, however small the output is: there is no antialiasing.
    """
    images = images.astype(jnp.float32)
    for axis, size in ((2, width), (1, height)):
        last = images.shape[axis] - 1
        position = np.arange(size, dtype=np.float32) * np.float32((last + 1) / size)
        low = position.astype(np.int32)
        high = np.minimum(low + 1, last)
        fraction = np.expand_dims(position - low, [1] if axis == 2 else [1, 2])
        lower, higher = jnp.take(images, low, axis=axis), jnp.take(images, high, axis=axis)
        images = lower + (higher - lower) * fraction
    return images


def check_images(images: Array) -> None:
    """Raises ValueError unless images are uint8 [B, H, W, 3]."""
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be uint8 [B, H, W, 3] in [0, 255], not {images.dtype} {list(images.shape)}")


def abstract_params(module, image_shape: tuple[int, int, int]) -> Params:
    """Returns the tree of the shapes of a Flax module's parameters, for images of a shape."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), image)["params"]
