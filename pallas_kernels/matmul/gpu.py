"""Matrix product for NVIDIA Hopper, as `pallas_kernels.hopper_gemm` makes it, forward and backward, with no transpose."""

from __future__ import annotations

import functools

import jax

from kpt.kernels.stand_in import stood_for
from pallas_kernels.hopper_gemm import Tiles, product, tiles_for
from pallas_kernels.hopper_gemm import refusal as refusal
from pallas_kernels.manual_axes import vary_alike


def matmul(*, a: jax.Array, b: jax.Array, out_dtype: str | None = None, tiles: Tiles | None = None) -> jax.Array:
    """`a b`, summed in float32.

    Args:
      a: `[M, K]` bfloat16 or float16. b: `[K, N]`, of the same dtype.
      out_dtype: a's, or None for it.
      tiles: of this product and of those of the backward pass; `pallas_kernels.hopper_gemm.tiles_for` chooses them by default.

    Raises:
      KernelError: the tiles are not possible.
    """
    (m, k), (_, n) = stood_for("a", a.shape), stood_for("b", b.shape)
    each = (tiles,) * 3 if tiles else (tiles_for(m, n), tiles_for(m, k), tiles_for(k, n))
    return _matmul(each, *vary_alike(a, b))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(tiles, a, b):
    return product(a, b, tiles=tiles[0], name="matmul")


def _fwd(tiles, a, b):
    return _matmul(tiles, a, b), (a, b)


def _bwd(tiles, residuals, g):
    a, b = residuals
    da = product(g, b, b_axis=1, tiles=tiles[1], name="matmul_da")
    db = product(a, g, a_axis=0, tiles=tiles[2], name="matmul_db")
    return da, db


_matmul.defvjp(_fwd, _bwd)
