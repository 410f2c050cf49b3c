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

import numpy as np

from dit_jax.cli.main import add_config_argument, split_overrides
from dit_jax.config import Config, load_config
from dit_jax.data.latent_cache import LatentCacheWriter, Plan
from dit_jax.data.transforms import CROP

NUM_LATENTS = 512  # of each split
FIRST_STEP = re.compile(r"first step begun after ([\d.]+) s.* done after ([\d.]+) s")
STARTS = {"cold": "one", "again": "other", "resumed": "one"}  # and their workdirs


def main():
    """Prints each start's seconds until its first step began and was done, and their shares of the cold start's."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_config_argument(parser)
    parser.add_argument("--rounds", type=int, default=5)
    argv, overrides = split_overrides(sys.argv[1:])
    args = parser.parse_args(argv)
    config = load_config(args.config, overrides)
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
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as run:
        lines = []
        try:
            for line in run.stderr:
                lines.append(line)
                if found := FIRST_STEP.search(line):
                    while run.poll() is None and not list(workdir.glob("checkpoints/[0-9]*")):
                        time.sleep(0.1)
                    return [float(seconds) for seconds in found.groups()]
        finally:
            run.kill()
    raise SystemExit("".join(lines))


def write_random_latents(path: pathlib.Path, config: Config):
    """Writes a latent cache of random moments, such as the config reads."""
    data, shape, rng = config.data, config.latents.shape, np.random.default_rng(0)
    names = ("name", "image_size", "channels", "num_classes", "horizontal_flip")
    identity = {name: getattr(data, name) for name in names}
    splits = dict.fromkeys((data.train_split, data.eval_split), NUM_LATENTS)
    plan = Plan(
        data=identity | {"crop": CROP, "version": "random", "splits": splits},
        train_split=data.train_split,
        autoencoder="none",
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
    writer.write_folder("autoencoder", lambda folder: None)
    moments = rng.normal(size=(NUM_LATENTS, plan.num_flips, *shape[:2], 2 * shape[2])).astype(np.float32)
    labels = rng.integers(data.num_classes, size=NUM_LATENTS).tolist()
    for shard in writer.missing_shards():
        writer.write_shard(shard, [(moments, labels, [{}] * NUM_LATENTS)])
    writer.finish()


if __name__ == "__main__":
    main()
