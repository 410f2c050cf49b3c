"""Line charts as inline SVG: static, without a drawing library, in the colours of the page around them."""

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 18, 12, 34  # margins around the plot
MAX_POINTS = 400  # of a line; longer series are averaged in bins
MAX_MARKED_POINTS = 40  # of a line whose points are marked one by one
MAX_VALUE = 1e100  # of what is drawn: sums and ticks of larger ones overflow; NaN is not below it either
LOG_RATIO = 10.0  # positive values that span more than this get a logarithmic axis

Points = Sequence[tuple[float, float]]  # (step, value)


def line_chart(series: Mapping[str, Points], x_label: str = "step", logarithmic_x: bool = False) -> str:
    """Returns an <svg> of named lines; CSS classes `line NAME` give the colours. "" if no value is finite."""
    lines = {name: _thin([(x, y) for x, y in points if abs(y) < MAX_VALUE]) for name, points in series.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    values = [y for points in lines.values() for _, y in points]
    steps = [x for points in lines.values() for x, _ in points]
    logarithmic = min(values) > 0 and max(values) / min(values) > LOG_RATIO
    to_axis, to_x = (math.log10 if log else float for log in (logarithmic, logarithmic_x))
    low, high = _padded(to_axis(min(values)), to_axis(max(values)))
    first, last = min(0, *steps), max(max(steps), 1)
    if logarithmic_x:
        first, last = _padded(to_x(min(steps)), to_x(max(steps)))

    def across(x: float) -> float:
        return LEFT + (to_x(x) - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - (to_axis(y) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(", ".join(lines))}">']
    for tick in _log_ticks(low, high) if logarithmic else _ticks(low, high):
        y = up(tick)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in _log_ticks(first, last) if logarithmic_x else _ticks(first, last):
        text = f"{tick:,.0f}" if tick == round(tick) else f"{tick:.4g}"
        parts.append(f'<text x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{text}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{html.escape(x_label)}</text>')
    for name, points in lines.items():
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="line {html.escape(name)}" points="{path}"/>')
        for x, y in points if len(points) <= MAX_MARKED_POINTS else ():
            circle = f'<circle class="point {html.escape(name)}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.5">'
            parts.append(f"{circle}<title>{html.escape(name)}, {html.escape(x_label)} {x:,g}: {y:.5g}</title></circle>")
    return "".join([*parts, "</svg>"])


def standalone(chart: str, title: str, colours: Sequence[str]) -> str:
    """Returns a chart of `line_chart` as an SVG file: its lines in these colours, with their names and a title."""
    names = html.unescape(chart.partition('aria-label="')[2].partition('"')[0]).split(", ")
    beside = len(names) <= 3  # the title; more names have rows of their own below it
    header = 24 if beside else 24 + 18 * math.ceil(len(names) / 3)
    height = HEIGHT + header
    style = "svg { background: #fff; font: 11px sans-serif; } .rule { stroke: #dfe3e8; } text { fill: #66707f; } "
    style += "circle { display: none; } .line { fill: none; stroke-width: 2; } "
    style += "".join(f"polyline:nth-of-type({i}) {{ stroke: {c}; }} " for i, c in enumerate(colours, start=1))
    parts = [f'<text x="{LEFT}" y="16" font-weight="bold">{html.escape(title)}</text>']
    for i, (name, colour) in enumerate(zip(names, colours, strict=False)):
        x, y = (WIDTH - RIGHT - 90 * (len(names) - i), 16) if beside else (LEFT + 128 * (i % 3), 34 + 18 * (i // 3))
        parts.append(f'<rect x="{x}" y="{y - 5}" width="14" height="3" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20}" y="{y}">{html.escape(name)}</text>')
    inner = chart.partition(">")[2].removesuffix("</svg>")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
        f'<style>{style}</style>{"".join(parts)}<g transform="translate(0 {header})">{inner}</g></svg>\n'
    )


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= MAX_POINTS:
        return points
    return [tuple(chunk.mean(axis=0)) for chunk in np.array_split(np.array(points, np.float64), MAX_POINTS)]


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    spacing = (high - low) / count
    power = 10.0 ** math.floor(math.log10(spacing))
    spacing = next(m * power for m in (1, 2, 5, 10) if m * power >= spacing)
    return [i * spacing for i in range(math.ceil(low / spacing), math.floor(high / spacing) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Returns powers of ten within 10^low..10^high, with 2 and 5 times them where they are few."""
    multiples = (1, 2, 5) if high - low < 3 else (1,)
    ticks = [m * 10.0**power for power in range(math.floor(low), math.ceil(high)) for m in multiples]
    return [tick for tick in ticks if low <= math.log10(tick) <= high]
