"""A schedule as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kpt.report import Line, draw, line_chart
from kpt.tpu.schedule import Schedule


def chart(schedule: Schedule) -> str:
    """SVG: how full the MXU, the VPU and the loads and stores are, along the program."""
    return line_chart(_lines(schedule), **_words(schedule))


def plot(schedule: Schedule, path: Path) -> None:
    """The same as a file, SVG or PNG by its name, with title and legend.

    Raises:
      KptError, MissingDependencyError: as `kpt.report.drawable`.
    """
    draw(_lines(schedule), path, **_words(schedule))


def _lines(schedule: Schedule) -> list[Line]:
    xs = [x for s in schedule.stretches for x in (s.start, s.start + s.bundles)]

    def along(*units: str) -> list[float]:
        return [100 * max(s.occupancy[u] for u in units) for s in schedule.stretches for _ in range(2)]

    return [
        Line("MXU", xs, along("MXU"), "before"),
        Line("VPU", xs, along("VPU"), "after"),
        Line("load or store, the fuller", xs, along("load", "store"), "limit"),
    ]


def _words(schedule: Schedule) -> dict[str, Any]:
    return {
        "title": f"{schedule.kernel} on TPU {schedule.generation}: {schedule.cycles:,.0f} cycles, bound by {schedule.bound}",
        "description": "Of all cycles: " + ", ".join(f"{u} {v:.0%}" for u, v in schedule.occupancy.items()),
        "x_label": "place in the program, bundles (one is issued a cycle; those of a loop are issued again and again)",
        "y_label": "busy, % of what the unit can take",
    }
