"""A schedule as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kpt.report import Line, draw, line_chart
from kpt.tpu.schedule import Schedule

STYLES = ("after", "before", "limit")


def chart(schedule: Schedule) -> str:
    """SVG: how full the three fullest units are, along the program."""
    return line_chart(_lines(schedule), **_words(schedule))


def plot(schedule: Schedule, path: Path) -> None:
    """The same as a file, SVG or PNG by its name, with title and legend.

    Raises:
      KptError, MissingDependencyError: as `kpt.report.drawable`.
    """
    draw(_lines(schedule), path, **_words(schedule))


def _lines(schedule: Schedule) -> list[Line]:
    xs = [x for s in schedule.stretches for x in (s.start, s.start + s.bundles)]

    fullest = sorted(schedule.occupancy, key=lambda unit: -schedule.occupancy[unit])[: len(STYLES)]
    return [
        Line(unit, xs, [100 * s.occupancy[unit] for s in schedule.stretches for _ in range(2)], style)
        for unit, style in zip(fullest, STYLES, strict=True)
    ]


def _words(schedule: Schedule) -> dict[str, Any]:
    return {
        "title": f"{schedule.kernel} on TPU {schedule.generation}: {schedule.cycles:,.0f} cycles, bound by {schedule.bound}",
        "description": "Of all cycles: " + ", ".join(f"{u} {v:.0%}" for u, v in schedule.occupancy.items()),
        "x_label": "place in the program, bundles (one is issued a cycle; those of a loop are issued again and again)",
        "y_label": "busy, % of what the unit can take",
    }
