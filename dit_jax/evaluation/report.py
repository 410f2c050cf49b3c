"""One HTML page about training runs: figures, curves, pictures, configs.

The page holds its pictures, curves and style itself and asks nothing of any server. It is made from a workdir's files
alone: `config.json`, `metrics/metrics.jsonl` and `samples/*.png`.
"""

import base64
import dataclasses
import html
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import re
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import PIL.Image

from dit_jax.evaluation.chart import line_chart, standalone
from dit_jax.evaluation.compared import EvaluatedRun, comparison_charts, comparison_table, main_figure, read_result
from dit_jax.evaluation.protocol import figure_label, table
from dit_jax.files import file_name, read_json, write_text_whole
from dit_jax.metrics import history

PACKAGES = ("dit_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")
SPLIT_LABELS = {"train": "training", "eval": "held-out"}
METRIC_LABELS = {
    "psnr": "PSNR (dB)",
    "perceptual": "LPIPS",
    "nll": "negative log-likelihood",
    "kl": "KL",
    "mse": "MSE",
    "vlb": "VLB",
    "grad_norm": "gradient norm",
}
MAX_PICTURE_BYTES = 2**28  # the page holds them
FIRST_CHARTS = ("loss", "psnr", "perceptual")

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #66707f; --rule: #dfe3e8; --page: #fff; --box: #f5f6f8;
  --train: #3b76c4; --eval: #d9731a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #98a2b1; --rule: #333b47; --page: #14181e;
  --box: #1c222b; --train: #6fa8f0; --eval: #f29b4b; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 62rem;
  margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 3rem; border-bottom: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 0 0 .4rem; } p.note { color: var(--soft); }
table { border-collapse: collapse; } td, th { padding: .2rem 1.5rem .2rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--rule); } td.number { text-align: right; font-variant-numeric: tabular-nums; }
.row { display: flex; flex-wrap: wrap; gap: 1.25rem; } .row > * { flex: 1 1 20rem; min-width: 0; max-width: 30rem; }
figure { margin: 0 0 1rem; } figcaption { color: var(--soft); font-size: .9rem; }
img { max-width: 100%; height: auto; border-radius: 4px; }
svg { width: 100%; height: auto; background: var(--box); border-radius: 4px; } svg text { font-size: 11px;
  fill: var(--soft); } .rule { stroke: var(--rule); } .line { fill: none; stroke-width: 1.6; }
.line.training { stroke: var(--train); } .line.held-out { stroke: var(--eval); stroke-width: 2; }
.point.training { fill: var(--train); } .point.held-out { fill: var(--eval); }
.key::before { content: ""; display: inline-block; width: .9rem; height: .2rem; margin: 0 .4rem .2rem 1rem; }
.key.training::before { background: var(--train); } .key.held-out::before { background: var(--eval); }
.compared circle { display: none; }
details { margin: 1rem 0; } summary { cursor: pointer; } code { font-size: .9rem; }
"""
RUN_COLOURS = ("#3b76c4", "#d9731a", "#2e9e6b", "#b0489a", "#8a7a1f", "#7a6fd0")  # of runs compared, in turn
STYLE += "".join(
    f".compared polyline:nth-of-type({i}) {{ stroke: {colour}; stroke-width: 2; }}\n"
    f".compared .key:nth-of-type({i})::before {{ background: {colour}; }}\n"
    for i, colour in enumerate(RUN_COLOURS, start=1)
)


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir tells about its run; `pictures` are (step, file) in the order of steps, by name.

    `result` is the card of its evaluation (`evaluation.protocol`), None where there is none.
    """

    name: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    pictures: dict[str, list[tuple[int, pathlib.Path]]]
    result: dict[str, Any] | None = None

    def last(self, split: str) -> dict[str, float]:
        """Returns the newest metrics of a split."""
        rows = [row for row in self.rows if row["split"] == split]
        return {name: value for name, value in rows[-1].items() if name not in history.NOT_METRICS} if rows else {}


def write_report(
    workdirs: Sequence[str | os.PathLike[str]],
    samples_dir: str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    charts_dir: str | os.PathLike[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Writes the page and returns the measured figures of each run, by name.

    Args:
      workdirs: of `dit-jax train` runs.
      samples_dir: what `dit-jax sample --output` wrote, or None.
      output: HTML file.
      charts_dir: where each held-out metric's chart is written too, METRIC.svg with a line a run; or None.

    Raises:
      ValueError: where something to report on is missing.
    """
    runs = [read_run(pathlib.Path(workdir), name) for workdir, name in zip(workdirs, _names(workdirs), strict=True)]
    grid = None if samples_dir is None else pathlib.Path(samples_dir) / "grid.png"
    if grid is not None and not grid.is_file():
        raise ValueError(f"{grid} does not exist: {samples_dir} must be the --output of `dit-jax sample`")
    figures = {run.name: run_figures(run) for run in runs}
    output = pathlib.Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text_whole(output, _page(runs, figures, grid))
    if charts_dir is not None:
        write_charts(runs, pathlib.Path(charts_dir))
    return figures


def write_charts(runs: Sequence[Run], folder: pathlib.Path) -> None:
    """Writes the charts of all metrics that the runs measured on held-out images, as SVG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, chart in _compared_charts(runs):
        write_text_whole(folder / f"{file_name(name)}.svg", standalone(chart, _metric_label(name), RUN_COLOURS))
    evaluated = _evaluated(runs)
    for axis, chart in comparison_charts(evaluated).items() if len(evaluated) > 1 else ():
        card = evaluated[0].card
        title = figure_label(main_figure(card), card)
        path = folder / f"{file_name(main_figure(card))}_by_{axis}.svg"
        write_text_whole(path, standalone(chart, title, RUN_COLOURS))


def read_run(workdir: pathlib.Path, name: str) -> Run:
    """Returns what a workdir holds; raises ValueError if it is none, or has not measured anything yet."""
    config_file = workdir / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{workdir} is not a workdir (it has no config.json); give the --workdir of `dit-jax train`")
    config = read_json(config_file)
    if not isinstance(config, dict):
        raise ValueError(f"{config_file} must hold a run's config, not a {type(config).__name__}; restore it")
    if not isinstance(config.get("stage"), str) or type(config.get("seed", 0)) is not int:
        raise ValueError(f"{config_file} must hold a run's config, with its stage and a whole seed; restore it")
    rows = history.read_metrics(workdir)
    if not rows:
        raise ValueError(f"{workdir} has no metrics yet; train until the first log (config.training.log_every_steps)")
    pictures: dict[str, list[tuple[int, pathlib.Path]]] = {}
    for path in sorted((workdir / "samples").glob("*.png")):
        if match := re.fullmatch(r"(.+)_(\d+)", path.stem):
            pictures.setdefault(match[1], []).append((int(match[2]), path))
    pictures = {key: sorted(files) for key, files in pictures.items()}
    return Run(name, config, rows, pictures, read_result(workdir))


def run_figures(run: Run) -> dict[str, Any]:
    """Returns a run's figures: the last of each metric, and what the training took."""
    rates = [row["steps_per_second"] for row in run.rows if "steps_per_second" in row]
    figures: dict[str, Any] = {"stage": run.config.get("stage"), "steps": max(row["step"] for row in run.rows)}
    figures["seconds"] = max(row["seconds"] for row in run.rows)
    if rates:
        figures["steps_per_second"] = statistics.median(rates)
    if "loss" in run.last("train"):
        figures["train_loss"] = run.last("train")["loss"]
    figures |= {f"eval_{name}": value for name, value in run.last("eval").items()}
    return figures | ({"result": run.result["values"]} if run.result else {})


def figure_lines(figures: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """Yields (run, figure, value) for people."""
    for run, values in figures.items():
        for name, value in values.items():
            split, _, metric = name.partition("_")
            if name == "seconds":
                minutes, seconds = divmod(round(value), 60)
                yield run, "time in training (evaluation included)", f"{minutes} min {seconds:02d} s"
            elif name == "result":
                for figure, number in value.items():
                    yield run, figure, f"{number:.4g}"
            elif name == "steps_per_second":
                yield run, "steps per second (median, evaluation left out)", f"{value:.3g}"
            elif split in SPLIT_LABELS:
                yield run, f"{SPLIT_LABELS[split]} {_metric_label(metric)}", f"{value:.4g}"
            else:
                yield run, name, f"{value:,}" if isinstance(value, int) else str(value)


def _names(workdirs: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Returns the directories' names, or their paths if two names are the same."""
    names = [pathlib.Path(workdir).resolve().name for workdir in workdirs]
    return names if len(set(names)) == len(names) else [str(workdir) for workdir in workdirs]


def _page(runs: list[Run], figures: dict[str, dict[str, Any]], grid: pathlib.Path | None) -> str:
    title = html.escape(f"dit_jax: {', '.join(run.name for run in runs)}")
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">',
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>",
    ]
    if grid is not None:
        parts += ["<h2>Samples</h2>", _picture(grid, "drawn from the trained model")]
    parts += ["<h2>Measured</h2>", _table(("run", "figure", "value"), figure_lines(figures)), *_results(runs)]
    for stage in sorted({str(run.config.get("stage")) for run in runs}):
        alike = [run for run in runs if run.config.get("stage") == stage]
        if len(alike) > 1:
            parts += ["<h2>Compared on held-out images</h2>", _comparison(alike)]
    for run in runs:
        parts += [f"<h2>{html.escape(run.name)}</h2>", _charts(run), _pictures(run), _config(run)]
    versions = [("Python", platform.python_version()), *_versions()]
    note = "Of the environment that wrote this page:"
    parts += ["<h2>Versions</h2>", f'<p class="note">{note}</p>', _table(("package", "version"), versions)]
    return "\n".join([*parts, "</body></html>\n"])


def _evaluated(runs: Sequence[Run]) -> list[EvaluatedRun]:
    return [EvaluatedRun(run.name, run.config.get("seed", 0), run.result) for run in runs if run.result is not None]


def _results(runs: Sequence[Run]) -> Iterator[str]:
    """Yields the runs' evaluations: one with its card, several beside each other."""
    evaluated = _evaluated(runs)
    if len(evaluated) == 1:
        card = evaluated[0].card
        lines = list(table(card))
        count = len(card["values"]) + len(card["left_out"]) + len(card["notes"])
        yield f"<h2>Evaluation of {html.escape(evaluated[0].name)}</h2>"
        yield _table(("figure", "value"), lines[:count])
        yield f"<details><summary>protocol</summary>{_table(('key', 'value'), lines[count:])}</details>"
    elif evaluated:
        heading, *rows = comparison_table(evaluated)
        yield f"<h2>Evaluations compared</h2>{_table(heading, rows)}"
        keys = "".join(f'<span class="key">seed {seed}</span>' for seed in sorted({run.seed for run in evaluated}))
        charts = [
            f'<figure class="compared"><h3>{html.escape(heading[-1])}{keys}</h3>{chart}</figure>'
            for chart in comparison_charts(evaluated).values()
        ]
        yield f'<div class="row">{"".join(charts)}</div>'


def _table(header: Sequence[str], rows: Any) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = []
    for row in rows:
        cells = [f"<td>{html.escape(cell)}</td>" for cell in row[:-1]]
        body.append(f'<tr>{"".join(cells)}<td class="number">{html.escape(row[-1])}</td></tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _charts(run: Run) -> str:
    names = {name: None for row in run.rows for name in row if name not in history.NOT_METRICS}  # in order, each once
    charts = []
    for name in sorted(names, key=lambda name: (name not in FIRST_CHARTS, list(names).index(name))):
        series = {
            label: [(row["step"], row[name]) for row in run.rows if row["split"] == split and name in row]
            for split, label in SPLIT_LABELS.items()
        }
        if chart := line_chart(series):
            keys = "".join(f'<span class="key {label}">{label}</span>' for label, points in series.items() if points)
            heading = f"<h3>{html.escape(_metric_label(name))}{keys}</h3>"
            charts.append(f"<figure>{heading}{chart}</figure>")
    return f'<div class="row">{"".join(charts)}</div>'


def _comparison(runs: Sequence[Run]) -> str:
    charts = []
    for name, chart in _compared_charts(runs):
        keys = "".join(f'<span class="key">{html.escape(run.name)}</span>' for run in runs)
        charts.append(f'<figure class="compared"><h3>{html.escape(_metric_label(name))}{keys}</h3>{chart}</figure>')
    return f'<div class="row">{"".join(charts)}</div>'


def _compared_charts(runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
    """Yields (metric, chart) of what the runs measured on held-out images, a line a run."""
    for name in runs[0].last("eval"):
        points = lambda run, name=name: [(r["step"], r[name]) for r in run.rows if r["split"] == "eval" and name in r]  # noqa: E731
        if chart := line_chart({run.name: points(run) for run in runs}):
            yield name, chart


def _pictures(run: Run) -> str:
    parts = []
    for name, files in run.pictures.items():
        shown = files if len(files) == 1 else [files[0], files[-1]]
        pictures = [_picture(path, f"{name}, step {step:,}") for step, path in shown]
        parts.append(f'<div class="row">{"".join(pictures)}</div>')
    return "".join(parts)


def _picture(path: pathlib.Path, caption: str) -> str:
    size = path.stat().st_size
    if size > MAX_PICTURE_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, more than the {MAX_PICTURE_BYTES:,} of a picture here; remove it")
    content = path.read_bytes()
    try:
        width, height = PIL.Image.open(io.BytesIO(content), formats=("PNG",)).size
    except Exception as error:  # of a broken file Pillow raises OSError, SyntaxError, struct.error and others
        raise ValueError(f"{path} is not a PNG picture ({error}); remove it") from error
    source = "data:image/png;base64," + base64.b64encode(content).decode("ascii")
    caption = html.escape(caption)
    image = f'<img src="{source}" width="{width}" height="{height}" alt="{caption}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _config(run: Run) -> str:
    table = _table(("key", "value"), [(f"config.{key}", json.dumps(value)) for key, value in _leaves(run.config)])
    return f"<details><summary>config</summary>{table}</details>"


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        elif value is not None:  # a section of another stage
            yield f"{prefix}{key}", value


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue


def _metric_label(name: str) -> str:
    return METRIC_LABELS.get(name, name.replace("_", " "))
