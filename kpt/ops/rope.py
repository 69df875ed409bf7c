"""rope: x cos + rotate(x) sin on the first R of the head dim (arXiv:2104.09864)."""

from __future__ import annotations

from typing import Any

import numpy as np

from kpt.errors import OpError
from kpt.ops import shapes as sh
from kpt.ops.base import Cost, Op, Spec, Specs

NAME = "rope"
ARRAYS = ("x", "cos", "sin")


def infer(specs: Specs, interleaved: bool = False, out_dtype: str | None = None) -> tuple[Spec, ...]:
    """As x.

    Raises:
      OpError: shapes or dtypes do not fit.
    """
    sh.named(NAME, specs, ARRAYS)
    sh.out_dtype(NAME, out_dtype)
    sh.rank(NAME, specs, "x", 4, "[B, T, N, H]")
    sh.rank(NAME, specs, "cos", 3, "[B or 1, T, R]")
    sh.floats(NAME, specs, *specs)
    b, t, _, h = specs["x"].shape
    cb, ct, r = specs["cos"].shape
    if cb not in (1, b) or ct != t or r % 2 or r > h:
        raise OpError(f"{NAME} was given cos{list(specs['cos'].shape)} for x{list(specs['x'].shape)}",
                      "cos is [B or 1, T, R] with R even and at most the head dim", "Check positions and rotary dim")  # fmt: skip
    sh.shaped(NAME, specs, "sin", specs["cos"].shape)
    return (Spec(specs["x"].shape, out_dtype or specs["x"].dtype),)


def rotate(x: np.ndarray, interleaved: bool) -> np.ndarray:
    """The quarter turn of every pair: (a, b) -> (-b, a)."""
    if interleaved:
        return np.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    a, b = np.split(x, 2, -1)
    return np.concatenate([-b, a], -1)


def reference(*, x: Any, cos: Any, sin: Any, interleaved: bool = False, out_dtype: str | None = None) -> tuple[np.ndarray, ...]:
    x, c, s = sh.wide(x), sh.wide(cos)[:, :, None], sh.wide(sin)[:, :, None]
    head = x[..., : c.shape[-1]]
    with np.errstate(all="ignore"):
        return (np.concatenate([head * c + rotate(head, interleaved) * s, x[..., c.shape[-1] :]], -1),)


def reference_vjp(cotangents: tuple, *, x: Any, cos: Any, sin: Any, interleaved: bool = False,
                  out_dtype: str | None = None) -> dict[str, np.ndarray]:  # fmt: skip
    x, c, s, g = sh.wide(x), sh.wide(cos)[:, :, None], sh.wide(sin)[:, :, None], sh.wide(cotangents[0])
    r = c.shape[-1]
    head, gh = x[..., :r], g[..., :r]
    with np.errstate(all="ignore"):
        dx = np.concatenate([gh * c - rotate(gh * s, interleaved), g[..., r:]], -1)
        dc, ds = (gh * head).sum(2), (gh * rotate(head, interleaved)).sum(2)
    return {"x": dx, "cos": sh.unbroadcast(dc, np.shape(cos)), "sin": sh.unbroadcast(ds, np.shape(sin))}


def sample(rng: np.random.Generator, specs: Specs, **params: Any) -> dict[str, np.ndarray]:
    return {n: sh.normal(rng, s) for n, s in specs.items()}


def cost(specs: Specs, **params: Any) -> Cost:
    """3 operations an element that turns."""
    b, t, n, _ = specs["x"].shape
    return Cost(3.0 * b * t * n * specs["cos"].shape[-1], sh.nbytes(*specs.values(), *infer(specs, **params)))


OP = Op(NAME, ARRAYS, (), {"interleaved": False, "out_dtype": None}, ("x", "cos", "sin"),
        infer, reference, reference_vjp, sample, cost, constant=("cos", "sin"))  # fmt: skip
