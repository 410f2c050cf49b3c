"""Measures a trained autoencoder on its held-out images: PSNR, SSIM, LPIPS, use of the codebook, and a grid.

Writes `reconstruction.json` and `reconstructions.png`, originals above their reconstructions. Other images are measured
with --config.data.KEY=VALUE, such as --config.data.name=FOLDER.
"""

import argparse
import json
import os
import pathlib

from dit_jax.config import override_config

HELP = "measures how well an autoencoder reconstructs held-out images"
NUM_PICTURES = 50  # images in the grid


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    parser.add_argument("--workdir", required=True, metavar="DIR", help="of an autoencoder's run, or converted")
    parser.add_argument("--output", metavar="DIR", help="where the results go (default: WORKDIR/evaluation)")
    parser.add_argument("--metrics", metavar="M[,M...]", help="of psnr, ssim, lpips, codes (default: all there can be)")
    parser.add_argument("--num_samples", type=int, help="the first so many held-out images (default: all)")
    parser.add_argument("--batch_size", type=int, default=64, help="images per device call (default: %(default)s)")
    parser.add_argument("--lpips", metavar="FILE", help="LPIPS' weights (default: the run's config)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(overridable="data.")


def run(args: argparse.Namespace) -> None:
    """Measures, then writes the figures and the picture."""
    for name in ("num_samples", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}={value} must be positive")
    from dit_jax.checkpoint import find_checkpoint

    step, config = find_checkpoint(args.workdir)
    if config.stage != "autoencoder":
        raise ValueError(f"--workdir={args.workdir} is a run of stage {config.stage!r}; give an autoencoder's")
    config = override_config(config, args.overrides)
    lpips_path = args.lpips or config.autoencoder.lpips_path
    metrics, left_out = choose_metrics(args.metrics, config, os.path.isfile(lpips_path) or args.lpips is not None)

    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    from dit_jax.checkpoint import params_digest
    from dit_jax.config import MeshConfig
    from dit_jax.data.pipeline import eval_batches, image_transform
    from dit_jax.data.sources import open_source, source_identity
    from dit_jax.evaluation.loaded import load
    from dit_jax.evaluation.pictures import make_reconstructor, reconstruction_grid
    from dit_jax.evaluation.reconstruction import measure_reconstructions
    from dit_jax.parallel.compilation_cache import use_compilation_cache
    from dit_jax.parallel.mesh import batch_shards, local_rows, make_mesh, prefetch
    from dit_jax.perceptual.lpips import load_lpips

    use_compilation_cache(config.compute.compilation_cache)
    lpips_params = load_lpips(lpips_path) if "lpips" in metrics else None
    output = pathlib.Path(args.output or pathlib.Path(args.workdir) / "evaluation")
    output.mkdir(parents=True, exist_ok=True)
    source, transform = open_source(config.data, config.data.eval_split), image_transform(config.data, train=False)
    model, mesh = load(args.workdir, step), make_mesh(MeshConfig())
    batch_size = -(-args.batch_size // batch_shards(mesh)) * batch_shards(mesh)
    batches = eval_batches(
        source,
        transform,
        batch_size=batch_size,
        rows=local_rows(mesh, batch_size),
        num_examples=args.num_samples,
        num_threads=config.data.num_threads,
    )
    num_batches = -(-min(len(source), args.num_samples or len(source)) // batch_size)
    batches = tqdm(prefetch(batches, mesh, batch_size), total=num_batches, desc="evaluating", unit="batch")
    values = measure_reconstructions(model.codec.module, model.params, lpips_params, batches, metrics)
    count = min(len(source), NUM_PICTURES)
    images = np.stack([transform(source[i], np.random.default_rng(0))["image"] for i in range(count)])
    grid = reconstruction_grid(images, make_reconstructor(config)(model.params, images))
    results = values | {
        "workdir": str(args.workdir),
        "step": step,
        "autoencoder": params_digest(model.params),
        "data": source_identity(config.data),
        "split": config.data.eval_split,
        "left_out": left_out,
    }
    Image.fromarray(grid).save(output / "reconstructions.png")
    (output / "reconstruction.json").write_text(json.dumps(results, indent=2) + "\n")
    if args.json:
        print(json.dumps(results))
        return
    print(f"{values['num_images']:,} held-out images of {config.data.name}, checkpoint of step {step}")
    for name, label in LABELS.items():
        if name in values:
            print(f"  {label:<28} {values[name]:.4g}")
    for name, reason in left_out.items():
        print(f"  {name} is not measured: {reason}")
    print(f"written: {output / 'reconstruction.json'}, {output / 'reconstructions.png'}")


LABELS = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "lpips": "LPIPS (VGG-16, 0.1)",
    "codes_used": "share of codes in use",
    "perplexity": "perplexity of the codes",
}


def choose_metrics(asked: str | None, config, has_lpips: bool) -> tuple[list[str], dict[str, str]]:
    """Returns the metrics to measure, and what is left out with the reason; what was asked for is not left out."""
    from dit_jax.evaluation.reconstruction import METRICS, available_metrics

    codebook = config.autoencoder.codebook
    obstacles = available_metrics(codebook.num_codes if codebook else None, config.data.image_size, has_lpips)
    if asked is None:
        left_out = {name: reason for name, reason in obstacles.items() if reason and name != "codes"}
        return [name for name in METRICS if obstacles[name] is None], left_out
    metrics = asked.split(",")
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"--metrics={asked}: {name!r} must be one of {', '.join(METRICS)}")
        if obstacles[name] is not None:
            raise ValueError(f"--metrics={asked}: {name} cannot be measured: {obstacles[name]}")
    return metrics, {}
