"""Flax modules: the module's own type of use, with the rewritten function behind its call."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from kpt.strategy import Plan

log = logging.getLogger("kpt")


def is_nnx(x: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(x, nnx.Module)


def is_linen(x: Any) -> bool:
    linen = sys.modules.get("flax.linen")
    return linen is not None and isinstance(x, linen.Module)


_APPLY = ("rngs", "method", "mutable", "capture_intermediates")  # what linen's `apply` takes itself


def linen_call(module: Any, keywords: Mapping[str, Any]) -> Callable[..., Any]:
    """`module.apply` by its signature, for `kpt.inputs.explained`: the variables first, then what the module's own call takes."""
    own = type(module).__call__ if callable(module) else None

    def call(*inputs: Any, **keywords: Any) -> Any:
        return module.apply(*inputs, **keywords)

    kind = inspect.Parameter
    taken = [kind("its_variables", kind.POSITIONAL_ONLY)]
    if own is None or "method" in keywords:
        taken += [kind("inputs", kind.VAR_POSITIONAL), kind("keywords", kind.VAR_KEYWORD)]
    else:
        call.__wrapped__ = own  # type: ignore[attr-defined]  # whose code is under way once the inputs fit
        parameters = dict(list(inspect.signature(own).parameters.items())[1:])
        taken += parameters.values()
        taken += [kind(k, kind.KEYWORD_ONLY, default=None) for k in _APPLY if k in keywords and k not in parameters]
    call.__signature__ = inspect.Signature(sorted(taken, key=lambda p: p.kind))  # type: ignore[attr-defined]
    return call


class _Fixed:
    """A linen module that cannot be hashed (a list or an array among its fields), as itself alone."""

    def __init__(self, module: Any):
        self.module = module


def function_of(optimized: Any, *args: Any, **kwargs: Any) -> tuple[Any, tuple, dict]:
    """The `Optimized` behind an optimized function or module, and its arguments for such a call."""
    if not hasattr(type(optimized), "__kpt__"):
        return optimized, args, kwargs
    fast, bound = optimized.__kpt__(*args, **kwargs)
    return fast, bound, {}


def optimize_nnx(module: Any, level: str, hardware: Any, plan: Plan | None) -> Any:
    """A module of a subclass of the module's class, sharing its variables, whose call is rewritten.

    What the call changes is written back, as in the original: state (dropout counters, batch statistics) and attributes that
    are Python values. A call that changes one of these is traced anew each time, being a different program each time.
    """
    from flax import nnx

    from kpt_jax.optimize import Optimized

    base = type(module)

    def pure(graphdef: Any, state: Any, args: tuple, kwargs: dict) -> Any:
        given = _leaves(state)
        inner = nnx.merge(graphdef, state)
        out = base.__call__(inner, *args, **kwargs)
        return out, *_after(inner, graphdef, given)

    pure.__name__ = base.__name__
    fast = Optimized(pure, level, hardware, plan)

    def as_base(self: Any) -> tuple[Any, Any]:
        twin = object.__new__(base)
        vars(twin).update(vars(self))
        return nnx.split(twin)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        before, state = as_base(self)
        out, after, state = fast(before, state, args, kwargs)
        write_back(self, before, after, state)
        return out

    def again(self: Any) -> Any:
        """For pickle and copy: the class is made here, and cannot be found by name."""
        twin = object.__new__(base)
        vars(twin).update(vars(self))
        return optimize_nnx, (twin, level, hardware, plan)

    def plan_(self: Any, *args: Any, **kwargs: Any) -> Plan:
        return fast.plan(*as_base(self), args, kwargs)

    def explain(self: Any, *args: Any, **kwargs: Any) -> str:
        return plan_(self, *args, **kwargs).explain()

    def certify(self: Any, *args: Any, **kwargs: Any) -> Plan:
        return fast.certify(*as_base(self), args, kwargs)

    members = {"__call__": call, "plan": plan_, "explain": explain, "certify": certify, "__doc__": base.__doc__,
               "__module__": base.__module__, "__reduce__": again,
               "__kpt__": lambda self, *args, **kwargs: (fast, (*as_base(self), args, kwargs))}  # fmt: skip
    metaclass: Any = type(base)
    optimized = metaclass(base.__name__, (base,), members)
    new = object.__new__(optimized)
    vars(new).update(vars(module))
    return new


def takes_nnx(args: tuple, kwargs: dict) -> bool:
    """Whether an argument is an nnx object (a module, an optimizer, rngs): a reference, which the call may change."""
    if "flax.nnx" not in sys.modules:
        return False
    kinds = _nnx_kinds()
    return any(isinstance(x, kinds) for x in args) or any(isinstance(x, kinds) for x in kwargs.values())


def holds_nnx(x: Any) -> bool:
    """Whether there is an nnx object anywhere in `x`, in lists, dicts and other pytrees too."""
    if "flax.nnx" not in sys.modules:
        return False
    return any(map(_is_object, jax.tree.leaves(x, is_leaf=_is_object)))


def _is_object(x: Any) -> bool:
    return isinstance(x, _nnx_kinds())


@functools.cache
def _nnx_kinds() -> tuple[type, ...]:
    from flax import nnx

    named = (getattr(nnx, name, None) for name in ("Object", "Pytree", "Module"))
    return tuple(t for t in named if isinstance(t, type))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Place:
    """Where an nnx object stood among the arguments."""

    key: str


def over_state(fn: Any) -> Any:
    """`fn` as a function of values: `(graphdef, state, args, kwargs) -> (result, graphdef after, state after)`.

    The nnx objects are in graphdef and state.
    """
    from flax import nnx

    def pure(graphdef: Any, state: Any, args: tuple, kwargs: dict) -> Any:
        before = _leaves(state)
        objects = nnx.merge(graphdef, state)

        def given(x: Any) -> Any:
            return objects[x.key] if isinstance(x, _Place) else x

        args, kwargs = jax.tree.map(given, (args, kwargs), is_leaf=lambda x: isinstance(x, _Place))
        out = fn(*args, **kwargs)
        return out, *_after(objects, graphdef, before)

    pure.__name__ = getattr(fn, "__name__", "function")
    return pure


def values_of(args: tuple, kwargs: dict) -> tuple[dict[str, Any], tuple]:
    """(the nnx objects among the arguments, what to call `over_state` with)."""
    from flax import nnx

    objects: dict[str, Any] = {}

    def place(x: Any) -> Any:
        if not _is_object(x):
            return x
        key = str(len(objects))
        objects[key] = x
        return _Place(key)

    args, kwargs = jax.tree.map(place, (args, kwargs), is_leaf=_is_object)
    return objects, (*nnx.split(objects), args, kwargs)


def _leaves(state: Any) -> dict[Any, list[Any]]:
    """The values of an nnx state by path. Its variables are the objects' own, and change with them."""
    from flax import nnx

    return {path: jax.tree.leaves(value) for path, value in nnx.to_flat_state(state)}


def _after(objects: Any, graphdef: Any, before: Mapping[Any, list[Any]]) -> tuple[Any, Any]:
    """What `nnx.split` makes of objects, which were `graphdef` and `before`; of the same structure, only what has other values.

    Where a transform closes over them, flax lets nothing be written, and what only reads them writes nothing back.
    """
    from flax import nnx

    after, values = nnx.split(objects)
    if after != graphdef:
        return after, values

    def changed(path: Any, value: Any) -> bool:
        return any(a is not b for a, b in zip(before[path], jax.tree.leaves(value), strict=True))

    return after, nnx.filter_state(values, changed)


def write_back(objects: Any, before: Any, after: Any, state: Any) -> None:
    """Gives `objects`, which were split into `before`, what `_after` gave: the structure `after` and the values of `state`."""
    from flax import nnx

    if after != before:
        _adopted(objects, nnx.merge(after, state), {})
    nnx.update(objects, state)


def _adopted(old: Any, new: Any, seen: dict[int, Any]) -> Any:
    """What stands for `new` among the caller's objects: `old`, with new attributes, where the two are the same object."""
    from flax import nnx

    if id(new) in seen:
        return seen[id(new)]
    if isinstance(new, _nnx_kinds()) and isinstance(old, type(new)):
        seen[id(new)] = old
        for name, value in vars(new).items():
            if not name.endswith("__state"):  # the trace that an object was made in
                object.__setattr__(old, name, _adopted(vars(old).get(name), value, seen))
        for name in vars(old).keys() - vars(new).keys():
            object.__delattr__(old, name)
        return old
    if isinstance(new, nnx.Variable):
        seen[id(new)] = old if type(old) is type(new) else new
        return seen[id(new)]
    if type(old) is type(new) is list and len(old) == len(new):
        old[:] = [_adopted(o, n, seen) for o, n in zip(old, new, strict=True)]
        return old
    if type(old) is type(new) is dict:
        for k in old.keys() - new.keys():
            del old[k]
        old.update({k: _adopted(old.get(k), n, seen) for k, n in new.items()})
        return old
    if type(old) is type(new) is tuple and len(old) == len(new):
        return tuple(_adopted(o, n, seen) for o, n in zip(old, new, strict=True))
    return new


def optimize_linen(module: Any, level: str, hardware: Any, plan: Plan | None) -> Any:
    """A module of a subclass of the module's class whose `apply` is rewritten; parameters stay the caller's."""
    from kpt_jax.optimize import Optimized

    if module.scope is not None:
        log.warning(
            "%s is bound to its parent, whose call is what kernels are put into: it runs as it was written. Optimize the"
            " outermost module, kpt_jax.optimize(Model()).apply(...); sites are found in all that it calls.",
            type(module).__name__,
        )
        return module
    base = type(module)

    def pure(module: Any, variables: Any, args: tuple, options: dict, kwargs: dict) -> Any:
        return base.apply(module.module if isinstance(module, _Fixed) else module, variables, *args, **options, **kwargs)

    pure.__name__ = base.__name__
    fast = Optimized(pure, level, hardware, plan)
    names = ("rngs", "method", "mutable", "capture_intermediates")

    def as_base(self: Any, fields: dict) -> Any:
        plain = base(**fields, parent=None)
        try:
            hash(plain)
        except TypeError:
            if "_kpt_fixed" not in vars(self):  # the same object at every call, so that one trace serves them all
                object.__setattr__(self, "_kpt_fixed", _Fixed(plain))
            return vars(self)["_kpt_fixed"]
        return plain

    def fields_of(self: Any) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init and f.name != "parent"}

    def signature(self: Any, variables: Any, args: tuple, kwargs: dict) -> tuple[Any, Any, tuple, dict, dict]:
        """The module as it was written, for it may be a changed clone; part of what is traced, being hashable."""
        fields = fields_of(self)
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items() if k in names}
        return as_base(self, fields), variables, args, options, {k: v for k, v in kwargs.items() if k not in names}

    def apply(self: Any, variables: Any, *args: Any, **kwargs: Any) -> Any:
        return fast(*signature(self, variables, args, kwargs))

    def plan_(self: Any, variables: Any, *args: Any, **kwargs: Any) -> Plan:
        return fast.plan(*signature(self, variables, args, kwargs))

    def explain(self: Any, variables: Any, *args: Any, **kwargs: Any) -> str:
        return plan_(self, variables, *args, **kwargs).explain()

    def certify(self: Any, variables: Any, *args: Any, **kwargs: Any) -> Plan:
        return fast.certify(*signature(self, variables, args, kwargs))

    def again(self: Any) -> Any:
        """For pickle and copy: the class is made here, and cannot be found by name."""
        return optimize_linen, (base(**fields_of(self), parent=None), level, hardware, plan)

    new = module.clone()
    members = {"apply": apply, "plan": plan_, "explain": explain, "certify": certify, "__module__": base.__module__,
               "__reduce__": again,
               "__kpt__": lambda self, *args, **kwargs: (fast, signature(self, args[0], args[1:], kwargs))}  # fmt: skip
    object.__setattr__(new, "__class__", type(base.__name__, (base,), members))
    return new
