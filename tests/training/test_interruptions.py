"""A run that is asked to make way in an evaluation, or while a reader hangs, loses no step and no figure."""

import dataclasses
import os
import signal
import threading
import time

import jax
import numpy as np
import pytest

from dit_jax.checkpoint import Checkpoints
from dit_jax.cli.train import diffusion_task
from dit_jax.metrics.history import read_metrics
from dit_jax.parallel import preemption
from dit_jax.parallel.mesh import make_mesh
from dit_jax.parallel.preemption import INTERRUPTED, RESTART, MakeWay, Preemption, heed
from dit_jax.training import loop
from tests.tiny import dit_config, make_image_folder

LIMIT_SECONDS = 120
NOT_OF_STEPS = ("seconds", "steps_per_second", "data_wait")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A config, its task and mesh, and the workdir and state of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs")
    config = dit_config(make_image_folder(folder / "images"), keep_best_metric="loss")
    mesh = make_mesh(config.mesh)
    task = diffusion_task(config, mesh, folder)
    (folder / "whole").mkdir()
    return config, task, mesh, folder / "whole", loop.train(config, folder / "whole", task, mesh)


def ask(number: int = signal.SIGTERM) -> None:
    """Asks this process to make way, and returns when it has heard."""
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + LIMIT_SECONDS
    while not preemption._current._agreed.is_set():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def curves(workdir):
    rows = [{key: value for key, value in row.items() if key not in NOT_OF_STEPS} for row in read_metrics(workdir)]
    return sorted(rows, key=lambda row: (row["step"], row["split"]))


def assert_as_the_whole(runs, workdir, state):
    _, _, _, whole, wanted = runs
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    assert curves(workdir) == curves(whole)
    for name in ("samples_0000002.png", "samples_0000004.png"):
        assert (workdir / "samples" / name).read_bytes() == (whole / "samples" / name).read_bytes()
    ours, theirs = (Checkpoints(each) for each in (workdir, whole))
    assert ours.all_steps() == theirs.all_steps() == [2, 4]
    assert [ours.metrics(step) for step in (2, 4)] == [theirs.metrics(step) for step in (2, 4)]
    assert all(ours.metrics(step).keys() == {"loss", "mse", "vlb"} & ours.metrics(step).keys() for step in (2, 4))


@pytest.mark.parametrize("at", ["evaluation", "drawing"])
def test_a_request_in_an_evaluation_ends_it_and_the_next_start_makes_it(at, runs, tmp_path):
    config, task, mesh, _, _ = runs

    def draw(params):
        ask()
        heed()  # as each batch of a drawing does
        raise AssertionError("the drawing goes on")

    def eval_batches():
        for batch in task.eval_batches():
            if not preemption._current._asked:
                ask()
            yield batch

    busy = {"draw": draw} if at == "drawing" else {"eval_batches": eval_batches}
    with Preemption(), pytest.raises(MakeWay) as ended:
        loop.train(config, tmp_path, dataclasses.replace(task, **busy), mesh, preemption=preemption._current)
    assert ended.value.code == RESTART
    assert Checkpoints(tmp_path).all_steps() == [2]
    assert [row["split"] for row in read_metrics(tmp_path)] == ["train", "train"]
    assert_as_the_whole(runs, tmp_path, loop.train(config, tmp_path, task, mesh))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, RESTART), (signal.SIGINT, INTERRUPTED)])
def test_a_reader_that_hangs_keeps_nobody_waiting_and_all_finished_steps_are_saved(number, code, runs, tmp_path):
    config, task, mesh, _, _ = runs
    hangs = threading.Event()

    def train_batches(start_step):
        for count, batch in enumerate(task.train_batches(start_step)):
            if count == 3:
                threading.Thread(target=ask, args=(number,), daemon=True).start()
                hangs.wait()
            yield batch

    stuck = dataclasses.replace(task, train_batches=train_batches)
    with Preemption(interrupts=True), pytest.raises(MakeWay) as ended:
        loop.train(config, tmp_path, stuck, mesh, preemption=preemption._current)
    hangs.set()
    assert ended.value.code == code
    assert Checkpoints(tmp_path).all_steps() == [2, 3]
    said = "asked to make way after step 3" if code == RESTART else "interrupted after step 3"
    assert said in (tmp_path / "log.txt").read_text()
    assert [row["step"] for row in read_metrics(tmp_path) if row["split"] == "train"] == [1, 2, 3]


def test_a_kill_between_a_save_and_its_evaluation_loses_no_figure(runs, tmp_path):
    config, task, mesh, _, _ = runs

    def fail(params):
        raise KeyError("as if it was killed here")

    with pytest.raises(KeyError):
        loop.train(config, tmp_path, dataclasses.replace(task, draw=fail), mesh)
    assert Checkpoints(tmp_path).all_steps() == [2] and Checkpoints(tmp_path).metrics(2) is None
    assert_as_the_whole(runs, tmp_path, loop.train(config, tmp_path, task, mesh))
