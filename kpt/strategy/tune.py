"""Calls of ops, and the kernels that could compute each, timed against each other; what is found is kept for every later plan."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from kpt import kernels as kernel_room
from kpt.errors import KptError
from kpt.hardware import HardwareProfile
from kpt.kernels import KernelSpec
from kpt.kernels.spec import ORIGINAL
from kpt.ops.base import Specs
from kpt.strategy import wire
from kpt.strategy.plan import Plan, Site, differentiated
from kpt.strategy.planner import place_of
from kpt.tuning import Measurements, trials
from kpt.tuning.exchange import Contest, Environment
from kpt.tuning.measurements import BOTH, FORWARD
from kpt.tuning.settings import Setting, instead
from kpt.tuning.trials import Outcome, Trial

log = logging.getLogger("kpt")
AGAIN = 300.0
"""Seconds that a sample of an import may take to be measured again."""


@dataclasses.dataclass(frozen=True)
class Tuned:
    """Attributes:
    measured: calls whose candidates were timed now.
    known: calls whose candidates had been timed before.
    left: calls that the budget did not reach.
    failed: calls of whose candidates none was timed.
    dropped: kernels that failed at a call that they had accepted, by name, and how.
    seconds: of the budget that it took; the start of the processes that timed them came besides.
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


@dataclasses.dataclass(frozen=True)
class Runner:
    """Where and how a front end runs trials.

    Attributes:
      framework: "jax" or "torch".
      hardware: what trials run on.
      compilers: packages on whose versions the time of a kernel depends.
      device: that the arrays of the trials are on, as the framework calls it, with its number on this host.
      module: run in other processes for the trials.
      ready: to run them in this process instead, where the device cannot be shared.
      known: what a program can set that changes times or numbers.
      settings: of that, what is set otherwise than by default, by name.
    """

    framework: str
    hardware: HardwareProfile
    compilers: tuple[str, ...]
    device: str
    module: str
    ready: trials.Ready | None = None
    known: tuple[Setting, ...] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def place(self) -> trials.Place:
        return place_of(self.hardware, self.compilers, self.known, self.settings)

    def trial(self, call: Site | Call, kernels: Iterable[KernelSpec], passes: str) -> Trial:
        return Trial(call.op, call.specs, call.params, {k.name: k.loader for k in kernels}, passes, self.device, self.settings)

    def under(self, settings: Mapping[str, Any]) -> Runner | None:
        """This runner with those settings of what measurements are kept apart by; None where they cannot be had."""
        made = instead(self.known, self.settings, settings)
        if made is None or self.ready is not None and made != self.settings:  # what this process has set is its user's
            return None
        return dataclasses.replace(self, settings=made)

    def finds(self, kernel: KernelSpec) -> bool:
        """Whether the process that runs the trials finds the kernel: another one does not find what a notebook defined."""
        return self.ready is not None or _importable(kernel.loader)

    def run(
        self, wanted: Sequence[Trial], budget: float, done: Callable[[Trial, Outcome], None] = lambda trial, outcome: None,
        up: Callable[[float], None] = lambda seconds: None,
    ) -> list[Outcome | None]:  # fmt: skip
        """As `kpt.tuning.trials.run`."""
        if self.ready is None:
            return trials.run(wanted, self.module, budget, done, up=up)
        return trials.run_here(wanted, self.ready, budget, done)


def tune(
    calls: Iterable[Site | Call],
    hardware: HardwareProfile,
    runner: Runner,
    *,
    level: str,
    trained: bool,
    budget: float,
    done: Callable[[Trial, Outcome], None] = lambda trial, outcome: None,
) -> Tuned:
    """Times the candidates of every kind of call that has several, or one of another package; those first that move most bytes, and last
    those whose code stays by the estimate.

    Args:
      calls: sites of a plan, or calls that may be met in one.
      hardware: of the plan. For other hardware than the runner's nothing is timed.
      level: of which the candidates are.
      trained: whether backward passes are timed, too. They are in any case of what a site computes in what a program takes gradients of.
      budget: seconds, besides the start of the processes that time them.
    """
    start = time.monotonic()
    if hardware.name != runner.hardware.name:
        return Tuned(0, 0, 0, 0, {}, 0.0)
    place, table = runner.place, Measurements()
    count: dict[tuple, int] = collections.Counter()
    kinds: dict[tuple, Site | Call] = {}
    backward: set[tuple] = set()  # once is enough: outside of what is differentiated, too, these times come first
    for call in calls:
        kind = call.op, tuple(call.specs.items()), repr(call.params)
        kinds.setdefault(kind, call)
        count[kind] += 1
        if trained or (isinstance(call, Site) and differentiated(call.path)):
            backward.add(kind)
    wanted: list[Trial] = []
    known = 0
    for kind in sorted(kinds, key=lambda k: (_left(kinds[k]), -count[k] * _elements(kinds[k]))):
        call, passes = kinds[kind], BOTH if kind in backward else FORWARD
        dtype = next(iter(call.specs.values())).dtype
        able, _ = kernel_room.registry.able(call.op, hardware, dtype, call.specs, call.params, level, runner.framework)
        able = [k for k in able if runner.finds(k)]
        # With one kernel there is nothing to compare. Another package's is tried all the same: one that hangs would hang its proof.
        if len(able) < 2 and not any(trials.foreign(k.loader) for k in able):
            continue
        if trials.timed(table, place, able, call.specs, call.params, passes):
            known += 1
            continue
        wanted.append(runner.trial(call, able, passes))
    dropped: dict[str, str] = {}

    def kept(trial: Trial, outcome: Outcome) -> None:
        trials.keep(table, place, trial, outcome, {n: kernel_room.registry.get(n) for n in outcome.seconds})
        dropped.update(outcome.dropped)
        for kernel, why in outcome.dropped.items():
            log.warning("%s %s; it is not used", kernel, why)
        done(trial, outcome)

    starts: list[float] = []
    outcomes = runner.run(wanted, budget, kept, starts.append)
    measured, left = sum(bool(o and o.seconds) for o in outcomes), sum(o is None for o in outcomes)
    return Tuned(measured, known, left, len(wanted) - measured - left, dropped, time.monotonic() - start - sum(starts))


def ahead(
    calls: Iterable[Site | Call],
    runner: Runner,
    level: str,
    budget: float,
    done: Callable[[Trial, Outcome], None] = lambda trial, outcome: None,
) -> Tuned:
    """Times what was not timed yet of calls that no program has asked for so far, forward and with the backward pass."""
    calls = list(calls)
    both = tune(calls, runner.hardware, runner, level=level, trained=True, budget=budget, done=done)
    forward = tune(calls, runner.hardware, runner, level=level, trained=False, budget=max(0.0, budget - both.seconds), done=done)
    sums = {f: getattr(both, f) + getattr(forward, f) for f in ("measured", "known", "left", "failed", "seconds")}
    return dataclasses.replace(both, dropped={**both.dropped, **forward.dropped}, **sums)


def measured_again(
    runner: Runner, environment: Environment, contests: Sequence[Contest], count: int,
    done: Callable[[Trial, Outcome], None] = lambda trial, outcome: None,
) -> list[tuple[Contest, Mapping[str, Sequence[float]]]] | str:  # fmt: skip
    """As many as `count` of another machine's contests, held again here: see `kpt.tuning.import_json`."""
    place, (chip, driver, framework) = runner.place, environment
    if (chip, driver) != (place.chip, place.driver) or not f"{framework}, ".startswith(f"{place.framework}, "):
        return f"this machine is {place}"
    wanted: list[tuple[Contest, Trial]] = []
    for contest in contests:
        if len(wanted) < count and (trial := _trial(contest, runner)) is not None:
            wanted.append((contest, trial))
    outcomes = runner.run([trial for _, trial in wanted], AGAIN, done)
    return [(c, o.seconds) for (c, _), o in zip(wanted, outcomes, strict=True) if o is not None and len(o.seconds) > 1]


def _trial(contest: Contest, runner: Runner) -> Trial | None:
    """The call of a contest under its settings, and those of its kernels that are here in the same version; None if fewer than two."""
    latest = max(contest, key=lambda m: m.measured)
    keys, passes, registry = {m.key for m in contest}, latest.key.passes, kernel_room.registry
    try:
        there = runner.under(latest.call.get("settings", {}))
        if there is None:
            return None
        call = Call(*(wire.decode(latest.call[n]) for n in ("op", "specs", "params")))
        able, _ = registry.able(call.op, there.hardware, latest.key.dtype, call.specs, call.params, "aggressive", there.framework)
        kernels = [k for k in able if there.place.key(k, call.specs, call.params, passes) in keys and there.finds(k)]
    except (KptError, LookupError, TypeError, ValueError, AttributeError):  # a file's call may be anything, or be missing
        return None
    return there.trial(call, kernels, passes) if len(kernels) > 1 else None


def _importable(loader: str) -> bool:
    module = loader.partition(":")[0]
    try:
        return module != "__main__" and importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def to_time(plan: Plan) -> list[Site]:
    """The sites of a plan that kernels can be timed for: those with one, and those that no kernel is estimated to be faster at."""
    return [*plan.sites, *(s for s in plan.skipped if s.specs and not s.fingerprint)]


def _left(call: Site | Call) -> bool:
    return isinstance(call, Site) and call.kernel == ORIGINAL


def _elements(call: Site | Call) -> int:
    return sum(math.prod(s.shape) for s in call.specs.values())
