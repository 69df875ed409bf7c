"""Rotary embedding in plain JAX. The backward pass is the rotation back, and needs the tables alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.activations import wide
from pallas_kernels.manual_axes import in_shard_map, vary_alike


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
    x, cos, sin = vary_alike(x, cos, sin)
    acc = wide(jnp.promote_types(x.dtype, jnp.promote_types(cos.dtype, sin.dtype)))
    return _rope((bool(interleaved), str(jnp.dtype(out_dtype or x.dtype)), str(acc), str(x.dtype)), x, cos, sin)


def _rotate(x: jax.Array, interleaved: bool, back: bool = False) -> jax.Array:
    """The quarter turn of every pair, or the turn back (its transpose)."""
    sign = -1 if back else 1
    if interleaved:
        return sign * jnp.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    a, b = jnp.split(x, 2, -1)
    return sign * jnp.concatenate([-b, a], -1)


def _turn(static, x, cos, sin):
    interleaved, out_dtype, acc, _ = static
    r = cos.shape[-1]
    head, tail = x[..., :r].astype(acc), x[..., r:]
    c, s = cos[:, :, None].astype(acc), sin[:, :, None].astype(acc)
    y = (head * c + _rotate(head, interleaved) * s).astype(out_dtype)
    return y if r == x.shape[-1] else jnp.concatenate([y, tail.astype(out_dtype)], -1)


def _back(static, g, cos, sin):
    interleaved, _, acc, x_dtype = static
    r = cos.shape[-1]
    gh = g[..., :r].astype(acc)
    c, s = cos[:, :, None].astype(acc), sin[:, :, None].astype(acc)
    dx = (gh * c + _rotate(gh * s, interleaved, back=True)).astype(x_dtype)
    return dx if r == g.shape[-1] else jnp.concatenate([dx, g[..., r:].astype(x_dtype)], -1)


def with_gradients(turn, back, tables):
    """`turn(static, x, cos, sin)` with the derivative rule of a rotation, which every kernel of this op has.

    Args:
      back: `back(static, g, cos, sin)`, the gradient of `x` from the cotangent of the result.
      tables: `tables(static, x, cos, sin, g)`, those of `cos` and `sin`.

    x may be a tuple of arrays; the results and gradients are one then, too.
    """

    def zeros_if_none(g):
        return jnp.zeros(g.shape, g.dtype) if isinstance(g, jax.custom_derivatives.SymbolicZero) else g

    def fwd(static, x, cos, sin):
        return turn(static, x, cos, sin), (x, cos, sin)

    def fwd_knowing(static, x, cos, sin):
        """Told which arguments have a gradient: x is kept only for those of the tables, constants in most models."""
        x = jax.tree.map(lambda a: a.value, x)
        kept = x if cos.perturbed or sin.perturbed else None
        return turn(static, x, cos.value, sin.value), (kept, cos.value, sin.value)

    def bwd(static, residuals, g):
        x, cos, sin = residuals
        g = jax.tree.map(zeros_if_none, g)
        return back(static, g, cos, sin), *((None, None) if x is None else tables(static, x, cos, sin, g))

    outside, inside = (jax.custom_vjp(turn, nondiff_argnums=(0,)) for _ in range(2))
    outside.defvjp(fwd_knowing, bwd, symbolic_zeros=True)
    # Inside an eager shard_map, jax (0.7 to 0.12) cannot tell a rule which arguments have a gradient.
    inside.defvjp(fwd, bwd)
    return lambda static, x, cos, sin: (inside if in_shard_map() else outside)(static, x, cos, sin)


def table_gradients(x, cos, sin, g, interleaved: bool, acc=jnp.float32):
    """Of `cos` and `sin`, from the cotangent `g` of the result, in plain JAX: few models learn their angles."""
    head, gh = (a[..., : cos.shape[-1]].astype(acc) for a in (x, g))

    def over_heads(d: jax.Array, like: jax.Array) -> jax.Array:
        d = jnp.sum(d, 2)
        return (jnp.sum(d, 0, keepdims=True) if like.shape[0] == 1 else d).astype(like.dtype)

    return over_heads(gh * head, cos), over_heads(gh * _rotate(head, interleaved), sin)


_rope = with_gradients(_turn, _back, lambda static, x, cos, sin, g: table_gradients(x, cos, sin, g, static[0], static[2]))
