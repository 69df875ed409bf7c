"""Linear layer and cross entropy in plain JAX: the logits exist for one chunk of tokens at a time.

When differentiated, the forward makes the gradients of the sum of the losses while it has the logits of a chunk, as
Liger-Kernel's fused linear cross entropy does (arXiv:2410.10989): three products, as many as plain code. That is all of
dx, whose rows the backward scales by the cotangents `g` of the tokens. In dw the rows are summed already, so it can be
scaled only where all have the same cotangent, as under a mean or a sum of losses that `weights` has weighted. The backward
looks at `g`, and where tokens differ all the same it makes dw anew from recomputed logits: two products more. Tokens with a
label outside the vocabulary are left out of the sum beforehand, since their losses are usually masked away.

Logits that fit one chunk are kept instead. A chunk takes every n-th token of the longest token dim, so that tokens
sharded over devices are cut alike on all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from kpt.errors import OpError
from kpt.kernels.stand_in import stood_for
from pallas_kernels.cross_entropy.xla import check, row_grad, row_loss
from pallas_kernels.manual_axes import vary_alike

CHUNK_BYTES = 64 * 2**20  # of logits; several arrays of that size are alive at once


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is known before tracing: the parameters of the loss, and how tokens are cut."""

    loss: tuple[float, float | None, str]
    axis: int
    chunks: int


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
    """`cross_entropy(x @ w + b, labels) * weights` without the logits, differentiable in x, w, b and weights (reverse mode).

    Products accumulate in float32, and the logits stay float32 (float64 for float64 x).

    Args:
      x: `[..., K]` float.
      w: `[K, V]` float.
      labels: `[...]` integers.
      b: `[V]` float, or None.
      weights: `[...]` float, or None for ones.
      label_smoothing, logits_soft_cap, invalid: as in `pallas_kernels.cross_entropy.xla.cross_entropy`.

    Returns:
      Loss `[...]`, float32 (float64 for float64 x).

    Raises:
      OpError: shapes do not fit, or `invalid` is unknown.
    """
    labels = check_arrays(x, w, labels, b, weights, invalid)
    x, w, b, labels, weights = vary_alike(x, w, b, labels, weights)
    static = _Static((label_smoothing, logits_soft_cap, invalid), *_cut(x.shape[:-1], w.shape[1]))
    if x.ndim == 1:
        return _loss(static, x[None], w, b, labels[None], None if weights is None else weights[None])[0]
    return _loss(static, x, w, b, labels, weights)


def check_arrays(
    x: jax.Array, w: jax.Array, labels: jax.Array, b: jax.Array | None, weights: jax.Array | None, invalid: str
) -> jax.Array:
    """The labels, as `check` gives them. Raises `OpError` unless the shapes fit and `invalid` is known."""
    asked = f"linear_cross_entropy of x{list(x.shape)} w{list(w.shape)}" + ("" if b is None else f" b{list(b.shape)}")
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[0] or (b is not None and b.shape != w.shape[1:]):
        raise OpError(asked, "x is [..., K], w is [K, V], b is [V]", "Check the axes")
    labels = check(asked, x.shape[:-1], labels, invalid)
    if weights is not None and weights.shape != labels.shape:
        raise OpError(f"{asked} weights{list(weights.shape)}", "weights are [...], one a token", "Check the axes")
    return labels


def _cut(tokens: tuple[int, ...], classes: int) -> tuple[int, int]:
    """The token dim to cut, and into how many chunks: without a rest if that takes less than twice as many."""
    if not tokens:
        return 0, 1
    axis = max(range(len(tokens)), key=lambda a: tokens[a])
    total = 4 * math.prod(stood_for("x", (*tokens, 0))[:-1]) * stood_for("w", (0, classes))[1]
    least = max(1, min(tokens[axis], -(-total // CHUNK_BYTES)))
    return axis, next((c for c in range(least, 2 * least) if tokens[axis] % c == 0), least)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(static: _Static, x, w, b, labels, weights):
    """Without a derivative: one product."""

    def chunk(_, x, labels):
        return None, row_loss(_logits(x, w, b), labels, *static.loss)[0]

    return _times(_over_chunks(static, chunk, None, x, labels)[1], weights)


def _fwd(static: _Static, x, w, b, labels, weights):
    if static.chunks == 1:
        logits = _logits(x, w, b)
        loss, m, total = row_loss(logits, labels, *static.loss)
        return _times(loss, weights), (x, w, b, labels, weights, loss, m, total, logits)

    def chunk(sums, x, labels, *weights):
        logits = _logits(x, w, b)
        loss, m, total = row_loss(logits, labels, *static.loss)
        d = row_grad(logits, labels, m, 1 / total, jnp.ones_like(m), *static.loss)
        # Left out by a factor 0, not by a choice: 0 times NaN is NaN, as in plain code.
        weight = _times(counted_tokens(labels, w).astype(d.dtype), *weights)
        return _add_row_sums(sums, x, d, weight), (loss, m, total, _times_w(d, w))

    sums, (loss, m, total, dx) = _over_chunks(static, chunk, _zero_sums(x, w, b), x, labels, *([] if weights is None else [weights]))
    return _times(loss, weights), (x, w, b, labels, weights, loss, m, total, (dx, sums))


def _bwd(static: _Static, residuals, g):
    x, w, b, labels, weights, loss, m, total, made = residuals
    each = _times(g, weights)
    if static.chunks == 1:
        d = row_grad(made, labels, m, 1 / total, each, *static.loss)
        dx, (dw, db) = _times_w(d, w), _add_row_sums(_zero_sums(x, w, b), x, d)
    else:

        def chunk(sums, x, labels, m, scale, g):
            return _add_row_sums(sums, x, row_grad(_logits(x, w, b), labels, m, scale, g, *static.loss)), ()

        dx, sums = made
        counted = counted_tokens(labels, w)
        free = jnp.zeros(labels.shape, bool) if weights is None else weights == 0  # whatever their cotangent is
        counted = counted & ~free
        c = jnp.max(jnp.where(counted, g, -jnp.inf), initial=-jnp.inf)
        c = jnp.where(jnp.any(counted), c, 0)
        alike = jnp.all((g == jnp.where(counted, c, 0)) | free)
        dw, db = lax.cond(
            alike,
            lambda: jax.tree.map(lambda a: c * a, sums),
            lambda: _over_chunks(static, chunk, _zero_sums(x, w, b), x, labels, m, 1 / total, each)[0],
        )
        dx = each[..., None] * dx
    dweights = None if weights is None else (g * loss).astype(weights.dtype)
    return dx.astype(x.dtype), dw.astype(w.dtype), None if b is None else db.astype(b.dtype), None, dweights


_loss.defvjp(_fwd, _bwd)


def _times(each, weights=None):
    return each if weights is None else each * weights.astype(each.dtype)


def counted_tokens(labels, w):
    """Tokens whose gradients the forward sums."""
    return (labels >= 0) & (labels < w.shape[1])


def _zero_sums(x, w, b):
    dtype = _acc_dtype(x)
    dw, db, _ = vary_alike(jnp.zeros(w.shape, dtype), None if b is None else jnp.zeros(b.shape, dtype), x)
    return dw, db


def _add_row_sums(sums, x, d, weight=None):
    """Adds the gradients of w and b, given those of the logits and a weight for each token."""
    dw, db = sums
    x = x.astype(d.dtype) if weight is None else x.astype(d.dtype) * weight[..., None]
    dw = dw + jnp.einsum("...k,...v->kv", x, d)
    if db is not None:
        db = db + (jnp.sum(d, range(d.ndim - 1)) if weight is None else jnp.einsum("...,...v->v", weight, d))
    return dw, db


def _times_w(d, w):
    return jnp.einsum("...v,kv->...k", d, w.astype(d.dtype))


def _acc_dtype(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _logits(x, w, b):
    acc_dtype = _acc_dtype(x)
    z = jnp.einsum("...k,kv->...v", x.astype(acc_dtype), w.astype(acc_dtype), preferred_element_type=acc_dtype)
    return z if b is None else z + b.astype(acc_dtype)


def _over_chunks(static: _Static, chunk, carry, *arrays):
    """Scans `carry, out = chunk(carry, *parts)` over the chunks of the tokens and puts the outs together again."""
    axis, chunks = static.axis, static.chunks
    if chunks == 1:
        return chunk(carry, *arrays)
    length = arrays[0].shape[axis]
    even = length - length % chunks

    def split(a):  # [.., n * chunks, ..] -> [chunks, .., n, ..]: chunk c has the tokens c, c + chunks, ...
        a = lax.slice_in_dim(a, 0, even, axis=axis)
        a = a.reshape(*a.shape[:axis], even // chunks, chunks, *a.shape[axis + 1 :])
        return jnp.moveaxis(a, axis + 1, 0)

    def join(a):
        a = jnp.moveaxis(a, 0, axis + 1)
        return a.reshape(*a.shape[:axis], even, *a.shape[axis + 2 :])

    carry, outs = lax.scan(lambda carry, parts: chunk(carry, *parts), carry, [split(a) for a in arrays])
    outs = jax.tree.map(join, outs)
    if even < length:
        carry, rest = chunk(carry, *(lax.slice_in_dim(a, even, length, axis=axis) for a in arrays))
        outs = jax.tree.map(lambda a, r: jnp.concatenate([a, r], axis), outs, rest)
    return carry, outs
