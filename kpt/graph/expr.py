"""Expressions: the graph read as formulas, each written once.

Every value of a graph has an `Expr`. Equal computations are one object (hash-consing), so that two
spellings that normalise alike compare with `is`. An expression remembers the values it is
(`origins`); one that no value of the program equals has none, and is computed where it is needed.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from kpt.ops.base import Spec

ELEMENTWISE_UNARY = frozenset(
    "neg exp exp2 log log1p expm1 tanh erf erfc erf_inv logistic sqrt rsqrt sin cos abs sign floor ceil round not "
    "is_finite square pow convert stop_gradient cbrt".split()
)
ELEMENTWISE_BINARY = frozenset("add sub mul div max min power rem and or xor eq ne ge gt le lt atan2".split())
ELEMENTWISE = ELEMENTWISE_UNARY | ELEMENTWISE_BINARY | {"select", "clamp"}
COMMUTATIVE = frozenset("add mul max min and or xor eq ne".split())
VIEWS = frozenset("reshape transpose broadcast".split())


@dataclasses.dataclass(eq=False, slots=True)
class Expr:
    """One formula. Build through `Exprs`, never directly.

    `op` is a name of the graph's vocabulary, or "value" (a program value known only by its id),
    "full" (a scalar constant of any shape, attr `value`), "const" (an array constant, attr `key`),
    "out" (an output of a site's kernel, attr `index`).
    """

    op: str
    args: tuple[Expr, ...]
    attrs: tuple[tuple[str, Any], ...]
    shape: tuple[int, ...]
    dtype: str
    origins: list[int] = dataclasses.field(default_factory=list)

    def __getitem__(self, name: str) -> Any:
        for k, v in self.attrs:
            if k == name:
                return v
        raise KeyError(name)

    @property
    def spec(self) -> Spec:
        return Spec(self.shape, self.dtype)

    def __repr__(self) -> str:
        inner = ", ".join([a.op if a.args else repr(a) for a in self.args] + [f"{k}={v}" for k, v in self.attrs])
        return f"{self.op}({inner}):{self.dtype}{list(self.shape)}"


class Exprs:
    """The table in which every expression is written once."""

    def __init__(self) -> None:
        self._table: dict[Any, Expr] = {}
        self.consts: dict[int, Any] = {}
        self.activations: dict[int, str | None] = {}  # names of formulas, by id: a formula is written, and looked at, once

    def make(self, op: str, args: tuple[Expr, ...], attrs: tuple, shape: tuple[int, ...], dtype: str) -> Expr:
        # repr() of a float keeps nan equal to itself and 0.0 apart from -0.0.
        key = (op, tuple(map(id, args)), repr(attrs) if op == "full" else attrs, shape, dtype)
        found = self._table.get(key)
        if found is None:
            found = self._table[key] = Expr(op, args, attrs, shape, dtype)
        return found

    def value(self, v: int, spec: Spec) -> Expr:
        e = self.make("value", (), (("id", v),), spec.shape, spec.dtype)
        if v not in e.origins:
            e.origins.append(v)
        return e

    def const(self, v: int, spec: Spec, data: Any) -> Expr:
        self.consts[v] = data
        return self.make("const", (), (("key", v),), spec.shape, spec.dtype)

    def full(self, value: float | int | bool, shape: tuple[int, ...], dtype: str) -> Expr:
        return self.make("full", (), (("value", value),), shape, dtype)

    def out(self, index: int, spec: Spec) -> Expr:
        return self.make("out", (), (("index", index),), spec.shape, spec.dtype)

    # The few ops that sites build their arguments and results from. Identities vanish.

    def transpose(self, x: Expr, perm: tuple[int, ...]) -> Expr:
        if perm == tuple(range(len(perm))):
            return x
        return self.make("transpose", (x,), (("perm", perm),), tuple(x.shape[p] for p in perm), x.dtype)

    def reshape(self, x: Expr, shape: tuple[int, ...]) -> Expr:
        if shape == x.shape:
            return x
        if x.op == "reshape" and not x.origins:
            return self.reshape(x.args[0], shape)
        return self.make("reshape", (x,), (("shape", shape),), shape, x.dtype)

    def broadcast(self, x: Expr, shape: tuple[int, ...], dims: tuple[int, ...]) -> Expr:
        if shape == x.shape and dims == tuple(range(len(shape))):
            return x
        if x.op == "full":
            return self.full(x["value"], shape, x.dtype)
        return self.make("broadcast", (x,), (("shape", shape), ("dims", dims)), shape, x.dtype)

    def slice(self, x: Expr, start: tuple[int, ...], limit: tuple[int, ...], stride: tuple[int, ...]) -> Expr:
        shape = tuple(-(-(b - a) // s) for a, b, s in zip(start, limit, stride, strict=True))
        if shape == x.shape:
            return x
        return self.make("slice", (x,), (("start", start), ("limit", limit), ("stride", stride)), shape, x.dtype)

    def convert(self, x: Expr, dtype: str) -> Expr:
        return x if x.dtype == dtype else self.make("convert", (x,), (("dtype", dtype),), x.shape, dtype)

    def apply(self, op: str, *args: Expr, dtype: str | None = None) -> Expr:
        """An elementwise op on arguments of one shape."""
        return self.make(op, args, (), args[0].shape, dtype or args[0].dtype)


def is_full(e: Expr, value: float | None = None) -> bool:
    """Whether `e` is one scalar everywhere (equal to `value`, if given)."""
    return e.op == "full" and (value is None or e["value"] == value)


def numpy_dtype(name: str) -> np.dtype:
    """NumPy's dtype for a neutral dtype name; bfloat16 and the 8-bit floats come from ml_dtypes."""
    try:
        return np.dtype(name)
    except TypeError:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
