"""The history of a run's metrics: JSON lines in `WORKDIR/metrics/metrics.jsonl`.

A line is one flat object, `{"step": 100, "split": "train", "seconds": 12.3, "loss": 0.25}`: `step` counts finished
training steps, `split` is "train" or "eval" (held-out examples), and `seconds` is the time that the run has spent in
training up to this line, over all its starts. Every other key is a metric.
"""

import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from dit_jax.files import (
    append_whole,
    is_number,
    keep_lines,
    parse_json,
    patiently,
    print_warning,
    read_records,
)

SPLITS = ("train", "eval")
NOT_METRICS = ("step", "split", "seconds")
MAX_STEP, MAX_SECONDS = 2**53, 1e12  # far beyond any run's


def metrics_path(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Returns where a run keeps its history."""
    return pathlib.Path(workdir) / "metrics" / "metrics.jsonl"


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns a run's lines in the order of writing; an unfinished last line, of a killed run, is left out.

    Raises:
      ValueError: if the run has no history, or a line before the last cannot be read.
    """
    path = metrics_path(workdir)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {workdir} must be the --workdir of a `dit-jax train` run")
    lines = patiently(path.read_bytes).decode("utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline was not written to its end
        try:
            rows.append(_checked(parse_json(line)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is not one of a run's metrics ({error}); remove it") from error
    return rows


def _checked(row: Any) -> dict[str, Any]:
    """Returns a line's value, or raises ValueError where it is not what `append_metrics` writes."""
    if not isinstance(row, dict) or row.get("split") not in SPLITS or type(row.get("step")) is not int:
        raise ValueError("it must be an object with a step and a split")
    wrong = [name for name, value in row.items() if name != "split" and not is_number(value)]
    if wrong or "seconds" not in row:
        raise ValueError(f"{wrong[0][:100] if wrong else 'seconds'} must be a number")
    if not 0 <= row["step"] <= MAX_STEP or not 0 <= row["seconds"] < MAX_SECONDS:
        raise ValueError(f"its step, {row['step']:.4g}, or its seconds, {row['seconds']:.4g}, cannot be a run's")
    for name in row:
        check_figure_name(name)
    return row


def check_figure_name(name: str) -> None:
    """Raises ValueError where a figure in a file has a name that none has here: files are named after figures."""
    if not re.fullmatch(r"\w[\w.+-]{0,99}", name):
        raise ValueError(f"{name[:100]!r} is not a figure's name: letters, digits and _ alone")


def append_metrics(
    workdir: str | os.PathLike[str], step: int, split: str, seconds: float, values: Mapping[str, float]
) -> None:
    """Appends one line, whole or (if the process is killed meanwhile) without its end; nothing where that fails."""
    assert split in SPLITS and not set(values) & set(NOT_METRICS), (split, sorted(values))
    row = {"step": int(step), "split": split, "seconds": round(seconds, 3)}
    row |= {name: float(value) for name, value in values.items()}
    append_whole(metrics_path(workdir), json.dumps(row).encode() + b"\n")


def resume_metrics(workdir: str | os.PathLike[str], step: int, tell: Callable[[str], None] = print_warning) -> float:
    """Drops the lines after a step, which a run resumed from there writes again; returns the seconds spent up to it.

    Damaged lines are set aside, which is told.
    """
    path = metrics_path(workdir)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, damaged = read_records(path, _checked)
    rows = [row for row in rows if row["step"] <= step]
    keep_lines(path, rows, damaged, tell)
    path.touch()
    return max((row["seconds"] for row in rows), default=0.0)
