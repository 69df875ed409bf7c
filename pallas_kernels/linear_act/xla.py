"""Linear with activation in plain JAX. The backward pass keeps what the slope is cheapest derived from, and one array at most."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.activations import ACTIVATIONS, SLOPE_OF_OUTPUT, wide
from pallas_kernels.manual_axes import vary_alike


def linear_act(
    *, x: jax.Array, w: jax.Array, b: jax.Array | None = None, activation: str = "gelu_tanh", out_dtype: str | None = None
) -> jax.Array:
    """`act(x w + b)`.

    The backward pass keeps x, w and the pre-activation in the compute dtype (that of x and w together). Where the slope is a
    function of the result (relu, sigmoid, tanh) it keeps the result instead, which whatever comes next keeps anyway; for
    "identity" it keeps neither.

    Args:
      x: `[..., K]`. w: `[K, N]`. b: `[N]` or None. float16 to float64; sums are float32 (float64 for float64).
      activation: a name of `pallas_kernels.activations.ACTIVATIONS`.
      out_dtype: of the result; x's by default.
    """
    return _linear((activation, str(jnp.dtype(out_dtype or x.dtype))), *vary_alike(x, w, b))


def project(x: jax.Array, w: jax.Array, b: jax.Array | None) -> jax.Array:
    """`x w + b` in the accumulator's dtype."""
    acc = wide(jnp.promote_types(x.dtype, w.dtype))
    z = jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=acc)
    return z if b is None else z + b.astype(acc)


def project_vjp(x: jax.Array, w: jax.Array, b: jax.Array | None, dz: jax.Array) -> tuple:
    """Gradients of `x w + b` for `dz` in the compute dtype; that of x in the accumulator's, for sums over several products."""
    acc = wide(dz.dtype)
    dims = tuple(range(x.ndim - 1))
    dx = jax.lax.dot_general(dz, w, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=acc)
    dw = jax.lax.dot_general(x, dz, ((dims, dims), ((), ())), preferred_element_type=acc)
    db = None if b is None else jnp.sum(dz.astype(acc), dims).astype(b.dtype)
    return dx, dw.astype(w.dtype), db


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(static, x, w, b):
    return _fwd(static, x, w, b)[0]


def _slope(activation: str, out_dtype: str, compute: jnp.dtype):
    """The slope, and whether it takes the result; only a result as precise as the pre-activation stands in for it."""
    if activation in SLOPE_OF_OUTPUT and jnp.promote_types(out_dtype, compute) == out_dtype:
        return SLOPE_OF_OUTPUT[activation], True
    return ACTIVATIONS[activation][1], False


def _fwd(static, x, w, b):
    activation, out_dtype = static
    compute = jnp.promote_types(x.dtype, w.dtype)
    z = project(x, w, b)
    y = ACTIVATIONS[activation][0](z).astype(out_dtype)
    if activation == "identity":
        return y, (x, w, b, None)
    _, of_output = _slope(activation, out_dtype, compute)
    return y, (x, w, b, y if of_output else z.astype(compute))


def _bwd(static, residuals, g):
    x, w, b, kept = residuals
    compute = jnp.promote_types(x.dtype, w.dtype)
    acc = wide(compute)
    dz = g.astype(acc)
    if kept is not None:
        activation, out_dtype = static
        slope, _ = _slope(activation, out_dtype, compute)
        dz = dz * slope(kept.astype(acc))
    dx, dw, db = project_vjp(x, w, b, dz.astype(compute))
    return dx.astype(x.dtype), dw, db


_linear.defvjp(_fwd, _bwd)
