"""Ops that move elements, and ops that make tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kpt_torch.library import dtype_name
from kpt_torch.vocabulary.table import Unknown, common, is_float, is_value, number, rule

_MAX = 9223372036854775807


def dim_of(a: Any, d: int, extra: int = 0) -> int:
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
    moves = is_float(x.dtype) or x.dtype.startswith("complex")
    return b.op("stop_gradient", x, shape=x.shape, dtype=x.dtype) if moves else x


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
    i, j = dim_of(x, start), dim_of(x, end)
    return b.reshape(x, (*x.shape[:i], math.prod(x.shape[i : j + 1]), *x.shape[j + 1 :]))


@rule("unflatten.int")
def _unflatten(b: Any, x: Any, dim: int, sizes: Sequence[int]) -> Any:
    d = dim_of(x, dim)
    sizes = list(sizes)
    if -1 in sizes:
        sizes[sizes.index(-1)] = x.shape[d] // max(math.prod(n for n in sizes if n != -1), 1)
    return b.reshape(x, (*x.shape[:d], *sizes, *x.shape[d + 1 :]))


@rule("unsqueeze")
def _unsqueeze(b: Any, x: Any, dim: int) -> Any:
    d = dim_of(x, dim, 1)
    return b.reshape(x, (*x.shape[:d], 1, *x.shape[d:]))


@rule("squeeze.dim", "squeeze.dims", "squeeze")
def _squeeze(b: Any, x: Any, dim: Any = None) -> Any:
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {dim_of(x, d) for d in dims}
    return b.reshape(x, [n for d, n in enumerate(x.shape) if n != 1 or d not in gone])


@rule("transpose.int", "swapaxes")
def _transpose(b: Any, x: Any, i: int, j: int) -> Any:
    return b.swap(x, dim_of(x, i), dim_of(x, j)) if x.ndim else x


@rule("t", "numpy_T", "mT", "adjoint")
def _t(b: Any, x: Any) -> Any:
    return b.swap(x, x.ndim - 2, x.ndim - 1) if x.ndim >= 2 else x


@rule("permute")
def _permute(b: Any, x: Any, dims: Sequence[int]) -> Any:
    return b.transpose(x, [dim_of(x, d) for d in dims])


@rule("movedim.int")
def _movedim(b: Any, x: Any, source: int, target: int) -> Any:
    i, j = dim_of(x, source), dim_of(x, target)
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
def repeat_interleave(b: Any, x: Any, repeats: int, dim: Any = None, *, output_size: Any = None) -> Any:
    if dim is None:
        x, dim = b.reshape(x, (math.prod(x.shape),)), 0
    d = dim_of(x, dim)
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
    d = dim_of(x, dim)
    n = x.shape[d]
    bound = lambda v: min(max(v + n if v < 0 else v, 0), n)  # noqa: E731
    lo, hi = bound(start or 0), bound(_MAX if end is None else end)
    return _cut(b, x, d, lo, max(lo, hi), step)


@rule("narrow")
def _narrow(b: Any, x: Any, dim: int, start: int, length: int) -> Any:
    d = dim_of(x, dim)
    start = start % x.shape[d] if start < 0 else start
    return _cut(b, x, d, start, start + length)


@rule("select.int")
def _pick(b: Any, x: Any, dim: int, index: int) -> Any:
    d = dim_of(x, dim)
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
    d = dim_of(x, dim)
    n = x.shape[d]
    return _pieces(b, x, d, [min(size, n - i) for i in range(0, n, size)])


@rule("split_with_sizes", "split.sizes")
def _split_sizes(b: Any, x: Any, sizes: Sequence[int], dim: int = 0) -> Any:
    return _pieces(b, x, dim_of(x, dim), sizes)


@rule("chunk")
def _chunk(b: Any, x: Any, chunks: int, dim: int = 0) -> Any:
    return _split(b, x, -(-x.shape[dim_of(x, dim)] // chunks), dim)


@rule("unbind.int")
def _unbind(b: Any, x: Any, dim: int = 0) -> Any:
    return [_pick(b, x, dim, i) for i in range(x.shape[dim_of(x, dim)])]


@rule("cat")
def _cat(b: Any, tensors: Sequence[Any], dim: int = 0) -> Any:
    dtype = common(*tensors)
    given = [b.convert(t, dtype) for t in tensors if t.shape != (0,)]
    if not given:
        raise Unknown("nothing to join")
    d = dim_of(given[0], dim)
    given = [t for t in given if t.shape[d]] or given[:1]
    if len(given) == 1:
        return given[0]
    shape = list(given[0].shape)
    shape[d] = sum(t.shape[d] for t in given)
    return b.op("concatenate", *given, shape=shape, dtype=dtype, axis=d)


@rule("stack")
def _stack(b: Any, tensors: Sequence[Any], dim: int = 0) -> Any:
    return _cat(b, [_unsqueeze(b, t, dim_of(t, dim, 1)) for t in tensors], dim_of(tensors[0], dim, 1))


@rule("roll")
def _roll(b: Any, x: Any, shifts: Sequence[int], dims: Sequence[int] = ()) -> Any:
    if len(shifts) != 1 or len(dims) != 1 or not x.shape[dims[0]]:
        raise Unknown("roll")
    d = dim_of(x, dims[0])
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
                fill = b.broadcast(number(b, value or 0, x.dtype), (*x.shape[:d], n, *x.shape[d + 1 :]))
                parts.insert(0, fill) if first else parts.append(fill)
        x = _cat(b, parts, d)
    return x


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
    return b.broadcast(number(b, value, _made_dtype(b)), shape)


@rule("ones", "new_ones", "ones_like")
def _ones(b: Any, *args: Any, **_: Any) -> Any:
    return b.broadcast(b.full(1, _made_dtype(b)), b.sizes.spec(b.fx.meta["val"]).shape)


@rule("zeros", "new_zeros", "zeros_like")
def _zeros(b: Any, *args: Any, **_: Any) -> Any:
    return b.broadcast(b.full(0, _made_dtype(b)), b.sizes.spec(b.fx.meta["val"]).shape)


@rule("full_like")
def _full_like(b: Any, x: Any, value: Any, **_: Any) -> Any:
    return b.broadcast(number(b, value, _made_dtype(b)), x.shape)


@rule("new_full")
def _new_full(b: Any, x: Any, shape: Sequence[int], value: Any, **_: Any) -> Any:
    return b.broadcast(number(b, value, _made_dtype(b)), shape)


@rule("scalar_tensor")
def _scalar_tensor(b: Any, value: Any, **_: Any) -> Any:
    return b.identity(number(b, value, _made_dtype(b)))


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
