"""Folders of frozen text encoders from those that others publish: what `dit-jax convert --kind=text_encoder` does."""

import dataclasses
import json
import pathlib
import shutil

from dit_jax.data.tokenizer import TOKENIZER_NAME, Tokenizer
from dit_jax.evaluation.text_encoders import SHAPE_NAME, WEIGHTS_NAME, checked_shape
from dit_jax.files import read_json, written_whole
from dit_jax.models.text_encoder import abstract_text_encoder
from dit_jax.pretrained.files import HUGGING_FACE_STEMS, find_weights, read_weights, write_tensors
from dit_jax.pretrained.name_map import flatten, from_tensors
from dit_jax.pretrained.text_encoder import (
    encoder_tensors,
    scaled_queries,
    text_encoder_entries,
    text_encoder_form,
    text_encoder_shape,
)


def import_text_encoder(source: pathlib.Path, output: pathlib.Path) -> list[str]:
    """Writes the folder that `load_text_encoder` reads; returns notes on what was left out.

    Args:
      source: a folder of Hugging Face's, or its file of weights with `config.json` and `tokenizer.json` beside it.

    Raises:
      ValueError: where these are of something else, or do not fit; nothing is written then.
    """
    folder = source if source.is_dir() else source.parent
    weights, notes = find_weights(folder, HUGGING_FACE_STEMS) if source.is_dir() else (source, [])
    for name, writer in (("config.json", "AutoConfig"), (TOKENIZER_NAME, "AutoTokenizer")):
        if not (folder / name).is_file():
            call = f"{writer}.from_pretrained(NAME).save_pretrained(FOLDER)"
            raise ValueError(f"{folder} must hold {name}, too; transformers writes it: {call}")
    try:
        values = read_json(folder / "config.json")
        form = text_encoder_form(values)
        tensors, more = read_weights(weights)
        tensors, left_out = encoder_tensors(form, tensors)
        fields = text_encoder_shape(form, values, tensors)
        shape = checked_shape(fields, tensors)
        if form == "t5":
            tensors = scaled_queries(tensors, shape.head_dim)
        params = from_tensors(text_encoder_entries(form, fields), tensors, abstract_text_encoder(shape))
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, IndexError) as error:
        said = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(said if str(folder) in said else f"{source} is no text encoder known here ({said})") from error
    Tokenizer(folder, shape.max_length, shape.vocab_size)
    with written_whole(output) as temporary:
        temporary.mkdir()
        (temporary / SHAPE_NAME).write_text(json.dumps(dataclasses.asdict(shape), indent=2) + "\n")
        write_tensors(temporary / WEIGHTS_NAME, dict(flatten(params)))
        shutil.copyfile(folder / TOKENIZER_NAME, temporary / TOKENIZER_NAME)
    notes += more
    return notes + [f"left out {len(left_out)} tensors of other parts: {', '.join(left_out[:3])} ..."] * bool(left_out)
