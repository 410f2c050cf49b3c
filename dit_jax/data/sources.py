"""Images by position: a TFDS data set (stored as ArrayRecord), or a folder with one sub-folder a class.

A TFDS data set is prepared once, from the first of these that there is: the folder `config.data.raw_dir` with its
raw files; a Debian package of it; its host. The builder is TFDS's own in each case, so that images, labels and order
are the same. Where none of them works, Fashion-MNIST falls back to the part of it that is shipped with this package,
and says so.
"""

import abc
import collections
import contextlib
import difflib
import functools
import hashlib
import io
import json
import os
import pathlib
import re
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from absl import logging

from dit_jax.config import DataConfig
from dit_jax.data.archives import check_archive
from dit_jax.data.folder import (
    EVAL_EVERY,  # noqa: F401  (like the others without a use here, also imported from this file)
    IMAGE_FORMATS,  # noqa: F401
    IMAGE_SUFFIXES,  # noqa: F401
    METADATA_NAME,  # noqa: F401
    class_folders,
    decode,
    describe_left_out,
    folder_fields,
    is_folder,
    list_split,
    one_line,
    read_classes,  # noqa: F401
    read_image,
    read_map,
    reads_as_stored,
    split_root,
)
from dit_jax.data.identity import file_sums, folder_identity
from dit_jax.data.transforms import CROP
from dit_jax.files import file_lock, is_of_this_process, user_path
from dit_jax.terminal import silence_tensorflow, tell

# TFDS name -> where Debian's package of the data set puts its raw files (Debian "dataset-fashion-mnist").
DEBIAN_FOLDERS = {"fashion_mnist": "/usr/share/datasets/fashion-mnist"}
# TFDS name -> a part of the data set that is shipped here, in the format of the raw files.
SHIPPED_SUBSETS = {"fashion_mnist": pathlib.Path(__file__).parent / "fashion_mnist_subset"}
TFDS_NAME = r"\w+(?:/[\w.+-]+)?(?::(?:\d+|\*)\.(?:\d+|\*)\.(?:\d+|\*))?"  # with its variant and its version
PROBE_SECONDS = 15  # a host that has not answered by then is taken to be out of reach


class Source(Sequence):
    """A random-access sequence of examples; reading many at once (`__getitems__`) is faster than one by one."""

    @abc.abstractmethod
    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Returns the examples at `indices`, each in [0, len)."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([range(len(self))[index]])[0]


def open_source(data: DataConfig, split: str) -> Source:
    """Returns the images of a split as a random-access sequence; prepares the data set if that was not done.

    Args:
      data: the data set.
      split: `data.train_split`, `data.eval_split` or, of a TFDS data set, any split or part ("train[:90%]").

    Returns:
      A sequence of `{"image": [H, W, C] uint8, "label": int in [0, data.num_classes)}`, C = 1 or 3, and of each of
      `data.extra_fields`, a string, an integer or a float; with `data.map_field` also of a "map" [H, W] uint8, the
      class of each of the image's pixels.

    Raises:
      ValueError: in one line with the remedy, here for what is wrong with the data set, on access for a bad image.
    """
    names = data.extra_fields
    if len(set(names)) < len(names) or {"image", "label", "moments", "text", "map"} & set(names):
        raise ValueError(
            f"config.data.extra_fields={names} must name each field once, and none of image, label, moments, text and "
            "map; leave these out"
        )
    if is_folder(data.name):
        return _ImageFolder(data, split)
    for key in ("map_field", "background"):
        if getattr(data, key) != getattr(DataConfig, key):
            raise ValueError(f"config.data.{key}={getattr(data, key)!r} needs an image folder, and {data.name} is none")
    return _TfdsSource(data, split)


def prepare(data: DataConfig) -> str:
    """Makes sure that the data set is on this machine, once; returns one line that says where it comes from."""
    if is_folder(data.name):
        training, held_out = (_ImageFolder(data, split) for split in (data.train_split, data.eval_split))
        # Where the splits are by position, both are of the same folders.
        left_out = training.left_out + (held_out.left_out if held_out.root != training.root else collections.Counter())
        found = f"{len(training):,} + {len(held_out):,} images of {data.num_classes} classes in {data.name}"
        return found + describe_left_out(left_out)
    return _prepared(data).origin


def is_prepared(data: DataConfig) -> bool:
    """Returns whether the data set is on this machine already, so that opening it fetches nothing."""
    return (
        pathlib.Path(user_path(data.name)).is_dir() if is_folder(data.name) else _make_builder(data).data_path.exists()
    )


def source_identity(data: DataConfig) -> dict[str, Any]:
    """Returns what determines the images of a run, as JSON values: the same on every machine that has the same data.

    Of a folder it is the content of its files, and of `data.extra_fields` and maps (`data.identity`).
    """
    splits = data.train_split, data.eval_split
    if is_folder(data.name):
        files = {split: list_split(data, split).files for split in splits}
        fields = {split: folder_fields(data, [path for path, _ in files[split]]) for split in splits}
        identity = folder_identity(data.name, files, fields)
        if not reads_as_stored(data):
            identity["background"] = list(data.background)
    else:
        prepared = _prepared(data)
        identity = {
            "name": data.name,
            "version": prepared.builder.info.full_name,
            "splits": {split: len(_TfdsSource(data, split)) for split in splits},
            "shipped_subset": prepared.is_shipped_subset,
        }
    return identity | {
        "class_names": class_names(data),
        "image_size": data.image_size,
        "channels": data.channels,
        "num_classes": data.num_classes,
        "crop": CROP,
        "horizontal_flip": data.horizontal_flip,
    }


def class_names(data: DataConfig) -> list[str]:
    """Returns the names of the classes of a data set, in the order of their labels."""
    if is_folder(data.name):
        return list(class_folders(data, data.train_split))
    builder = _prepared(data).builder
    return list(builder.info.features[_feature_name(builder, _import_tfds().features.ClassLabel)].names)


def content_digest(data: DataConfig, split: str) -> str:
    """Returns a SHA-256 of the images of a split: of a folder's names and bytes, of a TFDS data set's version."""
    if is_folder(data.name):
        return hash_files(_names(data, split), pathlib.Path(user_path(data.name)))
    prepared = _prepared(data)
    size = len(_TfdsSource(data, split))
    facts = prepared.builder.info.full_name, split, size, prepared.is_shipped_subset
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _names(data: DataConfig, split: str) -> list[tuple[str, pathlib.Path]]:
    """Returns (path below the split's folder, path) of the images of a folder's split."""
    root = split_root(data, split)
    return [(path.relative_to(root).as_posix(), path) for path, _ in list_split(data, split).files]


def tfds_classes(data: DataConfig) -> tuple[int, int]:
    """Returns the number of classes and of channels of the TFDS data set of a name; fetches nothing."""
    tfds = _import_tfds()
    builder = _find_builder(data)
    features = builder.info.features
    return (
        features[_feature_name(builder, tfds.features.ClassLabel)].num_classes,
        features[_feature_name(builder, tfds.features.Image)].shape[-1] or 3,
    )


def hash_files(files: Iterable[tuple[str, pathlib.Path]], root: pathlib.Path | None = None) -> str:
    """Returns a SHA-256 of (name, file) pairs, of the names and the files' content.

    root: the folder that all are in, of which what has not changed is not read again; None: all are read.
    """
    files, digest = list(files), hashlib.sha256()
    for (name, _), found in zip(files, file_sums([path for _, path in files], root), strict=True):
        digest.update(f"{name}\0{found}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


# Image folders


class _ImageFolder(Source):
    def __init__(self, data: DataConfig, split: str):
        self._files, self.left_out = list_split(data, split)
        self.root, self._background, self._as_stored = split_root(data, split), data.background, reads_as_stored(data)
        self._fields = folder_fields(data, [path for path, _ in self._files])

    def __len__(self) -> int:
        return len(self._files)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [self._example(*self._files[index], self._fields[index]) for index in indices]

    def _example(self, path: pathlib.Path, label: int, fields: dict[str, Any]) -> dict[str, Any]:
        example = {"image": read_image(path, self._background, self._as_stored), "label": label} | fields
        if "map" in fields:
            example["map"] = read_map(fields["map"], example["image"], self._as_stored)
        return example


# TFDS


class _TfdsSource(Source):
    def __init__(self, data: DataConfig, split: str):
        tfds = _import_tfds()
        from tensorflow_datasets.proto import tf_example_pb2

        builder = _prepared(data).builder
        try:
            size = builder.info.splits[split].num_examples
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"config.data: {split!r} is not a split of {data.name}; its splits are "
                f"{', '.join(builder.info.splits)}, or a part such as train[:90%]"
            ) from error
        if not size:
            raise ValueError(
                f"config.data: split {split!r} of {data.name} must hold an image, but is empty; enlarge it"
            )
        # TFDS's own decoding of a record takes five times as long as the two lines of `_example`.
        self._records = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        self._parse = tf_example_pb2.Example.FromString
        self._image = _feature_name(builder, tfds.features.Image)
        self._label = _feature_name(builder, tfds.features.ClassLabel)
        self._extra_fields = data.extra_fields
        for name in data.extra_fields:
            _require_scalar(builder, name)
        self._name, self._num_classes = f"{data.name} {split}", data.num_classes
        self._folder = builder.data_dir

    def __len__(self) -> int:
        return len(self._records)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        try:
            records = self._records.__getitems__(indices)
        except RuntimeError as error:  # what ArrayRecord raises for a missing or damaged file
            remedy = f"delete {self._folder} to prepare it anew"
            if is_of_this_process(error):
                remedy = "free memory, raise the limit of open files (ulimit -n) or mend the rights"
            raise ValueError(f"cannot read {self._name}: {one_line(error)}; {remedy}") from error
        return [self._example(record, index) for record, index in zip(records, indices, strict=True)]

    def _example(self, record: bytes, index: int) -> dict[str, Any]:
        features = self._parse(record).features.feature
        image = io.BytesIO(features[self._image].bytes_list.value[0])
        label = features[self._label].int64_list.value[0]
        if not 0 <= label < self._num_classes:  # TFDS writes -1 where there is no label, as in ImageNet's test split
            raise ValueError(f"example {index} of {self._name} has no label ({label}); choose a labelled split")
        extra = {name: self._scalar(features[name], name, index) for name in self._extra_fields}
        # Images of TFDS are what TFDS makes of them, which neither turns nor composites.
        return {"image": decode(image, f"{index} of {self._name}", as_stored=True), "label": label} | extra

    def _scalar(self, feature: Any, name: str, index: int) -> str | int | float:
        value = getattr(feature, feature.WhichOneof("kind")).value[0]
        try:
            return value.decode("utf-8") if isinstance(value, bytes) else value
        except UnicodeDecodeError as error:
            raise ValueError(
                f"field {name!r} of example {index} of {self._name} must be UTF-8 text; take it out of "
                "config.data.extra_fields"
            ) from error


class _Prepared(NamedTuple):
    builder: Any  # tfds.core.DatasetBuilder
    origin: str
    is_shipped_subset: bool = False


@functools.lru_cache
def _prepared(data: DataConfig) -> _Prepared:
    """Returns the builder of the prepared data set; the search for its raw files happens once a process."""
    builder = _make_builder(data)
    if not builder.data_path.exists():
        with _preparation_lock(pathlib.Path(builder.data_dir_root) / f".{builder.name}.lock"):
            builder = _make_builder(data)  # another process may have prepared it while this one waited
            if not builder.data_path.exists():
                return _prepare(builder, data)
    formats = [file_format.value for file_format in builder.info.available_file_formats()]
    if "array_record" not in formats:
        raise ValueError(
            f"{builder.data_dir} holds {data.name} as {', '.join(formats) or 'nothing readable'}, but random access "
            "needs array_record; set config.data.data_dir to another folder or delete this one"
        )
    return _Prepared(builder, f"{data.name} as prepared in {builder.data_dir}")


def _prepare(builder: Any, data: DataConfig) -> _Prepared:
    folder = data.raw_dir or DEBIAN_FOLDERS.get(builder.name)
    if folder and (data.raw_dir or pathlib.Path(folder).is_dir()):
        _prepare_from_folder(builder, pathlib.Path(user_path(folder)))
        return _Prepared(builder, f"{data.name} from {folder}")
    try:
        _prepare_from_host(builder)
        return _Prepared(builder, f"{data.name} from its host")
    except Exception as error:  # of the network, of TFDS, of the data set's own code
        if builder.name not in SHIPPED_SUBSETS:
            raise ValueError(
                f"{data.name} could not be downloaded: {one_line(error)}; set config.data.raw_dir to a folder with "
                "its raw files"
            ) from error
        reason = one_line(error)
    subset = _make_builder(data, pathlib.Path(builder.data_dir_root) / "shipped_subset")
    if not subset.data_path.exists():
        _prepare_from_folder(subset, SHIPPED_SUBSETS[builder.name], is_subset=True)
    size = sum(split.num_examples for split in subset.info.splits.values())
    origin = f"{data.name}: the shipped subset of {size:,} images, because the download failed ({reason})"
    logging.warning("%s; for all of it set config.data.raw_dir to a folder with its raw files", origin)
    return _Prepared(subset, origin, is_shipped_subset=True)


def _prepare_from_host(builder: Any) -> None:
    # TFDS asks a silent host again for minutes, without a time limit; asking once before bounds that.
    for url in [url for url in builder.url_infos if url.startswith("http")][:1]:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError as error:
            if error.code >= 500:  # TFDS repeats these too; of any other answer let it judge by itself
                raise
    _run_builder(builder)


def _prepare_from_folder(builder: Any, folder: pathlib.Path, is_subset: bool = False) -> None:
    """Runs the builder on the raw files in a folder: a URL becomes the file of the same name.

    TFDS's checksums are not compared, since a repacked archive (Debian's) has others; its content is the same.
    """
    if not folder.is_dir():
        raise ValueError(f"config.data.raw_dir={str(folder)!r}: no such folder; set it to one with the raw files")
    split_generators = builder._split_generators

    def find(urls: Any) -> Any:
        if isinstance(urls, dict):
            return {key: find(url) for key, url in urls.items()}
        if isinstance(urls, (list, tuple)):
            return [find(url) for url in urls]
        url = getattr(urls, "url", urls)  # a string, or a tfds.download.Resource
        path = folder / urllib.parse.urlparse(url).path.rsplit("/", 1)[-1]
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing (from {url})")
        check_archive(path)
        return path

    @functools.wraps(split_generators)  # TFDS inspects the signature
    def from_folder(manager: Any, *args: Any, **kwargs: Any) -> Any:
        manager.download = find
        manager.download_and_extract = lambda urls: manager.extract(find(urls))
        generators = split_generators(manager, *args, **kwargs)
        if is_subset:  # the builder expects the whole data set; the files say how many images they hold
            for generator in generators:
                header = pathlib.Path(generator.gen_kwargs["label_path"]).read_bytes()[:8]
                generator.gen_kwargs["num_examples"] = int.from_bytes(header[4:], "big")
        return generators

    builder._split_generators = from_folder
    try:
        with tempfile.TemporaryDirectory() as scratch:
            _run_builder(builder, extract_dir=scratch, manual_dir=folder)
    except Exception as error:
        raise ValueError(
            f"{builder.name} could not be prepared from {folder}: {one_line(error)}; give it all the raw files, or "
            "set config.data.raw_dir to another folder"
        ) from error


def _run_builder(builder: Any, **download_config: Any) -> None:
    """Downloads and prepares, in a folder that TFDS renames at the end: a kill leaves nothing that looks prepared."""
    tfds = _import_tfds()
    tfds.display_progress_bar(sys.stderr.isatty())
    tell(f"preparing {builder.name} in {builder.data_dir}")
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS tells there that it does not know the sizes
        builder.download_and_prepare(
            file_format="array_record", download_config=tfds.download.DownloadConfig(**download_config)
        )


def _make_builder(data: DataConfig, data_dir: pathlib.Path | None = None) -> Any:
    """Returns the TFDS builder of a data set, prepared or not, whose features fit the config."""
    tfds, builder = _import_tfds(), _find_builder(data, data_dir)
    _feature_name(builder, tfds.features.Image)
    num_classes = builder.info.features[_feature_name(builder, tfds.features.ClassLabel)].num_classes
    if num_classes != data.num_classes:
        raise ValueError(
            f"config.data.num_classes={data.num_classes} must be {num_classes}, the number of classes of {data.name}"
        )
    return builder


def _find_builder(data: DataConfig, data_dir: pathlib.Path | None = None) -> Any:
    """Returns the TFDS builder of a data set's name."""
    if not re.fullmatch(TFDS_NAME, data.name):  # TFDS would fetch the code of a "community:" data set, and run it
        raise ValueError(
            f"config.data.name={data.name[:200]!r} must be an existing folder, or a TFDS name such as cifar10, "
            "imagenet2012:5.1.0 or imagenet_resized/64x64"
        )
    tfds = _import_tfds()
    if data_dir is None and data.data_dir:
        data_dir = pathlib.Path(user_path(data.data_dir))
    elif data_dir is None and "TFDS_DATA_DIR" not in os.environ:
        user_path("~/tensorflow_datasets")  # TFDS's own default: without a home it would be a folder named ~
    try:
        return tfds.builder(data.name, data_dir=data_dir)
    except Exception as error:  # its types and lengths differ by what is wrong with the name
        names = tfds.list_builders(with_community_datasets=False)
        name = re.split("[/:]", data.name)[0]
        if name in names:
            raise ValueError(f"config.data.name={data.name!r} cannot be loaded: {one_line(error)}") from error
        near = difflib.get_close_matches(name, names, n=1)
        raise ValueError(
            f"config.data.name={data.name!r} is not a TFDS data set or an existing folder; "
            + (f"did you mean {near[0]!r}?" if near else "see https://www.tensorflow.org/datasets/catalog")
        ) from error


def _feature_name(builder: Any, kind: type) -> str:
    """Returns the name of the one feature of a type; of several, the one in the data set's supervised keys."""
    features = builder.info.features
    names = [name for name, feature in features.items() if type(feature) is kind] if hasattr(features, "items") else []
    supervised = [name for name in names if name in (builder.info.supervised_keys or ())]
    if len(supervised or names) != 1:
        raise ValueError(
            f"TFDS data set {builder.name} must have one {kind.__name__} feature, but has {names or 'none'}; "
            "choose a data set of labelled images"
        )
    return (supervised or names)[0]


def _require_scalar(builder: Any, name: str) -> None:
    """Raises ValueError unless a TFDS data set has a feature of this name that is one string or number."""
    features = builder.info.features
    scalars = [key for key, feature in features.items() if getattr(feature, "shape", None) == ()]
    if name not in scalars:
        raise ValueError(
            f"config.data.extra_fields: TFDS data set {builder.name} has no string or number {name!r}, only "
            f"{', '.join(scalars)}; choose of these"
        )


@contextlib.contextmanager
def _preparation_lock(path: pathlib.Path) -> Iterator[None]:
    """Lets one process of a machine (or of a shared disk) prepare a data set; a killed one lets go."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(
                file_lock(
                    path,
                    on_wait=lambda: logging.warning(
                        "waiting for another process that prepares the data set in %s", path.parent
                    ),
                )
            )
        except OSError as error:
            raise ValueError(f"{path.parent} must be writable: {error}; set config.data.data_dir to another") from error
        yield


def _import_tfds() -> Any:
    silence_tensorflow()
    import tensorflow_datasets as tfds

    return tfds
