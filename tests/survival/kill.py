"""Kills training runs at random moments, starts them again until they are done, and compares the bits.

python -m tests.survival.kill --runs 60

Half of the runs train a tiny DiT, half a tiny autoencoder with a discriminator and a codebook, about 200 steps each
with a checkpoint every 20. Each is killed (SIGKILL) 1 to 5 times: at a random time of its life, or while it writes a
checkpoint. In the end its checkpoints, snapshots, curves, pictures and `bad_steps.jsonl` must be those of a run that
was not. A start is the real `dit-jax train` in a process of its own, forked from one that has imported everything and
used no device, since the imports take longer than all the steps.
"""

import argparse
import hashlib
import importlib
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable

from tests.children import child_error

STEPS, SAVE_EVERY = 200, 20
IMPORTS = (  # what training imports, of ours and of others
    *("clu.metric_writers", "grain", "orbax.checkpoint"),
    *(f"dit_jax.cli.{name}" for name in ("main", "plan", "train")),
    *(f"dit_jax.data.{name}" for name in ("latent_cache", "pipeline", "sources")),
    *(f"dit_jax.evaluation.{name}" for name in ("generate", "loaded", "pictures")),
    *(f"dit_jax.training.{name}" for name in ("autoencoder_step", "diffusion_step", "kept_step", "loop")),
)
TIMES = ("seconds", "steps_per_second", "data_wait")  # what is of the machine, in a line of the curves
SAVING = "*orbax-checkpoint-tmp*"  # the folder that becomes a checkpoint when it is complete
POLL_SECONDS = 0.002
LIMIT_SECONDS = 3600  # for a start, of which a quiet machine makes one in seconds


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the number of runs that ended with other bits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="dit_jax_kill_") as scratch:
        return run_all(pathlib.Path(scratch), args.runs, args.steps, args.seed)


def run_all(scratch: pathlib.Path, num_runs: int, num_steps: int, seed: int) -> int:
    """Makes the runs, alternately of the two stages; prints a line for each and returns how many differ."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = "1"
    configs = write_configs(scratch, num_steps)
    whole, lives = {}, {}
    num_different = num_kills = num_in_saves = 0
    for index in range(num_runs):
        stage = tuple(configs)[index % len(configs)]
        if stage not in whole:
            for name in ("warm_up", "whole"):  # the first fills the compilation cache, which all others share
                start = time.monotonic()
                pid = start_training(configs[stage], scratch / f"{stage}_{name}")
                wait(pid, (scratch / f"{stage}_{name}.txt"))
                lives[stage] = time.monotonic() - start
            whole[stage] = fingerprint(scratch / f"{stage}_whole", scratch)
            assert whole[stage] == fingerprint(scratch / f"{stage}_warm_up", scratch), f"two whole {stage} runs differ"
        workdir, rng = scratch / f"{stage}_{index}", random.Random(f"{seed}/{index}")
        moments = killed_run(configs[stage], workdir, lives[stage], rng)
        found = fingerprint(workdir, scratch)
        different = sorted(key for key in found | whole[stage] if found.get(key) != whole[stage].get(key))
        num_different += bool(different)
        num_kills += len(moments)
        num_in_saves += sum("saving" in moment for moment in moments)
        print(f"{stage} {index}: killed {', '.join(moments)}: {different or 'the same bits'}", flush=True)
        shutil.rmtree(workdir)
    print(
        f"{num_runs} runs, {num_kills} kills, {num_in_saves} of them while a checkpoint was written: "
        f"{num_runs - num_different} ended with the bits of a run that was not killed, {num_different} did not"
    )
    return num_different


def write_configs(scratch: pathlib.Path, num_steps: int) -> dict[str, pathlib.Path]:
    """Writes the data and the two config files; returns these by stage."""
    from dit_jax.config import config_to_dict
    from tests.tiny import adversarial_config, dit_config, make_image_folder

    folder = make_image_folder(scratch / "images")
    training = {
        "num_train_steps": num_steps,
        "log_every_steps": 8,
        "eval_every_steps": num_steps // 2,
        "checkpoint_every_steps": SAVE_EVERY,
        "extra_ema_decays": (0.9,),
        "ema_lengths": (0.05,),
        "snapshot_every_steps": 2 * SAVE_EVERY,
        "spike_zscore": 6.0,
    }
    codebook = {"num_codes": 16, "update": "ema", "restart_usage": 0.5}
    configs = {
        "diffusion": dit_config(folder, **training),
        "autoencoder": adversarial_config(folder, codebook, start_step=num_steps // 4, **training),
    }
    paths = {}
    for stage, config in configs.items():
        values = config_to_dict(config)
        values["compute"]["compilation_cache"] = str(scratch / "compilations")
        paths[stage] = scratch / f"{stage}.py"
        paths[stage].write_text(
            f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({values!r})\n"
        )
    return paths


def killed_run(config: pathlib.Path, workdir: pathlib.Path, life: float, rng: random.Random) -> list[str]:
    """Trains to the end, killed 1 to 5 times; returns the moments of the kills."""
    moments, num_kills = [], rng.randint(1, 5)
    while True:
        pid = start_training(config, workdir)
        if len(moments) == num_kills:
            wait(pid, workdir.with_suffix(".txt"))
            return moments
        if rng.random() < 0.5:
            seconds = rng.uniform(0, life)
            moment, due = f"after {seconds:.1f} s", after(seconds)
        else:
            moment, due = "saving", while_saving(workdir, rng)
        while not has_ended(pid) and not due():
            time.sleep(POLL_SECONDS)
        if has_ended(pid):  # before its moment
            wait(pid, workdir.with_suffix(".txt"))
            if moments:
                return moments
            shutil.rmtree(workdir)  # it was never killed: from the start
            continue
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        moments.append(f"{moment} at step {newest_checkpoint(workdir)}+")


def after(seconds: float) -> Callable[[], bool]:
    """Returns what tells whether so many seconds have passed."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def while_saving(workdir: pathlib.Path, rng: random.Random) -> Callable[[], bool]:
    """Returns what tells whether a few checkpoints were begun, and the last of them some time ago."""
    left, delay, seen, due = rng.randint(1, 4), rng.uniform(0, 0.1), set(), [None]

    def is_due() -> bool:
        if due[0] is None:
            seen.update(workdir.glob(f"*/{SAVING}"))
            if len(seen) < left:
                return False
            due[0] = after(delay)
        return due[0]()

    seen.update(workdir.glob(f"*/{SAVING}"))  # what an earlier kill has left
    left += len(seen)
    return is_due


def newest_checkpoint(workdir: pathlib.Path) -> int:
    """Returns the newest complete step, 0 if there is none."""
    return max((int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()), default=0)


def fork(work: Callable[[], None], output: pathlib.Path) -> int:
    """Returns the number of a process that does this work, and writes what it says to a file."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        work()
        code = 0
    except SystemExit as exit_:
        code = exit_.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start_training(config: pathlib.Path, workdir: pathlib.Path) -> int:
    """Starts `dit-jax train`; returns the number of its process."""
    for name in IMPORTS:
        importlib.import_module(name)
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)  # JAX has started no thread yet
    command = ["train", f"--config={config}", f"--workdir={workdir}"]
    return fork(lambda: sys.modules["dit_jax.cli.main"].main(command), workdir.with_suffix(".txt"))


_codes: dict[int, int] = {}  # exit codes of processes that were seen to have ended


def has_ended(pid: int) -> bool:
    """Returns whether a process has ended by itself."""
    if pid not in _codes:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            _codes[pid] = os.waitstatus_to_exitcode(status)
    return pid in _codes


def wait(pid: int, output: pathlib.Path) -> None:
    """Returns when a process has ended well; ends this one with what it wrote where it has not."""
    end = time.monotonic() + LIMIT_SECONDS
    while not has_ended(pid):
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(10 * POLL_SECONDS)
    if code := _codes.pop(pid):
        raise child_error(output.stem, code, output.read_text())


def fingerprint(workdir: pathlib.Path, scratch: pathlib.Path) -> dict[str, str]:
    """Returns a digest of all that a finished run is judged by: arrays of checkpoints, lines of curves, pictures."""
    output = scratch / "fingerprint.json"
    log = scratch / "fingerprint.txt"
    wait(fork(lambda: output.write_text(json.dumps(digests(workdir))), log), log)
    return json.loads(output.read_text())


def digests(workdir: pathlib.Path) -> dict[str, str]:
    """Returns the digests; in a process of its own, for reading checkpoints starts JAX's threads."""
    import orbax.checkpoint as ocp

    from dit_jax.checkpoint import params_digest
    from dit_jax.metrics.history import read_metrics
    from dit_jax.training.bad_steps import read_bad_steps

    found = {}
    for folder in ("checkpoints", "snapshots"):
        for step in (workdir / folder).iterdir():
            for item in step.iterdir():
                if (item / "_METADATA").exists():
                    with ocp.StandardCheckpointer() as checkpointer:
                        found[str(item.relative_to(workdir))] = params_digest(checkpointer.restore(item))
    for row in read_metrics(workdir):
        key = f"curves/{row['step']}/{row['split']}"
        assert key not in found, f"{key} is there twice"
        found[key] = json.dumps({name: value for name, value in row.items() if name not in TIMES}, sort_keys=True)
    for path in [*workdir.glob("samples/*"), workdir / "config.json"]:
        found[str(path.relative_to(workdir))] = hashlib.sha256(path.read_bytes()).hexdigest()
    found["bad_steps"] = json.dumps(read_bad_steps(workdir))
    return found


if __name__ == "__main__":
    sys.exit(bool(main()))
