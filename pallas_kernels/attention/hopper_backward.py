"""Attention for NVIDIA Hopper, backward: one kernel for dk and dv, one for dq, with all sums in one order.

Weights are computed again from the logarithm of each query's sum (Dao et al. 2022, arXiv:2205.14135, algorithm 4), in both kernels, so that
there are seven products where five would do. To sum dq in the kernel for dk and dv, it would have to be added to in memory by every tile
of keys, in float32, and the L2 takes longer for that than the two products (docs/benchmarks/hopper-notes-attention.md).

A thread block stays on its multiprocessor and takes one tile after another. One warp feeds it through the copy engine; two warpgroups own
64 keys each, or 64 queries, and multiply independently of each other: while one computes weights, the tensor cores are the other's.

At a tile's end nothing waits: a warpgroup frees its half of the tile behind its last product, so that the next is on its way, and writes
sums from registers. Of a tile of keys it takes the steps that see its own 64, and leaves the others by.

ptxas keeps products in flight only where no branch is between their start and their end, not even that of a wait for a barrier. So all
that a product needs is waited for before the first of a group is started.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
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
    fed_by,
    feeders,
    in_groups,
    masked,
    numbers_in_tiles,
    read,
    span_of_queries,
    write,
)
from pallas_kernels.attention.hopper_plan import Work, added, place_of_sums, plan_of_keys, sums_of_parts
from pallas_kernels.hopper_gemm import SHARED_BYTES

WARPGROUPS = 2
READERS = WARPGROUPS * WARPGROUP
TILE = ROWS * WARPGROUPS
"""Keys, or queries, of a thread block."""
TILE_COST = 2
"""What a tile costs besides its steps, in steps."""
FEEDING, MULTIPLYING = 24, 240  # registers of a thread
WIDEST = 128
"""Head dim of which one warpgroup holds sums for both dk and dv; `hopper_backward_wide.py` has the kernel for wider ones."""


@dataclasses.dataclass(frozen=True)
class StepsOfQueries:
    """How the kernel for dk and dv walks: queries of a step, and steps in flight."""

    queries: int = 64
    stages: int = 2

    def shared_bytes(self, head: int, head_v: int) -> int:
        rows = pl.cdiv(4 * self.stages * self.queries, 1024) * 1024
        return 2 * (TILE + self.stages * self.queries) * (head + head_v) + 3 * rows + 1024


def steps_of_queries(head: int, head_v: int) -> StepsOfQueries:
    """What is fastest of what fits. Of a thread's registers, sums for dk and dv take (H + Hv) / 2, scores a number of queries."""
    for steps in (StepsOfQueries(128, 2), StepsOfQueries(64, 3)):
        if steps.shared_bytes(head, head_v) <= SHARED_BYTES and (head + head_v) // 2 + steps.queries <= 192:
            return steps
    raise AssertionError(f"head dims {head} and {head_v} are refused")


def gradients_of_keys(
    static: Static,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    numbers: Numbers | None = None,
    blind: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """dk and dv.

    Scores are `[keys, queries]` here, so that weights and their gradients are left factors from registers. The products for the next
    scores are started behind those for dk.

    Args:
      q, k, v, numbers: as `forward` takes them. g: the cotangent, `[B, T, N, Hv]`. lse: as `forward` gives it.
      delta: `[B, N, T]` float32, for each query the product of result and cotangent; 0 for those that see no key.
      blind: `[B, K, Hv]` float32, a part of dv that all keys have.

    Returns:
      `[B, S, K, H]` and `[B, S, K, Hv]`.
    """
    (*_, n, head), (_, length, kv_heads, head_v) = q.shape, v.shape
    steps_ = steps_of_queries(head, head_v)
    rows, stages = steps_.queries, steps_.stages
    key_tiles = pl.cdiv(length, TILE)
    apart = numbers is None and rows < TILE and static.masks(TILE)
    if numbers is not None:
        numbers = numbers_in_tiles(numbers, q, k, rows, TILE)
    parts, table = plan_of_keys(static, q, v, numbers, TILE, rows, TILE_COST)
    group, share = n // kv_heads // parts, blind
    if parts > 1:
        blind = None  # is added where parts are
    blocks, width = table.shape
    shape = (ROWS, rows)
    writers = feeders()
    free_tile = Buffers(WARPGROUPS + 2, WARPGROUP, writers)  # barrier 0 is the block's, and each warpgroup has one
    free_queries = Buffers(free_tile.index + WARPGROUPS, READERS, writers)
    free_cotangents = Buffers(free_queries.index + stages, READERS, writers)

    def body(*given: Any) -> None:
        refs: Any = given
        absent: Any = (None, None)
        q_ref, k_ref, v_ref, g_ref, lse_ref, delta_ref, table_ref, *refs = refs
        (q_numbers_ref, kv_numbers_ref), refs = (refs[:2], refs[2:]) if numbers is not None else (absent, refs)
        blind_ref, refs = (refs[0], refs[1:]) if blind is not None else (None, refs)
        dk_ref, dv_ref, k_tile, v_tile, q_ring, g_ring, lse_ring, delta_ring, tile_full, q_full, g_full, *refs = refs
        numbers_ring: Any = refs[0] if refs else None
        warpgroup = lax.axis_index("warpgroup")
        work = Work(table_ref, lax.axis_index("block"), width, kv_heads * parts, key_tiles)
        item = functools.partial(work.item, fields=1 if numbers is None else 5)

        def located(batch: Any, part: Any, tile: Any, behind: Any) -> tuple[Any, Any, Any, Span]:
            key = tile * TILE
            return batch, part, key, Span(*behind) if behind else span_of_queries(static, key, TILE, rows)

        def following(span: Span, head_of: Any, step: Any) -> tuple[Any, Any]:
            """The next step: through the queries of a head, then those of the next."""
            over = step + 1 == span.last
            return jnp.where(over, head_of + 1, head_of), jnp.where(over, span.first, step + 1)

        @pl.when(warpgroup == WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(FEEDING, action="decrease")

            def copy_queries(batch: Any, head_of: Any, step: Any, slot: Any) -> None:
                at = pl.ds(step * rows, rows)
                free_queries.wait(slot)
                plgpu.copy_gmem_to_smem(q_ref.at[batch, at, head_of], q_ring.at[slot], q_full.at[slot])
                plgpu.copy_gmem_to_smem(lse_ref.at[batch, head_of, at], lse_ring.at[slot], q_full.at[slot])
                if numbers is not None:
                    plgpu.copy_gmem_to_smem(q_numbers_ref.at[batch, at], numbers_ring.at[slot], q_full.at[slot])

            def feed(i: Any, before: Any) -> Any:
                batch, part, key, span = located(*item(i))
                steps = group * span.steps

                @fed_by(writers)
                def _() -> None:
                    def step_of(j: Any, place: Any) -> Any:
                        head_of, step = place
                        slot = lax.rem(before + j, stages)
                        copy_queries(batch, head_of, step, slot)
                        at = pl.ds(step * rows, rows)
                        free_cotangents.wait(slot)
                        plgpu.copy_gmem_to_smem(g_ref.at[batch, at, head_of], g_ring.at[slot], g_full.at[slot])
                        plgpu.copy_gmem_to_smem(delta_ref.at[batch, head_of, at], delta_ring.at[slot], g_full.at[slot])

                        @pl.when(j == 0)
                        def _() -> None:
                            for half in range(WARPGROUPS):
                                at, place = pl.ds(key + half * ROWS, ROWS), pl.ds(half * ROWS, ROWS)
                                free_tile.wait(half)
                                plgpu.copy_gmem_to_smem(k_ref.at[batch, at, part // parts], k_tile.at[place], tile_full.at[half])
                                plgpu.copy_gmem_to_smem(v_ref.at[batch, at, part // parts], v_tile.at[place], tile_full.at[half])

                        return following(span, head_of, step)

                    lax.fori_loop(0, steps, step_of, (part * group, span.first))

                return before + steps

            fed = lax.fori_loop(0, work.count, feed, jnp.int32(0))

            # Behind the last step those who multiply look for one more, as they do between tiles.
            @fed_by(writers)
            def _() -> None:
                copy_queries(0, 0, 0, lax.rem(fed, stages))

        @pl.when(warpgroup < WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(MULTIPLYING, action="increase")
            for slot in range(stages):
                free_queries.free(slot)
                free_cotangents.free(slot)
            free_tile.free(warpgroup)
            my_rows = pl.ds(warpgroup * ROWS, ROWS)
            keys, values = k_tile.at[my_rows], v_tile.at[my_rows]

            def wide(x: jax.Array) -> jax.Array:
                return lax.broadcast_in_dim(x, shape, [1])

            def differentiate(i: Any, carry: Any) -> Any:
                before, of_table = carry
                batch, part, first_key, span = located(*of_table)
                steps, key = group * span.steps, first_key + warpgroup * ROWS
                mine = span_of_queries(static, key, ROWS, rows).within(span) if apart else span
                if numbers is not None:
                    kv_numbers = read(kv_numbers_ref.at[batch, pl.ds(key, ROWS)], OF_ROWS)

                def hide(s: jax.Array, step: Any, slot: Any) -> jax.Array:
                    same = None
                    if numbers is not None:
                        same = lax.broadcast_in_dim(kv_numbers, shape, [0]) == wide(plgpu.load(numbers_ring.at[slot], layout=OF_COLUMNS))
                    return masked(static, s, step * rows, key, 1, same)

                plgpu.barrier_wait(tile_full.at[warpgroup])

                def first_scores(place: Any) -> jax.Array:
                    def multiply(scores: Any) -> jax.Array:
                        plgpu.wgmma(scores, keys, q_ring.at[lax.rem(place, stages)].transpose((1, 0)))
                        return scores[...]

                    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))

                s = None if apart else first_scores(before)

                def all_steps(dk_sum: Any, dv_sum: Any) -> tuple[jax.Array, jax.Array]:
                    def turn(hides: bool, step: Any, carry: Any) -> Any:
                        s, place = carry
                        slot, next_slot = lax.rem(place, stages), lax.rem(place + 1, stages)
                        tanh = s if static.cap is None else jnp.tanh(s * (static.scale / static.cap))
                        seen = hide(tanh, step, slot) if hides else tanh
                        plgpu.barrier_wait(g_full.at[slot])

                        def weigh(dp: Any) -> jax.Array:
                            plgpu.wgmma(dp, values, g_ring.at[slot].transpose((1, 0)))
                            p = jnp.exp2(seen * static.unit - wide(plgpu.load(lse_ring.at[slot], layout=OF_COLUMNS)))
                            weights = p.astype(v.dtype)
                            plgpu.wgmma(dv_sum, weights, g_ring.at[slot])
                            if rows > ROWS:  # where registers are scarce, what was rounded is enough
                                p = lax.optimization_barrier(weights).astype(jnp.float32)
                            off = wide(plgpu.load(delta_ring.at[slot], layout=OF_COLUMNS))
                            ds = p * (plgpu.wgmma_accumulator_load(dp, wait_n=1) - off)
                            return (ds if static.cap is None else ds * (1 - tanh * tanh)).astype(q.dtype)

                        ds = pl.run_scoped(weigh, plgpu.ACC(shape, jnp.float32))
                        plgpu.wgmma_wait(0)
                        free_cotangents.free(slot)
                        # After the last step of a tile, for the first queries of the next one: a condition would be a branch.
                        plgpu.barrier_wait(q_full.at[next_slot])

                        def collect(scores: Any) -> jax.Array:
                            plgpu.wgmma(dk_sum, ds, q_ring.at[slot])
                            plgpu.wgmma(scores, keys, q_ring.at[next_slot].transpose((1, 0)))
                            plgpu.wgmma_wait(1)
                            free_queries.free(slot)
                            return plgpu.wgmma_accumulator_load(scores, wait_n=0)

                        return pl.run_scoped(collect, plgpu.ACC(shape, jnp.float32)), place + 1

                    # A branch around the mask costs more than the mask, so that steps with and without one are loops of their own. Without
                    # a barrier behind each, one register of the scores is another in the next loop, and ptxas serializes products.
                    def of_head(_: Any, carry: Any) -> Any:
                        for first, last, hides in mine.parts(static):
                            carry = lax.optimization_barrier(lax.fori_loop(first, last, functools.partial(turn, hides), carry))
                        return carry

                    def pass_by(_: Any, place: Any) -> Any:
                        slot = lax.rem(place, stages)
                        plgpu.barrier_wait(g_full.at[slot])
                        free_cotangents.free(slot)
                        free_queries.free(slot)
                        plgpu.barrier_wait(q_full.at[lax.rem(place + 1, stages)])
                        return place + 1

                    def of_head_apart(j: Any, place: Any) -> Any:
                        place = lax.fori_loop(span.first, mine.first, pass_by, place)
                        _, place = of_head(j, (first_scores(place), place))
                        return lax.fori_loop(mine.last, span.last, pass_by, place)

                    if apart:
                        lax.fori_loop(0, group, of_head_apart, before)
                    elif static.masks(TILE):
                        lax.fori_loop(0, group, of_head, (s, before))
                    else:
                        lax.fori_loop(0, steps, functools.partial(turn, False), (s, before))
                    return dk_sum[...], dv_sum[...]

                dk, dv = pl.run_scoped(all_steps, plgpu.ACC((ROWS, head), jnp.float32), plgpu.ACC((ROWS, head_v), jnp.float32))
                free_tile.free(warpgroup)
                of_table = item(jnp.minimum(i + 1, count - 1))
                here = place_of_sums(parts, batch, part, pl.ds(key, ROWS))
                write((dk * static.scale).astype(dk_ref.dtype), dk_ref.at[here], length - key)
                if blind_ref is not None:
                    dv = dv + lax.broadcast_in_dim(read(blind_ref.at[batch, part // parts], OF_COLUMNS), dv.shape, [1])
                write(dv.astype(dv_ref.dtype), dv_ref.at[here], length - key)
                return before + steps, of_table

            count = work.count
            plgpu.barrier_wait(q_full.at[0])
            lax.fori_loop(0, count, differentiate, (jnp.int32(0), item(0)))

    def shared(*shape: int) -> Any:
        return in_groups(shape, q.dtype)

    def ring_of_rows(dtype: Any) -> Any:
        return plgpu.SMEM((stages, rows), dtype)

    launch = plgpu.kernel(
        body,
        out_type=[sums_of_parts(k, parts), sums_of_parts(v, parts)],
        scratch_types=[
            shared(TILE, head),
            shared(TILE, head_v),
            shared(stages, rows, head),
            shared(stages, rows, head_v),
            ring_of_rows(jnp.float32),
            ring_of_rows(jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
            plgpu.Barrier(num_arrivals=2 + (numbers is not None), num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            *([] if numbers is None else [ring_of_rows(jnp.int32)]),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="attention_dk_dv",
        compiler_params=PARAMS,
    )
    dk, dv = launch(q, k, v, g, lse, delta, jnp.asarray(table.reshape(-1)), *(numbers or ()), *([] if blind is None else [blind]))
    if parts == 1:
        return dk, dv
    return added(dk, k), added(dv, v, share)
