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

from dit_jax.training.step import NORMS_AND_LOSS

FILE = "bad_steps.jsonl"


def read_bad_steps(workdir: str | os.PathLike, last_step: int | None = None) -> list[dict[str, Any]]:
    """Returns the lines up to a step, None: all; an unfinished last one, of a killed run, is left out."""
    path = pathlib.Path(workdir) / FILE
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if last_step is None or row["step"] <= last_step]


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
    ):
        self._path, self._seed, self._examples_of, self._writes = (
            pathlib.Path(workdir) / FILE,
            seed,
            examples_of,
            writes,
        )
        rows = read_bad_steps(workdir, start_step)
        self.num_rollbacks = sum("rolled_back_to" in row for row in rows)
        self.follows_return = any("rolled_back_to" in row and row["step"] == start_step for row in rows)
        self.row: list[int] = []
        for row in reversed(rows):
            if row["step"] != start_step - len(self.row) or "rolled_back_to" in row:
                break
            self.row.insert(0, row["step"])
        if writes and rows != read_bad_steps(workdir):
            unfinished = self._path.with_suffix(".tmp")
            unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            unfinished.replace(self._path)

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
        """Records that the run goes on behind the bad steps in a row with the state of step `target`."""
        self._write({"step": self.row[-1], "rolled_back_to": target})

    def _write(self, row: dict[str, Any]) -> None:
        if self._writes:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
