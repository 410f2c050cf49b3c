"""Writes the latent cache of a data set: the posterior's moments of every image, through a trained autoencoder.

The same command may be started any number of times at once, on one machine or on several that share the disk: each
process takes parts of the data set that no other is at. One that was killed is started again, and goes on. On GPUs give
each process its own (CUDA_VISIBLE_DEVICES). A cache that is complete is checked, and mended where it is damaged.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import sys
import time
import typing
from collections.abc import Callable, Iterator, Sequence

from dit_jax.cli.main import add_config_argument, load_run_config, path_flag
from dit_jax.config import Config, DataConfig
from dit_jax.parallel.preemption import heed
from dit_jax.terminal import progress, tell

if typing.TYPE_CHECKING:
    import numpy as np
    from jax.sharding import Mesh

    from dit_jax.data.latent_cache import LatentCacheWriter, Plan, Shard
    from dit_jax.evaluation.text_encoders import CaptionEncoder
    from dit_jax.models.autoencoder import Codec
    from dit_jax.types import Array, Params

HELP = "writes the latent cache of a data set through a trained autoencoder"
DTYPES = ("float16", "bfloat16")  # `latent_cache.DTYPES`, which is heavy to import


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    add_config_argument(parser)
    parser.add_argument(
        "--autoencoder", type=path_flag, required=True, metavar="DIR", help="workdir of the trained autoencoder"
    )
    parser.add_argument("--output", type=path_flag, required=True, metavar="DIR", help="where the cache goes")
    parser.add_argument("--batch_size", type=int, default=256, help="images per device call (default: %(default)s)")
    parser.add_argument("--shard_size", type=int, default=8192, help="images of a file (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the latents (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> None:
    """Encodes every image of both splits of the config's data set, and both flips if training flips.

    A cache that is complete is checked instead; what is damaged or missing is encoded again.
    """
    config = load_run_config(args)
    for name in ("batch_size", "shard_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}={getattr(args, name)} must be positive")
    import jax

    from dit_jax.checkpoint import find_checkpoint, read_newest_good
    from dit_jax.config import MeshConfig
    from dit_jax.data.identity import in_form_of, is_of_names
    from dit_jax.data.latent_cache import CachedText, LatentCacheWriter, recorded_version
    from dit_jax.data.sources import prepare, source_identity
    from dit_jax.evaluation.loaded import AUTOENCODER_DIR, load_codec, stored_digest
    from dit_jax.evaluation.text_encoders import TEXT_ENCODER_DIR, copy_text_encoder, load_caption_encoder, text_digest
    from dit_jax.parallel.compilation_cache import use_compilation_cache
    from dit_jax.parallel.mesh import batch_shards, make_mesh

    use_compilation_cache(config.compute.compilation_cache)
    _, autoencoder_config = find_checkpoint(args.autoencoder)
    check_autoencoder(config, autoencoder_config, args.autoencoder)
    text = config.conditions and config.conditions.text
    captions = load_caption_encoder(text, text.path) if text and text.transformer is None else None
    recorded = recorded_version(args.output)
    if is_of_names(recorded):  # what is missing must be listed as older versions did
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, version=recorded))
    notes = sys.stderr if args.json else sys.stdout
    print(prepare(config.data), file=notes, flush=True)
    identity = source_identity(config.example_data)
    if jax.process_count() > 1:  # JAX on a TPU slice; checkpoints would wait for the others
        raise ValueError(
            f"encode works on each host by itself, but this TPU worker is one of {jax.process_count()}; for a host of "
            "four chips set TPU_PROCESS_BOUNDS=1,1,1 TPU_CHIPS_PER_PROCESS_BOUNDS=2,2,1"
        )
    mesh = make_mesh(MeshConfig(), jax.local_devices())  # the other processes' devices are theirs to use
    step, codec = read_newest_good(args.autoencoder, lambda step: load_codec(args.autoencoder, 1.0, mesh, step))
    batch_size = -(-args.batch_size // batch_shards(mesh)) * batch_shards(mesh)
    encoder = ShardEncoder(config.example_data, codec, mesh, batch_size, captions and (captions, text.caption_field))
    # A codebook's latents are what they are; other autoencoders give a distribution of them.
    stochastic = autoencoder_config.autoencoder.codebook is None
    plan = make_plan(encoder, stochastic, args.dtype, args.shard_size, identity)
    if captions:
        width = text.frozen_width
        cached = CachedText(text.caption_field, text_digest(text, text.path), text.max_length, width, width)
        plan = dataclasses.replace(plan, text=cached)
    writer = LatentCacheWriter(args.output, plan)
    if captions:
        writer.write_folder(
            TEXT_ENCODER_DIR,
            lambda folder: copy_text_encoder(text, text.path, folder),
            lambda folder: text_digest(text, folder) == plan.text.encoder,
        )

    def is_intact(folder: pathlib.Path) -> bool:
        try:
            return stored_digest(folder) == plan.autoencoder
        except ValueError:
            return False

    writer.write_folder(
        AUTOENCODER_DIR, lambda folder: export_autoencoder(codec.params, step, autoencoder_config, folder), is_intact
    )
    damaged = find_damaged(writer) if writer.was_complete else []
    if damaged:
        writer.discard(damaged)
    start = time.perf_counter()
    num_encoded = encode_missing(writer, encoder)
    seconds = time.perf_counter() - start
    if num_encoded and in_form_of(identity, source_identity(config.example_data)) != identity:
        raise ValueError(
            f"the images in {config.data.name} must not change while they are encoded, but did; delete {args.output} "
            "and run the command again"
        )
    manifest = writer.finish()
    if is_of_names(manifest.data["version"]):
        print(
            f"{args.output} is of an older version: of its images the names were compared, their content is unknown",
            file=notes,
        )
    figures = {
        "output": args.output,
        "images": sum(manifest.splits.values()),
        "encoded": num_encoded,  # by this process
        "bad_examples": sum(map(len, encoder.bad_examples.values())),  # that it met, with another's latents instead
        "damaged": [*writer.mended, *(shard.file for shard in damaged)],
        "seconds": seconds,
        "images_per_second": num_encoded / seconds,
        "latent_shape": manifest.latent_shape,
        "dtype": manifest.dtype,
        "mean": manifest.mean,
        "std": manifest.std,
        "scale": manifest.scale,
    }
    print(json.dumps(figures) if args.json else describe(figures, writer.was_complete), flush=True)


def describe(figures: dict, was_complete: bool) -> str:
    """Returns the figures as lines for people."""
    shape, damaged = "x".join(map(str, figures["latent_shape"])), figures["damaged"]
    lines = []
    if damaged:
        names = ", ".join(damaged[:3]) + (f" and {len(damaged) - 3} more" if len(damaged) > 3 else "")
        lines.append(f"damaged or missing, and {'encoded' if figures['encoded'] else 'written'} again: {names}")
    if figures["encoded"]:
        lines.append(
            f"encoded {figures['encoded']} images in {figures['seconds']:.1f} s "
            f"({figures['images_per_second']:.1f} images/s)"
        )
    holds = "already holds these latents, checked" if was_complete and not damaged else "holds"
    lines.append(
        f"{figures['output']} {holds}: {figures['images']} images, latents {shape} in {figures['dtype']}, "
        f"scale {figures['scale']:.4f}"
    )
    return "\n".join(lines)


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


def make_encode(data: DataConfig) -> Callable[["Codec", "Array"], "Array"]:
    """Returns the jitted (codec, images [B, H, W, C]) -> moments [B, F, h, w, k] of images and their mirrors."""
    import jax
    import jax.numpy as jnp

    def encode(codec, images):
        flips = [images, images[:, :, ::-1]] if data.horizontal_flip else [images]
        return jnp.stack([codec.moments(flip) for flip in flips], axis=1)

    return jax.jit(encode)


class ShardEncoder:
    """Encodes the images of shards, all in batches of one shape, which start anew at each shard.

    captions: a frozen text encoder and the field that it encodes, too; None: no text.
    """

    def __init__(
        self,
        data: DataConfig,
        codec: "Codec",
        mesh: "Mesh",
        batch_size: int,
        captions: "tuple[CaptionEncoder, str] | None" = None,
    ):
        import jax
        import jax.numpy as jnp

        from dit_jax.data.bad_examples import BadExamples
        from dit_jax.data.sources import open_source
        from dit_jax.parallel.mesh import replicated

        self.captions = captions
        self._text_encoder = captions and jax.device_put(captions[0].encoder, replicated(mesh))
        self._encode_text = jax.jit(lambda encoder, tokens: encoder.encode(**tokens))
        self.data, self.codec, self.mesh, self.batch_size = data, codec, mesh, batch_size
        self._sources = {split: open_source(data, split) for split in (data.train_split, data.eval_split)}
        self.bad_examples = {
            split: BadExamples(f"{data.name} {split}", len(source), data.max_bad_share)
            for split, source in self._sources.items()
        }
        self._encode = make_encode(data)
        images = jax.ShapeDtypeStruct((batch_size, data.image_size, data.image_size, data.channels), jnp.float32)
        self.shape = jax.eval_shape(self._encode, codec, images).shape[1:]  # (F, h, w, k)

    def batches(self, shard: "Shard") -> Iterator[tuple["np.ndarray", Sequence[int], Sequence[dict]]]:
        """Yields the moments [B, F, h, w, k] float32, labels and extra fields of a shard's images in order."""
        import numpy as np

        from dit_jax.data.pipeline import caption_tokens, eval_batches, image_transform
        from dit_jax.parallel.mesh import local_rows, put_batch

        tokens = self.captions and caption_tokens(self.captions[0].tokenizer, self.captions[1])
        to_image = image_transform(self.data, train=False, conditions=tokens)

        def transform(example, rng):
            fields = {name: example[name] for name in self.data.extra_fields}
            return to_image(example, rng) | {"fields": np.array(fields, dtype=object)}  # a batch of them: [B] dicts

        def encode(batch):
            on_mesh = put_batch(
                {key: batch[key] for key in ("image", "text") if key in batch}, self.mesh, self.batch_size
            )
            text = self._encode_text(self._text_encoder, on_mesh["text"]) if self.captions else None
            return self._encode(self.codec, on_mesh["image"]), text, batch

        def without_padding(moments, text, batch):
            real, fields = batch["mask"] > 0, batch["fields"]
            if text is not None:
                states, pooled = np.asarray(text["states"]), np.asarray(text["pooled"])
                for i, mask in enumerate(batch["text"]["mask"]):
                    fields[i] = fields[i] | {"text": {"states": states[i, mask], "pooled": pooled[i]}}
            return np.asarray(moments)[real], batch["label"][real], fields[real]

        batches = eval_batches(
            self._sources[shard.split],
            transform,
            batch_size=self.batch_size,
            rows=local_rows(self.mesh, self.batch_size),
            start=shard.start,
            num_examples=shard.count,
            num_threads=self.data.num_threads,
            bad_examples=self.bad_examples[shard.split],
        )
        queue = collections.deque()  # the device encodes a batch while the one before it is written
        for batch in batches:
            queue.append(encode(batch))
            if len(queue) > 1:
                yield without_padding(*queue.popleft())
        for encoded in queue:
            yield without_padding(*encoded)


def make_plan(encoder: ShardEncoder, stochastic: bool, dtype: str, shard_size: int, identity: dict) -> "Plan":
    """Returns what decides the bytes of the cache; identity: of its images."""
    import jax

    from dit_jax.checkpoint import params_digest
    from dit_jax.data.latent_cache import Plan

    num_flips, height, width, depth = encoder.shape
    device = encoder.mesh.devices.flat[0]
    return Plan(
        data=identity,
        train_split=encoder.data.train_split,
        autoencoder=params_digest(encoder.codec.params),
        latent_shape=(height, width, depth // 2 if stochastic else depth),
        stochastic=stochastic,
        num_flips=num_flips,
        dtype=dtype,
        extra_fields=encoder.data.extra_fields,
        shard_size=shard_size,
        batch_size=encoder.batch_size,
        num_devices=encoder.mesh.size,
        device=f"{device.platform} {device.device_kind}",
        jax=jax.__version__,
    )


def export_autoencoder(params: "Params", step: int, config: Config, folder: pathlib.Path) -> None:
    """Writes the autoencoder's weights for evaluation, so that what trains on the cache needs nothing else."""
    from dit_jax.checkpoint import Checkpoints, write_config

    write_config(folder, config)
    with Checkpoints(folder, max_to_keep=1) as checkpoints:
        checkpoints.save(step, {"params": params}, config)


def find_damaged(writer: "LatentCacheWriter") -> list["Shard"]:
    """Returns the shards of a complete cache that are missing or have another SHA-256 than they were written with."""
    damaged = []
    total = sum(shard.count for shard in writer.shards)
    with progress(total=total, unit="image", description="checking: image") as bar:
        for shard in writer.shards:
            if not writer.is_intact(shard):
                damaged.append(shard)
            bar.update(shard.count)
            heed()
    return damaged


def encode_missing(writer: "LatentCacheWriter", encoder: ShardEncoder) -> int:
    """Writes what no other process does, until every shard is there; returns the number of images."""
    left = sum(shard.count for shard in writer.shards if not writer.is_written(shard))
    if not left:
        return 0
    with progress(total=left, unit="image", description="encoding: image") as bar:

        def batches(shard: "Shard") -> Iterator[tuple]:
            for batch in encoder.batches(shard):
                yield batch
                bar.update(len(batch[0]))
                heed()
                for line in encoder.bad_examples[shard.split].news():
                    tell(line)

        for shard in writer.missing_shards(lambda shard: bar.set_postfix_str(f"waiting for {shard.name}")):
            bar.set_postfix_str(shard.name)
            writer.write_shard(shard, batches(shard))
        return bar.n
