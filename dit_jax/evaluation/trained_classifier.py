"""The classifier of a data set (`metrics.classifier`), trained on first need in about a minute, and kept."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from dit_jax.config import DataConfig
from dit_jax.data.identity import without_place
from dit_jax.data.pipeline import byte_transform, eval_batches, train_batches
from dit_jax.data.sources import open_source, source_identity
from dit_jax.evaluation.kept import kept_file, kept_weights
from dit_jax.metrics.classifier import Classifier
from dit_jax.parallel.distributed import is_first
from dit_jax.parallel.preemption import heed_alone
from dit_jax.terminal import progress
from dit_jax.types import Array, Params

# Whatever changes the weights is here, for it names the file that keeps them.
RECIPE = {
    "version": 2,  # of the network, of the code below and of the file; files of version 1 have no sum
    "seed": 0,
    "batch_size": 64,
    "max_steps": 2400,
    "max_epochs": 20,  # of a data set so small that `max_steps` would be more
    "learning_rate": 2e-3,
    "warmup_steps": 50,
    "weight_decay": 0.01,
    "label_smoothing": 0.1,
}


class TrainedClassifier(NamedTuple):
    """A classifier and how good it is."""

    module: Classifier
    params: Params
    accuracy: float  # share of the data set's held-out images that it recognises


def trained_classifier(data: DataConfig, cache: str | os.PathLike) -> TrainedClassifier:
    """Returns the classifier of a data set's training images, from `cache` or trained now.

    The same data and the same machine give the same weights. Of several processes the first alone looks and trains.
    """
    module = Classifier(data.num_classes, data.channels)
    found = _from_cache(module, data, pathlib.Path(cache)) if is_first() else None
    if jax.process_count() > 1:
        shapes = jax.eval_shape(module.init, jax.random.key(0), _example(data))["params"]
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), np.zeros((), np.float32)
        found = jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(zeros if found is None else found))
    params, accuracy = found
    return TrainedClassifier(module, params, round(float(accuracy), 6))


def _from_cache(module: Classifier, data: DataConfig, cache: pathlib.Path) -> tuple[Params, np.float32]:
    training, held_out = (open_source(data, split) for split in (data.train_split, data.eval_split))
    read = dataclasses.replace(data, extra_fields=(), map_field=None)  # of the data: images and labels
    key = {"data": without_place(source_identity(read)), "split": data.train_split, "recipe": RECIPE}
    key |= {"jax": jax.__version__}

    def make() -> tuple[Params, dict[str, float]]:
        params = train_classifier(module, data, training)
        right = np.mean(np.concatenate(list(_right(module, params, data, held_out))))
        return params, {"accuracy": float(right)}

    params, facts = kept_weights(kept_file(cache, "classifier", key, ".safetensors"), key, make)
    return params, np.float32(facts["accuracy"])


def train_classifier(module: Classifier, data: DataConfig, source: Any) -> Params:
    """Returns the weights after training on a source's images by `RECIPE`, on one device: a function of these alone."""
    batch_size = RECIPE["batch_size"]
    num_steps = min(RECIPE["max_steps"], -(-RECIPE["max_epochs"] * len(source) // batch_size))
    warmup = min(RECIPE["warmup_steps"], num_steps // 4)
    schedule = optax.warmup_cosine_decay_schedule(0.0, RECIPE["learning_rate"], warmup, num_steps)
    optimizer = optax.adamw(schedule, weight_decay=RECIPE["weight_decay"])

    @jax.jit
    def create() -> tuple[Params, optax.OptState]:
        params = module.init(jax.random.key(RECIPE["seed"]), _example(data))["params"]
        return params, optimizer.init(params)

    @jax.jit
    def step(params: Params, state: optax.OptState, images: Array, labels: Array):
        def loss(params: Params) -> Array:
            logits = module.apply({"params": params}, images)["logits"]
            targets = optax.smooth_labels(jax.nn.one_hot(labels, module.num_classes), RECIPE["label_smoothing"])
            return optax.softmax_cross_entropy(logits, targets).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    batches = train_batches(
        source,
        byte_transform(data, train=True),
        seed=RECIPE["seed"],
        global_batch_size=batch_size,
        rows=range(batch_size),
        start_step=0,
        num_steps=num_steps,
        num_threads=data.num_threads,
    )
    with jax.default_device(jax.local_devices()[0]):
        params, state = create()
        for batch in progress(
            batches, total=num_steps, unit="step", description="training a classifier: step", active=is_first()
        ):
            params, state = step(params, state, batch["image"], batch["label"])
            heed_alone()
        return jax.tree.map(np.asarray, params)


def _right(module: Classifier, params: Params, data: DataConfig, source: Any) -> Iterator[np.ndarray]:
    """Yields whether each image of a source is recognised, batch by batch."""
    predict = jax.jit(lambda params, images: module.apply({"params": params}, images)["logits"].argmax(axis=-1))
    batches = eval_batches(
        source,
        byte_transform(data, train=False),
        batch_size=512,
        rows=range(512),
        num_threads=data.num_threads,
    )
    with jax.default_device(jax.local_devices()[0]):
        for batch in batches:
            heed_alone()
            yield (np.asarray(predict(params, batch["image"])) == batch["label"])[batch["mask"] > 0]


def _example(data: DataConfig) -> Array:
    return jnp.zeros((1, data.image_size, data.image_size, 3), jnp.uint8)
