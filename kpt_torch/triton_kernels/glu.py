"""glu: `act(x w_gate + b_gate) (x w_up + b_up)` by the products of torch and one Triton kernel a pass for what lies between them.

The two products are kept for the backward pass, in x's dtype, and the activation is not: it is made again with its slope. Their gradients
are written over them where autograd is about to free them.

`glu_linear` is the product with the weight that follows, too, as in every gated MLP: what glu makes is read by that product and by its
gradient, and the gradient's is made again in the launch that makes the factors' gradients. An array of the MLP's width less is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton

from kpt.ops.base import Spec
from kpt.ops.glu import LINEAR
from kpt_torch import library
from kpt_torch.library import Tensors, torch_dtype
from kpt_torch.triton_kernels import launch
from kpt_torch.triton_kernels.jitted import glu as jitted
from kpt_torch.triton_kernels.jitted.glu import refusal as refusal


def _project(arrays: Tensors, x: torch.Tensor, name: str) -> torch.Tensor:
    w, b = arrays[f"w_{name}"], arrays.get(f"b_{name}")
    return x @ w if b is None else torch.addmm(b.to(x.dtype), x, w)


def _products(arrays: Tensors) -> list[torch.Tensor]:
    x = launch.rows(arrays["x"])
    return [_project(arrays, x, name) for name in ("gate", "up")]


def put_product(gate: torch.Tensor, up: torch.Tensor, y: torch.Tensor, activation: str) -> None:
    """Writes `act(gate) up`; all arrays are contiguous."""
    if y.numel():
        with launch.on(y):
            launch.run(jitted.forward_blocks, (triton.cdiv(y.numel(), jitted.BLOCK),),
                gate, up, y, y.numel(), ACTIVATION=activation, BLOCK=jitted.BLOCK, num_warps=jitted.WARPS
            )  # fmt: skip


def put_gradients(
    gate: torch.Tensor, up: torch.Tensor, dy: torch.Tensor, dgate: torch.Tensor, dup: torch.Tensor, activation: str,
    y: torch.Tensor | None = None,
) -> None:
    """Writes the gradients of both factors, which may be where the factors are; all arrays are contiguous.

    Args:
      y: takes `act(gate) up` besides; may be where `dy` is.
    """
    if dy.numel():
        kernel, more = (jitted.backward_blocks, ()) if y is None else (jitted.backward_and_product_blocks, (y,))
        with launch.on(dy):
            launch.run(kernel, (triton.cdiv(dy.numel(), jitted.BLOCK),),
                gate, up, dy, dgate, dup, *more, dy.numel(), ACTIVATION=activation, BLOCK=jitted.BLOCK, num_warps=jitted.WARPS
            )  # fmt: skip


def _forward(arrays: Tensors, params: dict[str, Any]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    x, (gate, up) = arrays["x"], _products(arrays)
    out = x.dtype if params["out_dtype"] is None else torch_dtype(params["out_dtype"])
    y = torch.empty((*x.shape[:-1], gate.shape[-1]), dtype=out, device=x.device)
    put_product(gate, up, y, params["activation"])
    return [y], [gate, up] if params.get("early") else []


def _backward(arrays: Tensors, params: Any, results: Any, kept: Any, cotangents: Any, wanted: Sequence[str]) -> Tensors:
    x, dy = launch.rows(arrays["x"]), cotangents[0].contiguous()
    over = not kept or params.get("last", False)
    gate, up = kept or _products(arrays)
    dgate, dup = (gate, up) if over else (torch.empty_like(gate), torch.empty_like(up))
    put_gradients(gate, up, dy, dgate, dup, params["activation"])
    return _of_products(arrays, x, dgate, dup, wanted)


def _of_products(arrays: Tensors, x: torch.Tensor, dgate: torch.Tensor, dup: torch.Tensor, wanted: Sequence[str]) -> Tensors:
    """Gradients of what the two products are of."""
    found: Tensors = {}
    if "x" in wanted:
        found["x"] = torch.addmm(dgate @ arrays["w_gate"].t(), dup, arrays["w_up"].t()).reshape(arrays["x"].shape)
    for name, d in (("gate", dgate), ("up", dup)):
        if f"w_{name}" in wanted:
            found[f"w_{name}"] = _of_weight(arrays[f"w_{name}"], x, d)
        if f"b_{name}" in wanted:
            found[f"b_{name}"] = d.sum(0, dtype=torch.float32)
    return found


def _of_weight(w: torch.Tensor, x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """In the layout of the weight, which torch's linear layers turn."""
    return (d.t() @ x).t() if w.stride(0) == 1 else x.t() @ d


def _kept(specs: dict[str, Spec], params: Mapping[str, Any]) -> Sequence[Spec]:
    shape = (math.prod(specs["x"].shape[:-1]), specs["w_gate"].shape[1])
    return (Spec(shape, specs["x"].dtype),) * 2 if params.get("early") else ()


def _early(arrays: Tensors, names: Sequence[str]) -> str:
    return "factors"


glu = library.kernel("glu", "triton", _forward, _backward, kept=_kept, early=_early, fresh=True)


def _linear_forward(arrays: Tensors, params: dict[str, Any]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    x, w, (gate, up) = arrays["x"], arrays["w_down"], _products(arrays)
    h = torch.empty_like(gate) if params.get("early") else gate
    put_product(gate, up, h, params["activation"])
    return [(h @ w).reshape(*x.shape[:-1], w.shape[1])], [gate, up] if params.get("early") else []


def _linear_backward(arrays: Tensors, params: Any, results: Any, kept: Any, cotangents: Any, wanted: Sequence[str]) -> Tensors:
    x, w, dy = launch.rows(arrays["x"]), arrays["w_down"], launch.rows(cotangents[0])
    over = not kept or params.get("last", False)
    gate, up = kept or _products(arrays)
    h = dy @ w.t()  # its gradient so far
    dgate, dup = (gate, up) if over else (torch.empty_like(gate), torch.empty_like(up))
    put_gradients(gate, up, h, dgate, dup, params["activation"], y=h if "w_down" in wanted else None)
    found = {"w_down": _of_weight(w, h, dy)} if "w_down" in wanted else {}
    del h  # before there are more arrays
    return found | _of_products(arrays, x, dgate, dup, wanted)


glu_linear = library.kernel(LINEAR, "triton", _linear_forward, _linear_backward, kept=_kept, early=_early, fresh=True)


def _then_linear(*, w_down: torch.Tensor, **rest: Any) -> Any:
    """`glu_linear`, but where nothing before the last product has a gradient: then its array alone is kept."""
    if w_down.requires_grad and not any(isinstance(t, torch.Tensor) and t.requires_grad for t in rest.values()):
        return glu(**rest) @ w_down
    return glu_linear(w_down=w_down, **rest)


glu.then_linear = _then_linear  # type: ignore[attr-defined]  # see kpt_torch/pairs.py
