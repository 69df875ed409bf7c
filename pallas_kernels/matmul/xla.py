"""Matrix product as XLA's own dot, with the accumulator's dtype said."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.activations import wide


def matmul(*, a: jax.Array, b: jax.Array, out_dtype: str | None = None) -> jax.Array:
    """`a b`, summed in float32 (float64 for float64).

    Args:
      a: `[M, K]`. b: `[K, N]`. float16 to float64.
      out_dtype: of the result; a's by default.
    """
    acc = wide(jnp.promote_types(a.dtype, b.dtype))
    return jnp.matmul(a, b, preferred_element_type=acc).astype(out_dtype or a.dtype)
