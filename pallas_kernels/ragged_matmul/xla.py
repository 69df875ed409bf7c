"""Ragged product in plain JAX: blocks of rows on the CPU, `jax.lax.ragged_dot` where a chip's compiler knows it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.activations import wide
from pallas_kernels.manual_axes import vary_alike


def ragged_matmul(*, x: jax.Array, w: jax.Array, group_sizes: jax.Array, out_dtype: str | None = None) -> jax.Array:
    """Rows of group `g` times `w[g]`; rows past `sum(group_sizes)` are 0, and so is their gradient.

    On the CPU XLA multiplies every row by every `w[g]` for a `ragged_dot`. Here each block of rows meets only the groups that
    reach into it (as in MegaBlocks, Gale et al. 2022, arXiv:2211.15841): `M / block + G - 1` visits at most.

    Args:
      x: `[M, K]`, rows sorted by group. w: `[G, K, N]`. float16 to float64; sums are float32 (float64 for float64).
      group_sizes: `[G]` integers, not negative, `M` in sum at most.
      out_dtype: of the result; x's by default.
    """
    x, w, group_sizes = vary_alike(x, w, group_sizes.astype(jnp.int32))
    return _ragged(str(jnp.dtype(out_dtype or x.dtype)), x, w, group_sizes)


def _block(rows: int, groups: int) -> int:
    """Rows of a block: so few that the blocks which two groups share are half of all at most, so many that a product is one."""
    return min(rows, max(32, min(256, 1 << (rows // (2 * groups)).bit_length() - 1)) if rows >= 2 * groups else 32)


def _visits(rows: int, block: int, group_sizes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(first row read, first and last row of the group within the block, group) of every visit of a group to a block.

    There are at most as many as blocks and groups together, less one; what is left of that number visits no rows.
    """
    groups = group_sizes.shape[0]
    end = jnp.minimum(jnp.cumsum(group_sizes), rows)
    start = jnp.concatenate([jnp.zeros_like(end[:1]), end[:-1]])
    count = jnp.where(end > start, (end - 1) // block - start // block + 1, 0)
    upto = jnp.cumsum(count)
    n = jnp.arange(-(-rows // block) + groups - 1, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(n[:, None] >= upto, 1, dtype=jnp.int32), groups - 1)
    at = (start // block - (upto - count))[group] + n  # the n-th visit's block
    first, last = jnp.maximum(start[group], at * block), jnp.minimum(end[group], (at + 1) * block)
    return jnp.minimum(at * block, rows - block), first, jnp.where(n < upto[-1], last, first), group


def _rows_of(a: jax.Array, visit: tuple, block: int) -> tuple[jax.Array, jax.Array]:
    """(the block of rows, which of them the group owns)."""
    at, first, last, _ = visit
    row = at + jnp.arange(block, dtype=jnp.int32)[:, None]
    return jax.lax.dynamic_slice_in_dim(a, at, block), (row >= first) & (row < last)


def _product(x: jax.Array, w: jax.Array, contract: int, group_sizes: jax.Array, dtype: str) -> jax.Array:
    """Rows of `x` times `w[g]`, summed over dim `contract` of `w[g]`."""
    block = _block(x.shape[0], w.shape[0])
    acc = wide(jnp.promote_types(x.dtype, w.dtype))

    def visit(out, one):
        rows, mine = _rows_of(x, one, block)
        matrix = jax.lax.dynamic_index_in_dim(w, one[3], keepdims=False)
        y = jax.lax.dot_general(rows, matrix, (((1,), (contract,)), ((), ())), preferred_element_type=acc)
        y = jnp.where(mine, y.astype(dtype), jax.lax.dynamic_slice_in_dim(out, one[0], block))
        return jax.lax.dynamic_update_slice_in_dim(out, y, one[0], 0), None

    (out,) = vary_alike(jnp.zeros((x.shape[0], w.shape[2 - contract]), dtype), x)[:1]
    return jax.lax.scan(visit, out, _visits(x.shape[0], block, group_sizes))[0]


def _weight_gradient(x: jax.Array, g: jax.Array, groups: int, group_sizes: jax.Array) -> jax.Array:
    """`dw[g] = x_g^T g_g` in the accumulator's dtype."""
    block = _block(x.shape[0], groups)
    acc = wide(jnp.promote_types(x.dtype, g.dtype))

    def visit(dw, one):
        # Both are masked: 0 times the infinity of a neighbouring group would be NaN.
        mine, theirs = (jnp.where(own, rows, 0) for rows, own in (_rows_of(x, one, block), _rows_of(g, one, block)))
        part = jax.lax.dot_general(mine, theirs, (((0,), (0,)), ((), ())), preferred_element_type=acc)
        return dw.at[one[3]].add(part), None

    (dw,) = vary_alike(jnp.zeros((groups, x.shape[1], g.shape[1]), acc), x)[:1]
    return jax.lax.scan(visit, dw, _visits(x.shape[0], block, group_sizes))[0]


def by_blocks(x: jax.Array, w: jax.Array, group_sizes: jax.Array, dtype: str) -> jax.Array:
    return _product(x, w, 0, group_sizes, dtype)


def by_blocks_vjp(x: jax.Array, w: jax.Array, group_sizes: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    dx = _product(g, w, 1, group_sizes, str(x.dtype))
    return dx, _weight_gradient(x, g, w.shape[0], group_sizes).astype(w.dtype)


def by_ragged_dot(x: jax.Array, w: jax.Array, group_sizes: jax.Array, dtype: str) -> jax.Array:
    acc = wide(jnp.promote_types(x.dtype, w.dtype))
    y = jax.lax.ragged_dot(x, w, group_sizes, preferred_element_type=acc)
    return jnp.where(jnp.arange(x.shape[0])[:, None] < jnp.sum(group_sizes), y, 0).astype(dtype)


def by_ragged_dot_vjp(x: jax.Array, w: jax.Array, group_sizes: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(lambda x, w: by_ragged_dot(x, w, group_sizes, str(g.dtype)), x, w)[1](g)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ragged(out_dtype, x, w, group_sizes):
    if 0 in (*x.shape, *w.shape):
        return jnp.zeros((x.shape[0], w.shape[2]), out_dtype)
    paths = {"cpu": by_blocks, "default": by_ragged_dot}
    return jax.lax.platform_dependent(x, w, group_sizes, **{p: functools.partial(f, dtype=out_dtype) for p, f in paths.items()})


def _fwd(out_dtype, x, w, group_sizes):
    return _ragged(out_dtype, x, w, group_sizes), (x, w, group_sizes)


def _bwd(out_dtype, residuals, g):
    x, w, group_sizes = residuals
    g = g.astype(jnp.promote_types(x.dtype, w.dtype))
    none = np.zeros(group_sizes.shape, jax.dtypes.float0)
    if 0 in (*x.shape, *w.shape):
        return jnp.zeros_like(x), jnp.zeros_like(w), none
    return *jax.lax.platform_dependent(x, w, group_sizes, g, cpu=by_blocks_vjp, default=by_ragged_dot_vjp), none


_ragged.defvjp(_fwd, _bwd)
