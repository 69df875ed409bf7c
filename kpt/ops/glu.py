"""glu: act(x w_gate + b_gate) * (x w_up + b_up) (arXiv:2002.05202)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from kpt.ops import shapes as sh
from kpt.ops.activations import ACTIVATIONS
from kpt.ops.base import Cost, Op, Spec, Specs
from kpt.ops.linear_act import project, project_infer, project_vjp
from kpt.ops.linear_act import sample as sample

NAME = "glu"
ARRAYS, OPTIONAL = ("x", "w_gate", "w_up"), ("b_gate", "b_up")


def infer(specs: Specs, activation: str = "silu", out_dtype: str | None = None) -> tuple[Spec, ...]:
    """`[..., N]`.

    Raises:
      OpError: shapes, dtypes or the activation do not fit.
    """
    sh.named(NAME, specs, ARRAYS, OPTIONAL)
    sh.one_of(NAME, "activation", activation, tuple(ACTIVATIONS))
    return project_infer(NAME, specs, (("w_gate", "b_gate"), ("w_up", "b_up")), out_dtype)


def reference(*, x: Any, w_gate: Any, w_up: Any, b_gate: Any = None, b_up: Any = None, activation: str = "silu",
              out_dtype: str | None = None) -> tuple[np.ndarray, ...]:  # fmt: skip
    with np.errstate(all="ignore"):
        return (ACTIVATIONS[activation][0](project(x, w_gate, b_gate)) * project(x, w_up, b_up),)


def reference_vjp(cotangents: tuple, *, x: Any, w_gate: Any, w_up: Any, b_gate: Any = None, b_up: Any = None,
                  activation: str = "silu", out_dtype: str | None = None) -> dict[str, np.ndarray]:  # fmt: skip
    gate, up = project(x, w_gate, b_gate), project(x, w_up, b_up)
    act, slope = ACTIVATIONS[activation]
    g = sh.wide(cotangents[0])
    with np.errstate(all="ignore"):
        dx1, dwg, dbg = project_vjp(g * up * slope(gate), x, w_gate)
        dx2, dwu, dbu = project_vjp(g * act(gate), x, w_up)
        out = {"x": dx1 + dx2, "w_gate": dwg, "w_up": dwu}
    return out | ({} if b_gate is None else {"b_gate": dbg}) | ({} if b_up is None else {"b_up": dbu})


def cost(specs: Specs, **params: Any) -> Cost:
    """Two products: `4 M K N`."""
    flops = 4.0 * sh.size(specs["x"]) * specs["w_gate"].shape[1]
    return Cost(flops, sh.nbytes(*specs.values(), *infer(specs, **params)))


OP = Op(NAME, ARRAYS, OPTIONAL, {"activation": "silu", "out_dtype": None},
        ("x", "w_gate", "w_up", "b_gate", "b_up"), infer, reference, reference_vjp, sample, cost)  # fmt: skip


def _without(specs: Specs) -> dict[str, Spec]:
    return {n: s for n, s in specs.items() if n != "w_down"}


def _linear_infer(specs: Specs, **params: Any) -> tuple[Spec, ...]:
    (h,) = infer(_without(specs), **params)
    return (Spec((*h.shape[:-1], specs["w_down"].shape[1]), h.dtype),)


def _linear_reference(*, w_down: Any, **rest: Any) -> tuple[np.ndarray, ...]:
    return (project(reference(**rest)[0], w_down, None),)


def _linear_reference_vjp(cotangents: tuple, *, w_down: Any, **rest: Any) -> dict[str, np.ndarray]:
    dh, dw, _ = project_vjp(sh.wide(cotangents[0]), reference(**rest)[0], w_down)
    return reference_vjp((dh,), **rest) | {"w_down": dw}


def _linear_cost(specs: Specs, **params: Any) -> Cost:
    one, (out,) = cost(_without(specs), **params), _linear_infer(specs, **params)
    h, down = infer(_without(specs), **params)[0], specs["w_down"]
    return Cost(one.flops + 2.0 * sh.size(h) * down.shape[1], one.bytes + sh.nbytes(h, down, out))


LINEAR = dataclasses.replace(
    OP, name="glu_linear", arrays=(*ARRAYS, "w_down"), differentiable=(*OP.differentiable, "w_down"), infer=_linear_infer,
    reference=_linear_reference, reference_vjp=_linear_reference_vjp, cost=_linear_cost,
)  # fmt: skip
"""`glu(x) w_down`, w_down `[N, M]`: no op that programs are searched for, but how a site and the linear layer that reads it are run."""
