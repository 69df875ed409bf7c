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

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from kpt.errors import KernelError
from kpt.ops.base import Spec, Specs
from kpt.ops.mask import Lengths, Mask, Segments
from pallas_kernels import tensorcore, tuned
from pallas_kernels.attention.blocks import data_terms
from pallas_kernels.attention.tpu_grid import HIDDEN, LOWEST, Blocks, Call, Chunk, Static, Step, padded
from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.tensorcore import LANES, budget, dot, padded_bytes, require_fit

MOST_INTEGERS = 7 << 15
"""Of the list of blocks, in 1 MiB of scalar memory; an eighth of it is left to the compiler."""
FORWARD_CHUNK, BACKWARD_CHUNK = (256, 1024), (512, 512)
"""Rows and keys, and keys and rows, of the scores that live at a time."""


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
    return steps * (4 + (padded(batch, 8) if batch > 8 else 1 << (batch - 1).bit_length()))


def default_blocks(specs: Specs, params: Mapping[str, Any]) -> Blocks:
    """Two thousand rows by a thousand keys, halved while VMEM is smaller, and equal parts of shorter sequences."""
    q, k, v = (specs[n] for n in "qkv")
    rows, keys = q.shape[1] * (q.shape[2] // k.shape[2]), k.shape[1]
    most = [2048, 1024, 1024, 1024]
    while True:
        blocks = Blocks(*(padded(pl.cdiv(n, pl.cdiv(n, m))) for n, m in zip((rows, keys, rows, keys), most, strict=True)))
        if _need(blocks, q.shape[3], v.shape[3], q.dtype) <= budget() or max(most) == LANES:
            return blocks
        most = [max(LANES, m // 2) for m in most]


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
    static = Static(mask, scale, logits_soft_cap, str(jnp.dtype(out_dtype or q.dtype)), chosen, group, t, s)
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
    call = Call(static, blocks.q, blocks.kv, q, k, v, q_ids, kv_ids, lengths)
    head_v = v.shape[-1]
    lag = tensorcore.generation().mxu > LANES

    def kernel(step: Step, inputs: dict[str, Any], outputs: list[Any], scratch: list[Any]) -> None:
        (out_ref, lse_ref), (m_ref, total_ref, acc_ref) = outputs, scratch

        @pl.when(step.first)
        def _() -> None:
            m_ref[...] = jnp.full_like(m_ref, HIDDEN)
            total_ref[...] = jnp.zeros_like(total_ref)
            acc_ref[...] = jnp.zeros_like(acc_ref)

        def scores(chunk: Chunk, by_data: bool) -> jax.Array:
            s = dot(inputs["q"][chunk.outer, :], inputs["k"][chunk.inner, :], 1, 1)
            if static.cap is not None:
                s = jnp.tanh(s * (static.scale / static.cap))
            return call.masked(step, inputs, s, chunk, by_data)

        def softmax(chunk: Chunk, s: jax.Array) -> None:
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

        def run(chunks: list[Chunk], by_data: bool) -> None:
            held: list[tuple[Chunk, jax.Array]] = []
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
    call = Call(static, blocks.q_bwd, blocks.kv_bwd, q, k, v, q_ids, kv_ids, lengths)
    blind = jnp.isposinf(lse)
    gf = g.astype(jnp.float32)
    delta = jnp.where(blind, 0.0, jnp.sum(gf * out.astype(jnp.float32), -1))
    more = {"g": g.astype(v.dtype), "lse": lse, "delta": delta}
    (rows, head), (keys, head_v) = (call.rows, q.shape[-1]), (call.keys, v.shape[-1])

    def passes(wants_q: bool, wants_kv: bool, every_row: bool, name: str) -> list[jax.Array]:
        """One call that makes dq, dk and dv, or some of them; `every_row`: dq of all rows is held at once."""

        def kernel(step: Step, inputs: dict[str, Any], outputs: list[Any], scratch: list[Any]) -> None:
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

            def run(chunks: list[Chunk], by_data: bool) -> None:
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
