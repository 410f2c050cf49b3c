"""launch/tpu_pod.sh through create, run, preempt, resume and delete, with a gcloud that only pretends."""

import os
import tempfile

import pytest

ARGUMENTS = ["configs/dit_imagenet.py:XL/2", "gs://bucket/runs/xl2", "--name=pod", "--zone=us-east5-b"]
TYPE = "--type=v5litepod-256"  # 64 workers of four chips
GCLOUD = r"""
echo "gcloud ${*@Q}" >>"$FAKE/calls"
state=$(cat "$FAKE/state" 2>/dev/null)
case "$*" in
  *queued-resources\ create*) [[ ! -e $FAKE/refuse ]] && echo WAITING_FOR_RESOURCES >"$FAKE/state" ;;
  *queued-resources\ delete*) rm -f "$FAKE/state" ;;
  *queued-resources\ list*)
    echo "$state"
    case $state in
      WAITING_FOR_RESOURCES) echo PROVISIONING >"$FAKE/state" ;;
      PROVISIONING) echo ACTIVE >"$FAKE/state" ;;
      SUSPENDING) echo SUSPENDED >"$FAKE/state" ;;
    esac
    ;;
  *follow*)
    # Each line of `ends`: the code that the run ends with, or what becomes of the slice meanwhile.
    end=$(head -n 1 "$FAKE/ends")
    sed -i 1d "$FAKE/ends"
    echo "step 1 of 2"
    if [[ $end =~ ^[0-9]+$ ]]; then echo "dit-jax ended with code $end"; else echo "$end" >"$FAKE/state" && exit 255; fi
    ;;
  *) [[ $state == ACTIVE ]] ;;
esac
"""


@pytest.fixture
def gcloud(shell):
    shell.program("gcloud", GCLOUD)
    return shell


def verbs(shell) -> list[str]:
    """Returns what was asked for, without the looks at the state."""
    found = []
    for call in shell.calls():
        words = ("create", "delete", "scp", "is-running", "restart", "tpu_worker.sh start", "follow")
        found += [next(word.split()[-1] for word in words if word in call)] if "list" not in call.split("--")[0] else []
    return found


def ends(shell, *lines: str) -> None:
    (shell.folder / "ends").write_text("\n".join(lines) + "\n")


def test_a_run_is_queued_started_preempted_resumed_and_its_slice_deleted(gcloud):
    ends(gcloud, "SUSPENDING", "75", "134", "0")
    output = gcloud.run("tpu_pod.sh", *ARGUMENTS, TYPE, "--spot", "--config.mesh.fsdp=16")
    install = ["scp", "is-running"]
    assert verbs(gcloud) == [
        "create", *install, "start", "follow",  # preempted
        "delete", "create", *install, "start", "follow",  # it asks to be started again
        *install, "restart", "follow",  # a worker was lost
        *install, "restart", "follow",
        "delete",
    ]  # fmt: skip
    assert output.count("step 1 of 2") == 4
    started = [call for call in gcloud.calls() if "tpu_worker.sh start" in call]
    assert all("'--node' 'all' '--worker' 'all'" in call for call in started)
    assert all("--config.mesh.fsdp=16" in call and "~/gcs/bucket/runs/xl2" in call for call in started)


def test_a_second_start_joins_the_run_that_is_under_way(gcloud):
    (gcloud.folder / "state").write_text("ACTIVE\n")
    ends(gcloud, "0")
    gcloud.run("tpu_pod.sh", *ARGUMENTS, TYPE, "--keep")
    assert verbs(gcloud) == ["scp", "is-running", "start", "follow"]  # the worker itself leaves a run alone


def test_a_mistake_in_the_run_is_not_repeated(gcloud):
    (gcloud.folder / "state").write_text("ACTIVE\n")
    ends(gcloud, "2")
    output = gcloud.run("tpu_pod.sh", *ARGUMENTS, TYPE, code=2)
    assert "mend the cause" in output and "delete" not in verbs(gcloud)


def test_a_run_that_crashes_again_and_again_is_given_up(gcloud):
    (gcloud.folder / "state").write_text("ACTIVE\n")
    ends(gcloud, *["134"] * 6)
    gcloud.run("tpu_pod.sh", *ARGUMENTS, TYPE, code=134)
    assert verbs(gcloud).count("follow") == 6


def test_what_gcloud_refuses_at_first_is_told_at_once(gcloud):
    (gcloud.folder / "refuse").touch()
    output = gcloud.run("tpu_pod.sh", *ARGUMENTS, TYPE, code=2)
    assert "gcloud could not request pod" in output and verbs(gcloud) == ["create"]
    gcloud.program("gcloud", "exit 1")
    for arguments in ([*ARGUMENTS, TYPE], ["--delete", *ARGUMENTS[2:]]):
        assert "gcloud could not look for pod" in gcloud.run("tpu_pod.sh", *arguments, code=2)


def test_delete_deletes_what_there_is(gcloud):
    assert "there is no queued resource pod" in gcloud.run("tpu_pod.sh", "--delete", *ARGUMENTS[2:])
    (gcloud.folder / "state").write_text("ACTIVE\n")
    gcloud.run("tpu_pod.sh", "--delete", *ARGUMENTS[2:])
    assert verbs(gcloud) == ["delete"]


@pytest.mark.parametrize(
    ("slices", "shape"), [(1, "--node-id pod"), (2, "--node-count 2 --node-prefix pod")], ids=["one", "multislice"]
)
def test_a_dry_run_for_64_workers_prints_every_command_and_calls_none(gcloud, slices, shape):
    override = "--config.latents.path=~/gcs/bucket/latents"
    output = gcloud.run("tpu_pod.sh", *ARGUMENTS, TYPE, f"--slices={slices}", "--dry-run", override)
    assert gcloud.calls() == []
    lines = output.splitlines()
    assert [line.split(" pod")[0].split()[-1] for line in lines[1:]] == [
        "create",
        f"{tempfile.gettempdir()}/dit_jax.tar.gz",
        "ssh",
        "ssh",
        "ssh",
        "delete",
    ]
    assert "--accelerator-type v5litepod-256 --runtime-version v2-alpha-tpuv5-lite" in lines[1] and shape in lines[1]
    assert all("--node all --worker all" in line for line in lines[2:5])
    assert override in lines[4] and "~/gcs/bucket/runs/xl2" in lines[4]
    assert "--node 0 --worker 0" in lines[5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["configs/none.py", *ARGUMENTS[1:], TYPE], "CONFIG=configs/none.py must be a file of this project"),
        ([ARGUMENTS[0], "runs/xl2", *ARGUMENTS[2:], TYPE], "WORKDIR=runs/xl2 must be gs://"),
        ([*ARGUMENTS, "--type=v9-8"], "give --runtime"),
        ([*ARGUMENTS], "give --type"),
        (ARGUMENTS[:2], "give --name and --zone"),
    ],
)
def test_bad_arguments_are_one_line(gcloud, arguments, message):
    output = gcloud.run("tpu_pod.sh", *arguments, code=2)
    assert message in output and output.count("\n") == 1 and gcloud.calls() == []


def test_a_worker_starts_once_tells_its_end_and_restarts(shell):
    wait = "while [[ ! -e $FAKE/done ]]; do sleep 0.1; done"
    shell.program("dit-jax", f'echo "$*" >>$FAKE/runs; echo working; {wait}; exit 75', shell.folder / "venv" / "bin")
    arguments = "configs/dit_imagenet.py:XL/2", "~/gcs/bucket/w", "--config.latents.path=~/latents"
    shell.run("tpu_worker.sh", "is-running", code=1)
    (shell.folder / "dit_jax_run").mkdir()
    (shell.folder / "dit_jax_run" / "pid").write_text(str(os.getpid()))  # of before the worker was started anew
    shell.run("tpu_worker.sh", "is-running", code=1)
    shell.run("tpu_worker.sh", "install")
    shell.run("tpu_worker.sh", "start", *arguments)
    assert "under way" in shell.run("tpu_worker.sh", "start", *arguments)
    (shell.folder / "done").touch()
    output = shell.run("tpu_worker.sh", "follow")
    assert "working" in output and output.splitlines()[-1] == "dit-jax ended with code 75"
    shell.run("tpu_worker.sh", "restart", *arguments)
    assert "code 75" in shell.run("tpu_worker.sh", "follow")
    home = shell.folder
    line = f"train --config={arguments[0]} --workdir={home}/gcs/bucket/w --config.latents.path={home}/latents"
    assert (home / "runs").read_text().splitlines() == [line] * 2
