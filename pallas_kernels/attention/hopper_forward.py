"""Attention for NVIDIA Hopper, forward: the softmax of one warpgroup runs while the tensor cores multiply for another.

A thread block stays on its multiprocessor and takes one tile of queries after another. One warp feeds queries, keys and values
through the copy engine and never waits for a tile to end. The other warpgroups own 64 queries each. A token goes round among them:
who has it issues the product of its weights with the values and, right behind, that of its queries with the next keys, and passes it
on; what lies between, the softmax, happens meanwhile (Shah et al. 2024, arXiv:2407.08608, section 3.1).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.attention.calls import ROWS, Static
from pallas_kernels.attention.hopper import (
    OF_COLUMNS,
    OF_ROWS,
    PARAMS,
    WARPGROUP,
    Buffers,
    Numbers,
    Span,
    bar,
    fed_by,
    feeders,
    group_of,
    in_groups,
    masked,
    numbers_in_tiles,
    read,
    span_of_keys,
    spans_by_data,
)
from pallas_kernels.attention.hopper_plan import Work, plan, plan_by_data
from pallas_kernels.hopper_gemm import BUFFERS, SHARED_BYTES

TILE_COST = 1
"""What a tile costs besides its steps, in steps."""
LOWEST = -1e38
"""A maximum over hidden scores alone: finite, so that what is hidden gets a weight of 0 and not NaN."""


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
        return 2 * (ring + self.warpgroups * BUFFERS * ROWS * group_of(head_v)) + 2048


def forward_tiles(head: int, head_v: int, queries: int) -> Forward:
    """What is fastest of what fits shared memory and registers."""
    if max(head, head_v) <= 64 and queries > 1024:  # up to there smaller tiles are faster, of which less is past the end and hidden
        return Forward(warpgroups=3)
    for tiles in (Forward(), Forward(queries_ahead=1), Forward(keys=64), Forward(keys=64, queries_ahead=1)):
        if tiles.shared_bytes(head, head_v) <= SHARED_BYTES and (head_v <= 128 or tiles.keys == 64):
            return tiles
    raise AssertionError(f"head dims {head} and {head_v} are refused")


def forward(
    static: Static,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    numbers: Numbers | None = None,
    blind: jax.Array | None = None,
    tiles: Forward | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention and, to base 2, the logarithm of the sum of each query's exponentials.

    Args:
      q: `[B, T, N, H]`; k, v: `[B, S, K, H]` and `[B, S, K, Hv]`. 8 divides T and S (beyond `static.keys` they are not seen), 32 H and Hv.
      numbers: of queries and keys, where the mask has terms of data.
      blind: `[B, K, Hv]` float32, what queries get that see no key; NaN if None.

    Returns:
      `[B, T, N, Hv]` and `[B, N, T']`, T' a multiple of the rows of a tile; +inf where no key is seen.
    """
    (b, t, n, head), (_, s, kv_heads, head_v) = q.shape, v.shape
    tiles = tiles or forward_tiles(head, head_v, t)
    group, row_tiles = n // kv_heads, pl.cdiv(t, tiles.queries)
    if numbers is None:
        spans = span_of_keys(static, np.arange(row_tiles) * tiles.queries, tiles.queries, tiles.keys)
        table: Any = plan(row_tiles, b * kv_heads, group, 2 * s * (head + head_v), spans.steps + TILE_COST)[0]
    else:
        numbers = numbers_in_tiles(numbers, q, k, tiles.queries, tiles.keys)
        table = plan_by_data(spans_by_data(static, *numbers, tiles.queries, tiles.keys, of_keys=False), n, row_tiles)
    blocks, width = table.shape
    feeding, multiplying = (40, 232) if tiles.warpgroups == 2 else (32, 160)
    shape, piece = (ROWS, tiles.keys), group_of(head_v)
    # Barrier 0 is the block's, and each warpgroup has one.
    token = tiles.warpgroups + 2
    writers, readers = feeders(), tiles.warpgroups * WARPGROUP
    free_keys = Buffers(token + tiles.warpgroups, readers, writers)
    free_values = Buffers(free_keys.index + tiles.stages, readers, writers)
    free_queries = Buffers(free_values.index + tiles.stages, readers, writers)

    def take(warpgroup: Any) -> None:
        bar("sync", token + warpgroup, 2 * WARPGROUP)

    def give(warpgroup: Any) -> None:
        bar("arrive", token + jnp.where(warpgroup == tiles.warpgroups - 1, 0, warpgroup + 1), 2 * WARPGROUP)

    def body(*given: Any) -> None:
        refs: Any = given
        absent: Any = (None, None)
        q_ref, k_ref, v_ref, table_ref, *refs = refs
        (q_numbers_ref, kv_numbers_ref), refs = (refs[:2], refs[2:]) if numbers is not None else (absent, refs)
        blind_ref, refs = (refs[0], refs[1:]) if blind is not None else (None, refs)
        out_ref, lse_ref, q_ring, k_ring, v_ring, out_buffer, lse_buffer, q_full, k_full, v_full = refs
        warpgroup = lax.axis_index("warpgroup")
        work = Work(table_ref, lax.axis_index("block"), width, n, row_tiles)

        def item(i: Any) -> tuple[Any, Any, Any, Span]:
            batch, head_of, tile, behind = work.item(i, 1 if numbers is None else 5)
            row = tile * tiles.queries
            return batch, head_of, row, Span(*behind) if behind else span_of_keys(static, row, tiles.queries, tiles.keys)

        @pl.when(warpgroup == tiles.warpgroups)
        def _() -> None:
            plgpu.set_max_registers(feeding, action="decrease")

            def feed(i: Any, before: Any) -> Any:
                batch, head_of, row, span = item(i)
                kv_head, q_slot = head_of // group, lax.rem(i, tiles.queries_ahead)

                @fed_by(writers)
                def _() -> None:
                    free_queries.wait(q_slot)
                    plgpu.copy_gmem_to_smem(q_ref.at[batch, pl.ds(row, tiles.queries), head_of], q_ring.at[q_slot], q_full.at[q_slot])

                    @pl.loop(span.first, span.last)
                    def _(step: Any) -> None:
                        slot = lax.rem(before + step - span.first, tiles.stages)
                        at = pl.ds(step * tiles.keys, tiles.keys)
                        free_keys.wait(slot)
                        plgpu.copy_gmem_to_smem(k_ref.at[batch, at, kv_head], k_ring.at[slot], k_full.at[slot])
                        free_values.wait(slot)
                        plgpu.copy_gmem_to_smem(v_ref.at[batch, at, kv_head], v_ring.at[slot], v_full.at[slot])

                return before + span.steps

            lax.fori_loop(0, work.count, feed, jnp.int32(0))

        @pl.when(warpgroup < tiles.warpgroups)
        def _() -> None:
            plgpu.set_max_registers(multiplying, action="increase")
            for slot in range(tiles.stages):
                free_keys.free(slot)
                free_values.free(slot)
            for slot in range(tiles.queries_ahead):
                free_queries.free(slot)

            @pl.when(warpgroup == tiles.warpgroups - 1)
            def _() -> None:
                give(warpgroup)

            def attend(i: Any, before: Any) -> Any:
                batch, head_of, first_row, span = item(i)
                row = first_row + warpgroup * ROWS
                q_slot = lax.rem(i, tiles.queries_ahead)
                queries = q_ring.at[q_slot, pl.ds(warpgroup * ROWS, ROWS)]
                if numbers is not None:
                    q_numbers = read(q_numbers_ref.at[batch, pl.ds(row, ROWS)], OF_ROWS)

                def wide(x: jax.Array, like: tuple[int, ...] = shape) -> jax.Array:
                    return lax.broadcast_in_dim(x, like, [0])

                def slot_of(step: Any) -> Any:
                    return lax.rem(before + step - span.first, tiles.stages)

                def hide(s: jax.Array, step: Any) -> jax.Array:
                    key, same = step * tiles.keys, None
                    if numbers is not None:
                        place = kv_numbers_ref.at[batch, pl.ds(key, tiles.keys)]
                        kv_numbers = read(place, OF_COLUMNS)
                        same = wide(q_numbers) == lax.broadcast_in_dim(kv_numbers, shape, [1])
                    return masked(static, s, row, key, 0, same)

                def softmax(s: jax.Array, step: Any, acc: jax.Array, m: jax.Array, total: jax.Array) -> tuple[jax.Array, ...]:
                    if static.cap is not None:
                        s = jnp.tanh(s * (static.scale / static.cap))
                    if static.masks(tiles.keys):
                        s = lax.cond(span.needs_mask(step), lambda: hide(s, step), lambda: s)
                    after = jnp.maximum(m, s.max(axis=1) * static.unit)
                    shrink = jnp.exp2(m - after)
                    p = jnp.exp2(s * static.unit - wide(after))
                    acc = acc * wide(shrink, acc.shape)
                    total = total * shrink + p.sum(axis=1)
                    # Nothing of this may sink behind the wait for the token, when the tensor cores are this warpgroup's.
                    return lax.optimization_barrier((p.astype(v.dtype), acc, after, total))

                plgpu.barrier_wait(q_full.at[q_slot])
                plgpu.barrier_wait(k_full.at[slot_of(span.first)])
                take(warpgroup)

                def first_scores(scores: Any) -> jax.Array:
                    plgpu.wgmma(scores, queries, k_ring.at[slot_of(span.first)].transpose((1, 0)))
                    give(warpgroup)
                    return scores[...]

                s = pl.run_scoped(first_scores, plgpu.ACC(shape, jnp.float32))
                free_keys.free(slot_of(span.first))
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
                    take(warpgroup)

                    def products(refs: Any) -> None:
                        out, scores = refs
                        plgpu.wgmma(out, p, v_ring.at[slot])
                        plgpu.wgmma(scores, queries, k_ring.at[next_slot].transpose((1, 0)))
                        give(warpgroup)
                        plgpu.wgmma_wait(1)
                        free_values.free(slot)

                    acc, s = pl.run_state(products)((plgpu.ACC.init(acc), plgpu.ACC.init(zeros)))
                    free_keys.free(next_slot)
                    return s, acc, m, total

                s, acc, m, total = lax.fori_loop(span.first, span.last - 1, turn, (s, acc, m, total))
                free_queries.free(q_slot)
                p, acc, m, total = softmax(s, span.last - 1, acc, m, total)
                slot = slot_of(span.last - 1)
                plgpu.barrier_wait(v_full.at[slot])
                take(warpgroup)

                def last_product(out: Any) -> None:
                    plgpu.wgmma(out, p, v_ring.at[slot])
                    give(warpgroup)

                acc = pl.run_state(last_product)(plgpu.ACC.init(acc))
                free_values.free(slot)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                seen = total != 0
                lse_buffer[warpgroup] = jnp.where(seen, m + jnp.log(total) * math.log2(math.e), jnp.inf)
                acc = acc * wide(1 / total, acc.shape)
                for turn_, c in enumerate(range(0, head_v, piece)):
                    buffer, columns = out_buffer.at[warpgroup, turn_ % BUFFERS], pl.ds(c, piece)
                    if turn_ >= BUFFERS:
                        plgpu.wait_smem_to_gmem(BUFFERS - 1, wait_read_only=True)
                    out = acc[:, c : c + piece]
                    if blind_ref is not None:
                        other = read(blind_ref.at[batch, head_of // group, columns], OF_COLUMNS)
                        out = jnp.where(wide(seen, out.shape), out, lax.broadcast_in_dim(other, out.shape, [1]))
                    buffer[...] = out.astype(out_ref.dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(buffer, out_ref.at[batch, pl.ds(row, ROWS), head_of, columns])
                plgpu.copy_smem_to_gmem(lse_buffer.at[warpgroup], lse_ref.at[batch, head_of, pl.ds(row, ROWS)])
                return before + span.steps

            lax.fori_loop(0, work.count, attend, jnp.int32(0))

            @pl.when(warpgroup == 0)
            def _() -> None:
                take(warpgroup)

            plgpu.wait_smem_to_gmem(0, wait_read_only=False)

    def shared(*shape: int) -> Any:
        return in_groups(shape, q.dtype)

    launch = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((b, t, n, head_v), q.dtype),
            jax.ShapeDtypeStruct((b, n, row_tiles * tiles.queries), jnp.float32),
        ],
        scratch_types=[
            shared(tiles.queries_ahead, tiles.queries, head),
            shared(tiles.stages, tiles.keys, head),
            shared(tiles.stages, tiles.keys, head_v),
            shared(tiles.warpgroups, BUFFERS, ROWS, piece),
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
        compiler_params=PARAMS,
    )
    return launch(q, k, v, jnp.asarray(table.reshape(-1)), *(numbers or ()), *([] if blind is None else [blind]))
