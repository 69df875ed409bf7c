"""What rms_norm and layer_norm share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kpt.ops import shapes as sh
from kpt.ops.base import Cost, Spec, Specs


def infer(name: str, specs: Specs, optional: tuple[str, ...], eps: float, out_dtype: str | None) -> tuple[Spec, ...]:
    sh.named(name, specs, ("x",), optional)
    sh.out_dtype(name, out_dtype)
    sh.within(name, "eps", eps, eps >= 0, "a number of at least 0")
    sh.at_least(name, specs, "x", 1, "[..., D]")
    sh.floats(name, specs, *specs)
    x = specs["x"]
    for n in ("weight", "bias"):
        sh.shaped(name, specs, n, x.shape[-1:])
    sh.shaped(name, specs, "residual", x.shape)
    y = Spec(x.shape, out_dtype or x.dtype)
    return (y, Spec(x.shape, x.dtype)) if "residual" in specs else (y,)


def sample(rng: np.random.Generator, specs: Specs, **params: Any) -> dict[str, np.ndarray]:
    return {n: sh.normal(rng, s, 0.1, 1.0) if n == "weight" else sh.normal(rng, s) for n, s in specs.items()}


def cost(specs: Specs, flops_per_element: int, out: Callable[..., tuple[Spec, ...]], **params: Any) -> Cost:
    return Cost(float(flops_per_element * sh.size(specs["x"])), sh.nbytes(*specs.values(), *out(specs, **params)))


def over_rows(g: np.ndarray) -> np.ndarray:
    return g.sum(tuple(range(g.ndim - 1)))
