"""Kills `dit-jax sample` half way, starts it again, and compares the files with those of a run that was not killed.

    python -m tests.cli.killed_sampling --num_samples=10000

A tiny DiT of pixels draws, on 1 device and on 8 virtual ones, and on either with a kill in between, after which the
other goes on. Prints the SHA-256 of each `samples.npz`; exits with 1 where they differ.
"""

import argparse
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax

from dit_jax.checkpoint import Checkpoints, write_config
from dit_jax.models.build import init_params
from tests.children import child_error
from tests.tiny import dit_config

ARGUMENTS = ("--steps=2", "--config.sampling.batch_size=8")


def make_workdir(folder: pathlib.Path) -> pathlib.Path:
    """Writes a workdir with a checkpoint of random weights, none of them zero."""
    config = dit_config(folder / "no_images")
    params = jax.tree.map(lambda x: x + 0.02, init_params(config, jax.random.key(0)))
    workdir = folder / "workdir"
    workdir.mkdir()
    write_config(workdir, config)
    with Checkpoints(workdir, max_to_keep=1) as checkpoints:
        checkpoints.save(0, {"params": params}, config)
    return workdir


def sample_flags(workdir: pathlib.Path, output: pathlib.Path, num_samples: int) -> list[str]:
    """Returns the flags of a drawing."""
    return ["sample", f"--workdir={workdir}", f"--output={output}", f"--num_samples={num_samples}", *ARGUMENTS]


def start(workdir: pathlib.Path, output: pathlib.Path, num_samples: int, num_devices: int) -> subprocess.Popen:
    """Starts a drawing as a program of its own."""
    command = [sys.executable, "-m", "dit_jax", *sample_flags(workdir, output, num_samples)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(num_devices)}
    with words(output).open("a") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def words(output: pathlib.Path) -> pathlib.Path:
    """Returns the file of what the drawings to a folder say."""
    return output.with_suffix(".txt")


def require_success(process: subprocess.Popen, output: pathlib.Path) -> None:
    """Waits for a drawing; ends this program with its last words where it failed."""
    if code := process.wait():
        raise child_error("the drawing", code, words(output).read_text())


def count_parts(output: pathlib.Path) -> int:
    """Returns how many parts of an unfinished drawing are there."""
    return len([path for path in output.glob(".parts-*/0*") if path.suffix != ".tmp"])


def kill_half_way(workdir: pathlib.Path, output: pathlib.Path, num_samples: int, num_devices: int) -> int:
    """Starts a drawing and kills it when half of its parts are there; returns how many are."""
    process = start(workdir, output, num_samples, num_devices)
    while count_parts(output) < num_samples // 8 // 2:
        if process.poll() is not None:
            require_success(process, output)
            raise SystemExit("error: the drawing ended before it was killed; give a larger --num_samples")
        time.sleep(0.002)
    process.kill()
    process.wait()
    return count_parts(output)


def digest(output: pathlib.Path) -> str:
    """Returns the SHA-256 of the images that were drawn."""
    return hashlib.sha256((output / "samples.npz").read_bytes()).hexdigest()


def main() -> int:
    """Draws in four ways; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_samples", type=int, default=10_000)
    num_samples = parser.parse_args().num_samples
    with tempfile.TemporaryDirectory() as folder:
        workdir, digests = make_workdir(pathlib.Path(folder)), []
        for killed_on, finished_on in ((None, 1), (None, 8), (1, 8), (8, 1)):
            output = pathlib.Path(folder) / f"{killed_on}_{finished_on}"
            story = f"on {finished_on} devices"
            if killed_on:
                kept = kill_half_way(workdir, output, num_samples, killed_on)
                story = f"killed on {killed_on} devices with {8 * kept:,} of {num_samples:,} images, finished {story}"
            begun = time.monotonic()
            require_success(start(workdir, output, num_samples, finished_on), output)
            digests.append(digest(output))
            print(f"{story}, {time.monotonic() - begun:.0f} s: {digests[-1]}", flush=True)
    same = len(set(digests)) == 1
    print("all the same" if same else "NOT the same")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
