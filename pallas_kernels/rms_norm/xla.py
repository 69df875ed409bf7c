"""RMS norm in plain JAX. Residuals of the backward pass: the input and one number a row, never the normalised tensor."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.activations import wide
from pallas_kernels.manual_axes import vary_alike


def rms_norm(
    *,
    x: jax.Array,
    weight: jax.Array | None = None,
    residual: jax.Array | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    out_dtype: str | None = None,
) -> Any:
    """`h rsqrt(mean(h^2) + eps) (weight_offset + weight)` with `h = x + residual` (Zhang and Sennrich 2019, arXiv:1910.07467).

    Args:
      x: `[..., D]`, float16 to float64. Statistics are float32 (float64 for float64).
      weight: `[D]`; without it the scale is 1.
      residual: `[..., D]`, added first; then `(y, h)` is returned, h in x's dtype.
      out_dtype: of y; x's by default.
    """
    h = x if residual is None else x + residual
    y = _norm((float(eps), float(weight_offset), str(jnp.dtype(out_dtype or x.dtype))), *vary_alike(h, weight))
    return y if residual is None else (y, h.astype(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(static, x, weight):
    return _forward(static, x, weight)[0]


def _forward(static, x, weight):
    eps, offset, out_dtype = static
    xf = x.astype(wide(x.dtype))
    r = jax.lax.rsqrt(jnp.mean(xf * xf, -1, keepdims=True) + eps)
    y = xf * r
    if weight is not None:
        y = y * (offset + weight.astype(wide(weight.dtype)))
    return y.astype(out_dtype), r


def _fwd(static, x, weight):
    y, r = _forward(static, x, weight)
    return y, (x, weight, r)


def _bwd(static, residuals, g):
    _, offset, _ = static
    x, weight, r = residuals
    xf, gf = x.astype(r.dtype), g.astype(r.dtype)
    n = xf * r
    gw = gf if weight is None else gf * (offset + weight.astype(wide(weight.dtype)))
    dx = r * (gw - n * jnp.mean(gw * n, -1, keepdims=True))
    dw = None if weight is None else jnp.sum(gf * n, tuple(range(x.ndim - 1))).astype(weight.dtype)
    return dx.astype(x.dtype), dw


_norm.defvjp(_fwd, _bwd)
