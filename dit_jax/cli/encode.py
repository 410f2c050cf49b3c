"""Writes the latent cache of a data set: the posterior's moments of every image, through a trained autoencoder."""

import argparse
import pathlib
import shutil

from dit_jax.cli.main import add_config_argument
from dit_jax.config import Config, load_config

HELP = "writes the latent cache of a data set through a trained autoencoder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    add_config_argument(parser)
    parser.add_argument("--autoencoder", required=True, metavar="DIR", help="workdir of the trained autoencoder")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the cache goes")
    parser.add_argument("--batch_size", type=int, default=256, help="images per device call (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Encodes every image of both splits of the config's data set, and both flips if training flips."""
    config = load_config(args.config, args.overrides)
    if args.batch_size < 1:
        raise ValueError(f"--batch_size={args.batch_size} must be positive")
    from dit_jax.checkpoint import find_checkpoint, params_digest
    from dit_jax.config import MeshConfig
    from dit_jax.data.latent_cache import MANIFEST_NAME, LatentCacheWriter, read_manifest
    from dit_jax.data.sources import prepare, source_identity
    from dit_jax.evaluation.loaded import load
    from dit_jax.parallel.mesh import batch_shards, make_mesh

    step, autoencoder_config = find_checkpoint(args.autoencoder)
    check_autoencoder(config, autoencoder_config, args.autoencoder)
    print(prepare(config.data), flush=True)
    mesh = make_mesh(MeshConfig())
    model = load(args.autoencoder, step)
    data, identity = source_identity(config.data), params_digest(model.params)
    if (pathlib.Path(args.output) / MANIFEST_NAME).exists():
        manifest = read_manifest(args.output)
        if (manifest.data, manifest.autoencoder) == (data, identity):
            print(f"{args.output} already holds these latents: {sum(manifest.splits.values())} images")
            return
        raise ValueError(
            f"--output={args.output} holds the latents of other data or another autoencoder; choose another"
        )
    writer = LatentCacheWriter(args.output)
    export_autoencoder(model, pathlib.Path(args.output))
    batch_size = -(-args.batch_size // batch_shards(mesh)) * batch_shards(mesh)
    for split in (config.data.train_split, config.data.eval_split):
        encode_split(config, model, mesh, writer, split, batch_size)
    manifest = writer.finish(data_identity=data, autoencoder_identity=identity, train_split=config.data.train_split)
    print(
        f"{args.output}: {sum(manifest.splits.values())} images, latents {'x'.join(map(str, manifest.latent_shape))}, "
        f"scale {manifest.scale:.4f}"
    )


def check_autoencoder(config: Config, autoencoder_config: Config, workdir: str) -> None:
    """Raises ValueError unless the workdir's autoencoder takes the config's images."""
    if autoencoder_config.stage != "autoencoder":
        raise ValueError(
            f"--autoencoder={workdir} is a run of stage {autoencoder_config.stage!r}; give an autoencoder's workdir"
        )
    ours, theirs, factor = config.data, autoencoder_config.data, 2**autoencoder_config.num_downsamplings
    if ours.channels != theirs.channels:
        raise ValueError(f"config.data.channels={ours.channels} but the autoencoder takes {theirs.channels}")
    if ours.image_size % factor:
        raise ValueError(f"config.data.image_size={ours.image_size} must be divisible by the autoencoder's {factor}")


def export_autoencoder(model, output: pathlib.Path) -> None:
    """Writes the autoencoder's weights for evaluation into the cache, so that what trains on it needs nothing else."""
    from dit_jax.checkpoint import Checkpoints, write_config
    from dit_jax.evaluation.loaded import AUTOENCODER_DIR

    target = output / AUTOENCODER_DIR
    shutil.rmtree(target, ignore_errors=True)  # of an interrupted encode
    target.mkdir(parents=True)
    write_config(target, model.config)
    with Checkpoints(target, max_to_keep=1) as checkpoints:
        checkpoints.save(model.step, {"params": model.params}, model.config)


def encode_split(config: Config, model, mesh, writer, split: str, batch_size: int) -> None:
    """Encodes the images of one split, in their order."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from tqdm import tqdm

    from dit_jax.data.pipeline import eval_batches, image_transform
    from dit_jax.data.sources import open_source
    from dit_jax.parallel.mesh import local_rows, prefetch

    source = open_source(config.data, split)

    def encode(codec, images):
        flips = [images, images[:, :, ::-1]] if config.data.horizontal_flip else [images]
        return jnp.stack([codec.moments(flip) for flip in flips], axis=1)  # [B, F, h, w, 2c]

    encode = jax.jit(encode)
    batches = eval_batches(
        source,
        image_transform(config.data, train=False),
        batch_size=batch_size,
        rows=local_rows(mesh, batch_size),
        num_threads=config.data.num_threads,
    )
    with tqdm(total=len(source), desc=f"encoding {split}", unit="image") as progress:
        for batch in prefetch(batches, mesh, batch_size):
            real = np.asarray(batch["mask"]) > 0
            moments = np.asarray(encode(model.codec, batch["image"]))
            writer.write(split, moments[real], np.asarray(batch["label"])[real])
            progress.update(int(real.sum()))
