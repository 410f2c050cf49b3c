"""A disk that fails for a moment is asked again; what this process lacks says nothing of a file."""

import errno
import os
import shutil

import numpy as np
import pytest

from dit_jax import files
from dit_jax.checkpoint import (
    Checkpoints,
    DamagedCheckpoint,
    find_checkpoint,
    manifest,
    store,
    verify_workdir,
    write_config,
)
from dit_jax.data.bad_examples import BadExamples
from dit_jax.data.pipeline import eval_batches
from tests.checkpoint.trees import CONFIG, abstract_on, assert_same_items, make_items, one_device, save_steps


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(files, "RETRY_SECONDS", (0.0, 0.0))


def failing(times, error, real):
    """Returns a function that raises the error, so often, and then does what the real one does."""
    left = [times]

    def read(*args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise error
        return real(*args, **kwargs)

    return read


MOMENTS = [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, os.strerror(errno.ESTALE))]
MOMENTS += [RuntimeError("UNKNOWN: reading /x failed: Input/output error")]  # as TensorStore says it


@pytest.mark.parametrize("error", MOMENTS, ids=["EIO", "ESTALE", "tensorstore"])
@pytest.mark.parametrize("name", ["read_manifest", "check_files"])
def test_a_read_that_fails_once_is_tried_again_and_no_checkpoint_is_called_damaged(name, error, tmp_path, monkeypatch):
    save_steps(tmp_path, [1, 2])
    monkeypatch.setattr(store, name, failing(1, error, getattr(store, name)))
    lines = []
    step, items = Checkpoints(tmp_path, log=lines.append).restore_newest_good(abstract_on(one_device(), make_items(2)))
    assert step == 2
    assert_same_items(items, make_items(2))
    assert len(lines) == 1 and "tried again" in lines[0]


def test_a_checkpoint_whose_disk_does_not_answer_is_passed_over_but_never_deleted(tmp_path, monkeypatch):
    save_steps(tmp_path, [1, 2])
    real = store.read_manifest

    def read(folder):
        if folder.name == "2":
            raise OSError(errno.EIO, "Input/output error", str(folder))
        return real(folder)

    monkeypatch.setattr(store, "read_manifest", read)
    checkpoints = Checkpoints(tmp_path, max_to_keep=1, log=lambda line: None)
    assert checkpoints.restore_newest_good(abstract_on(one_device(), make_items(1)))[0] == 1
    checkpoints._delete_old()
    assert checkpoints.all_steps() == [1, 2]


LACKS = [
    MemoryError(),
    OSError(errno.EMFILE, "Too many open files"),
    PermissionError(errno.EACCES, "Permission denied"),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes"),
]


@pytest.mark.parametrize("error", LACKS, ids=["memory", "descriptors", "rights", "device"])
def test_what_a_process_lacks_is_never_called_damage(error, tmp_path, monkeypatch):
    save_steps(tmp_path, [1, 2])
    monkeypatch.setattr(store, "check_files", failing(1, error, None))
    with pytest.raises(ValueError, match="cannot be read, which may be intact") as raised:
        find_checkpoint(tmp_path)
    assert not isinstance(raised.value, DamagedCheckpoint)
    monkeypatch.setattr(store, "check_files", failing(1, error, None))
    with pytest.raises(ValueError, match="may be intact"):
        list(verify_workdir(tmp_path))


def test_a_folder_that_may_not_be_listed_has_no_missing_files(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()

    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError):
        manifest.list_files(tmp_path)


class Source:
    """Numbers; the disk answers the first reads of number 2 with an error."""

    def __init__(self, error, times):
        self._read = failing(times, error, lambda: None)

    def __len__(self):
        return 4

    def __getitems__(self, indices):
        if 2 in indices:
            try:
                self._read()
            except OSError as error:
                raise ValueError(f"cannot read image 2.png: {error}; remove or replace it") from error
        return [{"x": np.int32(index)} for index in indices]


def read_all(source, bad):
    options = {"batch_size": 4, "rows": range(4), "num_threads": 1, "bad_examples": bad}
    return next(eval_batches(source, lambda example, rng: example, **options))["x"].tolist()


def test_an_example_is_not_bad_because_a_disk_failed_for_a_moment():
    bad = BadExamples("numbers", 4, 0.5)
    assert read_all(Source(MOMENTS[0], 2), bad) == [0, 1, 2, 3] and not bad


def test_an_example_is_not_bad_because_there_are_too_many_open_files():
    with pytest.raises(ValueError, match="Too many open files"):
        read_all(Source(LACKS[1], 9), BadExamples("numbers", 4, 0.5))


def recorded(monkeypatch):
    """Returns the list of what is flushed, renamed and deleted from now on, by name."""
    calls, fsync = [], os.fsync
    names = {"rename": os.rename, "replace": os.replace}

    def flush(descriptor):
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{number}")))
        fsync(descriptor)

    def move(name):
        def moved(source, target, **options):
            calls.append(("rename", str(target)))
            names[name](source, target, **options)

        return moved

    rmtree = shutil.rmtree

    def delete(path, *args, **options):
        calls.append(("rmtree", str(path)))
        rmtree(path, *args, **options)

    monkeypatch.setattr(os, "fsync", flush)
    for name in names:
        monkeypatch.setattr(os, name, move(name))
    monkeypatch.setattr(shutil, "rmtree", delete)
    return calls


def test_a_checkpoint_is_on_the_disk_with_its_name_before_an_older_one_is_deleted(tmp_path, monkeypatch):
    save_steps(tmp_path, [1])
    calls = recorded(monkeypatch)
    save_steps(tmp_path, [2], max_to_keep=1)
    folder = tmp_path / "checkpoints"
    renamed = calls.index(("rename", str(folder / "2")))
    known = calls.index(("fsync", str(folder)), renamed)
    gone = [i for i, (what, path) in enumerate(calls) if what == "rmtree" and path.startswith(str(folder / "1."))]
    assert renamed < known < min(i for i in gone if i > renamed)
    flushed = {path.partition(".orbax-checkpoint-tmp")[2] for what, path in calls[:renamed] if what == "fsync"}
    for path in (folder / "2").rglob("*"):  # each file and each folder
        assert f"/{path.relative_to(folder / '2').as_posix()}" in flushed, path
    assert "" in flushed  # the checkpoint's folder itself


def test_the_config_is_flushed_then_renamed_then_its_folder_flushed(tmp_path, monkeypatch):
    calls = recorded(monkeypatch)
    write_config(tmp_path, CONFIG)
    assert [what for what, _ in calls] == ["fsync", "rename", "fsync"]
    assert calls[1][1] == str(tmp_path / "config.json") and calls[2][1] == str(tmp_path)
