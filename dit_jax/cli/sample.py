"""Draws images from a trained diffusion model: `samples.npz` and `grid.png`, `denoising.png` and `png/` on request.

Killed, the same command goes on where it was, on any number of devices; the files are the same, byte for byte. Once
all are there, it draws nothing. `samples.json` has what they were drawn with.
"""

import argparse
import csv
import dataclasses
import math
import os
import pathlib
import re
import typing
from collections.abc import Sequence

from dit_jax.cli.main import path_flag, paths_flag
from dit_jax.config import ComputeConfig, Config, check_seed, override_config
from dit_jax.data.classes import class_number
from dit_jax.files import normalised, read_lines

if typing.TYPE_CHECKING:
    from dit_jax.data.tokenizer import Tokenizer
    from dit_jax.evaluation.given import Given

HELP = "draws images from a trained diffusion model"
NUM_PICTURES = 100  # images in the grid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument("--workdir", type=path_flag, required=True, metavar="DIR", help="of a diffusion run")
    parser.add_argument(
        "--output", type=path_flag, metavar="DIR", help="where the images go (default: WORKDIR/samples/drawn)"
    )
    parser.add_argument("--num_samples", type=int, help="default: 100; of prompts as many as there are, or 16")
    parser.add_argument(
        "--interpolate", type=int, metavar="N", help="N images from each (of the labels, prompts, layouts) to the next"
    )
    parser.add_argument(
        "--labels", metavar="L[,L...]", help="classes, by name or number, taken in turn (default: all of them)"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="what to draw, for a model of captions")
    parser.add_argument("--prompts_file", type=path_flag, metavar="FILE", help="prompts, one a line, taken in turn")
    images = parser.add_argument_group(
        "from images", "files, or folders of them; several, with commas, are taken in turn"
    )
    images.add_argument(
        "--image", type=paths_flag, metavar="FILE", help="to enlarge, to paint in (with --mask), or to start from"
    )
    images.add_argument(
        "--mask", type=paths_flag, metavar="FILE", help="white where to paint; what is dark or transparent stays"
    )
    images.add_argument(
        "--map", type=paths_flag, metavar="FILE", help="of the pixels' classes, for a model of semantic synthesis"
    )
    images.add_argument(
        "--layout",
        type=path_flag,
        metavar="'CLASS LEFT TOP RIGHT BOTTOM; ...'",
        help="boxes to draw, in fractions of the image; or a file with a layout a line",
    )
    images.add_argument("--strength", help="of the noise on the image that the drawing starts from, below 1")
    parser.add_argument("--sampler", help="ancestral, ddim, dpm_solver or plms (default: the run's config.sampling)")
    parser.add_argument("--steps", help="a count, ddimN, or timesteps with commas between (default: the run's)")
    parser.add_argument("--cfg_scale", help="guidance, 1 is none (default: the run's config.sampling)")
    parser.add_argument(
        "--classifier",
        type=path_flag,
        metavar="DIR",
        help="of a classifier's run, which leads the drawing to the labels",
    )
    parser.add_argument("--classifier_scale", type=float, default=1.0, help="of its gradient (default: %(default)s)")
    parser.add_argument("--eta", help="DDIM's noise, 0 is deterministic (default: the run's)")
    parser.add_argument("--seed", type=int, default=0, help="image i depends on (seed, i) and its label alone")
    parser.add_argument("--average", help="another average of the weights that the run kept, such as decay_0.999")
    parser.add_argument("--ema_length", type=float, help="of an average made now from the run's snapshots, such as 0.1")
    parser.add_argument(
        "--num_frames", type=int, default=0, help="also draw denoising.png: x_0 as predicted at so many steps"
    )
    parser.add_argument(
        "--png", action="store_true", help="also write png/000000.png, ... for programs that take a folder of images"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="draw in the place of images of other settings that are there"
    )
    parser.set_defaults(overridable="sampling.")
    parser.epilog = "Any other key of the run's config.sampling is set with --config.sampling.KEY=VALUE."


def run(args: argparse.Namespace) -> None:
    """Draws what was not drawn before, then writes each file at once."""
    if args.num_samples is not None and args.num_samples < 1:
        raise ValueError(f"--num_samples={args.num_samples} must be positive")
    if args.interpolate is not None and args.interpolate < 2:
        raise ValueError(f"--interpolate={args.interpolate} must be 2 or more: both ends are among the images")
    if args.interpolate is not None and args.num_samples == 1:
        raise ValueError("--num_samples=1 must be 2 or more with --interpolate: it goes from one to the next")
    if not math.isfinite(args.classifier_scale):
        raise ValueError(f"--classifier_scale={args.classifier_scale} must be a finite number")
    check_seed(args.seed)
    if args.num_frames < 0:
        raise ValueError(f"--num_frames={args.num_frames} must not be negative")
    parse_steps(args.steps)
    from dit_jax.checkpoint import find_checkpoint
    from dit_jax.evaluation.generate import check_classifier, require_codec
    from dit_jax.evaluation.loaded import AUTOENCODER_DIR, load

    _, config = find_checkpoint(args.workdir)
    if config.stage != "diffusion":
        raise ValueError(f"--workdir={args.workdir} is a run of stage {config.stage!r}; give a diffusion run's")
    flags = {"sampler": args.sampler, "cfg_scale": args.cfg_scale, "eta": args.eta, "strength": args.strength}
    flags = [(f"sampling.{name}", value) for name, value in flags.items() if value is not None]
    config = override_config(config, [*flags, *args.overrides])
    has_codec = (pathlib.Path(args.workdir) / AUTOENCODER_DIR).is_dir()
    if args.png and config.latents is not None and not has_codec:
        raise ValueError(f"--png needs images, and {args.workdir} has no autoencoder: it draws latents; leave it out")
    classes = parse_labels(args.labels, config.data.num_classes, config.data.class_names)
    given = given_images(args, config)
    given.check(config, read_tokenizer(args.workdir, config))
    if given.known(config, 1) is not None:
        require_codec(config, has_codec)
    if args.classifier is not None:
        check_classifier(config, find_checkpoint(args.classifier)[1])
    num_samples = args.num_samples or (max(16, len(given.prompts)) if given.prompts else 100)
    if args.interpolate is not None:
        num_samples = args.num_samples or max(2, len(given.prompts or given.layout or classes))
    output = pathlib.Path(args.output or pathlib.Path(args.workdir) / "samples" / "drawn")

    import jax
    import numpy as np

    from dit_jax.evaluation.drawing import (
        PICTURES_NAME,
        Drawing,
        check_output,
        is_drawn,
        write_picture,
        write_pngs,
        write_record,
        write_samples,
    )
    from dit_jax.evaluation.generate import interpolation, override_sampling
    from dit_jax.evaluation.parts import Parts, unfinished
    from dit_jax.evaluation.pictures import MAX_STRIPS, class_texts, denoising_strips, sample_grid
    from dit_jax.evaluation.reference import SAMPLES_NAME
    from dit_jax.metrics.adm_files import SamplesFile
    from dit_jax.parallel.compilation_cache import use_compilation_cache

    use_compilation_cache(ComputeConfig().compilation_cache)  # its programs are run: no folder that a workdir names
    labels = np.resize(np.array(classes, np.int32), num_samples)
    model = dataclasses.replace(load(args.workdir, average=args.average, ema_length=args.ema_length), config=config)
    sampling = override_sampling(config.sampling, parse_steps(args.steps))
    conditions, known = model.inputs(labels, given, sampling)
    classifier = args.classifier and load(args.classifier).as_guide(config, args.classifier_scale)
    path, columns = None, len(given.prompts or classes)
    reads_labels = "label" in config.condition_dropout or classifier is not None
    if args.interpolate is not None:
        (conditions, known), path = interpolation((conditions, known), args.interpolate)
        labels, columns = labels[path.ends[:, 0]], args.interpolate
    drawing = Drawing(model, conditions, sampling, args.seed, known, classifier, path)
    identity, samples, grid = drawing.identity(), output / SAMPLES_NAME, output / "grid.png"
    is_latent = model.codec is None and config.latents is not None
    check_output(output, identity, args.num_frames, args.overwrite)
    output.mkdir(parents=True, exist_ok=True)
    with Parts(output, identity) as parts:
        for other in unfinished(output):
            if other != parts.path:
                print(f"{other} holds images of other settings, unfinished: give those to go on, or delete it")
        if is_drawn(output, identity) and (grid.is_file() or is_latent):
            print("drawn before")
        else:
            first = write_samples(samples, drawing.draw(parts, progress=True), labels, NUM_PICTURES)
            if not is_latent:
                shown = labels[: len(first)] if reads_labels and path is None and not given.prompts else None
                write_picture(grid, sample_grid(first, columns, class_texts(config.data, shown)))
            write_record(output, identity)
        parts.remove()
    if is_latent:
        print(f"{len(labels)} latents, there is no autoencoder to decode them: {samples}")
        return
    print(f"{len(labels)} images: {samples}, {grid}")
    if args.png:
        write_pngs(output / PICTURES_NAME, SamplesFile(samples))
        print(f"as pictures: {output / PICTURES_NAME}")
    if args.num_frames:
        conditions, known, path = jax.tree.map(lambda leaf: leaf[:MAX_STRIPS], (conditions, known, path))
        frames = model.draw(conditions, sampling, args.seed, known, classifier, path, num_frames=args.num_frames)
        write_picture(output / "denoising.png", denoising_strips(frames))
        write_record(output, identity, args.num_frames)
        print(f"denoising: {output / 'denoising.png'}")


def given_images(args: argparse.Namespace, config: Config) -> "Given":
    """Returns the images of the flags; ValueError where one is not of the model's size.

    A map of classes, of which a data set's own may be larger, is cut to that size as in training, and that is told.
    """
    import numpy as np

    from dit_jax.data.folder import SUFFIXES_SHOWN, describe_left_out, list_images, read_classes, read_image, read_mask
    from dit_jax.data.transforms import semantic_map, to_channels
    from dit_jax.evaluation.given import Given

    def files(flag: str) -> list[pathlib.Path]:
        found = []
        for name in filter(None, (getattr(args, flag) or "").split(",")):
            if not os.path.isdir(name):
                found.append(pathlib.Path(name))
                continue
            paths, left_out = list_images(name)
            told = describe_left_out(left_out)
            if not paths:
                raise ValueError(f"--{flag}={name} has no images ({SUFFIXES_SHOWN}){told}; give a folder that has")
            if told:
                print(f"{name}: {len(paths):,} images{told}")
            found += paths
        return found

    size, enlarges = config.data.image_size, config.spatial is not None and config.spatial.kind == "low_resolution"
    images = [read_image(path, config.data.background) for path in files("image")]
    masks = [read_mask(path) for path in files("mask")]
    for i, mask in enumerate(masks if images else ()):
        image = images[i % len(images)]
        if mask.shape != image.shape[:2]:
            sizes = [f"{x.shape[1]} x {x.shape[0]}" for x in (mask, image)]
            raise ValueError(f"--mask={args.mask} is {sizes[0]}, but the image is {sizes[1]}: they must be of one size")
    for image in images:
        height, width, channels = image.shape
        if not enlarges and (height, width) != (size, size):
            raise ValueError(
                f"--image={args.image} must be of the model's {size} x {size} pixels, not {width} x {height}; scale or "
                "crop it"
            )
        if channels > config.data.channels and (image != image[..., :1]).any():
            print(f"--image={args.image} has colours, and the model's images are grey: it sees the grey ones")
    images = [to_channels(image, config.data.channels) for image in images]
    classes = [read_classes(path) for path in files("map")]
    for each in classes:
        if each.shape != (size, size):
            shown = f"{each.shape[1]} x {each.shape[0]}"
            print(f"--map={args.map} is {shown} pixels: cut to the model's {size} x {size}, as maps are in training")
    classes = [semantic_map(each, size, 256, False) for each in classes]
    for flag, series in (("image", images), ("mask", masks)):
        if len({each.shape for each in series}) > 1:
            raise ValueError(f"--{flag}={getattr(args, flag)} must be images of one size")
    return Given(
        *(np.stack(series) if series else None for series in (images, masks, classes)),
        read_layouts(args.layout),
        read_prompts(args.prompt, args.prompts_file),
    )


def read_prompts(prompt: str | None, file: str | None) -> list[str] | None:
    """Returns the prompts of --prompt and --prompts_file; None where neither is given."""
    if file is None:
        return prompt if prompt is None else [normalised(prompt)]
    if prompt is not None:
        raise ValueError("--prompt and --prompts_file: give one of them")
    return _lines("prompts_file", file, "prompt")


def read_tokenizer(workdir: str, config: Config) -> "Tokenizer | None":
    """Returns the tokenizer of a run's captions; None of a run without."""
    from dit_jax.data.tokenizer import Tokenizer
    from dit_jax.evaluation.text_encoders import TEXT_ENCODER_DIR

    text = config.conditions and config.conditions.text
    return Tokenizer(pathlib.Path(workdir) / TEXT_ENCODER_DIR, text.max_length) if text else None


def read_layouts(text: str | None) -> list[str] | None:
    """Returns the layouts of --layout: one given as text, or those of a file's lines."""
    if text is None or not os.path.isfile(text):  # False of a text too long for a name
        return text if text is None else [normalised(text)]
    return _lines("layout", text, "layout")


def _lines(flag: str, file: str, what: str) -> list[str]:
    """Returns the lines of a flag's file that are not blank; ValueError where there is none."""
    try:
        lines = [line.strip() for line in read_lines(file) if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"--{flag}={file} must be a text file in UTF-8: {error}") from error
    if not lines:
        raise ValueError(f"--{flag}={file} must have a {what} a line, but has none")
    return lines


def parse_steps(text: str | None) -> str | list[int] | None:
    """Returns --steps as `LoadedModel.sample` takes it."""
    if text is None or re.fullmatch(r"(ddim)?\d+", text):
        return text
    if re.fullmatch(r"\d+(,\d+)+", text):
        return sorted(int(part) for part in text.split(","))
    raise ValueError(f"--steps={text} must be a count, ddimN, or timesteps with commas between, such as 0,500,999")


def parse_labels(text: str | None, num_classes: int, class_names: Sequence[str] | None = None) -> list[int]:
    """Returns the classes to draw, which are given by name or by number; a name with a comma stands in quotes."""
    if text is None:
        return list(range(num_classes))
    labels = next(csv.reader([text], skipinitialspace=True), [])
    try:
        numbers = [class_number(label, class_names, num_classes) for label in labels]
    except ValueError as error:
        raise ValueError(f"--labels={text}: {error}") from None
    if not numbers:
        raise ValueError(f"--labels={text} must be classes with commas between, such as 0,3,7")
    for label, number in zip(labels, numbers, strict=True):
        if label.strip().isdecimal() and int(label) != number:
            print(f"--labels: {label.strip()} is the name of class number {number}")
    return numbers
