"""matmul: a b, of floats, or of int8 with exact int32 sums."""

from __future__ import annotations

from typing import Any

import numpy as np

from kpt.errors import OpError
from kpt.ops import shapes as sh
from kpt.ops.base import Cost, Op, Spec, Specs

NAME = "matmul"
ARRAYS = ("a", "b")


def infer(specs: Specs, out_dtype: str | None = None) -> tuple[Spec, ...]:
    """`[M, N]`, int32 for int8 factors, which have no gradient.

    Raises:
      OpError: shapes or dtypes do not fit.
    """
    sh.named(NAME, specs, ARRAYS)
    exact = all(n in specs and specs[n].dtype == "int8" for n in ARRAYS)
    if not exact:
        sh.out_dtype(NAME, out_dtype)
    elif out_dtype not in (None, "int32"):
        raise OpError(f"{NAME} of int8 was asked for in {out_dtype}", "Its sums are int32", "Cast the result")
    sh.rank(NAME, specs, "a", 2, "[M, K]")
    sh.rank(NAME, specs, "b", 2, "[K, N]")
    if not exact:
        sh.floats(NAME, specs, "a", "b")
    sh.shaped(NAME, specs, "b", (specs["a"].shape[1], specs["b"].shape[1]))
    return (Spec((specs["a"].shape[0], specs["b"].shape[1]), out_dtype or ("int32" if exact else specs["a"].dtype)),)


def reference(*, a: Any, b: Any, out_dtype: str | None = None) -> tuple[np.ndarray, ...]:
    with np.errstate(all="ignore"):
        return (sh.wide(a) @ sh.wide(b),)


def reference_vjp(cotangents: tuple, *, a: Any, b: Any, out_dtype: str | None = None) -> dict[str, np.ndarray]:
    g = sh.wide(cotangents[0])
    with np.errstate(all="ignore"):
        return {"a": g @ sh.wide(b).T, "b": sh.wide(a).T @ g}


def sample(rng: np.random.Generator, specs: Specs, **params: Any) -> dict[str, np.ndarray]:
    return {n: rng.integers(-128, 128, s.shape, np.int8) if s.dtype == "int8" else sh.normal(rng, s) for n, s in specs.items()}


def cost(specs: Specs, **params: Any) -> Cost:
    """`2 M K N`."""
    flops = 2.0 * sh.size(specs["a"]) * specs["b"].shape[1]
    return Cost(flops, sh.nbytes(*specs.values(), *infer(specs, **params)))


OP = Op(NAME, ARRAYS, (), {"out_dtype": None}, ("a", "b"), infer, reference, reference_vjp, sample, cost)
