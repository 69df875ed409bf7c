"""A measured run, and what makes two of them comparable."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import math
import platform
import statistics
import subprocess
import uuid
from collections.abc import Mapping
from typing import Any

from kpt._version import __version__
from kpt.errors import StoreError
from kpt.ops.base import Spec
from kpt.strategy import Plan, wire
from kpt.tuning.measurements import AS_CALLED, FORWARD


@dataclasses.dataclass(frozen=True)
class Run:
    """One measured run of one program, in one process.

    Attributes:
      name: of the function or model, or of the benchmark's row.
      seconds: latency samples, in the order in which they were taken.
      fingerprint: of the model, see `fingerprint`; "" where there is none.
      measured: "forward", "forward and backward", or "as called".
      plan: its hash; "" without a plan.
      throughput, unit: work per second, "FLOP/s" or another; None where it makes no sense.
      memory: bytes that the program needs besides its arguments; None where unknown.
      error: largest relative error against the reference; None where not compared.
      hardware: name of the profile.
      device: what the driver calls it.
      machine: the host's name: noise is a machine's own.
      versions: of the packages that decide, by name.
      commit: of the current directory's repository, with "+" where files differ from it; None outside of one.
      label: the user's own name for a group of runs.
      recorded: when, UTC, ISO 8601.
      id: of this run.
    """

    name: str
    seconds: tuple[float, ...]
    fingerprint: str = ""
    measured: str = FORWARD
    plan: str = ""
    throughput: float | None = None
    unit: str = ""
    memory: int | None = None
    error: float | None = None
    hardware: str = ""
    device: str = ""
    machine: str = dataclasses.field(default_factory=platform.node)
    versions: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"kpt": __version__})
    commit: str | None = dataclasses.field(default_factory=lambda: commit())
    label: str | None = None
    recorded: str = dataclasses.field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat())
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex[:12])

    def __post_init__(self) -> None:
        if not self.seconds or not all(0 < s < math.inf for s in self.seconds):
            raise StoreError(f"A run of {self.name} was described", "Its samples are one or more positive, finite times", "Pass seconds")

    @property
    def median(self) -> float:
        """Seconds of a call."""
        return statistics.median(self.seconds)

    @property
    def series(self) -> tuple[str, str, str, str, str]:
        """Runs that agree in this are measurements of the same thing on the same machine."""
        measured = FORWARD if self.measured == AS_CALLED else self.measured  # which it was called in older histories
        return self.name, self.fingerprint, measured, self.hardware, self.machine

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Run:
        """Inverse of `to_json`; fields of a later version are left out."""
        known = {f.name for f in dataclasses.fields(cls)}
        fields = {k: v for k, v in data.items() if k in known}
        return cls(**fields | {"seconds": tuple(fields["seconds"])})


def fingerprint(plan: Plan, parameters: Mapping[str, Spec] | None = None) -> str:
    """Identity of a model, the same in every process and whichever kernels run it.

    A hash of the program's name and framework, of each site that was found (with a kernel or as written: op, structure of the code,
    place, parameters, shapes and dtypes), and of the shapes and dtypes of further parameters.
    """
    sites = sorted(
        # What was left by an estimate is known by its op alone: its arrays came into plans later than histories began.
        json.dumps([s.op, s.fingerprint, s.path, *(wire.encode(x if s.fingerprint else {}) for x in (s.params, s.specs))], sort_keys=True)
        for s in (*plan.sites, *plan.skipped)
    )
    shapes = sorted((name, list(spec.shape), spec.dtype) for name, spec in (parameters or {}).items())
    text = json.dumps([plan.function, plan.framework, sites, shapes])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def commit() -> str | None:
    """Of the repository that the current directory is in."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=False)

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        if head.returncode:
            return None
        return head.stdout.strip() + ("+" if git("diff-index", "--quiet", "HEAD").returncode else "")
    except (OSError, subprocess.TimeoutExpired):  # no git
        return None
