"""Who can compute an op here, and which of them should."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kpt.errors import KernelError
from kpt.kernels.estimate import estimate, seconds
from kpt.kernels.spec import LEVELS, ORIGINAL, KernelSpec, original, refusal, resolve
from kpt.kernels.validate import validate
from kpt.ops.base import Op, Spec, Specs
from kpt.ops.shapes import keywords
from kpt.validation import Certificate

ENTRY_POINTS = "kpt.kernels"
Measurement = float | tuple[float, float]

_log = logging.getLogger("kpt")


@dataclasses.dataclass(frozen=True)
class Selection:
    """The kernel chosen for one call, and why no other.

    Attributes:
      choice: a kernel, or the user's own code (`choice.provider == "original"`).
      why: why this one, in one clause.
      reasons: every other candidate of the op in this framework, by name, and why not.
      time: seconds of the choice, measured or estimated; None where neither is known.
      time_original: the same of the user's own code.
      measured: whether the times were measured.
    """

    choice: KernelSpec
    why: str
    reasons: Mapping[str, str]
    time: float | None
    time_original: float | None
    measured: bool


class KernelRegistry:
    """Kernels by name. The same registrations give the same selections, in whatever order they were made."""

    def __init__(self, kernels: Iterable[KernelSpec] = (), *, entry_points: str | None = None):
        self._kernels: dict[str, KernelSpec] = {}
        self._entry_points = entry_points
        self.broken: dict[str, str] = {}
        """Entry points of third parties that failed to load, and how."""
        for kernel in kernels:
            self.register(kernel)

    def register(self, kernel: KernelSpec) -> None:
        """Adds a kernel. A higher version replaces the lower one of the same name.

        Raises:
          KernelError: the name is taken at the same or a higher version, or the signature changed and the version did
            not.
        """
        if kernel.name == ORIGINAL or kernel.provider == ORIGINAL:
            raise KernelError(
                f"Kernel {kernel.name!r} of provider {kernel.provider!r} was registered",
                "The name stands for the user's own code, which is always a candidate",
                "Choose another name and provider",
            )
        known = self._kernels.get(kernel.name)
        if known is None or kernel.version > known.version:
            self._kernels[kernel.name] = kernel
            return
        if kernel.version < known.version:
            possible, advice = f"It is there as version {known.version}", "Register the newer version only"
        elif kernel.signature != known.signature:
            possible = (
                f"Version {known.version} is there and takes something else (op, arrays, parameters, masks, dtypes)"
            )
            advice = f"Raise the version to {known.version + 1}: plans rely on a version meaning one signature"
        else:
            possible, advice = "It is there already", "Register a kernel once, or give it another name"
        raise KernelError(f"Kernel {kernel.name!r} version {kernel.version} was registered", possible, advice)

    def kernels(self, op: str | None = None) -> tuple[KernelSpec, ...]:
        """All kernels, or those of one op, sorted by name. Third parties' are loaded by the first call."""
        self._load_entry_points()
        return tuple(k for _, k in sorted(self._kernels.items()) if op in (None, k.op))

    def get(self, name: str) -> KernelSpec:
        """The kernel of that name.

        Raises:
          KernelError: there is none.
        """
        self._load_entry_points()
        if name not in self._kernels:
            raise KernelError(
                f"Kernel {name!r} was looked up",
                f"Near it are {', '.join(near)}" if (near := self._near(name)) else "None has a name like that",
                "kpt kernels list has all names; the package that registers it may not be installed",
            )
        return self._kernels[name]

    def _near(self, name: str) -> list[str]:
        """Kernels of that op, or of names like that."""
        return [k for k in sorted(self._kernels) if k.startswith(f"{name}.")] or difflib.get_close_matches(name, self._kernels, 5)

    def load(self, kernel: KernelSpec | str) -> Callable[..., Any]:
        """The function of a kernel; imports its framework.

        One for JAX checks its arrays by the op's rule when it is called, which is while it is traced. One for PyTorch is called as
        often as it computes, and is given as it is: what calls it has checked.

        Raises:
          KernelError: it is unknown, or cannot be imported. When it is called, OpError: a name is none of the op's, or shapes or dtypes do
            not fit.
        """
        spec = self.get(kernel) if isinstance(kernel, str) else kernel
        if spec.provider == ORIGINAL:
            raise KernelError(
                "The user's own code was loaded as a kernel", "It has no loader", "Leave the site as it is"
            )
        function = resolve(spec.loader)
        return _checked(function, spec.op) if spec.framework == "jax" and _op(spec.op) is not None else function

    def able(
        self, op: str, hardware: Any, dtype: str, specs: Specs, params: Mapping[str, Any], level: str, framework: str
    ) -> tuple[list[KernelSpec], dict[str, str]]:
        """The kernels of a framework that take this call, and for each other one of the op, by name, why it does not."""
        found, reasons = [], {}
        for kernel in (k for k in self.kernels(op) if k.framework == framework):
            if reason := _refusal(kernel, op, hardware, dtype, specs, params, level, framework):
                reasons[kernel.name] = reason
            else:
                found.append(kernel)
        return found, reasons

    def select(
        self,
        op: str,
        hardware: Any,
        dtype: str,
        shapes: Mapping[str, Spec | tuple[int, ...]],
        *,
        params: Mapping[str, Any] | None = None,
        level: str = "balanced",
        framework: str = "jax",
        measurements: Mapping[str, Measurement] | None = None,
        dropped: Mapping[str, str] | None = None,
    ) -> Selection:
        """Chooses a kernel for one call; ties go to the first name.

        With a measurement of the original, a kernel is chosen only if it was measured too, and is faster by more than
        the noise of both. Without one, the roofline estimates rank the candidates, and the original is kept where no
        kernel is estimated to be faster. Where kernels were measured against each other, the fastest of these is taken
        instead of the one that is estimated to be; and instead of the original, if it took less time than that is estimated
        to take, by its roofline. Where there is no estimate either, any kernel that accepts the call is taken, the most
        efficient one first.

        Args:
          hardware: a `HardwareProfile`.
          dtype: of the first array.
          shapes: the arrays of the call, by name: specs, or shapes of arrays of that dtype.
          measurements: by kernel name ("original" for the user's own code): seconds, or (seconds, half width of noise).
          dropped: kernels that are no candidates, by name, and why.

        Raises:
          KernelError: no such level.
        """
        if level not in LEVELS:
            raise KernelError(f"Level {level!r} was asked for", f"Levels are {', '.join(LEVELS)}", "Pass one of them")
        params = params or {}
        specs: Specs = {n: s if isinstance(s, Spec) else Spec(tuple(s), dtype) for n, s in shapes.items()}
        able, reasons = self.able(op, hardware, dtype, specs, params, level, framework)
        reasons |= {k.name: dropped[k.name] for k in able if dropped and k.name in dropped}
        able = [original(op, framework), *(k for k in able if k.name not in reasons)]
        times: Mapping[str, float | None]
        measured = measurements is not None and ORIGINAL in measurements
        if measurements is not None and ORIGINAL in measurements:
            choice, why, times = _fastest_measured(able, measurements)
        else:
            known = _op(op)
            cost = known.cost if known else None
            times = {k.name: estimate(k, cost, specs, params, hardware, dtype) for k in able}
            choice, why = _fastest_estimated(able, times, hardware)
            rivals = [k for k in able if k.name in (measurements or {})]
            if measurements and choice.name in measurements:
                measured = True
                choice, why, times = _fastest_of(rivals, measurements)
            elif measurements and rivals and choice.provider == ORIGINAL:
                first, told, taken = _fastest_of(rivals, measurements)
                if (taken[first.name] or 0.0) < (own := times[ORIGINAL] or 0.0):
                    choice, times, measured = first, taken, True
                    why = f"{told}, and the original is estimated at {seconds(own)} at least"
        for kernel in able:
            if kernel is not choice:
                reasons[kernel.name] = _slower(times.get(kernel.name), times.get(choice.name), measured)
        ordered = dict(sorted(reasons.items()))
        return Selection(choice, why, ordered, times.get(choice.name), times.get(ORIGINAL), measured)

    def validate(
        self,
        kernel: KernelSpec | str,
        specs: Specs,
        params: Mapping[str, Any],
        *,
        run: Callable[[Callable[..., Any], dict[str, Any], Mapping[str, Any]], Any],
        run_vjp: Callable[..., Mapping[str, Any]] | None = None,
        op: Op | None = None,
        seeds: Iterable[int] = (0, 1),
        dtype: str | None = None,
    ) -> Certificate:
        """Loads a kernel and certifies it on random inputs, as `kpt.kernels.validate.validate` describes.

        Raises:
          KernelError: the kernel cannot be loaded, or its op is unknown and not given.
        """
        spec = self.get(kernel) if isinstance(kernel, str) else kernel
        meaning = op or _op(spec.op)
        if meaning is None:
            raise KernelError(
                f"Kernel {spec.name!r} was to be validated", f"Op {spec.op!r} is unknown", "Pass op=Op(...)"
            )
        function = self.load(spec)
        return validate(function, meaning, specs, params, run=run, run_vjp=run_vjp, seeds=seeds, dtype=dtype)

    def _load_entry_points(self) -> None:
        if self._entry_points is None:
            return
        group, self._entry_points = self._entry_points, None
        for entry in sorted(importlib.metadata.entry_points(group=group), key=lambda e: (e.name, e.value)):
            # A third party's mistake must cost its kernels, never the user's program.
            try:
                found = entry.load()
                for kernel in (found,) if isinstance(found, KernelSpec) else tuple(found):
                    if not isinstance(kernel, KernelSpec):
                        raise KernelError(f"{kernel!r} was offered as a kernel", "It is no KernelSpec")
                    self.register(kernel)
            except Exception as e:
                problem = self.broken[entry.name] = f"{type(e).__name__}: {e}"
                _log.warning("Kernels of entry point %s (%s) are left out: %s", entry.name, entry.value, problem)


def _refusal(kernel: KernelSpec, *call: Any) -> str | None:
    try:
        return refusal(kernel, *call)
    except Exception as e:  # a predicate of a third party
        _log.warning("The conditions of kernel %s could not be checked: %s: %s", kernel.name, type(e).__name__, e)
        return f"its conditions could not be checked ({type(e).__name__}: {e})"


def _fastest_measured(
    able: list[KernelSpec], measurements: Mapping[str, Measurement]
) -> tuple[KernelSpec, str, dict[str, float | None]]:
    pairs = {name: m if isinstance(m, tuple) else (m, 0.0) for name, m in measurements.items()}
    times: dict[str, float | None] = {k.name: pairs[k.name][0] for k in able if k.name in pairs}
    own, noise = pairs[ORIGINAL]
    faster = [k for k in able if k.name in pairs and own - pairs[k.name][0] > noise + pairs[k.name][1]]
    if not faster:
        if len(able) == 1:
            return able[0], "no kernel accepts this call", times
        if len(times) == 1:
            return able[0], "of the kernels that accept this call none was measured; measure one to use it", times
        return able[0], f"no kernel beats the measured {seconds(own)} of the original by more than the noise", times
    choice = min(faster, key=lambda k: (pairs[k.name][0], k.name))
    time = pairs[choice.name][0]
    why = f"measured {seconds(time)} against {seconds(own)} for the original ({own / time:.2f} times as fast)"
    return choice, why, times


def _fastest_of(
    rivals: list[KernelSpec], measurements: Mapping[str, Measurement]
) -> tuple[KernelSpec, str, dict[str, float | None]]:
    """Among kernels that were measured against each other, with no measurement of the user's own code."""
    times: dict[str, float | None] = {}
    for k in rivals:
        m = measurements[k.name]
        times[k.name] = m[0] if isinstance(m, tuple) else m
    first, *others = sorted(rivals, key=lambda k: (times[k.name], k.name))
    against = f" against {seconds(times[others[0].name] or 0.0)} for {others[0].name}" if others else ""
    return first, f"measured {seconds(times[first.name] or 0.0)}{against}", times


def _fastest_estimated(
    able: list[KernelSpec], times: Mapping[str, float | None], hardware: Any
) -> tuple[KernelSpec, str]:
    own, kernels = able[0], able[1:]
    if not kernels:
        return own, "no kernel accepts this call"
    estimates = {k.name: t for k in kernels if (t := times[k.name]) is not None}
    own_time = times[own.name]
    if own_time is None or not estimates:
        best = min(kernels, key=lambda k: (-k.efficiency, k.name))
        return (
            best,
            f"it accepts this call; neither measured nor estimated, because {hardware.name} has no figures for it",
        )
    best = min((k for k in kernels if k.name in estimates), key=lambda k: (estimates[k.name], k.name))
    if estimates[best.name] >= own_time:
        return own, f"no kernel is estimated to be faster on {hardware.name}; measure to be sure"
    return best, (
        f"estimated {seconds(estimates[best.name])} against {seconds(own_time)} for the original "
        f"(roofline of {hardware.name}, not measured)"
    )


def _slower(time: float | None, best: float | None, measured: bool) -> str:
    if time is None or best is None:
        return "was not measured" if measured else "nothing is known of its time, and another kernel comes first"
    how = "measured" if measured else "estimated"
    if time == best:
        return f"{how} {seconds(time)}, no faster than what was chosen"
    return f"{how} {seconds(time)} against {seconds(best)} for the choice"


@functools.cache  # one function a kernel: jax keeps what it compiled by function
def _checked(function: Callable[..., Any], op: str) -> Callable[..., Any]:
    """The kernel, which refuses names that are not the op's, and arrays that break its rule, before it computes anything from them."""
    meaning = _op(op)
    assert meaning is not None
    names = (*meaning.arrays, *meaning.optional)
    own = tuple(inspect.signature(function).parameters)  # blocks and the like are among them

    @functools.wraps(function)
    def kernel(**given: Any) -> Any:
        keywords(meaning, given, own)
        arrays = {n: a for n in names if (a := given.get(n)) is not None}
        if all(n in arrays for n in meaning.arrays) and all(hasattr(a, "dtype") for a in arrays.values()):
            specs = {n: Spec(tuple(a.shape), str(a.dtype)) for n, a in arrays.items()}
            meaning.infer(specs, **{n: given[n] for n in meaning.params if n in given})
        return function(**given)

    return kernel


@functools.cache
def _op(name: str) -> Op | None:
    """The op that `kpt/ops/<name>.py` defines; None for one that only a third party's kernels know."""
    if importlib.util.find_spec(f"kpt.ops.{name}") is None:
        return None
    module = importlib.import_module(f"kpt.ops.{name}")
    return next((v for v in vars(module).values() if isinstance(v, Op) and v.name == name), None)
