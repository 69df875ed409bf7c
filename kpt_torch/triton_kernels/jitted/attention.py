"""Attention in Triton by an online softmax (arXiv:1805.02867), its backward pass from the logsumexp of each query (arXiv:2205.14135).

The masks of the algebra that say where keys may be, causality and windows, are one band `low <= key - query <= high`: blocks outside of it
are not visited, and blocks inside of it are not masked. Lengths end the keys of a batch; segments are compared. Query heads that share
a key head are summed over in registers, so that no key or gradient is repeated.

Scores are float32, and in powers of 2. A query that sees no key has the logsumexp +inf, by which its probabilities are 0 backward; what
it is, NaN or the mean of the values, is put in as it is stored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import triton
import triton.language as tl

from kpt.ops.base import Specs
from kpt.ops.mask import Causal, Mask, Window
from kpt_torch.triton_kernels.jitted import bounds
from kpt_torch.triton_kernels.jitted.activations import tanh

LOG2E = tl.constexpr(math.log2(math.e))


@dataclasses.dataclass(frozen=True)
class Tile:
    """Queries and keys of a block, warps of a program, and loads under way."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Of the forward pass, of it where scores are capped or segments compared, which takes registers, of dq, and of dk and dv."""

    forward: Tile
    busy: Tile
    dq: Tile
    dkv: Tile


_TINY, _SMALL, _LONG, _ONCE, _EVEN = Tile(16, 16, 8, 1), Tile(32, 32, 8, 1), Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), Tile(64, 64, 8, 1)
# By family of GPUs and the wider of the two head dims, as a power of two: Hopper's of 64 and 128 were timed on an H100
# (docs/benchmarks/triton-notes.md); the others are the largest of those tried that spill no register.
TILES: dict[str, dict[int, Tiles]] = {
    "hopper": {64: Tiles(Tile(64, 64, 4, 3), Tile(64, 32, 4, 3), Tile(64, 32, 4, 4), Tile(64, 64, 4, 3)),
               128: Tiles(Tile(64, 64, 4, 3), Tile(64, 32, 4, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
               256: Tiles(_LONG, _LONG, Tile(16, 32, 8, 1), _SMALL)},
    "blackwell": {64: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(128, 64, 8, 3), Tile(64, 64, 8, 2)),
                  128: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(128, 64, 8, 3), Tile(64, 64, 8, 2)),
                  256: Tiles(_LONG, _LONG, Tile(16, 32, 8, 1), _SMALL)},
    "ampere": {64: Tiles(_LONG, _LONG, Tile(64, 64, 8, 2), Tile(32, 64, 8, 1)), 128: Tiles(_LONG, _LONG, _EVEN, _EVEN),
               256: Tiles(_LONG, Tile(32, 64, 8, 1), _ONCE, _SMALL)},
    "cdna": {64: Tiles(_LONG, _LONG, _SMALL, _SMALL), 128: Tiles(_LONG, _LONG, _SMALL, Tile(32, 32, 4, 1)),
             256: Tiles(_SMALL, _SMALL, _TINY, _TINY)},
}  # fmt: skip


@triton.jit
def _block(of, first, stride, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a head from `first` on, 0 past the last row and the last element."""
    row, col = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    # What does not change from block to block is apart, to be computed once; a view of a long context is farther apart than 2^31.
    at = of + first.to(tl.int64) * stride + (row[:, None].to(tl.int64) * stride + col[None, :])
    if MASKED:
        return tl.load(at, mask=(row < rows - first)[:, None] & (col < width)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def _visible(i, j, limit, low, high, q_ids, kv_ids, queries, keys, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Whether queries see keys: one of `i` and `j` is a column and the other a row."""
    see = (j < limit) & (i < queries)
    if LOW:
        see &= j - i >= low
    if HIGH:
        see &= j - i <= high
    if q_ids is not None:
        see &= tl.load(q_ids + i, mask=i < queries, other=0) == tl.load(kv_ids + j, mask=j < keys, other=0)
    return see


@triton.jit
def _capped(s, scale, cap, CAP: tl.constexpr):
    """(scores of products but for a factor, tanh of the uncapped ones)."""
    t = s
    if CAP:
        t = tanh(s * (scale / cap))
        s = cap * t
    return s, t


@triton.jit
def _nth(n, start, inner, outer, BLOCK: tl.constexpr):
    """Of the blocks on both sides of what is whole, from `start` to `inner` and from `outer` on."""
    first = start + n * BLOCK
    return tl.where(first < inner, first, first - inner + outer)


@triton.jit
def _weighed(s, acc, m, total, v, first, factor, keys, v_stride, v_width, V_HEAD: tl.constexpr, KEYS: tl.constexpr, RAGGED: tl.constexpr):
    new = tl.maximum(m, tl.max(s, 1))
    shift = tl.where(new == float("-inf"), 0.0, new) * factor  # -inf less -inf would be NaN
    p = tl.exp2(s * factor - shift[:, None])
    faded = tl.exp2(m * factor - shift)
    total = total * faded + tl.sum(p, 1)
    vj = _block(v, first, v_stride, keys, v_width, KEYS, V_HEAD, RAGGED)
    return tl.dot(p.to(vj.dtype), vj, acc * faded[:, None], input_precision="ieee"), new, total


@triton.jit
def _over_keys(
    acc, m, total, seen, held, i, k, v, k_stride, v_stride, q_ids, kv_ids, start, inner, outer, stop,
    queries, keys, limit, width, v_width, scale, cap, factor, low, high,
    LOW: tl.constexpr, HIGH: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr, EVEN: tl.constexpr,
    HEAD: tl.constexpr, V_HEAD: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The whole blocks, from `inner` to `outer`, or the masked ones on both sides of them."""
    for n in range(0, (inner - start) // KEYS + tl.cdiv(stop - outer, KEYS) if MASKED else (outer - inner) // KEYS):
        first = _nth(n, start, inner, outer, KEYS) if MASKED else inner + n * KEYS
        kj = _block(k, first, k_stride, keys, width, KEYS, HEAD, MASKED or not EVEN)
        s, _ = _capped(tl.dot(held, tl.trans(kj), input_precision="ieee"), scale, cap, CAP)
        if MASKED:
            j = first + tl.arange(0, KEYS)
            see = _visible(i[:, None], j[None, :], limit, low, high, q_ids, kv_ids, queries, keys, LOW, HIGH)
            s = tl.where(see, s, float("-inf"))
            if q_ids is not None:
                seen |= tl.max(see.to(tl.int32), 1)
        acc, m, total = _weighed(s, acc, m, total, v, first, factor, keys, v_stride, v_width, V_HEAD, KEYS, MASKED or not EVEN)
    return acc, m, total, seen


@triton.jit
def _limit(lengths, batch, keys):
    """Keys of the batch that there are."""
    limit = keys
    if lengths is not None:
        limit = tl.maximum(tl.minimum(tl.load(lengths + batch).to(tl.int32), keys), 0)
    return limit


@triton.jit
def _keys_of(first, last, limit, low, high, q_ids, LOW: tl.constexpr, HIGH: tl.constexpr, KEYS: tl.constexpr):
    """Blocks of keys for queries from `first` to `last`: from `start` masked, from `inner` whole, from `outer` to `stop` masked again."""
    start, stop = 0, limit
    inner, outer = 0, limit // KEYS * KEYS
    if LOW:
        start = tl.maximum(first + low, 0) // KEYS * KEYS
        inner = tl.cdiv(tl.maximum(last + low, 0), KEYS) * KEYS
    if HIGH:
        stop = tl.maximum(tl.minimum(stop, last + high + 1), 0)
        outer = tl.minimum(outer, tl.maximum(first + high + 1, 0) // KEYS * KEYS)
    stop = tl.maximum(stop, start)
    inner = tl.minimum(tl.maximum(inner, start), tl.cdiv(stop, KEYS) * KEYS)
    outer = tl.maximum(outer, inner)
    if q_ids is not None:
        inner = start
        outer = start
    return start, inner, outer, stop


@triton.jit
def forward_blocks(
    q, k, v, q_ids, kv_ids, lengths, means, out, wide, lse, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    queries, keys, heads, group, width, v_width, scale, cap, low, high,
    LOW: tl.constexpr, HIGH: tl.constexpr, CAP: tl.constexpr, EVEN: tl.constexpr,
    HEAD: tl.constexpr, V_HEAD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """`wide` is `out` in float32, where that is kept."""
    across = tl.cdiv(queries, QUERIES)
    first = (across - 1 - tl.program_id(0) % across) * QUERIES  # where causality leaves most to do, first
    head = ((tl.program_id(0) // across) % heads).to(tl.int64)
    batch = (tl.program_id(0) // across // heads).to(tl.int64)
    i = first + tl.arange(0, QUERIES)
    held = _block(q + batch * q_batch + head * q_head, first, q_row, queries, width, QUERIES, HEAD, True)
    k += batch * k_batch + (head // group) * k_head
    v += batch * v_batch + (head // group) * v_head
    limit = _limit(lengths, batch, keys)
    if q_ids is not None:
        q_ids += batch * queries
        kv_ids += batch * keys
    last = tl.minimum(first + QUERIES, queries) - 1
    start, inner, outer, stop = _keys_of(first, last, limit, low, high, q_ids, LOW, HIGH, KEYS)
    # The most of scores is that of products, since the scale is positive: they are multiplied by it as the most is subtracted.
    factor = LOG2E if CAP else scale * LOG2E
    acc = tl.zeros([QUERIES, V_HEAD], tl.float32)
    m = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    seen = (tl.maximum(i + low, 0) if LOW else tl.zeros_like(i)) < (tl.minimum(i + high + 1, limit) if HIGH else limit)
    seen = seen.to(tl.int32)
    if q_ids is None:
        acc, m, total, seen = _over_keys(
            acc, m, total, seen, held, i, k, v, k_row, v_row, q_ids, kv_ids, start, inner, outer, stop, queries, keys, limit, width,
            v_width, scale, cap, factor, low, high, LOW, HIGH, CAP, False, EVEN, HEAD, V_HEAD, KEYS)  # fmt: skip
    else:
        seen = tl.zeros([QUERIES], tl.int32)
    acc, m, total, seen = _over_keys(
        acc, m, total, seen, held, i, k, v, k_row, v_row, q_ids, kv_ids, start, inner, outer, stop, queries, keys, limit, width, v_width,
        scale, cap, factor, low, high, LOW, HIGH, CAP, True, EVEN, HEAD, V_HEAD, KEYS)  # fmt: skip
    col = tl.arange(0, V_HEAD)
    unseen = tl.full([V_HEAD], float("nan"), tl.float32)
    if means is not None:
        unseen = tl.load(means + (batch * (heads // group) + head // group) * v_width + col, mask=col < v_width, other=0.0)
    acc = tl.where((seen > 0)[:, None], acc / total[:, None], unseen[None, :])
    at = ((batch * queries + i) * heads + head)[:, None] * v_width + col[None, :]
    there = (i < queries)[:, None] & (col < v_width)[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=there)
    if wide is not None:
        tl.store(wide + at, acc, mask=there)
    tl.store(lse + (batch * heads + head) * queries + i, tl.where(seen > 0, m * factor + tl.log2(total), float("inf")), mask=i < queries)


@triton.jit
def delta_rows(
    out, dout, lse, delta, d_batch, d_row, d_head, queries, heads, v_width, V_HEAD: tl.constexpr, QUERIES: tl.constexpr
):  # fmt: skip
    """`sum(out dout)` of each query, 0 of one that sees no key."""
    across = tl.cdiv(queries, QUERIES)
    head = ((tl.program_id(0) // across) % heads).to(tl.int64)
    batch = (tl.program_id(0) // across // heads).to(tl.int64)
    first = (tl.program_id(0) % across) * QUERIES
    i = first + tl.arange(0, QUERIES)
    o = _block(out + batch * queries * heads * v_width + head * v_width, first, heads * v_width, queries, v_width, QUERIES, V_HEAD, True)
    g = _block(dout + batch * d_batch + head * d_head, first, d_row, queries, v_width, QUERIES, V_HEAD, True)
    row = (batch * heads + head) * queries + i
    known = tl.load(lse + row, mask=i < queries, other=0.0)
    found = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    tl.store(delta + row, tl.where(known == float("inf"), 0.0, found), mask=i < queries)


@triton.jit
def _slopes(s, dp, lse, delta, see, scale, cap, CAP: tl.constexpr, MASKED: tl.constexpr):
    """(probabilities, gradients of scaled products) of products of queries and keys, and of cotangents and values."""
    s, t = _capped(s, scale, cap, CAP)
    p = tl.exp2(s * (LOG2E if CAP else scale * LOG2E) - lse)
    if MASKED:
        p = tl.where(see, p, 0.0)
    d = p * (dp - delta)
    if CAP:
        d *= 1.0 - t * t
    if MASKED:
        d = tl.where(see, d, 0.0)
    return p, d


@triton.jit
def _over_queries(
    dkj, dvj, kj, vj, j, q, dout, lse, delta, q_batch, q_row, q_head, d_batch, d_row, d_head, batch, kv_head, q_ids, kv_ids,
    start, inner, outer, stop, queries, keys, heads, group, limit, width, v_width, scale, cap, low, high,
    LOW: tl.constexpr, HIGH: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr, EVEN: tl.constexpr,
    HEAD: tl.constexpr, V_HEAD: tl.constexpr, QUERIES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The whole blocks of all heads, or the masked ones. Keys are rows, so that probabilities are multiplied out of registers."""
    blocks = (inner - start) // QUERIES + tl.cdiv(stop - outer, QUERIES) if MASKED else (outer - inner) // QUERIES
    # Masked blocks are few; a third of them under way would make registers spill.
    for n in tl.range(0, blocks * group, num_stages=2 if MASKED and STAGES > 2 else STAGES):
        head = kv_head * group + n // blocks
        first = _nth(n % blocks, start, inner, outer, QUERIES) if MASKED else inner + n % blocks * QUERIES
        i = first + tl.arange(0, QUERIES)
        qi = _block(q + batch * q_batch + head * q_head, first, q_row, queries, width, QUERIES, HEAD, MASKED or not EVEN)
        g = _block(dout + batch * d_batch + head * d_head, first, d_row, queries, v_width, QUERIES, V_HEAD, MASKED or not EVEN)
        row = (batch * heads + head) * queries + first
        at = tl.arange(0, QUERIES)
        s = tl.dot(kj, tl.trans(qi), input_precision="ieee")
        dp = tl.dot(vj, tl.trans(g), input_precision="ieee")
        see = None
        if MASKED:
            known = tl.load(lse + row + at, mask=i < queries, other=float("inf"))
            along = tl.load(delta + row + at, mask=i < queries, other=0.0)
            see = _visible(i[None, :], j[:, None], limit, low, high, q_ids, kv_ids, queries, keys, LOW, HIGH)
        else:
            known = tl.load(lse + row + at)
            along = tl.load(delta + row + at)
        p, d = _slopes(s, dp, known[None, :], along[None, :], see, scale, cap, CAP, MASKED)
        dvj = tl.dot(p.to(g.dtype), g, dvj, input_precision="ieee")
        dkj = tl.dot(d.to(qi.dtype), qi, dkj, input_precision="ieee")
    return dkj, dvj


@triton.jit
def keys_backward(
    q, k, v, dout, lse, delta, q_ids, kv_ids, lengths, dk, dv, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    d_batch, d_row, d_head, queries, keys, heads, group, width, v_width, scale, cap, low, high,
    LOW: tl.constexpr, HIGH: tl.constexpr, CAP: tl.constexpr, EVEN: tl.constexpr,
    HEAD: tl.constexpr, V_HEAD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys, over all queries that may see it, of all heads that share it."""
    across = tl.cdiv(keys, KEYS)
    shared = heads // group
    first = (tl.program_id(0) % across) * KEYS
    kv_head = ((tl.program_id(0) // across) % shared).to(tl.int64)
    batch = (tl.program_id(0) // across // shared).to(tl.int64)
    j = first + tl.arange(0, KEYS)
    col, v_col = tl.arange(0, HEAD), tl.arange(0, V_HEAD)
    kj = _block(k + batch * k_batch + kv_head * k_head, first, k_row, keys, width, KEYS, HEAD, True)
    vj = _block(v + batch * v_batch + kv_head * v_head, first, v_row, keys, v_width, KEYS, V_HEAD, True)
    limit = _limit(lengths, batch, keys)
    if q_ids is not None:
        q_ids += batch * queries
        kv_ids += batch * keys
    # Blocks of queries: from `start` masked, from `inner` whole, from `outer` to `stop` masked again.
    start, stop = 0, queries
    inner, outer = 0, queries // QUERIES * QUERIES
    if HIGH:
        start = tl.maximum(first - high, 0) // QUERIES * QUERIES
        inner = tl.cdiv(tl.maximum(first + KEYS - 1 - high, 0), QUERIES) * QUERIES
    if LOW:
        stop = tl.maximum(tl.minimum(stop, first + KEYS - low), 0)
        outer = tl.minimum(outer, tl.maximum(first - low + 1, 0) // QUERIES * QUERIES)
    if first >= limit:
        stop = start
    stop = tl.maximum(stop, start)
    inner = tl.minimum(tl.maximum(inner, start), tl.cdiv(stop, QUERIES) * QUERIES)
    outer = tl.maximum(outer, inner)
    if (q_ids is not None) | (first + KEYS > limit):
        inner = start
        outer = start
    dkj = tl.zeros([KEYS, HEAD], tl.float32)
    dvj = tl.zeros([KEYS, V_HEAD], tl.float32)
    dkj, dvj = _over_queries(
        dkj, dvj, kj, vj, j, q, dout, lse, delta, q_batch, q_row, q_head, d_batch, d_row, d_head, batch, kv_head, q_ids, kv_ids,
        start, inner, outer, stop, queries, keys, heads, group, limit, width, v_width, scale, cap, low, high,
        LOW, HIGH, CAP, True, EVEN, HEAD, V_HEAD, QUERIES, STAGES)  # fmt: skip
    if q_ids is None:
        dkj, dvj = _over_queries(
            dkj, dvj, kj, vj, j, q, dout, lse, delta, q_batch, q_row, q_head, d_batch, d_row, d_head, batch, kv_head, q_ids, kv_ids,
            start, inner, outer, stop, queries, keys, heads, group, limit, width, v_width, scale, cap, low, high,
            LOW, HIGH, CAP, False, EVEN, HEAD, V_HEAD, QUERIES, STAGES)  # fmt: skip
    at = ((batch * keys + j) * shared + kv_head)[:, None]
    tl.store(dk + at * width + col[None, :], (dkj * scale).to(dk.dtype.element_ty), mask=(j < keys)[:, None] & (col < width)[None, :])
    tl.store(dv + at * v_width + v_col[None, :], dvj.to(dv.dtype.element_ty), mask=(j < keys)[:, None] & (v_col < v_width)[None, :])


@triton.jit
def _dq_over_keys(
    dqi, qi, g, known, along, i, k, v, k_stride, v_stride, q_ids, kv_ids, start, inner, outer, stop,
    queries, keys, limit, width, v_width, scale, cap, low, high,
    LOW: tl.constexpr, HIGH: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr, EVEN: tl.constexpr,
    HEAD: tl.constexpr, V_HEAD: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    for n in range(0, (inner - start) // KEYS + tl.cdiv(stop - outer, KEYS) if MASKED else (outer - inner) // KEYS):
        first = _nth(n, start, inner, outer, KEYS) if MASKED else inner + n * KEYS
        kj = _block(k, first, k_stride, keys, width, KEYS, HEAD, MASKED or not EVEN)
        vj = _block(v, first, v_stride, keys, v_width, KEYS, V_HEAD, MASKED or not EVEN)
        s = tl.dot(qi, tl.trans(kj), input_precision="ieee")
        dp = tl.dot(g, tl.trans(vj), input_precision="ieee")
        see = None
        if MASKED:
            j = first + tl.arange(0, KEYS)
            see = _visible(i[:, None], j[None, :], limit, low, high, q_ids, kv_ids, queries, keys, LOW, HIGH)
        _, d = _slopes(s, dp, known[:, None], along[:, None], see, scale, cap, CAP, MASKED)
        dqi = tl.dot(d.to(kj.dtype), kj, dqi, input_precision="ieee")
    return dqi


@triton.jit
def queries_backward(
    q, k, v, dout, lse, delta, q_ids, kv_ids, lengths, dq, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    d_batch, d_row, d_head, queries, keys, heads, group, width, v_width, scale, cap, low, high,
    LOW: tl.constexpr, HIGH: tl.constexpr, CAP: tl.constexpr, EVEN: tl.constexpr,
    HEAD: tl.constexpr, V_HEAD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries, over the keys that it may see."""
    across = tl.cdiv(queries, QUERIES)
    first = (across - 1 - tl.program_id(0) % across) * QUERIES
    head = ((tl.program_id(0) // across) % heads).to(tl.int64)
    batch = (tl.program_id(0) // across // heads).to(tl.int64)
    i = first + tl.arange(0, QUERIES)
    col = tl.arange(0, HEAD)
    qi = _block(q + batch * q_batch + head * q_head, first, q_row, queries, width, QUERIES, HEAD, True)
    g = _block(dout + batch * d_batch + head * d_head, first, d_row, queries, v_width, QUERIES, V_HEAD, True)
    known = tl.load(lse + (batch * heads + head) * queries + i, mask=i < queries, other=float("inf"))
    along = tl.load(delta + (batch * heads + head) * queries + i, mask=i < queries, other=0.0)
    k += batch * k_batch + (head // group) * k_head
    v += batch * v_batch + (head // group) * v_head
    limit = _limit(lengths, batch, keys)
    if q_ids is not None:
        q_ids += batch * queries
        kv_ids += batch * keys
    start, inner, outer, stop = _keys_of(first, tl.minimum(first + QUERIES, queries) - 1, limit, low, high, q_ids, LOW, HIGH, KEYS)
    dqi = tl.zeros([QUERIES, HEAD], tl.float32)
    if q_ids is None:
        dqi = _dq_over_keys(
            dqi, qi, g, known, along, i, k, v, k_row, v_row, q_ids, kv_ids, start, inner, outer, stop, queries, keys, limit, width, v_width,
            scale, cap, low, high, LOW, HIGH, CAP, False, EVEN, HEAD, V_HEAD, KEYS)  # fmt: skip
    dqi = _dq_over_keys(
        dqi, qi, g, known, along, i, k, v, k_row, v_row, q_ids, kv_ids, start, inner, outer, stop, queries, keys, limit, width, v_width,
        scale, cap, low, high, LOW, HIGH, CAP, True, EVEN, HEAD, V_HEAD, KEYS)  # fmt: skip
    to = ((batch * queries + i) * heads + head)[:, None] * width + col[None, :]
    tl.store(dq + to, (dqi * scale).to(dq.dtype.element_ty), mask=(i < queries)[:, None] & (col < width)[None, :])


def band(mask: Mask) -> tuple[int | None, int | None]:
    """(least, most) of key less query that the mask's static terms leave; None where they leave that side open."""
    low: int | None = None
    high: int | None = None
    for t in mask.terms:
        if isinstance(t, Causal):
            high = t.offset if high is None else min(high, t.offset)
        elif isinstance(t, Window):
            if t.left is not None:
                low = t.offset - t.left if low is None else max(low, t.offset - t.left)
            if t.right is not None:
                high = t.offset + t.right if high is None else min(high, t.offset + t.right)
    return low, high


def _head(*widths: int) -> int:
    return max(16, *(triton.next_power_of_2(w) for w in widths))


def tiles(family: str, itemsize: int, constants: Mapping[str, Any]) -> Tiles:
    """Those of a family of GPUs and of the wider head dim; float32 has half as many queries and keys in a block."""
    found = TILES[family][max(constants["HEAD"], constants["V_HEAD"], 64)]
    if itemsize < 4:
        return found
    wide = (found.forward, found.busy, found.dq, found.dkv)
    return Tiles(*(dataclasses.replace(t, queries=max(t.queries // 2, 16), keys=max(t.keys // 2, 16)) for t in wide))


def may_be_empty(mask: Mask) -> bool:
    """Whether a query may see no key."""
    return any(not (isinstance(t, Causal) and t.offset >= 0) for t in mask.terms)


def sizes(q: Sequence[int], k: Sequence[int], v: Sequence[int], params: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """From the shapes: (sizes and scalars, in the order of the kernels' arguments), constants."""
    # What lies beyond the ends says no more than the ends do, and leaves room for sums in 32 bits.
    low, high = (None if end is None else max(-q[1], min(end, k[1])) for end in band(params["mask"]))
    width, v_width = q[-1], v[-1]
    scale = 1 / math.sqrt(width) if params["scale"] is None else params["scale"]
    cap = params["logits_soft_cap"]
    numbers: list[Any] = [q[1], k[1], q[2], q[2] // k[2], width, v_width, float(scale), float(cap or 1.0), low or 0, high or 0]
    constants = {"LOW": low is not None, "HIGH": high is not None, "CAP": cap is not None, "HEAD": _head(width), "V_HEAD": _head(v_width)}
    constants["EVEN"] = constants["HEAD"] == width and constants["V_HEAD"] == v_width
    return numbers, constants


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why the kernels cannot take a call, in one clause, or None."""
    q, k, v = (specs[n] for n in "qkv")
    if any(0 in s.shape for s in specs.values()):
        return "is not given empty arrays"
    if len({q.dtype, k.dtype, v.dtype}) > 1:
        return f"multiplies arrays of one dtype, and these are {q.dtype}, {k.dtype} and {v.dtype}"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"takes head dims up to 256, and these are {q.shape[-1]} and {v.shape[-1]}"
    mask = params.get("mask", Mask())
    if mask.terms and (mask.additive or not mask.fill <= -1e30):
        return f"leaves out what a mask hides, and one that {'adds' if mask.additive else 'fills with'} {mask.fill} may show it"
    return bounds.wide_floats({n: specs[n] for n in "qkv"}, params)
