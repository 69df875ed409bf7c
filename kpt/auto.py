"""`auto_optimize`: plan, certify, measure beside the original, and keep what wins. The front end is found by type."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kpt.errors import KptError, MissingDependencyError
from kpt.frameworks import framework_of
from kpt.inputs import arrays_in
from kpt.kernels.spec import ORIGINAL
from kpt.strategy import Plan, Site
from kpt.strategy.explain import count
from kpt.strategy.plan import differentiated
from kpt.tuning import certain, gain, ratio, sigmas
from kpt.tuning.measurements import AS_CALLED

if TYPE_CHECKING:
    from kpt.hardware import HardwareProfile
    from kpt.strategy.tune import Tuned


@dataclasses.dataclass(frozen=True)
class Report:
    """What was measured, in this process, original and optimized taking turns.

    Attributes:
      function: name of the function or model.
      hardware: name of the profile of the machine that was measured, whatever chip the plan is for.
      device: what the arrays were on.
      measured: "forward and backward" for a function that returns a scalar loss, timed with its gradients; any other one is timed
        "as called", with the gradients that it takes itself.
      seconds_before, seconds_after: one figure a round, of the original and of the best rewrite.
      memory_before, memory_after: bytes that the compiled program needs besides its arguments; None where unknown.
      max_error: largest relative L2 difference from the original over results and gradients; None if not compared.
      kept: whether the rewrite won by more than the noise. Otherwise the original is what `Result.fn` is.
      noise: relative standard error of `speedup`.
      plan: in force.
      one_program: whether no site has a kernel, so that nothing but the original was measured: before and after are the same figures.
    """

    function: str
    hardware: str
    device: str
    measured: str
    seconds_before: tuple[float, ...]
    seconds_after: tuple[float, ...]
    memory_before: int | None
    memory_after: int | None
    max_error: float | None
    kept: bool
    noise: float
    plan: Plan
    one_program: bool = False

    @property
    def speedup(self) -> float:
        """Median over the rounds of (time of the original) / (time of the rewrite); 1 where the original is kept."""
        return self.measured_speedup if self.kept else 1.0

    @property
    def measured_speedup(self) -> float:
        """The same, whatever was kept."""
        pairs = zip(self.seconds_before, self.seconds_after, strict=True)
        return statistics.median(before / after for before, after in pairs)

    @property
    def peak_memory(self) -> tuple[int | None, int | None]:
        """Bytes before and after."""
        return self.memory_before, self.memory_after if self.kept else self.memory_before

    def __repr__(self) -> str:
        what = f"Report of {self.function} on {self.hardware}: {self.measured}"
        if self.one_program:
            return f"{what}; no site has a kernel"
        kept = f"{count(len(self.plan.sites), 'site')} with a kernel" if self.kept else "the original is kept"
        return f"{what}, {self.measured_speedup:.2f}x {self._worth}; {kept}"

    @property
    def _worth(self) -> str:
        return certain(self.noise, len(self.seconds_before))

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Inverse of `to_json`."""
        data = json.loads(text)
        data.setdefault("one_program", data["seconds_before"] == data["seconds_after"])  # of an older version
        fields = {f.name: data[f.name] for f in dataclasses.fields(cls)}
        seconds = {n: tuple(fields[n]) for n in ("seconds_before", "seconds_after")}
        return cls(**{**fields, **seconds, "plan": Plan.from_json(json.dumps(data["plan"]))})

    def to_json(self) -> str:
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "plan"}
        data |= {"kind": "kpt.report", "speedup": self.speedup, "measured_speedup": self.measured_speedup,
                 "plan": json.loads(self.plan.to_json())}  # fmt: skip
        return json.dumps(data, indent=1)

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Writes the report as one HTML file and returns its path. Needs jinja2.

        Raises:
          ConfigError: the path is a folder, or its folder is not there.
        """
        from kpt.console import seconds as in_words
        from kpt.console import size
        from kpt.report import Bar, Figure, bar_chart, write
        from kpt.report import Report as Page
        from kpt.report.roofline import roofline

        def bar(label: str, seconds: tuple[float, ...], style: str) -> Bar:
            low, middle, high = statistics.quantiles(seconds, n=4)
            return Bar(label, middle, in_words(middle), style, low, high)

        verdict = "; ".join(self.plan.notes[-1:]) or f"{count(len(self.plan.sites), 'site')} with a kernel"
        one = self.one_program
        sides = ("as written", "before"), ("through kpt", "after")
        shown = sides[:1] if one else sides
        bars = [bar(label, s, style) for (label, style), s in zip(shown, (self.seconds_before, self.seconds_after), strict=False)]
        rounds = f"Median of {len(self.seconds_before)} rounds{'' if one else ', the two taking turns in one process'}"
        time = Figure(
            "Time",
            bar_chart(bars, title=f"Time of {self.function}, {self.measured}",
                      description="; ".join(f"{b.label}: {b.text}" for b in bars)),
            f"{rounds}; the whisker spans the quartiles.{' No site has a kernel: there is one program.' if one else ''}",
        )  # fmt: skip
        figures = [time]
        if self.memory_before is not None and self.memory_after is not None:
            sizes = [(*side, b) for side, b in zip(shown, (self.memory_before, self.memory_after), strict=False)]
            figures.append(Figure(
                "Memory",
                bar_chart([Bar(n, b, size(b), s) for n, s, b in sizes], title="Memory",
                          description="; ".join(f"{n}: {b} bytes" for n, _, b in sizes)),
                "What the compiled program needs besides its arguments, by the compiler's own account.",
            ))  # fmt: skip
        if (under := roofline(self.plan)) is not None:
            figures.append(under)
        error = "not compared" if self.max_error is None else f"{self.max_error:.1e}"
        speed = (bars[0].text, "time") if one else (f"{self.speedup:.2f}×", "time, before over after")
        taken = self.measured == AS_CALLED and any(differentiated(s.path) for s in (*self.plan.sites, *self.plan.skipped))
        own = ", with the gradients that it takes itself" if taken else ""
        number, sites = count(len(self.plan.sites), "site").split()
        worth = () if one else (("Time ratio", f"{self.measured_speedup:.2f} {self._worth}"),)
        return write(Page(
            title=self.function if one else f"{self.function}, as written and through kpt",
            verdict=verdict,
            passed=True if self.kept else None,  # what fails its certificate is not in the plan
            headline=(speed, (error, "largest relative difference"), (number, f"{sites} with a kernel")),
            facts=(("Hardware", "; ".join(dict.fromkeys((self.hardware, self.device)))), ("Measured", f"{self.measured}{own}"), *worth,
                   ("Versions", ", ".join(f"{k} {v}" for k, v in self.plan.versions.items()))),
            figures=figures,
            plan=self.plan,
            command="kpt.auto_optimize(...).report.to_html(path)",
        ), path)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Result:
    """`fn` is what to use from now on (the original where nothing won); `model` is another name for it."""

    fn: Any
    plan: Plan
    report: Report

    def __repr__(self) -> str:
        return f"Result(fn, plan, report), {self.report!r}"

    @property
    def model(self) -> Any:
        return self.fn


class Session(Protocol):
    """The steps of `auto_optimize`, which a front end does on one program and its example inputs.

    Attributes:
      hardware: of the plan.
      device: what the arrays are on, by the name that its maker gives it.
      saves: whether the program is a model, whose parameters can be saved.
    """

    hardware: HardwareProfile
    device: str
    saves: bool

    def plan(self) -> Plan:
        """What would be swapped, with no kernel run for it."""

    def tune(self, budget: float) -> Tuned:
        """Times the kernels that could compute the sites, within so many seconds at work; from then on the fastest are chosen."""

    def follow(self, dropped: Mapping[str, str], plan: Plan | None = None) -> None:
        """Takes up what earlier steps found, perhaps in another process: kernels not to be used, and the plan that was validated."""

    def leave_out(self, budget: float) -> tuple[Mapping[str, str], tuple[str, ...]]:
        """Sites that the program is faster without, by path, and why; and notes for the plan. See `kpt.strategy.leave_out`."""

    def leave(self, sites: Mapping[str, str]) -> None:
        """From now on, these sites run as they were written, for the reasons given."""

    def validate(self) -> tuple[Plan, float | None]:
        """The plan whose sites are proved, each and all together, and the largest relative difference of the whole program."""

    def measure(self, plan: Plan, error: float | None, notes: tuple[str, ...] = ()) -> Report:
        """The program as planned beside the original; what is not faster by more than the noise is not kept."""

    def result(self, report: Report) -> Result:
        """What to use from now on."""

    def save(self, folder: Path) -> None:
        """Writes a model's parameters, under their own names, into a new folder."""


def session(fn_or_model: Any, inputs: tuple, keywords: Mapping[str, Any], level: str | None, hardware: Any) -> Session:
    """The session of the framework that the object is of.

    Raises:
      As `auto_optimize`.
    """
    made: Session = _front(fn_or_model, (inputs, keywords)).Session(fn_or_model, inputs, keywords, level, hardware)
    return made


def as_written(plan: Plan, reason: str) -> Plan:
    """The plan that leaves every site as it is."""
    def written(s: Site) -> Site:
        others = {k: why for k, why in s.alternatives.items() if k != ORIGINAL}  # it is the choice now
        return dataclasses.replace(s, kernel=ORIGINAL, version=None, reason=reason, alternatives=others)

    left = tuple(map(written, plan.sites))
    return dataclasses.replace(plan, sites=(), skipped=(*left, *plan.skipped))


def compared(plan: Plan, measured: str, before: Sequence[float], after: Sequence[float]) -> tuple[bool, float, str]:
    """Whether a rewrite is kept, the relative standard error of its speedup, and a sentence for the plan.

    Args:
      measured: as `Report.measured`.
      before, after: seconds, one figure a round, of the original and of the rewrite; the same where there is none.
    """
    if not plan.sites:
        return False, 0.0, "The original is kept: no site has a kernel."
    won, noise = gain(before, after)
    what, worth = f"{ratio(won)} with a kernel at {count(len(plan.sites), 'site')}", certain(noise, len(before))
    words = f"{measured}, median of {len(before)} rounds side by side: {what}, {worth}"
    if won > sigmas(len(before)) * noise:
        return True, noise, f"Measured {words}."
    return False, noise, f"The original is kept: nothing won by more than the noise ({words})."


def auto_optimize(
    fn_or_model: Any, *example_inputs: Any, level: str | None = None, hardware: Any = "auto", budget: str | float = "30s",
    **example_keywords: Any,
) -> Result:  # fmt: skip
    """Optimizes, proves and measures; keeps a rewrite only where it is faster by more than the noise.

    First the kernels that could compute each kind of call in the program are timed against each other, in a process of their own: what
    fails, hangs or crashes there is dropped and named. (A TPU has room for one process: there they run in this one, and nothing stops
    one that hangs.) Those of code that stays by an estimate come last, and one is taken if it took less time than the code's roofline. The
    times are kept, and later plans choose by them; nothing is timed for other hardware than is here. What is left of the budget goes to
    timing the program without the kernels of one kind of call after the other: those that it is faster without are left out, and the
    plan says so. Then the whole program is proved, and timed against the original.

    Args:
      fn_or_model: a JAX function, a Flax module, or a torch.nn.Module.
      example_inputs, example_keywords: arguments of one typical call. For a linen module, its variables first.
      level: "conservative", "balanced" or "aggressive".
      hardware: "auto" for what is here, whatever `KPT_HARDWARE` says (a warning tells where it names another chip); or a profile's name, or
        a `HardwareProfile`, to plan for. The report names what is here.
      budget: for timing kernels, and the program without them: seconds, or "30s", "10m"; 0 to choose by what is known already. The start
        of the process that times them comes besides, and so do the proofs and the measurement of the whole program.

    Raises:
      ConfigError: the budget is no duration.
      MissingDependencyError: the front end's framework is not installed.
      InputError: the program does not take these inputs, or not so, or there is an option with a slip among its keywords.
      GraphError: a JAX function branches on a value that is not known when it is traced.
      KptError: the object is neither a function nor a model.
    """
    from kpt.tracking.hooks import record_report
    from kpt.tuning.trials import seconds_of

    seconds = seconds_of(budget)
    steps = session(fn_or_model, example_inputs, example_keywords, level, hardware)
    tuned = steps.tune(seconds)
    left, notes = steps.leave_out(seconds - tuned.seconds)
    steps.leave(left)
    report = steps.measure(*steps.validate(), (*tuned.notes(), *notes))
    record_report(report)
    return steps.result(report)


def _front(fn_or_model: Any, example_inputs: tuple) -> Any:
    """The front end's part of this module."""
    name = front_end(fn_or_model, example_inputs)
    try:
        return importlib.import_module(f"{name}.auto")
    except ImportError as e:
        framework = {"kpt_jax": "jax", "kpt_torch": "torch"}[name]
        raise MissingDependencyError(
            f"auto_optimize was given {framework} code", f"{name} cannot be imported here: {e}",
            f"Install {framework}, or the part of kpt for it"
        ) from e  # fmt: skip


@contextlib.contextmanager
def showing(what: str) -> Iterator[Callable[..., None]]:
    """Shows on a terminal which trials are done; elsewhere nothing."""
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield lambda *_: None
        return
    from kpt.console import progress

    with progress() as bar:
        task = bar.add_task(what, total=None)
        yield lambda trial, outcome: bar.update(task, advance=1, description=f"{what}: {trial}")


def front_end(fn_or_model: Any, example_inputs: tuple) -> str:
    """ "kpt_torch" for a torch module, a function of torch's or one that does not tell and is given tensors or batches; else "kpt_jax".

    Imports neither framework.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(fn_or_model, torch.nn.Module):
        return "kpt_torch"
    if not callable(fn_or_model) and not hasattr(fn_or_model, "apply"):
        raise KptError(f"auto_optimize was given an object of type {type(fn_or_model).__name__}", "It takes a function or a model",
                       "Pass the function that computes, for example the loss")  # fmt: skip
    of = framework_of(fn_or_model)
    if of is None and torch is not None and any(isinstance(x, torch.Tensor) for x in arrays_in(example_inputs)):
        of = "torch"
    return f"kpt_{of or 'jax'}"
