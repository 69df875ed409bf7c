"""`act(x w + b)` in one Triton kernel: what is done to the sums is done before they are written. For linear_act and matmul."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import triton
import triton.language as tl

from kpt.ops.base import Specs
from kpt_torch.triton_kernels.jitted import bounds
from kpt_torch.triton_kernels.jitted.activations import activated, slope


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows and columns of a block of the result, what is summed at once, warps of a program, and loads under way."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


# By what tensor cores read at once, and by the 64 KiB of shared memory that CDNA has. On Hopper twice as many columns spill once an
# activation follows. float32 goes through no tensor core (TF32 would be another number), and its sums and operands take registers.
TILES = {"ampere": Tile(128, 128, 32, 8, 3), "hopper": Tile(128, 128, 64, 8, 4), "cdna": Tile(128, 128, 32, 8, 2)}
WIDE = Tile(64, 64, 16, 8, 2)
GROUP = 8
"""Blocks of rows that run over the columns together, so that what they read of `w` is in the L2 cache still."""
BLOCK, WARPS = 2048, 4


@triton.jit
def product_blocks(
    x, w, b, z, y, rows, columns, inner, x_row, x_inner, w_inner, w_column,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """`x`, `w` are strided; `y` and, if kept, `z`, the sums themselves, contiguous."""
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    band = GROUP * across
    first = tl.program_id(0) // band * GROUP
    height = tl.minimum(down - first, GROUP)
    at = tl.program_id(0) % band
    row = (first + at % height).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (at // height).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, INNER)
    left = x + row[:, None] * x_row + k[None, :].to(tl.int64) * x_inner
    right = w + k[:, None].to(tl.int64) * w_inner + column[None, :] * w_column
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, inner, INNER):
        there = k < inner - start
        a = tl.load(left, mask=(row < rows)[:, None] & there[None, :], other=0.0)
        c = tl.load(right, mask=there[:, None] & (column < columns)[None, :], other=0.0)
        total = tl.dot(a, c, total, input_precision="ieee")
        left += tl.cast(INNER, tl.int64) * x_inner
        right += tl.cast(INNER, tl.int64) * w_inner
    if BIAS:
        total += tl.load(b + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    to = row[:, None] * columns + column[None, :]
    there = (row < rows)[:, None] & (column < columns)[None, :]
    if KEEP:
        tl.store(z + to, total.to(z.dtype.element_ty), mask=there)
    tl.store(y + to, activated(total, ACTIVATION).to(y.dtype.element_ty), mask=there)


@triton.jit
def slope_blocks(z, dy, dz, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """`dz` may be `z`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(z + at, mask=at < count, other=0.0).to(tl.float32)
    d = tl.load(dy + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(dz + at, (d * slope(v, ACTIVATION)).to(dz.dtype.element_ty), mask=at < count)


def tile(family: str, itemsize: int) -> Tile:
    """That of a family of GPUs and of the dtype."""
    return WIDE if itemsize > 2 else TILES["hopper" if family == "blackwell" else family]


def refusal(specs: Specs, params: Any, left: str, right: str) -> str | None:
    """Why the kernel cannot take the product of these two, in one clause, or None."""
    x, w = specs[left], specs[right]
    if x.dtype != w.dtype:
        return f"multiplies arrays of one dtype, and {left} is {x.dtype} and {right} is {w.dtype}"
    if math.prod(x.shape[:-1]) * w.shape[1] > BLOCK * bounds.MOST or max(math.prod(x.shape[:-1]), *w.shape) > bounds.MOST // 2:
        return f"takes up to 2^31 blocks, and {left} is {list(x.shape)} and {right} is {list(w.shape)}"
    return bounds.wide_floats(specs, params)
