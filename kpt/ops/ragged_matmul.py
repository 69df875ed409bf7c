"""ragged_matmul: rows of group g times w[g]; rows past the last group are 0."""

from __future__ import annotations

from typing import Any

import numpy as np

from kpt.ops import shapes as sh
from kpt.ops.base import Cost, Op, Spec, Specs

NAME = "ragged_matmul"
ARRAYS = ("x", "w", "group_sizes")


def infer(specs: Specs, out_dtype: str | None = None) -> tuple[Spec, ...]:
    """`[M, N]`.

    Raises:
      OpError: shapes or dtypes do not fit.
    """
    sh.named(NAME, specs, ARRAYS)
    sh.out_dtype(NAME, out_dtype)
    sh.rank(NAME, specs, "x", 2, "[M, K]")
    sh.rank(NAME, specs, "w", 3, "[G, K, N]")
    sh.floats(NAME, specs, "x", "w")
    sh.integers(NAME, specs, "group_sizes")
    g, _, n = specs["w"].shape
    sh.shaped(NAME, specs, "w", (g, specs["x"].shape[1], n))
    sh.shaped(NAME, specs, "group_sizes", (g,))
    return (Spec((specs["x"].shape[0], n), out_dtype or specs["x"].dtype),)


def _groups(rows: int, group_sizes: Any) -> list[slice]:
    ends = np.minimum(np.cumsum(np.asarray(group_sizes, np.int64)), rows)
    return [slice(int(a), int(b)) for a, b in zip([0, *ends[:-1]], ends, strict=True)] if len(ends) else []


def reference(*, x: Any, w: Any, group_sizes: Any, out_dtype: str | None = None) -> tuple[np.ndarray, ...]:
    xs, ws = sh.wide(x), sh.wide(w)
    out = np.zeros((xs.shape[0], ws.shape[2]))
    with np.errstate(all="ignore"):
        for g, rows in enumerate(_groups(xs.shape[0], group_sizes)):
            out[rows] = xs[rows] @ ws[g]
    return (out,)


def reference_vjp(cotangents: tuple, *, x: Any, w: Any, group_sizes: Any, out_dtype: str | None = None) -> dict[str, np.ndarray]:
    xs, ws, g_out = sh.wide(x), sh.wide(w), sh.wide(cotangents[0])
    dx, dw = np.zeros_like(xs), np.zeros_like(ws)
    with np.errstate(all="ignore"):
        for g, rows in enumerate(_groups(xs.shape[0], group_sizes)):
            dx[rows] = g_out[rows] @ ws[g].T
            dw[g] = xs[rows].T @ g_out[rows]
    return {"x": dx, "w": dw}


def sample(rng: np.random.Generator, specs: Specs, **params: Any) -> dict[str, np.ndarray]:
    groups, rows = specs["w"].shape[0], specs["x"].shape[0]
    cuts = np.sort(rng.integers(0, rows + 1, groups))
    sizes = np.diff(cuts, prepend=0).astype(specs["group_sizes"].dtype)
    return {"x": sh.normal(rng, specs["x"]), "w": sh.normal(rng, specs["w"]), "group_sizes": sizes}


def cost(specs: Specs, **params: Any) -> Cost:
    """`2 M K N`: every row meets one matrix."""
    flops = 2.0 * sh.size(specs["x"]) * specs["w"].shape[2]
    return Cost(flops, sh.nbytes(*specs.values(), *infer(specs, **params)))


OP = Op(NAME, ARRAYS, (), {"out_dtype": None}, ("x", "w"), infer, reference, reference_vjp, sample, cost)
