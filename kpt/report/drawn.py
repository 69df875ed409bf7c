"""Charts as a file: SVG, which kpt writes by itself, or PNG or PDF by matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from kpt.errors import KptError, MissingDependencyError
from kpt.report.svg import Bar, Line, bar_chart, line_chart, save

_BY_MATPLOTLIB = (".png", ".pdf")
# As in chart.css, in its light theme: a PNG has but one.
_STYLES = {"before": ("#b9a36a", 4.0, "-"), "after": ("#1d5fa8", 1.3, "-"), "limit": ("#a3231d", 1.3, "--")}


def drawable(path: Path) -> None:
    """Whether `draw` and `draw_bars` can write there, asked before what takes minutes.

    Raises:
      KptError: the name ends in none of .svg, .png and .pdf, it is a folder's, or its folder is not there.
      MissingDependencyError: a PNG or PDF was asked for, and matplotlib is not installed.
    """
    asked = f"A chart was to be written to {path}"
    if path.is_dir():
        raise KptError(asked, "It is a folder", "Name a file in it")
    if path.suffix.lower() not in (".svg", *_BY_MATPLOTLIB):
        raise KptError(asked, "Charts are SVG, PNG or PDF", "Let the name end in .svg, .png or .pdf")
    if not path.resolve().parent.is_dir():
        raise KptError(asked, f"There is no folder {path.parent}", "Make it, or name another")
    if path.suffix.lower() in _BY_MATPLOTLIB and importlib.util.find_spec("matplotlib") is None:
        advice = "pip install matplotlib, or let the name end in .svg"
        raise MissingDependencyError(asked, "matplotlib, which draws PNG and PDF, is not installed", advice)


def draw(lines: Sequence[Line], path: Path, *, title: str, description: str, x_label: str, y_label: str) -> None:
    """Writes curves with title, names of the axes and a legend.

    Args:
      description: of an SVG, for readers who cannot see it; elsewhere below the title.

    Raises:
      KptError, MissingDependencyError: as `drawable`.
    """
    drawable(path)
    if path.suffix.lower() == ".svg":
        save(line_chart(lines, title=title, description=description, x_label=x_label, y_label=y_label), path, lines)
        return
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    for line in lines:
        colour, width, dashes = _STYLES[line.style]
        axes.plot(line.xs, line.ys, color=colour, linewidth=width, linestyle="" if line.dots else dashes,
                  marker="o" if line.dots else "", label=line.label)  # fmt: skip
    figure.suptitle(title)
    axes.set_title(description, fontsize=8)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=max(len(lines), 1), frameon=False)
    figure.savefig(path, dpi=110)


def draw_bars(bars: Sequence[Bar], path: Path, *, title: str, description: str) -> None:
    """Writes horizontal bars on one scale from zero, each with its words.

    Args:
      description: of an SVG, for readers who cannot see it.

    Raises:
      KptError, MissingDependencyError: as `drawable`.
    """
    drawable(path)
    if path.suffix.lower() == ".svg":
        save(bar_chart(bars, title=title, description=description), path)
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.8 + 0.35 * len(bars)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh(range(len(bars)), [b.value for b in bars], color=[_STYLES[b.style][0] for b in bars])
    axes.bar_label(drawn, [b.text for b in bars], padding=3)
    axes.set_yticks(range(len(bars)), [b.label for b in bars])
    axes.invert_yaxis()  # the first on top, as in the SVG
    axes.margins(x=0.1)
    axes.set_title(title)
    figure.savefig(path, dpi=110)
