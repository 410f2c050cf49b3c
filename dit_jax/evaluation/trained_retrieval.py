"""The image-text model of a data set (`metrics.retrieval`), trained on first need in minutes, and kept."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from dit_jax.config import DataConfig, TextConfig
from dit_jax.data.identity import without_place
from dit_jax.data.pipeline import Example, Transform, byte_transform, load_examples, train_batches
from dit_jax.data.sources import open_source, source_identity
from dit_jax.evaluation.example_conditions import spread_positions
from dit_jax.evaluation.kept import kept_file, kept_weights
from dit_jax.evaluation.text_encoders import CaptionEncoder, load_caption_encoder, load_text_encoder, text_digest
from dit_jax.files import user_path
from dit_jax.metrics.retrieval import ImageTextModel, retrieval_figures
from dit_jax.parallel.distributed import is_first
from dit_jax.parallel.preemption import heed_alone
from dit_jax.terminal import progress
from dit_jax.types import Array, Params

# Whatever changes the weights is here, for it names the file that keeps them.
RECIPE = {
    "version": 2,  # of the network, of the code below and of the file; files of version 1 have no sum
    "seed": 0,
    "batch_size": 256,
    "max_steps": 1500,
    "max_epochs": 25,  # of a data set so small that `max_steps` would be more
    "learning_rate": 2e-3,
    "warmup_steps": 50,
    "weight_decay": 0.1,
    "max_length": 32,  # tokens of a caption
}
MAX_SHIFT = 0.1  # of an image's side: in training images are shifted by up to this, their edges repeated
AT_ONCE = 512  # images at a time


class TrainedRetrieval(NamedTuple):
    """An image-text model, what encodes its captions, and the held-out pairs of its data set."""

    module: ImageTextModel
    params: Params
    encoder: CaptionEncoder
    captions: tuple[str, ...]  # held-out ones, each once, in the data set's order
    images: np.ndarray  # [N, S, S, 3] uint8: the first image of each of them
    labels: np.ndarray  # [N] int32: its class
    figures: dict[str, float]  # of the held-out images themselves: what pictures can reach

    def measure(self, images: np.ndarray) -> dict[str, float]:
        """Returns the figures of images uint8 [N, S, S, 3], drawn for the first N captions."""
        return retrieval_figures(self.similarity(images, self.captions), np.arange(len(images)))

    def similarity(self, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """Returns [N, M] of images uint8 [N, S, S, 3] and M captions."""
        pooled = self.encoder.condition(captions)["pooled"]
        parts = [images[i : i + AT_ONCE] for i in range(0, len(images), AT_ONCE)]
        return np.concatenate([_similarity(self.module, self.params, part, pooled) for part in parts])


_similarity = jax.jit(
    lambda module, params, images, pooled: module.apply({"params": params}, images, pooled), static_argnums=0
)


def trained_retrieval(
    data: DataConfig,
    caption_field: str,
    text_encoder: str | os.PathLike,
    cache: str | os.PathLike,
    num_examples: int | None = None,
) -> TrainedRetrieval:
    """Returns the image-text model of a data set's training pairs, from `cache` or trained now.

    Args:
      data: the data set; caption_field: of an example, among `data.extra_fields`.
      text_encoder: folder of a frozen text encoder (`evaluation.text_encoders`).
      num_examples: held-out ones to rank, evenly spread; None, or more than there are: all.
    """
    shape = load_text_encoder(text_encoder).module.shape
    text = TextConfig(max_length=min(RECIPE["max_length"], shape.max_length), frozen_width=shape.width)
    encoder = load_caption_encoder(text, text_encoder)
    read = dataclasses.replace(data, extra_fields=(caption_field,), map_field=None)
    key = {"data": without_place(source_identity(read)), "split": data.train_split, "field": caption_field}
    key |= {"recipe": RECIPE, "text_encoder": text_digest(text, text_encoder), "jax": jax.__version__}
    path = kept_file(pathlib.Path(user_path(os.fspath(cache))), "retrieval", key, ".safetensors")
    module, held_out = ImageTextModel(), open_source(data, data.eval_split)

    def make() -> tuple[Params, dict[str, Any]]:
        return train_retrieval(module, data, caption_field, encoder, open_source(data, data.train_split)), {}

    params, _ = kept_weights(path, key, make)
    positions = spread_positions(len(held_out), min(len(held_out), num_examples or len(held_out)))
    pairs = load_examples(held_out, pair_transform(data, caption_field, train=False), positions)
    captions, first, right = np.unique(pairs["caption"].astype(str), return_index=True, return_inverse=True)
    found = TrainedRetrieval(
        module, params, encoder, tuple(captions.tolist()), pairs["image"][first], pairs["label"][first], {}
    )
    return found._replace(figures=retrieval_figures(found.similarity(pairs["image"], found.captions), right))


def pair_transform(data: DataConfig, caption_field: str, train: bool) -> Transform:
    """Returns the transform of pairs: as `byte_transform`, in training with the image shifted, and with `caption`."""
    to_image = byte_transform(data, train)
    most = round(MAX_SHIFT * data.image_size) if train else 0

    def transform(example: Example, rng: np.random.Generator) -> Example:
        arrays = to_image(example, rng)
        rows, columns = (
            np.clip(np.arange(data.image_size) + shift, 0, data.image_size - 1)
            for shift in rng.integers(-most, most + 1, 2)
        )
        caption = np.array(str(example[caption_field]), object)
        return arrays | {"image": arrays["image"][rows][:, columns], "caption": caption}

    return transform


def train_retrieval(
    module: ImageTextModel, data: DataConfig, caption_field: str, encoder: CaptionEncoder, source: Any
) -> Params:
    """Returns the weights after training on a source's pairs by `RECIPE`, on one device: a function of these alone."""
    batch_size = min(RECIPE["batch_size"], len(source))
    num_steps = min(RECIPE["max_steps"], -(-RECIPE["max_epochs"] * len(source) // batch_size))
    warmup = min(RECIPE["warmup_steps"], num_steps // 4)
    schedule = optax.warmup_cosine_decay_schedule(0.0, RECIPE["learning_rate"], warmup, num_steps)
    optimizer = optax.adamw(schedule, weight_decay=RECIPE["weight_decay"])
    known: dict[str, np.ndarray] = {}  # a caption comes once an epoch, and its encoding is what takes the time

    def pooled(captions: Sequence[str]) -> np.ndarray:
        new = [caption for caption in dict.fromkeys(captions) if caption not in known]
        if new:
            known.update(zip(new, encoder.condition(new)["pooled"], strict=True))
        return np.stack([known[caption] for caption in captions])

    @jax.jit
    def step(params: Params, state: optax.OptState, images: Array, pooled: Array, same: Array):
        def loss(params: Params) -> Array:
            similarity = module.apply({"params": params}, images, pooled)
            targets = same / same.sum(axis=1, keepdims=True)  # images of one caption are all right for it
            directions = (similarity, targets), (similarity.T, targets)
            return sum(optax.softmax_cross_entropy(*direction).mean() for direction in directions) / 2

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    batches = train_batches(
        source,
        pair_transform(data, caption_field, train=True),
        seed=RECIPE["seed"],
        global_batch_size=batch_size,
        rows=range(batch_size),
        start_step=0,
        num_steps=num_steps,
        num_threads=data.num_threads,
    )
    with jax.default_device(jax.local_devices()[0]):
        params, state = None, None
        for batch in progress(
            batches, total=num_steps, unit="step", description="training an image-text model: step", active=is_first()
        ):
            text = pooled(batch["caption"].tolist())
            if params is None:
                params = jax.jit(module.init)(jax.random.key(RECIPE["seed"]), batch["image"], text)["params"]
                state = optimizer.init(params)
            same = (batch["caption"][:, None] == batch["caption"][None]).astype(np.float32)
            params, state = step(params, state, batch["image"], text, same)
            heed_alone()
        return jax.tree.map(np.asarray, params)
