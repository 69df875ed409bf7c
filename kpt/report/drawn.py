"""Curves as a file: SVG, which kpt writes by itself, or PNG by matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from kpt.errors import KptError, MissingDependencyError
from kpt.report.svg import Line, line_chart, save

# As in chart.css, in its light theme: a PNG has but one.
_STYLES = {"before": ("#b9a36a", 4.0, "-"), "after": ("#1d5fa8", 1.3, "-"), "limit": ("#a3231d", 1.3, "--")}


def drawable(path: Path) -> None:
    """Whether `draw` can write there, asked before what takes minutes.

    Raises:
      KptError: the name ends in neither .svg nor .png, or its folder is not there.
      MissingDependencyError: a PNG was asked for, and matplotlib is not installed.
    """
    asked = f"A chart was to be written to {path}"
    if path.suffix.lower() not in (".svg", ".png"):
        raise KptError(asked, "Charts are SVG or PNG", "Let the name end in .svg or .png")
    if not path.resolve().parent.is_dir():
        raise KptError(asked, f"There is no folder {path.parent}", "Make it, or name another")
    if path.suffix.lower() == ".png" and importlib.util.find_spec("matplotlib") is None:
        advice = "pip install matplotlib, or let the name end in .svg"
        raise MissingDependencyError(asked, "matplotlib, which draws PNG, is not installed", advice)


def draw(lines: Sequence[Line], path: Path, *, title: str, description: str, x_label: str, y_label: str) -> None:
    """Writes curves with title, names of the axes and a legend.

    Args:
      description: of an SVG, for readers who cannot see it; below a PNG's title.

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
