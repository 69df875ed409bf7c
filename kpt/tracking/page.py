"""Histories and comparisons as a page: one figure a series, its runs from left to right, and the level they are held against."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from kpt._version import __version__
from kpt.console import seconds, size
from kpt.report import Figure, Line, Report, Table, line_chart, write
from kpt.tracking.history import Comparison, by_series
from kpt.tracking.run import Run
from kpt.tracking.statistics import SEVERITIES, Thresholds, signed


def history_page(runs: Sequence[Run], path: Path, command: str) -> Path:
    """Writes every series of some runs as a page; returns its path."""
    series = by_series(runs)
    order = "in the order in which they were made."
    figures = [_figure(members, [], len(members), None, f"{_count(members)}, {order}") for members in series.values()]
    verdict = f"{_count(runs)} in {len(series)} series." if runs else "There are no runs yet."
    headline = ((str(len(runs)), "runs"), (str(len(series)), "series"))
    return write(Report("Run history", verdict, None, headline, _facts(runs), figures, None, command), path)


def comparison_page(
    found: Sequence[Comparison], path: Path, what: str, command: str, thresholds: Thresholds | None = None, failed: bool | None = None
) -> Path:
    """Writes comparisons as a page; returns its path.

    Args:
      what: the heading.
      failed: whether a gate failed on them; None for none.
    """
    limits = thresholds or Thresholds()
    figures = []
    for c in sorted(found, key=lambda c: c.worst.verdict not in SEVERITIES):
        words = f"{c.time.verdict.capitalize()}: {c.time.reason}"
        if c.memory is not None:
            words += f" Memory {c.memory.verdict}: {c.memory.reason}"
        if c.changed is not None:
            words += f" The level changed at run {c.changed.id}, commit {c.changed.commit or 'unknown'}."
        figures.append(_figure(c.before, c.after, c.time.baseline, limits, f"{words} {c.note}".strip()))
    slower = [c for c in found if c.worst.verdict in SEVERITIES]
    undecided = sum(c.worst.verdict == "not enough data" for c in found)
    verdict = f"{len(slower)} of {len(found)} series need more time or memory than before; {undecided} have too few runs to say."
    worst = max(found, key=lambda c: (c in slower, c.time.effect or 0.0), default=None)
    headline = [(str(len(slower)), "regressions"), (str(len(found)), "series")]
    if worst is not None and worst.time.effect is not None:
        headline.insert(0, (signed(worst.time.effect), f"time of {worst.name}"))
    runs = [r for c in found for r in (*c.before, *c.after)]
    facts = (*_facts(runs), ("Severities", f"minor from {limits.minor:.0%}, moderate from {limits.moderate:.0%}, "
                                           f"severe from {limits.severe:.0%}"))  # fmt: skip
    return write(Report(what, verdict, None if failed is None else not failed, headline, facts, figures, None, command), path)


def _count(runs: Sequence[Run]) -> str:
    return f"{len(runs)} run{'' if len(runs) == 1 else 's'}"


def _facts(runs: Sequence[Run]) -> tuple[tuple[str, str], ...]:
    def all_of(values: Sequence[str | None]) -> str:
        return ", ".join(sorted({v for v in values if v})) or "unknown"

    versions = runs[-1].versions if runs else {"kpt": __version__}
    return (
        ("Hardware", all_of([r.hardware for r in runs])),
        ("Machines", all_of([r.machine for r in runs])),
        ("Versions of the last run", ", ".join(f"{k} {v}" for k, v in versions.items())),
    )


def _figure(before: Sequence[Run], after: Sequence[Run], baseline: int, limits: Thresholds | None, caption: str) -> Figure:
    """Medians as dots, the quartiles of each run as two thin lines, and the level of the last `baseline` runs before."""
    runs = [*before, *after]
    last = runs[-1]
    scale, unit = next(((s, u) for s, u in ((1.0, "s"), (1e-3, "ms")) if last.median >= s), (1e-6, "µs"))
    xs = [float(i + 1) for i in range(len(runs))]
    quartiles = [statistics.quantiles(r.seconds, n=4, method="inclusive") if len(r.seconds) > 1 else [r.median] * 3 for r in runs]
    held = before[len(before) - baseline :]
    ends = [float(len(before) - baseline + 1), xs[-1]]
    level = statistics.median(r.median for r in held) / scale if held else None
    lines, legend = [], []
    if level is not None:
        lines.append(Line("level before", ends, [level, level], "before"))
        legend.append(("before", f"median of the {len(held)} runs before" if after else "median of the runs"))
    if level is not None and limits is not None:
        lines.append(Line("minor", ends, [level * (1 + limits.minor)] * 2, "limit"))
        legend.append(("limit", f"{limits.minor:.0%} above"))
    lines += [Line("quartile", xs, [q[i] / scale for q in quartiles], "after") for i in (0, 2)]
    lines.append(Line("median", xs, [q[1] / scale for q in quartiles], "after", dots=True))
    legend += [("after dots", "a run's median"), ("after", "its quartiles")]
    parts = [f"{_count(runs)}, the last with a median of {seconds(last.median)}."]
    if after and level is not None:
        parts.append(f"The {len(held)} runs before have a median of {seconds(level * scale)}.")
    rows = [
        (r.id, r.recorded[:16].replace("T", " "), seconds(q[1]), seconds(q[0]), seconds(q[2]), str(len(r.seconds)),
         "-" if r.memory is None else size(r.memory), r.commit or "-", r.label or "-")
        for r, q in zip(runs, quartiles, strict=True)
    ]  # fmt: skip
    columns = ("run", "recorded (UTC)", "median", "quartile", "quartile", "samples", "memory", "commit", "label")
    chart = line_chart(lines, title=f"Time of {last.name}, {last.measured}", description=" ".join(parts), x_label="run",
                       y_label=f"time of a call ({unit})")  # fmt: skip
    return Figure(f"{last.name}, {last.measured}", chart, caption, Table(columns, rows, frozenset({2, 3, 4, 5, 6})), legend)
