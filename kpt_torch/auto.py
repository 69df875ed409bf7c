"""`kpt.auto_optimize` for PyTorch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from kpt.auto import Report, Result, as_written, compared, showing
from kpt.errors import KptError, MissingDependencyError
from kpt.hardware import planned_elsewhere
from kpt.inputs import explained
from kpt.install import install
from kpt.strategy import Plan
from kpt.strategy.certify import narrowest, reduction_length
from kpt.strategy.leave_out import leave_out
from kpt.strategy.plan import ORIGINAL
from kpt.strategy.tune import Runner, Tuned, to_time, tune
from kpt.tuning import rounds
from kpt.tuning.measurements import AS_CALLED, BOTH
from kpt.tuning.settings import found
from kpt.validation import Certificate, ErrorMetrics, compare
from kpt.validation.rounding import cancelling, movements
from kpt.validation.tolerance import Tolerance, epsilon, tolerance
from kpt_torch.backend import detected, device_of, profile
from kpt_torch.capture import to_numpy
from kpt_torch.library import dtype_name
from kpt_torch.on_device import OnDevice
from kpt_torch.optimized import can_change, leaving, modules_of, optimize, put_back, unproved, without
from kpt_torch.planner import Front
from kpt_torch.trials import sample

log = logging.getLogger("kpt")


def runner(device: torch.device) -> Runner:
    """Trials on a device, under what is set now."""
    name = f"cuda:{torch.cuda.current_device()}" if str(device) == "cuda" else str(device)
    return Runner("torch", detected(device), Front.compilers, name, "kpt_torch.trials", known=Front.settings,
                  settings=found(Front.settings))  # fmt: skip


class Session:
    """The steps of `auto_optimize` on one program and its example inputs, see `kpt.auto.Session`."""

    def __init__(self, fn_or_model: Any, inputs: tuple, keywords: Mapping[str, Any], level: str | None, hardware: Any):
        self.given, self.inputs, self.keywords = fn_or_model, inputs, keywords
        self.planning = functools.partial(explained, fn_or_model, inputs, keywords, "torch")
        self.saves = isinstance(fn_or_model, torch.nn.Module)
        leaves = [t for t in pytree.tree_leaves((inputs, keywords)) if isinstance(t, torch.Tensor)]
        modules = modules_of(fn_or_model)
        self.weights = weights = [p for m in modules for p in m.parameters()]
        self.moving = [t for t in (*weights, *leaves) if t.requires_grad]
        # Running statistics, caches, and inputs that are written to: the program runs a hundred times, and is then to be as it was.
        self.state = [*leaves, *(b for m in modules for b in m.buffers())]
        self.on = device_of([*weights, *leaves])
        self.device = torch.cuda.get_device_name(self.on) if self.on.type == "cuda" else self.on.type
        self.here = detected(self.on)
        if hardware == "auto" and planned_elsewhere(self.here):
            hardware = self.here
        self.hardware = profile(hardware, self.on)
        self.fast = optimize(fn_or_model, level, hardware)
        with self.planning():
            self.trained = self._is_loss()

    def _is_loss(self) -> bool:
        """Whether the result is one number with gradients. A step that has run its backward pass itself has none left."""
        before = {p: p._version for p in self.weights if not (is_lazy(p) or p.is_inference())}
        with put_back(self.state):
            loss = _loss(self.given(*self.inputs, **self.keywords))
            try:
                scalar = loss is not None and bool(self.moving) and bool(torch.autograd.grad(loss, self.moving, allow_unused=True))
            except RuntimeError:
                scalar = False
        # A module that writes to its own parameters does so by itself (`nn.Embedding(max_norm=)`); a function that does is a training step.
        if not self.saves and any(p._version != version for p, version in before.items()):
            raise KptError("auto_optimize was given a function that updates the parameters of a model",
                           "It has run once, and would run many times more, which would train the model",
                           "Pass the model, or the function that returns the loss")  # fmt: skip
        return scalar

    def plan(self) -> Plan:
        with self.planning():
            return self._planned(unproved(self.fast))

    def _planned(self, program: Any) -> Plan:
        with put_back(self.state):
            made: Plan = program._kpt_plan(*self.inputs, **self.keywords)
        return made

    def tune(self, budget: float) -> Tuned:
        plan = self.plan()
        # An XLA device belongs to one process.
        sites = to_time(plan) if self.on.type in ("cpu", "cuda") else ()
        with showing("timing kernels") as done:
            made = tune(sites, self.hardware, runner(self.on), level=plan.level, trained=self.trained, budget=budget, done=done)
        self.follow(made.dropped)
        return made

    def follow(self, dropped: Mapping[str, str], plan: Plan | None = None) -> None:
        self.fast = without(self.fast, dropped)

    def leave_out(self, budget: float) -> tuple[Mapping[str, str], tuple[str, ...]]:
        if budget <= 0:
            return {}, ()

        def ready(left: Mapping[str, str]) -> Callable[[int], float]:
            program = leaving(self.fast, left)
            self._once(program)  # is captured and compiled
            return functools.partial(sample, functools.partial(self._once, program), self.on)

        sites = self._planned(self.fast).sites
        with put_back(self.state):
            return leave_out(sites, ready, budget)

    def leave(self, sites: Mapping[str, str]) -> None:
        self.fast = leaving(self.fast, sites)

    def validate(self) -> tuple[Plan, float | None]:
        plan = self._planned(self.fast)
        if not plan.sites:
            return plan, None
        verdict = self._verdict(plan)
        note = f"The whole program on example inputs: {verdict.summary()}."
        if not verdict.passed:
            plan = as_written(plan, "The original is kept: the whole program disagreed.")
        found = [w for w in (verdict.worst(gradient=False), verdict.worst(gradient=True)) if w is not None]
        return dataclasses.replace(plan, notes=(*plan.notes, note)), max(found, default=None)

    def measure(self, plan: Plan, error: float | None, notes: tuple[str, ...] = ()) -> Report:
        sides = {ORIGINAL: self.given} | ({"rewrite": self.fast} if plan.sites else {})
        with put_back(self.state):
            taken = rounds({n: functools.partial(sample, functools.partial(self._once, program), self.on) for n, program in sides.items()})
            memory = {n: self._peak(program) for n, program in sides.items()}
        best = "rewrite" if plan.sites else ORIGINAL
        measured = BOTH if self.trained else AS_CALLED
        kept, noise, note = compared(plan, measured, taken[ORIGINAL], taken[best])
        chosen = dataclasses.replace(plan if kept else as_written(plan, note), notes=(*plan.notes, *notes, note))
        return Report(chosen.function, self.here.name, self.device, measured, taken[ORIGINAL], taken[best], memory[ORIGINAL], memory[best],
                      error, kept, noise, chosen, one_program=not plan.sites)  # fmt: skip

    def result(self, report: Report) -> Result:
        return Result(self.fast if report.kept else self.given, report.plan, report)

    def save(self, folder: Path) -> None:
        """The parameters and buffers of a module: `safetensors.torch.load_model(module, folder / "model.safetensors")`."""
        if importlib.util.find_spec("safetensors") is None:
            asked = "A checkpoint of a torch.nn.Module was asked for"
            raise MissingDependencyError(asked, "safetensors is not installed", install("torch"))
        folder.mkdir(parents=True)
        importlib.import_module("safetensors.torch").save_model(self.given, str(folder / "model.safetensors"))

    def _once(self, program: Callable[..., Any]) -> tuple[Any, list[torch.Tensor]]:
        out = program(*self.inputs, **self.keywords)
        loss = _loss(out) if self.trained else None
        return out, [] if loss is None else list(torch.autograd.grad(loss, self.moving, allow_unused=True, materialize_grads=True))

    def _values(self, program: Callable[..., Any]) -> dict[str, torch.Tensor]:
        """Results and gradients by name, of the same state and random numbers at each call."""
        with put_back(self.state):
            out, grads = self._once(program)
            results = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_floating_point()]
            named = {f"result{i}": t for i, t in enumerate(results)} | {f"d{i}": g for i, g in enumerate(grads)}
            return {n: t.detach().to("cpu", copy=True) for n, t in named.items()}  # copies: a program may return the same memory again

    def _verdict(self, plan: Plan) -> Certificate:
        """Results and gradients of the rewritten program beside the original's."""
        original, actual = self._values(self.given), self._values(self.fast)
        dtype = narrowest([spec.dtype for s in plan.sites for spec in s.specs.values()] + [dtype_name(t.dtype) for t in original.values()])
        # Roundings of sites in sequence add in squares, as if all of their sums were one.
        length = max(1, sum(reduction_length(s.op, s.specs, s.params) for s in plan.sites))
        gradients = [n for n in original if n.startswith("d")]
        seeds = itertools.count()

        def measure(a: torch.Tensor, r: torch.Tensor) -> ErrorMetrics:  # one at a time: beside the program there may be little room
            return OnDevice(self.on).metrics(a.to(self.on), r.to(self.on))

        held = functools.partial(compare, actual, original, dtype, length, gradients=gradients, where="the example inputs",
                                 measure=measure, chain=len(plan.sites))  # fmt: skip

        def bound(name: str) -> Tolerance:
            return tolerance(dtype, length, gradient=name in gradients, chain=len(plan.sites))

        def nearby(step: float | None) -> dict[str, torch.Tensor]:
            with _moved(dict.fromkeys((*self.weights, *self.moving)), step, seeds):
                return _real(self._values(self.given))

        def distances(got: Mapping[str, torch.Tensor]) -> dict[str, ErrorMetrics]:
            return {n: measure(t, original[n]) for n, t in got.items()}

        def of_gradients() -> dict[str, ErrorMetrics]:
            return {n: m for n, m in distances(nearby(epsilon(dtype))).items() if n in gradients}

        found = held()
        if found.passed:  # for most programs nothing cancels, and what follows needs more runs
            return found
        try:
            sensitivity = movements(_real(original), nearby, distances, to_numpy, bound, epsilon(dtype))
            found = held(sensitivity=sensitivity)
            return found if found.passed or not gradients else held(sensitivity=sensitivity, terms=cancelling(of_gradients))
        except Exception as error:  # a program may refuse weights that are not its own
            log.info("how far %s moves is not known: %s", plan.function, error)
            return found

    def _peak(self, program: Callable[..., Any]) -> int | None:
        """Bytes that a call needs besides what is there before it; known on CUDA alone."""
        if self.on.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self.on)
        before = torch.cuda.memory_allocated(self.on)
        self._once(program)
        return torch.cuda.max_memory_allocated(self.on) - before


def _loss(out: Any) -> torch.Tensor | None:
    """The one number that a result is, or holds under `.loss`."""
    found = out if isinstance(out, torch.Tensor) else getattr(out, "loss", None)
    ok = isinstance(found, torch.Tensor) and found.dim() == 0 and found.is_floating_point() and found.requires_grad
    return found if ok else None


def _real(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What has a size to move by: complex numbers are refused by the comparison."""
    return {n: t for n, t in values.items() if not t.is_complex()}


@contextlib.contextmanager
def _moved(tensors: Iterable[torch.Tensor], step: float | None, seeds: Iterator[int]) -> Iterator[None]:
    """Within, these weights are off by so much; None: by their last bits. Data stays: indices and masks are made of it, which have limits.

    By `data`, whose writes leave valid what autograd keeps of a tensor for the user's own graphs.
    """
    floats = [t.data for t in tensors if t.is_floating_point() and t.element_size() > 1 and can_change(t)]
    kept = [t.clone() for t in floats]
    torch.clear_autocast_cache()  # narrower copies of weights
    try:
        for t, seed in zip(floats, seeds, strict=False):
            t.copy_(OnDevice(t.device).nudged(t, seed, epsilon(dtype_name(t.dtype)) if step is None else step))
        yield
    finally:
        for t, old in zip(floats, kept, strict=True):
            t.copy_(old)
        torch.clear_autocast_cache()
