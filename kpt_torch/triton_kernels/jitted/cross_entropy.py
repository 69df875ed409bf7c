"""cross_entropy in Triton: one pass over the logits forward, by an online softmax (arXiv:1805.02867), and one backward."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from kpt.ops.base import Specs
from kpt_torch.triton_kernels.jitted import bounds
from kpt_torch.triton_kernels.jitted.activations import tanh

FORWARD_BLOCK, FORWARD_WARPS = 8192, 8
BACKWARD_BLOCK, BACKWARD_WARPS = 4096, 8


@triton.jit
def _label(labels, row, vocab):
    """(label inside the vocabulary, whether it was outside)."""
    y = tl.load(labels + row).to(tl.int64)
    outside = (y < 0) | (y >= vocab)
    return tl.minimum(tl.maximum(y, 0), vocab - 1), outside


@triton.jit
def forward_rows(
    logits, labels, loss, lse, vocab, smoothing, cap,
    CAP: tl.constexpr, SMOOTH: tl.constexpr, INVALID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    top = float("-inf")
    total = 0.0
    everything = 0.0
    for start in range(0, vocab, BLOCK):
        col = start + tl.arange(0, BLOCK)
        inside = col < vocab
        z = tl.load(logits + row * vocab + col, mask=inside, other=float("-inf")).to(tl.float32)
        if CAP:
            z = tl.where(inside, cap * tanh(z / cap), float("-inf"))
        if SMOOTH:
            everything += tl.sum(tl.where(inside, z, 0.0), 0)
        # An infinite maximum is not subtracted: inf - inf would be NaN where the sum is 0 or infinite.
        seen = top
        top = tl.maximum(top, tl.max(z, 0))
        old = tl.where(tl.abs(seen) == float("inf"), 0.0, seen)
        new = tl.where(tl.abs(top) == float("inf"), 0.0, top)
        # Nothing was added up before the first finite logit: 0, or NaN, which stay what they are at any scale.
        total = tl.where(seen == float("-inf"), total, total * tl.exp(old - new)) + tl.sum(tl.exp(z - new), 0)
    shift = tl.where(tl.abs(top) == float("inf"), 0.0, top)
    norm = tl.log(total) + shift
    tl.store(lse + row, norm)
    y, outside = _label(labels, row, vocab)
    picked = tl.load(logits + row * vocab + y).to(tl.float32)
    if CAP:
        picked = cap * tanh(picked / cap)
    picked = tl.where(smoothing == 1.0, 0.0, (1.0 - smoothing) * picked)
    if INVALID == "zero":
        picked = tl.where(outside, 0.0, picked)
    if INVALID == "drop":
        picked = tl.where(outside, 0.0, picked)
        norm = tl.where(outside, tl.where(smoothing == 0.0, 0.0, smoothing * norm), norm)
    found = norm - picked
    if SMOOTH:
        found -= smoothing / vocab * everything
    if INVALID == "nan":
        found = tl.where(outside, float("nan"), found)
    tl.store(loss + row, found)


@triton.jit
def backward_blocks(
    logits, labels, lse, dloss, dlogits, vocab, smoothing, cap,
    CAP: tl.constexpr, SMOOTH: tl.constexpr, INVALID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(vocab, BLOCK)
    row = (tl.program_id(0) // across).to(tl.int64)
    col = (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)
    at = row * vocab + col
    z = tl.load(logits + at, mask=col < vocab, other=0.0).to(tl.float32)
    g = tl.load(dloss + row)
    slope = g
    if CAP:
        t = tanh(z / cap)
        z = cap * t
        slope = g * (1.0 - t * t)
    y, outside = _label(labels, row, vocab)
    d = tl.exp(z - tl.load(lse + row))
    if INVALID == "drop":
        d *= tl.where(outside, smoothing, 1.0)
    if SMOOTH:
        d -= smoothing / vocab
    # The label term of a loss that is NaN comes from outside the logits: no gradient passes through it.
    share = 1.0 - smoothing
    if INVALID != "clip":
        share = tl.where(outside, 0.0, share)
    d -= tl.where(col == y, share, 0.0)
    tl.store(dlogits + at, (d * slope).to(dlogits.dtype.element_ty), mask=col < vocab)


def static(params: Mapping[str, Any]) -> dict[str, Any]:
    return {"CAP": params["logits_soft_cap"] is not None, "SMOOTH": params["label_smoothing"] != 0, "INVALID": params["invalid"]}


def scalars(params: Mapping[str, Any]) -> tuple[float, float]:
    return float(params["label_smoothing"]), float(params["logits_soft_cap"] or 1.0)


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why the kernels cannot take a call, in one clause, or None."""
    *rows, vocab = specs["logits"].shape
    if math.prod(rows) * -(-vocab // BACKWARD_BLOCK) > bounds.MOST or vocab > bounds.MOST - FORWARD_BLOCK:
        return f"takes up to 2^31 blocks of logits, and they are {[*rows, vocab]}"
    return bounds.wide_floats(specs, params)
