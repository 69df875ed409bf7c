"""ATen ops in the neutral vocabulary: one function an op, which writes what the op computes, dtype promotion included.

A rule gets the op's arguments with values (`V`) for tensors and numbers for symbolic sizes, and returns the value (or list of values) that
the op makes. What it cannot say exactly raises `Unknown`, and the op runs as it stood. `kpt_torch.capture` holds every result to
the shape and dtype that torch gives it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from kpt_torch.library import dtype_name, torch_dtype

aten = torch.ops.aten
_MAX = 9223372036854775807


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


# -- promotion -----------------------------------------------------------------------------------------------------------------


def _common(*args: Any) -> str:
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


def _number(b: Any, value: Any, dtype: str) -> Any:
    if isinstance(value, complex):
        raise Unknown("complex")
    if not is_float(dtype) and isinstance(value, float) and not value.is_integer():
        raise Unknown("a fraction among integers")
    return b.full(value, dtype)


def _pair(b: Any, x: Any, y: Any, to_float: bool = False) -> tuple[Any, Any]:
    dtype = _common(x, y)
    if to_float and not is_float(dtype):
        dtype = "float32"
    return tuple(b.convert(a, dtype) if is_value(a) else _number(b, a, dtype) for a in (x, y))


def _floating(b: Any, x: Any) -> Any:
    if x.dtype.startswith("complex"):
        raise Unknown("complex")
    return x if is_float(x.dtype) else b.convert(x, "float32")


# -- elementwise -----------------------------------------------------------------------------------------------------------------

for _name in ("exp", "exp2", "log", "log1p", "expm1", "tanh", "erf", "erfc", "sqrt", "rsqrt", "sin", "cos", "ceil", "floor", "round", "neg",
              "sign"):  # fmt: skip

    def _unary(b: Any, x: Any, op: str = _name) -> Any:
        if op not in ("neg", "sign", "ceil", "floor", "round"):
            x = _floating(b, x)
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
    x = _floating(b, x)
    return b.op("logistic", x, shape=x.shape, dtype=x.dtype)


@rule("square")
def _square(b: Any, x: Any) -> Any:
    return b.op("square", x, shape=x.shape, dtype=x.dtype)


@rule("reciprocal")
def _reciprocal(b: Any, x: Any) -> Any:
    x = _floating(b, x)
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
        x, y = _pair(b, x, y)
        if x.dtype == "bool":
            raise Unknown("bool")
        if alpha != 1:
            y = b.elementwise("mul", y, _number(b, alpha, y.dtype))
        return b.elementwise(sign, x, y)

    return fn


rule("add.Tensor", "add.Scalar")(_sum_of("add"))
rule("sub.Tensor", "sub.Scalar")(_sum_of("sub"))


@rule("rsub.Scalar", "rsub.Tensor")
def _rsub(b: Any, x: Any, y: Any, alpha: Any = 1) -> Any:
    return _sum_of("sub")(b, y, x, alpha=alpha)


@rule("mul.Tensor", "mul.Scalar")
def _mul(b: Any, x: Any, y: Any) -> Any:
    x, y = _pair(b, x, y)
    return b.elementwise("and" if x.dtype == "bool" else "mul", x, y)


@rule("div.Tensor", "div.Scalar", "true_divide.Tensor")
def _div(b: Any, x: Any, y: Any) -> Any:
    return b.elementwise("div", *_pair(b, x, y, to_float=True))


@rule("maximum")
def _maximum(b: Any, x: Any, y: Any) -> Any:
    return b.elementwise("max", *_pair(b, x, y))


@rule("minimum")
def _minimum(b: Any, x: Any, y: Any) -> Any:
    return b.elementwise("min", *_pair(b, x, y))


@rule("pow.Tensor_Scalar")
def _pow(b: Any, x: Any, y: Any) -> Any:
    if not is_float(x.dtype):
        raise Unknown("a power of integers")
    if y == 2:
        return b.op("square", x, shape=x.shape, dtype=x.dtype)
    return b.op("pow", x, shape=x.shape, dtype=x.dtype, y=y)


@rule("pow.Tensor_Tensor", "pow.Scalar")
def _power(b: Any, x: Any, y: Any) -> Any:
    x, y = _pair(b, x, y)
    if not is_float(x.dtype):
        raise Unknown("a power of integers")
    return b.elementwise("power", x, y)


for _name in ("eq", "ne", "ge", "gt", "le", "lt"):

    def _compare(b: Any, x: Any, y: Any, op: str = _name) -> Any:
        return b.elementwise(op, *_pair(b, x, y), dtype="bool")

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
    dtype = _common(x, y)
    x, y = (b.convert(a, dtype) if is_value(a) else _number(b, a, dtype) for a in (x, y))
    return _select(b, p, x, y)


def _select(b: Any, p: Any, x: Any, y: Any) -> Any:
    if p.dtype != "bool":
        raise Unknown("where of numbers")
    shape = np.broadcast_shapes(p.shape, x.shape, y.shape)
    return b.op("select", *(b.broadcast(a, shape) if a.shape != () or a is p else a for a in (p, x, y)), shape=shape, dtype=x.dtype)


@rule("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(b: Any, x: Any, mask: Any, value: Any) -> Any:
    value = b.convert(value, x.dtype) if is_value(value) else _number(b, value, x.dtype)
    return _select(b, mask, value, x)


@rule("clamp", "clip")
def _clamp(b: Any, x: Any, low: Any = None, high: Any = None) -> Any:
    if not is_float(x.dtype):
        raise Unknown("a clamp of integers")
    for op, bound in (("max", low), ("min", high)):
        if bound is not None:
            x = b.elementwise(op, x, _number(b, bound, x.dtype))
    return x


@rule("clamp_min")
def _clamp_min(b: Any, x: Any, low: Any) -> Any:
    return _clamp(b, x, low)


# -- activations -------------------------------------------------------------------------------------------------------------------


@rule("relu", whole=True)
def _relu(b: Any, x: Any) -> Any:
    return b.elementwise("max", _floating(b, x), b.full(0.0, x.dtype))


def _wide(b: Any, x: Any) -> Any:
    """torch computes these in float32 for narrower floats, and rounds once."""
    if not is_float(x.dtype):
        raise Unknown(x.dtype)
    return b.convert(x, "float32") if x.dtype in ("bfloat16", "float16") else x


@rule("silu", whole=True)
def _silu(b: Any, x: Any) -> Any:
    w = _wide(b, x)
    return b.convert(b.elementwise("mul", w, b.op("logistic", w, shape=w.shape, dtype=w.dtype)), x.dtype)


@rule("gelu", whole=True)
def _gelu(b: Any, x: Any, *, approximate: str = "none") -> Any:
    w = _wide(b, x)
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
    w = _wide(b, x)
    soft = b.op("log1p", b.op("exp", w, shape=w.shape, dtype=w.dtype), shape=w.shape, dtype=w.dtype)
    return b.convert(b.elementwise("mul", w, b.op("tanh", soft, shape=w.shape, dtype=w.dtype)), x.dtype)


# -- shapes ------------------------------------------------------------------------------------------------------------------------


def _dim(a: Any, d: int, extra: int = 0) -> int:
    return d % max(a.ndim + extra, 1)


@rule("alias", "lift_fresh_copy", "lift_fresh", "detach_copy")
def _same(b: Any, x: Any) -> Any:
    return x


@rule("dropout")
def _dropout(b: Any, x: Any, p: float, train: bool) -> Any:
    return x  # off: where it is on, it is an effect and not asked about


@rule("clone", "contiguous")
def _copy(b: Any, x: Any, *, memory_format: Any = None) -> Any:
    return x


@rule("detach")
def _detach(b: Any, x: Any) -> Any:
    return b.op("stop_gradient", x, shape=x.shape, dtype=x.dtype) if is_float(x.dtype) else x


@rule("to.dtype", "type_as.dtype", "to.prim_dtype")
def _to(b: Any, x: Any, dtype: Any = None, *_: Any, **__: Any) -> Any:
    return b.convert(x, dtype_name(dtype)) if dtype is not None else x


@rule("to.dtype_layout", "_to_copy")
def _to_layout(b: Any, x: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, **_: Any) -> Any:
    if layout not in (None, torch.strided) or device is not None and b.fx.args[0].meta["val"].device != torch.device(device):
        raise Unknown("a move")
    return b.convert(x, dtype_name(dtype)) if dtype is not None else x


@rule("to.device")
def _to_device(b: Any, x: Any, device: Any, dtype: Any, *_: Any, **__: Any) -> Any:
    return _to_layout(b, x, dtype=dtype, device=device)


@rule("to.other", "type_as")
def _to_other(b: Any, x: Any, other: Any, *_: Any, **__: Any) -> Any:
    a, c = (n.meta["val"].device for n in b.fx.args[:2])
    if a != c:
        raise Unknown("a move")
    return b.convert(x, other.dtype)


@rule("view", "reshape", "_unsafe_view", "view_as", "reshape_as")
def _view(b: Any, x: Any, shape: Any) -> Any:
    shape = list(shape.shape) if is_value(shape) else list(shape)
    if -1 in shape:
        rest = math.prod(n for n in shape if n != -1)
        shape[shape.index(-1)] = math.prod(x.shape) // rest if rest else 0
    return b.reshape(x, shape)


@rule("flatten.using_ints")
def _flatten(b: Any, x: Any, start: int = 0, end: int = -1) -> Any:
    if not x.ndim:
        return b.reshape(x, (1,))
    i, j = _dim(x, start), _dim(x, end)
    return b.reshape(x, (*x.shape[:i], math.prod(x.shape[i : j + 1]), *x.shape[j + 1 :]))


@rule("unflatten.int")
def _unflatten(b: Any, x: Any, dim: int, sizes: Sequence[int]) -> Any:
    d = _dim(x, dim)
    sizes = list(sizes)
    if -1 in sizes:
        sizes[sizes.index(-1)] = x.shape[d] // max(math.prod(n for n in sizes if n != -1), 1)
    return b.reshape(x, (*x.shape[:d], *sizes, *x.shape[d + 1 :]))


@rule("unsqueeze")
def _unsqueeze(b: Any, x: Any, dim: int) -> Any:
    d = _dim(x, dim, 1)
    return b.reshape(x, (*x.shape[:d], 1, *x.shape[d:]))


@rule("squeeze.dim", "squeeze.dims", "squeeze")
def _squeeze(b: Any, x: Any, dim: Any = None) -> Any:
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {_dim(x, d) for d in dims}
    return b.reshape(x, [n for d, n in enumerate(x.shape) if n != 1 or d not in gone])


@rule("transpose.int", "swapaxes")
def _transpose(b: Any, x: Any, i: int, j: int) -> Any:
    return b.swap(x, _dim(x, i), _dim(x, j)) if x.ndim else x


@rule("t", "numpy_T", "mT", "adjoint")
def _t(b: Any, x: Any) -> Any:
    return b.swap(x, x.ndim - 2, x.ndim - 1) if x.ndim >= 2 else x


@rule("permute")
def _permute(b: Any, x: Any, dims: Sequence[int]) -> Any:
    return b.transpose(x, [_dim(x, d) for d in dims])


@rule("movedim.int")
def _movedim(b: Any, x: Any, source: int, target: int) -> Any:
    i, j = _dim(x, source), _dim(x, target)
    perm = [d for d in range(x.ndim) if d != i]
    perm.insert(j, i)
    return b.transpose(x, perm)


@rule("expand")
def _expand(b: Any, x: Any, sizes: Sequence[int], *, implicit: bool = False) -> Any:
    lead = len(sizes) - x.ndim
    return b.broadcast(x, [x.shape[i - lead] if n == -1 else n for i, n in enumerate(sizes)])


@rule("expand_as")
def _expand_as(b: Any, x: Any, other: Any) -> Any:
    return b.broadcast(x, other.shape)


@rule("repeat")
def _repeat(b: Any, x: Any, reps: Sequence[int]) -> Any:
    x = b.reshape(x, (1,) * (len(reps) - x.ndim) + x.shape)
    wide = [n for r, m in zip(reps, x.shape, strict=True) for n in (r, m)]
    apart = b.reshape(x, [n for m in x.shape for n in (1, m)])
    return b.reshape(b.broadcast(apart, wide), [r * m for r, m in zip(reps, x.shape, strict=True)])


@rule("repeat_interleave.self_int")
def _repeat_interleave(b: Any, x: Any, repeats: int, dim: Any = None, *, output_size: Any = None) -> Any:
    if dim is None:
        x, dim = b.reshape(x, (math.prod(x.shape),)), 0
    d = _dim(x, dim)
    apart = b.reshape(x, (*x.shape[: d + 1], 1, *x.shape[d + 1 :]))
    wide = b.broadcast(apart, (*x.shape[: d + 1], repeats, *x.shape[d + 1 :]))
    return b.reshape(wide, (*x.shape[:d], x.shape[d] * repeats, *x.shape[d + 1 :]))


def _cut(b: Any, x: Any, d: int, start: int, limit: int, step: int = 1) -> Any:
    if (start, limit, step) == (0, x.shape[d], 1):
        return x
    lo, hi, by = [0] * x.ndim, list(x.shape), [1] * x.ndim
    lo[d], hi[d], by[d] = start, limit, step
    return b.slice(x, lo, hi, by)


@rule("slice.Tensor")
def _slice(b: Any, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    d = _dim(x, dim)
    n = x.shape[d]
    bound = lambda v: min(max(v + n if v < 0 else v, 0), n)  # noqa: E731
    lo, hi = bound(start or 0), bound(_MAX if end is None else end)
    return _cut(b, x, d, lo, max(lo, hi), step)


@rule("narrow")
def _narrow(b: Any, x: Any, dim: int, start: int, length: int) -> Any:
    d = _dim(x, dim)
    start = start % x.shape[d] if start < 0 else start
    return _cut(b, x, d, start, start + length)


@rule("select.int")
def _pick(b: Any, x: Any, dim: int, index: int) -> Any:
    d = _dim(x, dim)
    i = index % x.shape[d] if index < 0 else index
    return b.reshape(_cut(b, x, d, i, i + 1), x.shape[:d] + x.shape[d + 1 :])


def _pieces(b: Any, x: Any, d: int, sizes: Sequence[int]) -> list[Any]:
    out, at = [], 0
    for n in sizes:
        out.append(_cut(b, x, d, at, at + n))
        at += n
    return [b.identity(o) if o is x else o for o in out]


@rule("split.Tensor")
def _split(b: Any, x: Any, size: int, dim: int = 0) -> Any:
    d = _dim(x, dim)
    n = x.shape[d]
    return _pieces(b, x, d, [min(size, n - i) for i in range(0, n, size)])


@rule("split_with_sizes", "split.sizes")
def _split_sizes(b: Any, x: Any, sizes: Sequence[int], dim: int = 0) -> Any:
    return _pieces(b, x, _dim(x, dim), sizes)


@rule("chunk")
def _chunk(b: Any, x: Any, chunks: int, dim: int = 0) -> Any:
    return _split(b, x, -(-x.shape[_dim(x, dim)] // chunks), dim)


@rule("unbind.int")
def _unbind(b: Any, x: Any, dim: int = 0) -> Any:
    return [_pick(b, x, dim, i) for i in range(x.shape[_dim(x, dim)])]


@rule("cat")
def _cat(b: Any, tensors: Sequence[Any], dim: int = 0) -> Any:
    dtype = _common(*tensors)
    given = [b.convert(t, dtype) for t in tensors if t.shape != (0,)]
    if not given:
        raise Unknown("nothing to join")
    d = _dim(given[0], dim)
    given = [t for t in given if t.shape[d]] or given[:1]
    if len(given) == 1:
        return given[0]
    shape = list(given[0].shape)
    shape[d] = sum(t.shape[d] for t in given)
    return b.op("concatenate", *given, shape=shape, dtype=dtype, axis=d)


@rule("stack")
def _stack(b: Any, tensors: Sequence[Any], dim: int = 0) -> Any:
    return _cat(b, [_unsqueeze(b, t, _dim(t, dim, 1)) for t in tensors], _dim(tensors[0], dim, 1))


@rule("roll")
def _roll(b: Any, x: Any, shifts: Sequence[int], dims: Sequence[int] = ()) -> Any:
    if len(shifts) != 1 or len(dims) != 1 or not x.shape[dims[0]]:
        raise Unknown("roll")
    d = _dim(x, dims[0])
    at = -shifts[0] % x.shape[d]
    return _cat(b, [_cut(b, x, d, at, x.shape[d]), _cut(b, x, d, 0, at)], d) if at else x


@rule("pad", "constant_pad_nd")
def _pad(b: Any, x: Any, pad: Sequence[int], mode: Any = "constant", value: Any = None) -> Any:
    if isinstance(mode, float | int):
        mode, value = "constant", mode
    if mode != "constant":
        raise Unknown("padding by reflection")
    for i in range(len(pad) // 2):
        d = x.ndim - 1 - i
        before, after = pad[2 * i], pad[2 * i + 1]
        x = _cut(b, x, d, max(-before, 0), x.shape[d] - max(-after, 0))
        parts = [x]
        for n, first in ((before, True), (after, False)):
            if n > 0:
                fill = b.broadcast(_number(b, value or 0, x.dtype), (*x.shape[:d], n, *x.shape[d + 1 :]))
                parts.insert(0, fill) if first else parts.append(fill)
        x = _cat(b, parts, d)
    return x


# -- making ------------------------------------------------------------------------------------------------------------------------


def _made_dtype(b: Any) -> str:
    return dtype_name(b.fx.meta["val"].dtype)


@rule("arange", "arange.start", "arange.start_step")
def _arange(b: Any, *args: Any, **_: Any) -> Any:
    start, end, step = (0, args[0], 1) if len(args) == 1 else (*args, 1)[:3]
    if not all(isinstance(v, int) for v in (start, end, step)) or _made_dtype(b).startswith(("float", "bfloat")):
        raise Unknown("fractions")
    n, dtype = max(0, -(-(end - start) // step)), _made_dtype(b)
    out = b.iota((n,), 0, dtype)
    if step != 1:
        out = b.elementwise("mul", out, b.full(step, dtype))
    return out if start == 0 else b.elementwise("add", out, b.full(start, dtype))


@rule("full")
def _full(b: Any, shape: Sequence[int], value: Any, **_: Any) -> Any:
    return b.broadcast(_number(b, value, _made_dtype(b)), shape)


@rule("ones", "new_ones", "ones_like")
def _ones(b: Any, *args: Any, **_: Any) -> Any:
    return b.broadcast(b.full(1, _made_dtype(b)), b.sizes.spec(b.fx.meta["val"]).shape)


@rule("zeros", "new_zeros", "zeros_like")
def _zeros(b: Any, *args: Any, **_: Any) -> Any:
    return b.broadcast(b.full(0, _made_dtype(b)), b.sizes.spec(b.fx.meta["val"]).shape)


@rule("full_like")
def _full_like(b: Any, x: Any, value: Any, **_: Any) -> Any:
    return b.broadcast(_number(b, value, _made_dtype(b)), x.shape)


@rule("new_full")
def _new_full(b: Any, x: Any, shape: Sequence[int], value: Any, **_: Any) -> Any:
    return b.broadcast(_number(b, value, _made_dtype(b)), shape)


@rule("scalar_tensor")
def _scalar_tensor(b: Any, value: Any, **_: Any) -> Any:
    return b.identity(_number(b, value, _made_dtype(b)))


def _triangle(lower: bool) -> Callable[..., Any]:
    def fn(b: Any, x: Any, diagonal: int = 0) -> Any:
        shape = x.shape
        i, j = (b.iota(shape, len(shape) - 2 + k, "int32") for k in (0, 1))
        i = b.elementwise("add", i, b.full(diagonal, "int32")) if diagonal else i
        zero = b.broadcast(b.full(0, x.dtype), shape)
        return b.op("select", b.elementwise("le" if lower else "ge", j, i, dtype="bool"), x, zero, shape=shape, dtype=x.dtype)

    return fn


rule("tril")(_triangle(True))
rule("triu")(_triangle(False))


# -- reductions --------------------------------------------------------------------------------------------------------------------


def _axes(x: Any, dim: Any) -> list[int]:
    dims = range(x.ndim) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    return [_dim(x, d) for d in dims]


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
    values = b.reduce("max", x, [_dim(x, dim)], keepdim)
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
    w = _wide(b, b.convert(x, out))
    return b.convert(softmax_of(b, w, _dim(x, dim)), out)


def log_softmax_of(b: Any, x: Any, axis: int) -> Any:
    z = b.elementwise("sub", x, b.reduce("max", x, [axis], True))
    return b.elementwise("sub", z, b.elementwise("log", b.reduce("sum", b.elementwise("exp", z), [axis], True)))


@rule("log_softmax.int", "_log_softmax", whole=True)
def _log_softmax(b: Any, x: Any, dim: int, dtype: Any = None) -> Any:
    dtype = None if isinstance(dtype, bool) else dtype
    out = dtype_name(dtype) if dtype is not None else x.dtype
    w = _wide(b, b.convert(x, out))
    return b.convert(log_softmax_of(b, w, _dim(x, dim)), out)


# -- norms -------------------------------------------------------------------------------------------------------------------------


@rule("layer_norm", whole=True)
def _layer_norm(b: Any, x: Any, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn: bool = True) -> Any:
    if len(shape) != 1:
        raise Unknown("a norm over several axes")
    w, d = _wide(b, x), x.ndim - 1
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
    w, d = _wide(b, x), x.ndim - 1
    eps = float(torch.finfo(torch_dtype(w.dtype)).eps) if eps is None else eps
    total = b.reduce("sum", b.op("square", w, shape=w.shape, dtype=w.dtype), [d], True)
    mean = b.elementwise("div", total, b.full(float(shape[0]), w.dtype))
    y = b.elementwise("mul", w, b.elementwise("rsqrt", b.elementwise("add", mean, b.full(eps, w.dtype))))
    y = y if weight is None else b.elementwise("mul", y, b.convert(weight, w.dtype))
    return b.convert(y, x.dtype)


# -- products ----------------------------------------------------------------------------------------------------------------------


def _same_floats(*xs: Any) -> None:
    if len({x.dtype for x in xs}) != 1 or not is_float(xs[0].dtype):
        raise Unknown("a product of several dtypes")


@rule("linear")
def _linear(b: Any, x: Any, w: Any, bias: Any = None) -> Any:
    _same_floats(x, w, *([] if bias is None else [bias]))
    if w.ndim != 2:
        raise Unknown("a linear layer of one column")
    y = b.dot(x, w, (x.ndim - 1, 1), 0)
    return y if bias is None else b.elementwise("add", y, bias)


@rule("mm")
def _mm(b: Any, x: Any, y: Any) -> Any:
    _same_floats(x, y)
    return b.dot(x, y, (1, 0), 0)


@rule("addmm")
def _addmm(b: Any, c: Any, x: Any, y: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    _same_floats(c, x, y)
    if beta != 1 or alpha != 1:
        raise Unknown("a scaled product")
    return b.elementwise("add", b.dot(x, y, (1, 0), 0), c)


@rule("bmm")
def _bmm(b: Any, x: Any, y: Any) -> Any:
    _same_floats(x, y)
    return b.dot(x, y, (2, 1), 1)


@rule("baddbmm")
def _baddbmm(b: Any, c: Any, x: Any, y: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    _same_floats(c, x, y)
    z = b.dot(x, y, (2, 1), 1)
    z = z if alpha == 1 else b.elementwise("mul", z, _number(b, alpha, z.dtype))
    if beta == 0:
        return z
    c = c if beta == 1 else b.elementwise("mul", c, _number(b, beta, c.dtype))
    return b.elementwise("add", z, c)


@rule("matmul")
def _matmul(b: Any, x: Any, y: Any) -> Any:
    _same_floats(x, y)
    if x.ndim < 1 or y.ndim < 1:
        raise Unknown("a scalar")
    if y.ndim <= 2:
        return b.dot(x, y, (x.ndim - 1, max(y.ndim - 2, 0)), 0)
    if x.ndim == 1:
        raise Unknown("a vector times matrices")
    lead = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    x, y = (b.broadcast(a, (*lead, *a.shape[-2:])) for a in (x, y))
    return b.dot(x, y, (x.ndim - 1, y.ndim - 2), len(lead))


@rule("einsum")
def _einsum(b: Any, equation: str, operands: Sequence[Any], *, path: Any = None) -> Any:
    equation = equation.replace(" ", "")
    if len(operands) != 2 or "->" not in equation or "..." in equation:
        raise Unknown("einsum")
    (left, right), out = equation.split("->")[0].split(","), equation.split("->")[1]
    x, y = operands
    _same_floats(x, y)
    if any(len(set(s)) != len(s) for s in (left, right, out)):
        raise Unknown("a diagonal")
    for letters, other in ((left, right), (right, left)):
        if any(c not in other and c not in out for c in letters):
            raise Unknown("a sum over one operand")
    batch = [c for c in left if c in right and c in out]
    summed = [c for c in left if c in right and c not in out]
    if not summed:
        raise Unknown("an outer product")
    extent = dict(zip(left + right, x.shape + y.shape, strict=True))

    def ordered(a: Any, letters: str) -> tuple[Any, list[str]]:
        free = [c for c in letters if c not in batch and c not in summed]
        a = b.transpose(a, [letters.index(c) for c in (*batch, *free, *summed)])
        lead = [extent[c] for c in (*batch, *free)]
        return b.reshape(a, (*lead, math.prod(extent[c] for c in summed))), free

    x, fx_ = ordered(x, left)
    y, fy = ordered(y, right)
    z = b.dot(x, y, (x.ndim - 1, y.ndim - 1), len(batch))
    made = [*batch, *fx_, *fy]
    return b.transpose(z, [made.index(c) for c in out])


# -- choosing by index ---------------------------------------------------------------------------------------------------------------


@rule("gather")
def _gather(b: Any, x: Any, dim: int, index: Any, *, sparse_grad: bool = False) -> Any:
    d = _dim(x, dim)
    if any(i != d and index.shape[i] != x.shape[i] for i in range(x.ndim)):
        raise Unknown("a gather of fewer rows")
    return take_along(b, x, index, d, "clip")


def take_along(b: Any, x: Any, index: Any, d: int, mode: str) -> Any:
    """x[..., index, ...] along one axis, the other dims walking together; an index outside of it follows `mode`."""
    others = tuple(i for i in range(x.ndim) if i != d)
    idx = b.reshape(index, (*index.shape, 1))
    return b.op("gather", x, idx, shape=index.shape, dtype=x.dtype, offset_dims=(), collapsed=(d,), index_map=(d,), operand_batch=others,
                index_batch=others, sizes=(1,) * x.ndim, mode=mode)  # fmt: skip


@rule("nll_loss_nd", "nll_loss")
def _nll_loss(b: Any, logp: Any, labels: Any, weight: Any = None, reduction: int = 1, ignore_index: int = -100) -> Any:
    return _nll(b, logp, labels, weight, reduction, ignore_index, 0.0)


@rule("cross_entropy_loss")
def _cross_entropy(
    b: Any, x: Any, labels: Any, weight: Any = None, reduction: int = 1, ignore_index: int = -100, label_smoothing: float = 0.0
) -> Any:
    if is_float(labels.dtype) or x.ndim < 1:
        raise Unknown("targets that are probabilities")
    axis = 1 if x.ndim > 1 else 0
    logp = b.convert(log_softmax_of(b, _wide(b, x), axis), x.dtype)
    return _nll(b, logp, labels, weight, reduction, ignore_index, label_smoothing)


def _nll(b: Any, logp: Any, labels: Any, weight: Any, reduction: int, ignore_index: int, smoothing: float) -> Any:
    """Losses per row, those of `ignore_index` 0, and their mean over the others."""
    if weight is not None:
        raise Unknown("class weights")
    axis = 1 if logp.ndim > 1 else 0
    perm = [*(d for d in range(logp.ndim) if d != axis), axis]
    rows = b.transpose(logp, perm)  # classes last
    kept = b.elementwise("ne", labels, b.full(ignore_index, labels.dtype), dtype="bool")
    zero = b.full(0, labels.dtype)
    safe = b.op("select", kept, labels, b.broadcast(zero, labels.shape), shape=labels.shape, dtype=labels.dtype)
    picked = take_along(b, rows, b.reshape(safe, (*safe.shape, 1)), rows.ndim - 1, "clip")
    loss = b.op("neg", b.reshape(picked, safe.shape), shape=safe.shape, dtype=rows.dtype)
    if smoothing:
        n = rows.shape[-1]
        flat = b.op("neg", b.reduce("sum", rows, [rows.ndim - 1], False), shape=safe.shape, dtype=rows.dtype)
        loss = b.elementwise("add", b.elementwise("mul", loss, b.full(1 - smoothing, rows.dtype)),
                             b.elementwise("mul", flat, b.full(smoothing / n, rows.dtype)))  # fmt: skip
    none = b.broadcast(b.full(0.0, loss.dtype), loss.shape)
    loss = b.op("select", kept, loss, none, shape=loss.shape, dtype=loss.dtype)
    if reduction == 0:
        return loss
    axes = list(range(loss.ndim))
    wide = _wide(b, loss)
    total = b.reduce("sum", wide, axes, False)
    if reduction == 1:
        # Counted in integers: as floats they would be the weights of the tokens, and an array of the site made outside of it.
        count = b.reduce("sum", b.convert(kept, "int64"), axes, False)
        total = b.elementwise("div", total, b.convert(count, wide.dtype))
    out = b.convert(total, loss.dtype)
    return b.identity(out)


# -- attention ---------------------------------------------------------------------------------------------------------------------


@rule("scaled_dot_product_attention", whole=True)
def _attention(
    b: Any, q: Any, k: Any, v: Any, mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, *, scale: Any = None,
    enable_gqa: bool = False,
) -> Any:  # fmt: skip
    if dropout_p:
        raise Unknown("dropout")
    _same_floats(q, k, v)
    dtype, lead = q.dtype, q.ndim - 2
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if enable_gqa and k.shape[-3] != q.shape[-3]:
        k, v = (_repeat_interleave(b, a, q.shape[-3] // a.shape[-3], -3) for a in (k, v))
    batch = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v = (b.broadcast(_wide(b, a), (*batch, *a.shape[-2:])) for a in (q, k, v))
    s = b.dot(q, k, (q.ndim - 1, k.ndim - 1), len(batch))
    s = b.elementwise("mul", s, b.full(scale, s.dtype))
    keep = None
    if is_causal:
        i, j = (b.iota(s.shape, s.ndim - 2 + d, "int32") for d in (0, 1))
        keep = b.elementwise("le", j, i, dtype="bool")
    elif mask is not None and mask.dtype == "bool":
        keep = b.broadcast(mask, s.shape)
    elif mask is not None:
        s = b.elementwise("add", s, b.convert(mask, s.dtype))
    if keep is None:
        p = softmax_of(b, s, s.ndim - 1)
    else:
        s = b.op("select", keep, s, b.broadcast(b.full(-math.inf, s.dtype), s.shape), shape=s.shape, dtype=s.dtype)
        p = softmax_of(b, s, s.ndim - 1)
        if mask is not None:  # a query that sees nothing gives 0
            p = b.op("select", keep, p, b.broadcast(b.full(0.0, s.dtype), s.shape), shape=s.shape, dtype=s.dtype)
    assert lead >= 1
    return b.convert(b.dot(p, v, (p.ndim - 1, v.ndim - 2), len(batch)), dtype)
