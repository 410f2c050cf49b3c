"""Bad steps on the host: their record `bad_steps.jsonl` in the workdir, and when there are too many in a row.

A line is one flat object. Of a skipped step `{"step": 30, "batch": 29, "seed": 0, "reason": "loss is nan", "loss": NaN,
"grad_norm": NaN, "examples": [17, 4, ...]}`: `step` counts from 1 as all curves do, `batch` from 0; `examples` are the
positions of the global batch's rows in the training data. Of a return `{"step": 39, "rolled_back_to": 20}`: behind
step 39 the run went on with the state of step 20, as if no step between had made an update.

So a batch remains a function of (seed, step). What a run does about bad steps is a function of its steps alone, not of
when it looked or was killed: lines are on disk before any later checkpoint is, and a resumed run drops what comes after
its checkpoint, for it will come again.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dit_jax.files import append_whole, keep_lines, print_warning, read_records
from dit_jax.training.step import NORMS_AND_LOSS

FILE = "bad_steps.jsonl"


def read_bad_steps(workdir: str | os.PathLike, last_step: int | None = None) -> list[dict[str, Any]]:
    """Returns the lines up to a step, None: all; an unfinished last one, of a killed run, is left out.

    Damaged ones are left out, too, and told.
    """
    path = pathlib.Path(workdir) / FILE
    rows, damaged = read_records(path, _checked)
    if damaged:
        print_warning(f"warning: {len(damaged)} lines of {path} are damaged, and left out")
    return [row for row in rows if last_step is None or row["step"] <= last_step]


def _checked(row: Any) -> dict[str, Any]:
    """Returns a line's value, or raises ValueError where it is not what `BadSteps` writes."""
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise ValueError("it must be an object with a step")
    if type(row.get("rolled_back_to")) is not int and not isinstance(row.get("reason"), str):
        raise ValueError("it must be a skipped step with its reason, or a return to a checkpoint")
    return row


def abandoned_steps(rows: Sequence[Mapping[str, Any]], last_step: int) -> set[int]:
    """Returns the steps, up to a last one, whose updates a return to a checkpoint has undone."""
    returns = [(row["rolled_back_to"], row["step"]) for row in rows if "rolled_back_to" in row]
    return {step for target, end in returns if end <= last_step for step in range(target + 1, end + 1)}


class BadSteps:
    """Takes the metrics of every step in turn, records the bad ones and counts those in a row.

    Args:
      workdir: the run's directory.
      start_step: from which this start goes on.
      seed: the run's.
      examples_of: (number of a batch, from 0) -> the positions of its examples; None: unknown.
      writes: whether this process keeps the record; all processes read it.
      log: takes lines about failures; to be replaced at will.

    Attributes:
      row: the newest steps, if they are bad ones without a good one between.
      num_rollbacks: returns to a checkpoint so far, over all starts of the run.
      follows_return: whether this start goes on from such a return.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        start_step: int,
        seed: int,
        examples_of: Callable[[int], list[int]] | None = None,
        writes: bool = True,
        log: Callable[[str], None] = print_warning,
    ):
        self.log, self._unwritten = log, []
        self._path, self._seed, self._examples_of, self._writes = (
            pathlib.Path(workdir) / FILE,
            seed,
            examples_of,
            writes,
        )
        rows, damaged = read_records(self._path, _checked)
        rows = [row for row in rows if row["step"] <= start_step]
        if writes and self._path.is_file():
            keep_lines(self._path, rows, damaged, log)
        self.num_rollbacks = sum("rolled_back_to" in row for row in rows)
        self.follows_return = any("rolled_back_to" in row and row["step"] == start_step for row in rows)
        self.row: list[int] = []
        for row in reversed(rows):
            if row["step"] != start_step - len(self.row) or "rolled_back_to" in row:
                break
            self.row.insert(0, row["step"])

    def add(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Takes a step's metrics; returns why it was skipped, None for a good one."""
        if not metrics["skipped"]:
            self.row = []
            return None
        self.row.append(step)
        values = {name: metrics[name] for name in NORMS_AND_LOSS if name in metrics}
        wrong = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        reason = ", ".join(wrong) or "loss is a spike"
        examples = self._examples_of(step - 1) if self._examples_of and self._writes else None
        self._write(
            {"step": step, "batch": step - 1, "seed": self._seed, "reason": reason, **values, "examples": examples}
        )
        return reason

    def rollback_target(self, checkpoints: Sequence[int], max_rollbacks: int) -> int:
        """Returns the newest of the checkpoints' steps that is before the bad steps in a row.

        Raises:
          ValueError: where there is none, or the run has gone back to one `max_rollbacks` times before.
        """
        what = f"steps {self.row[0]} to {self.row[-1]} were all skipped ({self._path} tells why)"
        remedy = "lower config.optimizer.learning_rate, set config.optimizer.max_grad_norm, or mend the data"
        earlier = [step for step in checkpoints if step < self.row[0]]
        if not earlier:
            raise ValueError(f"{what}, and no checkpoint is from before them; {remedy}")
        if self.num_rollbacks >= max_rollbacks:
            raise ValueError(
                f"{what}, and config.training.{max_rollbacks=} returns to a checkpoint were made before; {remedy}"
            )
        return max(earlier)

    def add_rollback(self, target: int) -> None:
        """Records that the run goes on behind the bad steps in a row with the state of step `target`.

        Raises:
          OSError: where it cannot be written: without it, the run would return there for ever.
        """
        self._write({"step": self.row[-1], "rolled_back_to": target}, must=True)

    def _write(self, row: dict[str, Any], must: bool = False) -> None:
        if self._writes:
            self._unwritten.append(row)
            self.write_left(must, tell=len(self._unwritten) == 1)

    def write_left(self, must: bool = False, tell: bool = False) -> None:
        """Writes what the storage did not take before; to be called before anything later is kept."""
        if not self._unwritten:
            return
        try:
            lines = "".join(json.dumps(row) + "\n" for row in self._unwritten)
            append_whole(self._path, lines.encode(), sync=True)
            self._unwritten = []
        except OSError as error:
            if must:
                raise
            if tell:
                self.log(f"warning: bad steps cannot be recorded, which is tried again later: {error}")
