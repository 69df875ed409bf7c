"""Neutral ops as torch calls: the views, casts and small formulas that stand between a program and a kernel.

Every function takes `call(target, *args, **kwargs)`: one that runs the target gives tensors, one that writes an FX node gives nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from kpt.ops.base import Spec
from kpt_torch.library import torch_dtype

aten = torch.ops.aten
Call = Callable[..., Any]

_OPS: dict[str, Any] = {
    "neg": aten.neg.default, "exp": aten.exp.default, "exp2": aten.exp2.default, "log": aten.log.default, "log1p": aten.log1p.default,
    "expm1": aten.expm1.default, "tanh": aten.tanh.default, "erf": aten.erf.default, "erfc": aten.erfc.default,
    "logistic": aten.sigmoid.default, "sqrt": aten.sqrt.default, "rsqrt": aten.rsqrt.default, "sin": aten.sin.default,
    "cos": aten.cos.default, "abs": aten.abs.default, "sign": aten.sign.default, "floor": aten.floor.default, "ceil": aten.ceil.default,
    "round": aten.round.default, "not": aten.logical_not.default, "is_finite": aten.isfinite.default, "square": aten.square.default,
    "stop_gradient": aten.detach.default, "add": aten.add.Tensor, "sub": aten.sub.Tensor, "mul": aten.mul.Tensor, "div": aten.div.Tensor,
    "max": aten.maximum.default, "min": aten.minimum.default, "power": aten.pow.Tensor_Tensor, "and": aten.bitwise_and.Tensor,
    "or": aten.bitwise_or.Tensor, "xor": aten.bitwise_xor.Tensor, "eq": aten.eq.Tensor, "ne": aten.ne.Tensor, "ge": aten.ge.Tensor,
    "gt": aten.gt.Tensor, "le": aten.le.Tensor, "lt": aten.lt.Tensor, "rem": aten.fmod.Tensor, "select": aten.where.self,
    "identity": aten.alias.default, "complex": aten.complex.default, "real": aten.real.default, "imag": aten.imag.default,
}  # fmt: skip
_REDUCTIONS: dict[str, Any] = {"reduce_sum": aten.sum.dim_IntList, "reduce_max": aten.amax.default}


def compute(op: str, attrs: Mapping[str, Any], spec: Spec, args: list[Any], call: Call, device: Any, size: Callable[[int], Any]) -> Any:
    """One neutral op.

    Args:
      spec: of the result.
      args: the operands, as `call` makes them.
      device: for what is made of nothing.
      size: a number of the neutral graph as a size, symbolic where it stands for one.
    """
    dtype, shape = torch_dtype(spec.dtype), [size(n) for n in spec.shape]
    if op == "full":
        return call(aten.full.default, shape, attrs["value"], dtype=dtype, device=device)
    if op == "iota":
        d = attrs["dimension"]
        counted = call(aten.arange.default, shape[d], dtype=dtype, device=device)
        counted = call(aten.reshape.default, counted, [shape[d] if i == d else 1 for i in range(len(shape))])
        return call(aten.expand.default, counted, shape) if math.prod(spec.shape) != spec.shape[d] else counted
    if op == "reshape":
        return call(aten.reshape.default, args[0], shape)
    if op == "transpose":
        return call(aten.permute.default, args[0], list(attrs["perm"]))
    if op == "broadcast":
        dims = attrs["dims"]
        order = sorted(range(len(dims)), key=lambda i: dims[i])
        a = args[0] if order == list(range(len(dims))) else call(aten.permute.default, args[0], order)
        for d in range(len(shape)):
            if d not in dims:
                a = call(aten.unsqueeze.default, a, d)
        return call(aten.expand.default, a, shape)
    if op == "slice":
        a = args[0]
        for d, (start, limit, stride) in enumerate(zip(attrs["start"], attrs["limit"], attrs["stride"], strict=True)):
            a = call(aten.slice.Tensor, a, d, size(start), size(limit), stride)
        return a
    if op == "convert":
        return call(aten.to.dtype, args[0], dtype)
    if op == "concatenate":
        return call(aten.cat.default, args, attrs["axis"])
    if op == "pow":
        return call(aten.pow.Tensor_Scalar, args[0], attrs["y"])
    if op in _REDUCTIONS:
        axes = list(attrs["axes"])
        return call(_REDUCTIONS[op], args[0], axes)
    if op in ("reduce_or", "reduce_and"):
        a = args[0]
        for d in sorted(attrs["axes"], reverse=True):
            a = call(aten.any.dim if op == "reduce_or" else aten.all.dim, a, d)
        return a
    if op == "dot_general":
        return _dot(attrs, args, call)
    if op == "gather":
        return _gather(attrs, args, call)
    return call(_OPS[op], *args)


def _dot(attrs: Mapping[str, Any], args: list[Any], call: Call) -> Any:
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    (lc, rc), (lb, rb) = (attrs["lhs_contract"], attrs["rhs_contract"]), (attrs["lhs_batch"], attrs["rhs_batch"])
    left_rank, right_rank = attrs["ranks"]
    if right_rank == 2 and not lb and tuple(lc) == (left_rank - 1,):  # a layer; einsum would go by a product of a batch of one
        return call(aten.linear.default if tuple(rc) == (1,) else aten.matmul.default, *args)
    left, right = [next(letters) for _ in range(left_rank)], [""] * right_rank
    for i, j in (*zip(lc, rc, strict=True), *zip(lb, rb, strict=True)):
        right[j] = left[i]
    right = [c or next(letters) for c in right]
    out = [left[i] for i in lb]
    out += [c for i, c in enumerate(left) if i not in lb and i not in lc] + [c for i, c in enumerate(right) if i not in rb and i not in rc]
    return call(aten.einsum.default, f"{''.join(left)},{''.join(right)}->{''.join(out)}", args)


def _gather(attrs: Mapping[str, Any], args: list[Any], call: Call) -> Any:
    """What `kpt_torch.vocabulary.take_along` writes: one element a row, the other dims walking together."""
    (d,) = attrs["collapsed"]
    index = call(aten.squeeze.dim, args[1], -1)
    return call(aten.gather.default, args[0], d, call(aten.to.dtype, index, torch.int64))
