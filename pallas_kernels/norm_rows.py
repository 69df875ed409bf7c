"""RMS norm and layer norm for NVIDIA Hopper, a row in registers: one pass forward, one pass backward.

Forward: `(x + residual - mean) r weight + bias` with `r = rsqrt(var + eps)`; an RMS norm is the same with `mean = 0`. Kept for the
backward pass: the sum that was normalised, and `mean` and `r` of each row.

Backward: a thread block walks over rows, each loaded while the one before it is computed. Gradients of weight and bias are summed in
registers on the way and written once a thread block; a small sum over the thread blocks follows. Rows of a layer norm that registers
cannot hold with those sums take two kernels: one goes over each row twice, the second time through the cache, one sums columns.

The widest rows are shared by the thread blocks of a cluster, each of which does that with its part of every row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kpt.ops.base import Specs
from pallas_kernels.manual_axes import unpartitioned
from pallas_kernels.rows import BLOCK, Cut, cut, kernel

FORWARD, BACKWARD = 16384, 4096
"""Elements of a row that one warpgroup holds: 128 a thread of x, or 32 of each of x, dy and the gradients of weight and bias."""
BACKWARD_BLOCKS = 264
"""Thread blocks of the backward pass, two for each streaming multiprocessor of an H100, and more where rows are shorter than what a
warpgroup holds: fewer hide less latency, more write more partial sums."""
ONE_PASS, WIDEST = 8192, 16384
"""Elements of a row up to which the backward pass of a layer norm is one kernel: beyond, a thread has too few registers. And up to which
all of this beats XLA without clusters."""
SHARED, WIDEST_SHARED, CLUSTERED_BLOCKS = 8192, 65536, 256
"""Of clusters: elements of a row to a thread block, of a row at most, and thread blocks of the backward pass. Of those, which go two to a
multiprocessor, each of an H100's groups of 16 or 18 multiprocessors has room for four clusters of eight."""
TWO_SWEEPS, COLUMN_BLOCKS = 8192, 2112
"""Of the two kernels for longer rows: elements of a row to a warpgroup, and thread blocks that sum columns."""


@dataclasses.dataclass(frozen=True)
class Norm:
    """What is known before tracing.

    Attributes:
      centred: subtract the mean, as a layer norm does.
      offset: added to the weight.
      residual: a second array is added to the first, and the sum is a result.
      out_dtype: of the normalised result.
    """

    centred: bool
    eps: float
    offset: float
    residual: bool
    out_dtype: str


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why these arrays cannot be taken, or None."""
    width = specs["x"].shape[-1]
    if (why := _refusal(specs)) is not None:
        return why
    if width < 512:
        return f"gives a warpgroup to each row, and {width} elements are too few for one; XLA fuses norms of short rows"
    if width > WIDEST:
        return f"is slower than XLA on rows wider than {WIDEST} elements, and these have {width}"
    return None


def refusal_shared(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """The same of rows that a cluster shares."""
    width = specs["x"].shape[-1]
    if not WIDEST < width <= WIDEST_SHARED:
        return f"shares rows of {WIDEST + 1} to {WIDEST_SHARED} elements among thread blocks, and these have {width}"
    if width % 8:
        return f"reads 16 bytes at a time, and rows of {width} elements do not begin there"
    return _refusal(specs)


def _refusal(specs: Specs) -> str | None:
    x = specs["x"]
    if (why := unpartitioned()) is not None:
        return why
    if 0 in x.shape:
        return "has no empty arrays"
    if "residual" in specs and specs["residual"].dtype != x.dtype:
        return f"adds arrays of one dtype, and these are {x.dtype} and {specs['residual'].dtype}"
    return None


def _shares(width: int) -> int:
    return 1 if width <= WIDEST else 1 << (pl.cdiv(width, SHARED) - 1).bit_length()


def norm(
    static: Norm, x: jax.Array, residual: jax.Array | None = None, weight: jax.Array | None = None, bias: jax.Array | None = None
) -> Any:
    """The norm over the last axis of arrays that `refusal` lets pass; with a residual, `(y, x + residual)`."""
    rows = [None if a is None else a.reshape(-1, x.shape[-1]) for a in (x, residual)]
    y, h = _norm(static, *rows, weight, bias)
    return (y.reshape(x.shape), h.reshape(x.shape)) if h is not None else y.reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(static: Norm, x, residual, weight, bias):
    return _fwd(static, x, residual, weight, bias)[0]


def _fwd(static: Norm, x, residual, weight, bias):
    rows, width = x.shape
    held = cut(width, (x.dtype, static.out_dtype), FORWARD, _shares(width))
    given = [a for a in (x, residual, weight, bias) if a is not None]
    out = [jax.ShapeDtypeStruct((rows, width), static.out_dtype), *[jax.ShapeDtypeStruct((rows,), jnp.float32)] * 2]
    if static.residual:
        out.append(jax.ShapeDtypeStruct((rows, width), x.dtype))

    def body(*refs: Any) -> None:
        *arrays, sums = refs
        queue = iter(arrays)
        x_ref, residual_ref, weight_ref, bias_ref = (None if a is None else next(queue) for a in (x, residual, weight, bias))
        y_ref, mean_ref, r_ref, *h_ref = queue
        row = lax.axis_index(BLOCK)
        values = held.load(x_ref, row)
        if residual_ref is not None:
            values = [a + b for a, b in zip(values, held.load(residual_ref, row), strict=True)]
            held.store(h_ref[0], values, row)
        mean: Any = jnp.float32(0)
        if static.centred:
            mean = sums(0, held.widened(values)) / width
        r = lax.rsqrt(sums(1, [(a - mean) * (a - mean) for a in held.widened(values)]) / width + static.eps)
        values = [(a - mean) * r for a in held.widened(values)]
        if weight_ref is not None:
            values = [a * w for a, w in zip(values, _weight(static, held, held.load(weight_ref)), strict=True)]
        if bias_ref is not None:
            values = [a + b.astype(jnp.float32) for a, b in zip(values, held.load(bias_ref), strict=True)]
        held.store(y_ref, values, row)

        @held.once
        def _() -> None:
            mean_ref[row], r_ref[row] = mean, r

    y, mean, r, *summed = kernel(body, out, rows, held)(*given)
    h = summed[0] if summed else None
    return (y, h), (x if h is None else h, weight, bias, mean, r)


def _weight(static: Norm, held: Cut, pieces: list[jax.Array]) -> list[jax.Array]:
    return [static.offset + w for w in held.widened(pieces)]


def _bwd(static: Norm, residuals, cotangents):
    one_pass = not static.centred or not ONE_PASS < residuals[0].shape[1] <= WIDEST
    dx, d_weight, d_bias = (_bwd_one_pass if one_pass else _bwd_two_kernels)(static, *residuals, *cotangents)
    return dx, dx if static.residual else None, d_weight, d_bias


def _bwd_one_pass(static: Norm, h, weight, bias, mean, r, dy, dh):
    rows, width = h.shape
    held = cut(width, (h.dtype, static.out_dtype), BACKWARD, _shares(width))
    blocks = min(rows, BACKWARD_BLOCKS * max(1, BACKWARD // width) if held.shares == 1 else CLUSTERED_BLOCKS // held.shares)
    given = [a for a in (h, dy, dh, weight, mean, r) if a is not None]
    partial = jax.ShapeDtypeStruct((blocks, width), jnp.float32)
    out = [jax.ShapeDtypeStruct(h.shape, h.dtype), *[partial for a in (weight, bias) if a is not None]]

    def body(*refs: Any) -> None:
        *arrays, sums = refs
        queue = iter(arrays)
        h_ref, dy_ref, dh_ref, weight_ref = (None if a is None else next(queue) for a in (h, dy, dh, weight))
        mean_ref, r_ref, dx_ref, *partial_refs = queue
        block = lax.axis_index(BLOCK)
        w = None if weight_ref is None else held.load(weight_ref)

        def load(row: Any) -> Any:
            return [held.load(ref, row) for ref in (h_ref, dy_ref, dh_ref) if ref is not None], mean_ref[row], r_ref[row]

        def step(i: Any, carry: Any) -> Any:
            (arrays, mean, r), d_weight, d_bias = carry
            row = block + i * blocks
            following = load(jnp.where(row + blocks < rows, row + blocks, row))
            h_row, g, *kept = [[a.astype(jnp.float32) for a in array] for array in arrays]
            n = [(a - mean) * r if static.centred else a * r for a in h_row]
            if weight is not None:
                d_weight = [s + a * b for s, a, b in zip(d_weight, g, n, strict=True)]
            if bias is not None:
                d_bias = [s + a for s, a in zip(d_bias, g, strict=True)]
            gw = g if w is None else [a * b for a, b in zip(g, _weight(static, held, w), strict=True)]
            along = [a * b for a, b in zip(gw, n, strict=True)]
            slope, shift = (sums(2 * i, along), sums(2 * i + 1, gw)) if static.centred else (sums(i, along), 0.0)
            dx = [r * (a - shift / width - b * (slope / width)) for a, b in zip(gw, n, strict=True)]
            if kept:
                dx = [a + b for a, b in zip(dx, kept[0], strict=True)]
            held.store(dx_ref, dx, row)
            return following, d_weight, d_bias

        steps = (rows - block + blocks - 1) // blocks
        zeros = [[held.zero()] * held.pieces if a is not None else [] for a in (weight, bias)]
        _, *found = lax.fori_loop(0, steps, step, (load(block), *zeros))
        for ref, pieces in zip(partial_refs, [p for p in found if p], strict=True):
            held.store(ref, pieces, block)

    dx, *partials = kernel(body, out, blocks, held)(*given)
    return dx, *_summed(partials, weight, bias)


def _summed(partials: list[jax.Array], weight: jax.Array | None, bias: jax.Array | None) -> Iterator[jax.Array | None]:
    queue = iter(partials)
    return (None if a is None else jnp.sum(next(queue), 0).astype(a.dtype) for a in (weight, bias))


def _bwd_two_kernels(static: Norm, h, weight, bias, mean, r, dy, dh):
    """Of a layer norm."""
    rows, width = h.shape
    held = cut(width, (h.dtype, static.out_dtype), TWO_SWEEPS)
    given = [a for a in (h, dy, dh, weight, mean, r) if a is not None]

    def along_rows(*refs: Any) -> None:
        *arrays, sums = refs
        queue = iter(arrays)
        h_ref, dy_ref, dh_ref, weight_ref = (None if a is None else next(queue) for a in (h, dy, dh, weight))
        mean_ref, r_ref, dx_ref = queue
        row = lax.axis_index(BLOCK)
        mean, r = mean_ref[row], r_ref[row]

        def load(ref: Any, *index: Any) -> jax.Array:
            return plgpu.load(ref.at[index], layout=held.layout).astype(jnp.float32)

        def pair(place: Any) -> tuple[jax.Array, jax.Array]:
            gw = load(dy_ref, row, place)
            if weight_ref is not None:
                gw = gw * (static.offset + load(weight_ref, place))
            return (load(h_ref, row, place) - mean) * r, gw

        def add(j: Any, found: list[jax.Array]) -> list[jax.Array]:
            start, foreign = held.place(j)
            n, gw = pair(pl.ds(start, held.piece))
            return [s + held.owned(a, foreign) for s, a in zip(found, (n * gw, gw), strict=True)]

        def write(j: Any, _: None) -> None:
            place = pl.ds(held.place(j)[0], held.piece)
            n, gw = pair(place)
            dx = r * (gw - shift / width - n * (slope / width))
            dx_ref[row, place] = (dx if dh_ref is None else dx + load(dh_ref, row, place)).astype(dx_ref.dtype)

        found = lax.fori_loop(0, held.pieces, add, [held.zero()] * 2)
        slope, shift = sums.of(0, found[0]), sums.of(1, found[1])
        lax.fori_loop(0, held.pieces, write, None)

    (dx,) = kernel(along_rows, [jax.ShapeDtypeStruct(h.shape, h.dtype)], rows, held)(*given)
    pieces = -(-width // held.piece)
    parts = min(rows, COLUMN_BLOCKS // pieces)
    one = dataclasses.replace(held, pieces=1, warpgroups=1)
    sought = [a for a in (weight, bias) if a is not None]

    def along_columns(h_ref: Any, dy_ref: Any, mean_ref: Any, r_ref: Any, *refs: Any) -> None:
        *partial_refs, _ = refs
        block = lax.axis_index(BLOCK)
        part = block // pieces
        place = pl.ds(jnp.minimum((block - part * pieces) * one.piece, width - one.piece), one.piece)

        def step(i: Any, found: list[jax.Array]) -> list[jax.Array]:
            row = part + i * parts
            g = plgpu.load(dy_ref.at[row, place], layout=one.layout).astype(jnp.float32)
            n = (plgpu.load(h_ref.at[row, place], layout=one.layout).astype(jnp.float32) - mean_ref[row]) * r_ref[row]
            terms = [g * n] * (weight is not None) + [g] * (bias is not None)
            return [s + a for s, a in zip(found, terms, strict=True)]

        found = lax.fori_loop(0, (rows - part + parts - 1) // parts, step, [one.zero()] * len(sought))
        for ref, s in zip(partial_refs, found, strict=True):
            ref[part, place] = s

    if not sought:
        return dx, None, None
    partial = jax.ShapeDtypeStruct((parts, width), jnp.float32)
    partials = kernel(along_columns, [partial] * len(sought), pieces * parts, one)(h, dy, mean, r)
    return dx, *_summed(partials, weight, bias)


_norm.defvjp(_fwd, _bwd)
