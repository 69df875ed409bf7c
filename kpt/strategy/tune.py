"""Calls of ops, and the kernels that could compute each, timed against each other; what is found is kept for every later plan."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kpt import kernels as kernel_room
from kpt.hardware import HardwareProfile
from kpt.ops.base import Specs
from kpt.strategy.plan import Site
from kpt.strategy.planner import place_of
from kpt.tuning import Measurements, trials
from kpt.tuning.trials import Outcome, Trial

log = logging.getLogger("kpt")


@dataclasses.dataclass(frozen=True)
class Tuned:
    """Attributes:
    measured: calls whose candidates were timed now.
    known: calls whose candidates had been timed before.
    left: calls that the budget did not reach.
    failed: calls of whose candidates none was timed.
    dropped: kernels that failed at a call that they had accepted, by name, and how.
    seconds: that it took.
    """

    measured: int
    known: int
    left: int
    failed: int
    dropped: Mapping[str, str]
    seconds: float

    def notes(self) -> tuple[str, ...]:
        """For the plan."""
        said = []
        if self.measured or self.left or self.failed:
            after = f" The budget ended before {_calls(self.left)}, whose kernels are chosen by estimate." if self.left else ""
            none = f" None of {_calls(self.failed)} could be timed." if self.failed else ""
            said.append(f"Kernels of {_calls(self.measured)} were timed against each other, in {self.seconds:.1f} s.{none}{after}")
        said += [f"{kernel} is not used: it {why}." for kernel, why in self.dropped.items()]
        return tuple(said)


def _calls(n: int) -> str:
    return f"{n} kind{'' if n == 1 else 's'} of call"


@dataclasses.dataclass(frozen=True)
class Call:
    """What decides the time of an op's kernels."""

    op: str
    specs: Specs
    params: Mapping[str, Any]


def tune(
    calls: Iterable[Site | Call],
    hardware: HardwareProfile,
    *,
    here: HardwareProfile,
    framework: str,
    level: str,
    compilers: tuple[str, ...],
    passes: str,
    budget: float,
    device: str,
    module: str,
    ready: trials.Ready | None = None,
    done: Callable[[Trial, Outcome], None] = lambda trial, outcome: None,
) -> Tuned:
    """Times the candidates of every kind of call, those first that move most bytes.

    Args:
      calls: sites of a plan, or calls that may be met in one.
      here: what trials run on. For other hardware than this nothing is timed.
      framework: "jax" or "torch".
      level: of which the candidates are.
      compilers: packages on whose versions the time of a kernel depends.
      passes: "forward" or "forward and backward".
      budget: seconds.
      device: that the arrays of the trials are on, as the framework calls its kind.
      module: run in other processes for the trials.
      ready: to run them in this process instead, where the device cannot be shared.
    """
    start = time.monotonic()
    if hardware.name != here.name:
        return Tuned(0, 0, 0, 0, {}, 0.0)
    place, table = place_of(hardware, compilers), Measurements()
    count: dict[tuple, int] = collections.Counter()
    kinds: dict[tuple, Site | Call] = {}
    for call in calls:
        kind = call.op, tuple(call.specs.items()), repr(call.params)
        kinds.setdefault(kind, call)
        count[kind] += 1
    wanted: list[Trial] = []
    known = 0
    for kind in sorted(kinds, key=lambda k: -count[k] * _elements(kinds[k])):
        call = kinds[kind]
        dtype = next(iter(call.specs.values())).dtype
        able, _ = kernel_room.registry.able(call.op, hardware, dtype, call.specs, call.params, level, framework)
        able = [k for k in able if ready is not None or _importable(k.loader)]
        if len(able) < 2:
            continue
        if set(trials.known(table, place, able, call.specs, call.params, (passes,))) == {k.name for k in able}:
            known += 1
            continue
        wanted.append(Trial(call.op, call.specs, call.params, {k.name: k.loader for k in able}, passes, device))
    dropped: dict[str, str] = {}

    def kept(trial: Trial, outcome: Outcome) -> None:
        trials.keep(table, place, trial, outcome, {n: kernel_room.registry.get(n) for n in outcome.seconds})
        dropped.update(outcome.dropped)
        for kernel, why in outcome.dropped.items():
            log.warning("%s %s; it is not used", kernel, why)
        done(trial, outcome)

    outcomes = trials.run(wanted, module, budget, kept) if ready is None else trials.run_here(wanted, ready, budget, kept)
    measured, left = sum(bool(o and o.seconds) for o in outcomes), sum(o is None for o in outcomes)
    return Tuned(measured, known, left, len(wanted) - measured - left, dropped, time.monotonic() - start)


def _importable(loader: str) -> bool:
    """Whether another process finds the kernel: not what a notebook defined."""
    module = loader.partition(":")[0]
    try:
        return module != "__main__" and importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _elements(call: Site | Call) -> int:
    return sum(math.prod(s.shape) for s in call.specs.values())
