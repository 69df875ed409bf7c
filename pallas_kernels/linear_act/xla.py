"""Linear with activation in plain JAX. The backward pass keeps what the slope is cheapest derived from, and one array at most."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.activations import ACTIVATIONS, SLOPE_OF_OUTPUT, wide
from pallas_kernels.manual_axes import vary_alike

# XLA's CPU compiler of that time leaves some sums of two products as BF16 x BF16 = F32 on processors that have bfloat16
# instructions, and then cannot run them ("Unsupported element type for DotThunk::Execute").
_WIDENS_TOO_LATE = jax.__version_info__ < (0, 8)


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


def contract(x: jax.Array, w: jax.Array, dims: tuple, dtype: jnp.dtype) -> jax.Array:
    """`dot_general` over the pairs of dims, summed in the accumulator's dtype and rounded once, to `dtype`.

    XLA sums products of bfloat16 and float16 in float32 also where it returns them as narrow as they came. A result that is
    wanted so is asked for so: a wide one would be an array of its own on the CPU.
    """
    compute = jnp.promote_types(x.dtype, w.dtype)
    preferred = compute if dtype == compute else wide(compute)
    if preferred != compute and _WIDENS_TOO_LATE and jax.default_backend() == "cpu":
        x, w = x.astype(preferred), w.astype(preferred)
    return jax.lax.dot_general(x, w, (dims, ((), ())), preferred_element_type=preferred).astype(dtype)


def project(x: jax.Array, w: jax.Array, b: jax.Array | None) -> jax.Array:
    """`x w + b` in the accumulator's dtype."""
    acc = wide(jnp.promote_types(x.dtype, w.dtype))
    z = contract(x, w, ((x.ndim - 1,), (0,)), acc)
    return z if b is None else z + b.astype(acc)


def project_vjp(x: jax.Array, w: jax.Array, b: jax.Array | None, dz: jax.Array, dx_dtype: jnp.dtype | None = None) -> tuple:
    """Gradients of `x w + b` for `dz` in the compute dtype, each in the dtype of its array, that of x in `dx_dtype` if given."""
    dx = contract(dz, w, ((x.ndim - 1,), (1,)), dx_dtype or x.dtype)
    return dx, *weight_vjp(x, b, dz, w.dtype)


def weight_vjp(x: jax.Array, b: jax.Array | None, dz: jax.Array, dtype: jnp.dtype | None = None) -> tuple:
    """Those of w, in `dtype` (x's by default), and b alone."""
    rows = tuple(range(x.ndim - 1))
    db = None if b is None else jnp.sum(dz.astype(wide(dz.dtype)), rows).astype(b.dtype)
    return contract(x, dz, (rows, rows), dtype or x.dtype), db


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
    return project_vjp(x, w, b, dz.astype(compute))


_linear.defvjp(_fwd, _bwd)
