"""The latent cache: a data set as what a trained autoencoder makes of its images, on disk.

A cache is a folder. Each split is a row of ArrayRecord files, shards, of a fixed number of consecutive examples:

    encoding.json                                    the plan: everything that decides the bytes; written first
    latents-<split>-00003-of-00008.arrayrecord       a shard; the split's name is quoted as in a URL
    latents-<split>-00003-of-00008.json              its count, bytes, SHA-256 and sums; a shard without it is not there
    manifest.json                                    what readers need; written last: a cache without it is unfinished
    autoencoder/                                     the weights that decode the latents (of `dit-jax encode`)
    .locks/                                          empty files, locked by whoever writes what they are named after

Every file is written aside, flushed and renamed, and a shard is a pure function of the plan and its number. So any
number of processes may fill a cache together, and one that is killed at any moment leaves neither a gap nor a copy.
The JSON files hold a sum of their own content, and a shard's one also of the plan that it was written by. Caches of
format 2 have neither: they are read, and get sums when they are checked.
(On GPUs the last bits also depend on which kernels XLA's autotuner chose in a process.)

A record is a msgpack map of `label`, of the data set's extra fields, and of `moments`: the bytes of [F, h, w, k] in
the manifest's dtype, for an image and, where F = 2, for its mirror image. Where the autoencoder's posterior is a
distribution (`stochastic`), k = 2c: c channels of its mean, then c of its log-variance, from which training draws
latents, as if an image were encoded anew each time it is seen. Where it is not (VQ), k = c: the latent itself.

With a frozen text encoder, a record has `text`, too: the bytes, in that dtype, of the `states` [l, E] of a caption's l
tokens, none for padding, and of their `pooled` state [P].
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import ml_dtypes
import msgpack
import numpy as np

from dit_jax.config import dataclass_from_json
from dit_jax.data.identity import in_form_of, without_place
from dit_jax.data.sources import Source
from dit_jax.files import (
    SUM_KEY,
    check_seal,
    file_lock,
    is_of_this_process,
    patiently,
    read_json,
    sealed,
    sha256_of,
    to_json,
    write_text_whole,
    written_whole,
)

FORMAT_VERSION = 3
UNSEALED_VERSION = 2  # of caches whose records have no sums
PLAN_NAME, MANIFEST_NAME, LOCKS_DIR = "encoding.json", "manifest.json", ".locks"
DTYPES = {"float16": np.dtype("<f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}  # that moments may be stored in
SIDECAR_KEYS = {"count", "bytes", "sha256", "sums"}  # and "plan"; older ones have none
FEW = 64  # examples that are read sooner one after another than by ArrayRecord's threads: 16 in 0.2 ms, not in 4
SUMMED = 3  # rows of a shard's sums: the posterior's mean, mean^2 and variance


@dataclasses.dataclass(frozen=True)
class CachedText:
    """A frozen text encoder whose states a cache holds, and what it encoded."""

    field: str  # of an example: its caption
    encoder: str  # identity of the text encoder and its tokenizer (sha256)
    max_length: int  # tokens of a caption; of a longer one the end is cut
    width: int  # E
    pooled_width: int  # P


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides the bytes of a cache. The fields after `shard_size` matter to the last bits only."""

    data: dict[str, Any]  # `sources.source_identity` of the data set, with the number of examples of each split
    train_split: str  # whose statistics the manifest has
    autoencoder: str  # identity of the autoencoder (sha256)
    latent_shape: tuple[int, int, int]  # (h, w, c)
    stochastic: bool  # moments are a mean and a log-variance; False: the latent itself
    num_flips: int  # 1: the images; 2: also their mirror images
    dtype: str  # of the moments
    extra_fields: tuple[str, ...]  # of an example, beside its label
    shard_size: int  # examples of a shard; the last one of a split has what is left
    batch_size: int  # images of a device call; batches start anew at each shard
    num_devices: int  # that a batch is split over
    device: str  # their kind
    jax: str  # version
    text: CachedText | None = None
    version: int = FORMAT_VERSION


EXECUTION_KEYS = ("batch_size", "num_devices", "device", "jax")  # of a plan: a cache that is whole may have other ones


class Shard(NamedTuple):
    """A row of consecutive examples of a split; `name` is that of its files, without a suffix."""

    name: str
    split: str
    start: int
    count: int

    @property
    def file(self) -> str:
        """The name of the ArrayRecord file."""
        return f"{self.name}.arrayrecord"

    @property
    def sidecar(self) -> str:
        """The name of the file that says that the shard is there."""
        return f"{self.name}.json"


class StoredShard(NamedTuple):
    """A shard as the manifest lists it."""

    file: str
    count: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a cache holds and where it comes from."""

    version: int  # of the format of the cache
    data: dict[str, Any]  # as in the plan, and so on
    autoencoder: str
    splits: dict[str, int]  # name -> number of examples
    latent_shape: tuple[int, int, int]
    stochastic: bool
    num_flips: int
    dtype: Literal["float16", "bfloat16"]
    extra_fields: tuple[str, ...]
    mean: list[float]  # [c] of the latents of the training split, sampled
    std: list[float]  # [c]
    scale: float  # 1 / std over all channels together: latents are multiplied by it (LDM, appendix G)
    shards: dict[str, list[tuple[str, int, int, str]]]  # of each split, in order: `StoredShard`s
    text: CachedText | None = None


def split_shards(split: str, num_examples: int, shard_size: int) -> list[Shard]:
    """Returns the shards of a split; names such as "train[:90%]" are quoted as in a URL."""
    total, quoted = -(-num_examples // shard_size), urllib.parse.quote(split, safe="")
    return [
        Shard(
            f"latents-{quoted}-{number:05}-of-{total:05}",
            split,
            number * shard_size,
            min(shard_size, num_examples - number * shard_size),
        )
        for number in range(total)
    ]


class LatentCacheWriter:
    """Fills a cache, alone or together with other processes that have the same plan.

    `missing_shards` hands out what there is to write, `write_shard` writes it, `finish` completes the cache.
    """

    def __init__(self, path: str | os.PathLike, plan: Plan):
        """Makes the folder and writes the plan, or compares it with the one that is there.

        A plan that is damaged, or missing beside a manifest, is written again, where the shards tell that it was this
        one.

        Raises:
          ValueError: where the folder holds a cache of another plan, or cannot be written.
        """
        self.path = pathlib.Path(path)
        self.mended: list[str] = []  # what was damaged beside the shards, and is written again
        self._plan = json.loads(json.dumps(dataclasses.asdict(plan)))  # as it reads from the file
        splits = plan.data["splits"].items()
        self.shards = [shard for split, size in splits for shard in split_shards(split, size, plan.shard_size)]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with self.lock(PLAN_NAME):
                self._remove_left_behind(PLAN_NAME)
                if (self.path / PLAN_NAME).exists() or (self.path / MANIFEST_NAME).exists():
                    self._mend_plan()
                else:
                    self._write(PLAN_NAME, self._plan)
        except OSError as error:
            raise ValueError(
                f"--output={path} must be a folder to write to: {error}; choose another --output"
            ) from error
        self.was_complete = (self.path / MANIFEST_NAME).exists()
        self._require_plan(ignored=EXECUTION_KEYS if self.was_complete else ())
        stored = self._read_plan()
        self._had_no_sums = stored["version"] == UNSEALED_VERSION
        # What was written is of the stored plan, which may be of another machine, or tell of another place of the data.
        self._written_by = stored | {"version": FORMAT_VERSION}

    def lock(self, name: str, wait: bool = True, on_wait: Callable[[], None] | None = None) -> AbstractContextManager:
        """Returns the lock (`file_lock`) of what has this name in the cache."""
        return file_lock(self.path / LOCKS_DIR / name, wait, on_wait)

    def is_written(self, shard: Shard) -> bool:
        """Returns whether a shard is there, by its sidecar and its size."""
        return self._read_sidecar(shard) is not None

    def is_intact(self, shard: Shard) -> bool:
        """Returns whether a shard is there and has the SHA-256 that it was written with."""
        sidecar = self._read_sidecar(shard)
        return sidecar is not None and sha256_of(self.path / shard.file) == sidecar["sha256"]

    def discard(self, shards: Sequence[Shard]) -> None:
        """Takes back damaged shards, and with them the manifest, so that they are written again."""
        self._require_plan()  # the new shards must be what the others are, bit for bit
        for shard in shards:
            with self.lock(shard.name):
                if not self.is_intact(shard):  # another process may have written it since
                    (self.path / shard.sidecar).unlink(missing_ok=True)
        # Last: a cache with a manifest is checked whole, so a kill before this line loses nothing.
        (self.path / MANIFEST_NAME).unlink(missing_ok=True)

    def missing_shards(self, on_wait: Callable[[Shard], None] | None = None) -> Iterator[Shard]:
        """Yields shards to write, each locked until the next is asked for; ends when all are there.

        Shards that other processes write are left to them; towards the end this waits for them, and yields what
        one that was killed did not write.

        Args:
          on_wait: called with the shard that is waited for.
        """
        left, wait = self.shards, False
        while left := [shard for shard in left if not self.is_written(shard)]:
            found = False
            for shard in left[:1] if wait else left:
                with self.lock(shard.name, wait, lambda shard=shard: on_wait and on_wait(shard)) as held:
                    if held and not self.is_written(shard):
                        found = True
                        self._remove_left_behind(shard.name)
                        yield shard
                        assert self.is_written(shard), shard
            wait = not found and not wait  # after a wait, look for what others let go meanwhile

    def write_shard(
        self, shard: Shard, batches: Iterable[tuple[np.ndarray, Sequence[int], Sequence[dict[str, Any]]]]
    ) -> None:
        """Writes a shard that `missing_shards` gave.

        Args:
          shard: which.
          batches: its examples in order, some at a time: moments [B, F, h, w, k] float32, labels [B], extra fields [B]
            (with a text encoder, `text` among them: states [l, E] and pooled [P] float32).
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        height, width, channels = self._plan["latent_shape"]
        depth = 2 * channels if self._plan["stochastic"] else channels
        shape = (self._plan["num_flips"], height, width, depth)
        names = {*self._plan["extra_fields"], *(["text"] if self._plan["text"] else [])}
        count, sums = 0, np.zeros((SUMMED, channels))
        with written_whole(self.path / shard.file) as temporary:
            # Groups of one record, for random access; moments do not compress, so reading need not pay for it.
            writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
            try:
                for moments, labels, fields in batches:
                    assert moments.shape[1:] == shape, (moments.shape, shape)
                    stored = self._to_stored(moments, shard, count)
                    for example, label, extra in zip(stored, labels, fields, strict=True):
                        assert set(extra) == names, extra
                        if "text" in extra:
                            extra = extra | {"text": self._text_bytes(extra["text"], shard)}
                        writer.write(msgpack.packb({"label": int(label), **extra, "moments": example.tobytes()}))
                    count += len(stored)
                    sums += _sums(stored, self._plan["stochastic"])
            finally:
                _close(writer, self.path)
            assert count == shard.count, (count, shard)
            sidecar = {
                "count": count,
                "bytes": temporary.stat().st_size,
                "sha256": sha256_of(temporary),
                "sums": sums.tolist(),
                "plan": _plan_digest(self._written_by),
            }
        # Only now: the sidecar must not reach the disk before what it speaks of.
        self._write(shard.sidecar, sidecar)

    def write_folder(
        self,
        name: str,
        write: Callable[[pathlib.Path], None],
        is_intact: Callable[[pathlib.Path], bool] = lambda folder: True,
    ) -> None:
        """Adds a folder that `write` fills, unless it is there and intact."""
        with self.lock(name):
            self._remove_left_behind(name)
            folder = self.path / name
            there = folder.exists()
            if there and is_intact(folder):
                return
            with written_whole(folder) as temporary:
                temporary.mkdir()
                write(temporary)
                if there:
                    self.mended.append(f"{name}/")
                    os.replace(folder, folder.with_name(f".{name}.old.tmp"))
            self._remove_left_behind(name)

    def finish(self) -> Manifest:
        """Writes the manifest, the same whoever does; returns it, with the statistics of the training split.

        The records of a cache that had no sums get them.

        Raises:
          ValueError: where such records contradict one another.
        """
        with self.lock(MANIFEST_NAME):
            self._remove_left_behind(MANIFEST_NAME)
            if self._had_no_sums:
                self._require_no_contradiction()
                sidecars = [self._sidecar(shard) for shard in self.shards]
                if "class_names" in self._plan["data"]:  # which older releases did not write, either
                    names = {"class_names": self._plan["data"]["class_names"]}
                    self._written_by["data"] = names | self._written_by["data"]
                for shard, sidecar in zip(self.shards, sidecars, strict=True):
                    with self.lock(shard.name):
                        self._write(shard.sidecar, sidecar | {"plan": _plan_digest(self._written_by)})
                self._write(PLAN_NAME, self._written_by)  # only now: its shards must have sums
            file, values = self.path / MANIFEST_NAME, self._manifest_values()
            if not file.exists() or file.read_bytes() != to_json(sealed(values)).encode():
                if file.exists() and not self._had_no_sums:
                    self.mended.append(MANIFEST_NAME)
                self._write(MANIFEST_NAME, values)
            return read_manifest(self.path)

    def _manifest_values(self) -> dict[str, Any]:
        plan = self._written_by
        shards, sums = {split: [] for split in plan["data"]["splits"]}, 0
        for shard in self.shards:
            sidecar = self._sidecar(shard)
            shards[shard.split].append((shard.file, *(sidecar[key] for key in ("count", "bytes", "sha256"))))
            if shard.split == plan["train_split"]:
                sums = sums + np.array(sidecar["sums"])
        height, width, _ = plan["latent_shape"]
        num_positions = plan["data"]["splits"][plan["train_split"]] * plan["num_flips"] * height * width
        mean, square, variance = sums / num_positions
        second_moment = square + variance  # E[z^2] of z = mean + sigma * noise; E[z] is that of the mean
        variance_of_all = second_moment.mean() - mean.mean() ** 2
        if not variance_of_all > 0:
            raise ValueError(
                f"the latents of split {plan['train_split']!r} must differ, but all are {mean.mean():g}; "
                "train the autoencoder further"
            )
        names = {field.name for field in dataclasses.fields(Manifest)}
        values = {key: plan[key] for key in plan if key in names and plan[key] is not None}
        return values | {
            "splits": plan["data"]["splits"],
            "mean": mean.tolist(),
            "std": np.sqrt(np.maximum(second_moment - mean**2, 0)).tolist(),
            "scale": float(1 / np.sqrt(variance_of_all)),
            "shards": shards,
        }

    def _to_stored(self, moments: np.ndarray, shard: Shard, done: int) -> np.ndarray:
        with np.errstate(over="ignore"):  # an overflow is an error below
            stored = np.asarray(moments).astype(DTYPES[self._plan["dtype"]])
        finite = np.isfinite(stored).all(axis=tuple(range(1, stored.ndim)))
        if not finite.all():
            raise ValueError(
                f"the autoencoder's moments must be finite in {self._plan['dtype']}, but are not for image "
                f"{shard.start + done + int(finite.argmin())} of split {shard.split!r}; train the autoencoder further"
            )
        return stored

    def _text_bytes(self, text: dict[str, np.ndarray], shard: Shard) -> dict[str, bytes]:
        """Returns the states and the pooled state of a caption as they are stored."""
        with np.errstate(over="ignore"):
            stored = {name: np.asarray(text[name]).astype(DTYPES[self._plan["dtype"]]) for name in ("states", "pooled")}
        if not all(np.isfinite(array).all() for array in stored.values()):
            raise ValueError(
                f"the text encoder's states must be finite in {self._plan['dtype']}, but are not for a caption of "
                f"split {shard.split!r}; try --dtype=bfloat16"
            )
        return {name: array.tobytes() for name, array in stored.items()}

    def _require_no_contradiction(self) -> None:
        """Raises ValueError where a manifest without a sum is not what the shards' files, without sums too, tell."""
        try:
            stored = _checked(read_json(self.path / MANIFEST_NAME))
        except (ValueError, FileNotFoundError):
            return  # it is written again
        if stored["version"] != UNSEALED_VERSION:
            return
        if stored != json.loads(to_json(self._manifest_values() | {"version": UNSEALED_VERSION})):
            raise ValueError(
                f"{self.path / MANIFEST_NAME} contradicts the files of its shards, so one of them is damaged; delete "
                f"{self.path} and run the command again"
            )

    def _sidecar(self, shard: Shard) -> dict[str, Any]:
        sidecar = self._read_sidecar(shard)
        if sidecar is None:
            raise ValueError(f"{self.path / shard.file} vanished while others were written; run the command again")
        return sidecar

    def _read_sidecar(self, shard: Shard) -> dict[str, Any] | None:
        """Returns what a shard's sidecar says, None where the shard is not there."""
        try:
            values = read_json(self.path / shard.sidecar)
            size = (self.path / shard.file).stat().st_size
            if not (self._had_no_sums and isinstance(values, dict) and values.keys() == SIDECAR_KEYS):
                values = check_seal(values)
                if values.pop("plan", None) != _plan_digest(self._written_by):
                    return None
        except (FileNotFoundError, ValueError):
            return None
        whole = values.keys() == SIDECAR_KEYS
        return values if whole and (values["count"], values["bytes"]) == (shard.count, size) else None

    def _read_plan(self) -> dict[str, Any]:
        """Returns the plan that is there; raises ValueError where it is damaged or missing."""
        file = self.path / PLAN_NAME
        try:
            plan = _checked(read_json(file))
            if not isinstance(plan.get("data"), dict) or "version" not in plan:
                raise ValueError("it has no data or version")
            return plan
        except FileNotFoundError as error:
            raise ValueError(
                f"--output={self.path} holds a latent cache without {PLAN_NAME}, as an older dit_jax wrote it; delete "
                "it or choose another --output"
            ) from error
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}); delete {self.path} and run the command again") from error

    def _mend_plan(self) -> None:
        """Writes a damaged or missing plan again, where every shard that is there was written by ours."""
        try:
            self._read_plan()
        except ValueError:
            digests = set()
            for shard in self.shards:
                try:
                    digests.add(check_seal(read_json(self.path / shard.sidecar)).get("plan"))
                except (FileNotFoundError, ValueError):
                    continue  # this shard will be written again
            if digests != {_plan_digest(self._plan)}:
                raise
            self.mended.append(PLAN_NAME)
            self._write(PLAN_NAME, self._plan)

    def _require_plan(self, ignored: Sequence[str] = ()) -> None:
        """Raises ValueError unless the cache's plan is ours, but for the keys to ignore."""
        stored = self._read_plan()
        ours = self._plan | {"data": in_form_of(stored["data"], self._plan["data"])}
        if stored["version"] == UNSEALED_VERSION:
            ours["version"] = UNSEALED_VERSION
        stored, ours = _flat(stored), _flat(ours)
        # Older releases wrote no names of classes; their order is that of `data.version`.
        ignored = (*ignored, *({"data.class_names"} - stored.keys()))
        differing = [key for key in ours | stored if stored.get(key) != ours.get(key) and key not in ignored]
        if differing:
            key, more = differing[0], f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
            raise ValueError(
                f"--output={self.path} was begun with {key}={stored.get(key)!r}, but this command has "
                f"{ours.get(key)!r}{more}; give the same, or choose another --output"
            )

    def _remove_left_behind(self, name: str) -> None:
        """Removes what killed processes had begun of the files whose names begin so; the caller holds the lock."""
        for path in self.path.glob(f".{name}.*.tmp"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _write(self, name: str, values: dict[str, Any]) -> None:
        """Writes a record that is there as a whole or not at all; the caller holds its lock."""
        write_text_whole(self.path / name, to_json(sealed(values)))


def recorded_version(path: str | os.PathLike) -> str | None:
    """Returns the version of the data that a cache is of, or was begun of; None where there is none yet to be read."""
    for name in (PLAN_NAME, MANIFEST_NAME):
        try:
            version = _checked(read_json(pathlib.Path(path) / name))["data"]["version"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return version if isinstance(version, str) else None
    return None


def read_manifest(path: str | os.PathLike) -> Manifest:
    """Returns the manifest of a complete cache, or raises ValueError with the remedy."""
    path = pathlib.Path(path)
    remedy = f"run `dit-jax encode --output={path}` again"
    if not path.is_dir():
        raise ValueError(f"no latent cache at {path}; write one with `dit-jax encode --output={path}`")
    if not (path / MANIFEST_NAME).exists():
        raise ValueError(f"latent cache {path} is unfinished (it has no {MANIFEST_NAME}); {remedy}")
    try:
        values = read_json(path / MANIFEST_NAME)
        if SUM_KEY in values:  # first, so that a damaged version is told as what it is
            check_seal(values)
        version = int(values["version"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{path / MANIFEST_NAME} is damaged ({error}); {remedy}") from error
    if version not in (FORMAT_VERSION, UNSEALED_VERSION):
        newer = version > FORMAT_VERSION
        raise ValueError(
            f"latent cache {path} has format {version}, but this dit_jax reads {FORMAT_VERSION}; "
            + ("upgrade dit_jax" if newer else f"delete {path} and {remedy}")
        )
    try:
        manifest = dataclass_from_json(Manifest, _checked(values), "manifest")
        shards = {split: [StoredShard(*shard) for shard in stored] for split, stored in manifest.shards.items()}
        manifest = dataclasses.replace(manifest, shards=shards)
        _check_manifest(manifest)
    except ValueError as error:
        raise ValueError(f"{path / MANIFEST_NAME} is damaged ({error}); {remedy}") from error
    return manifest


def _check_manifest(manifest: Manifest) -> None:
    """Raises ValueError where a manifest's values contradict one another, or name files outside of its folder."""
    height, width, channels = manifest.latent_shape
    num_values = manifest.num_flips * height * width * channels * (2 if manifest.stochastic else 1)
    checks = {
        "latent_shape, num_flips": min(manifest.latent_shape) > 0 and manifest.num_flips in (1, 2),
        "mean, std": len(manifest.mean) == len(manifest.std) == channels,
        "scale": 0 < manifest.scale < float("inf"),
        "splits": manifest.splits.keys() == manifest.shards.keys() and manifest.splits == manifest.data.get("splits"),
        "data.num_classes": isinstance(manifest.data.get("num_classes"), int),
        "data.class_names": _are_names(manifest.data.get("class_names"), manifest.data.get("num_classes")),
        "text": manifest.text is None
        or min(manifest.text.max_length, manifest.text.width, manifest.text.pooled_width) > 0,
    }
    for split, shards in manifest.shards.items():
        sizes = [shard.count for shard in shards]
        names = [shard.file for shard in split_shards(split, len(shards), 1)]  # which has as many
        # Shards are written uncompressed: what unpacks to more than it is was made to fill the memory.
        size = num_values * DTYPES[manifest.dtype].itemsize
        checks |= {
            f"shards of {split!r}, their counts": min(sizes, default=0) > 0
            and sum(sizes) == manifest.splits.get(split),
            f"shards of {split!r}, their files": [shard.file for shard in shards] == names,
            f"shards of {split!r}, their bytes": all(shard.bytes >= shard.count * size for shard in shards),
        }
    for name, holds in checks.items():
        if not holds:
            raise ValueError(f"{name}: these cannot be")


def _are_names(names: Any, num_classes: Any) -> bool:
    """Returns whether these are the names of so many classes; an older cache has none."""
    return names is None or (
        isinstance(names, list) and len(names) == num_classes and all(isinstance(name, str) for name in names)
    )


def open_latents(path: str | os.PathLike, split: str) -> Source:
    """Returns a split of a cache as a sequence of `{"moments": [F, h, w, k] float32, "label": int}` and extra fields.

    With a text encoder each has `text`: `{"states": [l, E] float32, "pooled": [P] float32}`, l its caption's length.
    Every shard is there and has its size and count, or this raises ValueError; its content is checked as it is read.
    """
    return _Latents(pathlib.Path(path), split)


class _Latents(Source):
    def __init__(self, path: pathlib.Path, split: str):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        manifest = read_manifest(path)
        if split not in manifest.splits:
            raise ValueError(f"latent cache {path} has no split {split!r}, only {', '.join(manifest.splits)}; use one")
        height, width, channels = manifest.latent_shape
        self._shape = (manifest.num_flips, height, width, 2 * channels if manifest.stochastic else channels)
        self._dtype, self._path, self._name = DTYPES[manifest.dtype], path, f"split {split!r}"
        self._num_classes, self._text = manifest.data["num_classes"], manifest.text
        shards = manifest.shards[split]
        with concurrent.futures.ThreadPoolExecutor() as threads:  # a shared disk takes its time for each
            list(threads.map(lambda shard: patiently(functools.partial(self._check, shard)), shards))
        # With its range in the name, a file is not opened a second time to count its records.
        self._records = ArrayRecordDataSource([f"{path / shard.file}[0:{shard.count}]" for shard in shards])

    def __len__(self) -> int:
        return len(self._records)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        try:
            if len(indices) <= FEW:
                return [self._example(self._records[index]) for index in indices]
            return [self._example(record) for record in self._records.__getitems__(indices)]
        except (RuntimeError, ValueError, KeyError, TypeError) as error:  # ArrayRecord's checksums; no record of ours
            raise self._unreadable(self._name, error) from error

    def _example(self, record: bytes) -> dict[str, Any]:
        example = msgpack.unpackb(record)
        moments = np.frombuffer(example["moments"], self._dtype).reshape(self._shape)
        if type(example["label"]) is not int or not 0 <= example["label"] < self._num_classes:
            raise ValueError(f"label {example['label']!r} is none of the {self._num_classes} classes")
        if self._text is not None:
            example["text"] = self._text_states(example["text"])
        return example | {"moments": moments.astype(np.float32)}

    def _text_states(self, text: dict[str, bytes]) -> dict[str, np.ndarray]:
        shapes = {"states": (-1, self._text.width), "pooled": (self._text.pooled_width,)}
        arrays = {name: np.frombuffer(text[name], self._dtype).reshape(shape) for name, shape in shapes.items()}
        if len(arrays["states"]) > self._text.max_length:
            raise ValueError(f"a caption has {len(arrays['states'])} tokens, more than {self._text.max_length}")
        return {name: array.astype(np.float32) for name, array in arrays.items()}

    def _check(self, shard: StoredShard) -> None:
        from array_record.python.array_record_module import ArrayRecordReader

        file = self._path / shard.file
        if not file.exists():
            raise self._damaged(shard.file, "missing")
        size = file.stat().st_size
        if size != shard.bytes:
            raise self._damaged(shard.file, f"truncated or damaged ({size} bytes instead of {shard.bytes})")
        try:
            reader = ArrayRecordReader(str(file))
            count = reader.num_records()
            reader.close()
        except RuntimeError as error:
            raise self._unreadable(shard.file, error) from error
        if count != shard.count:
            raise self._damaged(shard.file, f"damaged ({count} records instead of {shard.count})")

    def _unreadable(self, what: str, error: Exception) -> ValueError:
        reason = " ".join(str(error).split())
        if is_of_this_process(error):
            lacks = "free memory, raise the limit of open files (ulimit -n) or mend the rights"
            return ValueError(f"{what} of latent cache {self._path} cannot be read ({reason}); {lacks}")
        return self._damaged(what, f"damaged ({reason})")

    def _damaged(self, what: str, how: str) -> ValueError:
        return ValueError(f"{what} of latent cache {self._path} is {how}; {_remedy(self._path)}")


def _remedy(path: pathlib.Path) -> str:
    return f"run `dit-jax encode --output={path}` again, which writes what is damaged or missing"


def _sums(stored: np.ndarray, stochastic: bool) -> np.ndarray:
    """Returns the sums over examples and positions of the posterior's mean, mean^2 and variance: [3, c] float64."""
    moments = stored.astype(np.float64)
    mean, log_variance = np.split(moments, 2, axis=-1) if stochastic else (moments, None)
    variance = np.exp(log_variance) if stochastic else np.zeros_like(mean)
    return np.stack([x.sum(axis=tuple(range(x.ndim - 1))) for x in (mean, mean**2, variance)])


def _checked(record: Any) -> dict[str, Any]:
    """Returns a manifest or plan without its sum; raises ValueError where that is not right.

    Only a record that says that it is of the format without sums may have none: a flipped bit makes no sum vanish and
    turns the version to that one.
    """
    if isinstance(record, dict) and record.get("version") == UNSEALED_VERSION and SUM_KEY not in record:
        return record
    return check_seal(record)


def _plan_digest(plan: dict[str, Any]) -> str:
    """Returns a SHA-256 of a plan, wherever its data is."""
    return sealed(plan | {"data": without_place(plan["data"])})[SUM_KEY]


def _flat(plan: dict[str, Any]) -> dict[str, Any]:
    """Returns a plan with keys such as "data.image_size"."""
    data, fields = plan["data"], plan["data"].get("fields") or {}
    flat = {f"data.{key}": value for key, value in data.items() if key != "fields"}
    flat |= {key: value for key, value in plan.items() if key != "data"}
    return flat | {f"data.fields.{key}": value for key, value in fields.items()}


def _close(writer: Any, folder: pathlib.Path) -> None:
    """Closes an ArrayRecordWriter, which says only here what it could not write."""
    try:
        writer.close()
    except RuntimeError as error:
        raise ValueError(f"{folder} cannot be written ({' '.join(str(error).split())}); make room there") from error
