"""LPIPS (Zhang et al., arXiv:1801.03924), version 0.1 on VGG-16: the perceptual distance of LDM's autoencoder losses.

Both images pass through the convolutions of VGG-16 (arXiv:1409.1556). At five depths the features of each position are
brought to unit length; the squared differences are weighted by a learned weight a channel, averaged over positions, and
added up (equation 1). The numbers are those of the PyTorch package `lpips` 0.1.4 with net="vgg".

Parameters are a nested dict, named as the paper names VGG's layers and the package its weights of channels:
`vgg16/conv1_1/{kernel, bias}`, ..., `vgg16/conv5_3/{kernel, bias}`, and `lin0/kernel`, ..., `lin4/kernel`.
"""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from dit_jax.config import LPIPS_MIN_SIZE
from dit_jax.nn.convolution import convolve
from dit_jax.types import Array, Params

VGG16_WIDTHS = (64, 128, 256, 512, 512)  # of its stages (arXiv:1409.1556, table 1, column D)
VGG16_DEPTHS = (2, 2, 3, 3, 3)  # convolutions a stage
# Of RGB in [-1, 1]: ImageNet's mean (.485, .456, .406) and deviation (.229, .224, .225) of [0, 1], rounded as there.
RGB_SHIFT = (-0.030, -0.088, -0.188)
RGB_SCALE = (0.458, 0.448, 0.450)
NORM_EPSILON = 1e-10  # is added to the length of a feature vector


class VGG16(nn.Module):
    """The convolutions of VGG-16: images standardised as ImageNet's to the features at the end of each stage."""

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, ...]:
        features = []
        for stage, (width, depth) in enumerate(zip(VGG16_WIDTHS, VGG16_DEPTHS, strict=True), start=1):
            if stage > 1:
                x = _max_pool(x)
            for i in range(1, depth + 1):
                conv = nn.Conv(width, (3, 3), padding=1, conv_general_dilated=_convolution, name=f"conv{stage}_{i}")
                x = nn.relu(conv(x))
            features.append(x)  # [B, H / 2^(stage - 1), W / 2^(stage - 1), width], rounded down
        return tuple(features)


def lpips(params: Params, images: Array, others: Array) -> Array:
    """Returns the distance of each image to the other, [B] float32.

    `lpips_distance` of `lpips_features` is the same in two parts, for features that are used more than once.

    Args:
      params: of `load_lpips`.
      images, others: [B, H, W, 3 or 1] float in [-1, 1]; of one channel, it is repeated to three.
    """
    return lpips_distance(params, lpips_features(params, images), lpips_features(params, others))


def lpips_features(params: Params, images: Array) -> tuple[Array, ...]:
    """Returns the five maps of features of images, each vector of unit length, or zero where VGG's is zero.

    Convolutions run at JAX's default precision, which on accelerators is below float32's: enough to train with. A
    figure to compare with others' is computed under `jax.default_matmul_precision("float32")`.

    Args:
      params: of `load_lpips`; images: [B, H, W, 3 or 1] float in [-1, 1].
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or min(images.shape[1:3]) < LPIPS_MIN_SIZE:
        raise ValueError(
            f"LPIPS needs images [B, H, W, 1 or 3] of at least {LPIPS_MIN_SIZE} pixels a side, not {images.shape}; "
            "enlarge them, or set config.autoencoder.perceptual_weight=0"
        )
    x = jnp.broadcast_to(images.astype(jnp.float32), (*images.shape[:3], 3))
    x = (x - jnp.array(RGB_SHIFT)) / jnp.array(RGB_SCALE)
    return tuple(_unit_length(features) for features in VGG16().apply({"params": params["vgg16"]}, x))


def lpips_distance(params: Params, features: tuple[Array, ...], others: tuple[Array, ...]) -> Array:
    """Returns the distance, [B] float32, of two images' `lpips_features`: equation 1."""
    distance = 0.0
    for i, (one, other) in enumerate(zip(features, others, strict=True)):
        weights = params[f"lin{i}"]["kernel"][0, 0, :, 0]  # [C], none negative
        difference = jnp.mean((one - other) ** 2, axis=(1, 2))  # [B, C]
        distance += jnp.sum(difference * weights, axis=-1)  # not a matmul, which accelerators would round
    return distance


def abstract_lpips() -> Params:
    """Returns the tree of the parameters' shapes."""
    image = jax.ShapeDtypeStruct((1, LPIPS_MIN_SIZE, LPIPS_MIN_SIZE, 3), jnp.float32)
    params = {"vgg16": jax.eval_shape(VGG16().init, jax.random.key(0), image)["params"]}
    for i, width in enumerate(VGG16_WIDTHS):  # a 1x1 convolution without bias
        params[f"lin{i}"] = {"kernel": jax.ShapeDtypeStruct((1, 1, width, 1), jnp.float32)}
    return params


def load_lpips(path: str | os.PathLike) -> Params:
    """Returns the parameters, NumPy float32, in a file that `dit-jax convert --kind=lpips` wrote.

    Raises:
      ValueError: where there is no such file, or it holds something else.
    """
    remedy = "./launch/lpips_weights.sh fetches the weights to weights/lpips_vgg16.safetensors"
    if not os.path.isfile(path):
        raise ValueError(f"config.autoencoder.lpips_path={os.fspath(path)!r}: no such file; {remedy}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, KeyError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}); delete it, and {remedy}") from error
    shapes = {name: leaf.shape for name, leaf in flatten_dict(abstract_lpips(), sep="/").items()}
    for name in sorted(shapes.keys() | tensors.keys()):
        ours, theirs = shapes.get(name), tensors[name].shape if name in tensors else None
        if ours != theirs or tensors[name].dtype != np.float32:
            found = f"{tensors[name].dtype} {theirs}" if theirs is not None else "nothing"
            raise ValueError(
                f"{path}: tensor {name!r} must be {f'float32 {ours}' if ours else 'absent'}, but is {found}; {remedy}"
            )
    return unflatten_dict(tensors, sep="/")


def _max_pool(x: Array) -> Array:
    """Returns the maximum of each 2x2 pixels; an odd row or column at the end is dropped.

    Not `nn.max_pool`: XLA's gradient of a window's maximum makes the whole gradient of LPIPS take half as long again on
    CPU. Equal maxima share the gradient here, where PyTorch gives it to the first.
    """
    even = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    return reduce(even, "b (h i) (w j) c -> b h w c", "max", i=2, j=2)


def _convolution(x: Array, kernel: Array, *args, precision=None, **kwargs) -> Array:
    """Returns the 3 x 3 convolution; as one matmul of patches where images are smaller than the kernel.

    XLA has no fast convolution of those on CPU: the last stage of 32 x 32 px would take longer than all others.
    """
    batch, height, width, channels = x.shape
    if min(height, width) >= 3:
        return convolve(x, kernel, *args, precision=precision, **kwargs)
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    patches = jnp.concatenate(patches, axis=-1).reshape(-1, 9 * channels)  # [B * H * W, 9 * C]
    products = jnp.matmul(patches, kernel.reshape(9 * channels, -1), precision=precision)
    return products.reshape(batch, height, width, -1)


def _unit_length(features: Array) -> Array:
    """Returns features divided by their length over channels (plus epsilon).

    Where the length is 0, its gradient would be infinite, and NaN times 0. ReLU stops that if the features are 0, but
    not if only their squares underflow; so the square root is taken of 1 there.
    """
    squared = jnp.sum(features**2, axis=-1, keepdims=True)
    length = jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)
    return features / (length + NORM_EPSILON)
