"""How long `dit-jax train` takes to its first step: with nothing compiled before, and with the compilation cache warm.

python -m tests.speed.first_step --config=configs/dit_imagenet.py:S/2 --config.training.global_batch_size=8

Not a test: it prints times. Each round starts the program three times: cold, with an empty cache; again, the same in
another workdir; and resumed, in the first workdir, from the checkpoint that the cold start left. Each is killed once
its first step is done. Times are from the program's log; a config of latents trains on a cache of random ones.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

from dit_jax.checkpoint import params_digest
from dit_jax.cli.encode import export_autoencoder
from dit_jax.cli.main import add_config_argument, split_overrides
from dit_jax.config import Config, config_from_dict, config_to_dict, load_config
from dit_jax.data.latent_cache import LatentCacheWriter, Plan
from dit_jax.data.transforms import CROP
from dit_jax.evaluation.loaded import AUTOENCODER_DIR
from dit_jax.models.build import init_params
from tests.children import child_error
from tests.tiny import autoencoder_config

NUM_LATENTS = 512  # of each split
FIRST_STEP = re.compile(r"first step begun after ([\d.]+) s.* done after ([\d.]+) s")
STARTS = {"cold": "one", "again": "other", "resumed": "one"}  # and their workdirs
POLL_SECONDS = 0.1


def main(argv: list[str] | None = None):
    """Prints each start's seconds until its first step began and was done, and their shares of the cold start's."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_config_argument(parser)
    parser.add_argument("--rounds", type=int, default=5)
    argv, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)
    config = load_config(args.config, overrides)
    jax.config.update("jax_platforms", "cpu")  # in this process: it takes no accelerator from those that it starts
    with tempfile.TemporaryDirectory(prefix="dit_jax_first_step_") as folder:
        folder = pathlib.Path(folder)
        command = [f"--config={args.config}", *(f"--config.{key}={value}" for key, value in overrides)]
        if config.latents is not None and config.latents.path is None:
            write_random_latents(folder / "latents", config)
            command.append(f"--config.latents.path={folder / 'latents'}")
        command.append("--config.training.checkpoint_every_steps=1")
        rounds = np.array([measure_round(command, folder / "round") for _ in range(args.rounds)])  # [rounds, starts, 2]
    seconds, shares = np.median(rounds, axis=0), rounds / rounds[:, :1]
    for i, name in enumerate(STARTS):
        parts = [
            f"{what} after {seconds[i, j]:5.2f} s, {np.median(shares[:, i, j]):.2f} of cold "
            f"({shares[:, i, j].min():.2f} to {shares[:, i, j].max():.2f})"
            for j, what in enumerate(("begun", "done"))
        ]
        print(f"{name:<8} first step {'; '.join(parts)}")


def measure_round(command, folder):
    """Returns the (seconds until the first step began, until it was done) of each start."""
    command = [*command, f"--config.compute.compilation_cache={folder / 'compilations'}"]
    seconds = [first_step(command, folder / workdir) for workdir in STARTS.values()]
    shutil.rmtree(folder)
    return seconds


def first_step(command, workdir):
    """Starts the program; returns its seconds to the first step, and leaves a checkpoint in the workdir."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-m", "dit_jax", "train", f"--workdir={workdir}", *command]
    output = workdir.with_suffix(".txt")
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w") as file, subprocess.Popen(command, env=environment, stderr=file, stdout=file) as run:
        try:
            while True:
                has_ended = run.poll() is not None  # looked at first: what it wrote before its end is read below
                found = FIRST_STEP.search(output.read_text())
                if found and list(workdir.glob("checkpoints/[0-9]*")):
                    return [float(seconds) for seconds in found.groups()]
                if has_ended:
                    raise child_error(" ".join(command[1:]), run.returncode, output.read_text())
                time.sleep(POLL_SECONDS)
        finally:
            run.kill()


def random_autoencoder(config: Config) -> tuple[Config, dict]:
    """Returns the config and random weights of a small autoencoder with the config's images and shape of latents."""
    side, _, channels = config.latents.shape
    halvings = (config.data.image_size // side).bit_length() - 1
    values = config_to_dict(autoencoder_config(pathlib.Path()))
    values["data"] = config_to_dict(config)["data"]
    values["autoencoder"] |= {"latent_channels": channels, "channel_multipliers": (1,) * (halvings + 1)}
    config = config_from_dict(values)
    return config, jax.jit(lambda: init_params(config, jax.random.key(0)))()


def write_random_latents(path: pathlib.Path, config: Config):
    """Writes a latent cache of random moments, such as the config reads, with an autoencoder of random weights."""
    autoencoder, params = random_autoencoder(config)
    data, shape, rng = config.data, config.latents.shape, np.random.default_rng(0)
    names = ("name", "image_size", "channels", "num_classes", "horizontal_flip")
    identity = {name: getattr(data, name) for name in names}
    splits = dict.fromkeys((data.train_split, data.eval_split), NUM_LATENTS)
    plan = Plan(
        data=identity | {"crop": CROP, "version": "random", "splits": splits},
        train_split=data.train_split,
        autoencoder=params_digest(params),
        latent_shape=shape,
        stochastic=True,
        num_flips=1 + data.horizontal_flip,
        dtype="float16",
        extra_fields=(),
        shard_size=NUM_LATENTS,
        batch_size=NUM_LATENTS,
        num_devices=1,
        device="none",
        jax="none",
    )
    writer = LatentCacheWriter(path, plan)
    writer.write_folder(AUTOENCODER_DIR, lambda folder: export_autoencoder(params, 0, autoencoder, folder))
    moments = rng.normal(size=(NUM_LATENTS, plan.num_flips, *shape[:2], 2 * shape[2])).astype(np.float32)
    labels = rng.integers(data.num_classes, size=NUM_LATENTS).tolist()
    for shard in writer.missing_shards():
        writer.write_shard(shard, [(moments, labels, [{}] * NUM_LATENTS)])
    writer.finish()


if __name__ == "__main__":
    main()
