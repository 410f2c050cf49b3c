"""Draws images from a trained diffusion model: `samples.npz` and `grid.png`."""

import argparse
import pathlib

HELP = "draws images from a trained diffusion model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument("--workdir", required=True, metavar="DIR", help="of a diffusion run")
    parser.add_argument("--output", metavar="DIR", help="where the images go (default: WORKDIR/samples/drawn)")
    parser.add_argument("--num_samples", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--labels", metavar="L[,L...]", help="classes, taken in turn (default: all of them)")
    parser.add_argument("--sampler", choices=("ddim", "ancestral"), help="default: the run's config.sampling")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the run's config.sampling)")
    parser.add_argument("--cfg_scale", type=float, help="guidance, 1 is none (default: the run's config.sampling)")
    parser.add_argument("--eta", type=float, help="DDIM's noise, 0 is deterministic (default: the run's)")
    parser.add_argument("--seed", type=int, default=0, help="image i depends on (seed, i) and its label alone")


def run(args: argparse.Namespace) -> None:
    """Draws, then writes both files at once."""
    if args.num_samples < 1:
        raise ValueError(f"--num_samples={args.num_samples} must be positive")
    from dit_jax.checkpoint import find_checkpoint

    _, config = find_checkpoint(args.workdir)
    if config.stage != "diffusion":
        raise ValueError(f"--workdir={args.workdir} is a run of stage {config.stage!r}; give a diffusion run's")
    classes = parse_labels(args.labels, config.data.num_classes)
    output = pathlib.Path(args.output or pathlib.Path(args.workdir) / "samples" / "drawn")
    output.mkdir(parents=True, exist_ok=True)

    import numpy as np
    from PIL import Image

    from dit_jax.evaluation.loaded import load
    from dit_jax.evaluation.pictures import sample_grid

    labels = np.resize(np.array(classes, np.int32), args.num_samples)
    images = load(args.workdir).sample(
        labels,
        num_steps=args.steps,
        cfg_scale=args.cfg_scale,
        seed=args.seed,
        sampler=args.sampler,
        eta=args.eta,
        progress=True,
    )
    np.savez_compressed(output / "samples.npz", arr_0=images, labels=labels)
    Image.fromarray(sample_grid(images[:100], len(classes))).save(output / "grid.png")
    print(f"{len(images)} images: {output / 'samples.npz'}, {output / 'grid.png'}")


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
