"""Spatial conditions: maps of the input's own height and width that the denoiser reads beside x_t (LDM, section 3.3).

Each kind has one function, [B, ...] -> [B, h, w, K] float32 on the input's grid, for training's batches and for a
user's images alike.
"""

import jax
import jax.numpy as jnp

from dit_jax.config import Config
from dit_jax.models.autoencoder import Codec
from dit_jax.types import Array, Batch


def batch_spatial(config: Config, batch: Batch, codec: Codec | None) -> Array:
    """Returns the spatial condition of a batch of examples, [B, h, w, K]; `codec` encodes where there are latents.

    It is made of the batch's "image" [B, S, S, C] in [-1, 1], its "hole" (`of_masked`) or its "map" (`of_map`).
    """
    spatial = config.spatial
    if spatial.kind == "low_resolution":
        return of_low_resolution(config, reduced(batch["image"], spatial.factor))
    if spatial.kind == "inpainting":
        return of_masked(config, batch["image"], batch["hole"], codec)
    return of_map(config, batch["map"])


def reduced(images: Array, factor: int) -> Array:
    """Returns images [B, H, W, C] in [-1, 1] with `factor` times fewer pixels a side, as a file would have them.

    By an antialiased bicubic filter (LDM's "bicubic" degradation; Pillow's), rounded to the nearest of 256 levels.
    """
    size, height, width, channels = images.shape
    small = jax.image.resize(images, (size, height // factor, width // factor, channels), "cubic")
    return jnp.round((small.clip(-1.0, 1.0) + 1.0) * 127.5) / 127.5 - 1.0


def of_low_resolution(config: Config, images: Array) -> Array:
    """Returns low-resolution images [B, s, s, C] in [-1, 1] on the grid, by a bicubic filter: for super-resolution."""
    return jax.image.resize(images, (len(images), *config.spatial_shape), "cubic").clip(-1.0, 1.0)


def of_masked(config: Config, images: Array, holes: Array, codec: Codec | None) -> Array:
    """Returns what is known of images around their holes, and the holes on the grid: for inpainting.

    Args:
      images: [B, S, S, C] in [-1, 1]; holes: [B, S, S, 1], 1 where to paint, 0 where the image is known.
      codec: encodes the image, grey in its holes, where the denoiser's input is latents; None for pixels.
    """
    known = jnp.where(holes > 0, 0.0, images)
    known = known if codec is None else codec.encode(known)
    return jnp.concatenate([known, hole_on_grid(config, holes)], axis=-1)


def hole_on_grid(config: Config, holes: Array) -> Array:
    """Returns holes [B, S, S, 1] on the grid, [B, h, w, 1] float32: 1 where any pixel of a place is to be painted."""
    height, width, _ = config.input_shape
    size, rows, columns, _ = holes.shape
    blocks = holes.reshape(size, height, rows // height, width, columns // width)
    return (blocks > 0).any(axis=(2, 4))[..., None].astype(jnp.float32)


def of_map(config: Config, maps: Array) -> Array:
    """Returns maps [B, S, S] of class indices as a channel a class on the grid, by the nearest pixel."""
    height, width, num_classes = config.spatial_shape
    return jax.nn.one_hot(jax.image.resize(maps, (len(maps), height, width), "nearest"), num_classes)
