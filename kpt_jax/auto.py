"""`kpt.auto_optimize` for JAX."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from kpt.auto import Report, Result, showing
from kpt.hardware import HardwareProfile
from kpt.strategy import Plan
from kpt.strategy.plan import ORIGINAL
from kpt.strategy.tune import Tuned, tune
from kpt.tracking.hooks import record_report
from kpt.tuning import SIGMAS, gain, ratio
from kpt.tuning.measurements import BOTH, FORWARD
from kpt.tuning.trials import seconds_of
from kpt_jax.measure import Timing, loss_and_gradients, measure
from kpt_jax.modules import function_of
from kpt_jax.optimize import Optimized, optimize, profile
from kpt_jax.planner import FRONT
from kpt_jax.trials import ready
from kpt_jax.whole import certify_whole, worst_difference


def auto_optimize(
    fn_or_model: Any, *inputs: Any, level: str | None = None, hardware: Any = "auto", budget: str | float = "30s", **keywords: Any
) -> Result:
    """See `kpt.auto_optimize`."""
    seconds = seconds_of(budget)
    usable = optimize(fn_or_model, level, hardware)
    fast, args, kwargs = function_of(usable, *inputs, **keywords)
    tuned = _tuned(fast, args, kwargs, profile(hardware), seconds)
    plan = certify_whole(fast, args, kwargs)
    error = worst_difference(fast, args, kwargs, plan) if plan.sites else None
    signature, arrays = fast.split(args, kwargs)

    def flat(fn: Any) -> Any:
        return lambda *xs: signature.call(fn, xs)

    paths = {s.path for s in plan.sites}
    ops = sorted({s.op for s in plan.sites})
    # All of the sites, and where there are several ops, those of each op alone.
    left_out: dict[str, set[str]] = {"every site": set()} if plan.sites else {}
    if len(ops) > 1:
        left_out |= {f"{op} alone": paths - {s.path for s in plan.sites if s.op == op} for op in ops}
    variants: dict[str, Optimized] = {n: fast.without(out) if out else fast for n, out in left_out.items()}
    programs = {ORIGINAL: flat(fast.original)} | {n: flat(v) for n, v in variants.items()}
    measured = "forward"
    trained = {n: loss_and_gradients(f, arrays) for n, f in programs.items()}
    if all(f is not None for f in trained.values()):
        measured, programs = "forward and backward", trained
    timings = measure(programs, arrays)
    before = timings[ORIGINAL]
    gains = {n: gain(before.seconds, timings[n].seconds) for n in variants}
    best = max(gains, key=lambda n: gains[n][0], default=ORIGINAL)
    won, noise = gains.get(best, (0.0, 0.0))
    kept = won > SIGMAS * noise and won > 0
    words = f"{measured}, median of {len(before.seconds)} rounds side by side: {ratio(won)} ± {noise:.1%}"
    if kept:
        fast.ban(left_out[best])
        note = f"Measured {words} with {best}."
        chosen = fast.plan(*args, **kwargs)
    elif plan.sites:
        note = f"The original is kept: nothing won by more than the noise ({words} with {best})."
        chosen = _as_written(plan, note)
    else:
        note = "The original is kept: no site has a kernel."
        chosen = plan
    chosen = dataclasses.replace(chosen, notes=(*plan.notes, *tuned.notes(), note))
    after: Timing = timings[best]
    report = Report(chosen.function, chosen.hardware, jax.devices()[0].device_kind, measured, before.seconds,
                    after.seconds, before.memory, after.memory, error, kept, noise, chosen)  # fmt: skip
    record_report(report)
    return Result(usable if kept else fn_or_model, chosen, report)


def _tuned(fast: Optimized, args: tuple, kwargs: dict, hardware: HardwareProfile, budget: float) -> Tuned:
    """Times the kernels that could compute the sites of a function; from then on the fastest are chosen."""
    signature, arrays = fast.split(args, kwargs)
    trained = loss_and_gradients(lambda *xs: signature.call(fast.original, xs), arrays) is not None
    device = jax.default_backend()
    plan = fast.unproved().plan(*args, **kwargs)
    passes = BOTH if trained else FORWARD
    with showing("timing kernels") as done:
        # A TPU belongs to one process, which is this one.
        found = tune(plan.sites, hardware, framework="jax", level=plan.level, compilers=FRONT.compilers, passes=passes, budget=budget,
                     device=device, module="kpt_jax.trials", ready=ready if device == "tpu" else None, done=done)  # fmt: skip
    if found.measured or found.dropped:
        fast.drop(found.dropped)
    return found


def _as_written(plan: Plan, reason: str) -> Plan:
    left = tuple(dataclasses.replace(s, kernel=ORIGINAL, version=None, reason=reason) for s in plan.sites)
    return dataclasses.replace(plan, sites=(), skipped=(*left, *plan.skipped))
