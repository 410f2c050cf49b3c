"""launch/local.sh: several processes train as one does, and end together."""

import json
import signal

import pytest

from dit_jax.config import config_to_dict
from dit_jax.metrics.history import read_metrics
from tests.tiny import dit_config, make_image_folder

STEPS = 4


@pytest.fixture
def config(shell):
    """The file of a tiny config, which reads images."""
    folder = make_image_folder(shell.folder / "images")
    values = config_to_dict(dit_config(folder, num_train_steps=STEPS))
    path = shell.folder / "config.py"
    path.write_text(f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({values!r})\n")
    return path


def dit_jax(shell, text: str) -> None:
    """Makes `dit-jax` a bash program of this text."""
    shell.program("dit-jax", text, shell.folder / "venv" / "bin")


def figures(workdir) -> dict:
    rows = read_metrics(workdir)
    return {(r["step"], r["split"]): {k: v for k, v in r.items() if "second" not in k and k != "split"} for r in rows}


def test_two_processes_train_as_one_and_resume_as_one(shell, config):
    shell.run("local.sh", config, "one", "--devices-per-process=2")
    first = shell.run("local.sh", config, "two", "--processes", 2, f"--config.training.num_train_steps={STEPS // 2}")
    second = shell.run("local.sh", config, "two", "--processes", 2)  # the checkpoint is restored by both
    assert "[0] " in first and "[1] " in first
    assert f"resuming from the checkpoint of step {STEPS // 2} of {STEPS}" in second
    one, two = figures(shell.folder / "one"), figures(shell.folder / "two")
    assert one.keys() == two.keys() and len(one) == STEPS + STEPS // 2
    for row, values in one.items():
        assert two[row] == pytest.approx(values, rel=1e-5), row
    pictures = [sorted((shell.folder / run / "samples").iterdir()) for run in ("one", "two")]
    assert [path.name for path in pictures[0]] == [path.name for path in pictures[1]] != []
    assert json.loads((shell.folder / "two" / "config.json").read_text())["stage"] == "diffusion"


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
        process.kill()
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
