"""rope in Triton: `x cos + rotate(x) sin` on the first R of the head dim (arXiv:2104.09864).

A position's angles are read once for a tile of its heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from kpt.ops.base import Specs
from kpt_torch.triton_kernels.jitted import bounds

TILE, WARPS = 4096, 4


@triton.jit
def _turned(a, b, ca, cb, sa, sb, BACKWARD: tl.constexpr):
    """Pairs (a, b) turned by their angles; backward, by the transposed matrix."""
    if BACKWARD:
        return a * ca + b * sb, b * cb - a * sa
    return a * ca - b * sa, b * cb + a * sb


@triton.jit
def _turn(
    x, cos, sin, y, place, head, x_batch, x_time, x_head, x_dim, table_batch, times, heads, size, width,
    INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """A tile of heads at one position. `x` is strided, `y` contiguous; `BLOCK` covers R / 2, `TAIL` what is past R, or is 0."""
    batch, time = place // times, place % times
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


@triton.jit
def turn(
    x, cos, sin, y, x_batch, x_time, x_head, x_dim, table_batch, times, heads, size, width,
    INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(heads, HEADS)
    place = (tl.program_id(0) // across).to(tl.int64)
    head = (tl.program_id(0) % across) * HEADS + tl.arange(0, HEADS)
    _turn(x, cos, sin, y, place, head, x_batch, x_time, x_head, x_dim, table_batch, times, heads, size, width,
          INTERLEAVED, BACKWARD, HEADS, BLOCK, TAIL)  # fmt: skip


@triton.jit
def turn_both(
    x, other, cos, sin, y, z, x_batch, x_time, x_head, x_dim, other_batch, other_time, other_head, other_dim, table_batch, times,
    heads, other_heads, size, width,
    INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, HEADS: tl.constexpr, OTHER_HEADS: tl.constexpr, BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Two arrays by the same tables: a position's tiles of the one, then those of the other, while its angles are in the cache."""
    across, behind = tl.cdiv(heads, HEADS), tl.cdiv(other_heads, OTHER_HEADS)
    place = (tl.program_id(0) // (across + behind)).to(tl.int64)
    tile = tl.program_id(0) % (across + behind)
    if tile < across:
        _turn(x, cos, sin, y, place, tile * HEADS + tl.arange(0, HEADS), x_batch, x_time, x_head, x_dim, table_batch, times, heads, size,
              width, INTERLEAVED, BACKWARD, HEADS, BLOCK, TAIL)  # fmt: skip
    else:
        head = (tile - across) * OTHER_HEADS + tl.arange(0, OTHER_HEADS)
        _turn(other, cos, sin, z, place, head, other_batch, other_time, other_head, other_dim, table_batch, times, other_heads, size,
              width, INTERLEAVED, BACKWARD, OTHER_HEADS, BLOCK, TAIL)  # fmt: skip


def tile(size: int, width: int, heads: int) -> tuple[int, int, int]:
    """(heads, half of what turns, tail) of a program: powers of two; a tail of 0 is none."""
    half = bounds.block(size // 2, bounds.MOST)
    tail = triton.next_power_of_2(width - size) if width > size else 0
    return bounds.block(heads, max(1, TILE // (2 * half + tail))), half, tail


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why the kernel cannot take a call, in one clause, or None."""
    shape = specs["x"].shape
    if shape[-1] > TILE or math.prod(shape[:-1]) > bounds.MOST:
        return f"takes head dims up to {TILE}, and x is {list(shape)}"
    return bounds.wide_floats(specs, params)
