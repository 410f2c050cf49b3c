"""launch/local.sh: several processes train as one does, and end together."""

import dataclasses
import json
import os
import pathlib
import signal
import time

import jax
import pytest

from dit_jax.checkpoint import Checkpoints
from dit_jax.cli.main import main
from dit_jax.config import LatentsConfig, config_to_dict
from dit_jax.metrics.history import read_metrics
from dit_jax.models.build import init_params
from tests.tiny import autoencoder_config, dit_config, make_image_folder

STEPS = 4
TIMES = ("seconds", "steps_per_second", "data_wait")  # what is of the machine
LIMIT_SECONDS = 900  # for what takes seconds on an idle machine


def write_config(path, config):
    values = config_to_dict(config)
    path.write_text(f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({values!r})\n")
    return path


@pytest.fixture
def config(shell):
    """The file of a tiny config, which reads images."""
    folder = make_image_folder(shell.folder / "images")
    return write_config(shell.folder / "config.py", dit_config(folder, num_train_steps=STEPS))


def dit_jax(shell, text: str) -> None:
    """Makes `dit-jax` a bash program of this text."""
    shell.program("dit-jax", text, shell.folder / "venv" / "bin")


def figures(workdir) -> dict:
    """Returns the metrics of each (step, split); of steps that a resumed run made again, those of the last time."""
    rows = read_metrics(workdir)
    return {(r["step"], r["split"]): {k: v for k, v in r.items() if k not in TIMES and k != "split"} for r in rows}


def assert_same(found: dict, expected: dict) -> None:
    """Asserts that two runs have the same figures but for the order of sums."""
    assert found.keys() == expected.keys()
    for row, values in expected.items():
        assert found[row] == pytest.approx(values, rel=1e-5), row


def find_steps(workdir) -> list[int]:
    """Returns the complete checkpoints of a run that may be under way."""
    return [int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()]


def test_two_processes_train_as_one_and_resume_as_four(shell, config):
    main(["train", f"--config={config}", f"--workdir={shell.folder / 'one'}"])
    first = shell.run("local.sh", config, "two", "--processes", 2, f"--config.training.num_train_steps={STEPS // 2}")
    second = shell.run("local.sh", config, "two", "--processes", 4)  # the checkpoint is restored by all
    assert "[0] step 2 of 2" in first  # the others have nothing to say
    assert f"resuming from the checkpoint of step {STEPS // 2} of {STEPS}" in second
    one, two = figures(shell.folder / "one"), figures(shell.folder / "two")
    assert len(one) == STEPS + STEPS // 2
    assert_same(two, one)
    pictures = [sorted((shell.folder / run / "samples").iterdir()) for run in ("one", "two")]
    assert [path.name for path in pictures[0]] == [path.name for path in pictures[1]] != []
    assert json.loads((shell.folder / "two" / "config.json").read_text())["stage"] == "diffusion"


@pytest.mark.parametrize("source", ["cache", "encoder"])
def test_two_processes_train_as_one_on_latents(shell, source):
    folder = make_image_folder(shell.folder / "images")
    images = autoencoder_config(folder)
    autoencoder, cache = shell.folder / "autoencoder", shell.folder / "latents"
    with Checkpoints(autoencoder, max_to_keep=1) as checkpoints:
        checkpoints.save(0, {"params": jax.jit(lambda: init_params(images, jax.random.key(0)))()}, images)
    if source == "cache":
        path = write_config(shell.folder / "autoencoder.py", images)
        main(["encode", f"--config={path}", f"--autoencoder={autoencoder}", f"--output={cache}"])
        latents = LatentsConfig(shape=(4, 4, 2), path=str(cache))
    else:
        latents = LatentsConfig(shape=(4, 4, 2), encode_with=str(autoencoder), scale=1.5)
    dit = dit_config(folder, num_train_steps=STEPS, eval_every_steps=STEPS, checkpoint_every_steps=STEPS)
    config = write_config(shell.folder / "dit.py", dataclasses.replace(dit, latents=latents))
    main(["train", f"--config={config}", f"--workdir={shell.folder / 'one'}"])
    shell.run("local.sh", config, "two", "--processes=2")
    one, two = figures(shell.folder / "one"), figures(shell.folder / "two")
    assert len(one) == STEPS + 1
    assert_same(two, one)


def process_of(launcher: int, index: int) -> int:
    """Returns the number of the process with this index that a launch script started."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or is another's
            continue
        if parent == launcher and b"DIT_JAX_PROCESS_ID=%d" % index in environment:
            found.append(int(folder.name))
    (process,) = found
    return process


@pytest.mark.skipif(not pathlib.Path("/proc/self/environ").exists(), reason="needs /proc")
def test_a_killed_process_ends_the_other_and_the_run_resumes_with_the_losses_of_one_that_was_not(shell):
    folder = make_image_folder(shell.folder / "images")
    endless = dit_config(folder, num_train_steps=10**6, checkpoint_every_steps=2, eval_every_steps=10**6)
    config, workdir = write_config(shell.folder / "config.py", endless), shell.folder / "killed"
    launcher = shell.start("local.sh", config, workdir, "--processes=2")
    try:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not find_steps(workdir) and launcher.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(process_of(launcher.pid, 1), signal.SIGKILL)
        output, _ = launcher.communicate(timeout=LIMIT_SECONDS)
    finally:
        shell.end(launcher)
    assert launcher.returncode == 137 and "error: a process ended with code 137" in output, output
    newest = max(find_steps(workdir))
    stop = f"--config.training.num_train_steps={newest + 2}"
    resumed = shell.run("local.sh", config, workdir, "--processes=2", stop)
    assert f"resuming from the checkpoint of step {newest} of {newest + 2}" in resumed
    main(["train", f"--config={config}", f"--workdir={shell.folder / 'whole'}", stop])
    killed, whole = figures(workdir), figures(shell.folder / "whole")
    assert_same({row: killed[row] for row in whole}, whole)  # the killed run may have been further


def test_an_error_in_one_process_ends_both_with_its_message(shell, config):
    # Of the first batch, process 0 loads the first half; its images in training order are unlike process 1's.
    broken = sorted((shell.folder / "images").glob("*/*.png"))[3]
    broken.write_bytes(broken.read_bytes()[:40])
    output = shell.run(
        "local.sh", config, "w", "--processes=2", "--config.training.num_train_steps=50",
        "--config.training.eval_every_steps=1000", "--config.training.checkpoint_every_steps=1000", code=2,
    )  # fmt: skip
    lines = [line for line in output.splitlines() if "cannot read image" in line]
    assert {line.split()[0] for line in lines} == {"[0]", "[1]"}, output
    assert sum("dit-jax: error: process " in line for line in lines) == 1, output  # told by the other
    assert "Traceback" not in output


def test_a_dry_run_prints_every_command_and_runs_none(shell):
    dit_jax(shell, "touch $FAKE/ran")
    output = shell.run("local.sh", "c.py", "w", "--processes", 64, "--dry-run", "--config.dit.conditioning=('adaln',)")
    lines = [line for line in output.splitlines() if "dit-jax" in line]
    assert len(lines) == 64 and not (shell.folder / "ran").exists()
    ports = {line.split("DIT_JAX_COORDINATOR=127.0.0.1:")[1].split()[0] for line in lines}
    assert len(ports) == 1
    for index, line in enumerate(lines):
        assert f"DIT_JAX_NUM_PROCESSES=64 DIT_JAX_PROCESS_ID={index} dit-jax train" in line
        assert f"--workdir={shell.folder}/w" in line and "conditioning=" in line


def test_a_process_that_asks_for_it_is_started_again(shell):
    dit_jax(shell, 'echo run >>$FAKE/runs; [[ $(wc -l <$FAKE/runs) -gt 1 ]] || exit 75; echo "done: $*"')
    output = shell.run("local.sh", "c.py", "w", "--config.seed=1")
    assert "asks to be started again" in output and "done: train" in output
    assert "--config.seed=1" in output


@pytest.mark.parametrize("options", [[], ["--devices-per-process=1"]])
def test_a_machine_with_gpus_gets_their_compiler_flags(shell, options):
    shell.program("nvidia-smi", "")
    dit_jax(shell, 'echo "flags: ${XLA_FLAGS:-none}"')
    flags = shell.run("local.sh", "c.py", "w", *options).split("flags: ")[1]
    assert ("none" in flags) if options else flags.startswith("--xla_gpu_"), flags
    dry = shell.run("local.sh", "c.py", "w", *options, "--dry-run")
    assert ("source launch/xla_flags.sh gpu" in dry) is not bool(options)


def test_an_interrupt_ends_all_processes(shell):
    dit_jax(shell, 'trap "echo ended; exit 143" TERM; echo ready; while true; do sleep 0.1; done')
    process = shell.start("local.sh", "c.py", "w", "--processes=2")
    try:
        ready = 0
        while ready < 2:
            ready += "ready" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        shell.end(process)
    assert process.returncode == 143
    assert sorted(output.split("\n"))[-2:] == ["[0] ended", "[1] ended"]


def test_a_process_that_dies_without_a_word_ends_the_others(shell):
    dit_jax(shell, "((DIT_JAX_PROCESS_ID)) || exec sleep 300; kill -KILL $$")
    output = shell.run("local.sh", "c.py", "w", "--processes=2", code=137)
    assert "ended with code 137" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["c.py"], "give CONFIG and WORKDIR"),
        (["c.py", "w", "--processes=0"], "--processes=0 must be a positive whole number"),
        (["c.py", "w", "--procesess=2"], "unknown argument --procesess=2"),
        (["c.py", "w", "--config.seed", "1"], "must have its value in the same word"),
        (["c.py", "w", "--processes"], "--processes needs a value"),
    ],
)
def test_bad_arguments_are_one_line(shell, arguments, message):
    output = shell.run("local.sh", *arguments, code=2)
    assert message in output and output.count("\n") == 1
