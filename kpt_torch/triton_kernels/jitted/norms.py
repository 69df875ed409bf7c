"""rms_norm and layer_norm, one family of kernels: `LAYER` is whether a row's mean is taken off.

A row that fits in registers is read once, forward and backward: tiles of `ROWS` rows. The backward pass runs a few programs on each
processor; each goes over many rows, keeps the gradients of weight and bias in registers, and leaves one row of partial sums, which
a last small kernel adds. Wider rows are gone over in blocks of columns; every pass but the first finds the row in the L2 cache, and
the gradients of weight and bias are a kernel of their own, down the columns.

Sums are float32. The mean is subtracted in two parts, itself and what float32 could not hold of it, which is seen once it was
subtracted: the rounding of the mean of nearly equal numbers would be divided by their deviation. The sum of squares is corrected
for the second part in place of one more pass (Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983, eq. 1.7).

With a residual, what is normalised is `h` as it is returned, rounded to x's dtype.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from kpt.ops.base import Specs
from kpt_torch.triton_kernels.jitted import bounds


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a kernel goes over rows.

    Attributes:
      rows, columns: of what a program holds at a time.
      warps: of a program.
      programs: on one processor, where a program goes over many tiles.
    """

    rows: int
    columns: int
    warps: int
    programs: int = 1


# Widths above which a row no longer fits in registers: of a forward pass, which holds it once, and of a backward pass, which
# holds x, dy and two rows of sums.
WHOLE_FORWARD, WHOLE_BACKWARD = 16384, 8192
PROGRAMS = 1
"""Of a backward pass on one processor: each leaves a row of partial sums."""
WIDE = Tile(1, 4096, 8)
COLUMNS = Tile(16, 128, 4)
SUMS = Tile(64, 32, 4)


def _warps(tile_rows: int, columns: int) -> int:
    """16 elements a lane up to 4096 columns, 32 beyond: the faster of the two at 4096 and at 8192 (docs/benchmarks/triton-notes.md)."""
    return min(max(tile_rows * columns // (512 if columns <= 4096 else 1024), 1), 16)


def forward_tile(width: int) -> Tile:
    columns = bounds.block(width, WHOLE_FORWARD)
    rows = max(1, 2048 // columns)
    return Tile(rows, columns, _warps(rows, columns))


def backward_tile(width: int) -> Tile:
    columns = bounds.block(width, WHOLE_BACKWARD)
    rows = max(1, 4096 // columns)
    return Tile(rows, columns, _warps(rows, columns), PROGRAMS)


def stages(tile: Tile, row_bytes: int, shared: int) -> int:
    """Of a backward pass: four, so that three tiles load ahead, three of wide ones, where shared memory holds them, else one.

    Args:
      row_bytes: of an element in all arrays that are loaded.
      shared: bytes of shared memory on a processor, of which a tenth is left for sums.
    """
    elements = tile.rows * tile.columns
    size, wanted = elements * row_bytes, 4 if elements <= 4096 else 3
    return wanted if size <= 3 << 14 and 10 * (wanted - 1) * size * tile.programs <= 9 * shared else 1  # larger ones spill


@triton.jit
def _summed(x, residual, at, there):
    z = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    if residual is not None:
        z += tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
        z = z.to(x.dtype.element_ty).to(tl.float32)
    return z


@triton.jit
def _scaled(n, weight, bias, col, inside, offset):
    if weight is not None:
        n *= tl.load(weight + col, mask=inside, other=0.0).to(tl.float32) + offset
    if bias is not None:
        n += tl.load(bias + col, mask=inside, other=0.0).to(tl.float32)
    return n


@triton.jit
def _rsqrt(square, left, eps):
    """Of the variance, from the mean square about a point that the mean is `left` away from."""
    return 1.0 / tl.sqrt(tl.maximum(square - left * left, 0.0, propagate_nan=tl.PropagateNan.ALL) + eps)


@triton.jit
def forward_whole(
    x, residual, weight, bias, y, h, mean, left, rstd, rows, width, eps, offset,
    LAYER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    at = row[:, None] * width + col
    there = (row < rows)[:, None] & (col < width)
    z = _summed(x, residual, at, there)
    if h is not None:
        tl.store(h + at, z.to(h.dtype.element_ty), mask=there)
    if LAYER:
        m = tl.sum(z, 1) / width
        z = tl.where(there, z - m[:, None], 0.0)
        d = tl.sum(z, 1) / width
        tl.store(mean + row, m, mask=row < rows)
        tl.store(left + row, d, mask=row < rows)
        r = _rsqrt(tl.sum(z * z, 1) / width, d, eps)
        z -= d[:, None]
    else:
        r = _rsqrt(tl.sum(z * z, 1) / width, 0.0, eps)
    tl.store(rstd + row, r, mask=row < rows)
    n = _scaled(z * r[:, None], weight, bias, col, col < width, offset)
    tl.store(y + at, n.to(y.dtype.element_ty), mask=there)


@triton.jit
def forward_wide(
    x, residual, weight, bias, y, h, mean, left, rstd, rows, width, eps, offset,
    LAYER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    m = 0.0
    d = 0.0
    rest = tl.zeros([BLOCK], tl.float32)
    if LAYER:
        for start in range(0, width, BLOCK):
            col = start + tl.arange(0, BLOCK)
            total += _summed(x, residual, row * width + col, col < width)
        m = tl.sum(total, 0) / width
        tl.store(mean + row, m)
        total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        z = _summed(x, residual, row * width + col, col < width)
        if LAYER:
            z = tl.where(col < width, z - m, 0.0)
            rest += z
        total += z * z
    if LAYER:
        d = tl.sum(rest, 0) / width
        tl.store(left + row, d)
    r = _rsqrt(tl.sum(total, 0) / width, d, eps)
    tl.store(rstd + row, r)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        at = row * width + col
        z = _summed(x, residual, at, col < width)
        if h is not None:
            tl.store(h + at, z.to(h.dtype.element_ty), mask=col < width)
        if LAYER:
            z = z - m - d
        n = _scaled(z * r, weight, bias, col, col < width, offset)
        tl.store(y + at, n.to(y.dtype.element_ty), mask=col < width)


@triton.jit
def _stored(d, dh, dx, dresidual, at, there):
    if dh is not None:
        d += tl.load(dh + at, mask=there, other=0.0).to(tl.float32)
    if dx is not None:
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=there)
    if dresidual is not None:
        tl.store(dresidual + at, d.to(dresidual.dtype.element_ty), mask=there)


@triton.jit
def backward_whole(
    h, weight, dy, dh, mean, left, rstd, dx, dresidual, dweight, dbias, rows, width, offset,
    LAYER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BLOCK)[None, :]
    w = tl.full([1, BLOCK], 1.0, tl.float32)
    if weight is not None:
        w = tl.load(weight + col, mask=col < width, other=0.0).to(tl.float32) + offset
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    db = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        at = row[:, None] * width + col
        there = (row < rows)[:, None] & (col < width)
        g = tl.load(dy + at, mask=there, other=0.0).to(tl.float32)
        z = tl.load(h + at, mask=there, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        if LAYER:
            z -= tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
            z -= tl.load(left + row, mask=row < rows, other=0.0)[:, None]
        # 0 outside: a mean that is infinite, or NaN, is not to reach what is not there.
        n = tl.where(there, z * r, 0.0)
        if dweight is not None:
            dw += g * n
        if dbias is not None:
            db += g
        g *= w
        d = g - n * (tl.sum(g * n, 1) / width)[:, None]
        if LAYER:
            d -= (tl.sum(g, 1) / width)[:, None]
        _stored(d * r, dh, dx, dresidual, at, there)
    part = tl.program_id(0) * width + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < width
    if dweight is not None:
        tl.store(dweight + part, tl.sum(dw, 0), mask=inside)
    if dbias is not None:
        tl.store(dbias + part, tl.sum(db, 0), mask=inside)


@triton.jit
def backward_wide(
    h, weight, dy, dh, mean, left, rstd, dx, dresidual, rows, width, offset,
    LAYER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    r = tl.load(rstd + row)
    m = 0.0
    d = 0.0
    if LAYER:
        m = tl.load(mean + row)
        d = tl.load(left + row)
    along = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        inside = col < width
        g = _scaled(tl.load(dy + row * width + col, mask=inside, other=0.0).to(tl.float32), weight, None, col, inside, offset)
        z = tl.load(h + row * width + col, mask=inside, other=0.0).to(tl.float32)
        along += g * tl.where(inside, (z - m - d) * r, 0.0)
        total += g
    a = tl.sum(along, 0) / width
    t = tl.sum(total, 0) / width
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        inside = col < width
        at = row * width + col
        g = _scaled(tl.load(dy + at, mask=inside, other=0.0).to(tl.float32), weight, None, col, inside, offset)
        z = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
        dz = g - (z - m - d) * r * a
        if LAYER:
            dz -= t
        _stored(dz * r, dh, dx, dresidual, at, inside)


@triton.jit
def columns(
    h, dy, mean, left, rstd, dweight, dbias, rows, width,
    LAYER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial sums of the gradients of weight and bias, down the columns of every `num_programs(1)`-th tile."""
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    db = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1)):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        at = row[:, None] * width + col[None, :]
        there = (row < rows)[:, None] & (col < width)[None, :]
        g = tl.load(dy + at, mask=there, other=0.0).to(tl.float32)
        if dweight is not None:
            z = tl.load(h + at, mask=there, other=0.0).to(tl.float32)
            if LAYER:
                z -= tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
                z -= tl.load(left + row, mask=row < rows, other=0.0)[:, None]
            dw += g * tl.where(there, z * tl.load(rstd + row, mask=row < rows, other=0.0)[:, None], 0.0)
        if dbias is not None:
            db += g
    part = tl.program_id(1) * width + col
    if dweight is not None:
        tl.store(dweight + part, tl.sum(dw, 0), mask=col < width)
    if dbias is not None:
        tl.store(dbias + part, tl.sum(db, 0), mask=col < width)


@triton.jit
def _added(parts, total, count, width, col, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    if parts is not None:
        acc = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, count, ROWS):
            row = start + tl.arange(0, ROWS)
            there = (row < count)[:, None] & (col < width)[None, :]
            acc += tl.load(parts + row[:, None] * width + col[None, :], mask=there, other=0.0)
        tl.store(total + col, tl.sum(acc, 0).to(total.dtype.element_ty), mask=col < width)


@triton.jit
def sums(weights, biases, dweight, dbias, count, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of partial sums, added: the gradients of weight and bias in their own dtypes."""
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _added(weights, dweight, count, width, col, ROWS, BLOCK)
    _added(biases, dbias, count, width, col, ROWS, BLOCK)


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why the kernels cannot take a call, in one clause, or None."""
    x = specs["x"]
    if math.prod(x.shape[:-1]) > bounds.MOST or x.shape[-1] > 65536:
        return f"takes rows of up to 65536, and x is {list(x.shape)}"
    return bounds.wide_floats(specs, params)
