"""Whether pictures show what their captions say: a small image-text model ranks captions for each picture.

The model has a convolutional tower for images and a linear map for the pooled states of a frozen text encoder; both end
in unit vectors, whose products are high for pairs that belong together (InfoNCE, arXiv:1807.03748; CLIP,
arXiv:2103.00020). It is trained on real pairs (`evaluation.trained_retrieval`), apart from any model that draws.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.nn.resnet import conv_init
from dit_jax.types import Array

MAX_SIDE = 32  # larger images are scaled down to it: what minutes of training can use
WIDTH = 128  # of the space that images and captions share
INITIAL_SCALE = 10.0  # of the products; learned
TOP_SHARE = 0.1  # of the captions, among which the right one is asked to be


class ImageTextModel(nn.Module):
    """Call with images uint8 [B, H, W, 3] and pooled states [M, E] of captions: their similarity [B, M] float32."""

    @nn.compact
    def __call__(self, images: Array, pooled: Array) -> Array:
        x = images.astype(jnp.float32) / 127.5 - 1.0
        if max(x.shape[1:3]) > MAX_SIDE:
            x = jax.image.resize(x, (len(x), MAX_SIDE, MAX_SIDE, 3), "bilinear", antialias=True)
        x = nn.gelu(nn.Conv(32, (5, 5), strides=(2, 2), kernel_init=conv_init, name="conv1")(x))  # [B, H/2, W/2, 32]
        for i, channels in enumerate((64, 128), 2):
            x = nn.gelu(nn.Conv(channels, (3, 3), kernel_init=conv_init, name=f"conv{i}")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.Dense(WIDTH, name="image")(x.reshape(len(x), -1))  # of [B, H/8 * W/8 * 128]
        text = nn.Dense(WIDTH, name="text")(pooled)
        scale = self.param("log_scale", nn.initializers.constant(np.log(INITIAL_SCALE)), ())
        return jnp.exp(scale) * _unit(x) @ _unit(text).T


def _unit(x: Array) -> Array:
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)


def retrieval_figures(similarity: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Returns how far up the right captions are of pictures whose similarity [N, M] to M captions is given.

    `median_rank` is in [0, 1]: the share of the other captions that are above the right one (half of those that are
    equal), 0.5 by chance; `top_tenth` the share of pictures whose right caption is among the first tenth.

    Args:
      right: [N] int, in [0, M): each picture's own caption.
    """
    own = similarity[np.arange(len(right)), right][:, None]
    above = (similarity > own).sum(axis=1) + ((similarity == own).sum(axis=1) - 1) / 2
    num_others = similarity.shape[1] - 1
    return {
        "median_rank": float(np.median(above / num_others)),
        "top_tenth": float(np.mean(above < num_top(num_others + 1))),
    }


def num_top(num_captions: int) -> int:
    """Returns how many captions are the first tenth of some: at least one."""
    return max(1, round(TOP_SHARE * num_captions))
