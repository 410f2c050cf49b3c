"""The Inception-v3 (arXiv:1512.00567) of 2015-12-05, whose features FID, sFID and the Inception Score are of.

TensorFlow released it as the graph `classify_image_graph_def.pb`. It is not the paper's network, nor torchvision's, to
the letter: average pools leave out what is beyond the edge, and the pool of the last block takes the maximum. It has
1,008 classes. Layers are named as in the PyTorch port of the graph (`pt_inception-2015-12-05-6726825d.pth`).
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dit_jax.metrics.feature_network import (
    FeatureNetwork,
    FrozenBatchNorm,
    abstract_params,
    check_images,
    resize_bilinear,
)
from dit_jax.types import Array, Params

NAME, DISTANCE = "inception-2015-12-05", "FID"
IMAGE_SIZE = 299
NUM_CLASSES = 1008
BATCH_NORM_EPSILON = 1e-3
SPATIAL_LAYER, SPATIAL_CHANNELS = ("Mixed_6d", "branch1x1"), 7  # `mixed_6/conv` of the graph
AVERAGE, MAXIMUM, SHRINK = "average", "maximum", "shrink"  # 3 x 3 pools; the last has stride 2


class Conv(NamedTuple):
    """A convolution without bias, batch normalisation and ReLU."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


def _block_a(pool_width: int):  # figure 5, 35 x 35
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
        (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, (3, 3)), Conv("branch3x3dbl_3", 96, (3, 3))),
        (AVERAGE, Conv("branch_pool", pool_width)),
    )


def _block_c(width: int):  # figure 6, 17 x 17
    row, column = (1, 7), (7, 1)
    return (
        (Conv("branch1x1", 192),),
        (Conv("branch7x7_1", width), Conv("branch7x7_2", width, row), Conv("branch7x7_3", 192, column)),
        (
            Conv("branch7x7dbl_1", width),
            *(Conv(f"branch7x7dbl_{i}", width, column if i % 2 == 0 else row) for i in (2, 3, 4)),
            Conv("branch7x7dbl_5", 192, row),
        ),
        (AVERAGE, Conv("branch_pool", 192)),
    )


def _block_e(pool: str):  # figure 7, 8 x 8
    split = lambda name: (Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1)))  # noqa: E731
    return (
        (Conv("branch1x1", 320),),
        (Conv("branch3x3_1", 384), split("branch3x3_2")),
        (Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, (3, 3)), split("branch3x3dbl_3")),
        (pool, Conv("branch_pool", 192)),
    )


STEM = (
    Conv("Conv2d_1a_3x3", 32, (3, 3), 2, "VALID"),
    Conv("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
    Conv("Conv2d_2b_3x3", 64, (3, 3)),
    SHRINK,
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"),
    SHRINK,
)
BLOCKS = {  # of branches, whose outputs are joined; what is in a branch's inner tuple is in parallel, too
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": (
        (Conv("branch3x3", 384, (3, 3), 2, "VALID"),),
        (
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, (3, 3)),
            Conv("branch3x3dbl_3", 96, (3, 3), 2, "VALID"),
        ),
        (SHRINK,),
    ),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": (
        (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), 2, "VALID")),
        (
            Conv("branch7x7x3_1", 192),
            Conv("branch7x7x3_2", 192, (1, 7)),
            Conv("branch7x7x3_3", 192, (7, 1)),
            Conv("branch7x7x3_4", 192, (3, 3), 2, "VALID"),
        ),
        (SHRINK,),
    ),
    "Mixed_7b": _block_e(AVERAGE),
    "Mixed_7c": _block_e(MAXIMUM),
}


class ConvNorm(nn.Module):
    """One `Conv`."""

    conv: Conv

    @nn.compact
    def __call__(self, x: Array) -> Array:
        _, width, kernel, stride, padding = self.conv
        x = nn.Conv(width, kernel, stride, padding, use_bias=False, name="conv")(x)
        return nn.relu(FrozenBatchNorm(BATCH_NORM_EPSILON, name="bn")(x))


class Block(nn.Module):
    """A block of `BLOCKS`."""

    branches: tuple

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, dict[str, Array]]:
        """Returns the joined branches, and each single layer's output by name."""
        outputs, layers = [], {}
        for branch in self.branches:
            y = x
            for layer in branch:
                if isinstance(layer, str):
                    y = _pool(y, layer)
                elif isinstance(layer, Conv):
                    y = layers[layer.name] = ConvNorm(layer, name=layer.name)(y)
                else:
                    y = jnp.concatenate([ConvNorm(conv, name=conv.name)(y) for conv in layer], axis=-1)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=-1), layers


class InceptionV3(nn.Module):
    """Images float32 [B, 299, 299, 3] in [-1, 1] to the outputs of `FeatureNetwork.apply`."""

    @nn.compact
    def __call__(self, x: Array) -> dict[str, Array]:
        for layer in STEM:
            x = _pool(x, layer) if isinstance(layer, str) else ConvNorm(layer, name=layer.name)(x)
        block, layer = SPATIAL_LAYER
        for name, branches in BLOCKS.items():
            x, layers = Block(branches, name=name)(x)
            if name == block:
                spatial = layers[layer][..., :SPATIAL_CHANNELS].reshape(len(x), -1)  # [B, 17 * 17 * 7]
        pool = x.mean(axis=(1, 2))  # [B, 2048]
        fc = self.param("fc", _init_classifier, (x.shape[-1], NUM_CLASSES))
        # Published Inception Scores are of logits without their bias (OpenAI's improved-gan multiplies by the weights).
        return {"pool": pool, "spatial": spatial, "logits": pool @ fc["kernel"]}


def inception_features(params: Params, images: Array) -> dict[str, Array]:
    """Returns the outputs of `FeatureNetwork.apply` of images of any size, in float32; resizes them to 299 x 299."""
    check_images(images)
    return _features(params, (resize_bilinear(images, IMAGE_SIZE, IMAGE_SIZE) - 128) / 128)


@jax.jit  # called for images of many sizes, it is compiled once
def _features(params: Params, x: Array) -> dict[str, Array]:
    with jax.default_matmul_precision("float32"):
        return InceptionV3().apply({"params": params}, x)


def inception_network(params: Params) -> FeatureNetwork:
    """Returns the network of parameters that `dit-jax convert --kind=inception` wrote."""
    return FeatureNetwork(NAME, DISTANCE, params, inception_features)


def abstract_inception() -> Params:
    """Returns the tree of the parameters' shapes."""
    return abstract_params(InceptionV3(), (IMAGE_SIZE, IMAGE_SIZE, 3))


def _init_classifier(key: Array, shape: tuple[int, int]) -> Params:
    return {"kernel": nn.initializers.lecun_normal()(key, shape), "bias": jnp.zeros(shape[1:])}


def _pool(x: Array, kind: str) -> Array:
    if kind == SHRINK:
        return nn.max_pool(x, (3, 3), (2, 2), "VALID")
    if kind == MAXIMUM:
        return nn.max_pool(x, (3, 3), (1, 1), "SAME")
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
