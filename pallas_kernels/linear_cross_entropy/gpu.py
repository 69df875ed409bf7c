"""Linear layer and cross entropy for NVIDIA Hopper: the logits of some tokens at a time, in the dtype of x.

Products are XLA's, which are at the ceiling, but for one: XLA would add dw of a chunk to dw of those before in a pass of its own, and
with both in memory. A chunk of tokens is as large as fits `CHUNK_BYTES` of logits: the fewer chunks, the fewer passes over dw. Between
its products a chunk is read once for the statistics of its rows (`pallas_kernels.cross_entropy.gpu`), and once more to be replaced by
its gradient in place.

When differentiated, the forward makes the gradients of the sum of the losses, and the backward scales them, as in
`pallas_kernels.linear_cross_entropy.xla`; so too what happens where tokens differ in their cotangents. Logits that fit one chunk are
kept instead.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kpt.kernels.stand_in import stood_for
from kpt.ops.base import Specs
from pallas_kernels.cross_entropy.gpu import refusal as too_few_classes
from pallas_kernels.cross_entropy.gpu import row_statistics
from pallas_kernels.cross_entropy.xla import row_grad
from pallas_kernels.hopper_gemm import add_product
from pallas_kernels.hopper_gemm import refusal as no_product
from pallas_kernels.linear_cross_entropy.xla import check_arrays, counted_tokens
from pallas_kernels.manual_axes import vary_alike

CHUNK_BYTES = 2**30
"""Of logits. One such array is alive at a time."""
_TOKENS = 128
"""A chunk has a multiple of so many, for the tiles of its products."""


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why these arrays cannot be taken, or None."""
    x, w = specs["x"], specs["w"]
    if (why := too_few_classes({"logits": w}, params)) is not None:
        return why
    if x.dtype != w.dtype:
        return f"multiplies arrays of one dtype, and these are {x.dtype} and {w.dtype}"
    if 0 in x.shape:
        return "has no empty arrays"
    several = len(chunks(math.prod(x.shape[:-1]), w.shape[1])) > 1
    return no_product({"x": x, "w": w}, {}) if several else None


def linear_cross_entropy(
    *,
    x: jax.Array,
    w: jax.Array,
    labels: jax.Array,
    b: jax.Array | None = None,
    weights: jax.Array | None = None,
    label_smoothing: float = 0.0,
    logits_soft_cap: float | None = None,
    invalid: str = "nan",
) -> jax.Array:
    """`cross_entropy(x @ w + b, labels) * weights` without all of the logits, differentiable in x, w, b and weights (reverse mode).

    Products accumulate in float32. Logits and their gradients are rounded to x's dtype, and so is dw after each chunk of tokens.

    Args:
      x: `[..., K]` bfloat16 or float16.
      w: `[K, V]`, of the same dtype.
      labels: `[...]` integers.
      b: `[V]` float, or None.
      weights: `[...]` float, or None for ones.
      label_smoothing, logits_soft_cap, invalid: as in `pallas_kernels.cross_entropy.xla.cross_entropy`.

    Returns:
      Loss `[...]`, float32.

    Raises:
      OpError: shapes do not fit, or `invalid` is unknown.
    """
    labels = check_arrays(x, w, labels, b, weights, invalid)
    by_token = (None if a is None else a.reshape(-1) for a in (labels, weights))
    arrays = vary_alike(x.reshape(-1, x.shape[-1]), w, b, *by_token)
    return _loss((label_smoothing, logits_soft_cap, invalid), *arrays).reshape(labels.shape)


def chunks(tokens: int, classes: int) -> list[slice]:
    """Of tokens, of equal length but for the last one."""
    long = math.prod(stood_for("x", (tokens, 0))[:-1]), stood_for("w", (0, classes))[1]
    least = -(-math.prod(long) * 2 // CHUNK_BYTES)
    length = max(-(-tokens // (least * _TOKENS)) * _TOKENS, _TOKENS)
    return [slice(start, min(start + length, tokens)) for start in range(0, tokens, length)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(static, x, w, b, labels, weights):
    """Without a derivative: one product."""

    def chunk(_: None, x: Any, labels: Any) -> Any:
        return None, (row_statistics(_logits(x, w, b), labels, *static)[0],)

    return _times(_over_chunks(w, chunk, None, x, labels)[1][0], weights)


def _fwd(static, x, w, b, labels, weights):
    if len(chunks(len(x), w.shape[1])) == 1:
        z = _logits(x, w, b)
        loss, m, total = row_statistics(z, labels, *static)
        return _times(loss, weights), (x, w, b, labels, weights, loss, m, total, z)

    scale, each = _weighted(counted_tokens(labels, w) if weights is None else jnp.where(counted_tokens(labels, w), weights, 0))

    def chunk(sums: Any, x: Any, labels: Any, each: Any) -> Any:
        z = _logits(x, w, b)
        loss, m, total = row_statistics(z, labels, *static)
        d = _gradient(static, z, labels, m, total)
        return _add(sums, x, d, b, each), (loss, m, total, _times_w(d, w, x.dtype))

    sums, (loss, m, total, dx) = _over_chunks(w, chunk, (None, None), x, labels, each)
    return _times(loss, weights), (x, w, b, labels, weights, loss, m, total, (dx, sums, scale))


def _bwd(static, residuals, g):
    x, w, b, labels, weights, loss, m, total, made = residuals
    by_token = _times(g, weights)
    if isinstance(made, jax.Array):
        scale, each = _weighted(by_token)
        d = _gradient(static, made, labels, m, total)
        (dw, db), dx = _add((None, None), x, d, b, each), _times_w(d, w, x.dtype)
    else:
        dx, sums, scale = made
        free = jnp.zeros(labels.shape, bool) if weights is None else weights == 0  # whatever their cotangent is
        counted = counted_tokens(labels, w) & ~free
        c = jnp.max(jnp.where(counted, g, -jnp.inf))
        c = jnp.where(jnp.any(counted), c, 0)
        alike = jnp.all((g == jnp.where(counted, c, 0)) | free)
        other, each = _weighted(by_token)

        def chunk(sums: Any, x: Any, labels: Any, m: Any, total: Any, each: Any) -> Any:
            return _add(sums, x, _gradient(static, _logits(x, w, b), labels, m, total), b, each), ()

        dw, db = lax.cond(alike, lambda: sums, lambda: _over_chunks(w, chunk, (None, None), x, labels, m, total, each)[0])
        scale = jnp.where(alike, scale * c, other)
    dx = (by_token[:, None] * dx).astype(x.dtype)
    db = None if b is None else (scale * db).astype(b.dtype)
    dweights = None if weights is None else (g * loss).astype(weights.dtype)
    return dx, (scale * dw).astype(w.dtype), db, None, dweights


_loss.defvjp(_fwd, _bwd)


def _times(each: jax.Array, weights: jax.Array | None) -> jax.Array:
    return each if weights is None else each * weights.astype(each.dtype)


def _weighted(each: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights of tokens as a scale and what is left of them, up to 1: a narrow dtype holds that, and not all of `1e-4`."""
    each = each.astype(jnp.float32)
    scale = jnp.max(jnp.abs(each))
    scale = jnp.where((scale > 0) & jnp.isfinite(scale), scale, 1)
    return scale, each / scale


def _logits(x: jax.Array, w: jax.Array, b: jax.Array | None) -> jax.Array:
    z = jnp.dot(x, w)
    return z if b is None else z + b.astype(z.dtype)


def _gradient(static, z, labels, m, total):
    """Of the loss with respect to logits `z`, in their place."""
    return row_grad(z.astype(jnp.float32), labels, m, 1 / total, jnp.ones_like(m), *static).astype(z.dtype)


def _times_w(d: jax.Array, w: jax.Array, dtype: Any) -> jax.Array:
    return lax.dot_general(d, w, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def _add(sums: Any, x: jax.Array, d: jax.Array, b: jax.Array | None, each: jax.Array) -> Any:
    """Adds the gradients of w and b, given those of the logits and a weight of each token."""
    dw, db = sums
    rows = ((0,), (0,)), ((), ())
    x = (x * each[:, None]).astype(x.dtype)
    dw = lax.dot_general(x, d, rows) if dw is None else add_product(dw, x, d)
    if b is not None:
        more = lax.dot_general(each.astype(d.dtype), d, rows, preferred_element_type=jnp.float32)
        db = more if db is None else db + more
    return dw, db


def _over_chunks(w: jax.Array, chunk: Callable[..., Any], carry: Any, x: jax.Array, *arrays: jax.Array) -> Any:
    """`carry, out = chunk(carry, *parts)` over the chunks of the tokens, and the outs put together again.

    A barrier keeps the compiler from making a chunk's logits before those of the chunk before it are gone.
    """
    outs: list[Any] = []
    for part in chunks(len(x), w.shape[1]):
        parts = (x[part], *(a[part] for a in arrays))
        if outs:
            parts, carry, outs = lax.optimization_barrier((parts, carry, outs))
        carry, out = chunk(carry, *parts)
        outs.append(out)
    return carry, tuple(jnp.concatenate(pieces) for pieces in zip(*outs, strict=True))
