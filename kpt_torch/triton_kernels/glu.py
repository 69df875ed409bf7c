"""glu: `act(x w_gate + b_gate) (x w_up + b_up)` by the products of torch and one Triton kernel a pass for what lies between them.

The two products are kept for the backward pass, in x's dtype, and the activation is not: it is made again with its slope. Their gradients
are written over them where autograd is about to free them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton

from kpt.ops.base import Spec
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
            jitted.forward_blocks[(triton.cdiv(y.numel(), jitted.BLOCK),)](
                gate, up, y, y.numel(), ACTIVATION=activation, BLOCK=jitted.BLOCK, num_warps=jitted.WARPS
            )  # fmt: skip


def put_gradients(
    gate: torch.Tensor, up: torch.Tensor, dy: torch.Tensor, dgate: torch.Tensor, dup: torch.Tensor, activation: str
) -> None:
    """Writes the gradients of both factors, which may be where the factors are; all arrays are contiguous."""
    if dy.numel():
        with launch.on(dy):
            jitted.backward_blocks[(triton.cdiv(dy.numel(), jitted.BLOCK),)](
                gate, up, dy, dgate, dup, dy.numel(), ACTIVATION=activation, BLOCK=jitted.BLOCK, num_warps=jitted.WARPS
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
    found: Tensors = {}
    if "x" in wanted:
        found["x"] = torch.addmm(dgate @ arrays["w_gate"].t(), dup, arrays["w_up"].t()).reshape(arrays["x"].shape)
    for name, d in (("gate", dgate), ("up", dup)):
        if f"w_{name}" in wanted:  # in the layout of the weight, which torch's linear layers turn
            turned = arrays[f"w_{name}"].stride(0) == 1
            found[f"w_{name}"] = (d.t() @ x).t() if turned else x.t() @ d
        if f"b_{name}" in wanted:
            found[f"b_{name}"] = d.sum(0, dtype=torch.float32)
    return found


def _kept(specs: dict[str, Spec], params: Mapping[str, Any]) -> Sequence[Spec]:
    shape = (math.prod(specs["x"].shape[:-1]), specs["w_gate"].shape[1])
    return (Spec(shape, specs["x"].dtype),) * 2 if params.get("early") else ()


def _early(arrays: Tensors, names: Sequence[str]) -> str:
    return "factors"


glu = library.kernel("glu", "triton", _forward, _backward, kept=_kept, early=_early)
