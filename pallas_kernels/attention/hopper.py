"""Attention for NVIDIA Hopper, forward: a softmax of one warpgroup runs while the tensor cores multiply for another.

A thread block stays on its multiprocessor and takes one tile of queries after another. One warp feeds queries, keys and values through
the copy engine and never waits for a tile to end. The other warpgroups own 64 queries each. A token goes round among them: who has it
issues the product of its weights with the values and, right behind, that of its queries with the next keys, and passes it on; what
lies between, the softmax, happens meanwhile (Shah et al. 2024, arXiv:2407.08608, section 3.1).
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from kpt.ops.mask import Mask
from pallas_kernels.attention.blocks import visible_range
from pallas_kernels.hopper_gemm import BUFFERS, MULTIPROCESSORS, SHARED_BYTES, SWIZZLE

ROWS = 64
"""Queries of a warpgroup: the rows of the tensor cores' instruction."""
LOWEST = -1e38
"""A maximum over hidden scores alone: finite, so that what is hidden gets a weight of 0 and not NaN."""
OF_ROWS, OF_COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
WARP, WARPGROUP = 32, 128
L2_BYTES = 24 * 2**20
"""Of keys and values that are worked on at a time, in an L2 of 50 MiB."""
TILE_COST = 1
"""What a tile costs besides its steps, in steps."""
MOST_PLANNED = 1 << 16
"""Items that are given out by their costs; beyond, in turn."""
TILED = (plgpu.TilingTransform((8, SWIZZLE // 2)), plgpu.SwizzleTransform(SWIZZLE))


@dataclasses.dataclass(frozen=True)
class Forward:
    """How the forward pass is cut: warpgroups of 64 queries, keys of a step, steps in flight, tiles of queries in flight."""

    warpgroups: int = 2
    keys: int = 128
    stages: int = 2
    queries_ahead: int = 2

    @property
    def queries(self) -> int:
        return ROWS * self.warpgroups

    def shared_bytes(self, head: int, head_v: int) -> int:
        ring = self.stages * self.keys * (head + head_v) + self.queries_ahead * self.queries * head
        return 2 * (ring + self.warpgroups * BUFFERS * ROWS * ROWS) + 4 * self.queries + 1024


def forward_tiles(head: int, head_v: int) -> Forward:
    """The largest that fits shared memory and registers."""
    if max(head, head_v) <= 64:
        return Forward(warpgroups=3)
    for tiles in (Forward(), Forward(queries_ahead=1), Forward(keys=64), Forward(keys=64, queries_ahead=1)):
        if tiles.shared_bytes(head, head_v) <= SHARED_BYTES and (head_v <= 128 or tiles.keys == 64):
            return tiles
    raise AssertionError(f"head dims {head} and {head_v} are refused")


def bar(operation: str, index: Any, threads: int) -> None:
    """`bar.arrive` or `bar.sync` on one of the 16 barriers of a block: every thread arrives for itself, so no warp runs ahead of another."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def emit(_: Any, index: Any) -> None:
        from jax.experimental.mosaic.gpu import utils

        utils.inline_ptx(f"bar.{operation} $0, {threads};", index.registers[()], has_side_effects=True)

    emit(jnp.asarray(index, jnp.int32))


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The barriers of a block: the token of each multiplying warpgroup, and buffers that are free again."""

    warpgroups: int
    stages: int

    @property
    def first(self) -> int:
        return self.warpgroups + 2  # 0 is the block's, and each warpgroup has one

    def take(self, warpgroup: Any) -> None:
        bar("sync", self.first + warpgroup, 2 * WARPGROUP)

    def give(self, warpgroup: Any) -> None:
        """To the next one."""
        after = jnp.where(warpgroup == self.warpgroups - 1, 0, warpgroup + 1)
        bar("arrive", self.first + after, 2 * WARPGROUP)

    def _buffer(self, ring: int, slot: Any) -> Any:
        return self.first + self.warpgroups + ring * self.stages + slot

    def free(self, ring: int, slot: Any) -> None:
        """Called by all who read a buffer."""
        bar("arrive", self._buffer(ring, slot), self.warpgroups * WARPGROUP + WARP)

    def wait_free(self, ring: int, slot: Any) -> None:
        """Called by the warp that fills it."""
        bar("sync", self._buffer(ring, slot), self.warpgroups * WARPGROUP + WARP)


QUERIES, KEYS, VALUES = 2, 0, 1  # rings; that of the queries comes last, for it has another length


def shares(items: np.ndarray, costs: np.ndarray, workers: int) -> np.ndarray:
    """Items by worker, `[workers, 1 + most]`: how many, and which. In their order, each goes to who has the least to do so far."""
    if len(items) > MOST_PLANNED:
        owners = np.arange(len(items)) % workers
    else:
        load = [(0, worker) for worker in range(workers)]
        owners = np.empty(len(items), np.int64)
        for i, cost in enumerate(costs.tolist()):
            done, owners[i] = load[0]
            heapq.heapreplace(load, (done + cost, int(owners[i])))
    counts = np.bincount(owners, minlength=workers)
    table = np.zeros((workers, 1 + counts.max()), np.int32)
    table[:, 0] = counts
    for worker in range(workers):
        table[worker, 1 : 1 + counts[worker]] = items[owners == worker]
    return table


@dataclasses.dataclass(frozen=True)
class Static:
    """What is known before tracing. Scores are `cap tanh(scale / cap q k^T)` or `scale q k^T`; `scale` is positive."""

    mask: Mask
    scale: float
    cap: float | None
    queries: int
    keys: int

    @property
    def unit(self) -> float:
        """What a product, or its tanh, is multiplied with before an exponential to base 2."""
        return (self.scale if self.cap is None else self.cap) * math.log2(math.e)

    @property
    def diagonals(self) -> tuple[int | None, int | None]:
        """`low, high`: causality and windows let query `i` see no key before `i + low`, and none from `i + high` on."""
        first, last = visible_range(self.mask, np.array([2**40]), 2**50)
        low, high = int(first[0]) - 2**40, int(last[0]) - 2**40
        return (None if low == -(2**40) else low), (None if high == 2**50 - 2**40 else high)


@dataclasses.dataclass(frozen=True)
class Span:
    """Steps `[first, last)` over tiles of one axis, of which those in `[whole, end)` need no mask. At least one, so that all is written."""

    first: Any
    last: Any
    whole: Any
    end: Any

    def needs_mask(self, step: Any) -> Any:
        return (step < self.whole) | (step >= self.end)


def span_of_keys(static: Static, row: Any, rows: int, step: int) -> Span:
    """The tiles of `step` keys that queries `[row, row + rows)` see, by causality and windows. Works on numbers and arrays, traced or not."""
    np_ = jnp if isinstance(row, jax.Array) else np
    low, high = static.diagonals
    tiles = -(-static.keys // step)

    def bound(x: Any) -> Any:
        return np_.clip(x, 0, static.keys)

    reach = static.keys if high is None else bound(row + rows - 1 + high)
    common = static.keys if high is None else bound(row + high)
    first = 0 * row if low is None else np_.minimum(bound(row + low) // step, tiles - 1)
    whole = first if low is None else (bound(row + rows - 1 + low) + step - 1) // step
    last = np_.maximum(np_.minimum((reach + step - 1) // step, tiles), first + 1)
    return Span(first, last, whole, common // step + 0 * row)


def plan(tiles: int, outer: int, inner: int, bytes_of_outer: int, costs: np.ndarray) -> np.ndarray:
    """Work for each multiprocessor, as `shares` gives it: items are tiles of `inner` heads that read the same, `outer` times.

    As many of the outer ones as the L2 holds are made at a time, and of those the tiles that cost most come first, so that what is
    left for the end is short.

    Args:
      costs: of each tile, with something for its beginning and end.

    Returns:
      Items `(outer * inner + inner's) * tiles + tile`.
    """
    together = max(1, L2_BYTES // bytes_of_outer)
    longest_first = np.argsort(-costs, kind="stable")
    items = []
    for start in range(0, outer, together):
        heads = np.arange(start * inner, min(start + together, outer) * inner)
        items.append((heads[None] * tiles + longest_first[:, None]).reshape(-1))
    every = np.concatenate(items)
    return shares(every, costs[every % tiles], min(MULTIPROCESSORS, len(every)))


def padded(a: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Zeros behind, up to a multiple."""
    more = -a.shape[axis] % multiple
    return jnp.pad(a, [(0, more if i == axis else 0) for i in range(a.ndim)]) if more else a


def forward(static: Static, q: jax.Array, k: jax.Array, v: jax.Array, tiles: Forward | None = None) -> tuple[jax.Array, jax.Array]:
    """Attention and, to base 2, the logarithm of the sum of each query's exponentials.

    Args:
      q: `[B, T, N, H]`; k, v: `[B, S, K, H]` and `[B, S, K, Hv]`. 8 divides T and S (beyond `static.keys` they are not seen), 64 H and Hv.

    Returns:
      `[B, T, N, Hv]` and `[B, N, T']`, T' a multiple of the rows of a tile; +inf where no key is seen.
    """
    (b, t, n, head), (_, _, kv_heads, head_v) = q.shape, v.shape
    tiles = tiles or forward_tiles(head, head_v)
    group, row_tiles = n // kv_heads, pl.cdiv(t, tiles.queries)
    tokens = Tokens(tiles.warpgroups, tiles.stages)
    spans = span_of_keys(static, np.arange(row_tiles) * tiles.queries, tiles.queries, tiles.keys)
    table = plan(row_tiles, b * kv_heads, group, 2 * k.shape[1] * (head + head_v), spans.last - spans.first + TILE_COST)
    blocks, width = table.shape
    may_mask = static.mask.terms != () or static.keys % tiles.keys != 0
    log2 = 1 / math.log(2)

    def body(q_ref: Any, k_ref: Any, v_ref: Any, table_ref: Any, out_ref: Any, lse_ref: Any, *scratch: Any) -> None:
        q_ring, k_ring, v_ring, out_buffer, lse_buffer, q_full, k_full, v_full = scratch
        warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
        count = table_ref[block * width]

        def item(i: Any) -> tuple[Any, Any, Any, Span]:
            code = table_ref[block * width + 1 + i]
            row = lax.rem(code, row_tiles) * tiles.queries
            head_of_batch = code // row_tiles
            return head_of_batch // n, lax.rem(head_of_batch, n), row, span_of_keys(static, row, tiles.queries, tiles.keys)

        @pl.when(warpgroup == tiles.warpgroups)
        def _() -> None:
            plgpu.set_max_registers(40 if tiles.warpgroups == 2 else 32, action="decrease")

            def feed(i: Any, before: Any) -> Any:
                batch, head_of, row, span = item(i)
                kv_head = head_of // group
                slot = lax.rem(i, tiles.queries_ahead)

                @plgpu.warp_map
                def _(warp: Any) -> None:
                    @pl.when(warp == 0)
                    def _() -> None:
                        tokens.wait_free(QUERIES, slot)
                        plgpu.copy_gmem_to_smem(q_ref.at[batch, pl.ds(row, tiles.queries), head_of], q_ring.at[slot], q_full.at[slot])

                        @pl.loop(span.first, span.last)
                        def _(step: Any) -> None:
                            slot = lax.rem(before + step - span.first, tiles.stages)
                            at = pl.ds(step * tiles.keys, tiles.keys)
                            tokens.wait_free(KEYS, slot)
                            plgpu.copy_gmem_to_smem(k_ref.at[batch, at, kv_head], k_ring.at[slot], k_full.at[slot])
                            tokens.wait_free(VALUES, slot)
                            plgpu.copy_gmem_to_smem(v_ref.at[batch, at, kv_head], v_ring.at[slot], v_full.at[slot])

                return before + span.last - span.first

            lax.fori_loop(0, count, feed, jnp.int32(0))

        @pl.when(warpgroup < tiles.warpgroups)
        def _() -> None:
            plgpu.set_max_registers(232 if tiles.warpgroups == 2 else 160, action="increase")
            for slot in range(tiles.stages):
                tokens.free(KEYS, slot)
                tokens.free(VALUES, slot)
            for slot in range(tiles.queries_ahead):
                tokens.free(QUERIES, slot)

            @pl.when(warpgroup == tiles.warpgroups - 1)
            def _() -> None:
                tokens.give(warpgroup)

            mine = pl.ds(warpgroup * ROWS, ROWS)

            def attend(i: Any, before: Any) -> Any:
                batch, head_of, first_row, span = item(i)
                row = first_row + warpgroup * ROWS
                q_slot = lax.rem(i, tiles.queries_ahead)
                queries = q_ring.at[q_slot, mine]
                shape = (ROWS, tiles.keys)

                def wide(x: jax.Array, like: Any = shape) -> jax.Array:
                    return lax.broadcast_in_dim(x, like, [0])

                def slot_of(step: Any) -> Any:
                    return lax.rem(before + step - span.first, tiles.stages)

                def masked(s: jax.Array, step: Any) -> jax.Array:
                    key = step * tiles.keys + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
                    at = row + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
                    low, high = static.diagonals
                    if static.keys % tiles.keys:
                        s = jnp.where(key < static.keys, s, -jnp.inf)
                    if high is not None:
                        s = jnp.where(key < at + high, s, -jnp.inf)
                    if low is not None:
                        s = jnp.where(key >= at + low, s, -jnp.inf)
                    return s

                def softmax(s: jax.Array, step: Any, acc: jax.Array, m: jax.Array, total: jax.Array) -> tuple[jax.Array, ...]:
                    if static.cap is not None:
                        s = jnp.tanh(s * (static.scale / static.cap))
                    if may_mask:
                        s = lax.cond(span.needs_mask(step), lambda: masked(s, step), lambda: s)
                    after = jnp.maximum(m, s.max(axis=1) * static.unit)
                    shrink = jnp.exp2(m - after)
                    p = jnp.exp2(s * static.unit - wide(after))
                    acc = acc * wide(shrink, acc.shape)
                    total = total * shrink + p.sum(axis=1)
                    # Nothing of this may sink behind the wait for the token, when the tensor cores are this warpgroup's.
                    return lax.optimization_barrier((p.astype(v.dtype), acc, after, total))

                plgpu.barrier_wait(q_full.at[q_slot])
                plgpu.barrier_wait(k_full.at[slot_of(span.first)])
                tokens.take(warpgroup)

                def first_scores(scores: Any) -> jax.Array:
                    plgpu.wgmma(scores, queries, k_ring.at[slot_of(span.first)].transpose((1, 0)))
                    tokens.give(warpgroup)
                    return scores[...]

                s = pl.run_scoped(first_scores, plgpu.ACC(shape, jnp.float32))
                tokens.free(KEYS, slot_of(span.first))
                zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
                acc = plgpu.layout_cast(jnp.zeros((ROWS, head_v), jnp.float32), plgpu.Layout.WGMMA)
                m = plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), OF_ROWS)
                total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), OF_ROWS)

                def turn(step: Any, carry: Any) -> Any:
                    s, acc, m, total = carry
                    p, acc, m, total = softmax(s, step, acc, m, total)
                    slot, next_slot = slot_of(step), slot_of(step + 1)
                    plgpu.barrier_wait(v_full.at[slot])
                    plgpu.barrier_wait(k_full.at[next_slot])
                    tokens.take(warpgroup)

                    def products(refs: Any) -> None:
                        out, scores = refs
                        plgpu.wgmma(out, p, v_ring.at[slot])
                        plgpu.wgmma(scores, queries, k_ring.at[next_slot].transpose((1, 0)))
                        tokens.give(warpgroup)
                        plgpu.wgmma_wait(1)
                        tokens.free(VALUES, slot)

                    acc, s = pl.run_state(products)((plgpu.ACC.init(acc), plgpu.ACC.init(zeros)))
                    tokens.free(KEYS, next_slot)
                    return s, acc, m, total

                s, acc, m, total = lax.fori_loop(span.first, span.last - 1, turn, (s, acc, m, total))
                tokens.free(QUERIES, q_slot)
                p, acc, m, total = softmax(s, span.last - 1, acc, m, total)
                slot = slot_of(span.last - 1)
                plgpu.barrier_wait(v_full.at[slot])
                tokens.take(warpgroup)

                def last_product(out: Any) -> None:
                    plgpu.wgmma(out, p, v_ring.at[slot])
                    tokens.give(warpgroup)

                acc = pl.run_state(last_product)(plgpu.ACC.init(acc))
                tokens.free(VALUES, slot)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                lse_buffer[warpgroup] = jnp.where(total == 0, jnp.inf, m + jnp.log(total) * log2)
                acc = acc * wide(1 / total, acc.shape)
                for turn_, c in enumerate(range(0, head_v, ROWS)):
                    buffer = out_buffer.at[warpgroup, turn_ % BUFFERS]
                    if turn_ >= BUFFERS:
                        plgpu.wait_smem_to_gmem(BUFFERS - 1, wait_read_only=True)
                    buffer[...] = acc[:, c : c + ROWS].astype(out_ref.dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(buffer, out_ref.at[batch, pl.ds(row, ROWS), head_of, pl.ds(c, ROWS)])
                plgpu.copy_smem_to_gmem(lse_buffer.at[warpgroup], lse_ref.at[batch, head_of, pl.ds(row, ROWS)])
                return before + span.last - span.first

            lax.fori_loop(0, count, attend, jnp.int32(0))

            @pl.when(warpgroup == 0)
            def _() -> None:
                tokens.take(warpgroup)

            plgpu.wait_smem_to_gmem(0, wait_read_only=False)

    def shared(*shape: int) -> Any:
        return plgpu.SMEM(shape, q.dtype, transforms=TILED)

    return plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((b, t, n, head_v), q.dtype),
            jax.ShapeDtypeStruct((b, n, row_tiles * tiles.queries), jnp.float32),
        ],
        scratch_types=[
            shared(tiles.queries_ahead, tiles.queries, head),
            shared(tiles.stages, tiles.keys, head),
            shared(tiles.stages, tiles.keys, head_v),
            shared(tiles.warpgroups, BUFFERS, ROWS, ROWS),
            plgpu.SMEM((tiles.warpgroups, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=tiles.queries_ahead),
            plgpu.Barrier(num_barriers=tiles.stages),
            plgpu.Barrier(num_barriers=tiles.stages),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=tiles.warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="attention",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )(q, k, v, jnp.asarray(table.reshape(-1)))
