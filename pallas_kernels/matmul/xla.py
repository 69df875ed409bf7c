"""Matrix product as XLA's own dot, with the accumulator's dtype said, forward and backward."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.linear_act.xla import contract, project_vjp
from pallas_kernels.manual_axes import vary_alike


def matmul(*, a: jax.Array, b: jax.Array, out_dtype: str | None = None) -> jax.Array:
    """`a b`, summed in float32 (float64 for float64, int32 for int8).

    Args:
      a: `[M, K]`. b: `[K, N]`. float16 to float64, or both int8.
      out_dtype: of the result; a's by default, int32 for int8.
    """
    if a.dtype == jnp.int8:
        return jnp.matmul(a, b, preferred_element_type=jnp.int32)
    return _matmul(str(jnp.dtype(out_dtype or a.dtype)), *vary_alike(a, b))


# A rule of its own: where the result is wider than the factors, jax derives products of its cotangent with narrow matrices.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(out_dtype, a, b):
    return contract(a, b, ((a.ndim - 1,), (0,)), jnp.dtype(out_dtype))


def _fwd(out_dtype, a, b):
    return _matmul(out_dtype, a, b), (a, b)


def _bwd(out_dtype, residuals, g):
    a, b = residuals
    da, db, _ = project_vjp(a, b, None, g.astype(jnp.promote_types(a.dtype, b.dtype)))
    return da, db


_matmul.defvjp(_fwd, _bwd)
