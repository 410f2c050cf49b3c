"""Grids of images that show how a model does."""

import colorsys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dit_jax.config import Config
from dit_jax.metrics.picture import make_grid, to_uint8
from dit_jax.models.build import build_model
from dit_jax.models.spatial import reduced
from dit_jax.types import Array, Params

COLUMNS = 10  # of a grid, where the classes do not set them
MAX_STRIPS = 10  # of a picture of denoising
MAX_CLASS_COLUMNS = 20  # more classes than this do not fit a column each


def make_reconstructor(config: Config) -> Callable[[Params, Array], Array]:
    """Returns the jitted (params, images [B, H, W, C]) -> images decoded from the posterior's mean, or the codes."""
    model = build_model(config)
    return jax.jit(lambda params, images: model.apply({"params": params}, images, None).images)


def reconstruction_grid(images: np.ndarray, reconstructions: Array) -> np.ndarray:
    """Returns a grid uint8 [H, W, 3]: a row of originals above a row of their reconstructions, in turn."""
    return comparison_grid([np.asarray(to_uint8(x)) for x in (images, reconstructions)])


def comparison_grid(series: Sequence[np.ndarray]) -> np.ndarray:
    """Returns a grid uint8 [H, W, 3] of series of images, [N, H, W, C] uint8 each: a row of each above one another."""
    num = len(series[0])
    starts = range(0, num - num % COLUMNS or num, COLUMNS)
    rows = [x[start : start + COLUMNS] for start in starts for x in series]
    return make_grid(np.concatenate(rows), columns=min(COLUMNS, num))


def condition_grid(config: Config, samples: Sequence[np.ndarray], examples: Mapping[str, Any]) -> np.ndarray:
    """Returns a grid uint8 [H, W, 3] of series of samples for the conditions of examples, between these and the truth.

    Args:
      samples: [N, H, W, 3] uint8 each; examples: the arrays of a batch (`data.pipeline`), [N, ...] each, or of more.
    """
    examples = jax.tree.map(lambda leaf: leaf[: len(samples[0])], dict(examples))
    shown = list(samples)
    if config.spatial is not None:
        shown.insert(0, spatial_picture(config, examples))
    if "image" in examples:
        shown.append(np.broadcast_to(to_uint8(examples["image"]), samples[0].shape))
    return comparison_grid(shown)


def spatial_picture(config: Config, examples: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns what the spatial condition of examples looks like, [N, S, S, 3] uint8; holes are grey."""
    images = examples["image"]
    size, kind = (len(images), *images.shape[1:3], 3), config.spatial.kind
    if kind == "semantic":
        return class_colours(config.spatial.num_classes)[examples["map"]]
    if kind == "inpainting":
        return np.broadcast_to(to_uint8(np.where(examples["hole"] > 0, 0.0, images)), size)
    small = np.asarray(to_uint8(reduced(images, config.spatial.factor)))
    return np.broadcast_to(small.repeat(config.spatial.factor, axis=1).repeat(config.spatial.factor, axis=2), size)


def class_colours(num_classes: int) -> np.ndarray:
    """Returns a colour a class, [num_classes, 3] uint8: the first is white, the others of hues far from one another."""
    hues = (0.618034 * np.arange(1, num_classes)) % 1.0
    return np.array(
        [(255, 255, 255)] + [[round(255 * c) for c in colorsys.hsv_to_rgb(h, 0.7, 0.9)] for h in hues], np.uint8
    )


def sample_grid(images: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns a grid uint8 [H, W, 3] of images with balanced labels: a column a class, where the classes are few."""
    columns = num_classes if 1 < num_classes <= MAX_CLASS_COLUMNS else COLUMNS
    return make_grid(images, columns=min(columns, len(images)))


def denoising_strips(frames: np.ndarray) -> np.ndarray:
    """Returns a grid uint8 [H, W, 3] of frames [N, F, H, W, 3]: a row an image, from noise to the end."""
    return make_grid(frames.reshape(-1, *frames.shape[2:]), columns=frames.shape[1])
