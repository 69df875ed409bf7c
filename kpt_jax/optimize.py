"""`optimize`: a callable used like the original, rewritten when it is traced."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kpt.config import config, start_logging
from kpt.errors import GraphError, KptError, PlanError
from kpt.frameworks import refuse_other
from kpt.hardware import HardwareProfile
from kpt.inputs import explained
from kpt.raised import told
from kpt.strategy import Plan, level_named
from kpt_jax import _compat, modules
from kpt_jax.apply import Rewrite, run
from kpt_jax.capture import capture, uncollected
from kpt_jax.derivatives import derivatives_seen
from kpt_jax.devices import here, profile
from kpt_jax.planner import FRONT, Planner, active

_NUMBERS = (jax.Array, np.ndarray, np.generic, float, int, complex, jax.ShapeDtypeStruct, *_compat.CONSTANTS)
_SCALARS = (int, float, complex)
# What jax raises where Python needs a value that is not known while a function is traced.
_UNKNOWN = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


@dataclasses.dataclass(frozen=True)
class Traced:
    """One signature of a function: its rewrite, its plan, and how flat results become what it returns.

    Attributes:
      out_statics: for each leaf of the result, `(type, value)` of a Python object that jax cannot carry, or `(None, None)`.
      donated: the flat inputs that the original, a jitted function, donates.
    """

    rewrite: Rewrite
    plan: Plan
    out_tree: Any
    out_statics: tuple[tuple[Any, Any], ...]
    donated: tuple[int, ...]

    @property
    def foreign(self) -> bool:
        return any(kind is not None for kind, _ in self.out_statics)

    def result(self, flat: Sequence[Any]) -> Any:
        return jax.tree.unflatten(self.out_tree, _woven(self.out_statics, flat))


@dataclasses.dataclass(frozen=True)
class Signature:
    """What identifies a compiled call besides the types of its arrays.

    Attributes:
      tree: structure of `(args, kwargs)`.
      statics: for each leaf, `(type, value)` of a Python value that is part of the signature (the type because
        True == 1 == 1.0), and `(None, None)` for an array.
    """

    tree: Any
    statics: tuple[tuple[Any, Any], ...]

    @property
    def has_statics(self) -> bool:
        return any(kind is not None for kind, _ in self.statics)

    def call(self, fn: Callable[..., Any], dynamic: Sequence[Any]) -> Any:
        """`fn` on the arguments that `Optimized.split` took apart."""
        args, kwargs = jax.tree.unflatten(self.tree, _woven(self.statics, dynamic))
        return fn(*args, **kwargs)


class _Static(Exception):
    """A call has arguments that are part of its signature, or results that are Python objects, and not arrays."""


@jax.tree_util.register_pytree_node_class
class _Foreign:
    """A result that jax cannot carry, as part of the structure of what a jitted call returns."""

    def __init__(self, value: Any):
        self.value = value

    def tree_flatten(self) -> tuple[tuple, _Foreign]:
        return (), self

    @classmethod
    def tree_unflatten(cls, aux: _Foreign, _: Any) -> _Foreign:
        return aux


class Optimized:
    """A function with kernels in place of what they compute. Made by `optimize`; call it like the original."""

    def __init__(self, fn: Callable[..., Any], level: str, hardware: str | HardwareProfile, plan: Plan | None):
        self._fn = fn
        self._level = level_named(level).name
        self._hardware = hardware
        self._given = plan
        self._part = "call"  # as part of a larger program: an optimized function called there, or what is differentiated
        self._traces: dict[Any, Traced] = {}
        self._calls: dict[Any, Callable[..., Any]] = {}  # where some arguments are static
        self._jitted: Callable[..., Any] | None = None  # where none are: jax.jit's own dispatch
        self._static_scalars = False
        self._foreign = False  # whether some result is no array: jax.jit cannot return it
        self._over_state: Optimized | None = None  # where arguments are nnx objects
        self._banned: Mapping[str, str] = {}
        self._dropped: Mapping[str, str] = {}
        self._certify: str | None = None  # instead of the setting
        with contextlib.suppress(AttributeError, TypeError):
            functools.update_wrapper(self, fn, updated=())

    def __reduce__(self) -> Any:
        """For pickle and copy: by name where it is found under its function's, as functions are; else what it was made of."""
        found: Any = sys.modules.get(self.__module__)
        for name in getattr(self, "__qualname__", "").split("."):
            found = getattr(found, name, None)
        if found is self:
            return self.__qualname__
        return _again, (self._fn, self._level, self._hardware, self._given, dict(self._banned), dict(self._dropped))

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if modules.takes_nnx(args, kwargs) and active.get() is None:
            return self._call_over_state(args, kwargs)
        # Where jax.jit's own cache knows the call, what stands here is all that it costs beside a call of jax.jit.
        jitted = self._jitted
        if jitted is not None and _compat.outside_of_traces() and active.get() is None:
            _local.example = (args, kwargs)
            try:
                return jitted(*args, **kwargs)
            except _Static:
                pass
            except TypeError:  # jax.jit refuses what is no array before it traces
                if not self.split(args, kwargs)[0].has_statics:
                    raise
            finally:
                _local.example = None
        return self._call(args, kwargs)

    def _call_over_state(self, args: tuple, kwargs: dict) -> Any:
        objects, values = modules.values_of(args, kwargs)
        out, graphdef, state = self._for_nnx()(*values)
        modules.write_back(objects, values[0], graphdef, state)
        return out

    def _call(self, args: tuple, kwargs: dict) -> Any:
        """A first call, one inside of a trace, or one with static arguments."""
        if active.get() is None and modules.holds_nnx((args, kwargs)):
            return self._call_over_state(args, kwargs)
        key, dynamic = self.split(args, kwargs)
        if active.get() is not None or any(map(_compat.is_tracer, dynamic)):
            return self._inline(key, dynamic)
        call = self._calls.get(key)
        if call is not None:
            return _with_example(dynamic, call, *dynamic)
        try:
            return self._first_call(key, dynamic, args, kwargs)
        except KptError:
            raise
        except Exception:
            # The original may need its Python numbers as numbers (a size, a branch), not as arrays.
            if self._static_scalars or not any(isinstance(x, _SCALARS) for x in dynamic):
                raise
            self._static_scalars = True
            self._jitted = None
            return self(*args, **kwargs)

    def _first_call(self, key: Signature, dynamic: list[Any], args: tuple, kwargs: dict) -> Any:
        traced = self._trace(key, dynamic, example=dynamic)
        if traced.foreign:
            self._foreign, self._jitted = True, None
        if not (key.has_statics or self._static_scalars or self._foreign):
            positions, names = _whole_arguments(args, kwargs, traced.donated)
            self._jitted = jax.jit(_named(self._fn, self._traced_call), donate_argnums=positions, donate_argnames=names)
            return _with_example((args, kwargs), self._jitted, *args, **kwargs)
        jitted = jax.jit(_named(self._fn, functools.partial(self._traced_flat_call, key)), donate_argnums=traced.donated)
        call = functools.partial(_unwrapped, jitted)
        out = _with_example(dynamic, call, *dynamic)
        self._calls[key] = call
        return out

    def _traced_call(self, *args: Any, **kwargs: Any) -> Any:
        """What jax.jit traces, once for each signature."""
        if modules.holds_nnx((args, kwargs)):
            raise _Static
        example, real = _example(), None
        if example is not None:
            real_key, real = self.split(*example)
            if real_key.has_statics:
                raise _Static
        key, dynamic = self.split(args, kwargs)
        out = self._inline(key, dynamic, real)
        if any(map(is_foreign, jax.tree.leaves(out))):
            raise _Static
        return out

    def _traced_flat_call(self, key: Signature, *dynamic: Any) -> Any:
        out = self._inline(key, dynamic, _example())
        return jax.tree.map(lambda x: _Foreign(x) if is_foreign(x) else x, out)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """`jax.jit(self).lower(...)`: the rewritten program, for inspection and ahead-of-time compilation."""
        return jax.jit(lambda *a, **k: self(*a, **k)).lower(*args, **kwargs)

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """The plan for this signature, without running the function. A `jax.ShapeDtypeStruct` will do for an array."""
        if modules.holds_nnx((args, kwargs)):
            return self._for_nnx().plan(*modules.values_of(args, kwargs)[1])
        key, dynamic = self.split(args, kwargs)
        concrete = not any(isinstance(x, jax.ShapeDtypeStruct) or _compat.is_tracer(x) for x in dynamic)
        try:
            return self._trace(key, dynamic, example=dynamic if concrete else None).plan
        except KptError:
            raise
        except Exception:
            if self._static_scalars or not any(isinstance(x, _SCALARS) for x in dynamic):
                raise
            self._static_scalars = True
            self._jitted = None
            return self.plan(*args, **kwargs)

    def explain(self, *args: Any, **kwargs: Any) -> str:
        """The plan for this signature in words."""
        return self.plan(*args, **kwargs).explain()

    def certify(self, *args: Any, **kwargs: Any) -> Plan:
        """Compares the whole rewritten function with the original on these arguments, results and gradients.

        Where they disagree although every site agreed alone, a bisection finds the site, which then keeps
        its own code; the plan that is returned names it.
        """
        from kpt_jax.whole import certify_whole

        if modules.holds_nnx((args, kwargs)):
            return self._for_nnx().certify(*modules.values_of(args, kwargs)[1])
        return certify_whole(self, args, kwargs)[0]

    def _for_nnx(self) -> Optimized:
        """This function of values: what it changes in its objects comes back as state, and is written to them."""
        if self._over_state is None:
            self._over_state = Optimized(modules.over_state(self._fn), self._level, self._hardware, self._given)
            for name in ("_banned", "_dropped", "_certify"):
                setattr(self._over_state, name, getattr(self, name))
        return self._over_state

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The function as it was given."""
        return self._fn(*args, **kwargs)

    def without(self, sites: Mapping[str, str]) -> Optimized:
        """The same function with these sites, by path, left as they were written, for the reasons given."""
        other = Optimized(self._fn, self._level, self._hardware, self._given)
        other._static_scalars = self._static_scalars
        other._banned = {**self._banned, **sites}
        other._dropped = self._dropped
        return other

    def ban(self, sites: Mapping[str, str]) -> None:
        """From now on, these sites, by path, run as they were written, for the reasons given."""
        self._banned = {**self._banned, **sites}
        self._forget()

    def drop(self, kernels: Mapping[str, str]) -> None:
        """From now on, these kernels are not used, for the reasons given; what was measured meanwhile is heeded."""
        self._dropped = {**self._dropped, **kernels}
        self._forget()
        if self._over_state is not None:
            self._over_state.drop(kernels)

    def unproved(self) -> Optimized:
        """The same function, whose plans run no kernel."""
        other = self.without({})
        other._certify = "off"
        return other

    def _forget(self) -> None:
        self._traces.clear()
        self._calls.clear()
        self._jitted = None

    def split(self, args: tuple, kwargs: dict) -> tuple[Signature, list[Any]]:
        """(what identifies a compiled call, the arrays): Python values other than numbers are part of the former."""
        leaves, tree = jax.tree.flatten((args, kwargs))
        statics: list[Any] = []
        dynamic: list[Any] = []
        for x in leaves:
            scalar = isinstance(x, _SCALARS)
            fixed = isinstance(x, bool) or (scalar and self._static_scalars) or not isinstance(x, _NUMBERS)
            if fixed and not _compat.is_tracer(x):
                statics.append((type(x), x))
            else:
                statics.append((None, None))
                dynamic.append(x)
        key = Signature(tree, tuple(statics))
        try:
            hash(key)
        except TypeError:
            bad = next((x for s, x in statics if s and not _hashable(x)), None)
            raise KptError(
                f"An argument of type {type(bad).__name__} was passed to an optimized function",
                "It is neither an array nor hashable, so it can be neither traced nor part of a cache key",
                "Close over it, or register its type as a pytree with jax.tree_util.register_pytree_node",
            ) from None
        return key, dynamic

    def _inline(self, key: Signature, dynamic: Sequence[Any], example: Sequence[Any] | None = None) -> Any:
        """Runs the rewritten program on arrays or tracers, whatever trace is under way."""
        if not all(isinstance(n, int) for x in dynamic for n in np.shape(x)):
            return key.call(self._fn, dynamic)  # jax.export with symbolic sizes: kernels are chosen for known ones
        if _compat.forward_mode(dynamic):
            # Kernels carry a backward pass alone; forward derivatives are those of the code as it was written.
            return key.call(self._fn, dynamic)
        traced = self._trace(key, dynamic, example)
        token = active.set(None)  # what kernels differentiate inside is their own business
        try:
            return traced.result(run(traced.rewrite, dynamic))
        finally:
            active.reset(token)

    def _trace(self, key: Signature, dynamic: Sequence[Any], example: Sequence[Any] | None = None) -> Traced:
        outer = active.get()
        signature = (key, tuple(map(_signature, dynamic)), _compat.trace_context())
        if outer is None:
            found = self._traces.get(signature)
            if found is not None:
                return found
        planner = outer or self._planner(dynamic if example is None else example)
        path = ""
        if outer is not None:
            path = f"{outer.within}{self._part}{outer.nested}"
            outer.nested += 1
        results: list[Any] = []

        def flat(*arrays: Any) -> list[Any]:
            leaves, tree = jax.tree.flatten(key.call(self._fn, arrays))
            statics = tuple((type(x), x) if is_foreign(x) else (None, None) for x in leaves)
            results[:] = [tree, statics]
            return [x for x, (kind, _) in zip(leaves, statics, strict=True) if kind is None]

        if hasattr(self._fn, "__code__"):
            flat.__wrapped__ = self._fn  # type: ignore[attr-defined]  # jax's errors name the user's function and line
        token, within = active.set(planner), planner.within
        planner.within = f"{path}/" if path else ""
        with uncollected():
            try:
                with derivatives_seen(planner.token):
                    closed = jax.make_jaxpr(flat)(*map(_struct, dynamic))
            finally:
                active.reset(token)
                planner.within = within
            graph = capture(closed, getattr(self._fn, "__name__", "function"))
        tracers = any(n.op == "opaque:outer" for _, g in graph.walk() for n in g.nodes)
        if planner.certify != "full" or tracers:
            example = None
        # Certificates run now, whatever is being traced, and what they differentiate is not the program's.
        token = active.set(None)
        try:
            with _compat.concrete():
                rewrite = planner.rewrite(graph, path, example)
        finally:
            active.reset(token)
        donated = _compat.donated_inputs(closed) if _compat.is_jitted(self._fn) else ()
        traced = Traced(rewrite, planner.plan(graph.name), results[0], results[1], donated)
        if outer is None and not tracers:
            self._traces[signature] = traced
        return traced

    def _planner(self, arrays: Sequence[Any]) -> Planner:
        wanted = None
        if self._given is not None:
            wanted = {(s.path, s.op, s.fingerprint): s for s in self._given.sites}
        certify = self._certify or config().certify
        return Planner(FRONT, self._level, profile(self._hardware, arrays), wanted, self._banned, certify, here(arrays),
                       dropped=self._dropped)  # fmt: skip


def _again(
    fn: Any, level: str, hardware: str | HardwareProfile, plan: Plan | None, banned: Mapping[str, str], dropped: Mapping[str, str]
) -> Optimized:
    made = Optimized(fn, level, hardware, plan)
    made._banned, made._dropped = banned, dropped
    return made


_local = threading.local()
"""`example`: the arrays of the call under way in this thread, for certificates on the user's own data."""


def _with_example(example: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    _local.example = example
    try:
        return call(*args, **kwargs)
    finally:
        _local.example = None


def _example() -> Any:
    """Taken by the trace that a call sets off, before anything of the user's runs; None for any trace but its first."""
    example = getattr(_local, "example", None)
    _local.example = None
    return example


def _unwrapped(call: Callable[..., Any], *dynamic: Any) -> Any:
    out = call(*dynamic)
    return jax.tree.map(lambda x: x.value if isinstance(x, _Foreign) else x, out, is_leaf=lambda x: isinstance(x, _Foreign))


def _woven(statics: Sequence[tuple[Any, Any]], dynamic: Sequence[Any]) -> list[Any]:
    it = iter(dynamic)
    return [next(it) if kind is None else x for kind, x in statics]


def _named(fn: Callable[..., Any], body: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return body(*args, **kwargs)

    call.__name__ = call.__qualname__ = getattr(fn, "__name__", "optimized")
    return call


def _whole_arguments(args: tuple, kwargs: dict, flat: Sequence[int]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The arguments, by position and by name, all of whose leaves are among the flat inputs `flat`."""
    chosen, first = set(flat), 0
    found: list[int | str] = []
    for name, value in (*enumerate(args), *sorted(kwargs.items())):
        count = len(jax.tree.leaves(value))
        if count and chosen.issuperset(range(first, first + count)):
            found.append(name)
        first += count
    return tuple(n for n in found if isinstance(n, int)), tuple(n for n in found if isinstance(n, str))


def _hashable(x: Any) -> bool:
    try:
        hash(x)
    except TypeError:
        return False
    return True


def is_foreign(x: Any) -> bool:
    """Whether a result is a Python object that jax cannot carry."""
    return not (_compat.is_tracer(x) or isinstance(x, _NUMBERS))


def _signature(x: Any) -> tuple:
    aval = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    return aval.shape, str(aval.dtype), bool(getattr(aval, "weak_type", False)), *_compat.placement(aval)


def _struct(x: Any) -> Any:
    """What make_jaxpr traces `x` as: its type alone, so that tracers of an outer trace stay outside.

    An explicit sharding is part of it: what jax makes for an array (zeros, gradients) lies as the array does.
    """
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    aval = jax.typeof(x)
    sharding, _ = _compat.placement(aval)
    if sharding is not None or _compat.varying_axes(aval):  # no struct says the latter on every jax
        return aval
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=bool(getattr(aval, "weak_type", False)))


def nested(fun: Callable[..., Any]) -> Callable[..., Any]:
    """What is about to be differentiated inside the program being traced, rewritten as part of it."""
    planner = active.get()
    if planner is None or not callable(fun):
        return fun
    part = Optimized(fun, planner.level, planner.hardware, None)
    part._part = "grad"
    return part


def _readable(plan: Any) -> None:
    if plan is not None and not isinstance(plan, Plan):
        raise PlanError(f"kpt_jax.optimize was given an object of type {type(plan).__name__} as its plan", "It follows a kpt.Plan",
                        "Read it with Plan.from_json(text) or Plan.load(path)")  # fmt: skip
    if plan is not None and plan.framework != "jax":
        raise PlanError(f"A plan for {plan.framework} was given to kpt_jax.optimize",
                        "A site is found again by the structure of the jax program",
                        "Make a plan with kpt_jax.plan")  # fmt: skip


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
      KptError: at once, for an unknown level or hardware, a `plan` that is none or of another framework, a program of PyTorch, or a class.
    """
    start_logging()
    level = level or config().level
    _readable(plan)
    if hardware != "auto":  # what is there is looked for when a program is: jax may not be set up yet
        hardware = profile(hardware)
    if modules.is_nnx(fn):
        return modules.optimize_nnx(fn, level, hardware, plan)
    if modules.is_linen(fn):
        return modules.optimize_linen(fn, level, hardware, plan)
    refuse_other(fn, "jax")
    if isinstance(fn, type):
        raise KptError(f"kpt_jax.optimize was given the class {fn.__name__}", "It is no model yet: there may be many of it",
                       f"Pass a model: {fn.__name__}(...)")  # fmt: skip
    if not callable(fn):
        raise KptError(f"kpt_jax.optimize was given an object of type {type(fn).__name__}",
                       "It takes a function, an nnx.Module or a linen.Module",
                       "Pass the function that computes, for example the loss")  # fmt: skip
    return Optimized(fn, level, hardware, plan)


def plan(
    fn: Any,
    *args: Any,
    level: str | None = None,
    hardware: str | HardwareProfile = "auto",
    plan: Plan | None = None,
    **kwargs: Any,
) -> Plan:
    """What `optimize` would do to `fn` for these arguments: the Plan alone; the function is not run.

    Raises:
      InputError: it does not take these arguments.
      GraphError: it branches on a value that is not known when it is traced.
      KptError: as `optimize`.
    """
    rewritten = optimize(fn, level, hardware, plan)
    with planning(fn, args, kwargs):
        made: Plan = rewritten.plan(*args, **kwargs)
    return made


@contextlib.contextmanager
def planning(fn: Any, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Around what traces a program in order to plan it: errors that its arguments or its branches explain say what to do.

    Raises:
      InputError, GraphError: as `plan`.
    """
    with explained(fn, args, kwargs, "jax", modules.linen_call(fn, kwargs) if modules.is_linen(fn) else None):
        try:
            yield
        except _UNKNOWN as error:
            raise GraphError(
                f"{getattr(fn, '__name__', type(fn).__name__)} was to be planned", told(error),
                "Branch with jax.lax.cond or jax.numpy.where; what decides the program itself has to be a Python value: "
                "static_argnames of jax.jit, or functools.partial",
            ) from error  # fmt: skip
