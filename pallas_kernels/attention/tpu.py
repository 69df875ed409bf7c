"""Attention for TPU: online softmax over the blocks of the score matrix that the mask leaves, forward and backward.

The query heads of a key head are rows of one matrix, position by position, so that row `r` is a query at position `r // G`, and one
product serves all heads. The grid walks over a list, in scalar memory, of the blocks that causality and windows leave (Dao et al. 2022,
arXiv:2205.14135, after the block-sparse lists of splash attention in jax). What a mask leaves of a block is known before tracing for each
128 x 128 tile of it: code is made for each pattern of tiles that occurs, which skips what is hidden and masks only what is cut. Blocks
that segments or lengths hide are known at run time, and are not computed.

Forward, chunks of scores are `[rows, keys]`: both products stream many rows through each tile of the matrix unit, and the sums of
weights are kept by lane until the end. Backward they are `[keys, rows]`, whose statistics are lanes; of the five products only that for
dq needs its factor transposed. dq of all rows is summed in VMEM, or, where that is too small, by a second call.

A query that sees no key has the logsumexp +inf, which makes every weight 0; what becomes of it is put in place afterwards, from the mean
of all values.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np

from kpt.errors import KernelError
from kpt.ops.base import Spec, Specs
from kpt.ops.mask import Causal, Lengths, Mask, Segments, Window
from pallas_kernels import tensorcore, tuned
from pallas_kernels.attention.blocks import data_terms, visible_range
from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.tensorcore import LANES, budget, dot, launch, padded_bytes, require_fit, require_multiples

HIDDEN = -0.7 * float(np.finfo(np.float32).max)
LOWEST = HIDDEN / 2
"""A maximum is HIDDEN where nothing was seen, and LOWEST where -inf alone was, which makes NaN."""
MOST_INTEGERS = 7 << 15
"""Of the list of blocks, in 1 MiB of scalar memory; an eighth of it is left to the compiler."""
MOST_PATTERNS = 6
"""Code is made for these; blocks with rarer patterns of tiles are masked as a whole."""
FIRST, LAST = 1, 2
"""Flags of a step: it opens or closes a block of the result."""
UNSEEN, UNCUT, CUT = 0, 1, 2
"""Of a tile by the mask; and of a block by segments and lengths, at run time."""
FORWARD_CHUNK, BACKWARD_CHUNK = (256, 1024), (512, 512)
"""Rows and keys, and keys and rows, of the scores that live at a time."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows (queries of all heads of a key head) and keys of a block of scores in each pass, multiples of 128."""

    MULTIPLE: ClassVar[int] = LANES
    q: int
    kv: int
    q_bwd: int
    kv_bwd: int

    def __post_init__(self) -> None:
        require_multiples(self)


@dataclasses.dataclass(frozen=True)
class _Static:
    """What is known before tracing. `unit` is what a score is multiplied with before the exponential to base 2."""

    mask: Mask
    scale: float
    cap: float | None
    out_dtype: str
    blocks: Blocks
    group: int
    queries: int
    keys: int

    @property
    def unit(self) -> float:
        return (self.scale if self.cap is None else self.cap) * math.log2(math.e)


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
    blocks = default_blocks(specs, params)
    if (need := _need(blocks, q.shape[3], v.shape[3], q.dtype)) > budget():
        return f"holds {blocks.q} queries and {blocks.kv} keys in VMEM, which take {need} bytes of {budget()}"
    if (count := _integers(blocks, q, k, mask)) > MOST_INTEGERS:
        return f"lists at most {MOST_INTEGERS} integers on blocks of scores, and there are {count}"
    return None


def _integers(blocks: Blocks, q: Spec, k: Spec, mask: Mask) -> int:
    """In scalar memory: four a step, and what is left of it in each batch entry where data hide. These are rows, which the compiler pads
    to a power of two up to 8, and then to a multiple of 8."""
    rows = q.shape[1] * (q.shape[2] // k.shape[2])
    steps = pl.cdiv(rows, min(blocks.q, blocks.q_bwd)) * pl.cdiv(k.shape[1], min(blocks.kv, blocks.kv_bwd))
    batch = q.shape[0] if data_terms(mask) else 1
    return steps * (4 + (_padded(batch, 8) if batch > 8 else 1 << (batch - 1).bit_length()))


def default_blocks(specs: Specs, params: Mapping[str, Any]) -> Blocks:
    """Two thousand rows by a thousand keys, halved while VMEM is smaller, and equal parts of shorter sequences."""
    q, k, v = (specs[n] for n in "qkv")
    rows, keys = q.shape[1] * (q.shape[2] // k.shape[2]), k.shape[1]
    most = [2048, 1024, 1024, 1024]
    while True:
        blocks = Blocks(*(_padded(pl.cdiv(n, pl.cdiv(n, m))) for n, m in zip((rows, keys, rows, keys), most, strict=True)))
        if _need(blocks, q.shape[3], v.shape[3], q.dtype) <= budget() or max(most) == LANES:
            return blocks
        most = [max(LANES, m // 2) for m in most]


def _padded(length: int, block: int = LANES) -> int:
    return pl.cdiv(length, block) * block


def _need(blocks: Blocks, head: int, head_v: int, dtype: Any) -> int:
    """Bytes of VMEM of the hungrier pass: inputs and results in two buffers, sums, and the chunks of scores that live."""

    def held(rows: int, keys: int, of_rows: int, of_keys: int, chunk: tuple[int, int], chunked: tuple[int, int]) -> int:
        wide = 2 * padded_bytes((rows, max(head, head_v)), dtype) * of_rows + 2 * padded_bytes((keys, max(head, head_v)), dtype) * of_keys
        return wide + 6 * padded_bytes([min(a, b) for a, b in zip(chunk, chunked, strict=True)], jnp.float32)

    def total(rows: int) -> int:
        return padded_bytes((rows, max(head, head_v)), jnp.float32)

    forward = (
        held(blocks.q, blocks.kv, 2, 2, FORWARD_CHUNK, (blocks.q, blocks.kv))
        + total(blocks.q)
        + 2 * padded_bytes((blocks.q, LANES), jnp.float32)
    )
    backward = (
        held(blocks.q_bwd, blocks.kv_bwd, 3, 4, BACKWARD_CHUNK, (blocks.kv_bwd, blocks.q_bwd))
        + 2 * total(blocks.kv_bwd)
        + total(blocks.q_bwd)
    )
    return max(forward, backward)


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
      `[B, T, N, Hv]`. NaN for a query all of whose visible scores are -inf, also where the mask's fill is finite, and the plain
      formula would give the mean of the hidden values.

    Raises:
      KernelError: the blocks do not fit VMEM.
    """
    (b, t, n, h), (_, s, kv_heads, head_v) = q.shape, v.shape
    group = n // kv_heads
    given = {n: Spec(a.shape, str(a.dtype)) for n, a in zip("qkv", (q, k, v), strict=True)}
    ids = {"q_segment_ids": q_segment_ids, "kv_segment_ids": kv_segment_ids, "kv_lengths": kv_lengths}

    def fits(found: Blocks) -> bool:
        listed = _integers(found, given["q"], given["k"], mask) <= MOST_INTEGERS
        return listed and tensorcore.fits(_need(found, h, head_v, q.dtype))

    found = blocks or tuned.blocks("attention", Blocks, {"mask": mask, "out_dtype": out_dtype}, fits, q=q, k=k, v=v, **ids)
    chosen = found or default_blocks(given, {"mask": mask})
    require_fit(chosen, _need(chosen, h, head_v, q.dtype))
    if (count := _integers(chosen, given["q"], given["k"], mask)) > MOST_INTEGERS:
        raise KernelError(f"{chosen} was asked for: {4 * count} bytes of scalar memory", f"Lists of blocks have {4 * MOST_INTEGERS} bytes",
                          "Pass larger blocks, or none for the defaults")  # fmt: skip
    scale = 1 / math.sqrt(h) if scale is None else float(scale)
    if scale <= 0:  # the softmax multiplies differences of scores with a positive number
        q, scale = (-q, -scale) if scale else (q * 0, 1.0)
    static = _Static(mask, scale, logits_soft_cap, str(jnp.dtype(out_dtype or q.dtype)), chosen, group, t, s)
    segments = [None, None] if q_segment_ids is None or kv_segment_ids is None else [q_segment_ids, kv_segment_ids]
    terms = {type(term) for term in mask.terms}
    needs = {Segments: (q_segment_ids, kv_segment_ids), Lengths: (kv_lengths,)}
    for term in terms & needs.keys():
        if any(a is None for a in needs[term]):
            raise KernelError(f"attention with {term.__name__} was called", "The arrays that they are in were not given",
                              "Pass q_segment_ids and kv_segment_ids, or kv_lengths")  # fmt: skip
    data = [*(segments if Segments in terms else [None, None]), kv_lengths if Lengths in terms else None]
    q, k, v, *data = vary_alike(q, k, v, *data)
    if data[0] is not None:
        data[0] = jnp.repeat(data[0], group, 1)
    rows = q.reshape(b, t, kv_heads, group, h).transpose(0, 2, 1, 3, 4).reshape(b, kv_heads, t * group, h)
    out = _attention(static, rows, *(a.transpose(0, 2, 1, 3) for a in (k, v)), *data)
    return out.reshape(b, kv_heads, t, group, head_v).transpose(0, 2, 1, 3, 4).reshape(b, t, n, head_v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, q, k, v, q_ids, kv_ids, lengths):
    """Of `[B, K, T G, H]`, `[B, K, S, H]` and `[B, K, S, Hv]`; `q_ids` by row."""
    return _fwd(static, q, k, v, q_ids, kv_ids, lengths)[0]


def _fwd(static, q, k, v, q_ids, kv_ids, lengths):
    blocks = static.blocks
    call = _Call(static, blocks.q, blocks.kv, q, k, v, q_ids, kv_ids, lengths)
    head_v = v.shape[-1]
    lag = tensorcore.generation().mxu > LANES

    def kernel(step: _Step, inputs: dict[str, Any], outputs: list[Any], scratch: list[Any]) -> None:
        (out_ref, lse_ref), (m_ref, total_ref, acc_ref) = outputs, scratch

        @pl.when(step.first)
        def _() -> None:
            m_ref[...] = jnp.full_like(m_ref, HIDDEN)
            total_ref[...] = jnp.zeros_like(total_ref)
            acc_ref[...] = jnp.zeros_like(acc_ref)

        def scores(chunk: _Chunk, by_data: bool) -> jax.Array:
            s = dot(inputs["q"][chunk.outer, :], inputs["k"][chunk.inner, :], 1, 1)
            if static.cap is not None:
                s = jnp.tanh(s * (static.scale / static.cap))
            return call.masked(step, inputs, s, chunk, by_data)

        def softmax(chunk: _Chunk, s: jax.Array) -> None:
            rows = chunk.outer
            before = m_ref[rows, :]
            m = jnp.maximum(before, jnp.max(s, 1, keepdims=True))
            if not chunk.may_hide:  # every row sees a key
                m = jnp.maximum(m, LOWEST)
            floor = jnp.maximum(m, LOWEST)
            shrink = jnp.exp2((jnp.maximum(before, LOWEST) - floor) * static.unit)
            p = jnp.exp2((s - _wide(floor, s.shape[1])) * static.unit)
            m_ref[rows, :] = m
            total_ref[rows, :] = total_ref[rows, :] * shrink + sum(p[:, i : i + LANES] for i in range(0, p.shape[1], LANES))
            value = inputs["v"][chunk.inner, :]
            acc_ref[rows, :] = acc_ref[rows, :] * _wide(shrink, head_v) + dot(p.astype(value.dtype), value)

        def run(chunks: list[_Chunk], by_data: bool) -> None:
            held: list[tuple[_Chunk, jax.Array]] = []
            for chunk in chunks:
                held.append((chunk, scores(chunk, by_data)))
                if len(held) > lag:  # where the matrix unit is the faster one, it is a chunk ahead
                    softmax(*held.pop(0))
            for item in held:
                softmax(*item)

        call.run(step, run, FORWARD_CHUNK)

        @pl.when(step.last)
        def _() -> None:
            total = jnp.sum(total_ref[...], 1, keepdims=True)
            m = m_ref[...]
            # A maximum may have lost a NaN (on some machines it does); the sum has it.
            blind = (m == HIDDEN) & (total == 0)
            total = jnp.where(m == LOWEST, jnp.nan, total)
            out = acc_ref[...] / _wide(jnp.where(blind, 1.0, total), head_v)
            out_ref[...] = out.astype(out_ref.dtype)
            lse = jnp.where(blind, jnp.inf, jnp.maximum(m, LOWEST) * static.unit + jnp.log2(total))
            lse_ref[...] = lse.T[:1]

    out, lse = call(
        kernel,
        {},
        out=[((call.rows, head_v), static.out_dtype, "row"), ((1, call.rows), jnp.float32, "lane")],
        scratch=[(blocks.q, LANES), (blocks.q, LANES), (blocks.q, head_v)],
        by_rows=True,
        products=2,
        name="attention",
    )
    out, lse = out[:, :, : q.shape[2]], lse[:, :, 0, : q.shape[2]]
    if call.may_be_blind:
        out = jnp.where(jnp.isposinf(lse)[..., None], _mean_value(static, v)[:, :, None].astype(out.dtype), out)
    return out, (q, k, v, q_ids, kv_ids, lengths, out, lse)


def _mean_value(static, v):
    """What a query that sees no key gets: the mean of all values, or NaN; `[B, K, Hv]`."""
    mean = jnp.mean(v.astype(jnp.float32), 2)
    return mean if math.isfinite(static.mask.fill) else jnp.full_like(mean, jnp.nan)


def _bwd(static, residuals, g):
    q, k, v, q_ids, kv_ids, lengths, out, lse = residuals
    blocks = static.blocks
    call = _Call(static, blocks.q_bwd, blocks.kv_bwd, q, k, v, q_ids, kv_ids, lengths)
    blind = jnp.isposinf(lse)
    gf = g.astype(jnp.float32)
    delta = jnp.where(blind, 0.0, jnp.sum(gf * out.astype(jnp.float32), -1))
    more = {"g": g.astype(v.dtype), "lse": lse, "delta": delta}
    (rows, head), (keys, head_v) = (call.rows, q.shape[-1]), (call.keys, v.shape[-1])

    def passes(wants_q: bool, wants_kv: bool, every_row: bool, name: str) -> list[jax.Array]:
        """One call that makes dq, dk and dv, or some of them; `every_row`: dq of all rows is held at once."""

        def kernel(step: _Step, inputs: dict[str, Any], outputs: list[Any], scratch: list[Any]) -> None:
            # What is not wanted is not touched.
            nothing: Any = None
            dq_ref, dk_ref, dv_ref = (*outputs[:1], nothing, nothing) if not wants_kv else [nothing] * (not wants_q) + outputs
            dq_acc, dk_acc, dv_acc = (*scratch[:1], nothing, nothing) if not wants_kv else [nothing] * (not wants_q) + scratch
            start = pl.multiple_of(step.row, LANES) if every_row else 0

            @pl.when(step.begins if every_row else step.first)
            def _() -> None:
                if wants_q:
                    dq_acc[...] = jnp.zeros_like(dq_acc)

            @pl.when(step.first)
            def _() -> None:
                if wants_kv:
                    dk_acc[...] = jnp.zeros_like(dk_acc)
                    dv_acc[...] = jnp.zeros_like(dv_acc)

            def run(chunks: list[_Chunk], by_data: bool) -> None:
                for chunk in chunks:
                    of_keys, of_rows = chunk.outer, chunk.inner
                    key, query, cotangent = inputs["k"][of_keys, :], inputs["q"][of_rows, :], inputs["g"][of_rows, :]
                    s = dot(key, query, 1, 1)
                    if static.cap is not None:
                        s = jnp.tanh(s * (static.scale / static.cap))
                    slope = None if static.cap is None else 1 - s * s
                    s = call.masked(step, inputs, s, chunk, by_data)
                    p = jnp.exp2(s * static.unit - inputs["lse"][:, of_rows])
                    ds = p * (dot(inputs["v"][of_keys, :], cotangent, 1, 1) - inputs["delta"][:, of_rows])
                    ds = (ds if slope is None else ds * slope).astype(query.dtype)
                    if wants_kv:
                        dv_acc[of_keys, :] += dot(p.astype(cotangent.dtype), cotangent)
                        dk_acc[of_keys, :] += dot(ds, query)
                    if wants_q:
                        place = pl.ds(start + of_rows.start, of_rows.stop - of_rows.start)
                        dq_acc[place, :] += dot(ds, key, 0, 0)

            call.run(step, run, BACKWARD_CHUNK, by_rows=False)

            @pl.when(step.last)
            def _() -> None:
                if wants_kv:
                    dk_ref[...] = (dk_acc[...] * static.scale).astype(dk_ref.dtype)
                    dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)

            @pl.when(step.ends if every_row else step.last)
            def _() -> None:
                if wants_q:
                    dq_ref[...] = (dq_acc[...] * static.scale).astype(dq_ref.dtype)

        results = [((rows, head), q.dtype, "every row" if every_row else "row")] * wants_q
        results += [((keys, head), k.dtype, "key"), ((keys, head_v), v.dtype, "key")] * wants_kv
        sums = [(rows if every_row else blocks.q_bwd, head)] * wants_q
        sums += [(blocks.kv_bwd, head), (blocks.kv_bwd, head_v)] * wants_kv
        return call(
            kernel, more, out=results, scratch=sums, by_rows=not wants_kv, products=2 + wants_q + 2 * wants_kv, name=name
        )  # fmt: skip

    every_row = 2 * padded_bytes((rows, head), q.dtype) + padded_bytes((rows, head), jnp.float32)
    if _need(blocks, head, head_v, q.dtype) + every_row <= budget():
        dq, dk, dv = passes(True, True, True, "attention_bwd")
    else:
        (dq,), (dk, dv) = passes(True, False, False, "attention_dq"), passes(False, True, False, "attention_dkv")
    dq, dk, dv = dq[:, :, : q.shape[2]], dk[:, :, : static.keys], dv[:, :, : static.keys]
    if call.may_be_blind:
        share = jnp.sum(jnp.where(blind[..., None], gf, 0.0), 2) / static.keys
        if not math.isfinite(static.mask.fill):
            share = jnp.where(blind.any(2)[..., None], jnp.nan, share)
        dv = (dv + share[:, :, None]).astype(v.dtype)
    return dq, dk, dv, None, None, None


_attention.defvjp(_fwd, _bwd)


def _wide(column: jax.Array, lanes: int) -> jax.Array:
    """A column that is repeated in all 128 lanes, in as many as asked for."""
    return column[:, :lanes] if lanes <= LANES else jnp.concatenate([column] * pl.cdiv(lanes, LANES), 1)[:, :lanes]


@dataclasses.dataclass(frozen=True)
class _Step:
    """Where the grid stands: first row and key of the block, what is left of the keys, and how the block is to be computed."""

    row: Any
    key: Any
    length: Any
    flags: Any
    pattern: Any
    state: Any
    begins: Any
    ends: Any

    @property
    def first(self) -> Any:
        return (self.flags & FIRST) != 0

    @property
    def last(self) -> Any:
        return (self.flags & LAST) != 0


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """A part of a block, in the order of its axes: slices of both, and what the mask cuts along the second one.

    Attributes:
      cut: for each 128 places of the second axis, whether the mask hides something there.
      may_hide: whether something of it may be hidden, by the mask or by data.
    """

    outer: slice
    inner: slice
    cut: tuple[bool, ...]
    by_rows: bool
    may_hide: bool


def _chunks(states: np.ndarray, sizes: tuple[int, int], by_rows: bool, by_data: bool) -> Iterator[_Chunk]:
    """What is left of a block with these states of tiles, `[rows / 128, keys / 128]`."""
    states = states if by_rows else states.T
    outer, inner = (max(1, size // LANES) for size in sizes)
    for start in range(0, states.shape[0], outer):
        here = states[start : start + outer]
        seen = np.flatnonzero((here != UNSEEN).any(0))
        if len(seen) == 0:
            continue
        for low in range(seen[0], seen[-1] + 1, inner):
            high = min(low + inner, seen[-1] + 1)
            cut = tuple((here[:, low:high] != UNCUT).any(0).tolist())
            yield _Chunk(
                slice(start * LANES, (start + len(here)) * LANES), slice(low * LANES, high * LANES), cut, by_rows, by_data or any(cut)
            )


class _Call:
    """What the kernels share: padded operands, the list of blocks, and the mask."""

    def __init__(self, static: _Static, block_q: int, block_kv: int, q: Any, k: Any, v: Any, q_ids: Any, kv_ids: Any, lengths: Any):
        self.static, self.lengths, self.block_q, self.block_kv = static, lengths, block_q, block_kv
        self.batch, self.heads, rows, self.head = q.shape
        self.rows, self.keys = _padded(rows, block_q), _padded(static.keys, block_kv)
        self.arrays = {"q": self.pad(q, 2), "k": _pad_axis(k, 2, self.keys), "v": _pad_axis(v, 2, self.keys)}
        self.ids = None if q_ids is None else (self.pad(q_ids, 1), _pad_axis(kv_ids, 1, self.keys))
        self.by_data = bool(data_terms(static.mask))
        # Of each row the visible keys by causality and windows. Rows of padding see what the last row sees.
        positions = np.minimum(np.arange(self.rows), rows - 1) // static.group
        first, last = visible_range(static.mask, positions, static.keys)
        self.may_be_blind = self.by_data or not np.all(first < last)
        self.states = _tiles(first, last, self.keys).reshape(self.rows // block_q, block_q // LANES, self.keys // block_kv, -1)
        self.states = self.states.swapaxes(1, 2)  # [row blocks, key blocks, tiles, tiles]

    def pad(self, a: Any, axis: int) -> Any:
        return _pad_axis(a, axis, self.rows)

    def masked(self, step: _Step, inputs: dict[str, Any], s: jax.Array, chunk: _Chunk, by_data: bool) -> jax.Array:
        """Scores of a chunk, HIDDEN where the mask hides."""
        if not chunk.may_hide:
            return s
        parts = []
        for i, cut in enumerate(chunk.cut):
            part = s[:, i * LANES : (i + 1) * LANES]
            if cut or by_data:
                low = chunk.inner.start + i * LANES
                inner = slice(low, low + LANES)
                rows, keys = (chunk.outer, inner) if chunk.by_rows else (inner, chunk.outer)
                see = self._see(step, inputs, part.shape, rows, keys, chunk.by_rows, cut, by_data)
                part = jnp.where(see, jnp.maximum(part, LOWEST), HIDDEN)
            parts.append(part)
        return jnp.concatenate(parts, 1)

    def _see(self, step: _Step, inputs: Any, shape: Any, rows: slice, keys: slice, by_rows: bool, cut: bool, by_data: bool) -> jax.Array:
        """Which scores of a part of a chunk the mask leaves."""
        static, group = self.static, self.static.group
        row = jax.lax.broadcasted_iota(jnp.int32, shape, 0 if by_rows else 1)
        key = jax.lax.broadcasted_iota(jnp.int32, shape, 1 if by_rows else 0)
        first_row, first_key = step.row + rows.start, step.key + keys.start
        terms = []
        if cut:  # `position - key >= n` is `row - group key >= group n`, with no division
            ahead, here = row - group * key, first_row - group * first_key
            for term in static.mask.terms:
                match term:
                    case Causal(offset):
                        terms.append(ahead >= -group * offset - here)
                    case Window(left, right, offset):
                        if left is not None:
                            terms.append(ahead < group * (left - offset + 1) - here)
                        if right is not None:
                            terms.append(ahead >= -group * (offset + right) - here)
        if cut or self.lengths is not None:
            terms.append(key < step.length - first_key)
        if by_data and self.ids is not None:
            column, lane = ("q_ids", "kv_ids") if by_rows else ("kv_ids", "q_ids")
            of_column, of_lane = (rows, keys) if by_rows else (keys, rows)
            terms.append(inputs[column][of_column, :] == inputs[lane][:, of_lane])
        return functools.reduce(jnp.logical_and, terms)

    def run(self, step: _Step, body: Any, sizes: tuple[int, int], by_rows: bool = True) -> None:
        """`body(chunks, by_data)` for the block's pattern of tiles, unless it is hidden."""
        for n, states in enumerate(self.patterns):
            for by_data in (False, True) if self.by_data else (False,):
                chunks = list(_chunks(states, sizes, by_rows, by_data))
                pl.when((step.pattern == n) & (step.state == (CUT if by_data else UNCUT)))(functools.partial(body, chunks, by_data))

    @functools.cached_property
    def patterns(self) -> list[np.ndarray]:
        """States of tiles for which code is made."""
        return self._patterns[0]

    @functools.cached_property
    def _patterns(self) -> tuple[list[np.ndarray], np.ndarray]:
        """They, and which one each block has."""
        flat = self.states.reshape(-1, *self.states.shape[2:])
        kinds, which, counts = np.unique(flat, axis=0, return_inverse=True, return_counts=True)
        shown = [n for n in np.argsort(-counts, kind="stable") if kinds[n].any()]
        known, rest = shown, []
        if len(shown) > MOST_PATTERNS:
            known, rest = shown[: MOST_PATTERNS - 1], shown[MOST_PATTERNS - 1 :]
        place = np.zeros(len(kinds), np.int64)
        place[known] = np.arange(len(known))
        place[rest] = len(known)
        found = [kinds[n] for n in known] + [np.full_like(kinds[0], CUT)] * bool(rest)
        return found, place[which.reshape(-1)].reshape(self.states.shape[:2])

    def _steps(self, by_rows: bool) -> tuple[np.ndarray, ...]:
        """Row block, key block, flags and pattern of each step. A block of the result to which none belongs gets one, not computed."""
        shown = self.states.any((2, 3))
        listed = shown.copy()
        alone = ~shown.any(1 if by_rows else 0)
        if by_rows:
            listed[alone, 0] = True
        else:
            listed[0, alone] = True
        i, j = np.nonzero(listed) if by_rows else np.nonzero(listed.T)[::-1]
        owner = i if by_rows else j
        change = np.flatnonzero(np.diff(owner)) + 1
        flags = np.zeros(len(i), np.int64)
        flags[[0, *change]] |= FIRST
        flags[[*(change - 1), len(i) - 1]] |= LAST
        return i, j, flags, self._patterns[1][i, j]

    def _state(self, i: np.ndarray, j: np.ndarray) -> jax.Array:
        """What lengths and segments leave of each step's block: `[B, steps]` int32, or `[1, steps]` where there are none."""
        shown = jnp.asarray(self.states.any((2, 3))[i, j])[None]
        whole = jnp.ones_like(shown)
        if self.lengths is not None:
            start = jnp.asarray(j * self.block_kv)[None]
            shown = shown & (start < self.lengths[:, None])
            whole = whole & (start + self.block_kv <= self.lengths[:, None])
        if self.ids is not None:
            ends = []
            for ids, block in zip(self.ids, (self.block_q, self.block_kv), strict=True):
                of_block = ids.reshape(self.batch, -1, block)
                ends.append((of_block.min(2), of_block.max(2)))
            (q_low, q_high), (kv_low, kv_high) = ends
            shown = shown & (q_low[:, i] <= kv_high[:, j]) & (kv_low[:, j] <= q_high[:, i])
            whole = whole & (q_low[:, i] == kv_high[:, j]) & (kv_low[:, j] == q_high[:, i])
        return jnp.where(shown, jnp.where(whole, UNCUT, CUT), UNSEEN).astype(jnp.int32)

    def __call__(
        self, kernel: Any, more: dict[str, Any], *, out: Any, scratch: Any, by_rows: bool, products: int, name: str
    ) -> list[jax.Array]:
        """Runs `kernel(step, inputs, outputs, scratch)` over the list of blocks.

        Args:
          more: arrays of rows beside those of the forward pass.
          out: last two axes, dtype and kind ("row", "every row", "key", "lane") of each result.
          scratch: shapes, float32.
          by_rows: walk along the keys of a block of rows; else along the rows of a block of keys.
          products: of matrices, for each block.
        """
        static = self.static
        i, j, flags, pattern = self._steps(by_rows)
        lengths = jnp.full((self.batch,), static.keys, jnp.int32)
        if self.lengths is not None:
            lengths = jnp.minimum(self.lengths.astype(jnp.int32), static.keys)
        state = self._state(i, j)
        tables = [jnp.asarray(a, jnp.int32) for a in (i, j, flags, pattern)] + [state, lengths]
        arrays = self.arrays | {n: self.pad(a, 2) for n, a in more.items()}
        arrays = {n: a[:, :, None] if a.ndim == 3 else a for n, a in arrays.items()}
        specs = {
            n: self._spec({"k": "key", "v": "key", "lse": "lane", "delta": "lane"}.get(n, "row"), a.shape[-1]) for n, a in arrays.items()
        }
        if self.ids is not None:  # the ids of the axis that scores have in sublanes are a column
            (q_ids, kv_ids), forward = self.ids, name == "attention"
            arrays |= {
                "q_ids": q_ids[..., None] if forward else q_ids[:, None],
                "kv_ids": kv_ids[:, None] if forward else kv_ids[..., None],
            }
            specs |= {"q_ids": self._ids_spec(self.block_q, forward, 0), "kv_ids": self._ids_spec(self.block_kv, not forward, 1)}

        def body(i_ref, j_ref, flag_ref, pattern_ref, state_ref, length_ref, *refs):
            b, n = pl.program_id(0), pl.program_id(2)
            step = _Step(
                i_ref[n] * self.block_q, j_ref[n] * self.block_kv, length_ref[b], flag_ref[n], pattern_ref[n],
                state_ref[b if state.shape[0] > 1 else 0, n], n == 0, n == len(i) - 1,
            )  # fmt: skip
            inputs = dict(zip(arrays, refs, strict=False))
            kernel(step, inputs, list(refs[len(arrays) : len(arrays) + len(out)]), list(refs[len(arrays) + len(out) :]))

        area = sum(int((states != UNSEEN).sum()) for states in self.states[i, j]) * LANES * LANES
        return launch(
            body,
            *tables,
            *arrays.values(),
            out=[((self.batch, self.heads, *shape), dtype) for shape, dtype, _ in out],
            in_specs=list(specs.values()),
            out_specs=[self._spec(kind, shape[-1]) for shape, _, kind in out],
            grid=(self.batch, self.heads, len(i)),
            semantics=("parallel", "parallel", "arbitrary"),
            scratch=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            prefetch=len(tables),
            cost=pl.CostEstimate(
                flops=2 * products * self.batch * self.heads * area * self.head,
                bytes_accessed=sum(a.nbytes for a in arrays.values()),
                transcendentals=self.batch * self.heads * area,
            ),
            name=name,
        )

    def _spec(self, kind: str, width: int) -> Any:
        match kind:
            case "row":
                return pl.BlockSpec((None, None, self.block_q, width), lambda b, h, n, i, *_: (b, h, i[n], 0))
            case "every row":
                return pl.BlockSpec((None, None, self.rows, width), lambda b, h, n, *_: (b, h, 0, 0))
            case "lane":
                return pl.BlockSpec((None, None, 1, self.block_q), lambda b, h, n, i, *_: (b, h, 0, i[n]))
        return pl.BlockSpec((None, None, self.block_kv, width), lambda b, h, n, i, j, *_: (b, h, j[n], 0))

    def _ids_spec(self, block: int, column: bool, table: int) -> Any:
        if column:
            return pl.BlockSpec((None, block, 1), lambda b, h, n, *tables: (b, tables[table][n], 0))
        return pl.BlockSpec((None, 1, block), lambda b, h, n, *tables: (b, 0, tables[table][n]))


def _tiles(first: np.ndarray, last: np.ndarray, keys: int) -> np.ndarray:
    """State of each 128 x 128 tile, from the first and one past the last key that each row sees: `[rows / 128, keys / 128]`."""
    starts = np.arange(0, keys, LANES)[None]
    low, high = first.reshape(-1, LANES), last.reshape(-1, LANES)
    empty = (low >= high).all(1)[:, None]
    hidden = empty | (starts >= high.max(1)[:, None]) | (starts + LANES <= low.min(1)[:, None])
    whole = (starts >= low.max(1)[:, None]) & (starts + LANES <= high.min(1)[:, None])
    return np.where(hidden, UNSEEN, np.where(whole, UNCUT, CUT)).astype(np.uint8)


def _pad_axis(a: Any, axis: int, length: int) -> Any:
    more = length - a.shape[axis]
    return jnp.pad(a, [(0, more if d == axis else 0) for d in range(a.ndim)]) if more else a
