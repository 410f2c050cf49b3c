"""The latent cache: a data set as the moments that a trained autoencoder gives its images, on disk.

A cache is a folder with an ArrayRecord file a split and `manifest.json`, which is written last: a folder without it
is incomplete. A record is a little-endian int32 label and the float16 moments [F, h, w, 2c] of an image and, where
F = 2, of its mirror image; the first c channels of the moments are the posterior's mean, the others its log-variance.
Latents are sampled from them in training, as an image is encoded anew each time it is seen.
"""

import dataclasses
import json
import os
import pathlib
import urllib.parse
from collections.abc import Sequence
from typing import Any

import numpy as np

from dit_jax.data.sources import Source

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
LABEL_DTYPE, MOMENTS_DTYPE = np.dtype("<i4"), np.dtype("<f2")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a cache holds and where it comes from."""

    version: int  # of the format of the cache
    data: dict[str, Any]  # `sources.source_identity` of the data set
    autoencoder: str  # identity of the autoencoder (sha256)
    splits: dict[str, int]  # name -> number of examples
    latent_shape: tuple[int, int, int]  # (h, w, c)
    num_flips: int  # 1: the images; 2: also their mirror images
    dtype: str  # of the moments
    mean: list[float]  # [c] of the latents of the training split, sampled
    std: list[float]  # [c]
    scale: float  # 1 / std over all channels together: latents are multiplied by it (LDM, appendix G)


class LatentCacheWriter:
    """Writes a cache: `write` for every batch, then `finish`.

    A folder that an interrupted run left incomplete is started anew.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = pathlib.Path(path)
        if (self._path / MANIFEST_NAME).exists():
            raise ValueError(f"{self._path} already holds a latent cache; delete it or choose another --output")
        try:
            self._path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{self._path} must be a folder to write to: {error}; choose another --output") from error
        for stale in self._path.glob("latents-*.arrayrecord"):
            stale.unlink()
        self._files: dict[str, Any] = {}
        self._counts: dict[str, int] = {}
        self._sums: dict[str, np.ndarray] = {}
        self._shape: tuple[int, ...] | None = None

    def write(self, split: str, moments: np.ndarray, labels: Sequence[int]) -> None:
        """Appends examples to a split.

        Args:
          split: its name.
          moments: [B, F, h, w, 2c] float32.
          labels: [B] integers.
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        if split not in self._files:
            # Groups of one record, for random access; float16 noise does not compress, so reading need not pay for it.
            path = str(self._path / _file_name(split))
            self._files[split] = ArrayRecordWriter(path, "group_size:1,uncompressed")
            self._counts[split] = 0
        self._shape = self._shape or moments.shape[1:]
        assert moments.ndim == 5 and moments.shape[1:] == self._shape, (moments.shape, self._shape)
        with np.errstate(over="ignore"):  # an overflow is an error below
            stored = np.asarray(moments).astype(MOMENTS_DTYPE)
        if not np.isfinite(stored).all():
            raise ValueError(
                f"the autoencoder's moments must be finite in float16, but are not for an image of split {split!r} "
                f"in {self._counts[split]} to {self._counts[split] + len(stored) - 1}; train the autoencoder further"
            )
        for example, label in zip(stored, labels, strict=True):
            self._files[split].write(np.array(label, LABEL_DTYPE).tobytes() + example.tobytes())
        self._counts[split] += len(stored)
        self._sums[split] = self._sums.get(split, 0) + _sums(stored)

    def finish(self, data_identity: dict[str, Any], autoencoder_identity: str, train_split: str) -> Manifest:
        """Completes the cache; returns its manifest, with the statistics of the training split."""
        assert train_split in self._files, (train_split, list(self._files))
        for file in self._files.values():
            file.close()
        num_flips, height, width, channels = self._shape
        mean, square, variance = self._sums[train_split] / (self._counts[train_split] * num_flips * height * width)
        second_moment = square + variance  # E[z^2] of z = mean + sigma * noise; E[z] is that of the mean
        manifest = Manifest(
            version=FORMAT_VERSION,
            data=data_identity,
            autoencoder=autoencoder_identity,
            splits=self._counts,
            latent_shape=(height, width, channels // 2),
            num_flips=num_flips,
            dtype=MOMENTS_DTYPE.name,
            mean=mean.tolist(),
            std=np.sqrt(second_moment - mean**2).tolist(),
            scale=float(1 / np.sqrt(second_moment.mean() - mean.mean() ** 2)),
        )
        temporary = self._path / f"{MANIFEST_NAME}.tmp"
        temporary.write_text(json.dumps(dataclasses.asdict(manifest), indent=2) + "\n")
        os.replace(temporary, self._path / MANIFEST_NAME)
        return manifest


def read_manifest(path: str | os.PathLike) -> Manifest:
    """Returns the manifest of a complete cache, or raises ValueError with the remedy."""
    path = pathlib.Path(path)
    if not path.is_dir():
        raise ValueError(f"no latent cache at {path}; write one with `dit-jax encode --output={path}`")
    if not (path / MANIFEST_NAME).exists():
        raise ValueError(
            f"latent cache {path} is incomplete (it has no {MANIFEST_NAME}); run `dit-jax encode --output={path}` again"
        )
    remedy = f"delete {path} and run `dit-jax encode --output={path}` again"
    try:
        values = json.loads((path / MANIFEST_NAME).read_text())
        version = values["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / MANIFEST_NAME} is damaged ({error!r}); {remedy}") from error
    if version > FORMAT_VERSION:
        raise ValueError(
            f"latent cache {path} has format {version}, but this dit_jax reads up to {FORMAT_VERSION}; upgrade dit_jax"
        )
    differing = sorted({field.name for field in dataclasses.fields(Manifest)} ^ set(values))
    if differing:
        raise ValueError(f"{path / MANIFEST_NAME} has missing or unknown keys {', '.join(differing)}; {remedy}")
    return Manifest(**values | {"latent_shape": tuple(values["latent_shape"])})


def open_latents(path: str | os.PathLike, split: str) -> Source:
    """Returns a split of a cache as a sequence of `{"moments": [F, h, w, 2c] float32, "label": int}`."""
    return _Latents(pathlib.Path(path), split)


class _Latents(Source):
    def __init__(self, path: pathlib.Path, split: str):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        manifest = read_manifest(path)
        if split not in manifest.splits:
            raise ValueError(f"latent cache {path} has no split {split!r}, only {', '.join(manifest.splits)}; use one")
        height, width, channels = manifest.latent_shape
        self._shape = (manifest.num_flips, height, width, 2 * channels)
        self._file = path / _file_name(split)
        try:
            self._records = ArrayRecordDataSource(str(self._file))
        except RuntimeError as error:
            raise self._damaged(error) from error
        if len(self._records) != manifest.splits[split]:
            raise self._damaged(f"{len(self._records)} records instead of {manifest.splits[split]}")

    def __len__(self) -> int:
        return len(self._records)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        try:
            records = self._records.__getitems__(indices)
        except RuntimeError as error:  # ArrayRecord's checksums
            raise self._damaged(error) from error
        return [self._example(record) for record in records]

    def _example(self, record: bytes) -> dict[str, Any]:
        label = np.frombuffer(record, LABEL_DTYPE, count=1)[0]
        moments = np.frombuffer(record, MOMENTS_DTYPE, offset=LABEL_DTYPE.itemsize).reshape(self._shape)
        return {"moments": moments.astype(np.float32), "label": int(label)}

    def _damaged(self, reason: Any) -> ValueError:
        folder = self._file.parent
        return ValueError(
            f"latent cache file {self._file} is truncated or damaged ({reason}); delete {folder} and run "
            f"`dit-jax encode --output={folder}` again"
        )


def _file_name(split: str) -> str:
    """Returns the file of a split; names such as "train[:90%]" are quoted as in a URL."""
    return f"latents-{urllib.parse.quote(split, safe='')}.arrayrecord"


def _sums(moments: np.ndarray) -> np.ndarray:
    """Returns the sums over examples and positions of the posterior's mean, mean^2 and variance: [3, c] float64."""
    mean, log_variance = np.split(moments.astype(np.float64), 2, axis=-1)
    return np.stack([x.sum(axis=tuple(range(x.ndim - 1))) for x in (mean, mean**2, np.exp(log_variance))])
