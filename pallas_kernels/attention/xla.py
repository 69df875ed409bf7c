"""Attention in plain JAX: online softmax over blocks, memory linear in both sequence lengths, forward and backward.

The score matrix exists one block at a time. The forward keeps for each query the running maximum `m` and sum `l` of its
softmax (Milakov and Gimelshein 2018, arXiv:1805.02867; Rabe and Staats 2021, arXiv:2112.05682); the backward recomputes the
blocks from `q, k, v, out, m, l` (Dao et al. 2022, arXiv:2205.14135, algorithm 4). Blocks that causality or a window hides
are never visited, and blocks that they leave whole are computed without building a mask.

Shardings survive: batch and head dims are never merged, sliced or padded, only the sequence dims are. Where XLA may
partition the program, the sequence of queries is not cut either: devices that hold parts of it go through the keys
together, at the price of blocks that causality hides.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kpt.errors import OpError
from kpt.ops.mask import Bias, Causal, Explicit, Lengths, Mask, Segments, Window
from pallas_kernels.attention.blocks import Blocks, data_terms, tile
from pallas_kernels.manual_axes import in_shard_map, vary_alike

# Layouts used inside: B batch, K kv heads, G query heads per kv head, T queries, S keys, H head dim. Queries come last and a block
# of scores is `[B, K, S, G, T]`, because all five products of the backward are then plain row-major matrix products on a CPU
# (measured: a product that contracts the major dim of the block runs at a third of the speed), and the softmax reduces a major dim,
# which vectorises.
_KEYS, _ROWS = 2, 4


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is known before tracing; hashable, since it selects the trace."""

    mask: Mask
    scale: float
    cap: float | None
    out_dtype: str
    block_q: int
    block_kv: int


def attention(
    *,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None = None,
    keep: jax.Array | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    kv_lengths: jax.Array | None = None,
    mask: Mask = Mask(),  # noqa: B008  (frozen)
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    out_dtype: str | None = None,
) -> jax.Array:
    """`softmax(fill(cap(scale * q k^T) + bias, mask)) v`, differentiable in q, k, v and bias (reverse mode).

    Scores, softmax and sums are float32 (float64 for float64 inputs). With a finite `mask.fill`, hidden scores take that value
    exactly as `kpt.ops.mask.Mask` says, also where whole blocks are skipped.

    Args:
      q: `[B, T, N, H]` float16, bfloat16, float32 or float64.
      k: `[B, S, K, H]`, `N % K == 0`; query head `n` reads kv head `n // (N // K)`.
      v: `[B, S, K, Hv]`.
      bias: added to the scores after the cap; rank 4, each dim 1 or that of `[B, N, T, S]`. Its gradient is summed over dims of 1.
      keep: bool, True where a key is visible; shaped as `bias`.
      q_segment_ids, kv_segment_ids: `[B, T]` and `[B, S]` integers.
      kv_lengths: `[B]` integers.
      mask: which keys each query sees. Its terms say which of the operands above are read.
      scale: of the scores; `1 / sqrt(H)` if None.
      logits_soft_cap: `c` in `c * tanh(score / c)`; none if None.
      out_dtype: dtype name of the output; q's if None.

    Returns:
      `[B, T, N, Hv]`.

    Raises:
      OpError: shapes or operands do not fit together.
    """
    operands = {"bias": bias, "keep": keep, "q_segment_ids": q_segment_ids, "kv_segment_ids": kv_segment_ids,
                "kv_lengths": kv_lengths}  # fmt: skip
    operands = {name: x for name, x in operands.items() if name in mask.operands}
    _check(q, k, v, operands)
    static = _Static(
        mask=mask,
        scale=float(scale if scale is not None else 1 / math.sqrt(max(q.shape[3], 1))),
        cap=logits_soft_cap,
        out_dtype=str(jnp.dtype(out_dtype or q.dtype)),
        **_block_sizes(q.shape[1], k.shape[1], q.shape[0] * q.shape[2]),
    )
    q, k, v, *varying = vary_alike(q, k, v, *operands.values())
    return _attention(static, q, k, v, dict(zip(operands, varying, strict=True)))


def _check(q: Any, k: Any, v: Any, operands: dict[str, Any]) -> None:
    shapes = f"attention of q{list(q.shape)} k{list(k.shape)} v{list(v.shape)}"
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise OpError(shapes, "q, k and v have rank 4: [B, T, N, H], [B, S, K, H], [B, S, K, Hv]", "Add the missing dims")
    (b, t, n, h), (_, s, kv_heads, _) = q.shape, k.shape
    if k.shape != (b, s, kv_heads, h) or v.shape[:3] != (b, s, kv_heads):
        raise OpError(shapes, "q, k and v share batch; k and v share length and heads; q and k share head dim", "Check the axes")
    if (kv_heads == 0 and n) or (kv_heads and n % kv_heads):
        raise OpError(shapes, f"{n} query heads do not divide over {kv_heads} kv heads", "Make N a multiple of K")
    whole = {"q_segment_ids": (b, t), "kv_segment_ids": (b, s), "kv_lengths": (b,)}
    for name, x in operands.items():
        if x is None:
            raise OpError(f"{shapes} with a mask that reads {name}", f"{name} was not given", f"Pass {name}=")
        full = whole.get(name)
        fits = x.shape == full if full else x.ndim == 4 and all(d in (1, e) for d, e in zip(x.shape, (b, n, t, s), strict=True))
        if not fits:
            want = list(full) if full else f"rank 4, each dim 1 or that of {[b, n, t, s]}"
            raise OpError(f"{shapes} with {name}{list(x.shape)}", f"{name} must be {want}", "Broadcast or reshape it")


def _block_sizes(queries: int, keys: int, heads: int) -> dict[str, int]:
    """Square blocks, 128 to 512, of about a million scores over all heads: what a step touches then stays in a CPU's caches."""
    if _may_be_sharded():
        return {"block_q": max(queries, 1), "block_kv": _block(keys, 128)}
    most = 128 if heads >= 64 else 256 if heads >= 4 else 512
    return {"block_q": _block(queries, most), "block_kv": _block(keys, most)}


def _block(length: int, most: int) -> int:
    """The largest divisor of `length` between `most / 2` and `most`, else `most`: one shape of block is one loop to compile."""
    if length <= most:
        return max(length, 1)
    return next((b for b in range(most, most // 2 - 1, -1) if length % b == 0), most)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q, k, v, operands):
    return _forward(static, q, k, v, operands)[0].astype(static.out_dtype)


def _attention_fwd(static, q, k, v, operands):
    out, m, total = _forward(static, q, k, v, operands)
    return out.astype(static.out_dtype), (q, k, v, operands, out, m, total)


# Traced once for all layers that are alike, as is the backward.
@functools.partial(jax.jit, static_argnums=0)
def _forward(static: _Static, q, k, v, operands):
    """Returns out `[B, T, N, Hv]` and the maximum and sum of each row's softmax, `[B, K, 1, G, T]`.

    The backward reads out again, so it is rounded to the wider of q's dtype and the output's, never below what the inputs are in.
    """
    acc_dtype = _acc_dtype(q)
    kv_heads = k.shape[2]
    qh, kh, vh = _queries_last(q, kv_heads), _heads_first(k), _heads_first(v)
    ops = _operands_by_block(operands, kv_heads)
    blocks = _tiles(static, q.shape[1], k.shape[1])

    def step(carry, i, j, size_q, size_kv, masked):
        q_blk, k_blk, v_blk = _cut(qh, i, size_q, _ROWS), _cut(kh, j, size_kv, _KEYS), _cut(vh, j, size_kv, _KEYS)
        s, visible, _ = _scores(static, q_blk, k_blk, ops, i, j, masked, acc_dtype)
        s = _filled(static.mask, s, visible)
        m_new = jnp.max(s, _KEYS, keepdims=True)
        if carry is None:  # the only block there is
            p = jnp.exp(s - _finite(m_new))
            return m_new, jnp.sum(p, _KEYS, keepdims=True), _weigh(v_blk, p, acc_dtype)
        m, total, acc = (_cut(x, i, size_q, _ROWS) for x in carry)
        m_new = jnp.maximum(m, m_new)
        p = jnp.exp(s - _finite(m_new))
        p_sum, pv = jnp.sum(p, _KEYS, keepdims=True), _weigh(v_blk, p, acc_dtype)
        shrink = jnp.exp(m - _finite(m_new))
        new = m_new, total * shrink + p_sum, acc * shrink + pv
        return tuple(lax.dynamic_update_slice_in_dim(x, y, i, _ROWS) for x, y in zip(carry, new, strict=True))

    b, heads, h, group, t = qh.shape
    if _is_single(blocks):
        carry = _visit(blocks, static.mask, step, None)
    else:
        row, acc = (jnp.zeros((b, heads, n, group, t), acc_dtype) for n in (1, v.shape[3]))
        *start, _ = vary_alike(row - jnp.inf, row, acc, q)
        carry = _visit(blocks, static.mask, step, tuple(start))
    m, total, acc = carry
    if _needs_skipped_keys(static.mask, blocks):
        m, total, acc = _add_skipped_keys(static.mask, blocks, m, total, acc, vh)
    out = acc / total if k.shape[1] else jnp.zeros_like(acc)  # no keys at all: an empty sum
    return _join_heads(out).astype(jnp.promote_types(q.dtype, static.out_dtype)), m, total


@functools.partial(jax.jit, static_argnums=0)
def _attention_bwd(static: _Static, residuals, g):
    q, k, v, operands, out, m, total = residuals
    acc_dtype = _acc_dtype(q)
    kv_heads = k.shape[2]
    qh, kh, vh = _queries_last(q, kv_heads), _heads_first(k), _heads_first(v)
    ops = _operands_by_block(operands, kv_heads)
    blocks = _tiles(static, q.shape[1], k.shape[1])
    # p = exp(s - m) / total. Dividing g once instead of every block of p leaves the inner loop one pass shorter, and m apart from
    # log(total) keeps p exact where |m| is so large (a mask fill) that m + log(total) rounds to m.
    g = _queries_last(g, kv_heads).astype(acc_dtype) / total
    delta = jnp.sum(g * _queries_last(out, kv_heads).astype(acc_dtype), 2, keepdims=True)
    m = _finite(m)

    def step(carry, i, j, size_q, size_kv, masked):
        k_blk, v_blk = _cut(kh, j, size_kv, _KEYS), _cut(vh, j, size_kv, _KEYS)
        q_blk, g_blk, delta_blk, m_blk = (_cut(x, i, size_q, _ROWS) for x in (qh, g, delta, m))
        s, visible, cap_slope = _scores(static, q_blk, k_blk, ops, i, j, masked, acc_dtype)
        p = jnp.exp(_filled(static.mask, s, visible) - m_blk)
        ds = p * (_score(v_blk, g_blk, acc_dtype) - delta_blk)
        if visible is not None and not static.mask.additive:
            ds = jnp.where(visible, ds, 0)
        new = {"v": _collect(p, g_blk, acc_dtype)}
        if "bias" in ops:
            new["bias"] = _sum_to(_rows_first(ds), ops["bias"].shape)
        if cap_slope is not None:
            ds = ds * cap_slope
        new["q"], new["k"] = _weigh(k_blk, ds, acc_dtype), _collect(ds, q_blk, acc_dtype)
        if carry is None:
            return new
        starts = {"q": {_ROWS: i}, "k": {_KEYS: j}, "v": {_KEYS: j}}
        if "bias" in ops:
            starts["bias"] = {a: at for a, at in ((3, i), (4, j)) if ops["bias"].shape[a] > 1}
        return {name: _add(carry[name], new[name], starts[name]) for name in carry}

    if _is_single(blocks):
        grads = _visit(blocks, static.mask, step, None)
    else:
        like = {"q": qh, "k": kh, "v": vh} | ({"bias": ops["bias"]} if "bias" in ops else {})
        *start, _ = vary_alike(*(jnp.zeros(x.shape, acc_dtype) for x in like.values()), q)
        grads = _visit(blocks, static.mask, step, dict(zip(like, start, strict=True)))
    dv = grads["v"]
    if _needs_skipped_keys(static.mask, blocks):
        dv = dv + _skipped_keys_grad(static.mask, blocks, m, g)
    d_operands = {name: None for name in operands}
    if "bias" in operands:
        d_operands["bias"] = grads["bias"].reshape(operands["bias"].shape).astype(operands["bias"].dtype)
    dq = _join_heads(grads["q"] * static.scale).astype(q.dtype)
    dk = _heads_first(grads["k"] * static.scale).astype(k.dtype)
    return dq, dk, _heads_first(dv).astype(v.dtype), d_operands


_attention.defvjp(_attention_fwd, _attention_bwd)


# Blocks ------------------------------------------------------------------------------------------------------------


def _tiles(static: _Static, queries: int, keys: int) -> Blocks:
    mask = static.mask
    blocks = tile(mask, queries, keys, static.block_q, static.block_kv)
    # `score + fill` is negligible only beside a visible score, and only if fill is far below any score.
    if mask.additive and (data_terms(mask) or not blocks.every_row_sees or mask.fill > -1e4):
        return dataclasses.replace(blocks, hidden=np.zeros_like(blocks.hidden), whole=blocks.whole)
    return blocks


def _is_single(blocks: Blocks) -> bool:
    return blocks.hidden.shape == (1, 1) and not blocks.hidden.any()


def _visit(blocks: Blocks, mask: Mask, step: Callable, carry: Any) -> Any:
    """`carry = step(carry, i, j, size_q, size_kv, masked)` over the blocks that are not hidden, one loop for each kind of block."""
    kinds: dict[tuple[int, int, bool], list[tuple[int, int]]] = {}
    for a, b in np.argwhere(~blocks.hidden):
        masked = not blocks.whole[a, b] or bool(data_terms(mask))
        kind = (int(blocks.q_sizes[a]), int(blocks.kv_sizes[b]), masked)
        kinds.setdefault(kind, []).append((int(blocks.q_starts[a]), int(blocks.kv_starts[b])))
    for (size_q, size_kv, masked), starts in kinds.items():
        if len(starts) == 1:
            carry = step(carry, *starts[0], size_q, size_kv, masked)
            continue
        table = jnp.asarray(starts, jnp.int32)

        def body(n, carry, table=table, size_q=size_q, size_kv=size_kv, masked=masked):
            return step(carry, table[n, 0], table[n, 1], size_q, size_kv, masked)

        carry = lax.fori_loop(0, len(starts), body, carry)
    return carry


# Scores and masks ----------------------------------------------------------------------------------------------------


def _scores(static: _Static, q_blk, k_blk, ops, i, j, masked, acc_dtype):
    """Scores of a block before the fill, which of them are visible (None: all), and the derivative of the cap (None: 1)."""
    s = _score(k_blk, q_blk, acc_dtype) * static.scale
    cap_slope = None
    if static.cap is not None:
        t = jnp.tanh(s / static.cap)
        s, cap_slope = static.cap * t, 1 - t * t
    if "bias" in ops:
        s = s + _keys_first(_cut_both(ops["bias"], i, j, s.shape)).astype(acc_dtype)
    return s, _visible(static.mask, ops, i, j, s.shape) if masked else None, cap_slope


def _visible(mask: Mask, ops, i, j, shape):
    rows, keys = shape[_ROWS], shape[_KEYS]
    row = i + lax.broadcasted_iota(jnp.int32, (1, 1, rows), 2)
    key = j + lax.broadcasted_iota(jnp.int32, (keys, 1, 1), 0)
    operand = {name: _keys_first(_cut_both(x, i, j, shape)) for name, x in ops.items()}
    parts = []
    for term in mask.terms:
        match term:
            case Causal(offset):
                parts.append(key <= row + offset)
            case Window(left, right, offset):
                if left is not None:
                    parts.append(key >= row + (offset - left))
                if right is not None:
                    parts.append(key <= row + (offset + right))
            case Segments():
                parts.append(operand["q_segment_ids"] == operand["kv_segment_ids"])
            case Lengths():
                parts.append(key < operand["kv_lengths"])
            case Explicit():
                parts.append(operand["keep"])
            case Bias():
                pass
    return functools.reduce(jnp.logical_and, parts) if parts else None


def _filled(mask: Mask, s, visible):
    if visible is None:
        return s
    return jnp.where(visible, s, s + mask.fill if mask.additive else mask.fill)


def _operands_by_block(operands: dict[str, Any], kv_heads: int) -> dict[str, Any]:
    """Operands as rank 5 `[B, K, G, T, S]` (as they lie in memory), dims of 1 left as they are."""
    axes = {"q_segment_ids": (1, 2, 4), "kv_segment_ids": (1, 2, 3), "kv_lengths": (1, 2, 3, 4)}
    ops = {}
    for name, x in operands.items():
        if name in axes:
            ops[name] = jnp.expand_dims(x, axes[name])
        else:
            b, n, t, s = x.shape
            ops[name] = x.reshape((b, kv_heads, n // kv_heads, t, s) if n > 1 else (b, 1, 1, t, s))
    return ops


# Keys in blocks that were skipped -------------------------------------------------------------------------------------
#
# A skipped key has the score `fill`, and weighs exp(fill - m). That is nothing beside a visible key, but a query that sees no
# key, or only keys whose scores are -inf, weighs all others alike, skipped ones too. Their sum over a row of blocks is the same
# for all its queries, so what is left out can be added at the end for the price of one pass over v.


def _needs_skipped_keys(mask: Mask, blocks: Blocks) -> bool:
    row_may_see_nothing = bool(data_terms(mask)) or "bias" in mask.kinds or not blocks.every_row_sees or math.isfinite(mask.fill)
    return bool(blocks.hidden.any()) and row_may_see_nothing and not mask.additive


def _skipped(blocks: Blocks) -> np.ndarray:
    """How many keys are skipped for each query, `[T]`."""
    return np.repeat(blocks.hidden @ blocks.kv_sizes, blocks.q_sizes)


def _add_skipped_keys(mask: Mask, blocks: Blocks, m, total, acc, vh):
    count = _skipped(blocks)
    fill = jnp.where(count > 0, jnp.asarray(mask.fill, m.dtype), -jnp.inf)
    m_new = jnp.maximum(m, fill)
    shrink, weight = jnp.exp(m - _finite(m_new)), jnp.exp(fill - _finite(m_new))
    v_sums = _sum_blocks(vh.astype(m.dtype), blocks.kv_sizes, 2)
    v_sums = jnp.einsum("nj,bkjh->bkhn", jnp.asarray(blocks.hidden, m.dtype), v_sums)
    v_rows = _spread_blocks(v_sums, blocks.q_sizes, 3)[:, :, :, None]
    return m_new, total * shrink + weight * count, acc * shrink + weight * v_rows


def _skipped_keys_grad(mask: Mask, blocks: Blocks, m, g):
    weight = jnp.where(_skipped(blocks) > 0, jnp.exp(jnp.asarray(mask.fill, m.dtype) - m), 0)
    g_sums = _sum_blocks(jnp.sum(weight * g, 3), blocks.q_sizes, 3)
    g_sums = jnp.einsum("nj,bkhn->bkjh", jnp.asarray(blocks.hidden, m.dtype), g_sums)
    return _spread_blocks(g_sums, blocks.kv_sizes, 2)


def _sum_blocks(x, sizes: np.ndarray, axis: int):
    """Sums over blocks of `axis`, all but the last of one size: that dim becomes the number of blocks."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, len(sizes) * int(sizes[0]) - x.shape[axis])
    return jnp.pad(x, padding).reshape(*x.shape[:axis], len(sizes), int(sizes[0]), *x.shape[axis + 1 :]).sum(axis + 1)


def _spread_blocks(x, sizes: np.ndarray, axis: int):
    """The inverse shape: each element of `axis` for all positions of its block."""
    return jnp.repeat(x, sizes, axis=axis, total_repeat_length=int(sizes.sum()))


# Products ------------------------------------------------------------------------------------------------------------


def _acc_dtype(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _contract(a, b, a_dims, b_dims, acc_dtype):
    dims = ((a_dims, b_dims), ((0, 1), (0, 1)))
    return lax.dot_general(a.astype(acc_dtype), b.astype(acc_dtype), dims, preferred_element_type=acc_dtype)


#
# Which operand comes first is written for one device in the order that is fastest there, keys first: 1.4 times as fast on a CPU as
# the other. Where arrays may be sharded, queries come first: of two operands that are sharded over the same mesh axis, queries over T
# and keys over S, XLA's partitioner keeps the first as it is and gathers the second, and the result shall be sharded as the queries
# are. `q k^T` and `p v` as people write them have that order.


def _may_be_sharded() -> bool:
    """Whether XLA may partition what is traced now: not with one device, nor inside `jax.shard_map`."""
    return jax.device_count() > 1 and not in_shard_map()


def _score(keys, queries, acc_dtype):
    """`[B, K, S, H], [B, K, H, G, T] -> [B, K, S, G, T]`."""
    if _may_be_sharded():
        return _keys_first(_contract(queries, keys, (2,), (3,), acc_dtype))
    return _contract(keys, queries, (3,), (2,), acc_dtype)


def _weigh(keys, scores, acc_dtype):
    """`[B, K, S, H], [B, K, S, G, T] -> [B, K, H, G, T]`."""
    if _may_be_sharded():
        return _contract(scores, keys, (2,), (2,), acc_dtype).transpose(0, 1, 4, 2, 3)
    return _contract(keys, scores, (2,), (2,), acc_dtype)


def _collect(scores, queries, acc_dtype):
    """`[B, K, S, G, T], [B, K, H, G, T] -> [B, K, S, H]`."""
    return _contract(scores, queries, (3, 4), (3, 4), acc_dtype)


# Arrays --------------------------------------------------------------------------------------------------------------


def _queries_last(x, kv_heads: int):
    """`[B, T, N, H] -> [B, K, H, G, T]`."""
    b, t, n, h = x.shape
    return x.reshape(b, t, kv_heads, n // max(kv_heads, 1), h).transpose(0, 2, 4, 3, 1)


def _join_heads(x):
    """`[B, K, H, G, T] -> [B, T, N, H]`."""
    b, kv_heads, h, group, t = x.shape
    return x.transpose(0, 4, 1, 3, 2).reshape(b, t, kv_heads * group, h)


def _heads_first(x):
    return x.transpose(0, 2, 1, 3)


def _keys_first(x):
    """`[B, K, G, T, S] -> [B, K, S, G, T]`."""
    return x.transpose(0, 1, 4, 2, 3)


def _rows_first(x):
    """`[B, K, S, G, T] -> [B, K, G, T, S]`."""
    return x.transpose(0, 1, 3, 4, 2)


def _finite(m):
    """Row maxima, with 0 for rows whose every score is -inf: exp(-inf - 0) is 0 where exp(-inf + inf) is NaN."""
    return jnp.where(m == -jnp.inf, 0, m)


def _cut(x, start, size: int, axis: int):
    return x if x.shape[axis] == size else lax.dynamic_slice_in_dim(x, start, size, axis)


def _cut_both(x, i, j, shape):
    """The block at row `i` and key `j` of an operand `[B, K, G, T, S]`, for scores of `shape` `[B, K, S, G, T]`; dims of 1 stay."""
    for axis, start, size in ((3, i, shape[_ROWS]), (4, j, shape[_KEYS])):
        if x.shape[axis] > 1:
            x = _cut(x, start, size, axis)
    return x


def _add(x, block, starts: dict[int, Any]):
    at = tuple(jnp.asarray(starts.get(axis, 0), jnp.int32) for axis in range(x.ndim))  # of one type, in 64-bit mode too
    return lax.dynamic_update_slice(x, lax.dynamic_slice(x, at, block.shape) + block, at)


def _sum_to(x, shape):
    """Sums `x` over the dims where `shape` is 1."""
    axes = tuple(a for a, d in enumerate(shape) if d == 1 and x.shape[a] != 1)
    return jnp.sum(x, axes, keepdims=True) if axes else x
