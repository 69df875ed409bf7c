"""Attention for TPU: online softmax over the blocks of the score matrix that the mask leaves, forward and backward.

Blocks hold scores as `[keys, queries]`: the softmax then reduces sublanes, its statistics are rows of lanes, and they go to HBM as such.
The query heads of a key head stand side by side, so that one product serves them all.

The grid walks over a list, in scalar memory, of the blocks that causality and windows leave (Dao et al. 2022, arXiv:2205.14135, after the
block-sparse lists of splash attention in jax). Blocks that segments or lengths hide are known at run time, and are not computed. Only
blocks that a mask cuts are masked.

A query that sees no key has the logsumexp +inf, which makes every weight 0; what becomes of it is put in place afterwards, from the mean
of all values.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np

from kpt.ops.base import Specs
from kpt.ops.mask import Causal, Lengths, Mask, Segments, Window
from pallas_kernels import tensorcore
from pallas_kernels.attention.blocks import data_terms, tile
from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.tensorcore import LANES, budget, dot, launch, padded_bytes, require_fit, require_multiples

HIDDEN = -0.7 * float(np.finfo(np.float32).max)
MOST_BLOCKS = 1 << 15
"""Of the list: three numbers each, in 1 MiB of scalar memory."""
FIRST, LAST, CUT = 1, 2, 4
"""Flags of a block in the list: it opens or closes a block of the result; the mask cuts it."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Queries (of each head) and keys of a block of scores, multiples of 128."""

    q: int
    kv: int

    def __post_init__(self) -> None:
        require_multiples(self, LANES)


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is known before tracing."""

    mask: Mask
    scale: float
    cap: float | None
    out_dtype: str
    blocks: Blocks
    queries: int
    keys: int


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why these arrays cannot be taken, or None."""
    if (why := tensorcore.refusal(specs, params)) is not None:
        return why
    q, k, v = (specs[n] for n in "qkv")
    if not q.dtype == k.dtype == v.dtype:
        return f"takes q, k and v of one dtype, and these are {q.dtype}, {k.dtype} and {v.dtype}"
    mask = params.get("mask", Mask())
    if math.isfinite(mask.fill) and mask.fill > -1e9:
        return f"gives hidden keys no weight, and a score of {mask.fill} may have some"
    group = q.shape[2] // k.shape[2]
    blocks = default_blocks(q.shape[1], k.shape[1], group, q.shape[3], v.shape[3], q.dtype)
    if (need := _need(blocks, group, q.shape[3], v.shape[3], q.dtype)) > budget():
        return f"holds {group} heads of 128 queries and keys in VMEM, which take {need} bytes of {budget()}"
    if (count := pl.cdiv(q.shape[1], blocks.q) * pl.cdiv(k.shape[1], blocks.kv)) > MOST_BLOCKS:
        return f"lists at most {MOST_BLOCKS} blocks of scores, and there are {count}"
    return None


def default_blocks(queries: int, keys: int, group: int, head: int, head_v: int, dtype: Any) -> Blocks:
    """A thousand queries of all heads by a thousand keys, fewer where VMEM or the sequences are smaller, half in float32."""
    most = 512 if tensorcore.generation().vmem < 32 << 20 or dtype == jnp.float32 else 1024
    blocks = Blocks(min(_padded(queries), max(LANES, most // group // LANES * LANES)), min(_padded(keys), most))
    while _need(blocks, group, head, head_v, dtype) > budget() and blocks.kv > LANES:
        blocks = dataclasses.replace(blocks, kv=_padded(blocks.kv // 2))
    return blocks


def _padded(length: int, block: int = LANES) -> int:
    return pl.cdiv(length, block) * block


def _need(blocks: Blocks, group: int, head: int, head_v: int, dtype: Any) -> int:
    """Bytes of VMEM of the hungriest pass: inputs and results in two buffers, two sums, and five blocks of scores."""
    rows, widths = group * blocks.q, (head, head_v)
    per_query = sum(2 * 2 * padded_bytes((rows, w), dtype) + padded_bytes((rows, w), jnp.float32) for w in widths)
    per_key = sum(2 * 2 * padded_bytes((blocks.kv, w), dtype) + padded_bytes((blocks.kv, w), jnp.float32) for w in widths)
    return per_query + per_key + 5 * padded_bytes((blocks.kv, rows), jnp.float32)


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
    blocks: Blocks | None = None,
) -> jax.Array:
    """`softmax(fill(cap(scale q k^T), mask)) v`, scores and sums in float32.

    Args:
      q: `[B, T, N, H]` bfloat16 or float32.
      k, v: `[B, S, K, H]` and `[B, S, K, Hv]` in q's dtype; query head `n` reads key head `n // (N // K)`.
      q_segment_ids, kv_segment_ids: `[B, T]` and `[B, S]` integers.
      kv_lengths: `[B]` integers.
      mask: of causality, windows, segments and lengths.
      scale: of the scores; `1 / sqrt(H)` if None.
      logits_soft_cap: `c` in `c tanh(score / c)`.
      out_dtype: of the result; q's by default.
      blocks: of scores, in all passes.

    Returns:
      `[B, T, N, Hv]`.

    Raises:
      KernelError: the blocks do not fit VMEM.
    """
    (b, t, n, h), (_, s, kv_heads, head_v) = q.shape, v.shape
    group = n // kv_heads
    chosen = blocks or default_blocks(t, s, group, h, head_v, q.dtype)
    require_fit(chosen, _need(chosen, group, h, head_v, q.dtype))
    scale = 1 / math.sqrt(h) if scale is None else float(scale)
    static = _Static(mask, scale, logits_soft_cap, str(jnp.dtype(out_dtype or q.dtype)), chosen, t, s)
    ids = [None, None] if q_segment_ids is None or kv_segment_ids is None else [q_segment_ids, kv_segment_ids]
    terms = {type(term) for term in mask.terms}
    data = [*(ids if Segments in terms else [None, None]), kv_lengths if Lengths in terms else None]
    q, k, v, *data = vary_alike(q, k, v, *data)
    qh = q.reshape(b, t, kv_heads, group, h).transpose(0, 2, 3, 1, 4)
    kh, vh = (a.transpose(0, 2, 1, 3) for a in (k, v))
    out = _attention(static, qh, kh, vh, *data)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, head_v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q, k, v, q_ids, kv_ids, lengths):
    """Of `[B, K, G, T, H]`, `[B, K, S, H]` and `[B, K, S, Hv]`."""
    return _fwd(static, q, k, v, q_ids, kv_ids, lengths)[0]


def _fwd(static, q, k, v, q_ids, kv_ids, lengths):
    call = _Call(static, q, k, v, q_ids, kv_ids, lengths)
    rows, head_v = call.rows, v.shape[-1]

    def kernel(table: Any, inputs: dict[str, Any], outputs: list[Any], scratch: list[Any]) -> None:
        (out_ref, lse_ref), (m_ref, total_ref, acc_ref) = outputs, scratch

        @pl.when(table.first)
        def _() -> None:
            m_ref[...] = jnp.full_like(m_ref, HIDDEN)
            total_ref[...] = jnp.zeros_like(total_ref)
            acc_ref[...] = jnp.zeros_like(acc_ref)

        def step(cut: bool) -> None:
            s, _ = call.scores(table, inputs, cut)
            m = jnp.maximum(m_ref[...], jnp.max(s, 0, keepdims=True))
            seen = jnp.where(m == HIDDEN, 0.0, m)
            p, shrink = jnp.exp(s - seen), jnp.exp(m_ref[...] - seen)
            m_ref[...] = m
            total_ref[...] = total_ref[...] * shrink + jnp.sum(p, 0, keepdims=True)
            value = inputs["v"][...]
            acc_ref[...] = acc_ref[...] * shrink + dot(value, p.astype(value.dtype), 0, 0)

        table.run(step)

        @pl.when(table.last)
        def _() -> None:
            total = total_ref[...]
            blind = total == 0
            call.put(out_ref, (acc_ref[...] / jnp.where(blind, 1.0, total)).T)
            lse = jnp.where(blind, jnp.inf, m_ref[...] + jnp.log(total))
            for g in range(q.shape[2]):
                lse_ref[pl.ds(g, 1), :] = lse[:, g * static.blocks.q : (g + 1) * static.blocks.q]

    shape = (*q.shape[:3], call.queries)
    out, lse = call(
        kernel,
        {},
        out=[((*shape, head_v), static.out_dtype, "query"), (shape, jnp.float32, "row")],
        scratch=[(1, rows), (1, rows), (head_v, rows)],
        by_query=True,
        name="attention",
    )
    out, lse = out[..., : static.queries, :], lse[..., : static.queries]
    if call.may_be_blind:
        out = jnp.where(jnp.isposinf(lse)[..., None], _mean_value(static, v)[:, :, None, None].astype(out.dtype), out)
    return out, (q, k, v, q_ids, kv_ids, lengths, out, lse)


def _mean_value(static, v):
    """What a query that sees no key gets: the mean of all values, or NaN; `[B, K, Hv]`."""
    mean = jnp.mean(v.astype(jnp.float32), 2)
    return mean if math.isfinite(static.mask.fill) else jnp.full_like(mean, jnp.nan)


def _bwd(static, residuals, g):
    q, k, v, q_ids, kv_ids, lengths, out, lse = residuals
    call = _Call(static, q, k, v, q_ids, kv_ids, lengths)
    blind = jnp.isposinf(lse)
    gf = g.astype(jnp.float32)
    delta = jnp.where(blind, 0.0, jnp.sum(gf * out.astype(jnp.float32), -1))
    more = {"g": g.astype(v.dtype), "lse": lse, "delta": delta}

    def weights(table: Any, inputs: dict[str, Any], cut: bool) -> tuple[jax.Array, jax.Array]:
        """Weights of a block, and the gradient of its scores before the scale."""
        s, slope = call.scores(table, inputs, cut)
        p = jnp.exp(s - call.row(inputs["lse"]))
        dp = dot(inputs["v"][...], call.take(inputs["g"]), 1, 1)
        ds = p * (dp - call.row(inputs["delta"]))
        return p, ds if slope is None else ds * slope

    def dq_kernel(table: Any, inputs: dict[str, Any], outputs: list[Any], scratch: list[Any]) -> None:
        (dq_ref,), (acc_ref,) = outputs, scratch

        @pl.when(table.first)
        def _() -> None:
            acc_ref[...] = jnp.zeros_like(acc_ref)

        def step(cut: bool) -> None:
            _, ds = weights(table, inputs, cut)
            key = inputs["k"][...]
            acc_ref[...] += dot(key, ds.astype(key.dtype), 0, 0)

        table.run(step)

        @pl.when(table.last)
        def _() -> None:
            call.put(dq_ref, (acc_ref[...] * static.scale).T)

    def dkv_kernel(table: Any, inputs: dict[str, Any], outputs: list[Any], scratch: list[Any]) -> None:
        (dk_ref, dv_ref), (dk_acc, dv_acc) = outputs, scratch

        @pl.when(table.first)
        def _() -> None:
            dk_acc[...] = jnp.zeros_like(dk_acc)
            dv_acc[...] = jnp.zeros_like(dv_acc)

        def step(cut: bool) -> None:
            p, ds = weights(table, inputs, cut)
            query, cotangent = call.take(inputs["q"]), call.take(inputs["g"])
            dv_acc[...] += dot(p.astype(cotangent.dtype), cotangent)
            dk_acc[...] += dot(ds.astype(query.dtype), query)

        table.run(step)

        @pl.when(table.last)
        def _() -> None:
            dk_ref[...] = (dk_acc[...] * static.scale).astype(dk_ref.dtype)
            dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)

    head, head_v, kv = q.shape[-1], v.shape[-1], static.blocks.kv
    queries = [((*q.shape[:3], call.queries, head), q.dtype, "query")]
    (dq,) = call(dq_kernel, more, out=queries, scratch=[(head, call.rows)], by_query=True, name="attention_dq")
    keys = [((*a.shape[:2], call.keys, a.shape[3]), a.dtype, "key") for a in (k, v)]
    dk, dv = call(dkv_kernel, more, out=keys, scratch=[(kv, head), (kv, head_v)], by_query=False, name="attention_dkv")
    dq, dk, dv = dq[..., : static.queries, :], dk[:, :, : static.keys], dv[:, :, : static.keys]
    if call.may_be_blind:
        share = jnp.sum(jnp.where(blind[..., None], gf, 0.0), (2, 3)) / static.keys
        if not math.isfinite(static.mask.fill):
            share = jnp.where(blind.any((2, 3))[..., None], jnp.nan, share)
        dv = (dv + share[:, :, None]).astype(v.dtype)
    return dq, dk, dv, None, None, None


_attention.defvjp(_fwd, _bwd)


@dataclasses.dataclass(frozen=True)
class _Table:
    """Where the grid stands: first query and key of the block, the length of the keys, and the block's flags."""

    query: Any
    key: Any
    length: Any
    flags: Any
    visible: Any

    @property
    def first(self) -> Any:
        return (self.flags & FIRST) != 0

    @property
    def last(self) -> Any:
        return (self.flags & LAST) != 0

    def run(self, step: Any) -> None:
        """`step(cut)`, unless the block is hidden."""
        cut = (self.flags & CUT) != 0
        pl.when((self.visible != 0) & cut)(lambda: step(True))
        pl.when((self.visible != 0) & ~cut)(lambda: step(False))


class _Call:
    """What the three kernels share: padded operands, the list of blocks, and the scores of one."""

    def __init__(self, static: _Static, q: Any, k: Any, v: Any, q_ids: Any, kv_ids: Any, lengths: Any):
        self.static, self.lengths = static, lengths
        self.batch, self.kv_heads, self.group, t, self.head = q.shape
        self.queries, self.keys = _padded(t, static.blocks.q), _padded(k.shape[2], static.blocks.kv)
        self.rows = self.group * static.blocks.q
        self.arrays = {"q": self.pad(q, 3), "k": self._pad_keys(k), "v": self._pad_keys(v)}
        self.ids = q_ids is not None
        if self.ids:
            self.arrays |= {"q_ids": self.pad(q_ids, 1)[:, None], "kv_ids": self._pad_keys(kv_ids, 1)[..., None]}
        self.tiles = tile(static.mask, t, static.keys, static.blocks.q, static.blocks.kv)
        self.may_be_blind = bool(data_terms(static.mask)) or not self.tiles.every_row_sees

    def pad(self, a: Any, axis: int) -> Any:
        return _pad_axis(a, axis, self.queries)

    def _pad_keys(self, a: Any, axis: int = 2) -> Any:
        return _pad_axis(a, axis, self.keys)

    def take(self, ref: Any) -> jax.Array:
        """A block of queries, its heads one after the other."""
        return ref[...].reshape(self.rows, ref.shape[-1])

    def put(self, ref: Any, rows: jax.Array) -> None:
        ref[...] = rows.reshape(ref.shape).astype(ref.dtype)

    def row(self, ref: Any) -> jax.Array:
        """Statistics of a block of queries, `[1, G block]`."""
        return jnp.concatenate([ref[pl.ds(g, 1), :] for g in range(self.group)], 1)

    def scores(self, table: _Table, inputs: dict[str, Any], cut: bool) -> tuple[jax.Array, jax.Array | None]:
        """Scores `[keys, G queries]`, `HIDDEN` where the mask hides, and the slope of the cap."""
        static, slope = self.static, None
        s = dot(inputs["k"][...], self.take(inputs["q"]), 1, 1) * static.scale
        if static.cap is not None:
            t = jnp.tanh(s / static.cap)
            s, slope = static.cap * t, 1 - t * t
        if not cut:
            return s, slope
        shape = (static.blocks.kv, static.blocks.q)
        row = table.query + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        key = table.key + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        see = key < table.length
        for term in static.mask.terms:
            match term:
                case Causal(offset):
                    see &= key <= row + offset
                case Window(left, right, offset):
                    if left is not None:
                        see &= key >= row + (offset - left)
                    if right is not None:
                        see &= key <= row + (offset + right)
                case Segments():
                    see &= inputs["kv_ids"][...] == inputs["q_ids"][...]
        parts = [s[:, g * shape[1] : (g + 1) * shape[1]] for g in range(self.group)]
        return jnp.concatenate([jnp.where(see, part, HIDDEN) for part in parts], 1), slope

    def _blocks(self, by_query: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Query block, key block and flags of each step. A block of the result to which none belongs gets one, which is not computed."""
        tiles, blocks = self.tiles, self.static.blocks
        shown = ~tiles.hidden
        alone = ~shown.any(1 if by_query else 0)
        listed = shown.copy()
        if by_query:
            listed[alone, 0] = True
        else:
            listed[0, alone] = True
        i, j = np.nonzero(listed) if by_query else np.nonzero(listed.T)[::-1]
        whole = tiles.whole & (tiles.kv_sizes == blocks.kv)[None] & (not data_terms(self.static.mask))
        owner = i if by_query else j
        change = np.flatnonzero(np.diff(owner)) + 1
        flags = np.where(whole[i, j], 0, CUT)
        flags[[0, *change]] |= FIRST
        flags[[*(change - 1), len(i) - 1]] |= LAST
        return i, j, flags

    def _visible(self, i: np.ndarray, j: np.ndarray) -> jax.Array:
        """Whether a step's block has anything that terms of all kinds may leave: `[B, steps]` int32."""
        visible = jnp.broadcast_to(jnp.asarray(~self.tiles.hidden[i, j]), (self.batch, len(i)))
        if self.lengths is not None:
            visible &= jnp.asarray(j * self.static.blocks.kv)[None] < self.lengths[:, None]
        if self.ids:
            ends = []
            for name, block in (("q_ids", self.static.blocks.q), ("kv_ids", self.static.blocks.kv)):
                of_block = self.arrays[name].reshape(self.batch, -1, block)
                ends.append((of_block.min(2), of_block.max(2)))
            (q_low, q_high), (kv_low, kv_high) = ends
            visible &= (q_low[:, i] <= kv_high[:, j]) & (kv_low[:, j] <= q_high[:, i])
        return visible.astype(jnp.int32)

    def __call__(self, kernel: Any, more: dict[str, Any], *, out: Any, scratch: Any, by_query: bool, name: str) -> list[jax.Array]:
        """Runs `kernel(table, inputs, outputs, scratch)` over the list of blocks.

        Args:
          more: arrays of queries beside those of the forward pass.
          out: shape, dtype and kind ("query", "key", "row") of each result.
          scratch: shapes, float32.
        """
        static, group = self.static, self.group
        i, j, flags = self._blocks(by_query)
        lengths = jnp.full((self.batch,), static.keys, jnp.int32)
        if self.lengths is not None:
            lengths = jnp.minimum(self.lengths.astype(jnp.int32), static.keys)
        tables = [jnp.asarray(a, jnp.int32) for a in (i, j, flags)] + [self._visible(i, j), lengths]
        arrays = self.arrays | {n: self.pad(a, 3) for n, a in more.items()}

        def query(b, h, n, i, *_):
            return b, h, 0, i[n], 0

        def row(b, h, n, i, *_):
            return b, h, 0, i[n]

        def key(b, h, n, i, j, *_):
            return b, h, j[n], 0

        def spec(kind: str, width: int) -> Any:
            if kind == "query":
                return pl.BlockSpec((None, None, group, static.blocks.q, width), query)
            if kind == "row":
                return pl.BlockSpec((None, None, group, static.blocks.q), row)
            return pl.BlockSpec((None, None, static.blocks.kv, width), key)

        of_ids = {
            "q_ids": pl.BlockSpec((None, 1, static.blocks.q), lambda b, h, n, i, *_: (b, 0, i[n])),
            "kv_ids": pl.BlockSpec((None, static.blocks.kv, 1), lambda b, h, n, i, j, *_: (b, j[n], 0)),
        }
        kinds = {"q": "query", "g": "query", "k": "key", "v": "key", "lse": "row", "delta": "row"}

        def body(i_ref, j_ref, flag_ref, visible_ref, length_ref, *refs):
            b, n = pl.program_id(0), pl.program_id(2)
            table = _Table(i_ref[n] * static.blocks.q, j_ref[n] * static.blocks.kv, length_ref[b], flag_ref[n], visible_ref[b, n])
            inputs = dict(zip(arrays, refs, strict=False))
            kernel(table, inputs, list(refs[len(arrays) : len(arrays) + len(out)]), list(refs[len(arrays) + len(out) :]))

        products = {"attention": 2, "attention_dq": 3, "attention_dkv": 4}[name]
        flops = products * 2 * self.batch * self.kv_heads * self.rows * static.blocks.kv * len(i) * self.head
        return launch(
            body,
            *tables,
            *arrays.values(),
            out=[(shape, dtype) for shape, dtype, _ in out],
            in_specs=[of_ids.get(n) or spec(kinds[n], a.shape[-1]) for n, a in arrays.items()],
            out_specs=[spec(kind, shape[-1]) for shape, _, kind in out],
            grid=(self.batch, self.kv_heads, len(i)),
            semantics=("parallel", "parallel", "arbitrary"),
            scratch=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            prefetch=len(tables),
            cost=pl.CostEstimate(flops=flops, bytes_accessed=sum(a.nbytes for a in arrays.values()), transcendentals=0),
            name=name,
        )


def _pad_axis(a: Any, axis: int, length: int) -> Any:
    more = length - a.shape[axis]
    return jnp.pad(a, [(0, more if d == axis else 0) for d in range(a.ndim)]) if more else a
