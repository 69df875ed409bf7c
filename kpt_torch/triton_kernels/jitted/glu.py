"""What glu does between its products and their gradients: one Triton kernel a pass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from kpt.ops.base import Specs
from kpt_torch.triton_kernels.jitted import bounds
from kpt_torch.triton_kernels.jitted.activations import activated, slope

BLOCK, WARPS = 2048, 4


@triton.jit
def forward_blocks(gate, up, y, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < count, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(y + at, (activated(g, ACTIVATION) * u).to(y.dtype.element_ty), mask=at < count)


@triton.jit
def backward_blocks(gate, up, dy, dgate, dup, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """`dgate` may be `gate`, and `dup` may be `up`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < count, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < count, other=0.0).to(tl.float32)
    d = tl.load(dy + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(dgate + at, (d * u * slope(g, ACTIVATION)).to(dgate.dtype.element_ty), mask=at < count)
    tl.store(dup + at, (d * activated(g, ACTIVATION)).to(dup.dtype.element_ty), mask=at < count)


@triton.jit
def backward_and_product_blocks(gate, up, dy, dgate, dup, y, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """As `backward_blocks`, and what `forward_blocks` made, once more; `y` may be `dy`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < count, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < count, other=0.0).to(tl.float32)
    d = tl.load(dy + at, mask=at < count, other=0.0).to(tl.float32)
    a = activated(g, ACTIVATION)
    tl.store(dgate + at, (d * u * slope(g, ACTIVATION)).to(dgate.dtype.element_ty), mask=at < count)
    tl.store(dup + at, (d * a).to(dup.dtype.element_ty), mask=at < count)
    tl.store(y + at, (a * u).to(y.dtype.element_ty), mask=at < count)


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why the kernels cannot take a call, in one clause, or None."""
    x = specs["x"]
    for name in ("w_gate", "w_up"):
        if specs[name].dtype != x.dtype:
            return f"multiplies arrays of one dtype, and x is {x.dtype} and {name} is {specs[name].dtype}"
    if math.prod(x.shape[:-1]) * specs["w_gate"].shape[1] > BLOCK * bounds.MOST:
        return f"takes up to 2^31 blocks, and x is {list(x.shape)}"
    return bounds.wide_floats(specs, params)
