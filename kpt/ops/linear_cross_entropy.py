"""linear_cross_entropy: cross entropy of the logits x w + b, which no kernel need ever write down, times a weight of each token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kpt.ops import shapes as sh
from kpt.ops.base import Cost, Op, Spec, Specs
from kpt.ops.cross_entropy import loss_and_gradient, loss_params, loss_spec
from kpt.ops.linear_act import project, project_vjp

NAME = "linear_cross_entropy"
ARRAYS, OPTIONAL = ("x", "w", "labels"), ("b", "weights")


def infer(specs: Specs, label_smoothing: float = 0.0, logits_soft_cap: float | None = None, invalid: str = "nan") -> tuple[Spec, ...]:
    """`[...]`, float32 (float64 for float64).

    Raises:
      OpError: shapes, dtypes or parameters do not fit.
    """
    sh.named(NAME, specs, ARRAYS, OPTIONAL)
    loss_params(NAME, label_smoothing, logits_soft_cap, invalid)
    sh.at_least(NAME, specs, "x", 1, "[..., K]")
    sh.rank(NAME, specs, "w", 2, "[K, V]")
    sh.floats(NAME, specs, "x", "w", "b", "weights")
    sh.integers(NAME, specs, "labels")
    sh.shaped(NAME, specs, "w", (specs["x"].shape[-1], specs["w"].shape[1]))
    sh.shaped(NAME, specs, "b", specs["w"].shape[1:])
    sh.shaped(NAME, specs, "labels", specs["x"].shape[:-1])
    sh.shaped(NAME, specs, "weights", specs["x"].shape[:-1])
    return loss_spec(specs["x"].dtype, specs["labels"].shape)


def reference(*, x: Any, w: Any, labels: Any, b: Any = None, weights: Any = None, label_smoothing: float = 0.0,
              logits_soft_cap: float | None = None, invalid: str = "nan") -> tuple[np.ndarray, ...]:  # fmt: skip
    loss = loss_and_gradient(project(x, w, b), labels, label_smoothing, logits_soft_cap, invalid)[0]
    with np.errstate(all="ignore"):
        return (loss if weights is None else loss * sh.wide(weights),)


def reference_vjp(cotangents: tuple, *, x: Any, w: Any, labels: Any, b: Any = None, weights: Any = None,
                  label_smoothing: float = 0.0, logits_soft_cap: float | None = None,
                  invalid: str = "nan") -> dict[str, np.ndarray]:  # fmt: skip
    loss, grad = loss_and_gradient(project(x, w, b), labels, label_smoothing, logits_soft_cap, invalid)
    g = sh.wide(cotangents[0])
    with np.errstate(all="ignore"):
        dx, dw, db = project_vjp(grad * (g if weights is None else g * sh.wide(weights))[..., None], x, w)
        dweights = g * loss
    return {"x": dx, "w": dw} | ({} if b is None else {"b": db}) | ({} if weights is None else {"weights": dweights})


def sample(rng: np.random.Generator, specs: Specs, **params: Any) -> dict[str, np.ndarray]:
    k, vocab = 1 / math.sqrt(max(specs["x"].shape[-1], 1)), max(specs["w"].shape[1], 1)
    out = {n: sh.normal(rng, s, k if n == "w" else 1.0) for n, s in specs.items() if n != "labels"}
    return out | {"labels": rng.integers(0, vocab, specs["labels"].shape).astype(specs["labels"].dtype)}


def cost(specs: Specs, **params: Any) -> Cost:
    """`2 M K V`; the logits do not cross memory."""
    flops = 2.0 * sh.size(specs["x"]) * specs["w"].shape[1]
    return Cost(flops, sh.nbytes(*specs.values(), *infer(specs, **params)))


OP = Op(NAME, ARRAYS, OPTIONAL, {"label_smoothing": 0.0, "logits_soft_cap": None, "invalid": "nan"},
        ("x", "w", "b", "weights"), infer, reference, reference_vjp, sample, cost)  # fmt: skip
