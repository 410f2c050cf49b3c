"""Saving and restoring: asynchronous, atomic, proved, and the same on all processes of a run.

`<workdir>/checkpoints/<step>/` holds the items `params`, and while training `ema_params`, `opt_state` and others, the
`config` as JSON and the `manifest`. A step is complete or absent: it is written aside and renamed. The layout is that
of Orbax's CheckpointManager, which can read it. The manager itself is not used: where the storage of one process fails,
its barriers keep the others waiting, and it deletes old checkpoints without a look at the new one.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from dit_jax.checkpoint import arrays
from dit_jax.checkpoint.agreement import agree, first_error, is_first, name_first, share_of_processes
from dit_jax.checkpoint.arrays import named_leaves
from dit_jax.checkpoint.content import content_of, describe_shape, start_contents
from dit_jax.checkpoint.manifest import (
    CONFIG,
    FILE,
    MANIFEST,
    METADATA,
    DamagedCheckpoint,
    Manifest,
    check_files,
    list_files,
    read_json,
    read_manifest,
    sum_file,
    sync,
)
from dit_jax.checkpoint.rotation import steps_to_keep
from dit_jax.config import Config, config_from_dict, config_to_dict
from dit_jax.files import flush, is_of_a_moment, is_of_this_process, patiently

CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"  # folders of a workdir; snapshots: see `models.averages`
UNFINISHED = ".orbax-checkpoint-tmp"  # ends the name of what is being written or deleted, also for Orbax
COMMITTED = "commit_success.txt"  # what Orbax looks for where the checkpoint was copied to a bucket
LATE_SECONDS = 60  # that a network's file system may take to show one host what another has written
# What an error of reading says: this process lacks something; the disk does not answer; what is there is damaged.
KINDS = OF_PROCESS, OF_DISK, DAMAGED = "of this process", "of the disk", "damaged"
MAX_ERROR = 300  # characters; TensorStore tells more than anyone reads

Value = TypeVar("Value")


def print_line(message: str) -> None:
    """Prints a message once for all processes."""
    if is_first():
        print(message, file=sys.stderr, flush=True)


class Checkpoints:
    """The checkpoints of a workdir.

    Where there are several processes, all must make the same calls in the same order, and all see the same outcome.
    As a context manager it deletes what a killed process left, and in the end waits for the last save, and raises if
    that failed. Only what writes (`max_to_keep`, or snapshots) should be one while a run is under way.

    Args:
      workdir: the run's; folder: CHECKPOINTS or SNAPSHOTS.
      max_to_keep: the newest checkpoints stay, so many; None: all of them do.
      keep_every, keep_best: which older ones stay too, see `steps_to_keep`.
      log: takes lines about failures, from any thread; to be replaced at will.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        max_to_keep: int | None = None,
        folder: str = CHECKPOINTS,
        *,
        keep_every: int | None = None,
        keep_best: tuple[str, str] | None = None,
        log: Callable[[str], None] = print_line,
    ):
        self.log = log
        self._path = pathlib.Path(workdir).absolute() / folder
        self._max_to_keep, self._keep_every, self._keep_best = max_to_keep, keep_every, keep_best
        self._channel = f"save/{folder}"
        self._thread: threading.Thread | None = None
        self._failure: str | None = None  # of the last save
        self._saved_before = False
        self._damaged: set[int] = set()
        self._unreadable: set[int] = set()  # the disk did not answer: they may be intact, and are left alone
        self._verified: int | None = None  # the last step that was restored and found intact

    def __enter__(self) -> "Checkpoints":
        if is_first() and (self._max_to_keep is not None or self._path.name == SNAPSHOTS):
            attempt(self._delete_left)
        return self

    def _delete_left(self) -> None:
        """Deletes what a process that was killed had not yet: what it wrote, and old checkpoints."""
        for left in self._path.glob(f"*{UNFINISHED}"):
            shutil.rmtree(left)
        if self._verified is not None and self._verified == max(self.all_steps()):
            self._delete_old()

    def __exit__(self, exception_type, *_) -> None:
        if exception_type is None:
            self.wait()
        else:
            self.settle()

    def all_steps(self) -> list[int]:
        """Returns the complete steps, ascending."""
        try:
            return sorted(int(path.name) for path in self._path.iterdir() if path.name.isdecimal() and path.is_dir())
        except FileNotFoundError:
            return []

    def items(self, step: int) -> set[str]:
        """Returns the names of the trees of arrays that a checkpoint holds; raises DamagedCheckpoint as `restore`."""
        folder = self._path / str(step)

        def read() -> set[str]:
            manifest = read_manifest(folder)
            held = manifest.arrays if manifest else (path.name for path in folder.iterdir() if path.is_dir())
            return set(held) - {CONFIG, MANIFEST}

        return self._together(read, step)

    def metrics(self, step: int) -> dict[str, float] | None:
        """Returns the held-out figures that a checkpoint was saved with; None without any."""
        manifest = read_manifest(self._path / str(step))
        return manifest.metrics if manifest else None

    # Saving.

    def save(self, step: int, items: dict[str, Any], config: Config, metrics: dict[str, float] | None = None) -> None:
        """Starts writing the trees of arrays in `items`; returns once they are copied from the device.

        metrics: held-out figures of the step; None: there are none, or `add_metrics` will tell them.

        A checkpoint of this step that is there is replaced. Where the storage fails, this is logged, nothing is left of
        what was written, and the next save tries anew; `wait` raises if the last save failed.
        """
        self.settle()
        self._failure = None
        self._check_best(metrics)
        fetch_contents = start_contents(items)
        unfinished = self._path / f"{step}{UNFINISHED}"
        error = attempt(self._make_folders, unfinished, items) if is_first() else ""
        error = first_error(self._channel, error)
        if error:
            self._fail(step, error)
            return
        writes: list[Callable[[], None]] = []

        def start_writes() -> None:
            for name, tree in items.items():
                writes.append(arrays.start_write(unfinished / name, tree))

        error = attempt(start_writes)
        metrics = None if metrics is None else {name: float(value) for name, value in metrics.items()}
        arguments = step, unfinished, sorted(items), config_to_dict(config), metrics, fetch_contents, writes, error
        self._thread = threading.Thread(target=self._finish, args=arguments, name=f"save_{self._path.name}")
        self._thread.start()

    def add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Starts to add held-out figures to the checkpoint of a step, once its save is complete.

        Where that fails it is logged: the checkpoint is what it was.
        """
        self._check_best(metrics)
        if is_first():
            arguments = step, {name: float(value) for name, value in metrics.items()}, self._thread
            self._thread = threading.Thread(target=self._add_metrics, args=arguments, name=f"metrics_{self._path.name}")
            self._thread.start()

    def _check_best(self, metrics: dict[str, float] | None) -> None:
        if self._keep_best and metrics and self._keep_best[0] not in metrics:
            self.log(
                f"warning: none is kept as the best {self._keep_best[0]}: of held-out figures there are {[*metrics]}"
            )

    def _add_metrics(self, step: int, metrics: dict[str, float], save: threading.Thread | None) -> None:
        if save:
            save.join()
        if self._failure or step not in self.all_steps():
            return

        def add() -> None:
            folder, aside = self._path / str(step), self._path / f"{step}.{MANIFEST}{UNFINISHED}"
            manifest = read_manifest(folder)
            if manifest is None:
                return
            (aside / MANIFEST).mkdir(parents=True)
            dataclasses.replace(manifest, metrics=metrics).write(aside)
            os.rename(aside / MANIFEST / FILE, folder / MANIFEST / FILE)
            flush(folder / MANIFEST)
            shutil.rmtree(aside)
            self._delete_old()

        if error := attempt(add):
            self.log(f"warning: the held-out figures of step {step} could not be added to {self._path}: {error}")

    def wait(self) -> None:
        """Returns when the last save is complete and verified, and what it replaces deleted.

        Raises:
          ValueError: where it failed.
        """
        self.settle()
        if self._failure:
            raise ValueError(self._failure)

    def settle(self) -> None:
        """Returns when the last save has ended, well or not."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def drop_after(self, step: int) -> None:
        """Deletes the steps after this one."""
        self.settle()

        def drop() -> None:
            for later in self.all_steps():
                if later > step:
                    self._remove(self._path / str(later))

        if error := first_error(self._channel, attempt(drop) if is_first() else ""):
            self.log(f"warning: what comes after step {step} in {self._path} could not be deleted: {error}")

    def _fail(self, step: int, error: str) -> None:
        others: list[int] = []
        attempt(lambda: others.extend(other for other in self.all_steps() if other != step))  # it may have vanished
        left = f"the one of step {others[-1]} is still there" if others else "there is no other"
        self._failure = f"the checkpoint of step {step} could not be saved to {self._path}: {error}; {left}"
        self.log(f"error: {self._failure}")

    def _make_folders(self, unfinished: pathlib.Path, items: dict[str, Any]) -> None:
        if not self._saved_before:
            self._path.mkdir(parents=True, exist_ok=True)
            flush(self._path.parent)
            self._saved_before = True  # from now on, a folder that is not there has vanished: none is made in its place
        for left in self._path.glob(f"*{UNFINISHED}"):  # by a process that was killed, or a save that failed
            shutil.rmtree(left)
        unfinished.mkdir()
        for name in (*items, CONFIG, MANIFEST):
            (unfinished / name).mkdir()

    def _finish(self, step, unfinished, items, config, metrics, fetch_contents, writes, error) -> None:
        """Completes a save, in a thread: writes, commits, reads back, deletes old ones; all processes in step."""
        try:
            files: dict[str, list[int]] = {}

            def finish_writes() -> None:
                for finish_write in writes:
                    finish_write()
                own = arrays.own_files(jax.process_index())
                files.update(_sum_files(unfinished, lambda name: name.split("/")[1] == own))

            error = attempt(finish_writes, so_far=error)
            written = [json.loads(text) for text in agree(self._channel, json.dumps([error, files]))]
            error = name_first([error for error, _ in written])
            if is_first():
                files = {name: entry for _, own in written for name, entry in own.items()}

                def commit() -> None:
                    found = fetch_contents()
                    contents = {item: _of_item(found, item) for item in items}
                    self._commit(unfinished, step, contents, config, metrics, files)

                error = attempt(commit, so_far=error)
                if error:
                    _remove_unfinished(unfinished)
            error = agree(self._channel, error)[0]
            if error:
                self._fail(step, error)
                return
            self._damaged.discard(step)
            self._unreadable.discard(step)
            _wait_until_seen(self._path / str(step))
            error, kind = self._read_together(self._channel, lambda: self._verify(step, share_of_processes()))
            if error:
                if kind == DAMAGED:
                    self._damaged.add(step)
                self._failure = f"what was saved of step {step} cannot be read back: {error}; older checkpoints stay"
                self.log(f"error: {self._failure}")
            elif is_first() and (error := attempt(self._delete_old)):
                self.log(f"warning: old checkpoints in {self._path} could not be deleted: {error}")
        except BaseException as unexpected:  # raised where the loop waits for this thread
            self._fail(step, f"{type(unexpected).__name__}: {unexpected}")

    def _commit(self, unfinished, step, contents, config, metrics, files) -> None:
        for item in contents:
            arrays.finish_item(unfinished / item)
        (unfinished / CONFIG / FILE).write_text(json.dumps(config))
        types = {item: arrays.item_type(item not in contents) for item in (*contents, CONFIG, MANIFEST)}
        times = dict.fromkeys(("init_timestamp_nsecs", "commit_timestamp_nsecs"), time.time_ns())
        (unfinished / METADATA).write_text(json.dumps({"item_handlers": types} | times))
        for folder in (*(unfinished / item for item in types), unfinished):
            (folder / COMMITTED).write_text("")
        files = files | _sum_files(unfinished, lambda name: name not in files)
        Manifest(step, metrics, contents, files).write(unfinished)
        for folder, _, _ in os.walk(unfinished, topdown=False):  # all files are on the disk; their names, too
            flush(folder)
        final = self._path / str(step)
        replaced = self._aside(final) if final.exists() else None
        os.rename(unfinished, final)
        flush(self._path)  # before anything older is deleted
        if replaced:
            shutil.rmtree(replaced)

    def _remove(self, folder: pathlib.Path) -> None:
        """Deletes a checkpoint; killed meanwhile, it leaves none that looks complete."""
        shutil.rmtree(self._aside(folder))

    def _aside(self, folder: pathlib.Path) -> pathlib.Path:
        """Renames a checkpoint to what is no complete one; returns its path."""
        aside = folder.with_name(f"{folder.name}.old{UNFINISHED}")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
        return aside

    def _delete_old(self) -> None:
        """Deletes what need not be kept; to be called when the newest is verified."""
        if self._max_to_keep is None:
            return
        metrics = {}
        for step in self.all_steps() if self._keep_best else ():
            try:
                metrics[step] = patiently(lambda step=step: self.metrics(step), self.log)
            except DamagedCheckpoint as error:
                if what_of(error) != DAMAGED:  # nothing is deleted as long as one is not known
                    raise
                self._damaged.add(step)
        good = [step for step in self.all_steps() if step not in self._damaged | self._unreadable]
        keep = steps_to_keep(good, self._max_to_keep, self._keep_every, self._keep_best, metrics)
        for step in set(self.all_steps()) - keep - self._unreadable:
            self._remove(self._path / str(step))

    # Restoring.

    def restore_newest_good(
        self, abstract_items: dict[str, Any], before: int | None = None
    ) -> tuple[int, dict[str, Any]] | None:
        """Returns the newest step whose checkpoint is intact, and those of the items that it holds; None without any.

        This is what a run starts from, and goes back to with `before`, a step: the result is of an earlier one. Only
        the first item must be there, since converted weights come alone.

        Raises:
          ValueError: where there are checkpoints, but none that is intact.
        """
        first = next(iter(abstract_items))

        def read(step: int) -> dict[str, Any]:
            held = self.items(step)
            if first not in held:
                raise self._damage(step, f"it has no {first}")
            return self.restore(step, {name: tree for name, tree in abstract_items.items() if name in held})

        return self.newest_good(read, before)

    def newest_good(self, read: Callable[[int], Value], before: int | None = None) -> tuple[int, Value] | None:
        """Returns the newest step of which `read` raises no DamagedCheckpoint, and what it returns; None without any.

        Damaged ones are logged.
        """
        self.settle()
        damaged = []
        steps = patiently(self.all_steps, self.log)
        for step in reversed(json.loads(agree("restore", json.dumps(steps))[0])):
            if before is not None and step >= before:
                continue
            try:
                value = read(step)
            except DamagedCheckpoint as error:
                damaged.append(str(error))
                continue
            for line in damaged:
                self.log(f"warning: {line}; the checkpoint of step {step} is used instead")
            return step, value
        if damaged:
            raise ValueError(
                f"{self._path} has no intact checkpoint: {'; '.join(damaged)}; restore its files or use another workdir"
            )
        return None

    def restore(self, step: int, abstract_items: dict[str, Any]) -> dict[str, Any]:
        """Returns the items, each leaf with the shape, dtype and sharding of its abstract leaf; each is verified.

        Every process reads the shards that its devices hold. A checkpoint without a manifest, of an older version of
        this program, cannot be verified; that is logged.

        Raises:
          DamagedCheckpoint: where it is not what was saved, naming the file or the array.
          ValueError: where the checkpoint is of other trees.
        """
        self.settle()
        folder = self._path / str(step)
        manifest = self._together(lambda: self._checked_manifest(step, set(abstract_items)), step)
        if manifest is None:
            self.log(f"warning: {folder} has no manifest, as older versions wrote them: it cannot be verified")
        else:
            _check_names(folder, abstract_items, manifest)

        def read() -> dict[str, Any]:
            stored = {item: arrays.stored_form(folder / item, tree) for item, tree in abstract_items.items()}
            return {item: arrays.read_tree(folder / item, tree) for item, tree in stored.items()}

        restored = self._together(read, step)
        if manifest:
            found = start_contents(restored)()
            for item in restored:
                if fault := _first_difference(item, _of_item(found, item), manifest):
                    raise self._damage(step, fault)
            self._verified = step
        return jax.tree.map(arrays.as_wanted, restored, abstract_items)

    def restore_config(self, step: int, intact: Iterable[str] = ()) -> Config:
        """Returns the config of a checkpoint; raises DamagedCheckpoint as `restore` does.

        intact: items whose files are to be what was saved, too.
        """

        def read() -> dict:
            self._checked_manifest(step, set(intact))
            return read_json(self._path / str(step) / CONFIG / FILE, f"{CONFIG}/{FILE}")

        return config_from_dict(self._together(read, step))

    def verify(self, step: int, share: tuple[int, int] = (0, 1)) -> Manifest | None:
        """Returns the manifest of a checkpoint, all of which is read and compared with it; None where it has none.

        No device is used. share: (i, n) reads an n-th of it.

        Raises:
          DamagedCheckpoint: where something differs.
          ValueError: where this process lacked memory, descriptors or rights.
        """
        try:
            return patiently(lambda: self._verify(step, share), self.log)
        except Exception as error:
            if is_of_this_process(error):
                raise ValueError(_unknown(self._path / str(step), describe(error))) from error
            raise

    def _verify(self, step: int, share: tuple[int, int]) -> Manifest | None:
        folder = self._path / str(step)
        manifest = read_manifest(folder)
        if manifest is None:
            return None
        check_files(folder, manifest, {*manifest.arrays, CONFIG, MANIFEST}, share)
        for item in manifest.arrays:
            try:
                found = {name: content_of(array) for name, array in arrays.read_back(folder / item, share)}
            except Exception as error:  # see `attempt`
                raise DamagedCheckpoint(f"{item} cannot be read ({describe(error)})") from error
            if fault := _first_difference(item, found, manifest):
                raise DamagedCheckpoint(fault)
        return manifest

    def read_alone(self, step: int, choose: Sequence[str]) -> tuple[Config, dict[str, np.ndarray]]:
        """Returns the config of a checkpoint, and by name the arrays of the first item of `choose` that it holds.

        Both are compared with the manifest, by this process alone and without any device.

        Raises:
          DamagedCheckpoint: where something differs.
          ValueError: where this process lacked memory, descriptors or rights: that says nothing of the checkpoint.
        """
        folder = self._path / str(step)

        def read() -> tuple[Config, dict[str, np.ndarray]]:
            manifest = read_manifest(folder)
            item = next((name for name in choose if (folder / name).is_dir()), choose[-1])
            if manifest:
                check_files(folder, manifest, {item, CONFIG, MANIFEST})
            config = config_from_dict(read_json(folder / CONFIG / FILE, f"{CONFIG}/{FILE}"))
            found = dict(arrays.read_back(folder / item, (0, 1)))
            contents = {name: content_of(array) for name, array in found.items()}
            if manifest and (fault := _first_difference(item, contents, manifest)):
                raise DamagedCheckpoint(fault)
            return config, found

        try:
            return patiently(read, self.log)
        except Exception as error:  # see `attempt`
            if what_of(error) == OF_PROCESS:
                raise ValueError(_unknown(folder, describe(error))) from error
            raise self._damage(step, describe(error), what_of(error)) from error

    def _checked_manifest(self, step: int, items: set[str]) -> Manifest | None:
        folder = self._path / str(step)
        manifest = read_manifest(folder)
        if manifest:
            if manifest.step != step:
                raise DamagedCheckpoint(f"it is a checkpoint of step {manifest.step}")
            check_files(folder, manifest, {*items, CONFIG, MANIFEST}, share_of_processes())
        return manifest

    def _together(self, read: Callable[[], Value], step: int) -> Value:
        """Returns what `read` does; raises on all processes where it failed on one.

        Raises:
          DamagedCheckpoint: where it cannot be read.
          ValueError: where a process lacked memory, descriptors or rights: that says nothing of the checkpoint.
        """
        results: list[Value] = []
        error, kind = self._read_together("restore", lambda: results.append(read()))
        if kind == OF_PROCESS:
            raise ValueError(_unknown(self._path / str(step), error))
        if error:
            raise self._damage(step, error, kind)
        return results[0]

    def _read_together(self, channel: str, read: Callable[[], Any]) -> tuple[str, str]:
        """Returns the first error of the processes' that read, "" where all could, and what it says (see DAMAGED)."""
        text = kind = ""
        try:
            patiently(read, self.log)
        except Exception as error:  # see `attempt`
            text, kind = describe(error), what_of(error)
        found = [json.loads(each) for each in agree(channel, json.dumps([text, kind]))]
        kinds = [kind for _, kind in found]
        return name_first([text for text, _ in found]), next((each for each in KINDS if each in kinds), "")

    def _damage(self, step: int, reason: str, kind: str = DAMAGED) -> DamagedCheckpoint:
        if kind == DAMAGED:
            self._damaged.add(step)
        else:
            self._unreadable.add(step)
        return DamagedCheckpoint(f"the checkpoint of step {step} in {self._path} is damaged: {reason}")


def what_of(error: BaseException) -> str:
    """Returns what an error of reading says of what was read: one of KINDS."""
    if is_of_this_process(error):
        return OF_PROCESS
    return OF_DISK if is_of_a_moment(error) else DAMAGED


def _unknown(folder: pathlib.Path, error: str) -> str:
    return (
        f"{folder} cannot be read, which may be intact: {error}; "
        "free memory, raise the limit of open files (ulimit -n) or mend the rights, and start again"
    )


def describe(error: BaseException) -> str:
    """Returns an error on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    half = MAX_ERROR // 2  # the end has the cause
    return text if len(text) <= MAX_ERROR else f"{text[:half]} ... {text[-half:]}"


def attempt(action: Callable, *args, so_far: str = "") -> str:
    """Does something unless there was an error so far; returns that error, or its own, or "".

    Storage fails in many ways, and TensorStore's and Orbax's errors have no type of their own: all are caught.
    """
    if so_far:
        return so_far
    try:
        action(*args)
        return ""
    except Exception as error:
        return describe(error)


def _wait_until_seen(folder: pathlib.Path) -> None:
    """Waits for a folder that another process has made: a network's file system may show it late."""
    deadline = time.monotonic() + LATE_SECONDS
    while not folder.is_dir() and time.monotonic() < deadline:
        time.sleep(0.1)


def _remove_unfinished(folder: pathlib.Path) -> None:
    """Removes what a save has left that failed; TensorStore's threads may make it anew, for a moment."""
    for _ in range(10):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


def _sum_files(folder: pathlib.Path, wanted: Callable[[str], bool]) -> dict[str, list[int]]:
    """Returns size and CRC of the files of a checkpoint whose names are wanted, and has them written to the disk."""
    found = {}
    for name in filter(wanted, list_files(folder)):
        found[name] = sum_file(folder / name)
        sync(folder / name)
    return found


def _of_item(contents: dict[str, str], item: str) -> dict[str, str]:
    prefix = f"{item}/"
    return {name.removeprefix(prefix): text for name, text in contents.items() if name.startswith(prefix)}


def _first_difference(item: str, found: dict[str, str], manifest: Manifest) -> str:
    for name, content in sorted(found.items()):
        if manifest.arrays[item].get(name) != content:
            return f"the content of {item}/{name} is not what was saved"
    return ""


def _check_names(folder: pathlib.Path, abstract_items: dict[str, Any], manifest: Manifest) -> None:
    """Raises ValueError where the trees are not those that an intact checkpoint holds."""
    for item, tree in abstract_items.items():
        held = {name: content.split()[1] for name, content in manifest.arrays.get(item, {}).items()}
        wanted = {name: describe_shape(leaf) for name, leaf in named_leaves(tree).items()}
        for name in sorted(held.keys() | wanted.keys()):
            there, here = (shapes.get(name, "none").partition("[")[2] for shapes in (held, wanted))  # may be cast
            if there != here:
                raise ValueError(
                    f"{folder} is of another network: its {item}/{name} is {held.get(name, 'missing')}, not "
                    f"{wanted.get(name, 'there')}; restore it with the config of its run"
                )
