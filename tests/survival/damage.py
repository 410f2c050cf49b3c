"""Damages a checkpoint at random, one bit flip or truncation at a time, and looks whether a restore finds each.

    python -m tests.survival.damage --trials 1000 [--seed 0] [--content_alone]

A trial flips a bit, or cuts off the end, of a file drawn from all files of the newest of two checkpoints, and restores
the newest good one. Right is: the values that were saved, of the damaged checkpoint where the damage does not touch
them, else of the older one, with a line that says why. `--content_alone` leaves out the check of files' sizes and sums,
so that what is damaged reaches TensorStore, and the arrays' own sums must find it. Exits with 1 if one is missed.
"""

import argparse
import collections
import pathlib
import sys
import tempfile
from unittest import mock

import jax
import numpy as np

from dit_jax.checkpoint import Checkpoints, store
from dit_jax.checkpoint.manifest import list_files
from tests.checkpoint.trees import abstract_on, make_items, one_device, save_steps

OLDER, NEWER = 1, 2


def damage(path: pathlib.Path, rng: np.random.Generator) -> str:
    """Flips a bit of a file or cuts its end off; returns which."""
    content = bytearray(path.read_bytes())
    if rng.integers(2):
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        kind = "flip"
    else:
        del content[rng.integers(len(content)) :]
        kind = "cut"
    path.write_bytes(content)
    return kind


def outcome(workdir: pathlib.Path, abstract: dict) -> str:
    """Returns "found", "harmless" or what is wrong."""
    lines: list[str] = []
    step, found = Checkpoints(workdir, log=lines.append).restore_newest_good(abstract)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(make_items(step)), strict=True)
    if any(np.asarray(x).tobytes() != np.asarray(y).tobytes() for x, y in pairs):
        return f"MISSED: other values of step {step}"
    if step == NEWER:
        return "harmless"
    told = len(lines) == 1 and f"step {NEWER} " in lines[0] and "is used instead" in lines[0]
    return "found" if told else f"MISSED: {lines}"


def run(trials: int, seed: int = 0, content_alone: bool = False) -> collections.Counter:
    """Returns how often each (kind of damage, item, outcome) came."""
    rng, counts = np.random.default_rng(seed), collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        workdir = pathlib.Path(name)
        save_steps(workdir, [OLDER, NEWER])
        folder, abstract = workdir / "checkpoints" / str(NEWER), abstract_on(one_device(), make_items(NEWER))
        files = [path for path in (*list_files(folder), "manifest/metadata") if (folder / path).stat().st_size]
        no_check = mock.patch.object(store, "check_files") if content_alone else mock.MagicMock()
        with no_check:
            for number in range(trials):
                path = files[rng.integers(len(files))]
                content = (folder / path).read_bytes()
                kind = damage(folder / path, rng)
                result = outcome(workdir, abstract)
                (folder / path).write_bytes(content)
                counts[kind, path.split("/")[0], result] += 1
                if (number + 1) % 100 == 0:
                    print(f"{number + 1} of {trials}", file=sys.stderr, flush=True)
    return counts


def main(argv: list[str] | None = None) -> None:
    """Prints the counts."""
    parser = argparse.ArgumentParser(prog="python -m tests.survival.damage", description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--content_alone", action="store_true", help="without the check of files")
    args = parser.parse_args(argv)
    counts = run(args.trials, args.seed, args.content_alone)
    for (kind, item, result), count in sorted(counts.items()):
        print(f"{kind:<5} {item:<22} {count:>5} {result}")
    totals = collections.Counter()
    for (_, _, result), count in counts.items():
        totals[result.split(":")[0]] += count
    print(f"{args.trials} trials: {totals['found']} found, {totals['harmless']} harmless, {totals['MISSED']} missed")
    sys.exit(bool(totals["MISSED"]))


if __name__ == "__main__":
    main()
