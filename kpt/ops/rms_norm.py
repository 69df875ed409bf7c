"""rms_norm: h rsqrt(mean(h^2) + eps) (weight_offset + weight), h = x + residual (arXiv:1910.07467)."""

from __future__ import annotations

from typing import Any

import numpy as np

from kpt.ops import norms
from kpt.ops import shapes as sh
from kpt.ops.base import Cost, Op, Spec, Specs

NAME = "rms_norm"
OPTIONAL = ("weight", "residual")


def infer(specs: Specs, eps: float = 1e-6, weight_offset: float = 0.0, out_dtype: str | None = None) -> tuple[Spec, ...]:
    """y as x; with a residual also h.

    Raises:
      OpError: shapes or dtypes do not fit.
    """
    return norms.infer(NAME, specs, OPTIONAL, eps, out_dtype)


def _forward(x: Any, weight: Any, residual: Any, eps: float, offset: float) -> tuple[np.ndarray, ...]:
    h = sh.wide(x) + (0.0 if residual is None else sh.wide(residual))
    with np.errstate(all="ignore"):
        r = 1 / np.sqrt((h * h).mean(-1, keepdims=True) + eps) if h.shape[-1] else np.ones((*h.shape[:-1], 1))
    w = np.ones(h.shape[-1]) if weight is None else offset + sh.wide(weight)
    return h, r, w


def reference(*, x: Any, weight: Any = None, residual: Any = None, eps: float = 1e-6, weight_offset: float = 0.0,
              out_dtype: str | None = None) -> tuple[np.ndarray, ...]:  # fmt: skip
    h, r, w = _forward(x, weight, residual, eps, weight_offset)
    with np.errstate(all="ignore"):
        y = h * r * w
    return (y,) if residual is None else (y, h)


def reference_vjp(cotangents: tuple, *, x: Any, weight: Any = None, residual: Any = None, eps: float = 1e-6,
                  weight_offset: float = 0.0, out_dtype: str | None = None) -> dict[str, np.ndarray]:  # fmt: skip
    h, r, w = _forward(x, weight, residual, eps, weight_offset)
    g = sh.wide(cotangents[0])
    with np.errstate(all="ignore"):
        n = h * r
        gw = g * w
        dh = r * (gw - n * (gw * n).mean(-1, keepdims=True)) if h.shape[-1] else np.zeros_like(h)
        out = {"weight": norms.over_rows(g * n)} if weight is not None else {}
    if residual is not None:
        dh = dh + sh.wide(cotangents[1])
        out["residual"] = dh
    return out | {"x": dh}


def cost(specs: Specs, **params: Any) -> Cost:
    """4 operations an element: square, sum, scale, weight."""
    return norms.cost(specs, 4, infer, **params)


OP = Op(NAME, ("x",), OPTIONAL, {"eps": 1e-6, "weight_offset": 0.0, "out_dtype": None},
        ("x", *OPTIONAL), infer, reference, reference_vjp, norms.sample, cost)  # fmt: skip
