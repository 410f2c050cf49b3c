"""Measures a config on the devices that are there: training, the data pipeline alone, encoding and sampling.

Training takes synthetic data through the real pipeline and needs no data set; programs, mesh and batches are those of
`train`, `encode` and `sample`. The weights are random.
"""

import argparse
import itertools
import json
import typing

from dit_jax.cli.main import add_config_argument, load_run_config, path_flag
from dit_jax.config import Config, check_platform
from dit_jax.terminal import progress

if typing.TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from jax.sharding import Mesh

HELP = "measures steps/s, images/s, MFU, compile time and memory of a config on this machine"
PARTS = ("train", "data", "encode", "sample")
MAX_DRAWS = 3  # batches that are drawn: each takes hundreds of passes through the network
NUM_BEFORE = 2  # calls that are not timed
NUM_PROFILED = 3  # steps
NUM_EXAMPLES = 256  # of synthetic data, over and over
GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's flags."""
    add_config_argument(parser)
    parser.add_argument("--steps", type=int, default=20, help="batches to time of each part (default: %(default)s)")
    parser.add_argument(
        "--what", default="train", metavar="P[,P...]", help=f"of {', '.join(PARTS)} (default: %(default)s)"
    )
    parser.add_argument(
        "--profile", type=path_flag, metavar="DIR", help="write a profile of a few training steps, for TensorBoard"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> None:
    """Measures each part in turn, and prints the figures."""
    config = load_run_config(args)
    parts = check_flags(args, config)
    from dit_jax.parallel.compilation_cache import use_compilation_cache
    from dit_jax.parallel.distributed import is_first, start_processes

    use_compilation_cache(config.compute.compilation_cache)
    start_processes()
    import jax

    from dit_jax.cli.plan import with_scale
    from dit_jax.evaluation.speed import num_chips, peak_memory
    from dit_jax.parallel.mesh import check_batch_size, make_mesh

    config, mesh = with_scale(config), make_mesh(config.mesh)
    devices = list(mesh.devices.flat)
    check_platform(config, devices[0].platform)
    check_batch_size(config.training.global_batch_size, mesh, "config.training.global_batch_size")
    report = {
        "config": args.config,
        "stage": config.stage,
        "jax": jax.__version__,
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "chips": num_chips(devices),
        "mesh": dict(mesh.shape),
        "global_batch_size": config.training.global_batch_size,
    }
    measures = {"train": measure_train, "data": measure_data, "encode": measure_encode, "sample": measure_sample}
    bar = progress(parts, total=len(parts), unit="part", description="measuring: part", active=is_first())
    for part in bar:
        bar.set_postfix_str(part)
        more = {"profile": args.profile} if part == "train" else {}
        report[part] = measures[part](config, mesh, args.steps, **more)
    report["peak_memory_bytes"], report["peak_memory_of"] = peak_memory()
    if is_first():
        print(json.dumps(report) if args.json else "\n".join(describe(report)), flush=True)


def check_flags(args: argparse.Namespace, config: Config) -> list[str]:
    """Returns the parts to measure.

    Raises:
      ValueError: for a part that there is not, or that the config's stage does not have.
    """
    parts = args.what.split(",")
    for part in parts:
        if part not in PARTS or parts.count(part) > 1:
            raise ValueError(f"--what={args.what} must name each once of {', '.join(PARTS)}; {part!r} does not do")
    if "sample" in parts and config.stage != "diffusion":
        raise ValueError(f"--what=sample needs a config of stage 'diffusion', not {config.stage!r}; leave it out")
    latents = config.latents
    if "encode" in parts and config.stage == "diffusion" and not (latents and (latents.path or latents.encode_with)):
        raise ValueError(
            "--what=encode needs an autoencoder: give the config of one, or --config.latents.path=CACHE or "
            "--config.latents.encode_with=WORKDIR"
        )
    if args.steps < 1:
        raise ValueError(f"--steps={args.steps} must be positive")
    if args.profile and "train" not in parts:
        raise ValueError(f"--profile={args.profile} is of training; add train to --what={args.what}")
    return parts


def measure_train(config: Config, mesh: "Mesh", num_steps: int, profile: str | None) -> dict:
    """Returns the figures of the training step, its batches made by the pipeline from synthetic examples."""
    from dit_jax.cli.plan import abstract_constants, update_of
    from dit_jax.evaluation.speed import fill, measure, num_chips, rates, utilization
    from dit_jax.training.state import create_state
    from dit_jax.training.step import jit_train_step

    optimizer, train_step = update_of(config)
    state, constants = create_state(config, optimizer, mesh), fill(abstract_constants(config, mesh))
    step_fn, devices = jit_train_step(train_step, state), list(mesh.devices.flat)

    def call(batch):
        nonlocal state
        state, metrics = step_fn(state, batch, constants)
        return metrics

    batches = pipeline(config, mesh, synthetic_source(config), NUM_BEFORE + num_steps + NUM_PROFILED)
    figures = measure(call, batches, num_steps, NUM_BEFORE, profile)
    figures = rates(figures, config.training.global_batch_size, num_chips(devices))
    figures["steps_per_second"] = figures.pop("batches_per_second")
    return figures | utilization(config, figures["images_per_second"], devices)


def measure_data(config: Config, mesh: "Mesh", num_steps: int) -> dict:
    """Returns the figures of the pipeline alone, with nothing that computes beside it, up to arrays on the devices."""
    from dit_jax.evaluation.speed import measure, num_chips, rates

    source, origin = real_source(config) or (synthetic_source(config), "synthetic, in memory")
    # What the threads have read ahead before the first timed batch must not count as read in no time.
    num_before = NUM_BEFORE + config.data.num_threads
    batches = pipeline(config, mesh, source, num_before + num_steps)
    figures = measure(lambda batch: batch, batches, num_steps, num_before)
    figures = rates(figures, config.training.global_batch_size, num_chips(list(mesh.devices.flat)))
    # Nothing is compiled here, and all of the time is waiting.
    left_out = ("compile_seconds", "compiled_from_cache", "data_wait")
    return {name: value for name, value in figures.items() if name not in left_out} | {"source": origin}


def measure_encode(config: Config, mesh: "Mesh", num_steps: int) -> dict:
    """Returns the figures of encoding images, both flips if training flips, as `dit-jax encode` does."""
    import numpy as np

    from dit_jax.cli.encode import make_encode
    from dit_jax.cli.plan import abstract_codec, on_every_device
    from dit_jax.evaluation.speed import fill, measure, num_chips, rates, synthetic_images
    from dit_jax.models.autoencoder import Codec
    from dit_jax.models.build import abstract_params, build_autoencoder
    from dit_jax.parallel.mesh import prefetch

    if config.stage == "autoencoder":
        module = build_autoencoder(config.autoencoder, config.data.channels)
        codec = Codec(on_every_device(abstract_params(config), mesh), module, 1.0)
    else:
        codec = abstract_codec(config, mesh)
    codec, encode, batch_size = fill(codec), make_encode(config.data), config.training.global_batch_size
    images = np.stack([example["image"] for example in synthetic_images(config, batch_size)])
    batch = {"image": images.astype(np.float32) / 127.5 - 1}
    batches = prefetch(itertools.repeat(batch, NUM_BEFORE + num_steps), mesh, batch_size)
    figures = measure(lambda batch: encode(codec, batch["image"]), batches, num_steps, NUM_BEFORE)
    return rates(figures, batch_size, num_chips(list(mesh.devices.flat))) | {"flips": 1 + config.data.horizontal_flip}


def measure_sample(config: Config, mesh: "Mesh", num_steps: int) -> dict:
    """Returns the figures of drawing batches of images, decoded if the config names an autoencoder."""
    import numpy as np

    from dit_jax.cli.plan import sampler_program
    from dit_jax.evaluation.speed import fill, measure, num_chips, rates
    from dit_jax.parallel.mesh import prefetch

    program = sampler_program(config, mesh)
    abstract_weights, abstract_codec, _, rows, conditions = program.args
    weights, codec = fill(abstract_weights), fill(abstract_codec)
    (batch_size,), num_draws = rows.shape, min(num_steps, MAX_DRAWS)
    batch = {
        "index": np.arange(batch_size, dtype=np.int32),
        "conditions": fill(conditions),
    }
    batches = prefetch(itertools.repeat(batch, 1 + num_draws), mesh, batch_size)

    def call(batch):
        return program.function(weights, codec, np.int32(0), batch["index"], batch["conditions"])

    figures = rates(measure(call, batches, num_draws, 1), batch_size, num_chips(list(mesh.devices.flat)))
    sampling = config.sampling
    settings = {name: getattr(sampling, name) for name in ("sampler", "num_steps", "cfg_scale")}
    return figures | settings | {"decoded": codec is not None or config.latents is None}


def pipeline(config: Config, mesh: "Mesh", source: "Sequence", num_batches: int) -> "Iterator":
    """Yields a run's first batches of a source, on the mesh."""
    from dit_jax.cli.train import example_transform
    from dit_jax.data.pipeline import train_batches
    from dit_jax.parallel.mesh import local_rows, prefetch

    batch_size = config.training.global_batch_size
    batches = train_batches(
        source,
        example_transform(config, train=True),
        seed=config.seed,
        global_batch_size=batch_size,
        rows=local_rows(mesh, batch_size),
        start_step=0,
        num_steps=num_batches,
        num_threads=config.data.num_threads,
    )
    return prefetch(batches, mesh, batch_size)


def synthetic_source(config: Config) -> list[dict]:
    """Returns examples such as the config's stage reads: images, or the moments of latents."""
    from dit_jax.cli.train import reads_images
    from dit_jax.evaluation.speed import synthetic_images, synthetic_latents

    return (synthetic_images if reads_images(config) else synthetic_latents)(config, NUM_EXAMPLES)


def real_source(config: Config) -> "tuple[Sequence, str] | None":
    """Returns the config's own training examples and where they are from, None where they are not on this machine."""
    from dit_jax.cli.train import reads_images
    from dit_jax.data.latent_cache import open_latents
    from dit_jax.data.sources import is_prepared, open_source

    split = config.data.train_split
    if not reads_images(config):
        return config.latents.path and (open_latents(config.latents.path, split), f"latents of {config.latents.path}")
    return (
        (open_source(config.example_data, split), f"images of {config.data.name}") if is_prepared(config.data) else None
    )


def describe(report: dict) -> list[str]:
    """Returns the report for people."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1) or "a single device"
    lines = [
        f"{report['config']}: JAX {report['jax']}, {report['devices']} x {report['device_kind']}, mesh {mesh}, "
        f"batch {report['global_batch_size']}"
    ]
    for part in PARTS:
        if part in report:
            lines += [f"{part}: {line}" for line in DESCRIPTIONS[part](report[part])]
    whose = "of a device" if report["peak_memory_of"] == "device" else "of the process: these devices keep no count"
    lines.append(f"peak memory {report['peak_memory_bytes'] / GIB:.2f} GiB, {whose}")
    return lines


def describe_train(figures: dict) -> list[str]:
    """Returns the lines about training."""
    flops = figures["model_flops_per_second"]
    if figures["mfu"] is None:
        most = figures["matmul_flops_per_second"]
        share = f"{figures['share_of_matmul']:.0%} of the {most / 1e9:,.0f} of a float32 matmul, measured now"
    else:
        share = f"MFU {figures['mfu']:.1%} of the peak of {figures['peak_flops'] / 1e12:,.0f} TFLOP/s"
    return [
        f"{figures['steps_per_second']:.4g} steps/s, {speed(figures)}; {compiled(figures)}",
        f"{flops / 1e9:,.1f} GFLOP/s (6 x the multiply-adds), {share}",
        f"{figures['data_wait']:.2%} of the time waiting for data",
    ]


def describe_data(figures: dict) -> list[str]:
    """Returns the line about the pipeline."""
    return [f"{figures['batches_per_second']:.4g} batches/s, {speed(figures)}; {figures['source']}"]


def describe_encode(figures: dict) -> list[str]:
    """Returns the line about encoding."""
    flips = ", both flips" if figures["flips"] == 2 else ""
    return [f"{speed(figures)}{flips}; {compiled(figures)}"]


def describe_sample(figures: dict) -> list[str]:
    """Returns the line about sampling."""
    result = "images" if figures["decoded"] else "latents, there is no autoencoder to decode them"
    how = f"{figures['num_steps']} steps of {figures['sampler']}, guidance {figures['cfg_scale']:g}"
    return [f"{speed(figures)} in batches of {figures['batch_size']}, {how}, {result}; {compiled(figures)}"]


DESCRIPTIONS = {
    "train": describe_train,
    "data": describe_data,
    "encode": describe_encode,
    "sample": describe_sample,
}


def speed(figures: dict) -> str:
    """Returns images a second, and of a chip where there are several."""
    total, one = figures["images_per_second"], figures["images_per_second_per_chip"]
    return f"{total:,.4g} images/s" + ("" if total == one else f" ({one:,.4g} a chip)")


def compiled(figures: dict) -> str:
    """Returns how long compilation took."""
    from_cache = ", read from the compilation cache" if figures["compiled_from_cache"] else ""
    return f"compiled in {figures['compile_seconds']:.1f} s{from_cache}"
