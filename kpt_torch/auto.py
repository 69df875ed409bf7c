"""`kpt.auto_optimize` for PyTorch."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from kpt.auto import Report, Result, showing
from kpt.hardware import HardwareProfile
from kpt.strategy import Plan
from kpt.strategy.certify import narrowest, reduction_length
from kpt.strategy.plan import ORIGINAL
from kpt.strategy.tune import Tuned, tune
from kpt.tracking.hooks import record_report
from kpt.tuning import SIGMAS, gain, ratio, rounds
from kpt.tuning.measurements import BOTH, FORWARD
from kpt.tuning.trials import seconds_of
from kpt.validation import Certificate, compare
from kpt_torch.backend import device_of, profile
from kpt_torch.capture import to_numpy
from kpt_torch.optimize import optimize, unproved, without
from kpt_torch.planner import Front
from kpt_torch.trials import wait


def auto_optimize(
    fn_or_model: Any, *inputs: Any, level: str | None = None, hardware: Any = "auto", budget: str | float = "30s", **keywords: Any
) -> Result:
    """See `kpt.auto_optimize`. A module whose result is, or holds under `.loss`, one number is measured with its backward pass."""
    seconds = seconds_of(budget)
    fast = optimize(fn_or_model, level, hardware)
    leaves = [t for t in pytree.tree_leaves((inputs, keywords)) if isinstance(t, torch.Tensor)]
    weights = list(fn_or_model.parameters()) if isinstance(fn_or_model, torch.nn.Module) else []
    moving = [t for t in (*weights, *leaves) if t.requires_grad]
    device = device_of([*weights, *leaves])
    trained = bool(moving) and _loss(fn_or_model(*inputs, **keywords)) is not None
    tuned: Tuned | None = None
    if device.type in ("cpu", "cuda"):
        tuned = _tuned(unproved(fast).plan(*inputs, **keywords), profile(hardware, device), device, trained, seconds)
        fast = without(fast, tuned.dropped)
    plan = fast.plan(*inputs, **keywords)

    def once(program: Callable[..., Any]) -> tuple[Any, list[torch.Tensor]]:
        out = program(*inputs, **keywords)
        loss = _loss(out) if trained else None
        return out, [] if loss is None else list(torch.autograd.grad(loss, moving, allow_unused=True, materialize_grads=True))

    verdict = _verdict(once(fn_or_model), lambda: once(fast), plan, device) if plan.sites else None
    sides = {ORIGINAL: fn_or_model} | ({"every site": fast} if verdict is not None and verdict.passed else {})
    taken = rounds({n: _sampler(once, program, device) for n, program in sides.items()})
    memory = {n: _peak(once, program, device) for n, program in sides.items()}
    best = "every site" if "every site" in taken else ORIGINAL
    won, noise = gain(taken[ORIGINAL], taken[best])
    kept = best != ORIGINAL and won > SIGMAS * noise
    measured = "forward and backward" if trained else "forward"
    words = f"{measured}, median of {len(taken[ORIGINAL])} rounds side by side: {ratio(won)} ± {noise:.1%}"
    notes = [*plan.notes, *(tuned.notes() if tuned is not None else ())]
    if verdict is not None:
        notes.append(f"The whole program on example inputs: {verdict.summary()}.")
    if kept:
        notes.append(f"Measured {words} with every site.")
    elif best != ORIGINAL:
        notes.append(f"The original is kept: nothing won by more than the noise ({words} with every site).")
    else:
        notes.append("The original is kept: " + ("the whole program disagreed." if plan.sites else "no site has a kernel."))
    chosen = dataclasses.replace(plan if kept else _as_written(plan, notes[-1]), notes=tuple(notes))
    found = [w for w in (verdict.worst(gradient=False), verdict.worst(gradient=True)) if w is not None] if verdict is not None else []
    report = Report(chosen.function, chosen.hardware, _device_name(device), measured, taken[ORIGINAL], taken[best], memory[ORIGINAL],
                    memory[best], max(found, default=None), kept, noise, chosen)  # fmt: skip
    record_report(report)
    return Result(fast if kept else fn_or_model, chosen, report)


def _tuned(plan: Plan, hardware: HardwareProfile, device: torch.device, trained: bool, budget: float) -> Tuned:
    """Times the kernels that could compute the sites of a plan; later plans choose the fastest."""
    passes = BOTH if trained else FORWARD
    with showing("timing kernels") as done:
        return tune(plan.sites, hardware, framework="torch", level=plan.level, compilers=Front.compilers, passes=passes, budget=budget,
                    device=device.type, module="kpt_torch.trials", done=done)  # fmt: skip


def _verdict(want: Any, run: Callable[[], Any], plan: Plan, device: torch.device) -> Certificate:
    """Results and gradients of the rewritten program beside the original's."""

    def named(made: Any) -> dict[str, Any]:
        out, grads = made
        results = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        return {f"result{i}": to_numpy(t) for i, t in enumerate(results)} | {f"d{i}": to_numpy(g) for i, g in enumerate(grads)}

    original, actual = named(want), named(run())
    dtypes = [spec.dtype for s in plan.sites for spec in s.specs.values()] + [str(a.dtype) for a in original.values()]
    # Roundings of sites in sequence add in squares, as if all of their sums were one.
    length = max(1, sum(reduction_length(s.op, s.specs, s.params) for s in plan.sites))
    gradients = [n for n in original if n.startswith("d")]
    # A gradient that cancels (a key's bias, which softmax does not see) errs by the rounding of gradients of the usual size.
    usual = max((float(np.sqrt(np.mean(np.square(original[n], dtype=np.float64)))) for n in gradients if original[n].size), default=0.0)
    return compare(actual, original, narrowest(dtypes), length, gradients=gradients, terms=dict.fromkeys(gradients, usual),
                   where="the example inputs")  # fmt: skip


def _loss(out: Any) -> torch.Tensor | None:
    """The one number that a result is, or holds under `.loss`."""
    found = out if isinstance(out, torch.Tensor) else getattr(out, "loss", None)
    ok = isinstance(found, torch.Tensor) and found.dim() == 0 and found.is_floating_point() and found.requires_grad
    return found if ok else None


def _sampler(once: Callable[..., Any], program: Any, device: torch.device) -> Callable[[int], float]:
    def sample(repeats: int) -> float:
        wait(device)
        start = time.perf_counter()
        for _ in range(repeats):
            once(program)
        wait(device)
        return (time.perf_counter() - start) / repeats

    return sample


def _peak(once: Callable[..., Any], program: Any, device: torch.device) -> int | None:
    """Bytes that a call needs besides what is there before it; known on CUDA alone."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    once(program)
    return torch.cuda.max_memory_allocated(device) - before


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _as_written(plan: Plan, reason: str) -> Plan:
    left = tuple(dataclasses.replace(s, kernel=ORIGINAL, version=None, reason=reason) for s in plan.sites)
    return dataclasses.replace(plan, sites=(), skipped=(*left, *plan.skipped))


