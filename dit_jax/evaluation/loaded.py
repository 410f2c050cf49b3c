"""A trained model in a notebook's hands: `dit_jax.load(workdir)`."""

import dataclasses
import math
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dit_jax.checkpoint import (
    CHECKPOINTS,
    CONFIG_FILE,
    SNAPSHOTS,
    Checkpoints,
    DamagedCheckpoint,
    find_checkpoint,
    params_digest,
    print_line,
    read_alone,
    read_newest_good,
    restore_eval_params,
)
from dit_jax.checkpoint.content import leaf_name
from dit_jax.config import MIN_TILE, Config, MeshConfig, SamplingConfig, for_platform
from dit_jax.data.classes import class_number
from dit_jax.evaluation.generate import (
    ClassifierGuide,
    KnownImages,
    Path,
    check_classifier,
    check_conditions,
    check_integers,
    check_labels,
    interpolation,
    make_generator,
    override_sampling,
)
from dit_jax.evaluation.given import Given
from dit_jax.evaluation.text_encoders import (
    TEXT_ENCODER_DIR,
    CaptionEncoder,
    check_text_encoder,
    load_caption_encoder,
)
from dit_jax.files import user_path
from dit_jax.models.autoencoder import Codec
from dit_jax.models.averages import average_decays, initial_share_note, length_name, reconstruction_weights
from dit_jax.models.build import abstract_params, build_autoencoder, build_classifier, build_model
from dit_jax.models.conditioners import as_conditions
from dit_jax.parallel.mesh import make_mesh, replicated
from dit_jax.types import Array, Conditions, Params

AUTOENCODER_DIR = "autoencoder"  # inside a diffusion workdir or a latent cache: the autoencoder of its latents

_encode, _decode = (jax.jit(method, static_argnames="tile") for method in (Codec.encode, Codec.decode))


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel:
    """A checkpoint ready for use; `params` are the weights for evaluation (the EMA's, where there is one)."""

    config: Config
    params: Params
    step: int
    codec: Codec | None  # None: a model of pixels, or converted weights without an autoencoder
    mesh: Mesh
    captions: CaptionEncoder | None = None  # what makes conditions of captions; None: there is none with the weights
    notes: tuple[str, ...] = ()  # what a person must know of the weights
    _generators: dict = dataclasses.field(default_factory=dict, repr=False)  # compiled, by their settings

    def sample(
        self,
        labels: Sequence[int | str] | Conditions | None = None,
        num_steps: int | str | Sequence[int] | None = None,
        cfg_scale: float | None = None,
        seed: int = 0,
        *,
        num_images: int | None = None,
        image: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        classes: np.ndarray | None = None,
        layout: str | Sequence[str] | None = None,
        prompts: str | Sequence[str] | None = None,
        classifier: "LoadedModel | None" = None,
        classifier_scale: float = 1.0,
        interpolate: int | None = None,
        progress: bool = False,
        num_frames: int = 0,
        **sampling,
    ) -> np.ndarray:
        """Returns images uint8 [N, H, W, 3], one a label; what is None is the config's `sampling` value.

        Image i depends on (seed, i) and its conditions alone. Grey images repeat their channel. The label
        `config.data.num_classes` asks for no class. A model of latents without an autoencoder (converted without
        one) returns the latents, float32 [N, h, w, c] at unit variance.

        With an image and a mask every model paints in the mask, and leaves the other pixels as they are; with an image
        and `strength` below 1 it draws from that one, noised. A model of super-resolution enlarges the image, one of
        semantic synthesis draws for `classes`, one of boxes for a `layout` such as "cat 0 0.25 0.5 1; dog 0.5 0 1 1",
        one of text for `prompts`.

        Args:
          labels: [N] numbers or names (`config.data.class_names`), or a dict of raw conditions [N, ...]
            (`models.conditioners`); None for a model that reads none.
          num_images: N where there are no labels; None: one a prompt, layout or image, or 1.
          num_steps: a count, "ddimN" or the timesteps themselves, ascending.
          cfg_scale: of classifier-free guidance; seed: of the noise; progress: show a bar.
          image, mask, classes, layout, prompts: see `given.Given`; one, or several in turn.
          classifier: of stage "classifier", leads to the labels (of a model that does not read them, too) with the
            scale `classifier_scale` (ADM, section 4).
          interpolate: draws so many images from each of the N to the next, both included, of conditions and of noise
            between theirs.
          num_frames: where positive, the images are [N, num_frames, H, W, 3]: predictions of x_0 on the way.
          sampling: further fields of `SamplingConfig`, such as `sampler`, `eta` or `strength`.
        """
        self._check_stage("diffusion", "sample")
        if cfg_scale is not None:
            sampling["cfg_scale"] = cfg_scale
        settings = override_sampling(self.config.sampling, num_steps, **sampling)
        conditions, known = self.inputs(labels, Given(image, mask, classes, layout, prompts), settings, num_images)
        classifier = None if classifier is None else classifier.as_guide(self.config, classifier_scale)
        path = None
        if interpolate is not None:
            (conditions, known), path = interpolation((conditions, known), interpolate)
        shown = {"progress": progress, "num_frames": num_frames}
        return self.draw(conditions, settings, seed, known, classifier, path, **shown)

    def as_guide(self, config: Config, scale: float) -> ClassifierGuide:
        """Returns this classifier as what leads the sampler of a denoiser's config."""
        check_classifier(config, self.config)
        if not np.isfinite(scale):
            raise ValueError(f"classifier_scale={scale} must be a finite number")
        return ClassifierGuide(self.params, build_classifier(self.config), float(scale))

    def inputs(
        self,
        labels: Sequence[int | str] | Conditions | None,
        given: Given,
        sampling: SamplingConfig,
        num_images: int | None = None,
    ) -> tuple[Conditions, KnownImages | None]:
        """Returns raw conditions of labels (or more of them) and of what is given, and the images known from it."""
        config = self.config
        conditions = {}
        if labels is not None:
            labels = self._numbered(labels)
            is_dict = isinstance(labels, Mapping)
            conditions = as_conditions(labels if is_dict else check_labels(labels, config.data.num_classes))
        if num_images is not None and num_images < 1:
            raise ValueError(f"{num_images=} must be positive")
        captions = None if "text" in conditions else self.captions
        given.check(dataclasses.replace(config, sampling=sampling), captions and captions.tokenizer, conditions)
        num_images = num_images or (len(jax.tree.leaves(conditions)[0]) if conditions else given.num_given)
        if "label" not in config.condition_dropout:
            # Not read, unless a classifier leads to it: it says how many images.
            conditions.setdefault("label", np.full(num_images, config.data.num_classes, np.int32))
        conditions = given.conditions(config, self.codec, num_images, captions) | conditions  # the raw ones stay
        return conditions, given.known(config, num_images)

    def _numbered(self, labels: Sequence[int | str] | Conditions) -> np.ndarray | Conditions:
        """Returns labels, or raw conditions, with the number of each class that is given by its name."""
        if isinstance(labels, Mapping):
            names = isinstance(labels.get("label"), (str, list, tuple))
            return {**labels, "label": self._numbered(labels["label"])} if names else labels
        labels, data = [labels] if isinstance(labels, str) else labels, self.config.data
        if isinstance(labels, (list, tuple)):
            labels = [class_number(x, data.class_names, data.num_classes) if isinstance(x, str) else x for x in labels]
        return np.array(labels)

    def draw(
        self,
        conditions: Conditions,
        sampling: SamplingConfig,
        seed: int,
        known: KnownImages | None = None,
        classifier: ClassifierGuide | None = None,
        path: Path | None = None,
        *,
        progress: bool = False,
        num_frames: int = 0,
    ) -> np.ndarray:
        """Returns the images of raw conditions, as `sample` does, of settings that are all given."""
        return self._generator(sampling, num_frames)(self.params, conditions, seed, progress, known, classifier, path)

    def denoise(self, x_t: Array, t: Array, labels: Array | Conditions) -> Array:
        """Returns the network's output [B, H, W, 2C] float32: what it predicts, then the variance's interpolation.

        x_t: [B, H, W, C] noised latents (or pixels); t: [B] in [0, num_timesteps); labels: [B] in
        [0, num_classes], or a dict of raw conditions [B, ...].
        """
        self._check_stage("diffusion", "denoise")
        x_t, t = self._noised(x_t, t)
        conditions = {}
        if self.config.condition_dropout:
            conditions, count = check_conditions(self.config, labels)
            if count != len(x_t):
                raise ValueError(f"conditions must be of as many images as x_t, {len(x_t)}, not {count}")
        return self._network(self.params, x_t, t, conditions)

    def classify(self, x_t: Array, t: Array) -> Array:
        """Returns the logits [B, classes] float32 of a classifier of noised images, x_t and t as for `denoise`."""
        self._check_stage("classifier", "classify")
        return self._network(self.params, *self._noised(x_t, t))

    def encode(self, images: Array, tile: int | None = None) -> Array:
        """Returns latents [B, H/f, W/f, c] float32, the posterior's mean at unit variance, of images in [-1, 1].

        tile: images wider or higher than this many latents are encoded by overlapping tiles of it, which takes the
        memory of one tile; the result is close to the whole's, not equal (see `models.tiles`). None: whole.
        """
        codec, channels = self._require_codec(), self.config.data.channels
        images = _floats("images", images, (None, None, None, channels), "in [-1, 1]; of uint8, x / 127.5 - 1")
        if images.shape[1] % codec.factor or images.shape[2] % codec.factor:
            raise ValueError(
                f"images must have sides that {codec.factor}, the autoencoder's downsampling, divides, not "
                f"{images.shape[1]} x {images.shape[2]}; scale or crop them"
            )
        return _encode(codec, images, tile=_checked_tile(tile))

    def decode(self, latents: Array, tile: int | None = None) -> Array:
        """Returns images [B, H, W, C] float32 around [-1, 1], not clipped, of latents as `encode` returns them.

        tile: latents wider or higher than this are decoded by overlapping tiles of it, as in `encode`.
        """
        codec = self._require_codec()
        latents = _floats("latents", latents, (None, None, None, codec.module.latent_channels), "of unit variance")
        return _decode(codec, latents, tile=_checked_tile(tile))

    def _noised(self, x_t: Array, t: Array) -> tuple[Array, Array]:
        """Returns x_t as float32 and t as int32, of this model's shape and timesteps."""
        x_t = _floats("x_t", x_t, (None, *self.config.input_shape), "noised latents or pixels")
        if not isinstance(t, jax.core.Tracer):
            t, last = check_integers("t", t), self.config.diffusion.num_timesteps - 1
            if t.shape != x_t.shape[:1] or not ((t >= 0) & (t <= last)).all():
                raise ValueError(f"t must be {len(x_t)} timesteps, one an image, from 0 to {last}; got {str(t)[:200]}")
        return x_t, jnp.asarray(t, jnp.int32)

    def _check_stage(self, stage: str, method: str) -> None:
        if self.config.stage != stage:
            raise ValueError(f"{method} needs a workdir of stage {stage!r}; this one is of {self.config.stage!r}")

    def _require_codec(self) -> Codec:
        if self.codec is None:
            raise ValueError(
                "this model has no autoencoder to encode or decode with: it was trained on pixels, or converted "
                "without `--autoencoder`"
            )
        return self.codec

    def _generator(self, sampling: SamplingConfig, num_frames: int):
        key = sampling, num_frames
        if key not in self._generators:
            self._generators[key] = make_generator(self.config, sampling, self.codec, self.mesh, num_frames)
        return self._generators[key]

    @cached_property
    def _network(self):
        model = build_model(self.config)
        return jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))


def _floats(name: str, value: Array, shape: tuple[int | None, ...], what: str) -> Array:
    """Returns an array as float32; raises ValueError where it has another shape (None: any size), or no floats."""
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    wanted = [letter if size is None else size for letter, size in zip("BHWC", shape, strict=True)]
    fits = array.ndim == len(shape) and all(size in (None, own) for size, own in zip(shape, array.shape, strict=True))
    if not fits or 0 in array.shape:
        raise ValueError(f"{name} must be [{', '.join(map(str, wanted))}] {what}, not {list(array.shape)}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} must be floats {what}, not {array.dtype}")
    return jnp.asarray(array, jnp.float32)


def _checked_tile(tile: int | None) -> int | None:
    if tile is not None and (not isinstance(tile, int) or tile < MIN_TILE):
        raise ValueError(f"{tile=} must be {MIN_TILE} latents or more, or None for whole images")
    return tile


def load(
    workdir: str | os.PathLike,
    step: int | None = None,
    *,
    average: str | None = None,
    ema_length: float | None = None,
) -> LoadedModel:
    """Returns the model of a workdir's newest good checkpoint (or of `step`); no config or flag is needed.

    Args:
      workdir: of a run, or converted, "~" is the home; step: of a checkpoint, None for the newest.
      average: a further average of the run's config, such as "decay_0.999"; None: its main one.
      ema_length: of an average to reconstruct from the run's snapshots up to that step (`models.averages`).

    Raises:
      ValueError: where there is no intact checkpoint, no such average or no snapshot.
    """
    workdir = pathlib.Path(user_path(os.fspath(workdir)))
    mesh = make_mesh(MeshConfig())
    config, params, step, notes = _load_params(workdir, step, mesh, average, ema_length)
    if config.stage == "autoencoder":
        codec = Codec(params, build_autoencoder(config.autoencoder, config.data.channels), 1.0)
    elif config.latents is None or not (workdir / AUTOENCODER_DIR).is_dir():
        codec = None
    else:
        scale, latents = _scale_of(workdir, config), config.latents
        folder = workdir / AUTOENCODER_DIR
        codec = load_codec(folder, scale, mesh, shift=latents.shift, digest=latents.autoencoder)
    text = config.conditions and config.conditions.text
    captions = None
    if text and (workdir / TEXT_ENCODER_DIR).is_dir():
        captions = load_caption_encoder(text, workdir / TEXT_ENCODER_DIR)
        check_text_encoder(text, workdir / TEXT_ENCODER_DIR)
    return LoadedModel(config, params, step, codec, mesh, captions, notes)


def load_codec(
    workdir: str | os.PathLike,
    scale: float,
    mesh: Mesh,
    step: int | None = None,
    shift: float = 0.0,
    digest: str | None = None,
) -> Codec:
    """Returns the autoencoder of a workdir's newest good checkpoint (or of `step`), for latents (z - shift) * scale.

    digest: of the autoencoder that the latents are of (`params_digest`); None, as old conversions have it: any.

    Raises:
      ValueError: where it is another one.
    """
    config, params, _, _ = _load_params(workdir, step, mesh)
    if config.stage != "autoencoder":
        raise ValueError(f"{workdir} is of stage {config.stage!r}; an autoencoder's workdir is needed here")
    found = digest and params_digest(params)
    if found != digest:
        raise ValueError(
            f"{workdir} must be the autoencoder of the latents (config.latents.autoencoder={digest!r}), but is another "
            f"({found!r}); put the right one there"
        )
    return Codec(params, build_autoencoder(config.autoencoder, config.data.channels), scale, shift)


def _scale_of(workdir: pathlib.Path, config: Config) -> float:
    if config.latents.scale is None:
        raise ValueError(
            f"{workdir} has an autoencoder, but no config.latents.scale to decode latents with, as older versions "
            "converted; convert the weights again"
        )
    return config.latents.scale


def stored_digest(workdir: str | os.PathLike) -> str:
    """Returns the `params_digest` of an autoencoder's workdir as `load_codec` would read it.

    This process alone reads it, and no device is used.

    Raises:
      ValueError: where there is none, or it is damaged.
    """
    config, found = read_alone(workdir)
    if config.stage != "autoencoder":
        raise ValueError(f"{workdir} is of stage {config.stage!r}, not an autoencoder")

    def leaf(path: tuple, wanted: jax.ShapeDtypeStruct) -> np.ndarray:
        array = found.get(leaf_name(path))
        if array is None or array.size != math.prod(wanted.shape):
            raise ValueError(f"{workdir} is of another network: it has no {leaf_name(path)} {wanted.shape}")
        return array.reshape(wanted.shape).astype(wanted.dtype)

    return params_digest(jax.tree_util.tree_map_with_path(leaf, abstract_params(config)))


def copy_weights(workdir: str | os.PathLike, target: pathlib.Path) -> None:
    """Copies a workdir's config and checkpoints to a new folder, and nothing else that may be there.

    Raises:
      ValueError: where one of these is a link: it would be followed to anywhere.
    """
    workdir = pathlib.Path(workdir)
    parts = [workdir / CONFIG_FILE, workdir / CHECKPOINTS]
    links = [path for path in (*parts, *parts[1].rglob("*")) if path.is_symlink()]
    if links:
        raise ValueError(f"{links[0]} must not be a link, in an autoencoder's workdir; put there what it leads to")
    target.mkdir()
    if parts[0].is_file():
        shutil.copy(parts[0], target)
    shutil.copytree(parts[1], target / CHECKPOINTS)


def _load_params(
    workdir, step: int | None, mesh: Mesh, average: str | None = None, ema_length: float | None = None
) -> tuple[Config, Params, int, tuple[str, ...]]:
    """Returns a config, its weights and their step, and notes on them, which are printed too."""

    def read(step: int) -> tuple[Config, Params]:
        config = for_platform(find_checkpoint(workdir, step)[1], mesh.devices.flat[0].platform)
        return config, _read_params(workdir, config, step, mesh, average, ema_length)

    step, (config, params) = read_newest_good(workdir, read, step)
    # Weights that were converted, or copied for evaluation, are what they are: no average began with them.
    averaged = ema_length is None and (average or "ema_params" in Checkpoints(workdir).items(step))
    note = initial_share_note(config.training, step, average) if averaged else None
    if note:
        print_line(f"warning: {workdir}: {note}")
    return config, params, step, (note,) if note else ()


def _read_params(workdir, config: Config, step: int, mesh: Mesh, average: str | None, ema_length: float | None):
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), abstract_params(config)
    )
    if ema_length is not None:
        return _reconstruct(workdir, config, step, abstract, ema_length)
    if average is None:
        return restore_eval_params(workdir, step, abstract)
    names = average_decays(config.training)
    if average not in names:
        raise ValueError(f"{workdir} has no average {average!r}, only {', '.join(names) or 'the main one'}")
    return Checkpoints(workdir).restore(step, {"averages": dict.fromkeys(names, abstract)})["averages"][average]


def _reconstruct(workdir, config: Config, step: int, abstract: Params, length: float) -> Params:
    """Returns the post-hoc average: a weighted sum of all snapshots up to the step, one in memory at a time."""
    lengths = config.training.ema_lengths
    if not lengths or not (pathlib.Path(workdir) / SNAPSHOTS).is_dir():
        raise ValueError(
            f"{workdir} has no snapshots: its run had no config.training.ema_lengths; leave out ema_length"
        )
    if not 0 < length < 0.288:
        raise ValueError(f"ema_length={length} must be between 0 and 0.288 (the plain mean)")
    snapshots = Checkpoints(workdir, folder=SNAPSHOTS)
    kept = [(at, each) for at in snapshots.all_steps() if at <= step for each in lengths]
    if not kept:
        raise ValueError(f"{workdir} has no snapshot up to step {step} yet; train on, or choose a later step")
    total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
    for (at, each), weight in zip(kept, reconstruction_weights(kept, step, length), strict=True):
        name = length_name(each)
        try:
            snapshot = snapshots.restore(at, {name: abstract})[name]
        except DamagedCheckpoint as error:
            raise ValueError(f"{error}; delete its folder to make the average of the other snapshots") from error
        total = jax.tree.map(lambda a, b, weight=weight: a + np.float32(weight) * b, total, snapshot)
    return total
