"""Ragged products for TPU: the grid visits, for each block of rows, the groups that reach into it (MegaBlocks, arXiv:2211.15841).

The list of visits is made from the group sizes and read from scalar memory, so that each visit fetches the matrix of its group.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np

from kpt.errors import KernelError
from kpt.ops.base import Spec, Specs
from pallas_kernels import tensorcore, tuned
from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.matmul.tpu import Blocks
from pallas_kernels.tensorcore import LANES, budget, cut, dot, launch, padded_bytes, require_fit

MOST_VISITS = 1 << 15
"""Of blocks by groups: four integers each, in 1 MiB of scalar memory, half of which is left to the compiler."""


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why these arrays cannot be taken, or None."""
    if (why := tensorcore.refusal(specs, params)) is not None:
        return why
    if (count := _most_visits(default_blocks(specs, params), specs)) > MOST_VISITS:
        return f"lists at most {MOST_VISITS} blocks and groups, and there may be {count}"
    return None


def _most_visits(blocks: Blocks, specs: Specs) -> int:
    rows = specs["x"].shape[0]
    return pl.cdiv(rows, cut(rows, blocks.m)) + specs["w"].shape[0] + 1


def default_blocks(specs: Specs, params: Mapping[str, Any]) -> Blocks:
    """All of a matrix where VMEM holds it, so that it comes once for all blocks of its group, or half of its columns for each of two
    cores; few rows, since a block that groups share is computed for each of them."""
    w = specs["w"]
    share = pl.cdiv(pl.cdiv(w.shape[2], tensorcore.generation().cores), LANES) * LANES
    blocks = Blocks(512, min(2048, share), 2048)
    while _need_of_all(blocks, specs, params) > budget() and max(dataclasses.astuple(blocks)) > LANES:
        largest = max("knm", key=lambda axis: getattr(blocks, axis))
        blocks = dataclasses.replace(blocks, **{largest: getattr(blocks, largest) // 2})
    return blocks


def _need_of_all(blocks: Blocks, specs: Specs, params: Mapping[str, Any]) -> int:
    """Bytes of VMEM of the hungriest product: forward; for x, whose columns are the inputs; and for w, whose sum runs over rows."""
    x, w = specs["x"], specs["w"]
    m, n, k = cut(x.shape[0], blocks.m), cut(w.shape[2], blocks.n), cut(w.shape[1], blocks.k)
    slope = jnp.promote_types(x.dtype, w.dtype)
    return max(
        _need(m, n, k, x.dtype, w.dtype, params.get("out_dtype") or x.dtype),
        _need(m, k, n, slope, w.dtype, x.dtype),
        _need(k, n, m, x.dtype, slope, w.dtype),
    )


def ragged_matmul(
    *, x: jax.Array, w: jax.Array, group_sizes: jax.Array, out_dtype: str | None = None, blocks: Blocks | None = None
) -> jax.Array:
    """Rows of group `g` times `w[g]`; rows past `sum(group_sizes)` are 0, and so is their gradient.

    Args:
      x: `[M, K]`, rows sorted by group. w: `[G, K, N]`. bfloat16 or float32; sums are float32.
      group_sizes: `[G]` integers, not negative, `M` in sum at most.
      out_dtype: of the result; x's by default.
      blocks: of this product and of those of the backward pass.

    Raises:
      KernelError: the blocks do not fit VMEM.
    """
    given = {"x": Spec(x.shape, str(x.dtype)), "w": Spec(w.shape, str(w.dtype))}
    params = {"out_dtype": out_dtype}

    def fits(found: Blocks) -> bool:
        return _most_visits(found, given) <= MOST_VISITS and tensorcore.fits(_need_of_all(found, given, params))

    found = blocks or tuned.blocks("ragged_matmul", Blocks, params, fits, x=x, w=w, group_sizes=group_sizes)
    chosen = found or default_blocks(given, params)
    if (count := _most_visits(chosen, given)) > MOST_VISITS:
        raise KernelError(f"{chosen} was asked for: {count} visits of groups to blocks", f"{MOST_VISITS} can be listed",
                          "Pass larger blocks, or none for the defaults")  # fmt: skip
    static = (str(jnp.dtype(out_dtype or x.dtype)), chosen)
    return _ragged(static, *vary_alike(x, w, group_sizes.astype(jnp.int32)))


def _visits(rows: int, block: int, group_sizes: jax.Array, every_group: bool) -> tuple[jax.Array, ...]:
    """Of every visit of a group to a block: block, group, and first and last row of the group in it.

    What is left of the list repeats the last visit, with no row to own.

    Args:
      every_group: list empty groups too, and no rows past the last group; else the blocks of those rows, with no row to own.
    """
    blocks = pl.cdiv(rows, block)
    if not every_group:  # the rows past the last group are one group more, of which no row is owned
        group_sizes = jnp.concatenate([group_sizes, rows - jnp.sum(group_sizes, keepdims=True)])
    groups = group_sizes.shape[0]
    end = jnp.minimum(jnp.cumsum(group_sizes), rows)
    start = jnp.concatenate([jnp.zeros_like(end[:1]), end[:-1]])
    count = jnp.where(end > start, (end - 1) // block - start // block + 1, int(every_group))
    upto = jnp.cumsum(count)
    n = jnp.arange(blocks + groups, dtype=jnp.int32)
    real = jnp.minimum(n, upto[-1] - 1)
    group = jnp.sum(real[:, None] >= upto, 1, dtype=jnp.int32)
    at = jnp.minimum((start // block - (upto - count))[group] + real, blocks - 1)
    owned = (n < upto[-1]) if every_group else (n < upto[-1]) & (group < groups - 1)
    first, last = jnp.maximum(start[group], at * block), jnp.where(owned, jnp.minimum(end[group], (at + 1) * block), 0)
    return at, group if every_group else jnp.minimum(group, groups - 2), first, last


def _need(bm: int, bn: int, bk: int, x: Any, w: Any, out: Any) -> int:
    """Bytes of VMEM: both factors and the result in two buffers, the sum and one product."""
    blocks = ((bm, bk), x), ((bk, bn), w), ((bm, bn), out)
    splits = 2 * (padded_bytes((bm, bk), jnp.float32) + padded_bytes((bk, bn), jnp.float32))
    exact = splits if jnp.promote_types(x, w) == jnp.float32 else 0
    return sum(2 * padded_bytes(s, d) for s, d in blocks) + exact + 2 * padded_bytes((bm, bn), jnp.float32)


def _inside(block: jax.Array, axis: int, first: Any, low: Any, high: Any) -> jax.Array:
    """The block, 0 where its place along the axis, from `first` on, is outside `[low, high)`."""
    place = first + jax.lax.broadcasted_iota(jnp.int32, block.shape, axis)
    return jnp.where((place >= low) & (place < high), block, jnp.zeros_like(block))


def _product(x: jax.Array, w: jax.Array, axis: int, group_sizes: jax.Array, dtype: str, blocks: Blocks, name: str) -> jax.Array:
    """Rows of `x` times `w[g]`, summed over axis `axis` of `w[g]`."""
    (m, k), n = x.shape, w.shape[2 - axis]
    bm, bn, bk = cut(m, blocks.m), cut(n, blocks.n), cut(k, blocks.k)
    require_fit(blocks, _need(bm, bn, bk, x.dtype, w.dtype, dtype))
    steps = pl.cdiv(k, bk)
    visits = _visits(m, bm, group_sizes, False)

    def kernel(at_ref, _group_ref, first_ref, last_ref, x_ref, w_ref, out_ref, acc_ref):
        visit, step = pl.program_id(1), pl.program_id(2)
        at = at_ref[visit]

        @pl.when((step == 0) & ((visit == 0) | (at != at_ref[jnp.maximum(visit - 1, 0)])))
        def _() -> None:
            out_ref[...] = jnp.zeros_like(out_ref)

        @pl.when(last_ref[visit] > first_ref[visit])
        def _() -> None:
            @pl.when(step == 0)
            def _() -> None:
                acc_ref[...] = jnp.zeros_like(acc_ref)

            a, b = x_ref[...], w_ref[...]
            if k % bk:
                a, b = _inside(a, 1, step * bk, 0, k), _inside(b, axis, step * bk, 0, k)
            acc_ref[...] += dot(a, b, 1, axis)

            @pl.when(step == steps - 1)
            def _() -> None:
                row = at * bm + jax.lax.broadcasted_iota(jnp.int32, (bm, bn), 0)
                mine = (row >= first_ref[visit]) & (row < last_ref[visit])
                out_ref[...] = jnp.where(mine, acc_ref[...].astype(out_ref.dtype), out_ref[...])

    def matrix(j, v, p, at, group, *_):
        return (group[v], p, j) if axis == 0 else (group[v], j, p)

    return launch(
        kernel,
        *visits,
        x,
        w,
        out=[((m, n), dtype)],
        in_specs=[
            pl.BlockSpec((bm, bk), lambda j, v, p, at, *_: (at[v], p)),
            pl.BlockSpec((None, bk, bn) if axis == 0 else (None, bn, bk), matrix),
        ],
        out_specs=[pl.BlockSpec((bm, bn), lambda j, v, p, at, *_: (at[v], j))],
        grid=(pl.cdiv(n, bn), visits[0].shape[0], steps),
        semantics=("parallel", "arbitrary", "arbitrary"),
        scratch=[pltpu.VMEM((bm, bn), jnp.float32)],
        prefetch=len(visits),
        cost=pl.CostEstimate(flops=2 * m * n * k, bytes_accessed=x.nbytes + w.nbytes, transcendentals=0),
        name=name,
    )[0]


def _weight_gradient(x: jax.Array, g: jax.Array, w: jax.Array, group_sizes: jax.Array, blocks: Blocks) -> jax.Array:
    """`dw[g] = x_g^T g_g`."""
    (m, k), n = x.shape, g.shape[1]
    # The sum runs over rows: the block of the inputs takes the place of that of rows, and the other way round.
    bm, bn, bk = cut(m, blocks.m), cut(n, blocks.n), cut(k, blocks.k)
    require_fit(blocks, _need(bk, bn, bm, x.dtype, g.dtype, w.dtype))
    visits = _visits(m, bm, group_sizes, True)
    count = visits[0].shape[0]

    def kernel(at_ref, group_ref, first_ref, last_ref, x_ref, g_ref, dw_ref, acc_ref):
        visit = pl.program_id(2)
        group = group_ref[visit]

        @pl.when((visit == 0) | (group != group_ref[jnp.maximum(visit - 1, 0)]))
        def _() -> None:
            acc_ref[...] = jnp.zeros_like(acc_ref)

        @pl.when(last_ref[visit] > first_ref[visit])
        def _() -> None:
            # Both are masked: 0 times the infinity of a neighbouring group would be NaN.
            a, b = (_inside(r[...], 0, at_ref[visit] * bm, first_ref[visit], last_ref[visit]) for r in (x_ref, g_ref))
            acc_ref[...] += dot(a, b, 0, 0)

        @pl.when((visit == count - 1) | (group != group_ref[jnp.minimum(visit + 1, count - 1)]))
        def _() -> None:
            dw_ref[...] = acc_ref[...].astype(dw_ref.dtype)

    return launch(
        kernel,
        *visits,
        x,
        g,
        out=[(w.shape, w.dtype)],
        in_specs=[
            pl.BlockSpec((bm, bk), lambda i, j, v, at, *_: (at[v], i)),
            pl.BlockSpec((bm, bn), lambda i, j, v, at, *_: (at[v], j)),
        ],
        out_specs=[pl.BlockSpec((None, bk, bn), lambda i, j, v, at, group, *_: (group[v], i, j))],
        grid=(pl.cdiv(k, bk), pl.cdiv(n, bn), count),
        semantics=("parallel", "parallel", "arbitrary"),
        scratch=[pltpu.VMEM((bk, bn), jnp.float32)],
        prefetch=len(visits),
        cost=pl.CostEstimate(flops=2 * m * n * k, bytes_accessed=x.nbytes + g.nbytes + w.nbytes, transcendentals=0),
        name="ragged_matmul_dw",
    )[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ragged(static, x, w, group_sizes):
    out_dtype, blocks = static
    return _product(x, w, 0, group_sizes, out_dtype, blocks, "ragged_matmul")


def _fwd(static, x, w, group_sizes):
    return _ragged(static, x, w, group_sizes), (x, w, group_sizes)


def _bwd(static, residuals, g):
    (x, w, group_sizes), (_, blocks) = residuals, static
    g = g.astype(jnp.promote_types(x.dtype, w.dtype))
    dx = _product(g, w, 1, group_sizes, str(x.dtype), blocks, "ragged_matmul_dx")
    return dx, _weight_gradient(x, g, w, group_sizes, blocks), np.zeros(group_sizes.shape, jax.dtypes.float0)


_ragged.defvjp(_fwd, _bwd)
