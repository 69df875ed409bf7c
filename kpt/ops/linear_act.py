"""linear_act: act(x w + b)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kpt.ops import shapes as sh
from kpt.ops.activations import ACTIVATIONS
from kpt.ops.base import Cost, Op, Spec, Specs

NAME = "linear_act"
ARRAYS, OPTIONAL = ("x", "w"), ("b",)


def infer(specs: Specs, activation: str = "gelu_tanh", out_dtype: str | None = None) -> tuple[Spec, ...]:
    """`[..., N]`.

    Raises:
      OpError: shapes, dtypes or the activation do not fit.
    """
    sh.named(NAME, specs, ARRAYS, OPTIONAL)
    sh.one_of(NAME, "activation", activation, tuple(ACTIVATIONS))
    return project_infer(NAME, specs, (("w", "b"),), out_dtype)


def project_infer(name: str, specs: Specs, pairs: tuple, out_dtype: str | None) -> tuple[Spec, ...]:
    """The shape rule of `x w + b` for each (weight, bias) pair; all weights have one shape."""
    sh.out_dtype(name, out_dtype)
    sh.at_least(name, specs, "x", 1, "[..., K]")
    sh.floats(name, specs, *specs)
    k = specs["x"].shape[-1]
    first = pairs[0][0]
    sh.rank(name, specs, first, 2, "[K, N]")
    n = specs[first].shape[1]
    for w, b in pairs:
        sh.shaped(name, specs, w, (k, n))
        sh.shaped(name, specs, b, (n,))
    return (Spec((*specs["x"].shape[:-1], n), out_dtype or specs["x"].dtype),)


def project(x: Any, w: Any, b: Any) -> np.ndarray:
    with np.errstate(all="ignore"):
        return sh.wide(x) @ sh.wide(w) + (0.0 if b is None else sh.wide(b))


def project_vjp(dz: np.ndarray, x: Any, w: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of `x w + b`: x, w, b."""
    count = math.prod(dz.shape[:-1])  # -1 cannot stand for it where a dim is 0
    rows, xs = dz.reshape(count, dz.shape[-1]), sh.wide(x).reshape(count, np.shape(x)[-1])
    with np.errstate(all="ignore"):
        return dz @ sh.wide(w).T, xs.T @ rows, rows.sum(0)


def reference(*, x: Any, w: Any, b: Any = None, activation: str = "gelu_tanh", out_dtype: str | None = None) -> tuple[np.ndarray, ...]:
    with np.errstate(all="ignore"):
        return (ACTIVATIONS[activation][0](project(x, w, b)),)


def reference_vjp(cotangents: tuple, *, x: Any, w: Any, b: Any = None, activation: str = "gelu_tanh",
                  out_dtype: str | None = None) -> dict[str, np.ndarray]:  # fmt: skip
    with np.errstate(all="ignore"):
        dz = sh.wide(cotangents[0]) * ACTIVATIONS[activation][1](project(x, w, b))
    dx, dw, db = project_vjp(dz, x, w)
    return {"x": dx, "w": dw} | ({} if b is None else {"b": db})


def sample(rng: np.random.Generator, specs: Specs, **params: Any) -> dict[str, np.ndarray]:
    """Normal; for relu whole multiples of a unit, so that sums in float32 are exact: its slope jumps where rounding moves a sum past 0."""
    k = 1 / math.sqrt(max(specs["x"].shape[-1], 1))
    made = {}
    for n, s in specs.items():
        scale = k if n.startswith("w") else 1.0
        made[n] = sh.normal(rng, s, scale)
        if params.get("activation") == "relu":
            unit = 2.0 ** math.floor(math.log2(scale)) / 8
            made[n] = (np.rint(made[n].astype(np.float64) / unit) * unit).astype(made[n].dtype)
    return made


def cost(specs: Specs, **params: Any) -> Cost:
    """`2 M K N`; the activation is not counted."""
    flops = 2.0 * sh.size(specs["x"]) * specs["w"].shape[1]
    return Cost(flops, sh.nbytes(*specs.values(), *infer(specs, **params)))


OP = Op(NAME, ARRAYS, OPTIONAL, {"activation": "gelu_tanh", "out_dtype": None}, ("x", "w", "b"),
        infer, reference, reference_vjp, sample, cost)  # fmt: skip
