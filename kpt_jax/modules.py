"""Flax modules: the module's own type of use, with the rewritten function behind its call."""

from __future__ import annotations

import sys
from typing import Any

from kpt.strategy import Plan


def is_nnx(x: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(x, nnx.Module)


def is_linen(x: Any) -> bool:
    linen = sys.modules.get("flax.linen")
    return linen is not None and isinstance(x, linen.Module)


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

    members = {"__call__": call, "plan": plan_, "explain": explain, "__doc__": base.__doc__, "__module__": base.__module__}
    optimized = type(base)(base.__name__, (base,), members)
    new = object.__new__(optimized)
    vars(new).update(vars(module))
    return new


def optimize_linen(module: Any, level: str, hardware: Any, plan: Plan | None) -> Any:
    """A module of a subclass of the module's class whose `apply` is rewritten; parameters stay the caller's."""
    from kpt_jax.optimize import Optimized

    base = type(module)

    def pure(variables: Any, args: tuple, options: dict, kwargs: dict) -> Any:
        return base.apply(module, variables, *args, **options, **kwargs)

    pure.__name__ = base.__name__
    fast = Optimized(pure, level, hardware, plan)
    names = ("rngs", "method", "mutable", "capture_intermediates")

    def split(kwargs: dict) -> tuple[dict, dict]:
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items() if k in names}
        return options, {k: v for k, v in kwargs.items() if k not in names}

    def apply(self: Any, variables: Any, *args: Any, **kwargs: Any) -> Any:
        return fast(variables, args, *split(kwargs))

    def plan_(self: Any, variables: Any, *args: Any, **kwargs: Any) -> Plan:
        return fast.plan(variables, args, *split(kwargs))

    def explain(self: Any, variables: Any, *args: Any, **kwargs: Any) -> str:
        return plan_(self, variables, *args, **kwargs).explain()

    new = module.clone()
    new_type = type(base.__name__, (base,), {"apply": apply, "plan": plan_, "explain": explain, "__module__": base.__module__})
    object.__setattr__(new, "__class__", new_type)
    return new
