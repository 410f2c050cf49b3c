"""Evaluations with their protocol cards: of a checkpoint, whose images are drawn here, and of a file of samples."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dit_jax.checkpoint import params_digest
from dit_jax.config import SamplingConfig
from dit_jax.evaluation import drawing as drawn
from dit_jax.evaluation.evaluator import Evaluator
from dit_jax.evaluation.generate import evaluation_labels
from dit_jax.evaluation.loaded import LoadedModel
from dit_jax.evaluation.parts import Parts
from dit_jax.evaluation.protocol import UINT8_RULE, make_card
from dit_jax.metrics.adm_files import SamplesFile
from dit_jax.models.cost import describe_cost

NOT_PROTOCOL = ("batch_size", "decode_batch_size")  # of the sampling: how it is computed, not what
READ_IMAGES = 1024  # of a file at once


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How the images of a checkpoint are drawn."""

    sampling: SamplingConfig
    num_samples: int
    labels: str = "balanced"  # or "random"
    seed: int = 0


def evaluate_checkpoint(
    model: LoadedModel,
    average: str,
    drawing: Drawing,
    evaluator: Evaluator,
    asked: Sequence[str] | None,
    folder: pathlib.Path,
) -> dict[str, Any]:
    """Returns the card of images that a diffusion model draws now.

    Args:
      average: what the model's weights are, for the card; asked: metrics, None for all that can be measured.
      folder: where a part of the images is, should this be killed; the same call goes on with it.
    """
    metrics, left_out = evaluator.choose(asked, drawing.num_samples, has_labels=True)
    labels = evaluation_labels(drawing.labels, drawing.num_samples, model.config.data.num_classes, drawing.seed)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, sampling=drawing.sampling))
    with _images(model, labels, drawing, folder) as images:
        found = evaluator.evaluate(images, labels, metrics)
    return make_card(
        found.values,
        found.notes,
        left_out,
        checkpoint_subject(model) | {"images": found.images},
        checkpoint_protocol(model, average, drawing) | evaluator.protocol(metrics),
    )


@contextlib.contextmanager
def _images(
    model: LoadedModel, labels: np.ndarray, drawing: Drawing, folder: pathlib.Path
) -> Iterator[Iterable[np.ndarray]]:
    """Gives the images of a checkpoint, some at a time; they are kept in `folder` until they have been used."""
    if jax.process_count() > 1:  # each has a part of every image's batch
        yield [model.sample(labels, seed=drawing.seed, progress=True)]
        return
    images = drawn.Drawing(model, labels, drawing.sampling, drawing.seed)
    folder.mkdir(parents=True, exist_ok=True)
    with Parts(folder, images.identity()) as parts:
        yield images.draw(parts, progress=True)
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


def checkpoint_protocol(model: LoadedModel, average: str, drawing: Drawing) -> dict[str, Any]:
    """Returns what a card says of how a checkpoint's images are drawn."""
    sampling = {k: v for k, v in dataclasses.asdict(drawing.sampling).items() if k not in NOT_PROTOCOL}
    samples = {"num_samples": drawing.num_samples, "labels": drawing.labels, "seed": drawing.seed, "average": average}
    samples |= {"decoder": None if model.codec is None else params_digest(model.codec.params), "uint8": UINT8_RULE}
    return {"samples": samples | {"sampling": sampling}}


def evaluate_file(
    file: SamplesFile, num_samples: int | None, evaluator: Evaluator, asked: Sequence[str] | None
) -> dict[str, Any]:
    """Returns the card of a file's first images, all of them where `num_samples` is None."""
    count = len(file) if num_samples is None else num_samples
    if count > len(file):
        raise ValueError(f"--num_samples={count} must be at most {len(file)}, the images of {file.path}")
    metrics, left_out = evaluator.choose(asked, count, has_labels=file.labels is not None)
    starts = range(0, count, READ_IMAGES)
    parts = (part[: count - start] for start, part in zip(starts, file.batches(READ_IMAGES), strict=False))
    found = evaluator.evaluate(parts, None if file.labels is None else file.labels[:count], metrics)
    labels = None if file.labels is None else "of the file"
    samples = {"num_samples": count, "labels": labels, "source": "a file of images"}
    return make_card(
        found.values,
        found.notes,
        left_out,
        {"images": found.images},
        {"samples": samples} | evaluator.protocol(metrics),
    )
