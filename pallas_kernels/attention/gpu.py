"""Attention for NVIDIA Hopper, forward and backward.

`hopper_forward.py` has a kernel, `hopper_backward.py` that for dk and dv, `hopper_backward_wide.py` that of head dims above 128,
`hopper_backward_queries.py` that for dq, and `hopper.py` what they share. Here are the mask's data, what becomes of queries that see no
key, and the derivative.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kpt.ops.base import Specs
from kpt.ops.mask import Lengths, Mask, Segments
from pallas_kernels.attention import hopper_backward_wide
from pallas_kernels.attention.blocks import static_terms, visible_range
from pallas_kernels.attention.calls import HEADS, LONGEST_TILE, Static, refused_on_one_hopper
from pallas_kernels.attention.hopper import numbers_of, padded
from pallas_kernels.attention.hopper_backward import gradients_of_keys
from pallas_kernels.attention.hopper_backward_queries import gradient_of_queries, sums_delta
from pallas_kernels.attention.hopper_forward import forward
from pallas_kernels.manual_axes import unpartitioned, vary_alike

NARROW = HEADS[-2]


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why these arrays cannot be taken, or None; with wide heads, by `attention.pallas_gpu_wide`."""
    if (head := _widest(specs)) > NARROW:
        return f"takes head dims up to {NARROW}, and attention.pallas_gpu_wide those above, and this is {head}"
    return unpartitioned() or refused_on_one_hopper(specs, params)


def refusal_wide(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """As `refusal`, for head dims above those."""
    if (head := _widest(specs)) <= NARROW:
        return f"takes head dims above {NARROW}, and attention.pallas_gpu those below, and this is {head}"
    return unpartitioned() or refused_on_one_hopper(specs, params)


def _widest(specs: Specs) -> int:
    return max(specs[n].shape[3] for n in "qkv")


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
    if Segments not in terms:
        q_segment_ids = kv_segment_ids = None
    data = numbers_of(static, q_segment_ids, kv_segment_ids, kv_lengths if Lengths in terms else None, b) if static.by_data else None
    width = next(width for width in HEADS if max(h, head_v) <= width)
    # A copy is of a whole tile: the engine reads zeros past the end of an array, but newer jax wants room for one.
    q, k, v = (padded(padded(a, 1, 8 if a.shape[1] > LONGEST_TILE else LONGEST_TILE), 3, width) for a in (q, k, v))
    return _attention(static, q, k, v, data)[:, :t, :, :head_v].astype(out_dtype or q.dtype)


def _in_batch(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` of arrays whose first axis is the batch; what `vmap` maps over becomes part of that axis."""

    @jax.custom_batching.custom_vmap
    def call(*arrays: Any) -> Any:
        return fn(*arrays)

    @call.def_vmap
    def _(size: int, mapped: Any, *arrays: Any) -> Any:
        def fold(a: jax.Array, is_mapped: bool) -> jax.Array:
            a = a if is_mapped else jnp.broadcast_to(a, (size, *a.shape))
            return a.reshape(-1, *a.shape[2:])

        out = call(*jax.tree.map(fold, arrays, tuple(mapped)))
        return jax.tree.map(lambda a: a.reshape(size, -1, *a.shape[1:]), out), jax.tree.map(lambda _: True, out)

    return call


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q, k, v, data):
    return _fwd(static, q, k, v, data)[0]


def _fwd(static, q, k, v, data):
    out, lse = _run(forward_rule, static, q, k, v, data)
    return out, (q, k, v, data, out, lse)


# Traced once for all layers that are alike: a kernel takes half a second to lower.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(fn, static, *arrays):
    return _in_batch(functools.partial(fn, static))(*arrays)


def forward_rule(static, q, k, v, data):
    """Result and logarithms of sums of arrays that need no padding, as `hopper_forward.forward` gives them."""
    blind = _mean_value(static, v, data) if static.may_be_blind and math.isfinite(static.mask.fill) else None
    # Inside `shard_map` a kernel's results are typed as if all devices held the same.
    return vary_alike(*forward(static, q, k, v, data, blind), q)[:2]


def _mean_value(static, v, data):
    """What queries get that see no key, `[B, K, Hv]`: the mean of all values, or anything where it is plain that there is none."""

    def mean(v: jax.Array) -> jax.Array:
        return jnp.sum(v.astype(jnp.float32), 1) / static.keys

    first, last = visible_range(Mask(static_terms(static.mask)), np.arange(static.queries), static.keys)
    place = np.arange(static.queries)
    if data is None or static.queries != static.keys or not np.all((first <= place) & (place < last)):
        return mean(v)
    each_sees_its_own = jnp.all(data[0] == data[1])
    return jax.lax.cond(each_sees_its_own, lambda v: jnp.zeros_like(mean(v)), mean, v)


def _bwd(static, residuals, g):
    return *_run(backward_rule, static, *residuals, g), None


def backward_rule(static, q, k, v, data, out, lse, g):
    """(dq, dk, dv), from what `forward_rule` took and gave, and the cotangent."""
    sees_none = jnp.isposinf(lse[:, :, : q.shape[1]])
    share = None
    if static.may_be_blind:
        share = _blind_share(static, sees_none & (jnp.arange(q.shape[1]) < static.queries), g, k.shape[2])
    if sums_delta(q.shape[3], v.shape[3]):
        of_keys, of_rows = gradients_of_keys, out
    else:
        delta = jnp.sum(out.astype(jnp.float32) * g.astype(jnp.float32), -1).transpose(0, 2, 1)
        of_keys, of_rows = hopper_backward_wide.gradients_of_keys, jnp.where(sees_none, 0.0, delta)
    dq, delta = gradient_of_queries(static, q, k, v, g, lse, of_rows, data)
    dk, dv = of_keys(static, q, k, v, g, lse, delta, data, share)
    return vary_alike(dq, dk, dv, q)[:3]


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
