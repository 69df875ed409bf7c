"""Shape and dtype rules that several ops share; each raises an `OpError` that names the array or parameter."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from kpt.errors import OpError
from kpt.ops.base import REQUIRED, Op, Spec, Specs

FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})
_BYTES = {"float64": 8, "int64": 8, "uint64": 8, "float32": 4, "int32": 4, "uint32": 4, "float16": 2, "bfloat16": 2,
          "int16": 2, "uint16": 2}  # fmt: skip


def size(spec: Spec) -> int:
    """Number of elements."""
    return math.prod(spec.shape)


def nbytes(*specs: Spec | None) -> float:
    """Bytes that these arrays take."""
    return float(sum(size(s) * _BYTES.get(s.dtype, 1) for s in specs if s is not None))


def named(op: str, specs: Specs, arrays: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Every required array is there, and none that the op does not know."""
    for n in arrays:
        if n not in specs:
            raise OpError(f"{op} was called without {n}", f"It needs {', '.join(arrays)}", f"Pass {n}=")
    for n in specs:
        if n not in arrays and n not in optional:
            raise OpError(f"{op} was given an array {n}", f"It takes {', '.join((*arrays, *optional))}", "Check the name")


def keywords(op: Op, given: Collection[str], others: Collection[str] = ()) -> None:
    """Every name is an array's or a parameter's, or one of `others`, which a kernel takes besides; and none that it needs is missing."""
    known = (*op.arrays, *op.optional, *op.params)
    for n in given:
        if n not in known and n not in others:
            near = difflib.get_close_matches(n, (*known, *others), n=1)
            advice = f"Did you mean {near[0]}?" if near else "Check the name"
            raise OpError(f"{op.name} was given {n}", f"It takes {', '.join(known)}", advice)
    for n in (*op.arrays, *(p for p, default in op.params.items() if default is REQUIRED)):
        if n not in given:
            raise OpError(f"{op.name} was called without {n}", f"It takes {', '.join(known)}", f"Pass {n}=")


def floats(op: str, specs: Specs, *names: str) -> None:
    for n in names:
        if n in specs and specs[n].dtype not in FLOATS:
            raise OpError(f"{op} was given {n} of {specs[n].dtype}", f"It takes {', '.join(sorted(FLOATS))}", "Cast it first")


def integers(op: str, specs: Specs, *names: str) -> None:
    for n in names:
        if n in specs and not specs[n].dtype.startswith(("int", "uint")):
            raise OpError(f"{op} was given {n} of {specs[n].dtype}", "It takes integers", "Cast it first")


def booleans(op: str, specs: Specs, *names: str) -> None:
    for n in names:
        if n in specs and specs[n].dtype != "bool":
            raise OpError(f"{op} was given {n} of {specs[n].dtype}", "It takes bool", "Compare it with 0 first")


def rank(op: str, specs: Specs, name: str, wanted: int, layout: str) -> None:
    if len(specs[name].shape) != wanted:
        raise OpError(f"{op} was given {name}{list(specs[name].shape)}", f"{name} has layout {layout}", "Reshape or transpose it")


def at_least(op: str, specs: Specs, name: str, least: int, layout: str) -> None:
    if len(specs[name].shape) < least:
        raise OpError(f"{op} was given {name}{list(specs[name].shape)}", f"{name} has layout {layout}", "Reshape it")


def shaped(op: str, specs: Specs, name: str, wanted: Sequence[int]) -> None:
    if name in specs and specs[name].shape != tuple(wanted):
        raise OpError(f"{op} was given {name}{list(specs[name].shape)}", f"Beside the other arrays it must be {list(wanted)}",
                      "Check the order of its dimensions")  # fmt: skip


def one_of(op: str, name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed:
        raise OpError(f"{op} was asked for {name}={value!r}", f"It takes {', '.join(map(repr, allowed))}", "Choose one of these")


def within(op: str, name: str, value: Any, holds: bool, domain: str) -> None:
    if not holds:  # false for NaN too
        raise OpError(f"{op} was asked for {name}={value!r}", f"{name} is {domain}", "Choose another")


def soft_cap(op: str, cap: float | None) -> None:
    within(op, "logits_soft_cap", cap, cap is None or 0 < cap < math.inf, "None or a finite number above 0")


def out_dtype(op: str, dtype: str | None) -> None:
    if dtype is not None:
        one_of(op, "out_dtype", dtype, sorted(FLOATS))


def unbroadcast(g: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`g` summed over the dimensions along which an array of `shape` was repeated."""
    axes = tuple(i for i, (a, b) in enumerate(zip(g.shape, shape, strict=True)) if b == 1 and a != 1)
    return g.sum(axes, keepdims=True) if axes else g


def wide(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def normal(rng: np.random.Generator, spec: Spec, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """Normal samples in the spec's dtype."""
    from kpt.graph.expr import numpy_dtype

    return np.asarray(rng.standard_normal(spec.shape) * scale + shift).astype(numpy_dtype(spec.dtype))
