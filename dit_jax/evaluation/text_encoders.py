"""Text encoders for captions: the folder of a frozen one, and what turns captions into a denoiser's raw condition.

The folder holds `tokenizer.json` and, of a frozen encoder, `text_encoder.json` (a `TextShape`) and
`text_encoder.safetensors`; of one that is trained with the denoiser the tokenizer alone.
"""

import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from dit_jax.config import MAX_CODES, MAX_DEPTH, MAX_WIDTH, TextConfig, dataclass_from_json
from dit_jax.data.sources import hash_files
from dit_jax.data.tokenizer import TOKENIZER_NAME, Tokenizer
from dit_jax.files import read_json, written_whole
from dit_jax.models.text_encoder import FrozenTextEncoder, TextEncoder, TextShape, abstract_text_encoder
from dit_jax.pretrained.files import read_tensors
from dit_jax.pretrained.name_map import Entry, Tensors, flatten, from_tensors
from dit_jax.types import Conditions

SHAPE_NAME, WEIGHTS_NAME = "text_encoder.json", "text_encoder.safetensors"
TEXT_ENCODER_DIR = "text_encoder"  # inside a diffusion workdir or a latent cache: the encoder of its captions
AT_ONCE = 64  # captions that a frozen encoder encodes at once

_encode = jax.jit(FrozenTextEncoder.encode)


class CaptionEncoder(NamedTuple):
    """What makes a denoiser's raw condition of captions."""

    tokenizer: Tokenizer
    encoder: FrozenTextEncoder | None  # None: the denoiser has its own, which is trained with it

    def condition(self, captions: Sequence[str]) -> Conditions:
        """Returns the condition `text` of captions [N], on the host (`models.conditioners`); an empty one is the null.

        Of a caption that is too long the end is cut: `tokenizer.cut` tells what.
        """
        tokens = self.tokenizer.tokenize(captions)
        if self.encoder is None:
            return tokens
        parts = []
        for start in range(0, len(captions), AT_ONCE):
            rows = np.minimum(np.arange(start, start + AT_ONCE), len(captions) - 1)  # one shape, compiled once
            parts.append(jax.device_get(_encode(self.encoder, tokens["ids"][rows], tokens["mask"][rows])))
        return jax.tree.map(lambda *rows: np.concatenate(rows)[: len(captions)], *parts)


def load_caption_encoder(text: TextConfig, folder: str | os.PathLike) -> CaptionEncoder:
    """Returns what encodes captions for a config, from the folder of its tokenizer and frozen encoder.

    Raises:
      ValueError: where the folder does not hold it, or holds that of another config.
    """
    if text.transformer is not None:
        return CaptionEncoder(Tokenizer(folder, text.max_length, text.vocab_size), None)
    encoder = load_text_encoder(folder)
    shape = encoder.module.shape
    widths = {"width of its states": shape.width, "width of its pooled state": shape.projection or shape.width}
    for name, width in widths.items():
        if width != text.frozen_width:
            raise ValueError(
                f"config.conditions.text.frozen_width={text.frozen_width} must be {width}, the {name}, for the text "
                f"encoder in {folder}"
            )
    if shape.positions == "learned" and text.max_length > shape.max_length:
        raise ValueError(
            f"config.conditions.text.max_length={text.max_length} must be at most {shape.max_length}, the positions of "
            f"the text encoder in {folder}"
        )
    return CaptionEncoder(Tokenizer(folder, text.max_length, shape.vocab_size), encoder)


def text_files(text: TextConfig) -> tuple[str, ...]:
    """Returns the names of the files in a folder that a config needs."""
    return (TOKENIZER_NAME,) if text.transformer is not None else (TOKENIZER_NAME, SHAPE_NAME, WEIGHTS_NAME)


def text_digest(text: TextConfig, folder: str | os.PathLike) -> str:
    """Returns a SHA-256 of what a config needs of a folder."""
    return hash_files((name, pathlib.Path(folder) / name) for name in text_files(text))


def check_text_encoder(text: TextConfig, folder: str | os.PathLike) -> None:
    """Raises ValueError where a folder is not what the config recorded; one that recorded nothing takes any."""
    found = text.encoder and text_digest(text, folder)
    if found != text.encoder:
        raise ValueError(
            f"{folder} must be the text encoder of the run (config.conditions.text.encoder={text.encoder!r}), but is "
            f"another ({found!r}); put the right one there"
        )


def copy_text_encoder(text: TextConfig, folder: str | os.PathLike, target: pathlib.Path) -> None:
    """Copies what a config needs of a folder to another; each file is there as a whole or not at all."""
    target.mkdir(exist_ok=True)
    for name in text_files(text):
        with written_whole(target / name) as temporary:
            shutil.copyfile(pathlib.Path(folder) / name, temporary)


def load_text_encoder(folder: str | os.PathLike) -> FrozenTextEncoder:
    """Returns the encoder in a folder that `dit-jax convert --kind=text_encoder` wrote.

    Raises:
      ValueError: where there is none, or it is damaged.
    """
    folder = pathlib.Path(folder)
    remedy = "write it with dit-jax convert --kind=text_encoder, or launch/text_weights.sh"
    if not (folder / SHAPE_NAME).is_file():
        raise ValueError(f"{folder} holds no text encoder ({SHAPE_NAME} is missing); {remedy}")
    try:
        tensors = read_tensors(folder / WEIGHTS_NAME)
        shape = checked_shape(read_json(folder / SHAPE_NAME), tensors)
        abstract = abstract_text_encoder(shape)
        params = from_tensors([Entry(name, (name,)) for name, _ in flatten(abstract)], tensors, abstract)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{folder} is damaged ({error}); {remedy}") from error
    return FrozenTextEncoder(params, TextEncoder(shape))


def checked_shape(values: object, tensors: Tensors) -> TextShape:
    """Returns the shape of JSON values; raises ValueError where it cannot be that of some tensors."""
    shape = dataclass_from_json(TextShape, values, "text encoder")
    bounds = {"vocab_size": MAX_CODES, "max_length": MAX_CODES, "depth": min(MAX_DEPTH, len(tensors))}
    bounds |= dict.fromkeys(("width", "num_heads", "head_dim", "hidden", "projection"), MAX_WIDTH)
    for name, most in bounds.items():
        value = getattr(shape, name)
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"{name}={value} must be from 1 to {most:,}")
    return shape
