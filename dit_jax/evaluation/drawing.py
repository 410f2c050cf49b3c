"""Drawing many images so that a kill loses the last few alone: `Drawing`, and the files of `dit-jax sample`.

A part is what one device draws at once. Its bits depend on neither the number of devices nor on what was drawn before a
kill, so that the images are the same in every case.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import pathlib
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from dit_jax import terminal
from dit_jax.checkpoint import params_digest
from dit_jax.config import SamplingConfig, check_sampling, config_to_dict
from dit_jax.evaluation.generate import (
    ClassifierGuide,
    KnownImages,
    Path,
    check_conditions,
    check_known,
    make_draw,
    put_rows,
)
from dit_jax.evaluation.loaded import LoadedModel
from dit_jax.evaluation.parts import Parts
from dit_jax.evaluation.protocol import refuse_other
from dit_jax.evaluation.reference import SAMPLES_NAME
from dit_jax.files import read_json, to_json, write_one_of_many, write_text_whole, written_whole
from dit_jax.metrics.adm_files import SamplesFile
from dit_jax.parallel.preemption import heed
from dit_jax.types import Conditions

RECORD_NAME, PICTURES_NAME = "samples.json", "png"
PNG_THREADS, PNG_AT_ONCE = 4, 256
NPZ_TIME = (1980, 1, 1, 0, 0, 0)  # of every member, so that the bytes do not tell when they were written


class Drawing:
    """The images of some conditions by a model: image i is that of `LoadedModel.sample`, of any number of devices.

    Args:
      model: of stage "diffusion"; conditions: labels [N] or more, as for `LoadedModel.sample`; sampling: how; seed: of
        the noise; known: images to paint in or to start from; classifier: one that leads to the labels; path: of
        images between others.
    """

    def __init__(
        self,
        model: LoadedModel,
        conditions: Sequence[int] | Conditions,
        sampling: SamplingConfig,
        seed: int,
        known: KnownImages | None = None,
        classifier: ClassifierGuide | None = None,
        path: Path | None = None,
    ):
        self._conditions, self.num_images = check_conditions(model.config, conditions, classifier)
        check_sampling(sampling, model.config)
        check_known(model.config, sampling, known)
        self._known, self._guide, self._path = known, classifier, path
        self._model, self._sampling, self._seed = model, sampling, seed

    def identity(self) -> dict[str, Any]:
        """Returns what determines the images to the last bit, as JSON values."""
        model, device = self._model, self._model.mesh.devices.flat[0]
        config = config_to_dict(model.config)
        compute = {name: value for name, value in config["compute"].items() if name != "compilation_cache"}
        return {
            "params": params_digest(model.params),
            "autoencoder": None if model.codec is None else params_digest(model.codec.params),
            "latents_scale": None if model.codec is None else float(model.codec.scale),
            **({"latents_shift": model.codec.shift} if model.codec is not None and model.codec.shift else {}),
            "denoiser": dataclasses.asdict(model.config.denoiser),
            "diffusion": config["diffusion"],
            "compute": compute,
            "input_shape": model.config.input_shape,
            "sampling": dataclasses.asdict(self._sampling),
            "seed": self._seed,
            "num_samples": self.num_images,
            "conditions": {name: _digest(value) for name, value in self._conditions.items()},
            "known": None if self._known is None else _digest(self._known),
            "path": None if self._path is None else _digest(self._path),
            "classifier": self._guide and {"params": params_digest(self._guide.params), "scale": self._guide.scale},
            "device": f"{device.platform} {device.device_kind}",
            "jax": jax.__version__,
        }

    def draw(self, parts: Parts, progress: bool = False) -> Iterator[np.ndarray]:
        """Draws what `parts` (of this identity) does not hold yet, then yields all images in order, some at a time.

        Yields:
          uint8 [B, H, W, 3], or latents float32 [B, h, w, c] of a model without an autoencoder.
        """
        size = self._sampling.batch_size
        numbers = range(-(-self.num_images // size))
        missing = [number for number in numbers if parts.read(number) is None]
        done = self.num_images - sum(len(self._rows(number)) for number in missing)
        with terminal.progress(
            total=self.num_images, initial=done, unit="image", description="sampling: image", active=progress
        ) as bar:
            for number, images in self._drawn(missing):
                parts.write(number, images)
                bar.update(len(images))
                heed()
        for number in numbers:
            images = parts.read(number)
            if images is None:
                raise ValueError(f"part {number} of {parts.path} was damaged or removed meanwhile; run it again")
            yield images

    def _rows(self, number: int) -> np.ndarray:
        """Returns the numbers of a part's images."""
        size = self._sampling.batch_size
        return np.arange(number * size, min((number + 1) * size, self.num_images))

    def _drawn(self, numbers: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (number, images) of parts, drawn one a device at a time."""
        model, size = self._model, self._sampling.batch_size
        draw, batch_size = make_draw(model.config, self._sampling, model.mesh)
        queue = collections.deque()  # the devices draw while what they drew before is written

        def finished() -> Iterator[tuple[int, np.ndarray]]:
            drawn, images = queue.popleft()
            images = np.asarray(images)
            for place, number in enumerate(drawn):
                yield number, images[place * size : place * size + len(self._rows(number))]

        at_once = batch_size // size
        for start in range(0, len(numbers), at_once):
            drawn = numbers[start : start + at_once]
            padded = [*drawn, *[drawn[-1]] * (at_once - len(drawn))]
            rows = np.concatenate([np.resize(self._rows(number), size) for number in padded])
            rows, (conditions, known, path) = put_rows(rows, (self._conditions, self._known, self._path), model.mesh)
            inputs = {"known": known, "path": path, "classifier": self._guide}
            queue.append((drawn, draw(model.params, model.codec, self._seed, rows, conditions, **inputs)))
            if len(queue) > 1:
                yield from finished()
        while queue:
            yield from finished()


def write_samples(path: pathlib.Path, batches: Iterator[np.ndarray], labels: np.ndarray, num_kept: int) -> np.ndarray:
    """Writes `samples.npz` (`arr_0`: the images, `labels`), a few images in memory at a time; returns the first ones.

    Equal images give equal bytes. The file appears whole, or not at all.
    """
    kept, first = [], next(batches)
    header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False}
    with written_whole(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open(_member("arr_0.npy"), "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header | {"shape": (len(labels), *first.shape[1:])})
            for batch in itertools.chain([first], batches):
                file.write(np.ascontiguousarray(batch).data)
                if sum(map(len, kept)) < num_kept:
                    kept.append(batch)
        with archive.open(_member("labels.npy"), "w", force_zip64=True) as file:
            np.save(file, labels, allow_pickle=False)
    return np.concatenate(kept)[:num_kept]


def write_picture(path: pathlib.Path, picture: np.ndarray) -> None:
    """Writes a picture, [H, W, 3] uint8, as PNG; the file appears whole, or not at all."""
    with written_whole(path) as temporary:
        Image.fromarray(picture).save(temporary, format="png")


def write_pngs(folder: pathlib.Path, samples: SamplesFile) -> None:
    """Writes the images of a file as 000000.png, 000001.png, ... to a folder; what is there already stays as it is."""
    folder.mkdir(exist_ok=True)

    def write(image: np.ndarray, number: int) -> None:
        path, content = folder / f"{number:06d}.png", io.BytesIO()
        Image.fromarray(image).save(content, format="png")
        if not path.is_file() or path.read_bytes() != content.getvalue():
            write_one_of_many(path, content.getvalue())

    numbers = itertools.count()
    with (
        concurrent.futures.ThreadPoolExecutor(PNG_THREADS) as threads,
        terminal.progress(total=len(samples), unit="image", description="writing: image") as bar,
    ):
        for batch in samples.batches(PNG_AT_ONCE):
            for _ in threads.map(write, batch, numbers):
                bar.update()


def check_output(folder: pathlib.Path, identity: dict[str, Any], num_frames: int, overwrite: bool) -> None:
    """Raises ValueError where a folder holds another drawing; with `overwrite` takes away what would stay of it.

    identity: of the drawing; num_frames: of its `denoising.png`, 0 for none now.
    """
    record, frames = folder / RECORD_NAME, {"num_frames": num_frames} if num_frames else {}
    refuse_other(record, identity | frames, overwrite)
    if overwrite:
        with contextlib.suppress(ValueError):
            refuse_other(record, identity | frames, overwrite=False)
            return
        record.unlink()
        (folder / "denoising.png").unlink(missing_ok=True)
        for picture in (folder / PICTURES_NAME).glob("[0-9]*.png"):
            picture.unlink()
    elif (folder / SAMPLES_NAME).exists() and not record.exists() and not Parts(folder, identity).path.exists():
        raise ValueError(
            f"{folder / SAMPLES_NAME} is there, but no {RECORD_NAME} that says how it was drawn; give --output=DIR for "
            "another place, or --overwrite to draw in its place"
        )


def write_record(folder: pathlib.Path, identity: dict[str, Any], num_frames: int = 0) -> None:
    """Writes `samples.json`: what the images of `samples.npz` were drawn with, and that file's SHA-256.

    num_frames: of `denoising.png`; 0: there is none.
    """
    record = identity | {"sha256": file_digest(folder / SAMPLES_NAME)}
    record |= {"num_frames": num_frames} if num_frames else {}
    write_text_whole(folder / RECORD_NAME, to_json(record))


def is_drawn(folder: pathlib.Path, identity: dict[str, Any]) -> bool:
    """Returns whether `samples.npz` is there, as it was drawn with this identity."""
    try:
        record = read_json(folder / RECORD_NAME)
        wanted = json.loads(json.dumps(identity)) | {"sha256": file_digest(folder / SAMPLES_NAME)}
    except (FileNotFoundError, ValueError):
        return False
    return {name: value for name, value in record.items() if name != "num_frames"} == wanted


def file_digest(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(condition: Any) -> str:
    """Returns the SHA-256 of a raw condition's arrays."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(condition):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()


def _member(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name, NPZ_TIME)
    member.compress_type = zipfile.ZIP_DEFLATED
    return member
