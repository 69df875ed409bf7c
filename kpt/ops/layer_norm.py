"""layer_norm: (h - mean) rsqrt(var + eps) weight + bias, h = x + residual (arXiv:1607.06450)."""

from __future__ import annotations

from typing import Any

import numpy as np

from kpt.ops import norms
from kpt.ops import shapes as sh
from kpt.ops.base import Cost, Op, Spec, Specs

NAME = "layer_norm"
OPTIONAL = ("weight", "bias", "residual")


def infer(specs: Specs, eps: float = 1e-6, out_dtype: str | None = None) -> tuple[Spec, ...]:
    """y as x; with a residual also h.

    Raises:
      OpError: shapes or dtypes do not fit.
    """
    return norms.infer(NAME, specs, OPTIONAL, eps, out_dtype)


def _forward(x: Any, weight: Any, residual: Any, eps: float) -> tuple[np.ndarray, ...]:
    h = sh.wide(x) + (0.0 if residual is None else sh.wide(residual))
    w = np.ones(h.shape[-1]) if weight is None else sh.wide(weight)
    if not h.shape[-1]:
        return h, h, np.ones((*h.shape[:-1], 1)), w
    with np.errstate(all="ignore"):
        c = h - h.mean(-1, keepdims=True)
        r = 1 / np.sqrt((c * c).mean(-1, keepdims=True) + eps)
        return h, c * r, r, w


def reference(*, x: Any, weight: Any = None, bias: Any = None, residual: Any = None, eps: float = 1e-6,
              out_dtype: str | None = None) -> tuple[np.ndarray, ...]:  # fmt: skip
    h, n, _, w = _forward(x, weight, residual, eps)
    with np.errstate(all="ignore"):
        y = n * w + (0.0 if bias is None else sh.wide(bias))
    return (y,) if residual is None else (y, h)


def reference_vjp(cotangents: tuple, *, x: Any, weight: Any = None, bias: Any = None, residual: Any = None,
                  eps: float = 1e-6, out_dtype: str | None = None) -> dict[str, np.ndarray]:  # fmt: skip
    h, n, r, w = _forward(x, weight, residual, eps)
    g = sh.wide(cotangents[0])
    out = {}
    with np.errstate(all="ignore"):
        gw = g * w
        dh = np.zeros_like(h)
        if h.shape[-1]:
            dh = r * (gw - gw.mean(-1, keepdims=True) - n * (gw * n).mean(-1, keepdims=True))
        if weight is not None:
            out["weight"] = norms.over_rows(g * n)
        if bias is not None:
            out["bias"] = norms.over_rows(g)
    if residual is not None:
        dh = dh + sh.wide(cotangents[1])
        out["residual"] = dh
    return out | {"x": dh}


def cost(specs: Specs, **params: Any) -> Cost:
    """7 operations an element: mean, centre, square, sum, scale, weight, bias."""
    return norms.cost(specs, 7, infer, **params)


OP = Op(NAME, ("x",), OPTIONAL, {"eps": 1e-6, "out_dtype": None},
        ("x", *OPTIONAL), infer, reference, reference_vjp, norms.sample, cost)  # fmt: skip
