"""Elementwise ops and activations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from kpt_torch.vocabulary.table import Unknown, common, floating, is_float, is_value, number, pair, rule

for _name in ("exp", "exp2", "log", "log1p", "expm1", "tanh", "erf", "erfc", "sqrt", "rsqrt", "sin", "cos", "ceil", "floor", "round", "neg",
              "sign"):  # fmt: skip

    def _unary(b: Any, x: Any, op: str = _name) -> Any:
        if op not in ("neg", "sign", "ceil", "floor", "round"):
            x = floating(b, x)
        if x.dtype == "bool" or x.dtype.startswith("complex"):
            raise Unknown(x.dtype)
        return b.op(op, x, shape=x.shape, dtype=x.dtype)

    rule(_name)(_unary)


@rule("abs")
def _abs(b: Any, x: Any) -> Any:
    if x.dtype.startswith("complex"):
        raise Unknown("complex")
    return b.op("abs", x, shape=x.shape, dtype=x.dtype)


@rule("sigmoid", "special_expit")
def _sigmoid(b: Any, x: Any) -> Any:
    x = floating(b, x)
    return b.op("logistic", x, shape=x.shape, dtype=x.dtype)


@rule("square")
def _square(b: Any, x: Any) -> Any:
    return b.op("square", x, shape=x.shape, dtype=x.dtype)


@rule("reciprocal")
def _reciprocal(b: Any, x: Any) -> Any:
    x = floating(b, x)
    return b.elementwise("div", b.full(1.0, x.dtype), x)


@rule("logical_not", "bitwise_not")
def _not(b: Any, x: Any) -> Any:
    if x.dtype != "bool":
        raise Unknown(x.dtype)
    return b.op("not", x, shape=x.shape, dtype="bool")


@rule("isfinite")
def _isfinite(b: Any, x: Any) -> Any:
    return b.op("is_finite", x, shape=x.shape, dtype="bool")


def _sum_of(sign: str) -> Callable[..., Any]:
    def fn(b: Any, x: Any, y: Any, *, alpha: Any = 1) -> Any:
        x, y = pair(b, x, y)
        if x.dtype == "bool":
            raise Unknown("bool")
        if alpha != 1:
            y = b.elementwise("mul", y, number(b, alpha, y.dtype))
        return b.elementwise(sign, x, y)

    return fn


rule("add.Tensor", "add.Scalar")(_sum_of("add"))
rule("sub.Tensor", "sub.Scalar")(_sum_of("sub"))


@rule("rsub.Scalar", "rsub.Tensor")
def _rsub(b: Any, x: Any, y: Any, alpha: Any = 1) -> Any:
    return _sum_of("sub")(b, y, x, alpha=alpha)


@rule("mul.Tensor", "mul.Scalar")
def _mul(b: Any, x: Any, y: Any) -> Any:
    x, y = pair(b, x, y)
    return b.elementwise("and" if x.dtype == "bool" else "mul", x, y)


@rule("div.Tensor", "div.Scalar", "true_divide.Tensor")
def _div(b: Any, x: Any, y: Any) -> Any:
    return b.elementwise("div", *pair(b, x, y, to_float=True))


@rule("maximum", "max.other")
def _maximum(b: Any, x: Any, y: Any) -> Any:
    return b.elementwise("max", *pair(b, x, y))


@rule("minimum", "min.other")
def _minimum(b: Any, x: Any, y: Any) -> Any:
    return b.elementwise("min", *pair(b, x, y))


@rule("pow.Tensor_Scalar")
def _pow(b: Any, x: Any, y: Any) -> Any:
    if not is_float(x.dtype):
        raise Unknown("a power of integers")
    if y == 2:
        return b.op("square", x, shape=x.shape, dtype=x.dtype)
    return b.op("pow", x, shape=x.shape, dtype=x.dtype, y=y)


@rule("pow.Tensor_Tensor", "pow.Scalar")
def _power(b: Any, x: Any, y: Any) -> Any:
    x, y = pair(b, x, y)
    if not is_float(x.dtype):
        raise Unknown("a power of integers")
    return b.elementwise("power", x, y)


for _name in ("eq", "ne", "ge", "gt", "le", "lt"):

    def _compare(b: Any, x: Any, y: Any, op: str = _name) -> Any:
        return b.elementwise(op, *pair(b, x, y), dtype="bool")

    rule(f"{_name}.Tensor", f"{_name}.Scalar")(_compare)

for _name, _op in (("logical_and", "and"), ("logical_or", "or"), ("bitwise_and", "and"), ("bitwise_or", "or"), ("__and__", "and"),
                   ("__or__", "or"), ("__xor__", "xor"), ("bitwise_xor", "xor"), ("logical_xor", "xor")):  # fmt: skip

    def _logic(b: Any, x: Any, y: Any, op: str = _op) -> Any:
        if not is_value(y):
            y = b.full(y, "bool") if isinstance(y, bool) else y
        if not is_value(y) or (x.dtype, y.dtype) != ("bool", "bool"):
            raise Unknown("logic of numbers")
        return b.elementwise(op, x, y)

    rule(f"{_name}.Tensor", f"{_name}.Scalar", _name)(_logic)


@rule("where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar")
def _where(b: Any, p: Any, x: Any, y: Any) -> Any:
    dtype = common(x, y)
    x, y = (b.convert(a, dtype) if is_value(a) else number(b, a, dtype) for a in (x, y))
    return _select(b, p, x, y)


def _select(b: Any, p: Any, x: Any, y: Any) -> Any:
    if p.dtype != "bool":
        raise Unknown("where of numbers")
    shape = np.broadcast_shapes(p.shape, x.shape, y.shape)
    return b.op("select", *(b.broadcast(a, shape) if a.shape != () or a is p else a for a in (p, x, y)), shape=shape, dtype=x.dtype)


@rule("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(b: Any, x: Any, mask: Any, value: Any) -> Any:
    value = b.convert(value, x.dtype) if is_value(value) else number(b, value, x.dtype)
    return _select(b, mask, value, x)


@rule("clamp", "clip")
def _clamp(b: Any, x: Any, low: Any = None, high: Any = None) -> Any:
    if not is_float(x.dtype):
        raise Unknown("a clamp of integers")
    for op, bound in (("max", low), ("min", high)):
        if bound is not None:
            x = b.elementwise(op, x, number(b, bound, x.dtype))
    return x


@rule("clamp_min")
def _clamp_min(b: Any, x: Any, low: Any) -> Any:
    return _clamp(b, x, low)


@rule("relu", whole=True)
def _relu(b: Any, x: Any) -> Any:
    return b.elementwise("max", floating(b, x), b.full(0.0, x.dtype))


def widened(b: Any, x: Any) -> Any:
    """torch computes these in float32 for narrower floats, and rounds once."""
    if not is_float(x.dtype):
        raise Unknown(x.dtype)
    return b.convert(x, "float32") if x.dtype in ("bfloat16", "float16") else x


@rule("silu", whole=True)
def _silu(b: Any, x: Any) -> Any:
    w = widened(b, x)
    return b.convert(b.elementwise("mul", w, b.op("logistic", w, shape=w.shape, dtype=w.dtype)), x.dtype)


@rule("gelu", whole=True)
def _gelu(b: Any, x: Any, *, approximate: str = "none") -> Any:
    w = widened(b, x)
    c = lambda value: b.full(value, w.dtype)  # noqa: E731
    mul, add = (lambda *a: b.elementwise("mul", *a)), (lambda *a: b.elementwise("add", *a))
    if approximate == "tanh":
        cube = mul(mul(w, w), w)
        inner = mul(add(w, mul(cube, c(0.044715))), c(math.sqrt(2 / math.pi)))
        bent = b.op("tanh", inner, shape=w.shape, dtype=w.dtype)
    else:
        bent = b.op("erf", mul(w, c(math.sqrt(0.5))), shape=w.shape, dtype=w.dtype)
    return b.convert(mul(mul(w, c(0.5)), add(bent, c(1.0))), x.dtype)


@rule("mish", whole=True)
def _mish(b: Any, x: Any) -> Any:
    w = widened(b, x)
    soft = b.op("log1p", b.op("exp", w, shape=w.shape, dtype=w.dtype), shape=w.shape, dtype=w.dtype)
    return b.convert(b.elementwise("mul", w, b.op("tanh", soft, shape=w.shape, dtype=w.dtype)), x.dtype)
