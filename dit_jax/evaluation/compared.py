"""The evaluations of several runs beside each other: the DiT paper's question, what more computation is worth.

Each run's result is `WORKDIR/evaluation/evaluation.json`, as `dit-jax evaluate --workdir` writes it. Runs of one
network that differ in their seed alone are one row, with the spread of its figure.
"""

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dit_jax.evaluation.chart import MAX_VALUE, line_chart
from dit_jax.evaluation.protocol import differences, figure_label, read_card
from dit_jax.files import is_number

RESULT = pathlib.Path("evaluation") / "evaluation.json"  # in a workdir
AXES = {"gflops": "Gflops (multiply-adds of one forward pass)", "training_gflops": "Gflops of training"}


class EvaluatedRun(NamedTuple):
    """A run with its result."""

    name: str
    seed: int
    card: dict[str, Any]


class Row(NamedTuple):
    """A network, and the figure of each of its seeds."""

    name: str
    subject: dict[str, Any]
    figures: dict[int, float]  # by seed

    def mean(self) -> float:
        """Returns the figure's mean over seeds."""
        return statistics.mean(self.figures.values())


def read_result(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Returns a run's result, None where it was not evaluated."""
    return read_card(workdir / RESULT) if (workdir / RESULT).is_file() else None


def main_figure(card: Mapping[str, Any]) -> str:
    """Returns the name of the figure that stands for a result: the first of its values, the distance where there is."""
    return next(iter(card["values"]))


def network_rows(runs: Sequence[EvaluatedRun]) -> list[Row]:
    """Returns a row a network, by its multiply-adds.

    Raises:
      ValueError: where two results do not compare.
    """
    rows: dict[tuple, Row] = {}
    for run in runs:
        if found := differences(runs[0].card, run.card):
            raise ValueError(
                f"the results of {runs[0].name} and {run.name} do not compare, their protocols differ in "
                f"{'; '.join(found)}; evaluate them alike"
            )
        subject = run.card["subject"]
        for name in ("gflops", "training_gflops", "parameters", "step"):
            value = subject.get(name)
            if not is_number(value) or not 0 <= value < MAX_VALUE or (value == 0 and name in AXES):
                raise ValueError(
                    f"the result of {run.name} cannot be compared: its subject.{name} must be a positive number, not "
                    f"{str(value)[:100]}; evaluate it again"
                )
        key = subject["gflops"], subject["parameters"], subject["step"]
        row = rows.setdefault(key, Row(run.name.removesuffix(f"-seed{run.seed}"), subject, {}))
        figure = main_figure(runs[0].card)
        if figure not in run.card["values"]:
            raise ValueError(f"the result of {run.name} has no {figure}, which {runs[0].name} has; evaluate them alike")
        row.figures[run.seed] = run.card["values"][figure]
    return sorted(rows.values(), key=lambda row: row.subject["gflops"])


def comparison_table(runs: Sequence[EvaluatedRun]) -> list[list[str]]:
    """Returns a heading, and a row a network."""
    rows, card = network_rows(runs), runs[0].card
    seeds = sorted({seed for row in rows for seed in row.figures})
    label = figure_label(main_figure(card), card)
    heading = ["network", "parameters", "Gflops", "training Gflops", *(f"seed {seed}" for seed in seeds), label]
    table = [heading]
    for row in rows:
        figures = [f"{row.figures[seed]:.2f}" if seed in row.figures else "-" for seed in seeds]
        spread = (max(row.figures.values()) - min(row.figures.values())) / 2
        mean = f"{row.mean():.2f}" + (f" ± {spread:.2f}" if len(row.figures) > 1 else "")
        cost = f"{row.subject['gflops']:.6f}", f"{row.subject['training_gflops']:,.0f}"
        table.append([row.name, f"{row.subject['parameters']:,}", *cost, *figures, mean])
    return table


def comparison_charts(runs: Sequence[EvaluatedRun]) -> dict[str, str]:
    """Returns the charts of the figure against each of `AXES`, a line a seed, by the axis' name."""
    rows = network_rows(runs)
    charts = {}
    for axis, label in AXES.items():
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            for seed, figure in sorted(row.figures.items()):
                lines.setdefault(f"seed {seed}", []).append((row.subject[axis], figure))
        charts[axis] = line_chart(lines, label, logarithmic_x=True)
    return charts
