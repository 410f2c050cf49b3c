"""launch/gke.sh: the JobSet, and a run through create, preempt, resume and delete with a kubectl that pretends."""

import subprocess

import pytest
import yaml

ARGUMENTS = ["configs/dit_imagenet.py:XL/2", "gs://bucket/xl2", "--name=xl2", "--image=image"]
TPU = ["--accelerator=tpu-v5-lite-podslice", "--topology=16x16"]
KUBECTL = r"""
echo "kubectl ${*@Q}" >>"$FAKE/calls"
case "$1" in
  apply) cat >"$FAKE/manifest" && echo >"$FAKE/state" ;;
  delete) rm -f "$FAKE/state" ;;
  get)
    [[ -e $FAKE/state ]] || exit 0
    if [[ "$*" == *terminalState* ]]; then cat "$FAKE/state"; else echo jobset/xl2; fi
    ;;
  logs)
    # Each line of `ends`: what has become of the JobSet after this output; empty: a preemption, it goes on.
    echo "step 1 of 2"
    head -n 1 "$FAKE/ends" >"$FAKE/state"
    sed -i 1d "$FAKE/ends"
    ;;
esac
"""


@pytest.fixture
def kubectl(shell):
    shell.program("kubectl", KUBECTL)
    return shell


def verbs(shell) -> list[str]:
    return [call.split("'")[1] for call in shell.calls() if "kubectl 'get'" not in call]


def manifest(output: str) -> dict:
    return yaml.safe_load("\n".join(line for line in output.splitlines() if not line.startswith("+")))


def test_a_run_is_applied_followed_over_a_preemption_and_deleted(kubectl):
    (kubectl.folder / "ends").write_text("\n\nCompleted\n")
    output = kubectl.run("gke.sh", *ARGUMENTS, *TPU)
    assert verbs(kubectl) == ["apply", "logs", "logs", "logs"] and output.count("step 1 of 2") == 3
    assert yaml.safe_load((kubectl.folder / "manifest").read_text())["kind"] == "JobSet"
    kubectl.run("gke.sh", "--delete", "--name=xl2")
    assert verbs(kubectl)[-1] == "delete" and not (kubectl.folder / "state").exists()


def test_a_second_start_joins_and_one_after_a_failure_begins_anew(kubectl):
    (kubectl.folder / "state").write_text("\n")
    (kubectl.folder / "ends").write_text("Failed\nCompleted\n")
    assert "failed" in kubectl.run("gke.sh", *ARGUMENTS, *TPU, code=2)
    assert verbs(kubectl) == ["logs"]
    kubectl.run("gke.sh", *ARGUMENTS, *TPU)
    assert verbs(kubectl) == ["logs", "delete", "apply", "logs"]


@pytest.mark.parametrize("slices", [1, 2])
def test_the_jobset_numbers_64_workers_a_slice(kubectl, slices):
    override = """--config.dit.conditioning=('adaln',)"""
    output = kubectl.run(
        "gke.sh", *ARGUMENTS, *TPU, f"--slices={slices}", override, '--config.data.name=a "b"', "--dry-run"
    )
    assert kubectl.calls() == []
    (job,) = manifest(output)["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["parallelism"], spec["completions"]) == (slices, 64, 64)
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "16x16"
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert environment["DIT_JAX_COORDINATOR"] == "xl2-slice-0-0.xl2:12355"
    assert environment["DIT_JAX_NUM_PROCESSES"] == str(64 * slices)
    assert environment["LIBTPU_INIT_ARGS"].startswith("--xla_")
    # What the pod runs, tried here as its last worker.
    kubectl.environment |= {"JOB_INDEX": str(slices - 1), "JOB_COMPLETION_INDEX": "63"}
    kubectl.program("dit-jax", 'echo "$DIT_JAX_PROCESS_ID"; printf "%s\\n" "$@"')
    command = [*container["command"], *container["args"]]
    said = subprocess.run(command, env=kubectl.environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert said.splitlines() == [
        str(64 * slices - 1), "train", f"--config={ARGUMENTS[0]}", "--workdir=/gcs/bucket/xl2", override,
        '--config.data.name=a "b"',
    ]  # fmt: skip
    failures = spec["podFailurePolicy"]["rules"][0]
    assert failures["onExitCodes"]["values"] == [1, 2] and failures["action"] == "FailJob"  # all else restarts


def test_gpu_nodes_and_a_claim(kubectl):
    arguments = [
        ARGUMENTS[0],
        "/shared/xl2",
        *ARGUMENTS[2:],
        "--accelerator=nvidia-h100-80gb",
        "--hosts=8",
        "--claim=disk",
    ]
    (job,) = manifest(kubectl.run("gke.sh", *arguments, "--dry-run"))["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert {volume["name"] for volume in pod["volumes"]} == {"memory", "shared"}
    assert {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]} == {"/dev/shm", "/shared"}
    assert "XLA_FLAGS" in {entry["name"] for entry in pod["containers"][0]["env"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*ARGUMENTS, *TPU, "--name=XL"], "--name=XL must be lower-case"),
        ([*ARGUMENTS, TPU[0]], "--topology= must be such as 16x16"),
        ([ARGUMENTS[0], "/data/w", *ARGUMENTS[2:], *TPU], "WORKDIR=/data/w must be gs://"),
        ([ARGUMENTS[0], "/shared/w", *ARGUMENTS[2:], *TPU], "give --claim"),
        (ARGUMENTS, "give --image and --accelerator"),
    ],
)
def test_bad_arguments_are_one_line(kubectl, arguments, message):
    output = kubectl.run("gke.sh", *arguments, code=2)
    assert message in output and output.count("\n") == 1 and kubectl.calls() == []
