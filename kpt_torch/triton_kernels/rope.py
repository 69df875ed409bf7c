"""rope in Triton: `x cos + rotate(x) sin` on the first R of the head dim (arXiv:2104.09864).

A position's angles are read once for a tile of its heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from kpt.ops.base import Specs
from kpt_torch import library
from kpt_torch.library import Tensors, torch_dtype
from kpt_torch.triton_kernels import launch

TILE, WARPS = 4096, 4


@triton.jit
def _turned(a, b, ca, cb, sa, sb, BACKWARD: tl.constexpr):
    """Pairs (a, b) turned by their angles; backward, by the transposed matrix."""
    if BACKWARD:
        return a * ca + b * sb, b * cb - a * sa
    return a * ca - b * sa, b * cb + a * sb


@triton.jit
def turn(
    x, cos, sin, y, x_batch, x_time, x_head, x_dim, table_batch, times, heads, size, width,
    INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """A tile of heads at one position. `x` is strided, `y` contiguous; `BLOCK` covers R / 2, `TAIL` what is past R, or is 0."""
    across = tl.cdiv(heads, HEADS)
    place = (tl.program_id(0) // across).to(tl.int64)
    batch, time = place // times, place % times
    head = (tl.program_id(0) % across) * HEADS + tl.arange(0, HEADS)
    read = x + batch * x_batch + time * x_time + head[:, None] * x_head
    write = y + (place * heads + head[:, None]) * width
    table = batch * table_batch + time * size
    if INTERLEAVED:  # neighbours come in one piece and are parted in registers, so that loads stay wide
        i = tl.arange(0, 2 * BLOCK)
        there = (head < heads)[:, None] & (i < size)[None, :]
        z = tl.load(read + i[None, :] * x_dim, mask=there, other=0.0).to(tl.float32)
        c = tl.load(cos + table + i, mask=i < size, other=0.0).to(tl.float32)
        s = tl.load(sin + table + i, mask=i < size, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(z, [HEADS, BLOCK, 2]))
        ca, cb = tl.split(tl.reshape(c, [1, BLOCK, 2]))
        sa, sb = tl.split(tl.reshape(s, [1, BLOCK, 2]))
        a, b = _turned(a, b, ca, cb, sa, sb, BACKWARD)
        tl.store(write + i[None, :], tl.reshape(tl.join(a, b), [HEADS, 2 * BLOCK]).to(y.dtype.element_ty), mask=there)
    else:
        half = size // 2
        i = tl.arange(0, BLOCK)
        there = (head < heads)[:, None] & (i < half)[None, :]
        a = tl.load(read + i[None, :] * x_dim, mask=there, other=0.0).to(tl.float32)
        b = tl.load(read + (half + i)[None, :] * x_dim, mask=there, other=0.0).to(tl.float32)
        ca = tl.load(cos + table + i, mask=i < half, other=0.0).to(tl.float32)[None, :]
        cb = tl.load(cos + table + half + i, mask=i < half, other=0.0).to(tl.float32)[None, :]
        sa = tl.load(sin + table + i, mask=i < half, other=0.0).to(tl.float32)[None, :]
        sb = tl.load(sin + table + half + i, mask=i < half, other=0.0).to(tl.float32)[None, :]
        a, b = _turned(a, b, ca, cb, sa, sb, BACKWARD)
        tl.store(write + i[None, :], a.to(y.dtype.element_ty), mask=there)
        tl.store(write + (half + i)[None, :], b.to(y.dtype.element_ty), mask=there)
    if TAIL:
        i = size + tl.arange(0, TAIL)
        there = (head < heads)[:, None] & (i < width)[None, :]
        z = tl.load(read + i[None, :] * x_dim, mask=there, other=0.0).to(tl.float32)
        tl.store(write + i[None, :], z.to(y.dtype.element_ty), mask=there)


def _tile(size: int, width: int, heads: int) -> tuple[int, int, int]:
    """(heads, half of what turns, tail) of a program: powers of two; a tail of 0 is none."""
    half = launch.block(size // 2, launch.MOST)
    tail = triton.next_power_of_2(width - size) if width > size else 0
    return launch.block(heads, max(1, TILE // (2 * half + tail))), half, tail


def _run(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype, interleaved: bool, backward: bool) -> torch.Tensor:
    batch, times, heads, width = x.shape
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    size = cos.shape[-1]
    if y.numel():
        tile, half, tail = _tile(size, width, heads)
        with launch.on(x):
            turn[(batch * times * triton.cdiv(heads, tile),)](
                x, cos.contiguous(), sin.contiguous(), y, *x.stride(), times * size if cos.shape[0] > 1 else 0, times, heads, size, width,
                INTERLEAVED=interleaved, BACKWARD=backward, HEADS=tile, BLOCK=half, TAIL=tail, num_warps=WARPS,
            )  # fmt: skip
    return y


def _forward(arrays: Tensors, params: dict[str, Any]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    x = arrays["x"]
    out = x.dtype if params["out_dtype"] is None else torch_dtype(params["out_dtype"])
    return [_run(x, arrays["cos"], arrays["sin"], out, params["interleaved"], False)], []


def _backward(arrays: Tensors, params: Any, results: Any, kept: Any, cotangents: Any, wanted: Sequence[str]) -> Tensors:
    x, cos, g = arrays["x"], arrays["cos"], cotangents[0]
    found: Tensors = {}
    if "x" in wanted:
        found["x"] = _run(g, cos, arrays["sin"], x.dtype, params["interleaved"], True)
    # Angles are learned by few: sums over heads, and over the batch where it shares them, in plain torch.
    size = cos.shape[-1]
    for name in ("cos", "sin"):
        if name in wanted:
            z = x[..., :size].float()
            if name == "sin":
                z = _rotated(z, params["interleaved"])
            made = (g[..., :size].float() * z).sum(2)
            found[name] = made.sum(0, keepdim=True) if cos.shape[0] != made.shape[0] else made
    return found


def _rotated(z: torch.Tensor, interleaved: bool) -> torch.Tensor:
    pairs = z.unflatten(-1, (z.shape[-1] // 2, 2) if interleaved else (2, z.shape[-1] // 2))
    a, b = pairs.unbind(-1 if interleaved else -2)
    return torch.stack((-b, a), -1 if interleaved else -2).reshape(z.shape)


rope = library.kernel("rope", "triton", _forward, _backward)


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why the kernel cannot take a call, in one clause, or None."""
    shape = specs["x"].shape
    if shape[-1] > TILE or math.prod(shape[:-1]) > launch.MOST:
        return f"takes head dims up to {TILE}, and x is {list(shape)}"
    return launch.wide_floats(specs, params)
