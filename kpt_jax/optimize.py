"""`optimize`: a callable used like the original, rewritten when it is traced."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

import kpt.hardware as hardware_room
from kpt.config import config
from kpt.errors import KptError, PlanError
from kpt.hardware import HardwareProfile
from kpt.strategy import Plan, level_named
from kpt_jax import _compat
from kpt_jax.apply import Rewrite, run
from kpt_jax.capture import capture
from kpt_jax.planner import Planner, active

_NUMBERS = (jax.Array, np.ndarray, np.generic, float, int, complex, jax.ShapeDtypeStruct)


@dataclasses.dataclass(frozen=True)
class Traced:
    """One signature of a function: its rewrite, its plan, and how flat outputs become what it returns."""

    rewrite: Rewrite
    plan: Plan
    out_tree: Any
    closes_over_tracers: bool


class Optimized:
    """A function with kernels in place of what they compute. Made by `optimize`; call it like the original."""

    def __init__(self, fn: Callable[..., Any], level: str, hardware: str | HardwareProfile, plan: Plan | None):
        self._fn = fn
        self._level = level_named(level) and level
        self._hardware = hardware
        self._given = plan
        self._traces: dict[Any, Traced] = {}
        self._calls: dict[Any, Callable[..., Any]] = {}
        self._static_scalars = False
        self._banned: frozenset[str] = frozenset()
        with contextlib.suppress(AttributeError, TypeError):
            functools.update_wrapper(self, fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key, dynamic = self._split(args, kwargs)
        if active.get() is not None or any(map(_compat.is_tracer, dynamic)):
            return self._inline(key, dynamic)
        call = self._calls.get(key)
        if call is not None:
            return call(*dynamic)
        try:
            return self._first_call(key, dynamic, args, kwargs)
        except KptError:
            raise
        except Exception:
            # The original may need its Python numbers as numbers (a size, a branch), not as arrays.
            if self._static_scalars or not any(isinstance(x, int | float | complex) for x in dynamic):
                raise
            self._static_scalars = True
            return self(*args, **kwargs)

    def _first_call(self, key: Any, dynamic: list[Any], args: tuple, kwargs: dict) -> Any:
        self._trace(key, dynamic, example=dynamic)
        donated = _compat.donated(self._fn, args, kwargs)
        donate = ()
        if donated is not None and len(donated) == len(dynamic):
            donate = tuple(i for i, d in enumerate(donated) if d)
        call = jax.jit(functools.partial(_named(self._fn, self._inline), key), donate_argnums=tuple(i for i in donate))
        jitted = _flat_call(call)
        out = jitted(*dynamic)
        self._calls[key] = jitted
        return out

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """The plan for this signature, without running the function. `jax.ShapeDtypeStruct`s will do as arguments."""
        key, dynamic = self._split(args, kwargs)
        concrete = not any(isinstance(x, jax.ShapeDtypeStruct) or _compat.is_tracer(x) for x in dynamic)
        return self._trace(key, dynamic, example=dynamic if concrete else None).plan

    def explain(self, *args: Any, **kwargs: Any) -> str:
        """The plan for this signature in words."""
        return self.plan(*args, **kwargs).explain()

    def certify(self, *args: Any, **kwargs: Any) -> Plan:
        """Compares the whole rewritten function with the original on these arguments, results and gradients.

        Where they disagree although every site agreed alone, a bisection finds the site, which then keeps
        its own code; the plan that is returned names it.
        """
        from kpt_jax.whole import certify_whole

        return certify_whole(self, args, kwargs)

    def _split(self, args: tuple, kwargs: dict) -> tuple[Any, list[Any]]:
        """(what identifies a compiled call, the arrays): Python values other than numbers are part of the former."""
        leaves, tree = jax.tree.flatten((args, kwargs))
        statics: list[Any] = []
        dynamic: list[Any] = []
        for x in leaves:
            scalar = isinstance(x, int | float | complex)
            fixed = isinstance(x, bool) or (scalar and self._static_scalars) or not isinstance(x, _NUMBERS)
            if fixed and not _compat.is_tracer(x):
                statics.append((True, x))
            else:
                statics.append((False, None))
                dynamic.append(x)
        key = (tree, tuple(statics))
        try:
            hash(key)
        except TypeError:
            bad = next(x for s, x in statics if s and not _hashable(x))
            raise KptError(
                f"An argument of type {type(bad).__name__} was passed to an optimized function",
                "it is neither an array nor hashable, so it can be neither traced nor part of a cache key",
                "close over it, or register its type as a pytree with jax.tree_util.register_pytree_node",
            ) from None
        return key, dynamic

    def _flat(self, key: Any) -> Callable[..., Any]:
        """The original over its flat arrays."""
        tree, statics = key

        def flat(*dynamic: Any) -> Any:
            it = iter(dynamic)
            leaves = [x if fixed else next(it) for fixed, x in statics]
            args, kwargs = jax.tree.unflatten(tree, leaves)
            return self._fn(*args, **kwargs)

        return flat

    def _inline(self, key: Any, dynamic: Sequence[Any]) -> Any:
        """Runs the rewritten program on arrays or tracers, whatever trace is under way."""
        traced = self._trace(key, dynamic)
        token = active.set(None)  # what kernels differentiate inside is their own business
        try:
            return jax.tree.unflatten(traced.out_tree, run(traced.rewrite, dynamic))
        finally:
            active.reset(token)

    def _trace(self, key: Any, dynamic: Sequence[Any], example: Sequence[Any] | None = None) -> Traced:
        outer = active.get()
        shapes = tuple(_signature(x) for x in dynamic)
        if outer is None:
            found = self._traces.get((key, shapes))
            if found is not None:
                return found
        planner = outer or self._planner()
        path = ""
        if outer is not None:
            path = f"grad{outer.nested}"
            outer.nested += 1
        token = active.set(planner)
        try:
            with _derivatives_seen():
                structs = [_struct(x) for x in dynamic]
                closed, out = jax.make_jaxpr(self._flat(key), return_shape=True)(*structs)
        finally:
            active.reset(token)
        graph = capture(closed, getattr(self._fn, "__name__", "function"))
        if planner.certify != "full":
            example = None
        rewrite = planner.rewrite(graph, path, example)
        tracers = any(n.op == "opaque:outer" for _, g in graph.walk() for n in g.nodes)
        traced = Traced(rewrite, planner.plan(graph.name), jax.tree.structure(out), tracers)
        if outer is None and not tracers:
            self._traces[(key, shapes)] = traced
        return traced

    def _planner(self) -> Planner:
        wanted = None
        if self._given is not None:
            if self._given.framework != "jax":
                raise PlanError(f"A plan for {self._given.framework} was given to kpt_jax.optimize",
                                "a site is found again by the structure of the jax program",
                                "make a plan with kpt_jax.plan")  # fmt: skip
            wanted = {(s.path, s.op, s.fingerprint): s for s in self._given.sites}
        c = config()
        return Planner(self._level, profile(self._hardware), wanted, self._banned, c.certify)


def _flat_call(jitted: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *dynamic: jitted(*dynamic)


def _named(fn: Callable[..., Any], inline: Callable[..., Any]) -> Callable[..., Any]:
    def call(key: Any, *dynamic: Any) -> Any:
        return inline(key, dynamic)

    call.__name__ = call.__qualname__ = getattr(fn, "__name__", "optimized")
    return call


def _hashable(x: Any) -> bool:
    try:
        hash(x)
    except TypeError:
        return False
    return True


def _signature(x: Any) -> tuple:
    aval = jax.typeof(x) if hasattr(jax, "typeof") and not isinstance(x, jax.ShapeDtypeStruct) else x
    return (aval.shape, str(aval.dtype), bool(getattr(aval, "weak_type", False)), str(getattr(aval, "sharding", "")) if _compat.is_tracer(x) else "")


def _struct(x: Any) -> Any:
    """What make_jaxpr traces `x` as: its type alone, so that tracers of an outer trace stay outside."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    aval = jax.typeof(x)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=bool(getattr(aval, "weak_type", False)))


_DERIVATIVES = ("grad", "value_and_grad", "vjp", "linearize")
_lock = threading.RLock()
_depth = 0
_originals: dict[str, Callable[..., Any]] = {}


@contextlib.contextmanager
def _derivatives_seen() -> Iterator[None]:
    """While a program is traced, functions that it differentiates are rewritten before they are.

    A training step takes the gradient inside: what remains of attention afterwards is its forward and
    backward parts, woven together. So jax's own entry points hand their function to the planner first,
    in the thread that traces, and are put back afterwards.
    """
    global _depth
    with _lock:
        if _depth == 0:
            for name in _DERIVATIVES:
                _originals[name] = getattr(jax, name)
                setattr(jax, name, _through_planner(_originals[name]))
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                for name in _DERIVATIVES:
                    setattr(jax, name, _originals.pop(name))


def _through_planner(derive: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(derive)
    def wrapper(fun: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if active.get() is not None and callable(fun) and not isinstance(fun, Optimized):
            planner = active.get()
            assert planner is not None
            fun = Optimized(fun, planner.level, planner.hardware, None)
        return derive(fun, *args, **kwargs)

    return wrapper


@functools.cache
def _detected() -> HardwareProfile:
    return hardware_room.detect_hardware()


def profile(hardware: str | HardwareProfile) -> HardwareProfile:
    """The profile that a `hardware=` argument names; "auto" detects it."""
    if isinstance(hardware, HardwareProfile):
        return hardware
    if hardware == "auto":
        named = config().hardware
        return _detected() if named == "auto" else hardware_room.hardware_profile(named)
    return hardware_room.hardware_profile(hardware)


def optimize(
    fn: Any, level: str | None = None, hardware: str | HardwareProfile = "auto", plan: Plan | None = None
) -> Any:
    """Rewrites a JAX function, or a Flax module, so that better kernels compute what they can.

    The result is used exactly like the original: under `jit`, `grad`, `vmap`, `scan`, `remat`, with
    pytrees, donated buffers and sharded arrays. Each new signature of arguments is traced, matched and
    certified once; called with arrays outside a trace it runs compiled, as under `jax.jit`.

    Args:
      fn: a function of pytrees of arrays (jitted or not), an `nnx.Module` or a `linen.Module`. A training
        step may differentiate inside, through `jax.grad`, `jax.value_and_grad`, `nnx.grad`, ...
      level: "conservative", "balanced" or "aggressive"; `KPT_LEVEL` or "balanced" by default.
      hardware: "auto", a profile name ("tpu-v5e", "h100-sxm") or a `HardwareProfile`.
      plan: a plan to follow; only the sites it names are swapped.

    Returns:
      A callable with `.plan(*args)`, `.explain(*args)` and `.certify(*args)`; for a module, a module that
      shares its parameters.

    Raises:
      KptError: for an unknown level or hardware, or a plan of another framework.
    """
    level = level or config().level
    from kpt_jax import modules

    if modules.is_nnx(fn):
        return modules.optimize_nnx(fn, level, hardware, plan)
    if modules.is_linen(fn):
        return modules.optimize_linen(fn, level, hardware, plan)
    if not callable(fn):
        raise KptError(f"kpt_jax.optimize was given a {type(fn).__name__}",
                       "it takes a function, an nnx.Module or a linen.Module",
                       "pass the function that computes, for example the loss")  # fmt: skip
    return Optimized(fn, level, hardware, plan)


def plan(fn: Any, *args: Any, level: str | None = None, hardware: str | HardwareProfile = "auto", **kwargs: Any) -> Plan:
    """What `optimize` would do to `fn` for these arguments: the Plan alone; the function is not run."""
    return optimize(fn, level, hardware).plan(*args, **kwargs)
