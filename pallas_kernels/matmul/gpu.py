"""Matrix product for NVIDIA Hopper, as `pallas_kernels.hopper_gemm` makes it, forward and backward, with no transpose."""

from __future__ import annotations

import functools

import jax

from pallas_kernels.hopper_gemm import Tiles, product
from pallas_kernels.hopper_gemm import refusal as refusal
from pallas_kernels.manual_axes import vary_alike


def matmul(*, a: jax.Array, b: jax.Array, out_dtype: str | None = None, tiles: Tiles | None = None) -> jax.Array:
    """`a b`, summed in float32.

    Args:
      a: `[M, K]` bfloat16 or float16. b: `[K, N]`, of the same dtype.
      out_dtype: a's, or None for it.
      tiles: of this product and of those of the backward pass.

    Raises:
      KernelError: the tiles are not possible.
    """
    return _matmul(tiles, *vary_alike(a, b))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(tiles, a, b):
    return product(a, b, tiles=tiles, name="matmul")


def _fwd(tiles, a, b):
    return _matmul(tiles, a, b), (a, b)


def _bwd(tiles, residuals, g):
    a, b = residuals
    da = product(g, b, b_axis=1, tiles=tiles, name="matmul_da")
    db = product(a, g, a_axis=0, tiles=tiles, name="matmul_db")
    return da, db


_matmul.defvjp(_fwd, _bwd)
