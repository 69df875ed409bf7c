"""Linear with activation in plain JAX. The backward pass keeps the pre-activation, and derives the activation from it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.activations import ACTIVATIONS, wide


def linear_act(
    *, x: jax.Array, w: jax.Array, b: jax.Array | None = None, activation: str = "gelu_tanh", out_dtype: str | None = None
) -> jax.Array:
    """`act(x w + b)`.

    Args:
      x: `[..., K]`. w: `[K, N]`. b: `[N]` or None. float16 to float64; sums are float32 (float64 for float64).
      activation: a name of `pallas_kernels.activations.ACTIVATIONS`.
      out_dtype: of the result; x's by default.
    """
    return _linear((activation, str(jnp.dtype(out_dtype or x.dtype))), x, w, b)


def project(x: jax.Array, w: jax.Array, b: jax.Array | None) -> jax.Array:
    """`x w + b` in the accumulator's dtype."""
    acc = wide(jnp.promote_types(x.dtype, w.dtype))
    z = jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=acc)
    return z if b is None else z + b.astype(acc)


def project_vjp(x: jax.Array, w: jax.Array, b: jax.Array | None, dz: jax.Array) -> tuple:
    """Gradients of `x w + b` for `dz` in the compute dtype."""
    acc = wide(jnp.promote_types(x.dtype, w.dtype))
    dims = tuple(range(x.ndim - 1))
    dx = jax.lax.dot_general(dz, w, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=acc)
    dw = jax.lax.dot_general(x, dz, ((dims, dims), ((), ())), preferred_element_type=acc)
    db = None if b is None else jnp.sum(dz.astype(acc), dims).astype(b.dtype)
    return dx.astype(x.dtype), dw.astype(w.dtype), db


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(static, x, w, b):
    activation, out_dtype = static
    return ACTIVATIONS[activation][0](project(x, w, b)).astype(out_dtype)


def _fwd(static, x, w, b):
    activation, out_dtype = static
    z = project(x, w, b)
    return ACTIVATIONS[activation][0](z).astype(out_dtype), (x, w, b, z.astype(jnp.promote_types(x.dtype, w.dtype)))


def _bwd(static, residuals, g):
    x, w, b, z = residuals
    acc = wide(z.dtype)
    dz = g.astype(acc) * ACTIVATIONS[static[0]][1](z.astype(acc))
    return project_vjp(x, w, b, dz.astype(z.dtype))


_linear.defvjp(_fwd, _bwd)
