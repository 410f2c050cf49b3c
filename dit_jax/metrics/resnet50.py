"""ResNet-50 (arXiv:1512.03385) trained on ImageNet, as Keras has it: features where the FID Inception is not at hand.

The Frechet distance of its features is called FD-ResNet50. Layers are named as in Keras, whose weights are Caffe's:
images are blue-green-red with ImageNet's mean taken off, the stride is on a block's first 1 x 1 convolution, and
convolutions have biases.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.metrics.feature_network import FeatureNetwork, FrozenBatchNorm, abstract_params, check_images
from dit_jax.types import Array, Params

NAME, DISTANCE = "resnet50", "FD-ResNet50"
IMAGE_SIZE = 224
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # width and blocks of res2, ..., res5
NUM_CLASSES = 1000
BATCH_NORM_EPSILON = 1e-3
BGR_MEAN = (103.939, 116.779, 123.68)


class ResNet50(nn.Module):
    """Images float32 [B, 224, 224, 3], blue-green-red less `BGR_MEAN`, to the outputs of `FeatureNetwork.apply`."""

    @nn.compact
    def __call__(self, x: Array) -> dict[str, Array]:
        def convolution(x: Array, name: str, width: int, size: int, stride: int = 1, padding: int = 0) -> Array:
            x = nn.Conv(width, (size, size), stride, padding, name=f"res{name}" if name[0].isdigit() else name)(x)
            return FrozenBatchNorm(BATCH_NORM_EPSILON, name=f"bn{name}" if name[0].isdigit() else f"bn_{name}")(x)

        x = nn.relu(convolution(x, "conv1", 64, 7, 2, 3))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # [B, 56, 56, 64]
        for stage, (width, num_blocks) in enumerate(STAGES, start=2):
            for i in range(num_blocks):
                name, stride = f"{stage}{'abcdef'[i]}_branch", 2 if i == 0 and stage > 2 else 1
                skip = convolution(x, f"{name}1", 4 * width, 1, stride) if i == 0 else x
                x = nn.relu(convolution(x, f"{name}2a", width, 1, stride))
                x = nn.relu(convolution(x, f"{name}2b", width, 3, 1, 1))
                x = nn.relu(convolution(x, f"{name}2c", 4 * width, 1) + skip)
        pool = x.mean(axis=(1, 2))  # [B, 2048]
        return {"pool": pool, "logits": nn.Dense(NUM_CLASSES, name="fc1000")(pool)}


def resnet50_features(params: Params, images: Array) -> dict[str, Array]:
    """Returns the outputs of `FeatureNetwork.apply` of images of any size, in float32.

    They are resized to 224 x 224 by bilinear interpolation, with antialiasing where they are larger.
    """
    check_images(images)
    shape = len(images), IMAGE_SIZE, IMAGE_SIZE, 3
    with jax.default_matmul_precision("float32"):
        x = jax.image.resize(images.astype(jnp.float32), shape, "linear", antialias=True)
    return _features(params, x[..., ::-1] - np.array(BGR_MEAN, np.float32))


@jax.jit  # called for images of many sizes, it is compiled once
def _features(params: Params, x: Array) -> dict[str, Array]:
    with jax.default_matmul_precision("float32"):
        return ResNet50().apply({"params": params}, x)


def resnet50_network(params: Params) -> FeatureNetwork:
    """Returns the network of parameters that `dit-jax convert --kind=resnet50` wrote."""
    return FeatureNetwork(NAME, DISTANCE, params, resnet50_features)


def abstract_resnet50() -> Params:
    """Returns the tree of the parameters' shapes."""
    return abstract_params(ResNet50(), (IMAGE_SIZE, IMAGE_SIZE, 3))
