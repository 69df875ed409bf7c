"""linear_act: `act(x w + b)` by one Triton kernel; its backward pass, by one for the slope and the products of torch.

The sums are kept for the backward pass, in x's dtype, and the activation is not. Their gradients are written over them where autograd is
about to free them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kpt.ops.base import Spec, Specs
from kpt_torch import library
from kpt_torch.library import Tensors, torch_dtype
from kpt_torch.triton_kernels import launch, product
from kpt_torch.triton_kernels.jitted import product as jitted


def _empty(arrays: Tensors, dtype: torch.dtype) -> torch.Tensor:
    x = arrays["x"]
    return torch.empty((math.prod(x.shape[:-1]), arrays["w"].shape[1]), dtype=dtype, device=x.device)


def _forward(arrays: Tensors, params: dict[str, Any]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    x, w = arrays["x"], arrays["w"]
    y = _empty(arrays, x.dtype if params["out_dtype"] is None else torch_dtype(params["out_dtype"]))
    z = _empty(arrays, x.dtype) if params.get("early") else None
    product.put_product(launch.rows(x), w, arrays.get("b"), y, params["activation"], z)
    return [y.reshape(*x.shape[:-1], w.shape[1])], [] if z is None else [z]


def _backward(arrays: Tensors, params: Any, results: Any, kept: Any, cotangents: Any, wanted: Sequence[str]) -> Tensors:
    x, w, dy = launch.rows(arrays["x"]), arrays["w"], launch.rows(cotangents[0].contiguous())
    if params["activation"] == "identity":
        dz = dy.to(x.dtype)
    else:
        over = not kept or params.get("last", False)
        if kept:
            (z,) = kept
        else:
            z = _empty(arrays, x.dtype)
            product.put_product(x, w, arrays.get("b"), z)
        dz = z if over else torch.empty_like(z)
        product.put_gradients(z, dy, dz, params["activation"])
    found: Tensors = {}
    if "x" in wanted:
        found["x"] = (dz @ w.t()).reshape(arrays["x"].shape)
    if "w" in wanted:  # in the layout of the weight, which torch's linear layers turn
        found["w"] = (dz.t() @ x).t() if w.stride(0) == 1 else x.t() @ dz
    if "b" in wanted:
        found["b"] = dz.sum(0, dtype=torch.float32)
    return found


def _kept(specs: dict[str, Spec], params: Mapping[str, Any]) -> Sequence[Spec]:
    shape = (math.prod(specs["x"].shape[:-1]), specs["w"].shape[1])
    return (Spec(shape, specs["x"].dtype),) if params.get("early") else ()


def _early(arrays: Tensors, names: Sequence[str]) -> str:
    return "sums"


linear_act = library.kernel("linear_act", "triton", _forward, _backward, kept=_kept, early=_early, fresh=True)


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why the kernels cannot take a call, in one clause, or None."""
    return jitted.refusal(specs, params, "x", "w")
