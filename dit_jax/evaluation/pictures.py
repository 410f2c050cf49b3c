"""Grids of images that show how a model does."""

import colorsys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dit_jax.config import Config, DataConfig
from dit_jax.data.classes import shown_name
from dit_jax.metrics.picture import make_grid, to_uint8
from dit_jax.models.build import build_model
from dit_jax.models.spatial import reduced
from dit_jax.types import Array, Params

COLUMNS = 10  # of a grid, where the classes do not set them
MAX_STRIPS = 10  # of a picture of denoising
MAX_CLASS_COLUMNS = 20  # more classes than this do not fit a column each
LINE_HEIGHT, HEADER_HEIGHT = 14, 120  # pixels, of a line of text (Pillow's own font) and of the longest that is turned


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


def sample_grid(images: np.ndarray, num_classes: int, names: Sequence[str] | None = None) -> np.ndarray:
    """Returns a grid uint8 [H, W, 3] of images with balanced labels: a column a class, where the classes are few.

    names: of the images' classes, [N]; they stand above a column that is of one class, else above each image. None: no
    names.
    """
    columns = num_classes if 1 < num_classes <= MAX_CLASS_COLUMNS else COLUMNS
    columns = min(columns, len(images))
    if names is None:
        return make_grid(images, columns)
    if all(name == names[i % columns] for i, name in enumerate(names)):
        grid = make_grid(images, columns)
        return np.concatenate([_header(names[:columns], grid.shape[1]), grid])
    rows = []
    for start in range(0, len(images), columns):
        shown = images[start : start + columns]
        empty = np.full((columns - len(shown), *images.shape[1:]), 255, np.uint8)
        row = make_grid(np.concatenate([shown, empty]), columns)
        told = [*names[start : start + columns], *[""] * len(empty)]
        rows += [_header(told, row.shape[1], turns=False), row]
    return np.concatenate(rows)


def class_texts(data: DataConfig, labels: Sequence[int] | None) -> list[str] | None:
    """Returns what stands for classes in a picture, [N]: names, or numbers for names that the font lacks letters of.

    None where no names are known, or there are no labels.
    """
    if data.class_names is None or labels is None:
        return None
    names = map(shown_name, data.class_names)
    texts = [name if name.isascii() else str(number) for number, name in enumerate(names)]
    return [texts[label] for label in labels]


def _header(texts: Sequence[str], width: int, turns: bool = True) -> np.ndarray:
    """Returns texts, each above its part of a width, [h, width, 3] uint8; turned up where one is too long for that."""
    font, cell = ImageFont.load_default(), width // len(texts)
    turns = turns and max(font.getlength(text) for text in texts) > cell - 4
    texts = [_shortened(text, font, HEADER_HEIGHT if turns else cell - 4) for text in texts]
    length = max(int(font.getlength(text)) + 1 for text in texts)
    height = length + 4 if turns else LINE_HEIGHT
    header = Image.new("RGB", (width, height), "white")
    for i, text in enumerate(texts):
        line = Image.new("RGB", (length, LINE_HEIGHT), "white")
        ImageDraw.Draw(line).text((0, 0), text, "black", font)
        line = line.rotate(90, expand=True) if turns else line
        middle = i * width // len(texts) + cell // 2
        written = LINE_HEIGHT if turns else int(font.getlength(text))
        header.paste(line, (max(0, middle - written // 2), 2 if turns else 0))
    return np.asarray(header)


def _shortened(text: str, font: Any, width: int) -> str:
    """Returns a text, its end cut so that it is no wider than so many pixels."""
    short = text
    while short and font.getlength(short if short == text else f"{short}...") > width:
        short = short[:-1]
    return short if short == text else f"{short}..." if short else ""


def denoising_strips(frames: np.ndarray) -> np.ndarray:
    """Returns a grid uint8 [H, W, 3] of frames [N, F, H, W, 3]: a row an image, from noise to the end."""
    return make_grid(frames.reshape(-1, *frames.shape[2:]), columns=frames.shape[1])
