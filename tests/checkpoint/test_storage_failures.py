"""A disk that is full, read-only or gone while a run saves: it goes on, says so, and loses no good checkpoint."""

import dataclasses
import errno
import os
import pathlib
import shutil
import subprocess
from unittest import mock

import pytest

from dit_jax.checkpoint import Checkpoints, arrays, store, verify_workdir
from dit_jax.cli.train import diffusion_task
from dit_jax.parallel.mesh import make_mesh
from dit_jax.parallel.preemption import RESTART, Preemption
from dit_jax.training import loop, reporting
from tests.checkpoint.trees import CONFIG, abstract_on, assert_same_items, make_items, one_device, save_steps
from tests.tiny import dit_config, make_image_folder

DISK_BYTES = 8 << 20


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not mount a file system; the other tests here pretend to")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: pathlib.Path) -> pathlib.Path:
    """Takes all that is left of a disk; returns the file that does."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return path


def assert_newest(workdir: pathlib.Path, step: int) -> None:
    abstract = abstract_on(one_device(), make_items(step))
    found = Checkpoints(workdir).restore_newest_good(abstract)
    assert found[0] == step
    assert_same_items(found[1], make_items(step))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (pathlib.Path, "mkdir"),
        (arrays, "start_write"),
        (arrays, "finish_item"),
        (store, "sum_file"),
        (pathlib.Path, "write_text"),
        (store.os, "rename"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_wherever_a_save_fails_nothing_is_left_of_it_and_the_next_succeeds(tmp_path, monkeypatch, module, name):
    save_steps(tmp_path, [1])
    checkpoints = Checkpoints(tmp_path, max_to_keep=1, log=(lines := []).append)
    checkpoints.save(2, make_items(2), CONFIG)
    checkpoints.wait()
    original = getattr(module, name)

    def fail(*args, **kwargs):
        if any("3.orbax-checkpoint-tmp" in str(value) for value in args):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, fail)
    checkpoints.save(3, make_items(3), CONFIG)
    with pytest.raises(ValueError, match=r"step 3 could not be saved .*No space left on device; the one of step 2 is"):
        checkpoints.wait()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    assert_newest(tmp_path, 2)
    monkeypatch.undo()
    checkpoints.save(4, make_items(4), CONFIG)
    checkpoints.wait()
    assert checkpoints.all_steps() == [4] and len(lines) == 1
    assert_newest(tmp_path, 4)


def test_storage_that_vanished_is_not_made_anew_elsewhere(tmp_path):
    """As a mount that is gone: its place is a folder on another disk."""
    checkpoints = Checkpoints(tmp_path, max_to_keep=1, log=(lines := []).append)
    checkpoints.save(1, make_items(1), CONFIG)
    checkpoints.wait()
    os.rename(tmp_path / "checkpoints", tmp_path / "away")
    checkpoints.save(2, make_items(2), CONFIG)
    with pytest.raises(ValueError, match="step 2 could not be saved .*No such file or directory.*there is no other"):
        checkpoints.wait()
    assert not (tmp_path / "checkpoints").exists()
    os.rename(tmp_path / "away", tmp_path / "checkpoints")
    checkpoints.save(3, make_items(3), CONFIG)
    checkpoints.wait()
    assert len(lines) == 1 and checkpoints.all_steps() == [3]


def test_a_save_replaces_a_checkpoint_of_its_step(tmp_path):
    save_steps(tmp_path, [1, 2])
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "params")
    save_steps(tmp_path, [2])
    assert_newest(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_a_start_deletes_what_a_kill_came_before(tmp_path):
    """The process was killed when the newest was complete, and before older ones were deleted."""
    save_steps(tmp_path, [1, 2, 3])
    (tmp_path / "checkpoints" / "1.old.orbax-checkpoint-tmp").mkdir()
    checkpoints = Checkpoints(tmp_path, max_to_keep=2)
    checkpoints.restore_newest_good(abstract_on(one_device(), make_items(1)))
    with checkpoints:
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_what_a_killed_process_left_unfinished_is_deleted(tmp_path):
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    save_steps(tmp_path, [6])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["6"]


def test_a_disk_that_turns_read_only_fails_the_save_alone(disk):
    checkpoints = Checkpoints(disk, max_to_keep=1, log=(lines := []).append)
    checkpoints.save(1, make_items(1), CONFIG)
    checkpoints.wait()
    for step, mode in ((2, "ro"), (3, "rw")):
        subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)
        checkpoints.save(step, make_items(step), CONFIG)
        checkpoints.settle()
        assert_newest(disk, 1 if mode == "ro" else 3)
    assert len(lines) == 1 and "step 2" in lines[0] and "Read-only file system" in lines[0]


def test_a_run_whose_disk_fills_up_goes_on_says_so_and_saves_again_when_there_is_space(
    disk, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(reporting, "_make_summary_writer", lambda _: mock.Mock())  # the import of the real one is slow
    config = dit_config(make_image_folder(tmp_path / "images"), max_checkpoints=2)
    mesh = make_mesh(config.mesh)

    real_save = Checkpoints.save

    def train(num_train_steps: int, full_at: int, stays: bool = False, stop: int | None = None) -> str:
        """Trains on to a step, with a disk that is full when that of `full_at` is saved; returns what it told.

        stays: full, after that save. stop: the step after which the run is asked to make way.
        """

        def save(checkpoints: Checkpoints, step: int, *args, **options) -> None:
            checkpoints.settle()  # the save before this one is to be complete
            if step == full_at:
                fill(disk)
            real_save(checkpoints, step, *args, **options)
            if step == full_at and not stays:
                checkpoints.settle()
                (disk / "filler").unlink()

        class Asked(Preemption):
            def stops_after(self, step: int) -> bool:
                return step == stop

        monkeypatch.setattr(Checkpoints, "save", save)
        training = dataclasses.replace(config.training, num_train_steps=num_train_steps)
        longer = dataclasses.replace(config, training=training)
        task = dataclasses.replace(diffusion_task(longer, mesh, disk), draw=lambda _: {})
        loop.train(longer, disk, task, mesh, preemption=Asked())
        return capsys.readouterr().err

    def read_steps() -> list[int]:
        return Checkpoints(disk).all_steps()

    told = train(8, full_at=4)
    assert read_steps() == [6, 8]
    errors = [line for line in told.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "step 4 could not be saved" in errors[0] and "No space left" in errors[0], told
    assert "the one of step 2 is still there" in errors[0]
    assert all(report["state"] == "good" for report in verify_workdir(disk))
    assert not list((disk / "checkpoints").glob("*tmp*"))

    with pytest.raises(ValueError, match="step 10 could not be saved .*; the one of step 8 is still there"):
        train(10, full_at=10, stays=True)
    assert read_steps() == [6, 8]
    (disk / "filler").unlink()
    told = train(10, full_at=0)
    assert "resuming from the checkpoint of step 8 of 10" in told and read_steps() == [8, 10]

    with pytest.raises(SystemExit) as ended:
        train(14, full_at=12, stays=True, stop=12)
    assert ended.value.code == RESTART and read_steps() == [8, 10]
    told = capsys.readouterr().err
    assert "step 12 could not be saved" in told and "asked to make way after step 12" in told
