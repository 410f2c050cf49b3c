"""Batches as a pure function of (seed, step), read ahead by Grain's threads.

Training numbers its examples g = step * global_batch_size + row, for ever: g // len(source) is the epoch, the order
within an epoch is a shuffle of the whole data set, another one each epoch, and what is random about an example is
keyed by (seed, g). A batch therefore depends neither on the number of processes (each loads its own rows of the
global batch), nor on where a run was resumed, nor on the timing of threads; and there is no iterator state to save.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from dit_jax.config import DataConfig, LayoutConfig, SpatialConfig
from dit_jax.data import transforms
from dit_jax.data.bad_examples import BadExamples
from dit_jax.data.layouts import LayoutTokenizer
from dit_jax.data.masks import random_hole
from dit_jax.data.tokenizer import Tokenizer
from dit_jax.files import is_of_this_process, patiently

Example = dict[str, Any]
Transform = Callable[[Example, np.random.Generator], Example]

SHUFFLE_STREAM, EXAMPLE_STREAM = 0, 1  # keep the generators of epochs and of examples apart


def train_batches(
    source: Sequence[Example],
    transform: Transform,
    *,
    seed: int,
    global_batch_size: int,
    rows: Sequence[int],
    start_step: int,
    num_steps: int,
    num_threads: int,
    bad_examples: BadExamples | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this process's part of the global batch of each step from `start_step` to `num_steps - 1`.

    Args:
      source: examples by position; `__getitems__`, if it has one, reads many at once.
      transform: (example, random generator) to a dict of arrays; all of its randomness must come from the generator.
      seed: of the shuffles and of the generators.
      global_batch_size: examples of a step over all processes.
      rows: the rows of the global batch that this process loads; `range(global_batch_size)` for a single process.
      start_step: 0, or the first step of a resumed run.
      num_steps: steps of the whole run.
      num_threads: each thread prepares a batch ahead of its use.
      bad_examples: takes note of examples that cannot be read, and says what stands in; None: they are errors.
    """

    def load(step: int) -> dict[str, np.ndarray]:
        numbers = [step * global_batch_size + row for row in rows]
        indices = train_positions(len(source), seed, numbers)
        keys = [(seed, EXAMPLE_STREAM, g) for g in numbers]
        return _load(source, transform, indices, keys, (step + 1) * len(rows), bad_examples)

    return _read_ahead(load, start_step, num_steps, num_threads)


def train_positions(size: int, seed: int, numbers: Iterable[int]) -> list[int]:
    """Returns where in a data set of `size` examples those are that training numbers g = step * batch size + row."""
    return [int(_order(size, seed, g // size)[g % size]) for g in numbers]


# Two at a time: a batch, or the threads, may be in two epochs. Grain's own shuffle computes an index alone, with no
# table, but takes milliseconds for an example of a data set of a few images.
@functools.lru_cache(maxsize=2)
def _order(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, SHUFFLE_STREAM, epoch)).permutation(size)


def eval_batches(
    source: Sequence[Example],
    transform: Transform,
    *,
    batch_size: int,
    rows: Sequence[int],
    start: int = 0,
    num_examples: int | None = None,
    num_threads: int,
    bad_examples: BadExamples | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this process's part of batches that go through the examples once, in order.

    The last batch is full too: it repeats the last example, with mask 0.

    Args:
      source: as for `train_batches`.
      transform: as for `train_batches`.
      batch_size: examples of a batch over all processes.
      rows: the rows of the batch that this process loads.
      start: the position of the first example.
      num_examples: only so many from there; None, or more than there are: all.
      num_threads: each thread prepares a batch ahead of its use.
      bad_examples: as for `train_batches`.

    Yields:
      The transform's arrays, and `mask`: [rows] float32, 1 for an example and 0 for padding, and `index`: [rows]
      int32, the example's position in the source.
    """
    num_examples = min(len(source) - start, num_examples or len(source))

    def load(batch: int) -> dict[str, np.ndarray]:
        numbers = np.array([batch * batch_size + row for row in rows])
        indices = start + np.minimum(numbers, num_examples - 1)
        seen = (batch + 1) * len(rows)
        arrays = _load(source, transform, indices.tolist(), indices.tolist(), seen, bad_examples)
        return arrays | {"mask": (numbers < num_examples).astype(np.float32), "index": indices.astype(np.int32)}

    return _read_ahead(load, 0, -(-num_examples // batch_size), num_threads)


def load_examples(
    source: Sequence[Example], transform: Transform, positions: Sequence[int], bad_examples: BadExamples | None = None
) -> dict[str, Any]:
    """Returns the transformed examples at some positions, each as `eval_batches` has it; arguments as there."""
    positions = list(positions)
    return _load(source, transform, positions, positions, len(positions), bad_examples)


# What further conditions of an example are made of: its fields, whether it is mirrored, and its random generator ->
# arrays by name, one level of dicts deep.
ConditionsOf = Callable[[Example, bool, np.random.Generator], Example]


def image_transform(data: DataConfig, train: bool, conditions: ConditionsOf | None = None) -> Transform:
    """Returns the transform of images: `image` [S, S, C] float32 in [-1, 1], `label` int32; only training flips.

    conditions: adds to these, such as `caption_tokens`.
    """

    def transform(example: Example, rng: np.random.Generator) -> Example:
        image, mirrored = _cropped(data, train, example, rng)
        arrays = {"image": transforms.to_float(image), "label": np.int32(example["label"])}
        return arrays | conditions(example, mirrored, rng) if conditions else arrays

    return transform


def byte_transform(data: DataConfig, train: bool) -> Transform:
    """Returns the transform of the same images as bytes: `image` [S, S, 3] uint8, a grey one's channel repeated."""

    def transform(example: Example, rng: np.random.Generator) -> Example:
        image, _ = _cropped(data, train, example, rng)
        return {"image": np.broadcast_to(image, (*image.shape[:2], 3)), "label": np.int32(example["label"])}

    return transform


def _cropped(data: DataConfig, train: bool, example: Example, rng: np.random.Generator) -> tuple[np.ndarray, bool]:
    """Returns an example's image as training sees it, [S, S, C] uint8, and whether it is the mirror image."""
    image = transforms.to_channels(example["image"], data.channels)
    image = transforms.center_crop(image, data.image_size)
    mirrored = train and data.horizontal_flip and _draw_flip(rng)
    return transforms.horizontal_flip(image) if mirrored else image, mirrored


def latent_transform(train: bool, conditions: ConditionsOf | None = None) -> Transform:
    """Returns the transform of a latent cache's examples: `moments` [h, w, k] float32, `label` int32.

    The cache holds the moments of an image and, where the data set is flipped, of its mirror image: training takes
    the one that training from images would, evaluation the first (the image itself).

    conditions: adds to these, such as `caption_tokens` or `cached_text`.
    """

    def transform(example: Example, rng: np.random.Generator) -> Example:
        flips = example["moments"]  # [F, h, w, k]
        mirrored = train and len(flips) == 2 and _draw_flip(rng)
        arrays = {"moments": flips[int(mirrored)], "label": np.int32(example["label"])}
        return arrays | conditions(example, mirrored, rng) if conditions else arrays

    return transform


def spatial_arrays(data: DataConfig, spatial: SpatialConfig) -> ConditionsOf:
    """Returns what makes the arrays of a spatial condition that an image has not.

    Of inpainting a random `hole` [S, S, 1] float32, 1 where to paint (`data.masks`); of semantic synthesis the `map`
    [S, S] int32 of the pixels' classes.
    """

    def conditions(example: Example, mirrored: bool, rng: np.random.Generator) -> Example:
        if spatial.kind == "inpainting":
            return {"hole": random_hole(rng, data.image_size)}
        if spatial.kind == "semantic":
            return {"map": transforms.semantic_map(example["map"], data.image_size, spatial.num_classes, mirrored)}
        return {}

    return conditions


def layout_tokens(layout: LayoutConfig) -> ConditionsOf:
    """Returns what makes `layout` of an example's boxes: `ids` [L] int32 and `mask` [L] bool, mirrored as the image."""
    tokenizer = LayoutTokenizer(layout)

    def conditions(example: Example, mirrored: bool, _) -> Example:
        return {"layout": tokenizer.tokenize(tokenizer.parse(str(example[layout.layout_field])), mirrored)}

    return conditions


def caption_tokens(tokenizer: Tokenizer, field: str) -> ConditionsOf:
    """Returns what makes `text` of an example's caption: `ids` [L] int32 and `mask` [L] bool."""

    def conditions(example: Example, *_) -> Example:
        tokens = tokenizer.tokenize([str(example[field])])
        return {"text": {name: rows[0] for name, rows in tokens.items()}}

    return conditions


def cached_text(max_length: int) -> ConditionsOf:
    """Returns what makes `text` of the states in a latent cache: `states` [L, E], `pooled` [P] and `mask` [L] bool."""

    def conditions(example: Example, *_) -> Example:
        states, pooled = example["text"]["states"], example["text"]["pooled"]
        padded = np.pad(states, ((0, max_length - len(states)), (0, 0)))
        return {"text": {"states": padded, "pooled": pooled, "mask": np.arange(max_length) < len(states)}}

    return conditions


def all_of(parts: Sequence[ConditionsOf]) -> ConditionsOf:
    """Returns what makes the arrays of several conditions."""

    def conditions(example: Example, mirrored: bool, rng: np.random.Generator) -> Example:
        return {name: array for part in parts for name, array in part(example, mirrored, rng).items()}

    return conditions


def _draw_flip(rng: np.random.Generator) -> bool:
    """Returns whether an example is flipped: the first draw of its generator, of images and of their latents alike."""
    return rng.random() < 0.5


def _load(
    source: Sequence[Example],
    transform: Transform,
    indices: list[int],
    keys: list[Any],
    num_seen: int,
    bad_examples: BadExamples | None,
) -> dict[str, np.ndarray]:
    """Returns the transformed examples at `indices`, each with the generator of its key, or with what stands in.

    A disk that fails for a moment is asked again: which examples are bad must not depend on it. Nor is one bad because
    this process lacks memory or descriptors; that is an error.
    """

    def load(indices: list[int], keys: list[Any]) -> list[Example]:
        return [
            transform(example, np.random.default_rng(key))
            for key, example in zip(keys, _read(source, indices), strict=True)
        ]

    def load_one(index: int, key: Any) -> Example:
        while True:
            reader = bad_examples.reader(index)
            try:
                return patiently(functools.partial(load, [reader], [key]))[0]
            except (ValueError, OSError) as error:
                if is_of_this_process(error, rights=False):
                    raise
                bad_examples.add(reader, " ".join(str(error).split()), num_seen)

    if bad_examples is None:
        return _stack(patiently(lambda: load(indices, keys)))
    try:
        return _stack(load([bad_examples.reader(index) for index in indices], keys))
    except (ValueError, OSError):
        return _stack(load_one(index, key) for index, key in zip(indices, keys, strict=True))


def _read(source: Sequence[Example], indices: list[int]) -> Sequence[Example]:
    if hasattr(source, "__getitems__"):
        return source.__getitems__(indices)
    return [source[index] for index in indices]


def _stack(examples: Iterable[Example]) -> dict[str, Any]:
    examples = list(examples)
    parts = {key: [example[key] for example in examples] for key in examples[0]}
    return {key: _stack(part) if isinstance(part[0], dict) else np.stack(part) for key, part in parts.items()}


def _read_ahead(load: Callable[[int], Any], start: int, stop: int, num_threads: int) -> Iterator[Any]:
    import grain

    # One batch a thread, no more: a batch of large images is hundreds of megabytes.
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads)
    return iter(grain.MapDataset.range(start, max(start, stop)).map(load).to_iter_dataset(options))
