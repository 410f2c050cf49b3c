"""A small convolutional classifier whose features measure data sets that are far from ImageNet's photographs.

It is trained on the data set itself (`evaluation.trained_classifier`). A Frechet distance in its features is named
after the data set, such as FD-fashion_mnist-classifier, and is no FID.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.nn.resnet import conv_init
from dit_jax.types import Array

MAX_SIDE = 32  # larger images are scaled down to it: what a minute of training can use
FEATURES = 64  # few dimensions: the distance of a few thousand images is hardly biased


class Classifier(nn.Module):
    """Two convolutions and a hidden layer: images uint8 [B, H, W, 3] to `pool` [B, 64] and `logits` [B, classes].

    channels: 1 takes the mean of the three, which is what a grey image repeats.
    """

    num_classes: int
    channels: int = 3

    @nn.compact
    def __call__(self, images: Array) -> dict[str, Array]:
        x = images.astype(jnp.float32) / 127.5 - 1.0
        if self.channels == 1:
            x = x.mean(axis=-1, keepdims=True)
        if max(x.shape[1:3]) > MAX_SIDE:
            x = jax.image.resize(x, (len(x), MAX_SIDE, MAX_SIDE, self.channels), "bilinear", antialias=True)
        x = nn.gelu(nn.Conv(32, (5, 5), strides=(2, 2), kernel_init=conv_init, name="conv1")(x))  # [B, H/2, W/2, 32]
        x = nn.gelu(nn.Conv(64, (3, 3), kernel_init=conv_init, name="conv2")(x))
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1)  # [B, H/4 * W/4 * 64]
        pool = nn.gelu(nn.Dense(FEATURES, name="hidden")(x))
        return {"pool": pool, "logits": nn.Dense(self.num_classes, name="logits")(pool)}
