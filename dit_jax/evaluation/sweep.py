"""Evaluations over a grid of sampling settings: guidance x steps x sampler x average, a table and charts.

Every point's card is a file of its own; a sweep that is started again takes those whose protocol and checkpoint are
what it would measure now.
"""

import itertools
import json
import math
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dit_jax.evaluation.chart import line_chart, standalone
from dit_jax.evaluation.protocol import figure_label, read_card, refuse_other, write_card
from dit_jax.files import SUM_KEY, check_seal, file_name, read_json, sealed, write_text_whole
from dit_jax.parallel.distributed import is_first
from dit_jax.parallel.mesh import on_all_processes

AXES = ("sampler", "ema_length", "steps", "cfg_scale")  # the first varies slowest
CHARTED = {"cfg_scale": "guidance", "steps": "sampling steps"}
COLOURS = ("#3b76c4", "#d9731a", "#2e9e6b", "#b0489a", "#8a7a1f", "#7a6fd0")

Point = dict[str, Any]


def grid(axes: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Returns every combination of the axes' values."""
    names = [name for name in AXES if axes.get(name)]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(axes[name] for name in names))]


def point_name(point: Point) -> str:
    """Returns a point's name, such as "steps_20_cfg_scale_1.5"; of none, "evaluation"."""
    return "_".join(f"{name}_{value}" for name, value in point.items()) or "evaluation"


def run_sweep(
    points: Sequence[Point],
    folder: pathlib.Path,
    expected: Callable[[Point], tuple[dict, dict]],
    evaluate: Callable[[Point], dict[str, Any]],
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Returns the card of each point, and writes them to `folder`.

    Args:
      expected: the parts of a point's subject and of its protocol that are known before it is evaluated.
      evaluate: the card of a point; overwrite: takes the place of cards of other settings.

    Raises:
      ValueError: where a card of other settings would be lost, before the first point is evaluated.
    """
    for point in points:
        path, (subject, protocol) = folder / f"{point_name(point)}.json", expected(point)
        refuse_other(path, subject | protocol, overwrite or _is_damaged(path))
    folder.mkdir(parents=True, exist_ok=True)
    cards = []
    for point in points:
        path = folder / f"{point_name(point)}.json"
        card = _kept_card(path)
        if not on_all_processes(card is not None and _matches(card, *expected(point))):
            card = evaluate(point)
            if is_first():
                write_card(path, sealed(card))
        cards.append(card)
    return cards


def _is_damaged(path: pathlib.Path) -> bool:
    """Returns whether a card is not what was written; older versions wrote none with a sum, and these are not."""
    try:
        record = read_json(path)
        if isinstance(record, dict) and SUM_KEY in record:
            check_seal(record)
        return False
    except FileNotFoundError:
        return False
    except ValueError:
        return True


def _kept_card(path: pathlib.Path) -> dict[str, Any] | None:
    """Returns the card of a point that was measured; None where there is none, or it has not the sum of its content."""
    if not path.is_file():
        return None
    try:
        return check_seal(read_card(path))
    except ValueError as error:
        if is_first():
            print(f"{path} is measured again: {error}", file=sys.stderr, flush=True)
        return None


def _matches(card: dict[str, Any], subject: dict, protocol: dict) -> bool:
    subject, protocol = json.loads(json.dumps((subject, protocol)))  # as a card is read: tuples are lists
    pairs = ((card["subject"], subject), (card["protocol"], protocol))
    return all(theirs.get(key) == value for theirs, ours in pairs for key, value in ours.items())


def table_rows(points: Sequence[Point], cards: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns a table of the sweep: a heading, and a row a point."""
    figures = list(cards[0]["values"])
    heading = [*points[0], *figures]
    return [
        heading,
        *(
            [*map(str, point.values()), *(f"{card['values'].get(name, math.nan):.4g}" for name in figures)]
            for point, card in zip(points, cards, strict=True)
        ),
    ]


def write_charts(points: Sequence[Point], cards: Sequence[dict[str, Any]], folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the first figure against guidance and against steps, where several were measured; returns the files."""
    figure = next(iter(cards[0]["values"]))
    written = []
    for axis, label in CHARTED.items():
        if len({point.get(axis) for point in points}) < 2:
            continue
        lines: dict[str, list[tuple[float, float]]] = {}
        for point, card in zip(points, cards, strict=True):
            others = " ".join(f"{name} {value}" for name, value in point.items() if name != axis)
            value = card["values"].get(figure, math.nan)
            lines.setdefault(others or figure, []).append((float(point[axis]), value))
        chart = line_chart({name: sorted(line) for name, line in lines.items()}, label)
        path = folder / f"{file_name(figure)}_by_{axis}.svg"
        title = figure_label(figure, cards[0])
        write_text_whole(path, standalone(chart, title, [COLOURS[i % len(COLOURS)] for i in range(len(lines))]))
        written.append(path)
    return written
