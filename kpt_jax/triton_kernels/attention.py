"""Attention in JAX, forward and backward, by the Triton kernels of `jitted/attention.py`."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import triton

from kpt.ops.base import Specs
from kpt.ops.mask import Mask
from kpt_jax.triton_kernels.launch import Out, chip, launch, over_rows
from kpt_torch.triton_kernels.jitted import attention as jitted
from pallas_kernels.manual_axes import unpartitioned, vary_alike

DELTA_ROWS = 32


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why the kernels cannot take a call, in one clause, or None."""
    return unpartitioned() or jitted.refusal(specs, params)


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
    """`softmax(fill(cap(scale q k^T), mask)) v`, scores and sums in float32.

    Args:
      q: `[B, T, N, H]` float16, bfloat16 or float32.
      k, v: `[B, S, K, H]` and `[B, S, K, Hv]` in q's dtype; query head `n` reads key head `n // (N // K)`.
      q_segment_ids, kv_segment_ids: `[B, T]` and `[B, S]` integers.
      kv_lengths: `[B]` integers.
      mask: of causality, windows, segments and lengths.
      scale: of the scores; `1 / sqrt(H)` if None.
      logits_soft_cap: `c` in `c tanh(score / c)`.
      out_dtype: of the result; q's by default.

    Returns:
      `[B, T, N, Hv]`.
    """
    given = {"q_segment_ids": q_segment_ids, "kv_segment_ids": kv_segment_ids, "kv_lengths": kv_lengths}
    ids = (a if n in mask.operands else None for n, a in given.items())
    static = (mask, None if scale is None else float(scale), logits_soft_cap, str(jnp.dtype(out_dtype or q.dtype)))
    return _attention(static, *vary_alike(q, k, v, *ids))


def _params(static: Any) -> dict[str, Any]:
    return dict(zip(("mask", "scale", "logits_soft_cap", "out_dtype"), static, strict=True))


def _strides(*arrays: jax.Array) -> list[int]:
    """Of batch, position and head of each array."""
    return [s for a in arrays for s in (math.prod(a.shape[1:]), math.prod(a.shape[2:]), a.shape[3])]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, *arrays):
    return _run(_forward, (static, False), *arrays)[0]


def _fwd(static, *arrays):
    out, lse, wide = _run(_forward, (static, True), *arrays)
    return out, (arrays, out if wide is None else wide, lse)


def _bwd(static, residuals, g):
    (q, k, v, *ids), out, lse = residuals
    return *_run(_backward, (static,), q, k, v, *ids, out, lse, g), None, None, None


_attention.defvjp(_fwd, _bwd)


# Traced once for all layers that are alike.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(fn, static, *arrays):
    return over_rows(functools.partial(fn, *static))(*arrays)


def _forward(static, keep: bool, q, k, v, q_ids, kv_ids, lengths):
    """(result, logsumexp of each query, the result in float32 if that is kept and another array)."""
    params = _params(static)
    if params["scale"] is not None and params["scale"] <= 0:
        # The most of scores is looked for among the products. 0 times what is hidden, -inf, would be NaN.
        q, params = -q, params | {"scale": max(-params["scale"], 1e-37)}
    numbers, constants = jitted.sizes(q.shape, k.shape, v.shape, params)
    batch, queries, heads, _ = q.shape
    out = Out((batch, queries, heads, v.shape[-1]), params["out_dtype"])
    wide = Out(out.shape, jnp.float32) if keep and out.dtype != jnp.float32 else None
    averaged = jitted.may_be_empty(params["mask"]) and math.isfinite(params["mask"].fill)
    means = jnp.mean(v, 1, dtype=jnp.float32) if averaged else None
    tiles = jitted.tiles(chip().family, q.dtype.itemsize, constants)
    t = tiles.busy if constants["CAP"] or q_ids is not None else tiles.forward
    made = launch(
        jitted.forward_blocks, (batch * heads * triton.cdiv(queries, t.queries),),
        q, k, v, q_ids, kv_ids, lengths, means, out, wide, Out((batch, heads, queries), jnp.float32), *_strides(q, k, v), *numbers,
        **constants, QUERIES=t.queries, KEYS=t.keys, warps=t.warps, stages=t.stages,
    )  # fmt: skip
    return made["out"], made["lse"], made.get("wide")


def _backward(static, q, k, v, q_ids, kv_ids, lengths, out, lse, g):
    """(dq, dk, dv)."""
    params, g = _params(static), g.astype(q.dtype)
    numbers, constants = jitted.sizes(q.shape, k.shape, v.shape, params)
    (batch, queries, heads, _), (keys, shared), v_width = q.shape, k.shape[1:3], v.shape[-1]
    dq, dk, dv = (Out(a.shape, a.dtype) for a in (q, k, v))
    tiles, strides = jitted.tiles(chip().family, q.dtype.itemsize, constants), _strides(q, k, v, g)
    delta = launch(
        jitted.delta_rows, (batch * heads * triton.cdiv(queries, DELTA_ROWS),),
        out, g, lse, Out(lse.shape, lse.dtype), *_strides(g), queries, heads, v_width, V_HEAD=constants["V_HEAD"], QUERIES=DELTA_ROWS,
    )["delta"]  # fmt: skip
    given = (q, k, v, g, lse, delta, q_ids, kv_ids, lengths)
    t = tiles.dq
    made = launch(
        jitted.queries_backward, (batch * heads * triton.cdiv(queries, t.queries),), *given, dq, *strides, *numbers,
        **constants, QUERIES=t.queries, KEYS=t.keys, warps=t.warps, stages=t.stages,
    )  # fmt: skip
    t = tiles.dkv
    made |= launch(
        jitted.keys_backward, (batch * shared * triton.cdiv(keys, t.keys),), *given, dk, dv, *strides, *numbers,
        **constants, QUERIES=t.queries, KEYS=t.keys, STAGES=t.stages, warps=t.warps,
    )  # fmt: skip
    return made["dq"], made["dk"], _with_unseen(params["mask"], made["dv"], g, lse)


def _with_unseen(mask: Mask, dv, g, lse):
    """dv with what queries leave there that see no key: their probabilities are those of equal scores, or NaN."""
    if not jitted.may_be_empty(mask):
        return dv
    batch, keys, shared, width = dv.shape
    unseen = (lse == math.inf).swapaxes(1, 2)[..., None]
    if math.isfinite(mask.fill):
        each = jnp.sum(jnp.where(unseen, g.astype(jnp.float32), 0.0), 1) / keys
    else:
        each = jnp.broadcast_to(jnp.where(jnp.any(unseen, 1), math.nan, 0.0), (*lse.shape[:2], width))
    spread = jnp.sum(each.reshape(batch, shared, -1, width), 2)
    return (dv.astype(jnp.float32) + spread[:, None]).astype(dv.dtype)
