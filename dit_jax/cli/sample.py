"""Draws images from a trained diffusion model: `samples.npz` and `grid.png`, `denoising.png` on request.

Killed, the same command goes on where it was, on any number of devices; the files are the same, byte for byte. Once
all are there, it draws nothing. `samples.json` has what they were drawn with.
"""

import argparse
import dataclasses
import pathlib
import re

from dit_jax.config import ComputeConfig, override_config

HELP = "draws images from a trained diffusion model"
NUM_PICTURES = 100  # images in the grid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument("--workdir", required=True, metavar="DIR", help="of a diffusion run")
    parser.add_argument("--output", metavar="DIR", help="where the images go (default: WORKDIR/samples/drawn)")
    parser.add_argument("--num_samples", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--labels", metavar="L[,L...]", help="classes, taken in turn (default: all of them)")
    parser.add_argument("--sampler", help="ancestral, ddim, dpm_solver or plms (default: the run's config.sampling)")
    parser.add_argument("--steps", help="a count, ddimN, or timesteps with commas between (default: the run's)")
    parser.add_argument("--cfg_scale", help="guidance, 1 is none (default: the run's config.sampling)")
    parser.add_argument("--eta", help="DDIM's noise, 0 is deterministic (default: the run's)")
    parser.add_argument("--seed", type=int, default=0, help="image i depends on (seed, i) and its label alone")
    parser.add_argument("--average", help="another average of the weights that the run kept, such as decay_0.999")
    parser.add_argument("--ema_length", type=float, help="of an average made now from the run's snapshots, such as 0.1")
    parser.add_argument(
        "--num_frames", type=int, default=0, help="also draw denoising.png: x_0 as predicted at so many steps"
    )
    parser.set_defaults(overridable="sampling.")
    parser.epilog = "Any other key of the run's config.sampling is set with --config.sampling.KEY=VALUE."


def run(args: argparse.Namespace) -> None:
    """Draws what was not drawn before, then writes each file at once."""
    if args.num_samples < 1:
        raise ValueError(f"--num_samples={args.num_samples} must be positive")
    if args.num_frames < 0:
        raise ValueError(f"--num_frames={args.num_frames} must not be negative")
    settings = {"num_steps": parse_steps(args.steps), "seed": args.seed}
    from dit_jax.checkpoint import find_checkpoint

    _, config = find_checkpoint(args.workdir)
    if config.stage != "diffusion":
        raise ValueError(f"--workdir={args.workdir} is a run of stage {config.stage!r}; give a diffusion run's")
    flags = {"sampler": args.sampler, "cfg_scale": args.cfg_scale, "eta": args.eta}
    flags = [(f"sampling.{name}", value) for name, value in flags.items() if value is not None]
    config = override_config(config, [*flags, *args.overrides])
    classes = parse_labels(args.labels, config.data.num_classes)
    output = pathlib.Path(args.output or pathlib.Path(args.workdir) / "samples" / "drawn")
    output.mkdir(parents=True, exist_ok=True)

    import numpy as np

    from dit_jax.evaluation.drawing import SAMPLES_NAME, Drawing, is_drawn, write_picture, write_record, write_samples
    from dit_jax.evaluation.generate import override_sampling
    from dit_jax.evaluation.loaded import load
    from dit_jax.evaluation.parts import Parts, unfinished
    from dit_jax.evaluation.pictures import MAX_STRIPS, denoising_strips, sample_grid
    from dit_jax.parallel.compilation_cache import use_compilation_cache

    use_compilation_cache(ComputeConfig().compilation_cache)  # its programs are run: no folder that a workdir names
    labels = np.resize(np.array(classes, np.int32), args.num_samples)
    model = dataclasses.replace(load(args.workdir, average=args.average, ema_length=args.ema_length), config=config)
    drawing = Drawing(model, labels, override_sampling(config.sampling, settings["num_steps"]), args.seed)
    identity, samples, grid = drawing.identity(), output / SAMPLES_NAME, output / "grid.png"
    is_latent = model.codec is None and config.latents is not None
    with Parts(output, identity) as parts:
        for other in unfinished(output):
            if other != parts.path:
                print(f"{other} holds images of other settings, unfinished: give those to go on, or delete it")
        if is_drawn(output, identity) and (grid.is_file() or is_latent):
            print("drawn before")
        else:
            first = write_samples(samples, drawing.draw(parts, progress=True), labels, NUM_PICTURES)
            if not is_latent:
                write_picture(grid, sample_grid(first, len(classes)))
            write_record(output, identity)
        parts.remove()
    if is_latent:
        print(f"{len(labels)} latents, there is no autoencoder to decode them: {samples}")
        return
    print(f"{len(labels)} images: {samples}, {grid}")
    if args.num_frames:
        frames = model.sample(labels[:MAX_STRIPS], num_frames=args.num_frames, **settings)
        write_picture(output / "denoising.png", denoising_strips(frames))
        print(f"denoising: {output / 'denoising.png'}")


def parse_steps(text: str | None) -> str | list[int] | None:
    """Returns --steps as `LoadedModel.sample` takes it."""
    if text is None or re.fullmatch(r"(ddim)?\d+", text):
        return text
    if re.fullmatch(r"\d+(,\d+)+", text):
        return sorted(int(part) for part in text.split(","))
    raise ValueError(f"--steps={text} must be a count, ddimN, or timesteps with commas between, such as 0,500,999")


def parse_labels(text: str | None, num_classes: int) -> list[int]:
    """Returns the classes to draw."""
    if text is None:
        return list(range(num_classes))
    try:
        labels = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--labels={text} must be whole numbers with commas between, such as 0,3,7") from None
    if not all(0 <= label < num_classes for label in labels):
        raise ValueError(f"--labels={text} must be from 0 to {num_classes - 1}")
    return labels
