"""Ragged product through `jax.lax.ragged_dot`, with gradients of its own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.activations import wide


def ragged_matmul(*, x: jax.Array, w: jax.Array, group_sizes: jax.Array, out_dtype: str | None = None) -> jax.Array:
    """Rows of group `g` times `w[g]`; rows past `sum(group_sizes)` are 0.

    Args:
      x: `[M, K]`, rows sorted by group. w: `[G, K, N]`. float16 to float64.
      group_sizes: `[G]` integers.
      out_dtype: of the result; x's by default.
    """
    return _ragged(str(jnp.dtype(out_dtype or x.dtype)), x, w, group_sizes.astype(jnp.int32))


def _inside(rows: int, group_sizes: jax.Array) -> jax.Array:
    return jnp.arange(rows)[:, None] < jnp.sum(group_sizes)


def _product(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    acc = wide(jnp.promote_types(x.dtype, w.dtype))
    if 0 in (*x.shape, *w.shape):
        return jnp.zeros((x.shape[0], w.shape[2]), acc)
    y = jax.lax.ragged_dot(x, w, group_sizes, preferred_element_type=acc)
    return jnp.where(_inside(x.shape[0], group_sizes), y, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ragged(out_dtype, x, w, group_sizes):
    return _product(x, w, group_sizes).astype(out_dtype)


def _fwd(out_dtype, x, w, group_sizes):
    return _ragged(out_dtype, x, w, group_sizes), (x, w, group_sizes)


def _bwd(out_dtype, residuals, g):
    x, w, group_sizes = residuals
    acc = wide(jnp.promote_types(x.dtype, w.dtype))
    dx = _product(g.astype(x.dtype), jnp.swapaxes(w, 1, 2), group_sizes)

    # dw[g] = x_g^T g_g: rows outside the group count as 0, one group at a time, so that memory stays that of w.
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(x.shape[0])[:, None]

    def one(_: None, bounds: tuple) -> tuple[None, jax.Array]:
        start, end = bounds
        mine = jnp.where((row >= start) & (row < end), x, 0)
        theirs = jnp.where((row >= start) & (row < end), g, 0).astype(x.dtype)
        return None, jnp.matmul(mine.T, theirs, preferred_element_type=acc)

    _, dw = jax.lax.scan(one, None, (ends - group_sizes, ends))
    return dx.astype(x.dtype), dw.astype(w.dtype), np.zeros(group_sizes.shape, jax.dtypes.float0)


_ragged.defvjp(_fwd, _bwd)
