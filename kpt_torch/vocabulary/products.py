"""Products of matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kpt_torch.vocabulary.table import Unknown, is_float, number, rule


def same_floats(*xs: Any) -> None:
    if len({x.dtype for x in xs}) != 1 or not is_float(xs[0].dtype):
        raise Unknown("a product of several dtypes")


@rule("linear")
def _linear(b: Any, x: Any, w: Any, bias: Any = None) -> Any:
    same_floats(x, w, *([] if bias is None else [bias]))
    if w.ndim != 2:
        raise Unknown("a linear layer of one column")
    y = b.dot(x, w, (x.ndim - 1, 1), 0)
    return y if bias is None else b.elementwise("add", y, bias)


@rule("mm")
def _mm(b: Any, x: Any, y: Any) -> Any:
    same_floats(x, y)
    return b.dot(x, y, (1, 0), 0)


@rule("addmm")
def _addmm(b: Any, c: Any, x: Any, y: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    same_floats(c, x, y)
    if beta != 1 or alpha != 1:
        raise Unknown("a scaled product")
    return b.elementwise("add", b.dot(x, y, (1, 0), 0), c)


@rule("bmm")
def _bmm(b: Any, x: Any, y: Any) -> Any:
    same_floats(x, y)
    return b.dot(x, y, (2, 1), 1)


@rule("baddbmm")
def _baddbmm(b: Any, c: Any, x: Any, y: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    same_floats(c, x, y)
    z = b.dot(x, y, (2, 1), 1)
    z = z if alpha == 1 else b.elementwise("mul", z, number(b, alpha, z.dtype))
    if beta == 0:
        return z
    c = c if beta == 1 else b.elementwise("mul", c, number(b, beta, c.dtype))
    return b.elementwise("add", z, c)


@rule("matmul")
def _matmul(b: Any, x: Any, y: Any) -> Any:
    same_floats(x, y)
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
    same_floats(x, y)
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
