"""Rotary embedding in plain JAX. The backward pass is the rotation back."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.activations import wide


def rope(
    *, x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool = False, out_dtype: str | None = None
) -> jax.Array:
    """`x cos + rotate(x) sin` on the first `R` of the head dim (Su et al. 2021, arXiv:2104.09864); the rest passes through.

    Args:
      x: `[B, T, N, H]`, float16 to float64.
      cos, sin: `[B or 1, T, R]`, `R` even, `R <= H`.
      interleaved: rotate pairs `(x0, x1) -> (-x1, x0)` instead of halves `(a, b) -> (-b, a)`.
      out_dtype: of the result; x's by default.
    """
    return _rope((bool(interleaved), str(jnp.dtype(out_dtype or x.dtype))), x, cos, sin)


def _rotate(x: jax.Array, interleaved: bool, back: bool = False) -> jax.Array:
    """The quarter turn of every pair, or the turn back (its transpose)."""
    sign = -1 if back else 1
    if interleaved:
        return sign * jnp.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    a, b = jnp.split(x, 2, -1)
    return sign * jnp.concatenate([-b, a], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rope(static, x, cos, sin):
    interleaved, out_dtype = static
    acc = wide(x.dtype)
    r = cos.shape[-1]
    head, tail = x[..., :r].astype(acc), x[..., r:]
    c, s = cos[:, :, None].astype(acc), sin[:, :, None].astype(acc)
    y = (head * c + _rotate(head, interleaved) * s).astype(out_dtype)
    return y if r == x.shape[-1] else jnp.concatenate([y, tail.astype(out_dtype)], -1)


def _fwd(static, x, cos, sin):
    return _rope(static, x, cos, sin), (x, cos, sin)


def _bwd(static, residuals, g):
    interleaved, _ = static
    x, cos, sin = residuals
    acc = wide(x.dtype)
    r = cos.shape[-1]
    head, gh = x[..., :r].astype(acc), g[..., :r].astype(acc)
    c, s = cos[:, :, None].astype(acc), sin[:, :, None].astype(acc)
    dx = gh * c + _rotate(gh * s, interleaved, back=True)
    dx = dx if r == x.shape[-1] else jnp.concatenate([dx, g[..., r:].astype(acc)], -1)

    def over_heads(d: jax.Array, like: jax.Array) -> jax.Array:
        d = jnp.sum(d, 2)
        return (jnp.sum(d, 0, keepdims=True) if like.shape[0] == 1 and d.shape[0] != 1 else d).astype(like.dtype)

    return dx.astype(x.dtype), over_heads(gh * head, cos), over_heads(gh * _rotate(head, interleaved), sin)


_rope.defvjp(_fwd, _bwd)
