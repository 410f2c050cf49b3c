"""Grids of images that show how a model does."""

from collections.abc import Callable

import jax
import numpy as np

from dit_jax.config import Config
from dit_jax.metrics.picture import make_grid, to_uint8
from dit_jax.models.build import build_model
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
    pairs = [np.asarray(to_uint8(x)) for x in (images, reconstructions)]
    starts = range(0, len(images) - len(images) % COLUMNS or len(images), COLUMNS)
    rows = [x[start : start + COLUMNS] for start in starts for x in pairs]
    return make_grid(np.concatenate(rows), columns=min(COLUMNS, len(images)))


def sample_grid(images: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns a grid uint8 [H, W, 3] of images with balanced labels: a column a class, where the classes are few."""
    columns = num_classes if 1 < num_classes <= MAX_CLASS_COLUMNS else COLUMNS
    return make_grid(images, columns=min(columns, len(images)))


def denoising_strips(frames: np.ndarray) -> np.ndarray:
    """Returns a grid uint8 [H, W, 3] of frames [N, F, H, W, 3]: a row an image, from noise to the end."""
    return make_grid(frames.reshape(-1, *frames.shape[2:]), columns=frames.shape[1])
