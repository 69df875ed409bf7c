"""Reductions and norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from kpt_torch.library import dtype_name, torch_dtype
from kpt_torch.vocabulary.elementwise import widened
from kpt_torch.vocabulary.shapes import dim_of
from kpt_torch.vocabulary.table import Unknown, is_float, rule


def _axes(x: Any, dim: Any) -> list[int]:
    dims = range(x.ndim) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    return [dim_of(x, d) for d in dims]


@rule("sum.dim_IntList", "sum")
def _sum(b: Any, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    x = b.convert(x, dtype_name(dtype) if dtype is not None else x.dtype if is_float(x.dtype) else "int64")
    return b.reduce("sum", x, _axes(x, dim), keepdim)


@rule("mean.dim", "mean")
def _mean(b: Any, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    x = b.convert(x, dtype_name(dtype)) if dtype is not None else x
    axes = _axes(x, dim)
    total = b.reduce("sum", x, axes, keepdim)
    return b.elementwise("div", total, b.full(float(math.prod(x.shape[d] for d in axes)), x.dtype))


@rule("amax")
def _amax(b: Any, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    return b.reduce("max", x, _axes(x, dim), keepdim)


@rule("max.dim")
def _max_dim(b: Any, x: Any, dim: int, keepdim: bool = False) -> Any:
    if any(u.target is not None and getattr(u.target, "__name__", "") == "getitem" and u.args[1] == 1 and u.users for u in b.fx.users):
        raise Unknown("the place of the maximum")
    values = b.reduce("max", x, [dim_of(x, dim)], keepdim)
    return [values, b.op("opaque:argmax", x, shape=values.shape, dtype="int64")]


@rule("any.dim", "any", "any.dims")
def _any(b: Any, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if x.dtype != "bool":
        raise Unknown("any of numbers")
    return b.reduce("or", x, _axes(x, dim), keepdim)


@rule("all.dim", "all", "all.dims")
def _all(b: Any, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if x.dtype != "bool":
        raise Unknown("all of numbers")
    return b.reduce("and", x, _axes(x, dim), keepdim)


@rule("var.correction", "var.dim")
def _var(b: Any, x: Any, dim: Any = None, *args: Any, correction: Any = 1, keepdim: bool = False) -> Any:
    if args:
        correction, keepdim = int(args[0]), args[1] if len(args) > 1 else keepdim
    axes = _axes(x, dim)
    n = math.prod(x.shape[d] for d in axes)
    if len(axes) != 1 or n <= correction or not is_float(x.dtype):
        raise Unknown("a variance over several axes")
    mean = b.elementwise("div", b.reduce("sum", x, axes, True), b.full(float(n), x.dtype))
    off = b.elementwise("sub", x, mean)
    total = b.reduce("sum", b.op("square", off, shape=x.shape, dtype=x.dtype), axes, keepdim)
    return b.elementwise("div", total, b.full(float(n - correction), x.dtype))


@rule("logsumexp")
def _logsumexp(b: Any, x: Any, dim: Any, keepdim: bool = False) -> Any:
    axes = _axes(x, dim)
    top = b.reduce("max", x, axes, True)
    e = b.elementwise("exp", b.elementwise("sub", x, top))
    log = b.elementwise("log", b.reduce("sum", e, axes, keepdim))
    return b.elementwise("add", log, top if keepdim else b.reshape(top, log.shape))


def softmax_of(b: Any, x: Any, axis: int) -> Any:
    e = b.elementwise("exp", b.elementwise("sub", x, b.reduce("max", x, [axis], True)))
    return b.elementwise("div", e, b.reduce("sum", e, [axis], True))


@rule("softmax.int", "_softmax", "special_softmax", whole=True)
def _softmax(b: Any, x: Any, dim: int, dtype: Any = None) -> Any:
    dtype = None if isinstance(dtype, bool) else dtype
    out = dtype_name(dtype) if dtype is not None else x.dtype
    w = widened(b, b.convert(x, out))
    return b.convert(softmax_of(b, w, dim_of(x, dim)), out)


def log_softmax_of(b: Any, x: Any, axis: int) -> Any:
    z = b.elementwise("sub", x, b.reduce("max", x, [axis], True))
    return b.elementwise("sub", z, b.elementwise("log", b.reduce("sum", b.elementwise("exp", z), [axis], True)))


@rule("log_softmax.int", "_log_softmax", whole=True)
def _log_softmax(b: Any, x: Any, dim: int, dtype: Any = None) -> Any:
    dtype = None if isinstance(dtype, bool) else dtype
    out = dtype_name(dtype) if dtype is not None else x.dtype
    w = widened(b, b.convert(x, out))
    return b.convert(log_softmax_of(b, w, dim_of(x, dim)), out)


@rule("layer_norm", whole=True)
def _layer_norm(b: Any, x: Any, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn: bool = True) -> Any:
    if len(shape) != 1:
        raise Unknown("a norm over several axes")
    w, d = widened(b, x), x.ndim - 1
    n = b.full(float(shape[0]), w.dtype)
    mean = b.elementwise("div", b.reduce("sum", w, [d], True), n)
    off = b.elementwise("sub", w, mean)
    var = b.elementwise("div", b.reduce("sum", b.op("square", off, shape=w.shape, dtype=w.dtype), [d], True), n)
    y = b.elementwise("mul", off, b.elementwise("rsqrt", b.elementwise("add", var, b.full(eps, w.dtype))))
    y = y if weight is None else b.elementwise("mul", y, b.convert(weight, w.dtype))
    y = y if bias is None else b.elementwise("add", y, b.convert(bias, w.dtype))
    return b.convert(y, x.dtype)


@rule("rms_norm", whole=True)
def _rms_norm(b: Any, x: Any, shape: Sequence[int], weight: Any = None, eps: Any = None) -> Any:
    if len(shape) != 1:
        raise Unknown("a norm over several axes")
    if weight is not None and weight.dtype != x.dtype:
        raise Unknown("a weight of another dtype")
    w, d = widened(b, x), x.ndim - 1
    eps = float(torch.finfo(torch_dtype(w.dtype)).eps) if eps is None else eps
    total = b.reduce("sum", b.op("square", w, shape=w.shape, dtype=w.dtype), [d], True)
    mean = b.elementwise("div", total, b.full(float(shape[0]), w.dtype))
    y = b.elementwise("mul", w, b.elementwise("rsqrt", b.elementwise("add", mean, b.full(eps, w.dtype))))
    y = y if weight is None else b.elementwise("mul", y, b.convert(weight, w.dtype))
    return b.convert(y, x.dtype)
