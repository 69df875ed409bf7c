"""Charts as SVG text. Colours come from a style sheet, the page's or that of the file, so that they follow a light or dark theme."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 44
HEADING = 28


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve, or with `dots` its points alone. `style` is a class of the style sheet: "before", "after", "limit"."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str
    dots: bool = False


@dataclasses.dataclass(frozen=True)
class Bar:
    """A horizontal bar from zero to `value`, with the words beside it and, if given, a whisker from `low` to `high`."""

    label: str
    value: float
    text: str
    style: str
    low: float | None = None
    high: float | None = None


def line_chart(
    lines: Sequence[Line], *, title: str, description: str, x_label: str, y_label: str, log_x: bool = False, log_y: bool = False
) -> str:
    """Curves over a common x axis.

    Values that have no place on the chart (not finite; not positive on a logarithmic axis) break the curve.

    Args:
      title, description: for readers who cannot see the chart.
      log_x, log_y: powers of ten on that axis; xs are positive on a logarithmic one.
    """

    def place(y: float) -> float | None:
        if not math.isfinite(y) or (log_y and y <= 0):
            return None
        return math.log10(y) if log_y else y

    values = [v for line in lines for y in line.ys if (v := place(y)) is not None] or [0.0, 1.0]
    xs = [math.log10(x) if log_x else x for line in lines for x in line.xs] or [0.0, 1.0]
    y_ticks = _decades(min(values), max(values)) if log_y else ticks(min(values), max(values))
    x_ticks = _decades(min(xs), max(xs)) if log_x else ticks(min(xs), max(xs))
    if all(float(x).is_integer() for x in xs):  # runs are counted
        x_ticks = [t for t in x_ticks if round(t, 9).is_integer()]
    low, high = min(y_ticks[0], *values), max(y_ticks[-1], *values)
    left, right = min(xs), max(max(xs), min(xs) + 1e-9)

    def px(x: float) -> float:
        """Of a place on the axis: on a logarithmic one, of the logarithm."""
        return LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def py(v: float) -> float:
        return TOP + (high - v) / max(high - low, 1e-30) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for t in y_ticks:
        name = f"1e{round(t)}" if log_y else _number(t, y_ticks)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(t):.1f}" y2="{py(t):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{py(t) + 4:.1f}" text-anchor="end">{name}</text>')
    for t in (t for t in x_ticks if left <= t <= right):
        anchor = f'x="{px(t):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle"'
        parts.append(f'<text class="tick" {anchor}>{f"1e{round(t)}" if log_x else _number(t, x_ticks)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text class="label" x="14" y="{(TOP + HEIGHT - BOTTOM) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 14 {(TOP + HEIGHT - BOTTOM) / 2})">{escape(y_label)}</text>'
    )
    for line in lines:
        path, pen = [], "M"
        for x, y in zip(line.xs, line.ys, strict=True):
            v = place(y)
            if v is None:
                pen = "M"
                continue
            x = math.log10(x) if log_x else x
            # A path of no length under a round pen is a dot.
            path.append(f"M{px(x):.1f} {py(v):.1f}h0" if line.dots else f"{pen}{px(x):.1f} {py(v):.1f}")
            pen = "L"
        kind = "dots" if line.dots else "line"
        parts.append(f'<path class="{kind} {line.style}" d="{" ".join(path)}"/>')
    return _svg(parts, HEIGHT, title, description)


def bar_chart(bars: Sequence[Bar], *, title: str, description: str) -> str:
    """Horizontal bars on one scale from zero, each with its words."""
    row, height = 52, 52 * len(bars) + 8
    # The words stand right of the bar or its whisker; the longest decides how much room bars have.
    room = WIDTH - 24 - 8 * max(len(b.text) for b in bars)
    largest = max(max(b.value, b.high or 0.0) for b in bars) or 1.0
    parts = []
    for i, b in enumerate(bars):
        top, length = i * row + 24, b.value / largest * room
        end = length
        parts.append(f'<text class="label" x="0" y="{top - 6}">{escape(b.label)}</text>')
        parts.append(f'<rect class="bar {b.style}" x="0" y="{top}" width="{max(length, 1):.1f}" height="20" rx="2"/>')
        if b.low is not None and b.high is not None:
            low, high, middle = b.low / largest * room, b.high / largest * room, top + 10
            end = max(end, high)
            d = f"M{low:.1f} {middle}L{high:.1f} {middle}M{low:.1f} {middle - 5}v10M{high:.1f} {middle - 5}v10"
            # Light on dark, or dark on light, whatever the bar under it is.
            parts.append(f'<path class="halo" d="{d}"/><path class="whisker" d="{d}"/>')
        parts.append(f'<text class="value" x="{end + 10:.1f}" y="{top + 15}">{escape(b.text)}</text>')
    return _svg(parts, height, title, description)


def save(chart: str, path: str | os.PathLike[str], lines: Sequence[Line] = ()) -> None:
    """Writes a chart as a file of its own: with its style sheet, its title above it, and below it the names of its `lines`."""
    width, height = map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', chart).groups())  # type: ignore[union-attr]
    step, y, names = width // max(len(lines), 1), height + 12, []
    for i, line in enumerate(lines):
        x = i * step + 8
        names.append(f'<path class="{"dots" if line.dots else "line"} {line.style}" d="M{x} {y}h{0 if line.dots else 26}"/>')
        names.append(f'<text class="label" x="{x + 36}" y="{y + 4}">{escape(line.label)}</text>')
    style = Path(__file__).with_name("chart.css").read_text(encoding="utf-8")
    whole = HEADING + height + 24 * bool(lines)
    chart = chart.replace(f'viewBox="0 0 {width} {height}"', f'viewBox="0 {-HEADING} {width} {whole}"', 1)
    title = re.search(r"<title>(.*?)</title>", chart, re.DOTALL).group(1)  # type: ignore[union-attr]
    names.append(f'<text class="value" x="8" y="{20 - HEADING}">{title}</text>')
    head, rest = chart.split(">", 1)
    background = f'<rect y="{-HEADING}" width="100%" height="100%" fill="var(--page)"/>'
    text = f"{head}>\n<style>\n{style}</style>\n{background}{rest.removesuffix('</svg>')}" + "\n".join([*names, "</svg>\n"])
    Path(path).write_text(text, encoding="utf-8")


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that span [low, high]; at least two."""
    if not high > low:
        low, high = low - (abs(low) or 1.0) / 2, low + (abs(low) or 1.0) / 2
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(low), math.ceil(high)
    step = max(1, math.ceil((last - first) / 6))
    return (
        [float(i) for i in range(first, last + step, step)] if last > first else [first - 1.0, first + 0.0, first + 1.0]
    )


def _number(value: float, scale: Sequence[float]) -> str:
    step = scale[1] - scale[0] if len(scale) > 1 else 1.0
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _svg(parts: Sequence[str], height: int, title: str, description: str) -> str:
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" xmlns="http://www.w3.org/2000/svg">'
    return "\n".join((head, f"<title>{escape(title)}</title><desc>{escape(description)}</desc>", *parts, "</svg>"))
