"""Candidates of one call, timed side by side in a process of their own: one that hangs, crashes or takes all memory costs itself alone."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from kpt.errors import ConfigError
from kpt.kernels.spec import KernelSpec
from kpt.ops.base import Spec
from kpt.strategy import wire
from kpt.tuning.bucket import bucket
from kpt.tuning.measurements import BOTH, FORWARD, Key, Measurement, Measurements
from kpt.tuning.rounds import rounds
from kpt.tuning.settings import Setting, put

PATIENCE = 120.0
"""Seconds that one candidate may take to be compiled and to run once, or a process to start."""
SECONDS = 0.3
"""For which each candidate of a trial runs."""
_ANSWER = "KPT: "
_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
log = logging.getLogger("kpt")
Sample = Callable[[int], float]
Ready = Callable[["Trial", str], Sample]
"""`ready(trial, kernel)` compiles a candidate and returns `sample(repeats)`, seconds a call."""


def seconds_of(budget: str | float) -> float:
    """Seconds in a duration: 30, "30s", "500ms", "10m", "1h".

    Raises:
      ConfigError: it is none.
    """
    text = str(budget).strip().lower()
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
    try:
        found = float(number) * _UNITS[text[len(number) :].strip() or "s"]
    except (ValueError, KeyError):
        found = -1.0
    if not 0 <= found < float("inf"):
        raise ConfigError(f"A budget of {budget!r} was given", 'It is a number of seconds, or a text like "30s", "10m", "1h"', "Correct it")
    return found


@dataclasses.dataclass(frozen=True)
class Place:
    """Where measurements hold.

    Attributes:
      chip: name of the hardware profile.
      driver: version of the driver or runtime that decides, "" where there is none.
      framework: "jax 0.11.2, jaxlib 0.11.2".
      settings: `(name, value, dtype)` of what is set otherwise than by default and changes calls on arrays of that dtype, "" for any.
    """

    chip: str
    driver: str
    framework: str
    settings: tuple[tuple[str, Any, str], ...] = ()

    @classmethod
    def of(cls, chip: str, platform: str, versions: Mapping[str, str], settings: tuple[tuple[str, Any, str], ...] = ()) -> Place:
        return cls(chip, driver(platform), ", ".join(f"{n} {v}" for n, v in versions.items()), settings)

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.chip, f"driver {self.driver}" if self.driver else "", self.framework)))

    def settings_of(self, specs: Mapping[str, Spec]) -> dict[str, Any]:
        """By name, the settings that such a call is another one for: float32 products in TF32 are other work, bfloat16 ones are not."""
        dtypes = {"", *(s.dtype for s in specs.values())}
        return {name: value for name, value, dtype in self.settings if dtype in dtypes}

    def key(self, kernel: KernelSpec, specs: Mapping[str, Spec], params: Mapping[str, Any], passes: str) -> Key:
        at = bucket(specs, params)
        framework = ", ".join((self.framework, *(f"{n}={v}" for n, v in self.settings_of(specs).items())))
        return Key(kernel.name, kernel.version, self.chip, self.driver, framework, at.dtype, at.shape, at.mask, passes)


def driver(platform: str) -> str:
    """Version of the kernel driver of NVIDIA's or AMD's GPUs; "" elsewhere, or where it does not say."""
    module = {"cuda": "nvidia", "rocm": "amdgpu"}.get(platform)
    try:
        return Path("/sys/module", module, "version").read_text().strip() if module else ""
    except OSError:
        return ""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One call of one op, and who could compute it.

    Attributes:
      kernels: the candidates: "module:function" by name.
      passes: "forward" or "forward and backward".
      device: that the arrays are on, as the framework calls it and with its number on this host: "cpu", "gpu:1", "cuda:1".
      settings: of the asking program, by name: see `kpt.tuning.settings`.
    """

    op: str
    specs: Mapping[str, Spec]
    params: Mapping[str, Any]
    kernels: Mapping[str, str]
    passes: str
    device: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def call(self) -> dict[str, Any]:
        """What is computed, JSON-ready."""
        return {"op": self.op, "specs": wire.encode(dict(self.specs)), "params": wire.encode(dict(self.params))}

    def to_json(self) -> dict[str, Any]:
        return self.call | {"kernels": dict(self.kernels), "passes": self.passes, "device": self.device, "settings": dict(self.settings)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trial:
        return cls(**{**data, "specs": wire.decode(data["specs"]), "params": wire.decode(data["params"])})

    def __str__(self) -> str:
        at = bucket(self.specs, self.params)
        return f"{self.op} {at}, {self.passes}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Attributes:
      seconds: of a call, one figure a round, by kernel.
      dropped: kernels that cannot compute the call after all, and why, in one clause.
    """

    seconds: Mapping[str, tuple[float, ...]]
    dropped: Mapping[str, str]


def known(
    table: Measurements, place: Place, kernels: Iterable[KernelSpec], specs: Mapping[str, Spec], params: Mapping[str, Any],
    passes: Sequence[str] = (BOTH, FORWARD),
) -> dict[str, tuple[float, float]]:  # fmt: skip
    """`(seconds, half the spread of the middle half)` by kernel, as measured here, for the first of `passes` in which two kernels were."""
    if not table.store.path.exists() and not table.store.in_memory:
        return {}
    kernels = tuple(kernels)
    for which in passes:
        found = {k.name: table.best(place.key(k, specs, params, which)) for k in kernels}
        times = {n: (m.seconds, (m.high - m.low) / 2) for n, m in found.items() if m is not None}
        if len(times) > 1:
            return times
    return {}


def timed(
    table: Measurements, place: Place, kernels: Iterable[KernelSpec], specs: Mapping[str, Spec], params: Mapping[str, Any], passes: str
) -> bool:
    """Whether each of the kernels was measured here in those passes."""
    there = table.store.path.exists() or table.store.in_memory
    return there and all(table.best(place.key(k, specs, params, passes)) is not None for k in kernels)


def foreign(loader: str) -> bool:
    """Whether a kernel is another package's, of which nothing is known before it was tried."""
    return loader.partition(":")[0].partition(".")[0] not in ("kpt_jax", "kpt_torch", "pallas_kernels")


def keep(table: Measurements, place: Place, trial: Trial, outcome: Outcome, kernels: Mapping[str, KernelSpec]) -> None:
    """Puts what was measured into the table."""
    keys = {n: place.key(kernels[n], trial.specs, trial.params, trial.passes) for n in outcome.seconds}
    settings = place.settings_of(trial.specs)
    call = trial.call | ({"settings": settings} if settings else {})
    table.put(*(Measurement.of(keys[n], s, call=call) for n, s in outcome.seconds.items()))


def run(
    trials: Sequence[Trial],
    module: str,
    budget: float,
    done: Callable[[Trial, Outcome], None] = lambda trial, outcome: None,
    patience: float | None = None,
    up: Callable[[float], None] = lambda seconds: None,
) -> list[Outcome | None]:
    """Times the candidates of each trial against each other, in other processes, until the budget is spent.

    Args:
      module: run as `python -m module`; it calls `serve`.
      budget: seconds. The start of the process that times them, a new one after each that hangs or ends, comes besides.
      done: called after each trial.
      patience: seconds for one candidate to be ready; `PATIENCE` by default.
      up: called with the seconds that a process took to start, once it is at work.

    Returns:
      By trial; None for those that the budget did not reach. A candidate that fails, hangs or ends its process is named in `dropped`,
      and so is another package's that was not ready when the budget ended: it may be one that hangs.
    """
    end = time.monotonic() + budget
    patience = PATIENCE if patience is None else patience
    outcomes: list[Outcome | None] = [None] * len(trials)
    dropped: dict[int, dict[str, str]] = collections.defaultdict(dict)
    left = list(range(len(trials)))
    while left and time.monotonic() < end:
        told = [dataclasses.replace(trials[i], kernels={k: at for k, at in trials[i].kernels.items() if k not in dropped[i]}) for i in left]
        start, starting = time.monotonic(), True
        with _Child(module, told) as child:
            at, wait = "", PATIENCE  # the candidate under way; before the first one, the process starts
            while left:
                answer = child.answer(min(end if not starting else math.inf, time.monotonic() + wait))
                if answer is None:
                    break
                i, wait = left[0], patience
                if "up" in answer:
                    starting, took = False, time.monotonic() - start
                    end += took  # for one that never gets to work the clock goes on: a budget ends it
                    up(took)
                elif "started" in answer:
                    at = answer["started"]
                elif "ready" in answer:
                    at = ""
                elif "failed" in answer:
                    dropped[i][answer["failed"]] = answer["why"]
                    at = ""
                elif "seconds" in answer:
                    outcomes[i] = Outcome({n: tuple(s) for n, s in answer["seconds"].items()}, dropped[i])
                    done(trials[i], outcomes[i])  # type: ignore[arg-type]
                    left.pop(0)
            if not left:
                break
            over = child.late and not starting and time.monotonic() >= end
            problem = f"was not ready when the budget of {budget:.0f} s ended" if over else child.problem(wait)
        i = left[0]
        if over and not (at and foreign(trials[i].kernels[at])):
            break
        if at:
            dropped[i][at] = problem
        else:  # all had run once: whichever it was, this call stays unmeasured
            log.warning("The process that timed %s %s", trials[i], problem)
        if over or not at:
            outcomes[i] = Outcome({}, dropped[i])
            done(trials[i], outcomes[i])  # type: ignore[arg-type]
            left.pop(0)
    for i in left:
        if dropped[i]:  # what the budget did not reach is one thing, what is known to fail another
            outcomes[i] = Outcome({}, dropped[i])
            done(trials[i], outcomes[i])  # type: ignore[arg-type]
    return outcomes


def run_here(
    trials: Sequence[Trial], ready: Ready, budget: float, done: Callable[[Trial, Outcome], None] = lambda trial, outcome: None
) -> list[Outcome | None]:
    """As `run`, in this process: for devices that belong to one process. A candidate that hangs is not stopped."""
    end = time.monotonic() + budget
    outcomes: list[Outcome | None] = [None] * len(trials)
    for i, trial in enumerate(trials):
        if time.monotonic() >= end:
            break
        dropped: dict[str, str] = {}
        made = outcomes[i] = Outcome(one(trial, ready, failed=dropped.__setitem__), dropped)
        done(trial, made)
    return outcomes


class _Child:
    """A process that works on trials, and its answers."""

    def __init__(self, module: str, trials: Sequence[Trial]):
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed on exit)
        # Beside a parent that may hold most of the device's memory.
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.process = subprocess.Popen([sys.executable, "-m", module], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.log, text=True)  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps([t.to_json() for t in trials]) + "\n")
            self.process.stdin.flush()  # and left open: its end is that of this process, whatever ended it
        except BrokenPipeError:
            pass  # it ended at once; what it said is in the log
        self.answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.late = False
        threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True).start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            if line.startswith(_ANSWER):
                self.answers.put(json.loads(line.removeprefix(_ANSWER)))
        self.answers.put(None)

    def answer(self, until: float) -> dict[str, Any] | None:
        try:
            return self.answers.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            self.late = True
            return None

    def problem(self, patience: float) -> str:
        if self.late:
            return f"was not ready after {patience:.0f} s"
        code = self.process.wait()
        self.log.seek(0)
        said = [line.strip() for line in self.log if line.strip()]
        return f"ended its process ({f'signal {-code}' if code < 0 else f'exit code {code}'}){': ' + said[-1][:200] if said else ''}"

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()
        self.log.close()


def serve(ready: Ready, settings: Sequence[Setting] = ()) -> None:
    """In the other process: works on the trials that standard input tells, under the settings that each has, and answers line by line."""

    def started(kernel: str) -> None:
        _say(**({"started": kernel} if kernel else {"ready": True}))

    def orphaned() -> None:
        sys.stdin.read()
        os._exit(1)

    _say(up=True)
    wanted = json.loads(sys.stdin.readline())
    # Who asks may be killed while a candidate hangs, which would hold the device for ever.
    threading.Thread(target=orphaned, daemon=True).start()
    for trial in map(Trial.from_json, wanted):
        put(settings, trial.settings)
        _say(seconds=one(trial, ready, started, lambda k, why: _say(failed=k, why=why)))


def one(
    trial: Trial,
    ready: Ready,
    started: Callable[[str], None] = lambda kernel: None,
    failed: Callable[[str, str], None] = lambda kernel, why: None,
) -> dict[str, tuple[float, ...]]:
    """The candidates of one trial, in this process.

    Args:
      started: called before each candidate is made ready, and with "" before they are timed.
      failed: called with a candidate that raised, and how.
    """
    samples: dict[str, Sample] = {}
    at = ""

    def named(kernel: str, sample: Sample) -> Sample:
        def call(repeats: int) -> float:
            nonlocal at
            at = kernel
            return sample(repeats)

        return call

    def drop(kernel: str, problem: Exception) -> None:
        failed(kernel, f"failed: {type(problem).__name__}: {' '.join(str(problem).split())[:200]}")

    for kernel in trial.kernels:
        started(kernel)
        try:
            samples[kernel] = named(kernel, ready(trial, kernel))
            samples[kernel](1)
        except Exception as problem:  # a candidate that cannot be is what this is to find out
            samples.pop(kernel, None)
            drop(kernel, problem)
    started("")
    while samples:
        try:
            return rounds(samples, SECONDS)
        except Exception as problem:  # beside the others, one may have too little memory
            del samples[at]
            drop(at, problem)
    return {}


def _say(**words: Any) -> None:
    print(_ANSWER + json.dumps(words), flush=True)
