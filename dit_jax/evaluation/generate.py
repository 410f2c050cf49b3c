"""Drawing images from a trained denoiser, sharded over the mesh.

Image i depends on (seed, i) and its conditions alone: its key is fold_in(seed, i), and a device draws
`config.sampling.batch_size` images at once, however many there are of either, the last ones padded. So its bits are the
same on any number of devices of a kind, unless these share an image or hold parts of the weights.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from dit_jax import terminal
from dit_jax.config import Config, SamplingConfig, check_sampling, did_you_mean, override_section
from dit_jax.data.folder import reads_as_stored
from dit_jax.diffusion.classifier_guidance import class_gradient, led
from dit_jax.diffusion.guidance import between, guidance_scales, guided
from dit_jax.diffusion.parameterization import Prediction, predict
from dit_jax.diffusion.process import add_noise, first_steps, make_process, respace
from dit_jax.diffusion.samplers import make_sampler
from dit_jax.diffusion.samplers.scan import Known, image_noise, sample, slerp
from dit_jax.metrics.picture import to_uint8
from dit_jax.models.autoencoder import Codec
from dit_jax.models.build import abstract_conditions, build_denoiser
from dit_jax.models.conditioners import as_conditions, null_conditions
from dit_jax.models.dit import DiTClassifier
from dit_jax.models.spatial import hole_on_grid
from dit_jax.parallel.mesh import batch_sharding, batch_shards, to_host, traced_on
from dit_jax.parallel.preemption import heed
from dit_jax.types import Array, Conditions, ModelFn, Params

PROCESS_FIELDS = ("num_timesteps", "schedule", "beta_start", "beta_end")  # of `DiffusionConfig`: how noise is added


class KnownImages(NamedTuple):
    """Images to paint in, or to start from: a row for each image that is drawn.

    image: [N, S, S, C] uint8. hole: [N, S, S, 1] bool, True where to paint: all other pixels of what is drawn are the
    image's own; None: the whole image is drawn, from this one as `sampling.strength` says.
    """

    image: np.ndarray
    hole: np.ndarray | None = None


class Path(NamedTuple):
    """Where images lie between two others, a row an image: of conditions and of noise.

    towards: the conditions at the other end, [N, ...]. weight: [N] float32, 0 for this end, 1 for the other.
    ends: [N, 2] int32, the numbers of the images at both, whose noise it is.
    """

    towards: Conditions
    weight: np.ndarray
    ends: np.ndarray


def interpolation(inputs: Any, num_images: int) -> tuple[Any, Path]:
    """Returns the inputs of `num_images` images from each of K to the next, both included, and where they lie.

    inputs: (conditions, known images) of the K ends; of the images between two ends the known ones are the first's.
    """
    num_ends = len(jax.tree.leaves(inputs)[0])
    if num_ends < 2 or num_images < 2:
        raise ValueError(
            f"interpolation needs two or more to go between, and two or more images from each to the next, its ends "
            f"included; got {num_ends} and {num_images}"
        )
    starts = np.repeat(np.arange(num_ends - 1), num_images)
    own, towards = (jax.tree.map(lambda leaf, rows=rows: leaf[rows], inputs) for rows in (starts, starts + 1))
    weight = np.tile(np.linspace(0.0, 1.0, num_images, dtype=np.float32), num_ends - 1)
    return own, Path(towards[0], weight, np.stack([starts, starts + 1], axis=1).astype(np.int32))


@flax.struct.dataclass
class ClassifierGuide:
    """A classifier of noised images that leads the sampler to the labels, and the scale of its gradient."""

    params: Params
    module: DiTClassifier = flax.struct.field(pytree_node=False)
    scale: float = flax.struct.field(pytree_node=False)


def make_generator(
    config: Config, sampling: SamplingConfig, codec: Codec | None, mesh: Mesh, num_frames: int = 0
) -> Callable[..., np.ndarray]:
    """Returns `generate(params, conditions, seed, progress=False, known, classifier, path) -> uint8 [N, H, W, 3]`.

    It is compiled at its first call. Conditions are raw ones, [N, ...] each (`models.conditioners`); labels alone may
    be given as their array. known: `KnownImages`; classifier: `ClassifierGuide`; path: `Path`.

    Args:
      config: of the denoiser.
      codec: decodes its latents; None for a model of pixels, or for latents float32 [N, h, w, c] instead of images.
      sampling: how to draw.
      num_frames: where positive, `generate` returns this many predictions of x_0, spread evenly over the walk and the
        last of them what it ends in, uint8 [N, num_frames, H, W, 3].
    """
    draw, batch_size = make_draw(config, sampling, mesh, num_frames)

    def generate(
        params: Params,
        conditions: Conditions | np.ndarray,
        seed: int,
        progress: bool = False,
        known: KnownImages | None = None,
        classifier: ClassifierGuide | None = None,
        path: Path | None = None,
    ) -> np.ndarray:
        conditions, num_images = check_conditions(config, conditions, classifier)
        check_known(config, sampling, known)
        images = []
        starts = range(0, num_images, batch_size)
        for start in terminal.progress(
            starts, total=len(starts), unit="batch", description="sampling: batch", active=progress
        ):
            rows = np.minimum(np.arange(start, start + batch_size), num_images - 1)  # the last batch repeats its end
            rows, (own, around, between) = put_rows(rows, (conditions, known, path), mesh)
            drawn = draw(params, codec, seed, rows, own, known=around, classifier=classifier, path=between)
            images.append(to_host(drawn))
            heed()
        return np.concatenate(images)[:num_images]

    return generate


def check_labels(labels: Sequence[int], num_classes: int) -> np.ndarray:
    """Returns labels [N] as int32; raises ValueError where one is no class, nor `num_classes`, which is none."""
    labels = check_integers("labels", labels)
    if not labels.size:
        raise ValueError("labels must be one or more, such as [0, 3], but there is none")
    if not (labels.min() >= 0 and labels.max() <= num_classes):
        raise ValueError(f"labels must be from 0 to {num_classes - 1} (or {num_classes}: no label); got {labels}")
    return labels.astype(np.int32)


def check_integers(name: str, values: Sequence[int]) -> np.ndarray:
    """Returns whole numbers [N] as an array; raises ValueError where they are not."""
    array = np.asarray(values)
    is_whole = array.dtype.kind in "iu" or (array.dtype.kind == "f" and (array == np.round(array)).all())
    if array.ndim != 1 or not is_whole:
        raise ValueError(f"{name} must be whole numbers [N], such as [0, 3], not {array.dtype} {list(array.shape)}")
    return array


def check_conditions(
    config: Config, conditions: Conditions | np.ndarray, classifier: ClassifierGuide | None = None
) -> tuple[Conditions, int]:
    """Returns those that the config's denoiser reads (and the labels to lead to), and how many images they are for.

    Raises:
      ValueError: where one that it reads is missing, none says how many images, or they do not agree.
    """
    given = as_conditions(conditions)
    for name, parts in abstract_conditions(config).items():
        if isinstance(parts, Mapping) and name in given:
            there = set(given[name]) if isinstance(given[name], Mapping) else set()
            if not there >= set(parts):
                raise ValueError(
                    f"raw conditions of {name!r} must be a dict of {sorted(parts)}, not of {sorted(there)}"
                )
    if "label" in given:
        given["label"] = check_labels(given["label"], config.data.num_classes)
    read = {**config.condition_dropout, **({} if classifier is None else {"label": None})}
    missing = [name for name in read if name not in given]
    if missing:
        raise ValueError(f"the model is conditioned on {missing[0]!r}, which is missing; give it for every image")
    for name, parts in abstract_conditions(config).items():
        wanted = parts if isinstance(parts, Mapping) else {"": parts}
        for part, leaf in wanted.items():
            shape = np.shape(given[name][part] if part else given[name])
            if shape[1:] != leaf.shape[1:] or not shape:
                raise ValueError(
                    f"raw conditions of {name!r} must be {['N', *leaf.shape[1:]]}{part and f' for their {part}'}, not "
                    f"{list(shape)}"
                )
    counts = {name: len(leaf) for name, value in given.items() for leaf in jax.tree.leaves(value)}
    if len(set(counts.values())) != 1:
        raise ValueError(f"conditions must be of as many images each, not {counts}")
    return {name: given[name] for name in read}, next(iter(counts.values()))


def _names_of_both(*configs: Config) -> list[tuple[str, ...] | None]:
    """Returns the names of the classes of two configs, the same ones where only one of them has recorded any.

    But runs of an older release recorded none, and sorted them as text.
    """
    known = next((config.data.class_names for config in configs if config.data.class_names), None)
    return [
        config.data.class_names or (tuple(sorted(known)) if known and reads_as_stored(config.data) else known)
        for config in configs
    ]


def check_classifier(config: Config, theirs: Config) -> None:
    """Raises ValueError where a classifier's config is not of the denoiser's process, input and classes."""
    if theirs.stage != "classifier":
        raise ValueError(f"the classifier is a run of stage {theirs.stage!r}; give one of stage 'classifier'")
    facts = [
        {
            "data.num_classes": each.data.num_classes,
            "data.class_names": names,
            "the input's shape": each.input_shape,
            "latents.autoencoder": each.latents and each.latents.autoencoder,
            "latents.scale": each.latents and each.latents.scale,
            "latents.shift": each.latents and each.latents.shift,
        }
        | {f"diffusion.{name}": getattr(each.diffusion, name) for name in PROCESS_FIELDS}
        for each, names in zip((config, theirs), _names_of_both(config, theirs), strict=True)
    ]
    for name, ours in facts[0].items():
        if facts[1][name] != ours:
            raise ValueError(
                f"the classifier must see what the denoiser does: {name} is {facts[1][name]!r}, not {ours!r}"
            )


def check_known(config: Config, sampling: SamplingConfig, known: KnownImages | None) -> None:
    """Raises ValueError where known images are not those of the config, or have no use or are missing."""
    if known is None:
        if sampling.strength < 1:
            raise ValueError(f"sampling strength={sampling.strength} needs an image to start from; give one, or 1")
        return
    size, channels = config.data.image_size, config.data.channels
    if known.image.shape[1:] != (size, size, channels) or known.image.dtype != np.uint8:
        raise ValueError(
            f"an image must be uint8 of the model's {size} x {size} x {channels}, not {known.image.dtype} "
            f"{known.image.shape[1:]}; scale or crop it"
        )
    if known.hole is None and sampling.strength == 1:
        raise ValueError("an image to start from needs sampling strength below 1, or a mask; give one of them")
    if known.hole is not None and known.hole.shape[1:] != (size, size, 1):
        raise ValueError(
            f"a mask must be as large as the image, {size} x {size}, not {known.hole.shape[1:3]}; scale it"
        )


def require_codec(config: Config, has_codec: bool) -> None:
    """Raises ValueError where images cannot be encoded: the model is of latents, and its autoencoder is not there."""
    if config.latents is not None and not has_codec:
        raise ValueError("the model has no autoencoder to encode images with; convert it with --autoencoder")


def put_rows(rows: np.ndarray, inputs: Any, mesh: Mesh) -> tuple[Array, Any]:
    """Returns what `draw` takes of the images numbered `rows` [B]: these numbers and their inputs, on the mesh."""
    own = jax.tree.map(lambda leaf: leaf[rows], inputs)
    return jax.device_put((rows.astype(np.int32), own), batch_sharding(mesh))


def make_draw(config: Config, sampling: SamplingConfig, mesh: Mesh, num_frames: int = 0) -> tuple[Callable, int]:
    """Returns the jitted `draw(params, codec, seed, indices, conditions, *, known, classifier, path)`, and its batch.

    It is what `make_generator` runs; its arguments are the same, and its indices [B] int32. Each of the
    mesh's parts of a batch has `sampling.batch_size` images.
    """
    check_sampling(sampling, config)
    model = build_denoiser(config)
    training_process = make_process(config.diffusion)
    spacing = sampling.spacing or ("trailing" if sampling.sampler == "dpm_solver" else "even")
    process = respace(training_process, sampling.timesteps or sampling.num_steps, spacing)
    process = first_steps(process, max(1, round(sampling.strength * process.num_steps)))
    sampler = make_sampler(sampling)
    reads_hole = config.spatial is not None and config.spatial.kind == "inpainting"
    num_chunks = count_chunks(sampling.batch_size, sampling.decode_batch_size)

    def draw(
        params: Params,
        codec: Codec | None,
        seed: Array,
        indices: Array,
        conditions: Conditions,
        known: KnownImages | None,
        path: Path | None,
        classifier: ClassifierGuide | None,
    ) -> Array:
        def to_images(x_0: Array) -> Array:
            images = to_uint8(x_0 if codec is None else codec.decode(x_0, tile=sampling.decode_tile))
            return jnp.broadcast_to(images, (*images.shape[:3], 3))

        def decode(x_0: Array) -> Array:
            if codec is None and config.latents is not None:
                return x_0
            images = to_images(x_0) if codec is None else in_chunks(to_images, x_0, num_chunks)
            return images if known is None or known.hole is None else jnp.where(known.hole, images, known.image)

        def encode(images: Array) -> Array:
            require_codec(config, codec is not None)
            images = images.astype(jnp.float32) / 127.5 - 1.0
            return images if codec is None else in_chunks(codec.encode, images, num_chunks)

        def predict_fn(x_t: Array, step: Array) -> Prediction:
            t = jnp.asarray(process.timesteps)[step]
            output = model_fn(x_t, t, conditions)
            prediction = predict(process, output, x_t, step, sampling.x_0_limit, sampling.x_0_percentile)
            if classifier is None:
                return prediction
            logits_fn = lambda *inputs: classifier.module.apply({"params": classifier.params}, *inputs)  # noqa: E731
            gradient = classifier.scale * class_gradient(logits_fn, x_t, t, conditions["label"])
            return led(process, prediction, x_t, step, gradient, ancestral=sampling.sampler == "ancestral")

        model_fn = guide(config, sampling, lambda *inputs: model.apply({"params": params}, *inputs))
        keys_of = jax.vmap(lambda index: jax.random.fold_in(jax.random.key(seed), index))
        keys = keys_of(indices if path is None else path.ends[:, 0])
        noise = image_noise(keys, process.num_steps, config.input_shape)
        if path is not None:
            model_fn = between(model_fn, {name: path.towards[name] for name in conditions}, path.weight)
            others = image_noise(keys_of(path.ends[:, 1]), process.num_steps, config.input_shape)
            noise = slerp(noise, others, path.weight)
        x_T, around = noise, None
        if sampling.strength < 1:
            x_T = add_noise(process, encode(known.image), jnp.full(keys.shape, process.num_steps - 1), noise)
        if known is not None and known.hole is not None and not reads_hole:
            around = Known(encode(known.image), hole_on_grid(config, known.hole))
        x_0, kept = sample(
            process,
            predict_fn,
            sampler,
            keys,
            config.input_shape,
            x_T,
            keep_x_0=num_frames > 0,
            known=around,
            num_resamplings=sampling.num_resamplings if around is not None else 1,
            jump_length=sampling.jump_length,
        )
        if not num_frames:
            return decode(x_0)
        frames = np.linspace(0, len(kept) - 1, num_frames).round().astype(int)
        return jnp.stack([*(decode(kept[frame]) for frame in frames[:-1]), decode(x_0)], axis=1)

    # By hand over "data", each device's part is the program that one device alone would run, to the last bit. Left to
    # the compiler, the two halves of guidance also move between devices.
    rows, whole = PartitionSpec("data"), PartitionSpec()
    by_rows = jax.shard_map(
        draw,
        mesh=mesh.abstract_mesh,
        in_specs=(whole, whole, whole, rows, rows, rows, rows, whole),
        out_specs=rows,
        axis_names={"data"},
        check_vma=False,  # the layers know nothing of it
    )
    drawn = lambda *inputs, known=None, path=None, classifier=None: by_rows(*inputs, known, path, classifier)  # noqa: E731
    return jax.jit(traced_on(mesh, drawn)), sampling.batch_size * batch_shards(mesh)


def guide(config: Config, sampling: SamplingConfig, model_fn: ModelFn) -> ModelFn:
    """Returns a model_fn guided by every condition that has a weight of its own, and by all the others together."""
    process, dropout = make_process(config.diffusion), config.condition_dropout
    own = dict(sampling.cfg_scales)
    others = tuple(name for name, rate in dropout.items() if rate > 0 and name not in own)
    weights = [((name,), scale) for name, scale in own.items()] + ([(others, sampling.cfg_scale)] if others else [])
    for names, scale in weights:
        null = functools.partial(null_conditions, names=names, num_classes=config.data.num_classes)
        model_fn = guided(model_fn, null, guidance_scales(process, scale, sampling.cfg_interval), sampling.cfg_channels)
    return model_fn


def count_chunks(num_rows: int, max_rows: int) -> int:
    """Returns the fewest chunks of equal size that hold no more than `max_rows` of `num_rows` each."""
    return next(n for n in range(1, num_rows + 1) if num_rows % n == 0 and num_rows // n <= max_rows)


def in_chunks(function: Callable[[Array], Array], x: Array, num_chunks: int) -> Array:
    """Returns `function(x)` of x [B, ...], row by row independent, from chunks in turn: one's memory at a time.

    Every chunk takes its rows from all over the batch, so that the devices that split the batch split every chunk.
    """
    if num_chunks == 1:
        return function(x)
    chunks = x.reshape(-1, num_chunks, *x.shape[1:]).swapaxes(0, 1)
    out = jax.lax.map(function, chunks)
    return out.swapaxes(0, 1).reshape(len(x), *out.shape[2:])


def balanced_labels(num_images: int, num_classes: int) -> np.ndarray:
    """Returns labels [N] int32 in turn: 0, 1, ..., so that any first images are balanced."""
    return np.arange(num_images, dtype=np.int32) % num_classes


LABEL_PROTOCOLS = ("balanced", "random")


def evaluation_labels(protocol: str, num_images: int, num_classes: int, seed: int) -> np.ndarray:
    """Returns labels [N] int32 by a protocol: in turn ("balanced"), or drawn independently with a seed ("random").

    Of either, fewer images have the first of the labels that more have.
    """
    if protocol == "balanced":
        return balanced_labels(num_images, num_classes)
    if protocol != "random":
        raise ValueError(
            f"labels {protocol!r} must be one of {', '.join(LABEL_PROTOCOLS)}{did_you_mean(protocol, LABEL_PROTOCOLS)}"
        )
    return np.random.default_rng(seed).integers(num_classes, size=num_images, dtype=np.int32)


def override_sampling(
    sampling: SamplingConfig, num_steps: int | str | Sequence[int] | None = None, **overrides
) -> SamplingConfig:
    """Returns the settings with overrides, each checked to be of its field's type.

    num_steps: a count, "ddimN" (N multiples of a whole stride) or the timesteps themselves, ascending; None: as it was.
    """
    overrides = {name: value.item() if isinstance(value, np.generic) else value for name, value in overrides.items()}
    if isinstance(num_steps, str) and re.fullmatch(r"(ddim)?\d+", num_steps):
        spacing = {"spacing": "ddim"} if num_steps.startswith("ddim") else {}
        overrides |= {"num_steps": int(num_steps.removeprefix("ddim")), "timesteps": None} | spacing
    elif isinstance(num_steps, int | np.integer):
        overrides |= {"num_steps": int(num_steps), "timesteps": None}
    elif isinstance(num_steps, str):
        raise ValueError(f"{num_steps=} must be a count, ddimN, or timesteps in ascending order")
    elif num_steps is not None:
        overrides |= {"timesteps": tuple(int(t) for t in num_steps)}
    return override_section(sampling, overrides, "sampling")
