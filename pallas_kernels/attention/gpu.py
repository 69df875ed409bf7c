"""Attention for NVIDIA Hopper, forward and backward: a kernel each.

`hopper_forward.py` and `hopper_backward.py` have the kernels, `hopper.py` what they share. Here are the mask's data, what becomes of
queries that see no key, and the derivative.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kpt.ops.base import Specs
from kpt.ops.mask import Causal, Lengths, Mask, Segments, Window
from pallas_kernels.attention import cudnn
from pallas_kernels.attention.blocks import visible_range
from pallas_kernels.attention.hopper import Static, numbers, padded
from pallas_kernels.attention.hopper_backward import backward, backward_queries, ordered, sums_shape
from pallas_kernels.attention.hopper_forward import forward
from pallas_kernels.manual_axes import in_shard_map, unpartitioned, vary_alike

HEADS = (64, 128)
"""Head dims that there are kernels for; others are padded with zeros."""


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why these arrays cannot be taken, or None."""
    if (why := unpartitioned()) is not None:
        return why
    q, k, v = (specs[n] for n in "qkv")
    mask: Mask = params.get("mask") or Mask()
    if len({a.dtype for a in (q, k, v)}) > 1:
        return f"takes q, k and v of one dtype, and these are {q.dtype}, {k.dtype} and {v.dtype}"
    if 0 in (*q.shape, *k.shape, *v.shape):
        return "takes no empty arrays"
    head, head_v = q.shape[3], v.shape[3]
    if max(head, head_v) > HEADS[-1]:
        return f"keeps sums of head dims up to {HEADS[-1]} in registers, and these are {head} and {head_v}"
    if (params.get("out_dtype") or q.dtype) not in (q.dtype, "float16", "bfloat16"):
        return f"rounds its output to {q.dtype}, and {params['out_dtype']} was asked for"
    if math.isfinite(mask.fill) and mask.fill > -1e9:
        return f"gives hidden keys no weight, and a score of {mask.fill} may have some"
    if head not in HEADS and cudnn.refusal(specs, params) is None:
        return f"pads head dims to {' or '.join(map(str, HEADS))}, and cuDNN takes {head} as it is"
    return None


def attention(
    *,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    kv_lengths: jax.Array | None = None,
    mask: Mask = Mask(),  # noqa: B008  (frozen)
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    out_dtype: str | None = None,
) -> jax.Array:
    """`softmax(fill(cap(scale q k^T), mask)) v`, scores and sums in float32, weights rounded to the inputs' dtype.

    Args:
      q: `[B, T, N, H]` bfloat16 or float16.
      k, v: `[B, S, K, H]` and `[B, S, K, Hv]` in q's dtype; query head `n` reads key head `n // (N // K)`.
      q_segment_ids, kv_segment_ids: `[B, T]` and `[B, S]` integers.
      kv_lengths: `[B]` integers.
      mask: of causality, windows, segments and lengths.
      scale: of the scores; `1 / sqrt(H)` if None.
      logits_soft_cap: `c` in `c tanh(score / c)`.
      out_dtype: of the result; q's by default.

    Returns:
      `[B, T, N, Hv]`. A query all of whose visible scores are -inf gets what one gets that sees no key.
    """
    (b, t, _, h), (_, s, _, head_v) = q.shape, v.shape
    scale = 1 / math.sqrt(h) if scale is None else float(scale)
    if scale <= 0:  # the softmax multiplies differences of scores with a positive number
        q, scale = (-q, -scale) if scale else (q * 0, 1.0)
    static = Static(mask, scale, logits_soft_cap, t, s)
    q, k, v, q_segment_ids, kv_segment_ids, kv_lengths = vary_alike(q, k, v, q_segment_ids, kv_segment_ids, kv_lengths)
    terms = {type(term) for term in mask.terms}
    segments = (q_segment_ids, kv_segment_ids) if Segments in terms else (None, None)
    data = numbers(static, *segments, kv_lengths if Lengths in terms else None, b) if static.by_data else None
    width = HEADS[0] if max(h, head_v) <= HEADS[0] else HEADS[1]
    q, k, v = (padded(padded(a, 1, 8), 3, width) for a in (q, k, v))
    return _attention(static, q, k, v, data)[:, :t, :, :head_v].astype(out_dtype or q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q, k, v, data):
    return _fwd(static, q, k, v, data)[0]


def _fwd(static, q, k, v, data):
    blind = _mean_value(static, v, data) if static.may_be_blind and math.isfinite(static.mask.fill) else None
    out, lse = vary_alike(*forward(static, q, k, v, data, blind), q)[:2]
    return out, (q, k, v, data, out, lse)


def _mean_value(static, v, data):
    """What queries get that see no key, `[B, K, Hv]`: the mean of all values, or anything where it is plain that there is none."""

    def mean(v: jax.Array) -> jax.Array:
        return jnp.sum(v.astype(jnp.float32), 1) / static.keys

    if data is None:
        return mean(v)
    q_numbers, kv_numbers = data
    itself = Mask(tuple(term for term in static.mask.terms if isinstance(term, Causal | Window)))
    first, last = visible_range(itself, np.arange(static.queries), static.keys)
    place = np.arange(static.queries)
    if static.queries == static.keys and bool(np.all((first <= place) & (place < last))):
        none = jnp.all(q_numbers == kv_numbers)  # each query sees the key at its own place
        return jax.lax.cond(none, lambda v: jnp.zeros_like(mean(v)), mean, v)
    return mean(v)


def _bwd(static, residuals, g):
    q, k, v, data, out, lse = residuals
    sees_none = jnp.isposinf(lse[:, :, : q.shape[1]])
    delta = jnp.sum(out.astype(jnp.float32) * g.astype(jnp.float32), -1).transpose(0, 2, 1)
    delta = jnp.where(sees_none, 0.0, delta)
    share = None
    if static.may_be_blind:
        share = _blind_share(static, sees_none & (jnp.arange(q.shape[1]) < static.queries), g, k.shape[2])
    arrays = (q, k, v, g, lse, delta, data)
    if in_shard_map():  # jax 0.11 gives kernels no references that differ from device to device
        dk, dv = backward(static, *arrays, blind=share)
        dq = backward_queries(static, *arrays)
    else:
        b, t, n, head = q.shape
        sums = jax.new_ref(jnp.zeros(sums_shape(b, t, n, head), jnp.float32))
        dk, dv = backward(static, *arrays, blind=share, dq=sums)
        dq = (ordered(jax.freeze(sums), t) * static.scale).astype(q.dtype)
    return *vary_alike(dq, dk, dv, q)[:3], None


def _blind_share(static, sees_none, g, kv_heads):
    """What all keys get of the cotangents of queries that see none, `[B, K, Hv]`: to them all values counted alike."""

    def share(g: jax.Array) -> jax.Array:
        b, t, n, width = g.shape
        lost = jnp.where(sees_none.transpose(0, 2, 1)[..., None], g.astype(jnp.float32), 0.0)
        total = lost.reshape(b, t, kv_heads, n // kv_heads, width).sum((1, 3)) / static.keys
        if math.isfinite(static.mask.fill):
            return total
        any_of_head = sees_none.reshape(b, kv_heads, -1).any(-1)
        return jnp.where(any_of_head[..., None], jnp.nan, total)

    return jax.lax.cond(jnp.any(sees_none), share, lambda g: jnp.zeros_like(share(g)), g)


_attention.defvjp(_fwd, _bwd)
