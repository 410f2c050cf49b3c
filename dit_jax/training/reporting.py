"""What a training run tells: the terminal, `log.txt`, curves in `metrics/` and pictures in `samples/`.

Where the storage fails, such as a full disk, that is told once and the run goes on: it is worth more than its reports.
"""

import concurrent.futures
import contextlib
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import TextIO

import numpy as np
import PIL.Image

from dit_jax.files import written_whole
from dit_jax.metrics import history
from dit_jax.terminal import progress, silence_tensorflow, tell


class Reporter:
    """Reports one start of a run; `with Reporter(...) as reporter:` closes it.

    Args:
      workdir: the run's directory, on a file system that all starts of the run see.
      num_train_steps: step at which the run ends.
      start_step: step from which this start goes on; what an earlier start wrote about later steps is dropped.
      active: False makes every method do nothing, for all processes but the first.
    """

    def __init__(self, workdir: str | pathlib.Path, num_train_steps: int, start_step: int, active: bool = True):
        self._active = active
        if not active:
            return
        self._workdir = pathlib.Path(workdir)
        self._num_train_steps, self._start_step = num_train_steps, start_step
        news: list[str] = []
        self._seconds_before = history.resume_metrics(self._workdir, start_step, news.append)
        self._start_time = time.monotonic()
        self._log_file = _open_log(self._workdir / "log.txt")
        self._bar = progress(total=num_train_steps, initial=start_step, unit="step", description="step")
        # Importing clu takes many seconds, most of them TensorFlow's. One thread imports it, at the first metrics, and
        # writes what is queued meanwhile, in order, so that no step waits for it.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "events")
        self._writer, self._resumed = None, False  # the thread's
        self._events: list[concurrent.futures.Future] = []
        self._failing: set[str] = set()  # what cannot be written at present, and was told
        for line in news:
            self.log(line)

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def log(self, message: str) -> None:
        """Writes a message to the terminal and, with the time, to `log.txt`."""
        if not self._active:
            return
        tell(message)
        with self._surviving("log.txt"):
            self._log_file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")
            self._log_file.flush()

    @contextlib.contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        """Tells, once, that the storage takes no more of something."""
        try:
            yield
            self._failing.discard(what)
        except Exception as error:
            # TensorFlow, which writes events, has its own types for what goes wrong in the storage.
            if not isinstance(error, OSError) and not type(error).__module__.startswith("tensorflow."):
                raise
            if what not in self._failing:
                self._failing.add(what)
                tell(f"warning: {what} in {self._workdir} cannot be written: {' '.join(str(error).split())}")

    def has_evaluated(self, step: int) -> bool:
        """Returns whether an earlier start has written the held-out figures of a step."""
        if not self._active:
            return False
        return any(row["step"] == step and row["split"] == "eval" for row in history.read_metrics(self._workdir))

    def progress(self, step: int, loss: float | None = None) -> None:
        """Shows how far the run is after `step` steps."""
        if not self._active:
            return
        if loss is not None:
            self._bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
        self._bar.update(step - self._bar.n)

    def scalars(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Adds metrics after `step` steps to the curves: JSON lines (at once) and TensorBoard events."""
        if not self._active:
            return
        seconds = self._seconds_before + time.monotonic() - self._start_time
        with self._surviving("metrics/metrics.jsonl"):
            history.append_metrics(self._workdir, step, split, seconds, values)
        tagged = {f"{split}/{name}": float(value) for name, value in values.items()}
        self._events.append(self._thread.submit(self._write_events, step, tagged))
        while self._events and self._events[0].done():
            self._events.pop(0).result()  # raises what went wrong in the thread

    def image(self, step: int, name: str, grid: np.ndarray) -> None:
        """Writes a picture, [H, W, C] uint8, to `samples/NAME_STEP.png`."""
        if not self._active:
            return
        path = self._workdir / "samples" / f"{name}_{step:07d}.png"
        with self._surviving("a picture in samples/"):
            path.parent.mkdir(exist_ok=True)
            with written_whole(path) as temporary:
                PIL.Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid).save(temporary, format="png")

    def close(self) -> None:
        """Finishes all files."""
        if not self._active:
            return
        self._active = False
        self._bar.close()
        with self._surviving("log.txt"):
            self._log_file.close()
        self._events.append(self._thread.submit(self._close_events))
        self._thread.shutdown(wait=True)
        for event in self._events:
            event.result()

    # These run in the thread.

    def _write_events(self, step: int, scalars: dict[str, float]) -> None:
        with self._surviving("an event file in metrics/"):
            try:
                if self._writer is None and self._resumed:
                    self._writer = _make_summary_writer(self._workdir / "metrics")
                elif self._writer is None:
                    self._writer, self._resumed = _resume_events(self._workdir, self._start_step), True
                self._writer.write_scalars(step, scalars)
                self._writer.flush()
            except Exception:
                self._writer = None  # the next has a file of its own: behind a broken record nothing can be read
                raise

    def _close_events(self) -> None:
        with self._surviving("an event file in metrics/"):
            if self._writer is not None:
                self._writer.close()


def _open_log(path: pathlib.Path) -> TextIO:
    """Returns a log to write to its end, in a line of its own behind one that a kill has cut."""
    file = path.open("a+", encoding="utf-8", errors="replace")
    if path.read_bytes()[-1:] not in (b"", b"\n"):
        file.write("\n")
    return file


def _resume_events(workdir: pathlib.Path, start_step: int):
    """Returns a writer of events, where those up to a step are what the JSON lines say.

    The thread may lag behind, and of a file that a flipped bit has damaged only what is before it can be read.
    """
    written = _drop_events_after(workdir / "metrics", start_step)
    writer = _make_summary_writer(workdir / "metrics")
    for row in history.read_metrics(workdir):
        tagged = {f"{row['split']}/{name}": value for name, value in row.items() if name not in history.NOT_METRICS}
        missing = {tag: value for tag, value in tagged.items() if (row["step"], tag) not in written}
        if row["step"] <= start_step and missing:
            writer.write_scalars(row["step"], missing)
    return writer


def _drop_events_after(directory: pathlib.Path, step: int) -> set[tuple[int, str]]:
    """Takes the events of later steps, which come again, out of the event files; returns the rest as (step, tag)."""
    kept: set[tuple[int, str]] = set()
    paths = sorted(directory.glob("events.*"))
    if not paths:
        return kept
    silence_tensorflow()
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    for path in paths:
        records = list(RawEventFileLoader(str(path)).Load())  # up to what a kill left unfinished
        events = [Event.FromString(record) for record in records]
        kept |= {(event.step, value.tag) for event in events if event.step <= step for value in event.summary.value}
        unfinished = directory / "unfinished"  # not with their name, by which TensorBoard knows event files
        try:
            with unfinished.open("wb") as file:
                writer = RecordWriter(file)
                for record, event in zip(records, events, strict=True):
                    if event.step <= step:
                        writer.write(record)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    return kept


def _make_summary_writer(directory: pathlib.Path):
    silence_tensorflow()
    from clu import metric_writers

    return metric_writers.SummaryWriter(str(directory))
