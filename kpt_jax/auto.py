"""`kpt.auto_optimize` for JAX."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from kpt.auto import Report, Result, as_written, compared, showing
from kpt.errors import MissingDependencyError
from kpt.hardware import planned_elsewhere
from kpt.strategy import Plan
from kpt.strategy.leave_out import leave_out
from kpt.strategy.plan import ORIGINAL
from kpt.strategy.tune import Runner, Tuned, to_time, tune
from kpt.tuning.measurements import AS_CALLED, BOTH
from kpt.tuning.settings import found
from kpt_jax.devices import device_of, here, name_of, profile
from kpt_jax.measure import Timed, Timing, loss_and_gradients, measure, sample
from kpt_jax.modules import function_of, is_linen, is_nnx
from kpt_jax.optimize import Optimized, Signature, is_foreign, optimize, planning
from kpt_jax.planner import FRONT
from kpt_jax.trials import ready
from kpt_jax.whole import certify_whole


def runner(arrays: Iterable[Any] = ()) -> Runner:
    """Trials on what jax computes on, given these arrays, under what is set now. A TPU belongs to one process, which is this one."""
    arrays = tuple(arrays)
    device = device_of(arrays)
    return Runner("jax", here(arrays), FRONT.compilers, name_of(device), "kpt_jax.trials", ready if device.platform == "tpu" else None,
                  FRONT.settings, found(FRONT.settings))  # fmt: skip


class Session:
    """The steps of `auto_optimize` on one program and its example inputs, see `kpt.auto.Session`."""

    def __init__(self, fn_or_model: Any, inputs: tuple, keywords: Mapping[str, Any], level: str | None, hardware: Any):
        self.given, self.inputs = fn_or_model, inputs
        self.saves = is_nnx(fn_or_model) or is_linen(fn_or_model)
        self.usable = optimize(fn_or_model, level, hardware)
        self.fast: Optimized
        self.planning = functools.partial(planning, fn_or_model, inputs, keywords)
        with self.planning():
            self.fast, self.args, self.kwargs = function_of(self.usable, *inputs, **keywords)
        _, arrays = self.fast.split(self.args, self.kwargs)
        self.here = here(arrays)
        if hardware == "auto" and planned_elsewhere(self.here):
            hardware = self.here
            self.usable = optimize(fn_or_model, level, hardware)
            with self.planning():
                self.fast, self.args, self.kwargs = function_of(self.usable, *inputs, **keywords)
        self.hardware, self.device = profile(hardware, arrays), device_of(arrays).device_kind
        self._programs: dict[Any, Timed] = {}

    def plan(self) -> Plan:
        unproved = self.fast.unproved()
        with self.planning():
            made = unproved.plan(*self.args, **self.kwargs)
        self.fast._static_scalars = unproved._static_scalars  # whether numbers have to stay numbers is found by tracing
        return made

    def tune(self, budget: float) -> Tuned:
        plan = self.plan()
        _, arrays = self.fast.split(self.args, self.kwargs)
        trained = self._timed(self.fast.original).trained
        with showing("timing kernels") as done:
            made = tune(to_time(plan), self.hardware, runner(arrays), level=plan.level, trained=trained, budget=budget, done=done)
        if made.measured or made.dropped:
            self.follow(made.dropped)
        return made

    def follow(self, dropped: Mapping[str, str], plan: Plan | None = None) -> None:
        self.fast.drop(dropped)
        if plan is not None:
            self.fast.ban({s.path: s.reason for s in plan.skipped})

    def leave_out(self, budget: float) -> tuple[Mapping[str, str], tuple[str, ...]]:
        if budget <= 0:
            return {}, ()
        _, arrays = self.fast.split(self.args, self.kwargs)

        def ready(left: Mapping[str, str]) -> Callable[[int], float]:
            program = self._timed(self.fast.without(left) if left else self.fast)
            return functools.partial(sample, program.jitted.lower(*arrays).compile(), arrays)

        return leave_out(self.fast.plan(*self.args, **self.kwargs).sites, ready, budget)

    def leave(self, sites: Mapping[str, str]) -> None:
        if sites:  # else what is planned and compiled holds
            self.fast.ban(sites)

    def validate(self) -> tuple[Plan, float | None]:
        plan = self.fast.plan(*self.args, **self.kwargs)
        if not plan.sites:  # it is the original
            return plan, None
        plan, worst = certify_whole(self.fast, self.args, self.kwargs, self._timed)
        return plan, worst if plan.sites else None

    def measure(self, plan: Plan, error: float | None, notes: tuple[str, ...] = ()) -> Report:
        fast = self.fast
        signature, arrays = fast.split(self.args, self.kwargs)
        sides: dict[str, Any] = {ORIGINAL: fast.original} | ({"rewrite": fast} if plan.sites else {})
        timed = {n: self._timed(f) for n, f in sides.items()}
        measured = BOTH if all(t.trained for t in timed.values()) else AS_CALLED
        programs = {n: t.jitted if t.trained == (measured == BOTH) else _flat(signature, sides[n]) for n, t in timed.items()}
        timings = measure(programs, arrays)
        before = timings[ORIGINAL]
        best = "rewrite" if plan.sites else ORIGINAL
        kept, noise, note = compared(plan, measured, before.seconds, timings[best].seconds)
        chosen = dataclasses.replace(plan if kept else as_written(plan, note), notes=(*plan.notes, *notes, note))
        after: Timing = timings[best]
        return Report(chosen.function, self.here.name, self.device, measured, before.seconds, after.seconds, before.memory, after.memory,
                      error, kept, noise, chosen, one_program=not plan.sites)  # fmt: skip

    def _timed(self, fn: Callable[..., Any]) -> Timed:
        """The program that is timed of a function: what it returns and its gradients, if it is a loss. Compiled once."""
        fast = self.fast
        key = (fn, frozenset(fast._banned), frozenset(fast._dropped)) if fn is fast else fn
        found = self._programs.get(key)
        if found is None:
            signature, arrays = fast.split(self.args, self.kwargs)
            program = _flat(signature, fn)
            trained = loss_and_gradients(program, arrays)
            found = Timed(jax.jit(trained or program), trained is not None)
            if fn in (fast, fast.original):
                self._programs[key] = found
        return found

    def result(self, report: Report) -> Result:
        return Result(self.usable if report.kept else self.given, report.plan, report)

    def save(self, folder: Path) -> None:
        """By orbax: of an `nnx.Module` its state, of a linen module the variables that came with the inputs.

        `orbax.checkpoint.StandardCheckpointer().restore(folder)` reads them.
        """
        if importlib.util.find_spec("orbax") is None:
            asked, install = "A checkpoint of a Flax module was asked for", "pip install orbax-checkpoint"
            raise MissingDependencyError(asked, "orbax-checkpoint is not installed", install)
        if is_nnx(self.given):
            from flax import nnx

            tree = nnx.to_pure_dict(nnx.state(self.given))
        else:
            tree = self.inputs[0]
        with importlib.import_module("orbax.checkpoint").StandardCheckpointer() as checkpointer:
            checkpointer.save(folder.absolute(), tree)


def _flat(signature: Signature, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` of a call's arrays, and of its results those that jax can carry."""
    return lambda *arrays: [x for x in jax.tree.leaves(signature.call(fn, arrays)) if not is_foreign(x)]
