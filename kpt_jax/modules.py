"""Flax modules: the module's own type of use, with the rewritten function behind its call."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from kpt.strategy import Plan


def is_nnx(x: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(x, nnx.Module)


def is_linen(x: Any) -> bool:
    linen = sys.modules.get("flax.linen")
    return linen is not None and isinstance(x, linen.Module)


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


def optimize_linen(module: Any, level: str, hardware: Any, plan: Plan | None) -> Any:
    """A module of a subclass of the module's class whose `apply` is rewritten; parameters stay the caller's."""
    from kpt_jax.optimize import Optimized

    base = type(module)

    def pure(module: Any, variables: Any, args: tuple, options: dict, kwargs: dict) -> Any:
        return base.apply(module, variables, *args, **options, **kwargs)

    pure.__name__ = base.__name__
    fast = Optimized(pure, level, hardware, plan)
    names = ("rngs", "method", "mutable", "capture_intermediates")

    def signature(self: Any, variables: Any, args: tuple, kwargs: dict) -> tuple[Any, Any, tuple, dict, dict]:
        """The module as it was written, for it may be a changed clone; part of what is traced, being hashable."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init and f.name != "parent"}
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items() if k in names}
        return base(**fields, parent=None), variables, args, options, {k: v for k, v in kwargs.items() if k not in names}

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
