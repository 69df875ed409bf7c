"""matmul: `a b`, rounded once to `out_dtype`, by one Triton kernel; its backward pass by the products of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kpt.ops.base import Specs
from kpt_torch import library
from kpt_torch.library import Tensors, torch_dtype
from kpt_torch.triton_kernels import product
from kpt_torch.triton_kernels.jitted import product as jitted


def _forward(arrays: Tensors, params: dict[str, Any]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    a, b = arrays["a"], arrays["b"]
    out = a.dtype if params["out_dtype"] is None else torch_dtype(params["out_dtype"])
    y = torch.empty((a.shape[0], b.shape[1]), dtype=out, device=a.device)
    product.put_product(a, b, None, y)
    return [y], []


def _backward(arrays: Tensors, params: Any, results: Any, kept: Any, cotangents: Any, wanted: Sequence[str]) -> Tensors:
    a, b = arrays["a"], arrays["b"]
    g = cotangents[0].to(a.dtype)
    return {n: g @ b.t() if n == "a" else a.t() @ g for n in wanted}


matmul = library.kernel("matmul", "triton", _forward, _backward)


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why the kernel cannot take a call, in one clause, or None."""
    return jitted.refusal(specs, params, "a", "b")
