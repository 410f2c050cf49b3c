"""Folders of images: which files are listed, how each is decoded, and what is told of it in a metadata file.

One rule lists folders, be they a class's, a reference, samples or what is given on the command line (`list_images`).
One rule decodes (`read_image`, `read_mask`, `read_classes`): upright, as EXIF says; what is transparent lies on a
background; 16 bits become 8. Two kinds of images are read as they are stored instead, neither turned nor composited:
those of TFDS, as TFDS reads them, and those of runs and caches that version 1 of this rule began (`reads_as_stored`).
"""

import collections
import contextlib
import os
import pathlib
import posixpath
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, features

from dit_jax.config import DataConfig
from dit_jax.data.classes import natural_key
from dit_jax.data.identity import NAMES
from dit_jax.data.transforms import to_channels
from dit_jax.files import is_of_this_process, normalised, parse_json, user_path

# Decoders of pixels alone: none of them runs a program (as EPS runs Ghostscript) or opens another file. No other
# decoder of Pillow sees a file, whatever its name.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000")
if features.modules.get("avif") and features.check("avif"):  # since Pillow 11.3, where it was built in
    IMAGE_FORMATS += ("AVIF",)
IMAGE_SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpf", ".jpx", *([".avif"] if "AVIF" in IMAGE_FORMATS else [])),
)
SUFFIXES_SHOWN = ".png, .jpg, .webp, .gif, .tif and others that Pillow reads"
JUNK_NAMES = {"__macosx", "@eadir", "$recycle.bin", "thumbs.db", "desktop.ini"}  # hidden where they were written
METADATA_NAME = "metadata.jsonl"  # further fields of an image folder's images, as Hugging Face's imagefolder has them
MAX_LINE_LENGTH = 2**20  # characters of that file: an image's captions are hundreds
EVAL_EVERY = 10  # an image folder without a folder for each split holds out every tenth image of a class
PLAIN_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # that it lists
WHITE = (255, 255, 255)
MARKED = 128  # the level from which a mask's pixel is marked


class Listing(NamedTuple):
    """The images of a folder, sorted by path, and what else is in there: kind -> how many."""

    paths: list[pathlib.Path]
    left_out: collections.Counter[str]


class FolderSplit(NamedTuple):
    """The (path, label) of a split's images, class by class, and what was left out of the class folders."""

    files: list[tuple[pathlib.Path, int]]
    left_out: collections.Counter[str]


# Listing


def list_images(folder: str | os.PathLike) -> Listing:
    """Returns the images in a folder and in its sub-folders, by their suffixes.

    Links are followed, but no folder is listed twice, nor one that holds this one. What is hidden is left out, and what
    is neither a file nor a folder (pipes, sockets, devices).

    Raises:
      ValueError: where a folder cannot be read.
    """
    root = pathlib.Path(folder)
    paths, left_out = [], collections.Counter()
    seen = {_place(path) for path in (*root.absolute().parents, *root.resolve().parents) if os.path.isdir(path)}
    own, linked = [root], collections.deque()  # folders to list: those that a link leads to come last
    while own or linked:
        current = own.pop() if own else linked.popleft()
        try:
            place = _place(current)
            if place in seen:
                left_out["listed already (links)"] += 1
                continue
            seen.add(place)
            with os.scandir(current) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise ValueError(f"folder {current} cannot be read ({error.strerror}); mend or remove it") from error
        for entry in entries:
            path = current / entry.name
            kind = _kind(entry)
            if kind == "folder":
                (linked if entry.is_symlink() else own).append(path)
            elif kind == "file" and path.suffix.lower() in IMAGE_SUFFIXES:
                paths.append(path)
            elif kind != "file":
                left_out[kind] += 1
            elif entry.name != METADATA_NAME:
                left_out[_suffix(path)] += 1
    return Listing(sorted(paths), left_out)


def describe_left_out(left_out: collections.Counter[str]) -> str:
    """Returns what a listing left out, for the end of a line: "; left out: 3 hidden, 2 .txt"; "" for nothing."""
    kinds = [f"{count:,} {kind if kind.isprintable() else ascii(kind)}" for kind, count in left_out.most_common(6)]
    more = sum(left_out.values()) - sum(count for _, count in left_out.most_common(6))
    return f"; left out: {', '.join(kinds + ([f'{more:,} others'] if more else []))}" if kinds else ""


def _kind(entry: os.DirEntry) -> str:
    """Returns "folder", "file", or the kind of what is neither to be listed nor read; nothing is opened."""
    if is_hidden(entry.name):
        return "hidden"
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:  # a link to itself
        return "links to nothing"
    return "links to nothing" if entry.is_symlink() and not os.path.exists(entry) else "pipes, sockets or devices"


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder of this name is hidden, or what a system leaves beside people's files."""
    return name.startswith(".") or name.lower() in JUNK_NAMES


def is_folder(name: str) -> bool:
    """Returns whether the name of a data set is that of a folder, rather than one of TFDS."""
    return name.startswith(("/", "./", "../", "~")) or pathlib.Path(name).is_dir()


def reads_as_stored(data: DataConfig) -> bool:
    """Returns whether a folder is read by version 1 of the rules: of a run or a cache that began with it.

    Then classes are sorted as text ("10" before "2"), of their folders the files of `PLAIN_SUFFIXES` are listed, hidden
    ones too, EXIF and transparency are ignored, and 16 bits are not read.
    """
    return (data.version or "").startswith(NAMES)


def split_root(data: DataConfig, split: str) -> pathlib.Path:
    """Returns what holds the class folders of a split: the data set's folder, or its sub-folder of that name.

    Raises:
      ValueError: where there is no such folder, or no such split.
    """
    folder = pathlib.Path(user_path(data.name))
    if not folder.is_dir():
        raise ValueError(f"config.data.name={data.name!r}: no such folder; give an image folder or a TFDS name")
    splits = data.train_split, data.eval_split
    known = list(_folders(folder)) if _has_split_folders(data) else splits
    if split not in known:
        raise ValueError(
            f"image folder {folder} has no split {split!r}, only {', '.join(known)}; add it or set "
            "config.data.train_split and config.data.eval_split"
        )
    return folder / split if _has_split_folders(data) else folder


def class_folders(data: DataConfig, split: str) -> dict[str, pathlib.Path]:
    """Returns the folders of a split's classes by name, in the order of their labels.

    That is the order of `data.class_names` where these are set; else as people count.

    Raises:
      ValueError: where they are not the classes of the config, or not those of the training split.
    """
    root = split_root(data, split)
    folders = _folders(root)
    if not folders:
        raise ValueError(f"image folder {root} must hold one sub-folder a class, but has no sub-folder; add them")
    if len(folders) != data.num_classes:
        raise ValueError(
            f"config.data.num_classes={data.num_classes} must be {len(folders)}, the number of class folders in {root}"
        )
    train_folder = pathlib.Path(user_path(data.name)) / data.train_split
    if _has_split_folders(data) and train_folder.is_dir():
        differing = sorted(folders.keys() ^ _folders(train_folder).keys())
        if differing:
            raise ValueError(
                f"{root} and {train_folder} must hold the same class folders; they differ in {differing[0]!r}"
            )
    if data.class_names is not None:
        names = [normalised(name) for name in data.class_names]
        differing = sorted(folders.keys() ^ set(names))
        if differing:
            raise ValueError(
                f"config.data.class_names must be those of the class folders in {root}; they differ in "
                f"{differing[0]!r}: rename the folder, or leave out config.data.class_names"
            )
        return {name: folders[name] for name in names}
    if reads_as_stored(data):
        return dict(sorted(folders.items(), key=lambda item: item[1].name))
    return folders


def list_split(data: DataConfig, split: str) -> FolderSplit:
    """Returns the images of a split, by class and then by path.

    A folder with a sub-folder named after a split has its classes in there. Otherwise the split is by position
    within a class: every tenth image is held out for evaluation.

    Raises:
      ValueError: where a class has no image, or the split has none.
    """
    files, left_out = [], _left_out_beside(data, split)
    for label, folder in enumerate(class_folders(data, split).values()):
        if reads_as_stored(data):
            paths = sorted(x for x in folder.iterdir() if x.suffix.lower() in PLAIN_SUFFIXES and x.is_file())
            others = collections.Counter()
        else:
            paths, others = list_images(folder)
            maps = _maps(data, paths)
            paths = [path for path in paths if path not in maps]
        is_training = split == data.train_split or not _has_split_folders(data)
        if not paths and is_training and not reads_as_stored(data):
            raise ValueError(
                f"class folder {folder} must hold an image ({SUFFIXES_SHOWN}), but has none"
                f"{describe_left_out(others)}; add some, or remove the folder"
            )
        left_out += others
        if not _has_split_folders(data):
            held_out = split == data.eval_split
            paths = [path for i, path in enumerate(paths) if (i % EVAL_EVERY == EVAL_EVERY - 1) == held_out]
        files += [(path, label) for path in paths]
    if not files:
        raise ValueError(
            f"split {split!r} of image folder {data.name} has no images ({SUFFIXES_SHOWN}); add some"
            + (
                ""
                if _has_split_folders(data)
                else f": every {EVAL_EVERY}th of a class is held out for {data.eval_split!r}"
            )
        )
    return FolderSplit(files, left_out)


def _left_out_beside(data: DataConfig, split: str) -> collections.Counter[str]:
    """Returns what stands beside the class folders of a split, and is of no class."""
    if reads_as_stored(data):
        return collections.Counter()
    with os.scandir(split_root(data, split)) as entries:
        kinds = {entry.name: _kind(entry) for entry in entries if entry.name != METADATA_NAME}
    return collections.Counter(
        f"{_suffix(pathlib.Path(name))} outside of the class folders" if kind == "file" else kind
        for name, kind in kinds.items()
        if kind != "folder"
    )


def _suffix(path: pathlib.Path) -> str:
    return path.suffix.lower()[:20] or "without a suffix"


def _has_split_folders(data: DataConfig) -> bool:
    folder = pathlib.Path(user_path(data.name))
    return any((folder / name).is_dir() for name in (data.train_split, data.eval_split))


def _folders(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the sub-folders that are not hidden by name (normalised), as people count."""
    found = [entry for entry in folder.iterdir() if not is_hidden(entry.name) and entry.is_dir()]
    folders = {normalised(entry.name): entry for entry in found}
    if len(folders) < len(found):
        raise ValueError(f"{folder} has two folders whose names look alike (in other codes of Unicode); rename one")
    return dict(sorted(folders.items(), key=lambda item: natural_key(item[0])))


def _place(path: pathlib.Path) -> tuple[int, int]:
    """Returns what tells a folder from all others, whatever links lead to it."""
    found = path.stat()
    return found.st_dev, found.st_ino


# Decoding


def read_image(path: pathlib.Path, background: Sequence[int] = WHITE, as_stored: bool = False) -> np.ndarray:
    """Returns an image file as [H, W, 1 or 3] uint8, grey or RGB, upright, as its EXIF orientation says.

    Of an animation it is the first frame. Grey of 16 bits is scaled to 8.

    Args:
      path: of a file; a pipe is not opened.
      background: a grey level or RGB, 0 to 255, on which what is transparent lies.
      as_stored: version 1 of this rule: neither is it turned, nor composited (alpha is dropped), and 16 bits are none.

    Raises:
      ValueError: where it cannot be read; one line that names it.
    """
    return decode(path, str(path), background, as_stored)


def decode(
    image_file: pathlib.Path | BinaryIO, name: str, background: Sequence[int] = WHITE, as_stored: bool = False
) -> np.ndarray:
    """Returns an encoded image, a path or a file object, as `read_image` does; `name` is for its error."""
    with _opened(image_file, name, as_stored) as image:
        if as_stored:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels (Pillow's mode {image.mode}) have more than 8 bits a channel")
            mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
            return _array(image if image.mode == mode else image.convert(mode))
        return _composited(image, background)


def read_mask(path: pathlib.Path) -> np.ndarray:
    """Returns a mask file as [H, W] bool, True where it is marked: from level 128 of 255 on, of its luma.

    What is transparent is not marked, and what is half transparent counts by half.

    Raises:
      ValueError: where it cannot be read, or nothing is marked.
    """
    with _opened(path, str(path)) as image:
        levels = to_channels(_composited(image, (0,)), 1)[..., 0]
    if levels.max() < MARKED:
        raise ValueError(
            f"mask {path} has nothing to paint: white is, from level {MARKED} on and opaque, but its brightest pixel "
            f"is of level {levels.max()}; mark what to paint in white"
        )
    return levels >= MARKED


def read_classes(path: pathlib.Path, as_stored: bool = False) -> np.ndarray:
    """Returns a picture of classes, [H, W] uint8: the levels of a grey one, the indices of one with a palette."""
    with _opened(path, str(path), as_stored) as image:
        if image.mode not in ("L", "P"):
            raise ValueError(f"a map is grey (8 bits) or has a palette, and its mode is {image.mode}")
        return np.asarray(image)


def read_map(path: pathlib.Path, image: np.ndarray, as_stored: bool = False) -> np.ndarray:
    """Returns a picture of classes, grey or with a palette, [H, W] uint8; ValueError unless as large as its image."""
    classes = read_classes(path, as_stored)
    if classes.shape != image.shape[:2]:
        sizes = [f"{width} x {height}" for height, width in (classes.shape, image.shape[:2])]
        raise ValueError(f"map {path} is {sizes[0]}, but its image {sizes[1]}; they must be of one size")
    return classes


@contextlib.contextmanager
def _opened(image_file: pathlib.Path | BinaryIO, name: str, as_stored: bool = False) -> Iterator[Image.Image]:
    """Yields an image, decoded and upright; what goes wrong with it meanwhile is one ValueError with its name."""
    try:
        with contextlib.ExitStack() as stack:
            if isinstance(image_file, (str, os.PathLike)):
                image_file = stack.enter_context(open_file(image_file))
            image = stack.enter_context(Image.open(image_file, formats=IMAGE_FORMATS))
            # Pillow itself stops at twice this many; it only warns of a smaller decompression bomb.
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {Image.MAX_IMAGE_PIXELS:,}")
            yield image if as_stored else _upright(image)
    except Exception as error:  # decoders of broken files raise OSError, SyntaxError, struct.error and others
        reason = one_line(error).partition(" <_io")[0]  # Pillow names the open file, which has no name here
        remedy = "remove or replace it"
        if is_of_this_process(error, rights=False):
            remedy = "free memory or raise the limit of open files (ulimit -n)"
        raise ValueError(f"cannot read image {name}: {reason}; {remedy}") from error


def open_file(path: str | os.PathLike) -> BinaryIO:
    """Returns a file, open to read. Of a pipe or a device it is ValueError: it is not opened, and nothing waits."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is not a file, but a folder, a pipe or a device")
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def _upright(image: Image.Image) -> Image.Image:
    """Returns the image as viewers show it: turned or mirrored by its EXIF orientation."""
    _scale_transparent(image)
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # EXIF that is broken tells nothing; the pixels are there
        return image
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def _scale_transparent(image: Image.Image) -> None:
    """Brings a PNG's transparent level or colour to 8 bits, as Pillow does its pixels alone; before they are loaded."""
    transparent, raw_mode = image.info.get("transparency"), image.tile[0].args if image.format == "PNG" else None
    if raw_mode in ("L;2", "L;4"):
        image.info["transparency"] = transparent and transparent * {"L;2": 85, "L;4": 17}[raw_mode]
    elif raw_mode == "RGB;16B":
        image.info["transparency"] = transparent and tuple(level >> 8 for level in transparent)


def _composited(image: Image.Image, background: Sequence[int]) -> np.ndarray:
    """Returns an image on a background, [H, W, 1 or 3] uint8; RGB where one of them has colours."""
    transparent = image.info.get("transparency")  # a level, a colour or a palette's alphas
    if image.mode.startswith("F"):
        raise ValueError("its pixels are floating-point numbers, not levels of 8 or 16 bits")
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64)[..., None]  # [H, W, 1]
        if not 0 <= levels.min() <= levels.max() < 2**16:
            raise ValueError(f"its levels are from {levels.min()} to {levels.max()}, not of 16 bits")
        if image.format == "TIFF" and image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
            levels = 2**16 - 1 - levels  # white is 0, which Pillow turns around in 8 bits alone
        pixels = ((levels + 128) // 257).astype(np.uint8)
        alpha = 255 * (levels != transparent) if isinstance(transparent, int) else None
    else:
        mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
        if transparent is None and image.mode not in ("LA", "La", "PA", "RGBA", "RGBa"):
            return _array(image if image.mode == mode else image.convert(mode))
        array = np.asarray(image.convert(f"{mode}A"))
        pixels, alpha = array[..., :-1], array[..., -1:]
    if alpha is None or alpha.min() == 255:
        return pixels
    tone = np.array(background if pixels.shape[-1] == 3 or len(set(background)) > 1 else background[:1])
    alpha = alpha.astype(np.int32)
    return ((pixels * alpha + tone * (255 - alpha) + 127) // 255).astype(np.uint8)


def _array(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def one_line(error: BaseException) -> str:
    """Returns the first line that an error says, or its type."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip().rstrip(".:;") if lines else type(error).__name__


# Metadata


def folder_fields(data: DataConfig, paths: Sequence[pathlib.Path]) -> list[dict[str, Any]]:
    """Returns the extra fields of images, each from the nearest metadata file above it that knows the image.

    Where there is a field of maps, "map" is the path of the image's own.
    """
    names = data.extra_fields if data.map_field is None else (*data.extra_fields, data.map_field)
    if not names:
        return [{}] * len(paths)
    tables, found = _Tables(data, names), []
    for path in paths:
        fields, home = tables.fields(path)
        wrong = [name for name in names if not _is_scalar(fields.get(name))]
        if wrong:
            raise ValueError(
                f"image {path} has no field {wrong[0]!r} (a string or a number) in {METADATA_NAME}; add it there, or "
                "take it out of config.data.extra_fields"
            )
        extra = {name: fields[name] for name in data.extra_fields}
        if not reads_as_stored(data):
            extra = {name: normalised(value) if isinstance(value, str) else value for name, value in extra.items()}
        found.append(extra if data.map_field is None else extra | {"map": _inside(home, fields[data.map_field], path)})
    return found


class _Tables:
    """The named fields of a folder's metadata files, each read when an image below it is asked for."""

    def __init__(self, data: DataConfig, names: Sequence[str]):
        self._root, self._names = pathlib.Path(user_path(data.name)), names
        self.read: dict[pathlib.Path, dict[str, dict[str, Any]]] = {}

    def fields(self, path: pathlib.Path) -> tuple[dict[str, Any], pathlib.Path]:
        """Returns the fields of an image from the nearest file that knows it, and that file's folder."""
        for folder in path.parents:
            if folder != self._root and self._root not in folder.parents:
                break
            if folder not in self.read:
                self.read[folder] = _read_metadata(folder / METADATA_NAME, self._names)
            fields = self.read[folder].get(normalised(path.relative_to(folder).as_posix()))
            if fields:
                return fields, folder
        return {}, self._root


def _maps(data: DataConfig, paths: Sequence[pathlib.Path]) -> set[pathlib.Path]:
    """Returns what the metadata files above some images name as an image's map: these are no images of a class."""
    if data.map_field is None:
        return set()
    tables = _Tables(data, (data.map_field,))
    for path in paths:
        tables.fields(path)
    return {
        _as_written(folder, posixpath.normpath(str(fields[data.map_field])))
        for folder, table in tables.read.items()
        for fields in table.values()
        if data.map_field in fields
    }


def _inside(folder: pathlib.Path, name: Any, image: pathlib.Path) -> pathlib.Path:
    """Returns the file of a name in a metadata file; ValueError where it would lie outside of the folder."""
    path = pathlib.PurePosixPath(posixpath.normpath(str(name)))
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"the map {str(name)[:200]!r} of image {image} must lie below {folder}; put it there")
    return _as_written(folder, path)


def _as_written(folder: pathlib.Path, name: str | os.PathLike) -> pathlib.Path:
    """Returns the file of a name, which its disk may have in another code of Unicode than a metadata file."""
    forms = [folder / name, *(folder / unicodedata.normalize(form, str(name)) for form in ("NFC", "NFD"))]
    return next((path for path in forms if path.exists()), forms[0])


def _is_scalar(value: Any) -> bool:
    """Returns whether a latent cache can hold a value: a string, a float, or an integer of 64 bits."""
    return isinstance(value, (str, float)) or (isinstance(value, int) and -(2**63) <= value < 2**63)


def _read_metadata(file: pathlib.Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the named fields of each line of a metadata file, by the image's path relative to it (normalised)."""
    table = {}
    if not file.is_file():
        return table
    with file.open(encoding="utf-8-sig") as lines:  # a mark of the byte order is no text; any newline ends a line
        number = 0
        while True:
            number += 1
            try:
                line = lines.readline(MAX_LINE_LENGTH + 1)
                if not line:
                    return table
                if not line.strip():
                    continue
                if len(line) > MAX_LINE_LENGTH:
                    raise ValueError(f"it is longer than {MAX_LINE_LENGTH:,} characters")
                values = parse_json(line)
                name = normalised(posixpath.normpath(values["file_name"]))
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} must be text in UTF-8 ({error.reason}); save it so") from error
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file} line {number} must be a JSON object with a file_name ({error!r}); mend or remove it"
                ) from error
            table[name] = {key: values[key] for key in names if key in values}
