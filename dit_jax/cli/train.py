"""Trains the stage that the config names; an existing workdir is resumed from its newest checkpoint."""

import argparse
import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import shutil
import sys
import typing

from dit_jax.cli.main import add_config_argument, load_run_config, path_flag
from dit_jax.config import Config, TextConfig, check_platform, fixed_differences
from dit_jax.data.classes import describe_classes
from dit_jax.files import only_one, user_path, written_whole
from dit_jax.parallel.preemption import Preemption

if typing.TYPE_CHECKING:
    from collections.abc import Callable

    from jax.sharding import Mesh

    from dit_jax.data.pipeline import Transform
    from dit_jax.training.loop import Task

HELP = "trains the network of a config: an autoencoder, a denoiser, or a classifier that guides one"
RUN_LOCK = ".lock"  # of the one process that trains in a workdir
PICTURE_SEED = 0
NUM_PICTURES = 50  # images in a grid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    add_config_argument(parser)
    parser.add_argument(
        "--workdir", type=path_flag, required=True, metavar="DIR", help="where the run lives; resumed if it exists"
    )
    parser.add_argument(
        "--replay_step",
        type=int,
        metavar="STEP",
        help="instead of training make this step of the run again, such as one in bad_steps.jsonl, and tell what was "
        "wrong with it; nothing is written",
    )


def run(args: argparse.Namespace) -> None:
    """Checks everything that needs no device, then trains; SIGTERM and Ctrl-C make it save and exit."""
    with contextlib.ExitStack() as stack:
        preemption = None if args.replay_step is not None else stack.enter_context(Preemption(interrupts=True))
        _run(args, preemption, stack)


def _run(args: argparse.Namespace, preemption: Preemption | None, stack: contextlib.ExitStack) -> None:
    config = load_run_config(args, args.workdir)
    if args.replay_step is not None and not 1 <= args.replay_step <= config.training.num_train_steps:
        raise ValueError(
            f"--replay_step={args.replay_step} must be a step of the run, from 1 to {config.training.num_train_steps}"
        )
    from_images = reads_images(config)
    from dit_jax.parallel.compilation_cache import use_compilation_cache
    from dit_jax.parallel.distributed import is_first, start_processes, wait_for_all

    cache = use_compilation_cache(config.compute.compilation_cache)
    start_processes()
    workdir = pathlib.Path(args.workdir)
    if args.replay_step is not None and not (workdir / "config.json").is_file():
        raise ValueError(f"--workdir={workdir} has no run whose step could be replayed; give the workdir of one")
    if is_first() and args.replay_step is None:
        open_workdir(args.workdir)
        stack.enter_context(only_one(workdir / RUN_LOCK, f"--workdir={workdir} is being trained"))
    wait_for_all("workdir")
    if not workdir.is_dir():
        raise ValueError(f"--workdir={workdir} must be on a disk that all hosts share; this one does not see it")
    check_starting_weights(config, workdir)  # what needs no data, and below the rest
    config = with_recorded_version(config, workdir)
    config = with_text_encoder(config)
    config = resolve_images(config) if from_images else resolve_latents(config)
    if config.data.class_names and is_first():
        print(describe_classes(config.data.class_names), flush=True)
    initial_notes = check_starting_weights(config, workdir)
    from dit_jax.parallel.mesh import check_batch_size, make_mesh

    mesh = make_mesh(config.mesh)
    check_platform(config, mesh.devices.flat[0].platform)
    check_batch_size(config.training.global_batch_size, mesh, "config.training.global_batch_size")
    compiled = compiler(config, mesh, cache)
    check_same_run(workdir, config)
    if config.latents is not None:
        if is_first() and args.replay_step is None:
            copy_autoencoder(autoencoder_source(config), workdir, config.latents.autoencoder)
        wait_for_all("autoencoder")
    if text_of(config) and is_first() and args.replay_step is None:
        from dit_jax.evaluation.text_encoders import TEXT_ENCODER_DIR, copy_text_encoder, text_digest

        text, copy = text_of(config), workdir / TEXT_ENCODER_DIR
        if text_digest(text, copy) != text.encoder:
            copy_text_encoder(text, text_encoder_source(config), copy)
    tasks = {"autoencoder": autoencoder_task, "diffusion": diffusion_task, "classifier": classifier_task}
    from dit_jax.training.loop import train

    task = dataclasses.replace(tasks[config.stage](config, mesh, workdir), initial_notes=initial_notes)
    if args.replay_step is not None:
        replay_step(config, workdir, task, mesh, args.replay_step, compiled)
        return
    train(config, workdir, task, mesh, args.started, preemption, compiled)


def compiler(config: Config, mesh: "Mesh", cache: str | None) -> "Callable":
    """Returns what makes of the jitted step one that is compiled once, or read if an earlier start kept it in `cache`.

    It is read from now on, while the rest is imported and the state made.
    """
    import jax

    # Processes must compile the same; and of an autoencoder that encodes in each step the config has but the name.
    encodes = config.latents is not None and config.latents.encode_with is not None
    if cache is None or jax.process_count() > 1 or encodes:
        return lambda step_fn, *_: step_fn
    from dit_jax.training.kept_step import KeptStep

    kept = KeptStep(config, mesh, cache)

    def compiled(step_fn, state, constants):
        from dit_jax.cli.plan import abstract_batch

        return kept.compiled(step_fn, state, abstract_batch(config, mesh), constants)

    return compiled


def replay_step(
    config: Config, workdir: pathlib.Path, task: "Task", mesh: "Mesh", step: int, compiled: "Callable"
) -> None:
    """Makes a step of a run again and prints what was wrong with it."""
    from dit_jax.parallel.distributed import is_first
    from dit_jax.training.replay import replay

    for line in replay(config, workdir, task, mesh, step, compiled):
        if is_first():
            print(line, flush=True)


def open_workdir(name: str) -> None:
    """Makes the workdir; raises ValueError where it cannot be written."""
    workdir = pathlib.Path(name)
    if re.match(r"\w+://", name):
        raise ValueError(
            f"--workdir={name} must be a folder; mount the bucket on every host (gcsfuse) and give the path there"
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"--workdir={workdir} cannot be written ({error.strerror}); choose a folder that you may write to"
        ) from error


def check_same_run(workdir: pathlib.Path, config: Config) -> None:
    """Raises ValueError where the workdir holds a run of another stage or config."""
    from dit_jax.checkpoint import read_config
    from dit_jax.data.identity import continues, is_of_names, is_same_place

    old = read_config(workdir)
    if old is None:
        return
    if continues(old.data.version, config.data.version):
        # That it is the same data was found out by its content, or else its names and place: the names may differ.
        data = {"version": config.data.version}
        if not is_of_names(old.data.version) or is_same_place(old.data.name, config.data.name):
            data["name"] = config.data.name
        old = dataclasses.replace(old, data=dataclasses.replace(old.data, **data))
    differences = fixed_differences(old, config)
    if differences:
        shown = "; ".join(differences[:3]) + (f"; and {len(differences) - 3} more" if len(differences) > 3 else "")
        raise ValueError(
            f"--workdir={workdir} holds a run of another config ({shown}); choose another workdir, or undo the change"
        )


def with_recorded_version(config: Config, workdir: pathlib.Path) -> Config:
    """Returns the config with the version of the data that the run in the workdir has recorded, if there is one."""
    from dit_jax.checkpoint import read_config

    old = read_config(workdir)
    if old is None or config.data.version is not None:
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, version=old.data.version))


def check_starting_weights(config: Config, workdir: pathlib.Path) -> list[str]:
    """Returns lines on the weights of `config.training.init_from`; [] for a run with a checkpoint, which reads no more.

    Raises:
      ValueError: where they are not there, or were trained for something else (`training.starting_weights`).
    """
    if config.training.init_from is None:
        return []
    from dit_jax.checkpoint import Checkpoints, find_checkpoint
    from dit_jax.training.starting_weights import check_starting_weights

    if Checkpoints(workdir).all_steps():
        return []
    return check_starting_weights(config, find_checkpoint(config.training.init_from)[1])


def reads_images(config: Config) -> bool:
    """Returns whether training reads images, rather than a latent cache.

    Raises:
      ValueError: where it should do both. A converted config may say of neither where they are.
    """
    found = config.latents is None or config.latents.encode_with is not None
    if config.spatial is not None and not found:
        raise ValueError(
            "config.conditions.spatial is made of images, which a latent cache does not hold; set "
            "config.latents.encode_with=WORKDIR of the autoencoder, without config.latents.path"
        )
    return found


def autoencoder_source(config: Config) -> pathlib.Path:
    """Returns the workdir of the autoencoder that the config's latents are of."""
    from dit_jax.evaluation.loaded import AUTOENCODER_DIR

    latents = config.latents
    return pathlib.Path(latents.encode_with) if latents.encode_with else pathlib.Path(latents.path) / AUTOENCODER_DIR


def text_of(config: Config) -> TextConfig | None:
    """Returns the section of the captions that the config's denoiser is conditioned on."""
    return config.conditions and config.conditions.text


def encodes_text(config: Config) -> bool:
    """Returns whether a frozen encoder encodes captions in each step, rather than `dit-jax encode` before."""
    return bool(text_of(config)) and text_of(config).transformer is None and reads_images(config)


def text_encoder_source(config: Config) -> pathlib.Path:
    """Returns the folder of the config's tokenizer and frozen text encoder."""
    from dit_jax.evaluation.text_encoders import TEXT_ENCODER_DIR

    cached = pathlib.Path(config.latents.path or "") / TEXT_ENCODER_DIR if config.latents else None
    return cached if cached and not reads_images(config) and cached.is_dir() else pathlib.Path(text_of(config).path)


def with_text_encoder(config: Config) -> Config:
    """Returns the config that records its tokenizer and frozen text encoder, which are there and fit it."""
    text = text_of(config)
    if not text:
        return config
    from dit_jax.evaluation.text_encoders import load_caption_encoder, text_digest

    folder = text_encoder_source(config)
    load_caption_encoder(text, folder)
    digest = text_digest(text, folder)
    if text.encoder not in (None, digest):
        raise ValueError(f"config.conditions.text.encoder={text.encoder!r} but {folder} has {digest!r}; set its path")
    conditions = dataclasses.replace(config.conditions, text=dataclasses.replace(text, encoder=digest))
    return dataclasses.replace(config, conditions=conditions)


def example_transform(config: Config, train: bool) -> "Transform":
    """Returns the transform of a diffusion run's examples, with what its conditions are made of."""
    from dit_jax.data.pipeline import (
        all_of,
        cached_text,
        caption_tokens,
        image_transform,
        latent_transform,
        layout_tokens,
        spatial_arrays,
    )
    from dit_jax.data.tokenizer import Tokenizer

    text, conditions = text_of(config), []
    if config.layout:
        conditions.append(layout_tokens(config.layout))
    if config.spatial:
        conditions.append(spatial_arrays(config.data, config.spatial))
    if text and (text.transformer is not None or reads_images(config)):
        tokenizer = Tokenizer(text_encoder_source(config), text.max_length)
        conditions.append(caption_tokens(tokenizer, text.caption_field))
    elif text:
        conditions.append(cached_text(text.max_length))
    if reads_images(config):
        return image_transform(config.data, train, all_of(conditions))
    return latent_transform(train, all_of(conditions))


def with_encoder(config: Config) -> Config:
    """Returns the config that records the autoencoder which encodes in each step, of whose latents it must be."""
    from dit_jax.checkpoint import find_checkpoint
    from dit_jax.evaluation.loaded import stored_digest

    latents, data = config.latents, config.data
    name = f"config.latents.encode_with={latents.encode_with!r}"
    _, encoder = find_checkpoint(latents.encode_with)
    if encoder.stage != "autoencoder":
        raise ValueError(f"{name} is a run of stage {encoder.stage!r}; give an autoencoder's workdir")
    side = data.image_size / 2**encoder.num_downsamplings
    shape = (side, side, encoder.autoencoder.latent_channels)
    digest = stored_digest(latents.encode_with)
    for key, ours, theirs in (
        ("data.channels", data.channels, encoder.data.channels),
        ("latents.shape", latents.shape, shape),
        ("latents.autoencoder", latents.autoencoder or digest, digest),
    ):
        if ours != theirs:
            raise ValueError(f"config.{key}={ours!r} but {name} has {theirs!r}; change the config or the workdir")
    return dataclasses.replace(config, latents=dataclasses.replace(latents, autoencoder=digest))


def resolve_images(config: Config) -> Config:
    """Returns the config with the version and the classes of its data set, which is prepared if it is not yet."""
    from dit_jax.data.sources import prepare, source_identity
    from dit_jax.parallel.distributed import is_first

    if config.latents is not None:
        config = with_encoder(config)
    origin = prepare(config.data)
    if is_first():
        print(origin, flush=True)
    return with_data_version(config, source_identity(config.example_data))


def with_data_version(config: Config, identity: dict) -> Config:
    """Returns the config that records which data and classes it has, so that a run is never resumed on others.

    Raises:
      ValueError: where it has recorded other data, or where other processes of the run see other data.
    """
    from dit_jax.checkpoint.agreement import agree
    from dit_jax.data.identity import continued_version, describe_version, is_of_names
    from dit_jax.parallel.distributed import is_first

    recorded, fields = config.data.version, fields_read(config)
    version = continued_version(recorded, identity, fields)
    if version is None:
        raise ValueError(
            f"config.data.version={recorded!r}, of the config or of the run in the workdir, but the data is "
            f"{describe_version(identity, fields)!r}: other images, or other fields of them; give those of the run, or "
            "choose another workdir"
        )
    if version != recorded and is_of_names(recorded) and is_first():
        print(
            f"this run had recorded the names of its images alone, and those of {config.data.name} are the same; that "
            "they were these images is not known, from now on it is recorded",
            flush=True,
        )
    versions = agree("data", version)
    if len(set(versions)) > 1:
        raise ValueError(f"all hosts must see the same data, but have {', '.join(sorted(set(versions)))}; mend it")
    names = identity.get("class_names")  # None: of a cache that version 1 of the rules made
    ours = config.data.class_names
    if names is not None and ours is not None and tuple(names) != ours:
        first = next(i for i in range(len(ours)) if i >= len(names) or names[i] != ours[i])
        raise ValueError(
            f"config.data.class_names[{first}]={ours[first]!r} but the data has {names[first : first + 1]}; change the "
            "config, or leave out config.data.class_names"
        )
    names = ours if names is None else tuple(names)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, version=version, class_names=names))


def fields_read(config: Config) -> list[str]:
    """Returns the fields of an example, beside image and label, that the run reads."""
    text, layout = text_of(config), config.layout
    fields = [text.caption_field] if text else []
    fields += [layout.layout_field] if layout and layout.layout_field not in fields else []
    return fields + (["map"] if config.data.map_field is not None else [])


def check_cached_images(config: Config, identity: dict) -> None:
    """Raises ValueError where a latent cache is not of the images that the config names.

    identity: of the cache's images. Those of a folder are compared, if it is on this machine; otherwise the names are.
    """
    from dit_jax.data.identity import CONTENT, NAMES, in_form_of, is_of_names, is_same_place
    from dit_jax.data.sources import source_identity

    if not {"name", "version"} <= identity.keys():
        raise ValueError(
            f"latent cache {config.latents.path} must tell of which data it is, but does not; encode again"
        )
    data, version = config.example_data, str(identity["version"])
    ours, theirs = {"config.data.name": data.name}, {"config.data.name": identity["name"]}
    if os.path.isdir(user_path(data.name)) and version.startswith((CONTENT, NAMES)):
        listed_as = version if is_of_names(version) else data.version
        found = in_form_of(identity, source_identity(dataclasses.replace(data, version=listed_as)))
        for facts, of in ((ours, found), (theirs, identity)):
            facts |= {"config.data.name": of["name"], f"the version of {data.name}": of["version"]}
            if "fields" in identity:
                facts |= {
                    f"the version of {name!r} in {data.name}": of["fields"].get(name) for name in fields_read(config)
                }
    elif is_same_place(data.name, identity["name"]):
        return
    for name, value in ours.items():
        if value != theirs[name]:
            raise ValueError(
                f"{name} is {value!r}, but the latent cache {config.latents.path} has {theirs[name]!r}: it is of other "
                "images; give these, or encode again to another folder"
            )


def resolve_latents(config: Config) -> Config:
    """Returns the config with the cache's data version, scale and autoencoder.

    Raises:
      ValueError: where the cache is missing, incomplete or of other images than the config's.
    """
    from dit_jax.data.identity import is_of_names
    from dit_jax.data.latent_cache import UNSEALED_VERSION, read_manifest
    from dit_jax.data.transforms import CROP
    from dit_jax.parallel.distributed import is_first

    latents = config.latents
    if latents.path is None:
        raise ValueError(
            "config.latents.path is missing; write a cache with `dit-jax encode` and set --config.latents.path=DIR"
        )
    manifest = read_manifest(latents.path)
    given = {
        "config.latents.shape": (latents.shape, manifest.latent_shape),
        "config.latents.autoencoder": (latents.autoencoder or manifest.autoencoder, manifest.autoencoder),
        "crop": (CROP, manifest.data.get("crop")),  # there is one way to crop
    }
    text = text_of(config)
    if text and (
        manifest.text is None if text.transformer is None else text.caption_field not in manifest.extra_fields
    ):
        raise ValueError(
            f"latent cache {latents.path} must hold the captions {text.caption_field!r}, as `dit-jax encode` writes "
            "them for a config with config.conditions.text, but does not; encode again"
        )
    if config.layout and config.layout.layout_field not in manifest.extra_fields:
        raise ValueError(
            f"latent cache {latents.path} must hold the layouts {config.layout.layout_field!r}, as `dit-jax encode` "
            "writes them for a config with config.conditions.layout, but does not; encode again"
        )
    if text and text.transformer is None:
        cached = {"caption_field": manifest.text.field} | {
            name: getattr(manifest.text, name) for name in ("encoder", "max_length")
        }
        given |= {f"config.conditions.text.{name}": (getattr(text, name), theirs) for name, theirs in cached.items()}
    for name in ("image_size", "channels", "num_classes", "horizontal_flip"):
        given[f"config.data.{name}"] = getattr(config.data, name), manifest.data.get(name)
    if "background" in manifest.data:  # of a folder
        given["config.data.background"] = list(config.data.background), manifest.data["background"]
    for key, (ours, theirs) in given.items():
        if ours != theirs:
            raise ValueError(
                f"{key}={ours!r} but the latent cache {latents.path} has {theirs!r}; change the config or encode again"
            )
    check_cached_images(config, manifest.data)
    lacks = ["the content of its images, whose names it has"] if is_of_names(manifest.data["version"]) else []
    lacks += ["sums of its records, which `dit-jax encode` adds"] if manifest.version == UNSEALED_VERSION else []
    if is_first() and lacks:
        print(f"latent cache {latents.path} is of an older version: it lacks {', and '.join(lacks)}", flush=True)
    scale = manifest.scale if latents.scale is None else latents.scale
    resolved = dataclasses.replace(latents, scale=scale, autoencoder=manifest.autoencoder)
    return with_data_version(dataclasses.replace(config, latents=resolved), manifest.data)


def copy_autoencoder(source: pathlib.Path, workdir: pathlib.Path, digest: str | None = None) -> None:
    """Copies an autoencoder's workdir into this one, so that this one alone can draw images.

    A good copy that is there stays. One that is damaged is replaced, and so is another autoencoder's, such as an
    earlier start has left that failed: unless there is a checkpoint, which may depend on it.

    Args:
      digest: of the autoencoder that the latents are of (`params_digest`); None: any.

    Raises:
      ValueError: where the source, or the one that must stay, is not that autoencoder.
    """
    from dit_jax.checkpoint import CHECKPOINTS, Checkpoints
    from dit_jax.evaluation.loaded import AUTOENCODER_DIR, copy_weights, stored_digest

    target = workdir / AUTOENCODER_DIR
    old = workdir / f".{AUTOENCODER_DIR}.old"
    remedy = f"run `dit-jax encode --output={source.parent}` again, if it is a latent cache's, or restore it"
    if target.is_dir():
        try:
            found = stored_digest(target)
        except ValueError as error:
            found = None
            print(f"{target} is copied from {source} again: {error}", file=sys.stderr, flush=True)
        if found is not None and digest in (None, found):
            return
        if found is not None and Checkpoints(workdir).all_steps():
            raise ValueError(
                f"{target} is the autoencoder {found!r}, but the run's latents are of {digest!r} "
                f"(config.latents.autoencoder); delete {target}, so that the one in {source} is copied"
            )
    shutil.rmtree(old, ignore_errors=True)  # of a start that was killed meanwhile
    if not (source / CHECKPOINTS).is_dir():
        raise ValueError(f"there is no autoencoder in {source}; {remedy}")
    with written_whole(target) as temporary:
        copy_weights(source, temporary)
        try:
            copied = stored_digest(temporary)
        except ValueError as error:
            raise ValueError(f"the autoencoder in {source} is damaged ({error}); {remedy}") from error
        if digest not in (None, copied):
            raise ValueError(f"{source} is the autoencoder {copied!r}, but the latents are of {digest!r}; {remedy}")
        if target.exists():
            os.replace(target, old)
    shutil.rmtree(old, ignore_errors=True)


def autoencoder_task(config: Config, mesh: "Mesh", workdir: pathlib.Path) -> "Task":
    """Returns the autoencoder's losses, its images and its pictures: originals above reconstructions."""
    from dit_jax.data.pipeline import eval_batches, image_transform
    from dit_jax.evaluation.pictures import make_reconstructor, reconstruction_grid
    from dit_jax.parallel.mesh import to_host
    from dit_jax.training.autoencoder_step import make_autoencoder_eval, make_autoencoder_gradients, make_observe

    train_source, eval_source = open_sources(config)
    transform = image_transform(config.data, train=False)
    count = min(len(eval_source), NUM_PICTURES)
    images = next(
        eval_batches(
            eval_source,
            transform,
            batch_size=count,
            rows=range(count),
            num_threads=1,
            bad_examples=bad_examples_of(config, (train_source, eval_source))[1],
        )
    )["image"]
    reconstruct = make_reconstructor(config)
    return make_task(
        config,
        mesh,
        (train_source, eval_source),
        image_transform(config.data, train=True),
        transform,
        losses=(make_autoencoder_gradients(config), make_autoencoder_eval(config)),
        draw=lambda params: {"reconstructions": reconstruction_grid(images, to_host(reconstruct(params, images)))},
        observe=make_observe(config),
        constants=load_perceptual(config, mesh),
    )


def load_perceptual(config: Config, mesh: "Mesh"):
    """Returns the weights of LPIPS on every device; None where the config does not ask for it."""
    import jax

    from dit_jax.parallel.mesh import replicated
    from dit_jax.perceptual.lpips import load_lpips

    if not config.autoencoder.perceptual_weight:
        return None
    return jax.device_put(load_lpips(config.autoencoder.lpips_path), replicated(mesh))


def diffusion_task(config: Config, mesh: "Mesh", workdir: pathlib.Path) -> "Task":
    """Returns the denoiser's losses, its latents (or images) and its pictures: samples of every class.

    Of a denoiser with other conditions than the class they are for those of held-out examples.
    """
    from dit_jax.evaluation.example_conditions import example_conditions, spread_positions
    from dit_jax.evaluation.generate import balanced_labels, make_generator
    from dit_jax.evaluation.pictures import class_texts, condition_grid, sample_grid
    from dit_jax.parallel.mesh import batch_shards
    from dit_jax.training.diffusion_step import make_diffusion_eval, make_diffusion_loss
    from dit_jax.training.step import gradients_of

    @functools.cache
    def codec():
        return load_copied_codec(config, workdir, mesh)

    @functools.cache
    def generator():  # made for the first picture: the first step need not wait for what decodes it
        share = min(config.sampling.batch_size, -(-NUM_PICTURES // batch_shards(mesh)))  # of a device
        return make_generator(config, dataclasses.replace(config.sampling, batch_size=share), codec(), mesh)

    sources, num_classes = open_sources(config), config.data.num_classes
    loss_fn, frozen = make_diffusion_loss(config), frozen_networks(config, codec, mesh)
    transforms = [example_transform(config, train) for train in (True, False)]

    @functools.cache
    def conditions(count: int) -> tuple[dict, dict]:
        """Returns the conditions of so many images, and what they are made of."""
        if set(config.condition_dropout) <= {"label"}:
            return {"label": balanced_labels(count, num_classes)}, {}
        positions, bad_examples = spread_positions(len(sources[1]), count), bad_examples_of(config, sources)[1]
        return example_conditions(config, sources[1], transforms[1], positions, frozen, mesh, bad_examples)

    def draw(params) -> dict:
        given, examples = conditions(NUM_PICTURES)
        images = generator()(params, given, PICTURE_SEED)
        if examples:
            return {"samples": condition_grid(config, [images], examples)}
        names = class_texts(config.data, given["label"]) if "label" in config.condition_dropout else None
        return {"samples": sample_grid(images, num_classes, names)}

    return make_task(
        config,
        mesh,
        sources,
        *transforms,
        losses=(gradients_of(loss_fn, config.training.accumulation_steps), make_diffusion_eval(config)),
        draw=draw,
        measure=None if config.evaluation is None else make_measure(config, mesh, generator, conditions),
        constants=frozen,
    )


def classifier_task(config: Config, mesh: "Mesh", workdir: pathlib.Path) -> "Task":
    """Returns the losses of a classifier of noised images, and its latents (or images); it draws nothing."""
    from dit_jax.training.classifier_step import make_classifier_eval, make_classifier_loss
    from dit_jax.training.step import gradients_of

    loss_fn = make_classifier_loss(config)
    return make_task(
        config,
        mesh,
        open_sources(config),
        *(example_transform(config, train) for train in (True, False)),
        losses=(gradients_of(loss_fn, config.training.accumulation_steps), make_classifier_eval(config)),
        draw=lambda params: {},
        constants=frozen_networks(config, lambda: load_copied_codec(config, workdir, mesh), mesh),
    )


def load_copied_codec(config: Config, workdir: pathlib.Path, mesh: "Mesh"):
    """Returns the autoencoder of a run's latents, from the run's own workdir; None for a run of pixels."""
    from dit_jax.evaluation.loaded import AUTOENCODER_DIR, load_codec

    latents = config.latents
    if latents is None:
        return None
    folder = workdir / AUTOENCODER_DIR
    return load_codec(folder, latents.scale, mesh, shift=latents.shift, digest=latents.autoencoder)


def frozen_networks(config: Config, codec: "Callable", mesh: "Mesh"):
    """Returns what encodes in each step, on every device; None where nothing does."""
    import jax

    from dit_jax.evaluation.text_encoders import load_text_encoder
    from dit_jax.models.conditioners import FrozenNetworks
    from dit_jax.parallel.mesh import replicated

    text_encoder = None
    if encodes_text(config):
        text_encoder = jax.device_put(load_text_encoder(text_encoder_source(config)), replicated(mesh))
    codec = codec() if reads_images(config) else None
    return None if codec is None and text_encoder is None else FrozenNetworks(codec, text_encoder)


def make_measure(config: Config, mesh: "Mesh", generator, conditions):
    """Returns the figures, by name, of images that weights draw; what they need is made for the first ones."""
    from dit_jax.evaluation.evaluator import Evaluator, make_evaluator

    evaluation, cache = config.evaluation, user_path(config.evaluation.cache)

    @functools.cache
    def evaluator() -> Evaluator:
        return make_evaluator(None, evaluation.features, config.data, mesh, cache)

    def measure(params) -> dict[str, float]:
        metrics, _ = evaluator().choose(evaluation.metrics, evaluation.num_samples, has_labels=True)
        given, examples = conditions(evaluation.num_samples)
        labels = examples["label"] if examples else given["label"]
        return evaluator().evaluate([generator()(params, given, PICTURE_SEED)], labels, metrics).values

    return measure


def open_sources(config: Config) -> tuple:
    """Returns the training and the held-out examples: images, or their cached latents."""
    from dit_jax.data.latent_cache import open_latents
    from dit_jax.data.sources import open_source

    splits = config.data.train_split, config.data.eval_split
    if reads_images(config):
        return tuple(open_source(config.example_data, split) for split in splits)
    return tuple(open_latents(config.latents.path, split) for split in splits)


def bad_examples_of(config: Config, sources: tuple) -> list:
    """Returns what takes note of examples that cannot be read: of the training data, and of the held-out data."""
    from dit_jax.data.bad_examples import BadExamples

    splits = zip((config.data.train_split, config.data.eval_split), sources, strict=True)
    return [
        BadExamples(f"{config.data.name} {split}", len(source), config.data.max_bad_share) for split, source in splits
    ]


def make_task(config, mesh, sources, train_transform, eval_transform, losses, draw, **others) -> "Task":
    """Returns the task whose batches are this process's rows of the sources."""
    from dit_jax.data.pipeline import eval_batches, train_batches, train_positions
    from dit_jax.parallel.mesh import local_rows
    from dit_jax.training.loop import Task
    from dit_jax.training.starting_weights import starting_params

    training, (train_source, eval_source) = config.training, sources
    batch_size = training.global_batch_size
    rows = local_rows(mesh, batch_size)
    bad_examples = bad_examples_of(config, sources)
    return Task(
        *losses,
        train_batches=lambda start_step: train_batches(
            train_source,
            train_transform,
            seed=config.seed,
            global_batch_size=batch_size,
            rows=rows,
            start_step=start_step,
            num_steps=training.num_train_steps,
            num_threads=config.data.num_threads,
            bad_examples=bad_examples[0],
        ),
        eval_batches=lambda: eval_batches(
            eval_source,
            eval_transform,
            batch_size=batch_size,
            rows=rows,
            num_examples=training.num_eval_examples,
            num_threads=config.data.num_threads,
            bad_examples=bad_examples[1],
        ),
        draw=draw,
        initial_params=None if training.init_from is None else functools.partial(starting_params, config, mesh),
        examples_of=lambda batch: train_positions(
            len(train_source), config.seed, range(batch * batch_size, (batch + 1) * batch_size)
        ),
        bad_examples=bad_examples,
        **others,
    )
