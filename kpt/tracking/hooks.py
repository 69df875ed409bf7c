"""What `auto_optimize` and `kpt bench` call when they have measured. KPT_RECORD=off turns it off; a failure here is a warning."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from kpt._version import __version__
from kpt.config import setting
from kpt.tracking.history import record
from kpt.tracking.run import Run, commit, fingerprint

if TYPE_CHECKING:
    from kpt.auto import Report


def record_report(report: Report) -> None:
    """What `auto_optimize` measured of the function that is in force: the rewrite, or the original that was kept."""
    _recorded(lambda: [_of_report(report)])


def record_bench(rows: Iterable[Any], hardware: str, device: str, versions: Mapping[str, str]) -> None:
    """The contenders of `kpt bench` that were measured, each a series of its own.

    Args:
      rows: `kpt_jax.bench.Row`s, with their samples.
    """
    _recorded(lambda: _of_bench(rows, hardware, device, versions))


def _recorded(made: Callable[[], list[Run]]) -> None:
    try:
        if setting("record", os.environ) == "on" and (runs := made()):
            record(*runs)
    except Exception as problem:  # whatever it is, the measurement was made, and is worth more than its record
        warnings.warn(f"A run was not recorded: {problem}", stacklevel=4)


def _of_report(report: Report) -> Run:
    plan = report.plan
    return Run(
        plan.function,
        report.seconds_after if report.kept else report.seconds_before,
        fingerprint(plan),
        report.measured,
        plan.hash,
        memory=report.peak_memory[1],
        error=report.max_error,
        hardware=report.hardware,
        device=report.device,
        versions={"kpt": __version__, **plan.versions},
    )


def _of_bench(rows: Iterable[Any], hardware: str, device: str, versions: Mapping[str, str]) -> list[Run]:
    here = commit()
    return [
        Run(
            f"{r.bench} {'x'.join(map(str, r.shape))} {r.dtype}: {r.contender}",
            tuple(r.seconds),
            measured=r.passes.replace("+", " and "),
            throughput=r.rate,
            unit=r.unit,
            memory=r.memory,
            error=r.error,
            hardware=hardware,
            device=device,
            versions={"kpt": __version__, **versions},
            commit=here,
        )
        for r in rows
        if r.problem is None
    ]
