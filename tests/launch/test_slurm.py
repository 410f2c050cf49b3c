"""launch/slurm.sh through submit, run, preempt, resume and cancel, with SLURM's programs only pretending."""

import subprocess

import pytest

CONFIG = "configs/dit_imagenet.py:XL/2"
PROGRAMS = {
    "squeue": 'echo "squeue $*" >>$FAKE/calls; cat "$FAKE/job" 2>/dev/null || true',
    "sbatch": 'echo "sbatch $*" >>$FAKE/calls; cat >"$FAKE/batch"; echo 7 | tee "$FAKE/job"',
    "scancel": 'echo "scancel $*" >>$FAKE/calls; rm -f "$FAKE/job"',
    "scontrol": 'echo "scontrol $*" >>$FAKE/calls',
    # Runs one task of it; each line of `ends` is the code of a run.
    "srun": 'echo "srun $*" >>$FAKE/calls; code=$(head -n 1 "$FAKE/ends"); sed -i 1d "$FAKE/ends"; exit "$code"',
}


@pytest.fixture
def slurm(shell):
    for name, text in PROGRAMS.items():
        shell.program(name, text)
    return shell


def run_job(shell, code: int) -> None:
    """Runs the batch script as a node does."""
    environment = shell.environment | {"SLURM_JOB_ID": "7"}
    done = subprocess.run(
        ["bash", shell.folder / "batch"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr


def test_a_job_is_submitted_once_requeued_when_it_asks_and_cancelled(slurm):
    override = "--config.dit.conditioning=('adaln',)"
    assert "submitted job 7" in slurm.run("slurm.sh", CONFIG, "xl2", "--nodes=8", override)
    assert "job 7" in slurm.run("slurm.sh", CONFIG, "xl2", "--nodes=8", override)  # it is there
    assert sum(call.startswith("sbatch") for call in slurm.calls()) == 1
    (slurm.folder / "ends").write_text("75\n0\n2\n")
    run_job(slurm, 75)
    assert slurm.calls()[-1] == "scontrol requeue 7"
    run_job(slurm, 0)
    run_job(slurm, 2)  # its own mistake: not again
    assert [call for call in slurm.calls() if call.startswith("scontrol")] == ["scontrol requeue 7"]
    workdir = slurm.folder / "xl2"
    assert slurm.calls()[-1] == (
        "srun --cpus-per-task=12 --kill-on-bad-exit=0 --wait=60 --label "
        f"dit-jax train --config={CONFIG} --workdir={workdir} {override}"
    )
    slurm.run("slurm.sh", "--cancel", "xl2")
    name = slurm.calls()[-1].split()[-1]
    assert name.startswith("dit_jax-xl2-") and any(f"--job-name {name} " in call for call in slurm.calls())
    assert "submitted" in slurm.run("slurm.sh", CONFIG, "xl2", "--nodes=8")  # and resumes


def test_a_dry_run_for_64_processes_prints_every_command_and_calls_none(slurm):
    arguments = "--nodes=8", "--gpus=8", "--time=24:00:00", "--partition=a100", "--dry-run"
    output = slurm.run("slurm.sh", CONFIG, "xl2", *arguments)
    assert slurm.calls() == [] and not (slurm.folder / "xl2").exists()
    (submission,) = [line for line in output.splitlines() if line.startswith("+ sbatch")]
    for words in (
        "--nodes 8", "--ntasks-per-node 8", "--gpus-per-node 8", "--requeue", "--signal TERM@120", "--time 24:00:00",
        "--partition a100", "--dependency singleton",
    ):  # fmt: skip
        assert words in submission
    assert "srun --cpus-per-task=12 --kill-on-bad-exit=0 --wait=60" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([CONFIG, "gs://bucket/w"], "must be a path on a disk that all nodes share"),
        ([CONFIG, "w", "--nodes=0"], "--nodes=0 must be a positive whole number"),
        ([], "give CONFIG and WORKDIR"),
    ],
)
def test_bad_arguments_are_one_line(slurm, arguments, message):
    output = slurm.run("slurm.sh", *arguments, code=2)
    assert message in output and output.count("\n") == 1 and slurm.calls() == []
