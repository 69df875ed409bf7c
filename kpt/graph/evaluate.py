"""What an expression is worth, in NumPy: for folding constants, recognising masks, probing activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kpt.graph.expr import Expr, Exprs, numpy_dtype


def _erf(x: np.ndarray) -> np.ndarray:
    import math

    return np.vectorize(math.erf, otypes=[np.float64])(x)


def _trunc_rem(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.fmod(a, b)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "neg": np.negative, "exp": np.exp, "exp2": np.exp2, "log": np.log, "log1p": np.log1p, "expm1": np.expm1,
    "tanh": np.tanh, "erf": _erf, "erfc": lambda x: 1.0 - _erf(x), "logistic": lambda x: 1.0 / (1.0 + np.exp(-x)),
    "sqrt": np.sqrt, "rsqrt": lambda x: 1.0 / np.sqrt(x), "sin": np.sin, "cos": np.cos, "abs": np.abs,
    "sign": np.sign, "floor": np.floor, "ceil": np.ceil, "round": np.round, "not": np.logical_not,
    "is_finite": np.isfinite, "square": np.square, "cbrt": np.cbrt, "stop_gradient": lambda x: x,
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.maximum, "min": np.minimum,
    "power": np.power, "rem": _trunc_rem, "and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor,
    "eq": np.equal, "ne": np.not_equal, "ge": np.greater_equal, "gt": np.greater, "le": np.less_equal,
    "lt": np.less, "atan2": np.arctan2, "real": np.real, "imag": np.imag,
    "select": lambda p, a, b: np.where(p, a, b), "clamp": lambda lo, x, hi: np.clip(x, lo, hi),
}  # fmt: skip
_REDUCTIONS: dict[str, Callable[..., Any]] = {"sum": np.sum, "max": np.max, "min": np.min, "and": np.all, "or": np.any}


def _closed(e: Expr, seen: set[int]) -> bool:
    """Whether `e` ends in known values alone; a stack of its own, since a program can be deeper than Python's."""
    stack = [e]
    while stack:
        a = stack.pop()
        if id(a) in seen:
            continue
        if not a.args and a.op not in ("full", "const", "iota"):
            return False
        seen.add(id(a))
        stack.extend(a.args)
    return True


def evaluate(e: Expr, exprs: Exprs, known: Mapping[int, np.ndarray] | None = None, floats: Any = np.float64) -> np.ndarray | None:
    """The value of `e`, or None where it depends on something not known.

    Args:
      known: `id(expr) -> array` of expressions to take as given.
      floats: dtype in which floating point is computed, whatever the expression says.
    """
    memo: dict[int, np.ndarray | None] = dict(known or {})
    if not _closed(e, set(memo)):
        return None

    def dtype_of(x: Expr) -> Any:
        d = numpy_dtype(x.dtype)
        return floats if d.kind in "fV" and floats is not None else d

    def run(x: Expr) -> np.ndarray | None:
        if id(x) not in memo:
            with np.errstate(all="ignore"):
                memo[id(x)] = compute(x)
        return memo[id(x)]

    def compute(x: Expr) -> np.ndarray | None:
        if x.op == "full":
            return np.broadcast_to(np.asarray(x["value"], dtype_of(x)), x.shape)
        if x.op == "const":
            return np.asarray(exprs.consts[x["key"]]).astype(dtype_of(x))
        if x.op == "iota":
            d = x["dimension"]
            shape = [1] * len(x.shape)
            shape[d] = x.shape[d]
            return np.broadcast_to(np.arange(x.shape[d]).astype(dtype_of(x)).reshape(shape), x.shape)
        args = []
        for a in x.args:
            got = run(a)
            if got is None:
                return None
            args.append(got)
        if not args:
            return None
        if x.op == "reshape":
            return args[0].reshape(x.shape)
        if x.op == "transpose":
            return args[0].transpose(x["perm"])
        if x.op == "broadcast":
            shape = [1] * len(x.shape)
            for i, d in enumerate(x["dims"]):
                shape[d] = args[0].shape[i]
            return np.broadcast_to(args[0].reshape(shape), x.shape)
        if x.op == "slice":
            return args[0][tuple(slice(a, b, s) for a, b, s in zip(x["start"], x["limit"], x["stride"], strict=True))]
        if x.op == "dynamic_slice":
            starts = [min(max(int(s), 0), n - m) for s, n, m in zip(args[1:], args[0].shape, x.shape, strict=True)]
            return args[0][tuple(slice(s, s + m) for s, m in zip(starts, x.shape, strict=True))]
        if x.op == "concatenate":
            return np.concatenate(args, axis=x["axis"])
        if x.op == "convert":
            return args[0].astype(dtype_of(x))
        if x.op == "pow":
            return np.asarray(args[0] ** x["y"])
        if x.op.startswith("reduce_") and x.op[7:] in _REDUCTIONS:
            return np.asarray(_REDUCTIONS[x.op[7:]](args[0], axis=tuple(x["axes"]))).astype(dtype_of(x))
        fn = _FUNCTIONS.get(x.op)
        return None if fn is None else np.asarray(fn(*args)).astype(dtype_of(x))

    return run(e)
