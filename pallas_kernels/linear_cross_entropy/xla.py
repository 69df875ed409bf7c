"""Linear layer and cross entropy in plain JAX: the logits exist for one chunk of tokens at a time.

The forward keeps two numbers a token, the maximum and the sum of its softmax; the backward recomputes the logits of a chunk
from `x` and `w`. (Gradients cannot be made in the forward: the cotangent of each token scales its own row inside the sum that
is dw.) The idea of chunking tokens is that of Liger-Kernel's fused linear cross entropy (arXiv:2410.10989).

A chunk takes every n-th token of the longest token dim, so that tokens sharded over devices are cut alike on all of them.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from kpt.errors import OpError
from pallas_kernels.cross_entropy.xla import check, row_grad, row_loss

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
    label_smoothing: float = 0.0,
    logits_soft_cap: float | None = None,
    invalid: str = "nan",
) -> jax.Array:
    """`cross_entropy(x @ w + b, labels)` without the logits, differentiable in x, w and b (reverse mode).

    Products accumulate in float32, and the logits stay float32 (float64 for float64 x).

    Args:
      x: `[..., K]` float.
      w: `[K, V]` float.
      labels: `[...]` integers.
      b: `[V]` float, or None.
      label_smoothing, logits_soft_cap, invalid: as in `pallas_kernels.cross_entropy.xla.cross_entropy`.

    Returns:
      Loss `[...]`, float32 (float64 for float64 x).

    Raises:
      OpError: shapes do not fit, or `invalid` is unknown.
    """
    asked = f"linear_cross_entropy of x{list(x.shape)} w{list(w.shape)}" + ("" if b is None else f" b{list(b.shape)}")
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[0] or (b is not None and b.shape != w.shape[1:]):
        raise OpError(asked, "x is [..., K], w is [K, V], b is [V]", "check the axes")
    check(asked, x.shape[:-1], labels, invalid)
    static = _Static((label_smoothing, logits_soft_cap, invalid), *_cut(x.shape[:-1], w.shape[1]))
    if x.ndim == 1:
        return _loss(static, x[None], w, b, labels[None])[0]
    return _loss(static, x, w, b, labels)


def _cut(tokens: tuple[int, ...], classes: int) -> tuple[int, int]:
    """The token dim to cut, and into how many chunks."""
    if not tokens:
        return 0, 1
    axis = max(range(len(tokens)), key=lambda a: tokens[a])
    total = 4 * classes
    for n in tokens:
        total *= n
    return axis, max(1, min(tokens[axis], -(-total // CHUNK_BYTES)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(static: _Static, x, w, b, labels):
    return _fwd(static, x, w, b, labels)[0]


def _fwd(static: _Static, x, w, b, labels):
    def chunk(_, x, labels):
        return None, row_loss(_logits(x, w, b), labels, *static.loss)

    _, (loss, m, total) = _over_chunks(static, chunk, None, x, labels)
    return loss, (x, w, b, labels, m, total)


def _bwd(static: _Static, residuals, g):
    x, w, b, labels, m, total = residuals
    acc_dtype = m.dtype

    def chunk(grads, x, labels, m, scale, g):
        dw, db = grads
        d = row_grad(_logits(x, w, b), labels, m, scale, g, *static.loss)
        dw = dw + jnp.einsum("...k,...v->kv", x.astype(acc_dtype), d)
        db = None if b is None else db + jnp.sum(d, range(d.ndim - 1))
        return (dw, db), jnp.einsum("...v,kv->...k", d, w.astype(acc_dtype)).astype(x.dtype)

    start = jnp.zeros(w.shape, acc_dtype), None if b is None else jnp.zeros(b.shape, acc_dtype)
    (dw, db), dx = _over_chunks(static, chunk, start, x, labels, m, 1 / total, g)
    return dx, dw.astype(w.dtype), None if b is None else db.astype(b.dtype), None


_loss.defvjp(_fwd, _bwd)


def _logits(x, w, b):
    acc_dtype = jnp.promote_types(x.dtype, jnp.float32)
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
