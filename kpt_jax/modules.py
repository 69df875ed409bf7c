"""Flax modules: the module's own type of use, with the rewritten function behind its call."""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

from kpt.strategy import Plan


def is_nnx(x: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(x, nnx.Module)


def is_linen(x: Any) -> bool:
    linen = sys.modules.get("flax.linen")
    return linen is not None and isinstance(x, linen.Module)


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

    State that the call changes (dropout counters, batch statistics) is written back, as in the original.
    """
    from flax import nnx

    from kpt_jax.optimize import Optimized

    base = type(module)

    def pure(graphdef: Any, state: Any, args: tuple, kwargs: dict) -> Any:
        inner = nnx.merge(graphdef, state)
        out = base.__call__(inner, *args, **kwargs)
        return out, nnx.state(inner)

    pure.__name__ = base.__name__
    fast = Optimized(pure, level, hardware, plan)

    def as_base(self: Any) -> tuple[Any, Any]:
        twin = object.__new__(base)
        vars(twin).update(vars(self))
        return nnx.split(twin)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        out, state = fast(*as_base(self), args, kwargs)
        nnx.update(self, state)
        return out

    def plan_(self: Any, *args: Any, **kwargs: Any) -> Plan:
        return fast.plan(*as_base(self), args, kwargs)

    def explain(self: Any, *args: Any, **kwargs: Any) -> str:
        return plan_(self, *args, **kwargs).explain()

    def certify(self: Any, *args: Any, **kwargs: Any) -> Plan:
        return fast.certify(*as_base(self), args, kwargs)

    members = {"__call__": call, "plan": plan_, "explain": explain, "certify": certify, "__doc__": base.__doc__,
               "__module__": base.__module__,
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


@functools.cache
def _nnx_kinds() -> tuple[type, ...]:
    from flax import nnx

    named = (getattr(nnx, name, None) for name in ("Object", "Pytree", "Module"))
    return tuple(t for t in named if isinstance(t, type))


def over_state(fn: Any) -> Any:
    """`fn` as a function of values: `(graphdef, state, args, kwargs) -> (result, state after)`, nnx objects being in the state."""
    from flax import nnx

    def pure(graphdef: Any, state: Any, args: tuple, kwargs: dict) -> Any:
        objects = nnx.merge(graphdef, state)
        given = [objects.get(str(i), a) for i, a in enumerate(args)]
        out = fn(*given, **{k: objects.get(k, a) for k, a in kwargs.items()})
        return out, nnx.state(objects)

    pure.__name__ = getattr(fn, "__name__", "function")
    return pure


def values_of(args: tuple, kwargs: dict) -> tuple[dict[str, Any], tuple]:
    """(the nnx objects among the arguments, what to call `over_state` with)."""
    from flax import nnx

    given = {str(i): a for i, a in enumerate(args)} | kwargs
    objects = {k: a for k, a in given.items() if isinstance(a, _nnx_kinds())}
    rest = {k: None if k in objects else a for k, a in given.items()}
    return objects, (*nnx.split(objects), tuple(rest[str(i)] for i in range(len(args))), {k: rest[k] for k in kwargs})


def optimize_linen(module: Any, level: str, hardware: Any, plan: Plan | None) -> Any:
    """A module of a subclass of the module's class whose `apply` is rewritten; parameters stay the caller's."""
    from kpt_jax.optimize import Optimized

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

    def signature(self: Any, variables: Any, args: tuple, kwargs: dict) -> tuple[Any, Any, tuple, dict, dict]:
        """The module as it was written, for it may be a changed clone; part of what is traced, being hashable."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init and f.name != "parent"}
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

    new = module.clone()
    members = {"apply": apply, "plan": plan_, "explain": explain, "certify": certify, "__module__": base.__module__,
               "__kpt__": lambda self, *args, **kwargs: (fast, signature(self, args[0], args[1:], kwargs))}  # fmt: skip
    object.__setattr__(new, "__class__", type(base.__name__, (base,), members))
    return new
