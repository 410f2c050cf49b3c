import os
import resource
import sys

import numpy as np
import PIL.Image
import pytest

from dit_jax.metrics import history
from dit_jax.metrics.history import append_metrics, metrics_path, read_metrics
from dit_jax.training import reporting
from dit_jax.training.reporting import Reporter


class FakeWriter:
    """Stands for clu's writer, whose import takes long."""

    def __init__(self):
        self.calls = []

    def write_scalars(self, step, scalars):
        self.calls.append((step, scalars))

    def flush(self):
        self.calls.append("flush")

    def close(self):
        self.calls.append("close")


@pytest.fixture
def writer(monkeypatch):
    fake = FakeWriter()
    monkeypatch.setattr(reporting, "_make_summary_writer", lambda directory: fake)
    return fake


def test_scalars_reach_the_json_lines_at_once_and_the_events_in_order(tmp_path, writer):
    with Reporter(tmp_path, num_train_steps=2, start_step=0) as reporter:
        reporter.scalars(1, "train", {"loss": 0.5})
        reporter.scalars(2, "eval", {"loss": 0.25, "psnr": 20.0})
        rows = read_metrics(tmp_path)
    assert [(row["step"], row["split"], row["loss"]) for row in rows] == [(1, "train", 0.5), (2, "eval", 0.25)]
    assert 0 <= rows[0]["seconds"] <= rows[1]["seconds"]
    expected = [(1, {"train/loss": 0.5}), "flush", (2, {"eval/loss": 0.25, "eval/psnr": 20.0}), "flush", "close"]
    assert writer.calls == expected


def test_a_resumed_run_has_no_line_twice_and_its_seconds_go_on(tmp_path, writer):
    with Reporter(tmp_path, num_train_steps=30, start_step=0) as reporter:
        reporter._start_time -= 100  # as if it had run that long
        for step in (10, 20):
            reporter.scalars(step, "train", {"loss": 1.0})
    with Reporter(tmp_path, num_train_steps=30, start_step=10) as reporter:
        for step in (20, 30):
            reporter.scalars(step, "train", {"loss": 2.0})
    rows = read_metrics(tmp_path)
    assert [(row["step"], row["loss"]) for row in rows] == [(10, 1.0), (20, 2.0), (30, 2.0)]
    assert all(row["seconds"] >= 100 for row in rows)


def test_a_mistake_in_the_thread_that_writes_events_is_raised(tmp_path, monkeypatch):
    def fail(directory):
        raise TypeError("not a folder")

    monkeypatch.setattr(reporting, "_make_summary_writer", fail)
    with (
        pytest.raises(TypeError, match="not a folder"),
        Reporter(tmp_path, num_train_steps=1, start_step=0) as reporter,
    ):
        reporter.scalars(1, "train", {"loss": 0.5})


def test_what_the_storage_does_not_take_is_told_once_and_written_again_when_it_does(tmp_path, monkeypatch, capsys):
    """/dev/full takes no byte, as a full disk; each report goes on by itself."""
    made: list[FakeWriter] = []

    class Writer(FakeWriter):
        def write_scalars(self, step, scalars):
            if step == 2:
                raise OSError(28, "No space left on device")
            super().write_scalars(step, scalars)

    def make_writer(directory):
        made.append(Writer())
        return made[-1]

    monkeypatch.setattr(reporting, "_make_summary_writer", make_writer)
    picture = np.zeros((2, 2, 3), np.uint8)
    with Reporter(tmp_path, num_train_steps=9, start_step=0) as reporter:
        reporter.scalars(1, "train", {"loss": 1.0})
        reporter._thread.submit(lambda: None).result()  # the thread is done with it
        files = {path: path.read_bytes() for path in (tmp_path / "metrics").glob("*.jsonl")}
        log, full = reporter._log_file, os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
        (tmp_path / "samples").write_text("a file where the folder should be")
        for path in files:
            path.unlink()
            path.symlink_to("/dev/full")
        reporter._log_file = full
        for step in (2, 3):
            reporter.log(f"message {step}")
            reporter.scalars(step, "train", {"loss": 1.0})
            reporter.image(step, "grid", picture)
        reporter._log_file = log
        (tmp_path / "samples").unlink()
        for path, content in files.items():
            path.unlink()
            path.write_bytes(content)
        reporter.log("message 4")
        reporter.scalars(4, "train", {"loss": 1.0})
        reporter.image(4, "grid", picture)
    told = [line for line in capsys.readouterr().err.splitlines() if "cannot be written" in line]
    assert [line.split(" in ")[0] for line in sorted(told)] == [
        "warning: a picture",
        "warning: an event file",
        "warning: log.txt",
        "warning: metrics/metrics.jsonl",
    ]
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 4]
    assert [call[0] for call in made[1].calls if isinstance(call, tuple)] == [3, 4]
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["grid_0000004.png"]
    assert "message 4" in (tmp_path / "log.txt").read_text()


def test_a_line_of_which_a_part_was_written_leaves_nothing(tmp_path, monkeypatch):
    history.resume_metrics(tmp_path, 0)
    history.append_metrics(tmp_path, 1, "train", 0.0, {"loss": 1.0})
    before = metrics_path(tmp_path).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            history.append_metrics(tmp_path, 2, "train", 0.0, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert metrics_path(tmp_path).read_bytes() == before
    history.append_metrics(tmp_path, 3, "train", 0.0, {"loss": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]


def test_tensorboard_shows_every_step_once_after_a_kill(tmp_path):
    """The first start wrote step 3, which its checkpoint of step 2 does not know, and not yet the events of step 2."""
    with Reporter(tmp_path, num_train_steps=3, start_step=0) as reporter:
        reporter.scalars(1, "eval", {"psnr": 20.0})
        reporter.scalars(3, "eval", {"psnr": -1.0})
    (events,) = (tmp_path / "metrics").glob("events.*")
    with events.open("ab") as file:
        file.write(b"unfinished")
    append_metrics(tmp_path, 2, "eval", 1.0, {"psnr": 21.0})
    with Reporter(tmp_path, num_train_steps=3, start_step=2) as reporter:
        reporter.scalars(3, "eval", {"psnr": 22.0})
    from tensorboard.backend.event_processing import event_accumulator
    from tensorboard.util import tensor_util

    events = event_accumulator.EventAccumulator(
        str(tmp_path / "metrics"), size_guidance={event_accumulator.TENSORS: 0}
    ).Reload()
    shown = [(event.step, float(tensor_util.make_ndarray(event.tensor_proto))) for event in events.Tensors("eval/psnr")]
    assert shown == [(1, 20.0), (2, 21.0), (3, 22.0)]


def test_progress_without_a_terminal_is_a_line_now_and_then(tmp_path, writer, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(reporting.time, "monotonic", lambda: clock[0])
    with Reporter(tmp_path, num_train_steps=40, start_step=0) as reporter:
        for step in range(1, 41):
            clock[0] += 1.0
            reporter.progress(step, loss=0.5 if step > 15 else None)
    assert capsys.readouterr().err.splitlines() == [
        "step 1 of 40 (2%)",
        "step 11 of 40 (28%), 1 steps/s, 00:29 left",
        "step 21 of 40 (52%), loss 0.5, 1 steps/s, 00:19 left",
        "step 31 of 40 (78%), loss 0.5, 1 steps/s, 00:09 left",
        "step 40 of 40 (100%), loss 0.5, 1 steps/s, 00:00 left",
    ]


def test_progress_on_a_terminal_is_a_bar_that_messages_leave_whole(tmp_path, writer, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Reporter(tmp_path, num_train_steps=4, start_step=2) as reporter:
        reporter.progress(3, loss=0.5)
        reporter.log("half")
        reporter.progress(4, loss=0.25)
    shown = capsys.readouterr().err
    assert "half\n" in shown and "4/4" in shown and "loss 0.25" in shown


def test_messages_go_to_the_terminal_and_with_the_time_to_the_log(tmp_path, writer, capsys):
    for start_step in (0, 5):
        with Reporter(tmp_path, num_train_steps=10, start_step=start_step) as reporter:
            reporter.log(f"from {start_step}")
    assert capsys.readouterr().err.splitlines() == ["from 0", "from 5"]
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["from 0", "from 5"]


def test_images_are_png_files_named_by_step(tmp_path, writer):
    colour = np.random.default_rng(0).integers(0, 255, (4, 6, 3), np.uint8)
    with Reporter(tmp_path, num_train_steps=10, start_step=0) as reporter:
        reporter.image(10, "samples", colour)
        reporter.image(10, "grey", colour[..., :1])
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["grey_0000010.png", "samples_0000010.png"]
    np.testing.assert_array_equal(PIL.Image.open(tmp_path / "samples" / "samples_0000010.png"), colour)
    np.testing.assert_array_equal(PIL.Image.open(tmp_path / "samples" / "grey_0000010.png"), colour[..., 0])


def test_an_inactive_reporter_leaves_no_trace(tmp_path, capsys):
    with Reporter(tmp_path / "run", num_train_steps=1, start_step=0, active=False) as reporter:
        reporter.log("message")
        reporter.progress(1, loss=0.5)
        reporter.scalars(1, "train", {"loss": 0.5})
        reporter.image(1, "samples", np.zeros((2, 2, 3), np.uint8))
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")
