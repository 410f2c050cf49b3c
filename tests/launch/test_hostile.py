"""What a user types at a launch script is never evaluated: it arrives as it was typed, or is refused in one line."""

import os
import subprocess

import pytest
import yaml

from tests.launch.test_gke import KUBECTL
from tests.launch.test_slurm import PROGRAMS
from tests.launch.test_tpu_pod import GCLOUD

DIT = "configs/dit_imagenet.py:S/8"
NUMBERS = {
    "local.sh": (["c.py", "w"], ["--processes", "--devices-per-process"]),
    "slurm.sh": (["c.py", "w"], ["--nodes", "--gpus", "--cpus"]),
    "tpu_pod.sh": ([DIT, "gs://bucket/w", "--name=pod", "--zone=z", "--type=v5litepod-8"], ["--slices"]),
    "gke.sh": (
        [DIT, "gs://bucket/w", "--name=run", "--image=i", "--accelerator=tpu-v6e-slice", "--topology=4x4"],
        ["--chips", "--hosts", "--slices", "--max-restarts"],
    ),
}
NAMES = {
    "tpu_pod.sh": ["--name", "--zone", "--type", "--runtime", "--project"],
    "gke.sh": ["--name", "--image", "--accelerator", "--topology", "--claim", "--account", "--namespace"],
}
SHOW = r"""printf '%s\0' "$@" >>"$FAKE/arguments" """


@pytest.fixture
def touched(shell):
    """The shell with all clients, and texts that make a file wherever they are evaluated."""
    for name, text in PROGRAMS.items():
        shell.program(name, text)
    shell.program("kubectl", KUBECTL)
    shell.program("gcloud", GCLOUD)
    shell.program("dit-jax", SHOW, shell.folder / "venv" / "bin")
    return shell


def commands(shell) -> list[str]:
    """Returns texts that touch a file where they are evaluated, by a shell, by arithmetic or by Python."""
    touch = f"touch {shell.folder / 'pwned'}"
    return [f"HOME[$({touch})]", f"$({touch})", f"`{touch}`", f"1;{touch}", f"1'; {touch}; '", f'1"; {touch}; "']


def words(shell) -> list[str]:
    """Returns these and other texts that shells, YAML and SLURM read in their own ways, as values of overrides."""
    texts = [
        *commands(shell),
        "a b",
        "\\",
        "a\\nb",
        "&",
        '"',
        "'",
        "a: b # c",
        "{x: [y",
        "%j",
        "é ✓",
        "*",
        "!!str",
        "-n",
    ]
    return [f"--config.data.name={text}" for text in [*texts, "$HOME ${HOME}", "<a >b | c", "$(HOME)", ""]]


def refuse(shell, script, *arguments) -> str:
    output = shell.run(script, *arguments, code=2)
    assert output.startswith("error: ") and output.count("\n") == 1, output
    assert not shell.calls() and not (shell.folder / "pwned").exists(), arguments
    return output


@pytest.mark.parametrize("script", NUMBERS)
def test_what_is_no_number_is_refused_before_it_is_computed_with(touched, script):
    arguments, options = NUMBERS[script]
    for option in options:
        for value in (commands(touched)[0], "08", "1" * 20):
            assert f"{option}={value} must be a" in refuse(touched, script, *arguments, f"{option}={value}")


def test_numbers_of_the_experiments_are_refused_likewise(touched):
    (touched.folder / "latents").mkdir()
    for value in (commands(touched)[0], f"__import__('os').system('touch {touched.folder / 'pwned'}')"):
        refuse(touched, "scaling.sh", touched.folder / "latents", "w", value)
        refuse(touched, "scaling.sh", touched.folder / "latents", "w", "20", value)
        refuse(touched, "fusion.sh", "w", value)
        refuse(touched, "fusion.sh", "w", "0.1", value)


@pytest.mark.parametrize("script", NAMES)
def test_a_name_that_programs_would_take_apart_is_refused(touched, script):
    arguments, _ = NUMBERS[script]
    for option in NAMES[script]:
        for value in (commands(touched)[1], "a b", "--quiet"):
            refuse(touched, script, *arguments, f"{option}={value}")
    for bucket in ("b$(touch pwned)", "b; c", "-b", "b c"):
        assert "bucket" in refuse(touched, script, arguments[0], f"gs://{bucket}/w", *arguments[2:])


@pytest.mark.parametrize("script", NUMBERS)
def test_an_argument_of_several_lines_is_refused(touched, script):
    arguments, _ = NUMBERS[script]
    for end in ("\n", "\r", "\x1b[2J", "\x85", "\u2028"):
        refuse(touched, script, *arguments, f"--config.data.name=a{end}b: c")
    refuse(touched, script, arguments[0], f"{arguments[1]}\n", *arguments[2:])
    refuse(touched, script, *arguments, "--")
    refuse(touched, script, *arguments, "--dry-run keep")


def arrived(shell) -> list[str]:
    """Returns the arguments that `dit-jax` was called with."""
    assert not (shell.folder / "pwned").exists()
    return (shell.folder / "arguments").read_text().split("\0")[:-1]


def hostile_names(shell) -> tuple[str, str]:
    """Returns the name of a config's file that is there, and that of a workdir."""
    config = "c '$(touch pwned)' %j.py"
    (shell.folder / config).touch()
    return config, 'w "`touch pwned`" & %j'


def test_all_arrives_as_it_was_typed_on_this_machine(touched):
    config, workdir = hostile_names(touched)
    touched.run("local.sh", config, workdir, *words(touched))
    folder = touched.folder
    expected = ["train", f"--config={folder}/{config}", f"--workdir={folder}/{workdir}", *words(touched)]
    assert arrived(touched) == expected


def test_all_arrives_as_it_was_typed_in_a_job(touched):
    config, workdir = hostile_names(touched)
    folder = touched.folder
    touched.program("sbatch", SHOW + '; cat >"$FAKE/batch"; echo 7')
    touched.run("slurm.sh", config, workdir, "--partition=a,b", "--account=$(x)", *words(touched))
    submitted = arrived(touched)
    assert (
        submitted[submitted.index("--account") + 1] == "$(x)"
        and "," not in submitted[submitted.index("--job-name") + 1]
    )
    assert submitted[submitted.index("--output") + 1] == f"{folder}/{workdir}/slurm-%j.log".replace(" %j/", " %%j/")
    touched.program("srun", 'until [[ $1 == dit-jax ]]; do shift; done; "$@"')
    (folder / "arguments").unlink()
    environment = touched.environment | {"SLURM_JOB_ID": "7"}
    subprocess.run(["bash", folder / "batch"], env=environment, check=True)
    assert arrived(touched)[1:] == [f"--config={folder}/{config}", f"--workdir={folder}/{workdir}", *words(touched)]


def test_all_arrives_as_it_was_typed_on_a_worker(touched):
    (touched.folder / "state").write_text("ACTIVE\n")
    (touched.folder / "ends").write_text("0\n")
    worker = touched.folder / "dit_jax" / "launch"
    worker.mkdir(parents=True)
    touched.program("tpu_worker.sh", SHOW, worker)
    # Like ssh, the client gives the command to the login shell there.
    remote = '[[ $* != *follow* && $* == *--command* ]] && { cd "$FAKE" && exec bash -c "${@: -1}"; }\n'
    touched.program("gcloud", remote + GCLOUD)
    workdir = "gs://bucket/w \"`touch pwned`\" '$(touch pwned)' &"
    arguments, _ = NUMBERS["tpu_pod.sh"]
    touched.run("tpu_pod.sh", arguments[0], workdir, *arguments[2:], "--keep", *words(touched))
    there = arrived(touched)
    assert there[there.index("start") :] == ["start", DIT, f"~/gcs/{workdir.removeprefix('gs://')}", *words(touched)]


def test_all_arrives_as_it_was_typed_in_a_container(touched):
    workdir = "gs://bucket/w \"`touch pwned`\" '$(touch pwned)' & \\"
    arguments, _ = NUMBERS["gke.sh"]
    (touched.folder / "ends").write_text("Completed\n")
    touched.run("gke.sh", arguments[0], workdir, *arguments[2:], *words(touched))
    manifest = yaml.safe_load((touched.folder / "manifest").read_text())
    (job,) = manifest["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "i" and manifest["metadata"]["name"] == "run"
    environment = touched.environment | {"JOB_INDEX": "0", "JOB_COMPLETION_INDEX": "3"}
    environment["PATH"] = f"{touched.folder / 'venv' / 'bin'}{os.pathsep}{environment['PATH']}"
    subprocess.run([*container["command"], *container["args"]], env=environment, cwd=touched.folder, check=True)
    there = f"--workdir=/gcs/{workdir.removeprefix('gs://')}"
    assert arrived(touched) == ["train", f"--config={DIT}", there, *words(touched)]


def test_what_kubernetes_would_put_in_place_of_a_word_is_refused(touched):
    arguments, _ = NUMBERS["gke.sh"]
    for text in ("a$$b", "$(JOB_INDEX)"):
        assert "Kubernetes would put" in refuse(touched, "gke.sh", *arguments, f"--config.data.name={text}")


def test_extras_are_names(touched):
    for extras in ("gpu]; touch pwned", "-e", "gpu\ntest"):
        touched.environment["DIT_JAX_EXTRAS"] = extras
        assert "DIT_JAX_EXTRAS must be names" in touched.run("local.sh", "c.py", "w", code=1)
