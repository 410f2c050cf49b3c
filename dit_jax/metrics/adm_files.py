"""Reference statistics and samples in the `.npz` form of ADM's evaluation (arXiv:2105.05233), read and written.

A file of samples has the array `arr_0` (or one of another name alone), uint8 [N, H, W, 3], or grey [N, H, W] or
[N, H, W, 1], and may have `labels`; a `.npy` file is such an array. A reference has the statistics `mu`
and `sigma` of pool_3 features and `mu_s` and `sigma_s` of spatial ones, float [D] and [D, D], and may have images, too.
Files are untrusted: nothing pickled is read, and an array's header must fit its bytes before memory is taken for it.
"""

import contextlib
import math
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np

from dit_jax.files import written_whole
from dit_jax.metrics.frechet import Statistics

MAX_DIMENSION = 8192  # of features whose covariance is read: 512 MiB
MAX_IMAGES, MAX_SIDE = 10_000_000, 2048  # compressed, a header can claim a thousand times the file's size
MAX_BATCH_BYTES = 2**26  # of images in memory at once
COVARIANCE_TOLERANCE = 1e-6  # relative: a covariance's asymmetry
IMAGES, LABELS = "arr_0", "labels"
FEATURES = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
COUNT = "num_images"  # which ADM's files lack


class _SingleArray:
    """A `.npy` file as if it were the archive of this array alone."""

    def __init__(self, path: pathlib.Path):
        self._path, self._info = path, zipfile.ZipInfo(f"{IMAGES}.npy")
        self._info.file_size = path.stat().st_size

    def namelist(self) -> list[str]:
        return [self._info.filename]

    def getinfo(self, name: str) -> zipfile.ZipInfo:
        return self._info

    def open(self, name: str | zipfile.ZipInfo) -> IO[bytes]:
        return self._path.open("rb")


_Archive = zipfile.ZipFile | _SingleArray


class SamplesFile:
    """The images of a file, read batch by batch: 50,000 of 512 pixels would be 39 GB. Grey ones become RGB."""

    kind = "a file of images"

    def __init__(self, path: str | os.PathLike):
        """Opens the file and checks all but the images' bytes.

        Raises:
          ValueError: naming what is wrong with it.
        """
        self.path = pathlib.Path(path)
        with _archive(self.path) as archive:
            self._name = _images_name(archive)
            shape, dtype = _header(self.path, archive, self._name)
            grey = (len(shape) == 3 and shape[2] != 3) or shape[3:] == (1,)  # [H, W, 3] is one image, and no grey ones
            if dtype != np.uint8 or not (grey or shape[3:] == (3,)) or min(shape) < 1:
                raise ValueError(
                    f"{self.path}: {self._name} must be images uint8 [N, H, W, 3] in [0, 255], not {dtype} "
                    f"{list(shape)}; grey ones are [N, H, W]"
                )
            if shape[0] > MAX_IMAGES or max(shape[1:3]) > MAX_SIDE:
                raise ValueError(
                    f"{self.path}: {self._name} must be at most {MAX_IMAGES:,} images of {MAX_SIDE} pixels a side, not "
                    f"{list(shape)}"
                )
            self.shape: tuple[int, int, int, int] = (*shape[:3], 3)
            self._channels = 1 if grey else 3
            self.labels = self._read_labels(archive) if _has(archive, LABELS) else None

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Yields the images in order, uint8 [<= batch_size, H, W, 3]: fewer, where so many would fill the memory."""
        shape = (*self.shape[1:3], self._channels)
        batch_size = bounded_batch(batch_size, self.shape)
        with _archive(self.path) as archive, archive.open(f"{self._name}.npy") as file:
            _read_header(file)
            for start in range(0, len(self), batch_size):
                count = min(batch_size, len(self) - start)
                content = _read_exactly(self.path, file, count * math.prod(shape), self._name)
                images = np.frombuffer(content, np.uint8).reshape(count, *shape)
                yield images if self._channels == 3 else np.repeat(images, 3, axis=-1)

    def _read_labels(self, archive: _Archive) -> np.ndarray:
        shape, dtype = _header(self.path, archive, LABELS)
        if not np.issubdtype(dtype, np.integer) or shape != self.shape[:1]:
            raise ValueError(f"{self.path}: {LABELS} must be integers [{len(self)}], not {dtype} {list(shape)}")
        labels = _read(self.path, archive, LABELS)
        if labels.min() < 0 or labels.max() >= 2**31:
            raise ValueError(f"{self.path}: {LABELS} must be classes from 0 on, not {labels.min()} to {labels.max()}")
        return labels.astype(np.int32)


def is_array_file(path: str) -> bool:
    """Returns whether a path, by its name, is of a file as `SamplesFile` reads it."""
    return path.lower().endswith((".npz", ".npy"))


def bounded_batch(batch_size: int, shape: Sequence[int]) -> int:
    """Returns how many of `batch_size` images, of a shape [N, H, W, C] uint8, are to be in memory at once."""
    return max(1, min(batch_size, MAX_BATCH_BYTES // math.prod(shape[1:])))


def write_samples(path: str | os.PathLike, images: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Writes images uint8 [N, H, W, 3] and labels int [N]; the file appears whole, or not at all."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        raise ValueError(f"images must be uint8 [N, H, W, 3], not {images.dtype} {list(images.shape)}")
    _write(path, {IMAGES: images} | ({} if labels is None else {LABELS: np.asarray(labels)}))


def has_statistics(path: str | os.PathLike) -> bool:
    """Returns whether a file has statistics of features: else it must have images."""
    with _archive(pathlib.Path(path)) as archive:
        return _has(archive, FEATURES["pool"][0])


def read_statistics(path: str | os.PathLike, features: str = "pool") -> Statistics:
    """Returns the statistics of features, "pool" or "spatial", in a file.

    Raises:
      ValueError: naming what is wrong with it.
    """
    path = pathlib.Path(path)
    mean_name, covariance_name = FEATURES[features]
    with _archive(path) as archive:
        shape, dtype = _header(path, archive, mean_name)
        if not np.issubdtype(dtype, np.floating) or len(shape) != 1 or not 1 <= shape[0] <= MAX_DIMENSION:
            raise ValueError(f"{path}: {mean_name} must be floats [D], D <= {MAX_DIMENSION}, not {dtype} {list(shape)}")
        covariance_shape, dtype = _header(path, archive, covariance_name)
        if not np.issubdtype(dtype, np.floating) or covariance_shape != shape * 2:
            raise ValueError(
                f"{path}: {covariance_name} must be floats {list(shape * 2)}, as {mean_name} says, not {dtype} "
                f"{list(covariance_shape)}"
            )
        mean, covariance = (_read(path, archive, name).astype(np.float64) for name in (mean_name, covariance_name))
        count = _read_count(path, archive)
    for name, array in ((mean_name, mean), (covariance_name, covariance)):
        if not np.isfinite(array).all():
            raise ValueError(f"{path}: {name} must be finite, but is not")
    diagonal = np.diagonal(covariance)
    if diagonal.min() < 0:
        raise ValueError(f"{path}: {covariance_name} must be a covariance, but has a variance of {diagonal.min():.3g}")
    asymmetry = np.abs(covariance - covariance.T).max()
    if asymmetry > COVARIANCE_TOLERANCE * diagonal.max():
        raise ValueError(
            f"{path}: {covariance_name} must be symmetric, but differs from its transpose by {asymmetry:.3g}"
        )
    return Statistics(mean, (covariance + covariance.T) / 2, count)


def write_statistics(path: str | os.PathLike, pool: Statistics, spatial: Statistics | None = None) -> None:
    """Writes the statistics of pool_3 features, and of spatial ones; the file appears whole, or not at all.

    ADM's own evaluation reads files with both alone.
    """
    arrays: dict[str, np.ndarray] = {}
    for features, statistics in (("pool", pool), ("spatial", spatial)):
        if statistics is not None:
            arrays |= dict(zip(FEATURES[features], (statistics.mean, statistics.covariance), strict=True))
    if pool.count is not None:
        arrays[COUNT] = np.array(pool.count)
    _write(path, arrays)


def _write(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


@contextlib.contextmanager
def _archive(path: pathlib.Path) -> Iterator[_Archive]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            is_array = file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX
        with contextlib.nullcontext(_SingleArray(path)) if is_array else zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, OSError, EOFError, zlib.error, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path} is truncated or not an .npz file ({error}); write or fetch it again") from error


def _images_name(archive: _Archive) -> str:
    """Returns the name of the array of images: ADM's, or that of the only one beside the labels."""
    names = [name.removesuffix(".npy") for name in archive.namelist()]
    others = [name for name in names if name != LABELS]
    return others[0] if IMAGES not in names and len(others) == 1 else IMAGES


def _has(archive: _Archive, name: str) -> bool:
    return f"{name}.npy" in archive.namelist()


def _header(path: pathlib.Path, archive: _Archive, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Returns the shape and dtype of an array, after it is checked that they fit the bytes there are."""
    if not _has(archive, name):
        found = ", ".join(sorted(entry.removesuffix(".npy") for entry in archive.namelist())[:8]) or "nothing"
        raise ValueError(f"{path} must have the array {name}, but has {found}")
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as file:
        try:
            shape, fortran, dtype = _read_header(file)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError) as error:
            raise ValueError(f"{path}: {name} is not an array as NumPy writes them ({error})") from error
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or (fortran and len(shape) > 2) or size != info.file_size - file.tell():
            raise ValueError(
                f"{path}: {name} must be numbers in C order that fill its {info.file_size - file.tell():,} bytes, not "
                f"{dtype} {list(shape)}{' in Fortran order' if fortran else ''}"
            )
    return shape, dtype


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _read(path: pathlib.Path, archive: _Archive, name: str) -> np.ndarray:
    """Returns an array whose `_header` was checked."""
    with archive.open(f"{name}.npy") as file:
        shape, fortran, dtype = _read_header(file)
        content = _read_exactly(path, file, math.prod(shape) * dtype.itemsize, name)
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")


def _read_exactly(path: pathlib.Path, file: IO[bytes], size: int, name: str) -> bytes:
    content = file.read(size)
    if len(content) != size:
        raise ValueError(f"{path}: {name} is truncated; write or fetch the file again")
    return content


def _read_count(path: pathlib.Path, archive: _Archive) -> int | None:
    if not _has(archive, COUNT):
        return None
    shape, dtype = _header(path, archive, COUNT)
    if shape != () or not np.issubdtype(dtype, np.integer):
        raise ValueError(f"{path}: {COUNT} must be one integer, not {dtype} {list(shape)}")
    return int(_read(path, archive, COUNT))
