"""The table of rules, and what several of them need: promotion of dtypes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from kpt_torch.library import dtype_name, torch_dtype

aten = torch.ops.aten


class Unknown(Exception):
    """The op cannot be said in the neutral vocabulary with these arguments."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """`whole`: its pieces stay together; a site replaces all of the call or none of it."""

    fn: Callable[..., Any]
    whole: bool = False


TABLE: dict[Any, Rule] = {}


def rule(*targets: str, whole: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        for name in targets:
            packet, _, overload = name.partition(".")
            found = getattr(getattr(aten, packet, None), overload or "default", None)
            if found is not None:
                TABLE[found] = Rule(fn, whole)
        return fn

    return register


def is_value(a: Any) -> bool:
    return hasattr(a, "b") and hasattr(a, "id")


def is_float(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat"))


def common(*args: Any) -> str:
    """The dtype that torch computes an elementwise op of these in."""
    def like(a: Any) -> Any:
        return torch.empty((1,) * (1 if a.ndim else 0), dtype=torch_dtype(a.dtype), device="meta") if is_value(a) else a

    found = [like(a) for a in args]
    dtype = found[0]
    if len(found) == 1:
        return dtype_name(dtype.dtype if isinstance(dtype, torch.Tensor) else torch.result_type(torch.empty(1), dtype))
    kind = torch.result_type(found[0], found[1])
    for extra in found[2:]:
        kind = torch.result_type(torch.empty(1, dtype=kind, device="meta"), extra)
    return dtype_name(kind)


def number(b: Any, value: Any, dtype: str) -> Any:
    if isinstance(value, complex):
        raise Unknown("complex")
    if not is_float(dtype) and isinstance(value, float) and not value.is_integer():
        raise Unknown("a fraction among integers")
    return b.full(value, dtype)


def pair(b: Any, x: Any, y: Any, to_float: bool = False) -> tuple[Any, Any]:
    dtype = common(x, y)
    if to_float and not is_float(dtype):
        dtype = "float32"
    return tuple(b.convert(a, dtype) if is_value(a) else number(b, a, dtype) for a in (x, y))


def floating(b: Any, x: Any) -> Any:
    if x.dtype.startswith("complex"):
        raise Unknown("complex")
    return x if is_float(x.dtype) else b.convert(x, "float32")
