"""cross_entropy by the Triton kernels of `jitted/cross_entropy.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton

from kpt.ops.base import Spec
from kpt_torch import library
from kpt_torch.library import Tensors
from kpt_torch.triton_kernels import launch
from kpt_torch.triton_kernels.jitted import bounds
from kpt_torch.triton_kernels.jitted import cross_entropy as jitted
from kpt_torch.triton_kernels.jitted.cross_entropy import refusal as refusal


def put_losses(logits: torch.Tensor, labels: torch.Tensor, loss: torch.Tensor, lse: torch.Tensor, params: Mapping[str, Any]) -> None:
    """Writes loss and logsumexp of each row; all arrays are contiguous."""
    vocab = logits.shape[-1]
    if logits.numel():
        with launch.on(logits):
            launch.run(jitted.forward_rows, (labels.numel(),),
                logits, labels, loss, lse, vocab, *jitted.scalars(params),
                **jitted.static(params), BLOCK=bounds.block(vocab, jitted.FORWARD_BLOCK), num_warps=jitted.FORWARD_WARPS,
            )  # fmt: skip


def put_gradients(
    logits: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor, dloss: torch.Tensor, dlogits: torch.Tensor, params: Mapping[str, Any]
) -> None:
    """Writes the gradient of each logit, which may be where the logits are; all arrays are contiguous."""
    vocab = logits.shape[-1]
    if logits.numel():
        size = bounds.block(vocab, jitted.BACKWARD_BLOCK)
        with launch.on(logits):
            launch.run(jitted.backward_blocks, (labels.numel() * triton.cdiv(vocab, size),),
                logits, labels, lse, dloss, dlogits, vocab, *jitted.scalars(params),
                **jitted.static(params), BLOCK=size, num_warps=jitted.BACKWARD_WARPS,
            )  # fmt: skip


def _forward(arrays: Tensors, params: dict[str, Any]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    logits, labels = (arrays[n].contiguous() for n in ("logits", "labels"))
    loss = torch.full(labels.shape, -math.inf, dtype=torch.float32, device=logits.device)  # the loss of no vocabulary
    lse = torch.empty_like(loss)
    put_losses(logits, labels, loss, lse, params)
    return [loss], [lse]


def _backward(arrays: Tensors, params: Any, results: Any, kept: Any, cotangents: Any, wanted: Sequence[str]) -> Tensors:
    logits, labels = (arrays[n].contiguous() for n in ("logits", "labels"))
    dlogits = torch.empty_like(logits)
    put_gradients(logits, labels, kept[0], cotangents[0].contiguous(), dlogits, params)
    return {"logits": dlogits}


cross_entropy = library.kernel(
    "cross_entropy", "triton", _forward, _backward, kept=lambda specs, params: (Spec(specs["labels"].shape, "float32"),), fresh=True
)
