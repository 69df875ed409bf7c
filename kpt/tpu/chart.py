"""A schedule as a picture."""

from __future__ import annotations

from kpt.report import Line, line_chart
from kpt.tpu.schedule import Schedule


def chart(schedule: Schedule) -> str:
    """SVG: how full the MXU, the VPU and the loads and stores are, along the program."""
    xs = [x for s in schedule.stretches for x in (s.start, s.start + s.bundles)]

    def along(*units: str) -> list[float]:
        return [100 * max(s.occupancy[u] for u in units) for s in schedule.stretches for _ in range(2)]

    lines = [
        Line("MXU", xs, along("MXU"), "after"),
        Line("VPU", xs, along("VPU"), "before"),
        Line("load or store", xs, along("load", "store"), "limit"),
    ]
    return line_chart(
        lines,
        title=f"{schedule.kernel} on TPU {schedule.generation}",
        description=", ".join(f"{u} {v:.0%} of the time" for u, v in schedule.occupancy.items()),
        x_label="bundle",
        y_label="% of slots used",
    )
