"""Layer norm in plain JAX. Residuals of the backward pass: the input and three numbers a row."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.activations import wide
from pallas_kernels.manual_axes import vary_alike


def layer_norm(
    *,
    x: jax.Array,
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    eps: float = 1e-6,
    out_dtype: str | None = None,
) -> Any:
    """`(h - mean(h)) rsqrt(var(h) + eps) weight + bias` with `h = x + residual` (Ba et al. 2016, arXiv:1607.06450).

    The variance is taken around the mean (two passes), so that it does not cancel for a large mean. What is left of the mean after
    it was subtracted is subtracted too: float32 may not hold the mean of nearly equal numbers, and the error is divided by their
    deviation. A row of two becomes -1 and 1 whatever they are, so that no conditioning excuses it.

    Args:
      x: `[..., D]`, float16 to float64. Statistics are float32 (float64 for float64).
      weight, bias: `[D]`, either may be absent.
      residual: `[..., D]`, added first; then `(y, h)` is returned, h in x's dtype.
      out_dtype: of y; x's by default.
    """
    h = x if residual is None else x + residual
    y = _norm((float(eps), str(jnp.dtype(out_dtype or x.dtype))), *vary_alike(h, weight, bias))
    return y if residual is None else (y, h.astype(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(static, x, weight, bias):
    return _forward(static, x, weight, bias)[0]


def _forward(static, x, weight, bias):
    eps, out_dtype = static
    xf = x.astype(wide(x.dtype))
    mean = jnp.mean(xf, -1, keepdims=True)
    centred = xf - mean
    left = jnp.mean(centred, -1, keepdims=True)
    centred = centred - left
    r = jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + eps)
    y = centred * r
    if weight is not None:
        y = y * weight.astype(wide(weight.dtype))
    if bias is not None:
        y = y + bias.astype(wide(bias.dtype))
    return y.astype(out_dtype), mean, left, r


def _fwd(static, x, weight, bias):
    y, mean, left, r = _forward(static, x, weight, bias)
    return y, (x, weight, bias, mean, left, r)


def _bwd(static, residuals, g):
    x, weight, bias, mean, left, r = residuals
    gf = g.astype(r.dtype)
    n = (x.astype(r.dtype) - mean - left) * r
    gw = gf if weight is None else gf * weight.astype(wide(weight.dtype))
    dx = r * (gw - jnp.mean(gw, -1, keepdims=True) - n * jnp.mean(gw * n, -1, keepdims=True))
    rows = tuple(range(x.ndim - 1))
    dw = None if weight is None else jnp.sum(gf * n, rows).astype(weight.dtype)
    db = None if bias is None else jnp.sum(gf, rows).astype(bias.dtype)
    return dx.astype(x.dtype), dw, db


_norm.defvjp(_fwd, _bwd)
