"""Run history: what was measured when, on what, and whether it has become slower since."""

from kpt.tracking.history import History, compare, record, regressions
from kpt.tracking.run import Run, fingerprint
from kpt.tracking.statistics import Finding, Thresholds, Verdict, change_point, judge, mann_whitney

__all__ = [
    "Finding",
    "History",
    "Run",
    "Thresholds",
    "Verdict",
    "change_point",
    "compare",
    "fingerprint",
    "judge",
    "mann_whitney",
    "record",
    "regressions",
]
