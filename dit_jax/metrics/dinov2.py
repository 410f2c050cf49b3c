"""DINOv2's vision transformer (arXiv:2304.07193), whose features FD-DINOv2 is of (arXiv:2306.04675).

The feature is the class token after the last norm. Images have 224 pixels a side, whereas the table of positions was
trained at 518: it is resized as in the released code. Layers are named as there.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from dit_jax.metrics.feature_network import FeatureNetwork, check_images
from dit_jax.types import Array, Params

IMAGE_SIZE, PATCH_SIZE, TRAINED_SIZE = 224, 14, 518
GRID, TRAINED_GRID = IMAGE_SIZE // PATCH_SIZE, TRAINED_SIZE // PATCH_SIZE
HEAD_WIDTH = 64
LAYER_NORM_EPSILON = 1e-6
POSITION_OFFSET = 0.1  # added there to the grid, lest its quotient be rounded down; it moves the positions slightly
CUBIC = -0.75  # PyTorch's coefficient of the cubic kernel
RGB_MEAN, RGB_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of [0, 1]
SIZES = {(384, 12): "S", (768, 12): "B", (1024, 24): "L"}  # of (width, depth)


class Block(nn.Module):
    """A transformer block with layer scale: x [B, T, D]."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        norm = functools.partial(nn.LayerNorm, epsilon=LAYER_NORM_EPSILON, use_fast_variance=False)
        scale = lambda name: self.param(name, nn.initializers.ones, (width,))  # noqa: E731
        q, k, v = jnp.moveaxis(nn.DenseGeneral((3, width), name="qkv")(norm(name="norm1")(x)), 2, 0)
        q, k, v = (rearrange(y, "b t (n h) -> b n t h", h=HEAD_WIDTH) for y in (q, k, v))
        weights = jax.nn.softmax(jnp.einsum("bnth,bnsh->bnts", q, k) / math.sqrt(HEAD_WIDTH), axis=-1)
        attended = rearrange(jnp.einsum("bnts,bnsh->bnth", weights, v), "b n t h -> b t (n h)")
        x = x + scale("ls1") * nn.Dense(width, name="proj")(attended)
        hidden = jax.nn.gelu(nn.Dense(4 * width, name="fc1")(norm(name="norm2")(x)), approximate=False)
        return x + scale("ls2") * nn.Dense(width, name="fc2")(hidden)


class DINOv2(nn.Module):
    """Images float32 [B, 224, 224, 3], standardised, to the class token's features [B, D]."""

    width: int
    depth: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        normal = nn.initializers.normal(0.02)
        x = rearrange(x, "b (h p) (w q) c -> b (h w) (p q c)", p=PATCH_SIZE, q=PATCH_SIZE)
        x = nn.Dense(self.width, name="patch_embed")(x)  # [B, T, D]
        cls_token = self.param("cls_token", normal, (1, 1, self.width))
        positions = self.param("pos_embed", normal, (1, 1 + TRAINED_GRID**2, self.width))
        x = jnp.concatenate([jnp.broadcast_to(cls_token, (len(x), 1, self.width)), x], axis=1)
        x = x + resized_positions(positions)
        for i in range(self.depth):
            x = Block(name=f"blocks_{i}")(x)
        return nn.LayerNorm(LAYER_NORM_EPSILON, use_fast_variance=False, name="norm")(x)[:, 0]


def resized_positions(positions: Array) -> Array:
    """Returns the table of positions [1, 1 + 37 * 37, D] for 16 x 16 patches, [1, 1 + 16 * 16, D].

    By bicubic interpolation without antialiasing, at (i + 1/2) * 37 / 16.1 - 1/2, as the released code has it.
    """
    step = TRAINED_GRID / (GRID + POSITION_OFFSET)
    place = (np.arange(GRID) + 0.5) * step - 0.5
    first = np.floor(place).astype(int)
    weights = np.zeros((GRID, TRAINED_GRID))
    for offset in (-1, 0, 1, 2):
        distance = np.abs(place - first - offset)
        near = (CUBIC + 2) * distance**3 - (CUBIC + 3) * distance**2 + 1
        far = CUBIC * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        column = np.clip(first + offset, 0, TRAINED_GRID - 1)
        np.add.at(weights, (np.arange(GRID), column), np.where(distance <= 1, near, far))
    weights = weights.astype(np.float32)
    grid = rearrange(positions[0, 1:], "(h w) d -> h w d", h=TRAINED_GRID)
    resized = jnp.einsum("ih,jw,hwd->ijd", weights, weights, grid)
    return jnp.concatenate([positions[:, :1], resized.reshape(1, GRID**2, -1)], axis=1)


def dinov2_images(images: Array) -> Array:
    """Returns images uint8 [B, H, W, 3] as the network takes them, float32 [B, 224, 224, 3].

    They are resized as Pillow resizes images: by bicubic interpolation with antialiasing, first the rows, then the
    columns, each to bytes.
    """
    check_images(images)
    num, height, _, channels = images.shape
    x = images.astype(jnp.float32)
    for shape in ((num, height, IMAGE_SIZE, channels), (num, IMAGE_SIZE, IMAGE_SIZE, channels)):
        with jax.default_matmul_precision("float32"):
            x = jax.image.resize(x, shape, "cubic", antialias=True)
        x = jnp.floor(x.clip(0, 255) + 0.5)
    x = x / 255
    return (x - np.array(RGB_MEAN, np.float32)) / np.array(RGB_STD, np.float32)


def dinov2_network(params: Params) -> FeatureNetwork:
    """Returns the network of parameters that `dit-jax convert --kind=dinov2` wrote, of the size that they have.

    FD-DINOv2 is the distance of ViT-L/14's features; those of other sizes are named after them.
    """
    width, depth = params["cls_token"].shape[-1], sum(name.startswith("blocks_") for name in params)
    size = SIZES.get((width, depth), f"{width}x{depth}")
    module = DINOv2(width, depth)

    @jax.jit  # called for images of many sizes, it is compiled once
    def features(params: Params, x: Array) -> dict[str, Array]:
        with jax.default_matmul_precision("float32"):
            return {"pool": module.apply({"params": params}, x)}

    distance = "FD-DINOv2" if size == "L" else f"FD-DINOv2-ViT-{size}/{PATCH_SIZE}"
    name = f"dinov2-vit-{size.lower()}{PATCH_SIZE}"
    return FeatureNetwork(name, distance, params, lambda params, images: features(params, dinov2_images(images)))


def abstract_dinov2(width: int, depth: int) -> Params:
    """Returns the tree of the parameters' shapes."""
    image = jax.ShapeDtypeStruct((1, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.float32)
    return jax.eval_shape(DINOv2(width, depth).init, jax.random.key(0), image)["params"]
