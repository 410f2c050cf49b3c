"""Folders of images: which files are listed, how each is decoded, and what is told of it in a metadata file."""

import pathlib
import posixpath
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from dit_jax.config import DataConfig
from dit_jax.files import parse_json

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # no other decoder of Pillow sees a file, whatever its name
MAX_LINE_BYTES = 2**20  # of that file: an image's captions are hundreds
METADATA_NAME = "metadata.jsonl"  # further fields of an image folder's images, as Hugging Face's imagefolder has them
EVAL_EVERY = 10  # an image folder without a folder for each split holds out every tenth image of a class


def read_image(path: pathlib.Path) -> np.ndarray:
    """Returns an image file as [H, W, 1 or 3] uint8; alpha is dropped. Raises ValueError where it cannot be read."""
    return decode(path, str(path))


def read_classes(path: pathlib.Path) -> np.ndarray:
    """Returns a picture of classes, [H, W] uint8: the levels of a grey one, the indices of one with a palette."""
    return decode(path, str(path), as_classes=True)[..., 0]


def read_map(path: pathlib.Path, image: np.ndarray) -> np.ndarray:
    """Returns a picture of classes, grey or with a palette, [H, W] uint8; ValueError unless as large as its image."""
    classes = read_classes(path)
    if classes.shape != image.shape[:2]:
        sizes = [f"{width} x {height}" for height, width in (classes.shape, image.shape[:2])]
        raise ValueError(f"map {path} is {sizes[0]}, but its image {sizes[1]}; they must be of one size")
    return classes


def decode(image_file: Any, name: str, as_classes: bool = False) -> np.ndarray:
    """Returns an encoded image (a path, or a file object) as [H, W, 1 or 3] uint8; alpha is dropped.

    as_classes: of a picture with a palette its indices, of a grey one its levels, [H, W, 1]; of others ValueError.
    """
    try:
        with Image.open(image_file, formats=IMAGE_FORMATS) as image:
            # Pillow itself stops at twice this many; it only warns of a smaller decompression bomb.
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {Image.MAX_IMAGE_PIXELS:,}")
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels (Pillow's mode {image.mode}) have more than 8 bits a channel")
            mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
            if as_classes:
                if image.mode not in ("L", "P"):
                    raise ValueError(f"a map is grey or has a palette, and its mode is {image.mode}")
                return np.asarray(image)[..., None]
            array = np.asarray(image if image.mode == mode else image.convert(mode))
    except Exception as error:  # decoders of broken files raise OSError, SyntaxError, struct.error and others
        raise ValueError(f"cannot read image {name}: {one_line(error)}; remove or replace it") from error
    return array[..., None] if mode == "L" else array


def one_line(error: BaseException) -> str:
    """Returns the first line that an error says, or its type."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip().rstrip(".:;") if lines else type(error).__name__


def is_folder(name: str) -> bool:
    """Returns whether the name of a data set is that of a folder, rather than one of TFDS."""
    return name.startswith(("/", "./", "../", "~")) or pathlib.Path(name).is_dir()


def list_split(data: DataConfig, split: str) -> list[tuple[pathlib.Path, int]]:
    """Returns the (path, label) of a split's images, classes and files by name.

    A folder with a sub-folder named after a split has its classes in there. Otherwise the split is by position
    within a class: every tenth image is held out for evaluation.
    """
    folder = pathlib.Path(data.name).expanduser()
    if not folder.is_dir():
        raise ValueError(f"config.data.name={data.name!r}: no such folder; give an image folder or a TFDS name")
    has_split_folders = any((folder / name).is_dir() for name in (data.train_split, data.eval_split))
    known = _folders(folder) if has_split_folders else [data.train_split, data.eval_split]
    if split not in known:
        raise ValueError(
            f"image folder {folder} has no split {split!r}, only {', '.join(known)}; add it or set "
            "config.data.train_split and config.data.eval_split"
        )
    root = folder / split if has_split_folders else folder
    classes = _folders(root)
    if not classes:
        raise ValueError(f"image folder {root} must hold one sub-folder a class, but has no sub-folder; add them")
    if len(classes) != data.num_classes:
        raise ValueError(
            f"config.data.num_classes={data.num_classes} must be {len(classes)}, the number of class folders in {root}"
        )
    train_folder = folder / data.train_split
    if has_split_folders and train_folder.is_dir() and classes != _folders(train_folder):
        differing = sorted(set(classes) ^ set(_folders(train_folder)))
        raise ValueError(f"{root} and {train_folder} must hold the same class folders; they differ in {differing[0]!r}")
    files = []
    for label, name in enumerate(classes):
        paths = sorted(path for path in (root / name).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        if not has_split_folders:
            held_out = split == data.eval_split
            paths = [path for i, path in enumerate(paths) if (i % EVAL_EVERY == EVAL_EVERY - 1) == held_out]
        files += [(path, label) for path in paths]
    if not files:
        raise ValueError(
            f"split {split!r} of image folder {folder} has no images ({', '.join(IMAGE_SUFFIXES)}); add some"
            + ("" if has_split_folders else f": every {EVAL_EVERY}th of a class is held out for {data.eval_split!r}")
        )
    return files


def folder_fields(data: DataConfig, paths: Sequence[pathlib.Path]) -> list[dict[str, Any]]:
    """Returns the extra fields of images, each from the nearest metadata file above it that knows the image.

    Where there is a field of maps, "map" is the path of the image's own.
    """
    names = data.extra_fields if data.map_field is None else (*data.extra_fields, data.map_field)
    if not names:
        return [{}] * len(paths)
    root = pathlib.Path(data.name).expanduser()
    tables, found = {}, []
    for path in paths:
        folders = [folder for folder in path.parents if folder == root or root in folder.parents]
        fields, home = {}, root
        for folder in folders:
            if folder not in tables:
                tables[folder] = _read_metadata(folder / METADATA_NAME, names)
            if not fields:
                fields, home = tables[folder].get(path.relative_to(folder).as_posix(), {}), folder
        wrong = [name for name in names if not _is_scalar(fields.get(name))]
        if wrong:
            raise ValueError(
                f"image {path} has no field {wrong[0]!r} (a string or a number) in {METADATA_NAME}; add it there, or "
                "take it out of config.data.extra_fields"
            )
        extra = {name: fields[name] for name in data.extra_fields}
        found.append(extra if data.map_field is None else extra | {"map": _inside(home, fields[data.map_field], path)})
    return found


def _inside(folder: pathlib.Path, name: Any, image: pathlib.Path) -> pathlib.Path:
    """Returns the file of a name in a metadata file; ValueError where it would lie outside of the folder."""
    path = pathlib.PurePosixPath(posixpath.normpath(str(name)))
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"the map {str(name)[:200]!r} of image {image} must lie below {folder}; put it there")
    return folder / path


def _is_scalar(value: Any) -> bool:
    """Returns whether a latent cache can hold a value: a string, a float, or an integer of 64 bits."""
    return isinstance(value, (str, float)) or (isinstance(value, int) and -(2**63) <= value < 2**63)


def _read_metadata(file: pathlib.Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the named fields of each line of a metadata file, by the image's path relative to it."""
    table = {}
    if not file.is_file():
        return table
    with file.open("rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE_BYTES + 1), b""), 1):
            if not line.strip():
                continue
            try:
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"it is longer than {MAX_LINE_BYTES:,} bytes")
                values = parse_json(line)
                name = posixpath.normpath(values["file_name"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file} line {number} must be a JSON object with a file_name ({error!r}); mend or remove it"
                ) from error
            table[name] = {key: values[key] for key in names if key in values}
    return table


def _folders(folder: pathlib.Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
