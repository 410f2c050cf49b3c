"""How well a diffusion model restores held-out images: super-resolution against bicubic enlargement, inpainting against
a hole filled with the mean of what is around it.
"""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.config import Config, SamplingConfig
from dit_jax.data.pipeline import Example, Transform
from dit_jax.evaluation.drawing import Drawing
from dit_jax.evaluation.example_conditions import AT_ONCE, example_conditions, spread_positions
from dit_jax.evaluation.generate import KnownImages
from dit_jax.evaluation.loaded import LoadedModel
from dit_jax.evaluation.parts import Parts
from dit_jax.metrics.picture import to_uint8
from dit_jax.metrics.reconstruction import SSIM_WINDOW, psnr, ssim
from dit_jax.models.conditioners import FrozenNetworks
from dit_jax.models.spatial import reduced
from dit_jax.perceptual.lpips import lpips
from dit_jax.types import Params

RESTORED = {"low_resolution": "bicubic", "inpainting": "mean_fill"}  # kinds of spatial condition, and what to beat


class Restorations(NamedTuple):
    """Held-out images, what was drawn of them and what is to be beaten, [N, S, S, 3] uint8 each."""

    images: np.ndarray
    drawn: np.ndarray
    baseline: np.ndarray
    examples: dict[str, np.ndarray]  # the arrays of the images' batch (`data.pipeline`)


def restore(
    model: LoadedModel,
    sampling: SamplingConfig,
    seed: int,
    source: Sequence[Example],
    transform: Transform,
    num_images: int,
    folder: pathlib.Path,
) -> Restorations:
    """Draws held-out images, evenly spread over them, from what the model's condition leaves of each.

    Args:
      source, transform: of held-out images; folder: for what is drawn meanwhile, so that a kill loses little of it.
    """
    config = model.config
    positions = spread_positions(len(source), num_images)
    frozen = FrozenNetworks(model.codec)
    conditions, examples = example_conditions(config, source, transform, positions, frozen, model.mesh)
    known = None
    if config.spatial.kind == "inpainting":
        known = KnownImages(np.asarray(to_uint8(examples["image"])), examples["hole"] > 0)
    drawing = Drawing(model, conditions, sampling, seed, known)
    with Parts(folder, drawing.identity()) as parts:
        drawn = np.concatenate(list(drawing.draw(parts, progress=True)))
        parts.remove()
    images, baseline = (
        np.broadcast_to(to_uint8(x), drawn.shape) for x in (examples["image"], restore_simply(config, examples))
    )
    return Restorations(images, drawn, baseline, examples)


def restore_simply(config: Config, examples: dict[str, Any]) -> np.ndarray:
    """Returns images [N, S, S, C] in [-1, 1] that are restored without a model: see `RESTORED`."""
    images = examples["image"]
    if config.spatial.kind == "low_resolution":
        small = reduced(images, config.spatial.factor)
        return np.asarray(jax.image.resize(small, images.shape, "cubic").clip(-1.0, 1.0))
    hole = examples["hole"] > 0
    mean = images.mean(axis=(1, 2), keepdims=True, where=~np.broadcast_to(hole, images.shape))
    return np.where(hole, mean, images)


def measure_restorations(
    config: Config, restorations: Restorations, lpips_params: Params | None
) -> dict[str, float | bool]:
    """Returns the means of PSNR, SSIM and LPIPS over the images, of what was drawn and of the baseline (by its name).

    LPIPS is left out without its weights, SSIM of images smaller than its window. For inpainting `known_pixels_exact`
    says whether all pixels around the holes are the images' own.
    """
    metrics = {"psnr": psnr}
    if config.data.image_size >= SSIM_WINDOW:
        metrics["ssim"] = ssim
    if lpips_params is not None:
        metrics["lpips"] = lambda *pair: lpips(lpips_params, *pair)

    @jax.jit
    def measure(images, others):
        images, others = (x.astype(jnp.float32) / 127.5 - 1.0 for x in (images, others))
        with jax.default_matmul_precision("float32"):  # figures to compare with others'
            return {name: metric(images, others) for name, metric in metrics.items()}

    values = {}
    for prefix, others in (("", restorations.drawn), (f"{RESTORED[config.spatial.kind]}_", restorations.baseline)):
        starts = range(0, len(others), AT_ONCE)
        terms = [measure(restorations.images[i : i + AT_ONCE], others[i : i + AT_ONCE]) for i in starts]
        values |= {f"{prefix}{name}": float(np.concatenate([each[name] for each in terms]).mean()) for name in metrics}
    if config.spatial.kind == "inpainting":
        known = np.broadcast_to(restorations.examples["hole"] == 0, restorations.images.shape)
        values["known_pixels_exact"] = bool((restorations.drawn[known] == restorations.images[known]).all())
    return values
