"""Evaluations with their protocol cards: of a checkpoint, whose images are drawn here, and of a file of samples."""

import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dit_jax.checkpoint import params_digest
from dit_jax.config import SamplingConfig
from dit_jax.evaluation.drawing import Drawing
from dit_jax.evaluation.evaluator import Evaluator
from dit_jax.evaluation.generate import evaluation_labels
from dit_jax.evaluation.loaded import LoadedModel
from dit_jax.evaluation.parts import Parts
from dit_jax.evaluation.protocol import UINT8_RULE, make_card, software
from dit_jax.evaluation.samples import FolderSamples
from dit_jax.metrics.adm_files import SamplesFile
from dit_jax.models.cost import describe_cost
from dit_jax.parallel.distributed import is_first

NOT_PROTOCOL = ("batch_size", "decode_batch_size")  # of the sampling: how it is computed, not what
READ_IMAGES = 1024  # of a file at once


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """How the images of a checkpoint are drawn."""

    sampling: SamplingConfig
    num_samples: int
    labels: str = "balanced"  # or "random"
    seed: int = 0


def evaluate_checkpoint(
    model: LoadedModel,
    average: str | None,
    settings: SampleSettings,
    evaluator: Evaluator,
    asked: Sequence[str] | None,
    folder: pathlib.Path,
) -> dict[str, Any]:
    """Returns the card of images that a diffusion model draws now.

    Args:
      average: what the model's weights are, for the card; asked: metrics, None for all that can be measured.
      folder: for the images while they are drawn, so that an evaluation that is killed goes on.
    """
    if model.codec is None and model.config.latents is not None:
        raise ValueError("the model has no autoencoder to decode its latents with; convert it with --autoencoder")
    metrics, left_out = evaluator.choose(asked, settings.num_samples, has_labels=True)
    labels = evaluation_labels(settings.labels, settings.num_samples, model.config.data.num_classes, settings.seed)
    with drawn(model, labels, settings, folder) as images:
        found = evaluator.evaluate(images, labels, metrics)
    return make_card(
        found.values,
        [*model.notes, *found.notes],
        left_out,
        checkpoint_subject(model) | {"images": found.images},
        checkpoint_protocol(model, average, settings) | evaluator.protocol(metrics),
    )


@contextlib.contextmanager
def drawn(
    model: LoadedModel, labels: np.ndarray, settings: SampleSettings, folder: pathlib.Path
) -> Iterator[Iterator[np.ndarray]]:
    """Gives the images of labels, some at a time; each of several processes gets all of them, at once."""
    if jax.process_count() > 1:
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, sampling=settings.sampling))
        yield iter([model.sample(labels, seed=settings.seed, progress=is_first())])
        return
    drawing = Drawing(model, labels, settings.sampling, settings.seed)
    folder.mkdir(parents=True, exist_ok=True)
    with Parts(folder, drawing.identity()) as parts:
        yield drawing.draw(parts, progress=True)
        parts.remove()


def checkpoint_subject(model: LoadedModel) -> dict[str, Any]:
    """Returns which checkpoint it is, what its network costs, and what was spent on its training."""
    cost, batch_size = describe_cost(model.config), model.config.training.global_batch_size
    return {
        "checkpoint": params_digest(model.params),
        "step": model.step,
        "parameters": cost["parameters"],
        "gflops": cost["macs"] / 1e9,  # the paper's: multiply-adds of one forward pass
        "training_gflops": 3 * cost["macs"] * batch_size * model.step / 1e9,  # forward and backward, in the same unit
    }


def checkpoint_protocol(model: LoadedModel, average: str | None, settings: SampleSettings) -> dict[str, Any]:
    """Returns what a card says of how a checkpoint's images are drawn."""
    sampling = {k: v for k, v in dataclasses.asdict(settings.sampling).items() if k not in NOT_PROTOCOL}
    samples = {"num_samples": settings.num_samples, "labels": settings.labels, "seed": settings.seed}
    samples |= {"average": average}
    samples |= {"decoder": None if model.codec is None else params_digest(model.codec.params), "uint8": UINT8_RULE}
    return {"samples": samples | {"sampling": sampling}}


def evaluate_file(
    file: SamplesFile | FolderSamples, num_samples: int | None, evaluator: Evaluator, asked: Sequence[str] | None
) -> dict[str, Any]:
    """Returns the card of the first images of a file or folder, all of them where `num_samples` is None."""
    count = len(file) if num_samples is None else num_samples
    if count > len(file):
        raise ValueError(f"--num_samples={count} must be at most {len(file)}, the images of {file.path}")
    metrics, left_out = evaluator.choose(asked, count, has_labels=file.labels is not None)
    found = evaluator.evaluate(
        first_images(file.batches(READ_IMAGES), count), None if file.labels is None else file.labels[:count], metrics
    )
    return make_card(
        found.values,
        found.notes,
        left_out,
        {"images": found.images},
        file_protocol(file, count) | evaluator.protocol(metrics),
    )


def file_settings(
    file: SamplesFile | FolderSamples, num_samples: int | None, evaluator: Evaluator, asked: Sequence[str] | None
) -> dict[str, Any]:
    """Returns what the card of `evaluate_file` will hold beside the figures; this reads the images."""
    count = num_samples or len(file)
    metrics, _ = evaluator.choose(asked, count, has_labels=file.labels is not None)
    digest = hashlib.sha256()
    for batch in first_images(file.batches(READ_IMAGES), min(count, len(file))):
        digest.update(batch.tobytes())
    protocol = file_protocol(file, count) | evaluator.protocol(metrics) | {"software": software()}
    return {"images": digest.hexdigest()} | protocol


def file_protocol(file: SamplesFile | FolderSamples, count: int) -> dict[str, Any]:
    """Returns what a card says of samples that were not drawn now."""
    labels = None if file.labels is None else "of the file"
    return {"samples": {"num_samples": count, "labels": labels, "source": file.kind}}


def first_images(batches: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """Yields the first images of batches; no batch after them is read."""
    while count > 0:
        batch = next(batches)[:count]
        count -= len(batch)
        yield batch
