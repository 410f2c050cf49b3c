"""What samples are compared with: a data set, a folder of images or a file, and its statistics, which are kept.

They are kept in ADM's `.npz` form (`metrics.adm_files`), with the features of up to `MAX_FEATURES` of the images, in a
file named by a hash of the reference's content, of the network's weights and of how an image becomes its input.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dit_jax.checkpoint import CHECKPOINTS, CONFIG_FILE
from dit_jax.config import DataConfig
from dit_jax.data.folder import (
    SUFFIXES_SHOWN,
    WHITE,
    describe_left_out,
    is_folder,
    list_images,
    read_image,
    reads_as_stored,
)
from dit_jax.data.latent_cache import MANIFEST_NAME as CACHE_MANIFEST
from dit_jax.data.latent_cache import PLAN_NAME as CACHE_PLAN
from dit_jax.data.pipeline import byte_transform, eval_batches
from dit_jax.data.sources import TFDS_NAME, Source, content_digest, hash_files, open_source, tfds_classes
from dit_jax.data.transforms import CROP
from dit_jax.evaluation.features import extract_features
from dit_jax.evaluation.kept import kept_file, read_arrays, write_arrays
from dit_jax.evaluation.measure import Reference
from dit_jax.evaluation.networks import NamedNetwork
from dit_jax.metrics.adm_files import (
    COUNT,
    FEATURES,
    IMAGES,
    SamplesFile,
    bounded_batch,
    has_statistics,
    is_array_file,
    read_statistics,
)
from dit_jax.metrics.frechet import Statistics, StatisticsAccumulator
from dit_jax.parallel.distributed import is_first
from dit_jax.parallel.mesh import on_all_processes
from dit_jax.terminal import progress, tell

READ_IMAGES = 256  # at once
SAMPLES_NAME = "samples.npz"  # of `dit-jax sample`
VERSION = 2  # of the files; those of the first have no sum, and of pictures as they were read then
MAX_FEATURES = 10_000  # images whose features are kept: those of the published precision and recall


class ReferenceImages(NamedTuple):
    """Images to take statistics of."""

    identity: dict[str, Any]  # name, SHA-256, number of images: the same on every machine that has the same images
    num_images: int
    batches: Callable[[], Iterator[np.ndarray]]  # uint8 [n, H, W, 3], in order


class FolderImages(Source):
    """Every image below a folder (`folder.list_images`), in the order of their paths.

    left_out: what else is there, for the end of a line.
    """

    def __init__(self, folder: str | os.PathLike, background: Sequence[int] = WHITE):
        """Raises ValueError where there is no image, or where they are a run's own pictures and no images."""
        refuse_own_folder(pathlib.Path(folder))
        self.paths, left_out = list_images(folder)
        self.left_out, self._background = describe_left_out(left_out), background
        if not self.paths:
            raise ValueError(f"{folder} has no images ({SUFFIXES_SHOWN}){self.left_out}; give a folder that has")
        for parent in {path.parent for path in self.paths}:
            refuse_own_folder(parent)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [{"image": read_image(self.paths[index], self._background), "label": 0} for index in indices]


def reference_data(reference: str, data: DataConfig) -> tuple[DataConfig, str]:
    """Returns the data set and the split that `NAME[:SPLIT]` names, for images of the size and channels of `data`.

    The name may be that of `data` itself, or any TFDS data set's, with its version ("imagenet2012:5.1.0:validation").
    """
    match = re.fullmatch(f"({TFDS_NAME})(?::(.+))?", reference)
    if match and reference != data.name:
        name, split = match.groups()
    elif reference.startswith(f"{data.name}:"):  # a folder
        name, split = data.name, reference.removeprefix(f"{data.name}:")
    else:
        name, split = reference, None
    if name == data.name:
        return data, split or data.train_split
    other = dataclasses.replace(data, name=name, version=None, class_names=None, extra_fields=(), map_field=None)
    try:
        num_classes, _ = tfds_classes(other)
    except ValueError as error:
        raise ValueError(f"--reference={reference}: {error}") from error
    return dataclasses.replace(other, num_classes=num_classes), split or DataConfig.train_split


def refuse_own_folder(folder: pathlib.Path) -> None:
    """Raises ValueError where a folder's pictures are not images to measure, but show what a run or a drawing made."""
    folder = folder.resolve()
    places = [folder, folder.parent] if folder.name in ("samples", "evaluation") else [folder]  # of a run's pictures
    for place in places:
        if (place / CONFIG_FILE).is_file() and (place / CHECKPOINTS).is_dir():
            raise ValueError(
                f"{folder} is of a run, whose pictures show its progress; give a folder of images, or the images that "
                f"`dit-jax sample --workdir={place}` draws"
            )
    if (folder / CACHE_MANIFEST).is_file() and (folder / CACHE_PLAN).is_file():
        raise ValueError(f"{folder} is a latent cache and has no images; give the folder or data set that it is of")
    if (folder / SAMPLES_NAME).is_file():
        raise ValueError(f"{folder} is a drawing, whose pictures show many images in one; give {folder / SAMPLES_NAME}")


def open_reference(reference: str | None, data: DataConfig) -> ReferenceImages:
    """Returns the images of a reference.

    Args:
      reference: an `.npz` or `.npy` file with images, a folder, or a TFDS name with its split after a colon (default:
        the training split); None: the training images of `data` themselves.
      data: the size and channels of the images that it is compared with; folders and data sets are brought to them as
        they are in training.
    """
    if reference is not None and is_array_file(reference):
        return _file_images(SamplesFile(reference), data.image_size)
    if reference is not None and pathlib.Path(reference).is_dir():
        source = FolderImages(reference, data.background)
        if source.left_out and is_first():
            tell(f"{reference}: {len(source):,} images{source.left_out}")
        names = (path.relative_to(reference).as_posix() for path in source.paths)
        digest = hash_files(zip(names, source.paths, strict=True), pathlib.Path(reference))
        identity = {"name": pathlib.Path(reference).resolve().name, "sha256": digest}
        identity["background"] = list(data.background)
    else:
        data, split = (data, data.train_split) if reference is None else reference_data(reference, data)
        source = open_source(data, split)
        identity = {"name": pathlib.Path(data.name).name, "split": split, "sha256": content_digest(data, split)}
        if is_folder(data.name) and not reads_as_stored(data):
            identity["background"] = list(data.background)
    identity |= {"num_images": len(source), "image_size": data.image_size, "channels": data.channels, "crop": CROP}

    return ReferenceImages(identity, len(source), lambda: image_batches(source, data, READ_IMAGES))


def image_batches(source: Source, data: DataConfig, batch_size: int) -> Iterator[np.ndarray]:
    """Yields a source's images in order, cut as in training, uint8 [n, H, W, 3], n at most `batch_size`."""
    size = bounded_batch(batch_size, (len(source), data.image_size, data.image_size, 3))
    transform, threads = byte_transform(data, train=False), data.num_threads
    for batch in eval_batches(source, transform, batch_size=size, rows=range(size), num_threads=threads):
        yield batch["image"][batch["mask"] > 0]


def _file_images(file: SamplesFile, image_size: int) -> ReferenceImages:
    if file.shape[1:3] != (image_size, image_size):
        raise ValueError(
            f"--reference={file.path} has images of {file.shape[1]} x {file.shape[2]} pixels, but the samples have "
            f"{image_size} a side; give a reference of their size"
        )
    identity = {"name": file.path.name, "sha256": hash_files([("", file.path)]), "num_images": len(file)}
    return ReferenceImages(identity, len(file), lambda: file.batches(READ_IMAGES))


def load_reference(
    reference: str | None, data: DataConfig, network: NamedNetwork, mesh: Mesh, cache: str | os.PathLike
) -> Reference:
    """Returns the statistics and features of a reference (see `open_reference`), from `cache` or computed now.

    Of an `.npz` file that has Inception's statistics these are taken, where that is the network.
    """
    published = None
    if reference is not None and is_array_file(reference) and has_statistics(reference):
        with np.load(reference, allow_pickle=False) as file:
            has_images, has_spatial = IMAGES in file, FEATURES["spatial"][0] in file
        if network.key == "inception":
            published = read_statistics(reference), read_statistics(reference, "spatial") if has_spatial else None
        if not has_images:
            if published is None:
                raise ValueError(
                    f"--reference={reference} has no images, and its statistics are of Inception's features, not of "
                    f"{network.facts['name']}'s; give images, or --features=inception"
                )
            path = pathlib.Path(reference)
            identity = {"name": path.name, "sha256": hash_files([("", path)]), "num_images": published[0].count}
            return Reference(identity, *published)
    images = open_reference(reference, data)
    found = _computed(images, network, mesh, pathlib.Path(cache))
    return found if published is None else found._replace(statistics=published[0], spatial=published[1])


def _computed(images: ReferenceImages, network: NamedNetwork, mesh: Mesh, cache: pathlib.Path) -> Reference:
    key = {"reference": images.identity, "network": network.facts}
    key |= {"jax": jax.__version__, "platform": jax.default_backend(), "features": MAX_FEATURES}
    key |= {"version": VERSION}
    path = kept_file(cache, "reference", key, ".npz")
    arrays = read_arrays(path, key)
    if not on_all_processes(arrays is not None):
        arrays = _statistics(images, network, mesh)
        if is_first():
            write_arrays(path, key, arrays)
    statistics = [
        Statistics(arrays[mean], arrays[covariance], images.num_images) if mean in arrays else None
        for mean, covariance in FEATURES.values()
    ]
    return Reference(images.identity, *statistics, arrays["features"])


def _statistics(images: ReferenceImages, network: NamedNetwork, mesh: Mesh) -> dict[str, np.ndarray]:
    """Returns the arrays of the file that keeps a reference."""
    accumulators: dict[str, StatisticsAccumulator] = {}
    count = min(MAX_FEATURES, images.num_images)
    wanted = np.arange(count) * images.num_images // count  # evenly spaced: of every class, where they are in order
    kept, start = [], 0
    wanted_outputs = tuple(name for name in FEATURES if name in network.outputs)
    with progress(total=images.num_images, unit="image", description="reference: image", active=is_first()) as bar:
        for outputs in extract_features(network.network, images.batches(), mesh, wanted_outputs):
            for name in wanted_outputs:
                accumulators.setdefault(name, StatisticsAccumulator()).add(outputs[name])
            features = outputs["pool"]
            kept.append(features[wanted[(wanted >= start) & (wanted < start + len(features))] - start])
            start += len(features)
            bar.update(len(features))
    arrays = {"features": np.concatenate(kept), COUNT: np.array(start)}
    for kind, accumulator in accumulators.items():
        statistics = accumulator.statistics()
        arrays |= dict(zip(FEATURES[kind], (statistics.mean, statistics.covariance), strict=True))
    return arrays
