"""Attention for NVIDIA Hopper, backward: the kernel for dq, which also sums delta where it can. Of it and that for dk and dv,
`hopper_backward.py` tells.
"""

from __future__ import annotations

import dataclasses
import functools
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
    fed_by,
    feeders,
    in_groups,
    masked,
    numbers_in_tiles,
    padded,
    read,
    span_of_keys,
    spans_by_data,
    write,
)
from pallas_kernels.attention.hopper_backward import FEEDING, MULTIPLYING, READERS, TILE, TILE_COST, WARPGROUPS, WIDEST
from pallas_kernels.attention.hopper_plan import Work, plan, plan_by_data
from pallas_kernels.hopper_gemm import SHARED_BYTES


def sums_delta(head: int, head_v: int) -> bool:
    """Whether the kernel sums delta: beside wider heads shared memory has no room for the results it is of."""
    return max(head, head_v) <= WIDEST


@dataclasses.dataclass(frozen=True)
class StepsOfKeys:
    """How the kernel for dq walks: keys of a step, and keys and values in flight, in steps."""

    keys: int = 128
    key_stages: int = 2
    value_stages: int = 2

    def shared_bytes(self, head: int, head_v: int) -> int:
        tiles = TILE * (head + head_v * (1 + sums_delta(head, head_v)))
        return 2 * (tiles + self.keys * (self.key_stages * head + self.value_stages * head_v)) + 2048


def steps_of_keys(head: int, head_v: int) -> StepsOfKeys:
    """What is fastest of what fits. Values are read by the first of a step's three products alone, keys by the other two."""
    for steps in (StepsOfKeys(), StepsOfKeys(keys=64, value_stages=1)):
        if steps.shared_bytes(head, head_v) <= SHARED_BYTES:
            return steps
    raise AssertionError(f"head dims {head} and {head_v} are refused")


def gradient_of_queries(
    static: Static,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    lse: jax.Array,
    of_rows: jax.Array,
    numbers: Numbers | None = None,
) -> tuple[jax.Array, jax.Array]:
    """dq and delta; arguments and delta as `gradients_of_keys` takes them.

    A tile's cotangents are in shared memory for their product with the values, and meet the results there: a pass over both is saved.

    Args:
      of_rows: the result of `forward`, `[B, T, N, Hv]`, where the kernel `sums_delta`, or delta.

    Returns:
      `[B, T, N, H]` and `[B, N, T]`, or T up to a multiple of the rows of a tile.
    """
    (b, t, n, head), (_, s, kv_heads, head_v) = q.shape, v.shape
    steps = steps_of_keys(head, head_v)
    keys, key_stages, value_stages = steps.keys, steps.key_stages, steps.value_stages
    group, row_tiles = n // kv_heads, pl.cdiv(t, TILE)
    sums = sums_delta(head, head_v)
    lse = padded(lse, 2, TILE)  # loads are no copies of the engine, which reads zeros outside
    of_rows = of_rows if sums else padded(of_rows, 2, TILE)
    if numbers is None:
        spans = span_of_keys(static, np.arange(row_tiles) * TILE, TILE, keys)
        table: Any = plan(row_tiles, b * kv_heads, group, 2 * s * (head + head_v), spans.steps + TILE_COST)[0]
    else:
        numbers = numbers_in_tiles(numbers, q, k, TILE, keys)
        table = plan_by_data(spans_by_data(static, *numbers, TILE, keys, of_keys=False), n, row_tiles)
    blocks, width = table.shape
    shape, may_mask = (ROWS, keys), static.masks(keys)
    writers = feeders()
    free_queries = Buffers(WARPGROUPS + 2, WARPGROUP, writers)  # barrier 0 is the block's, and each warpgroup has one
    free_cotangents = Buffers(free_queries.index + WARPGROUPS, WARPGROUP, writers)
    free_keys = Buffers(free_cotangents.index + WARPGROUPS, READERS, writers)
    free_values = Buffers(free_keys.index + key_stages, READERS, writers)

    def body(*given: Any) -> None:
        refs: Any = given
        absent: Any = (None, None)
        q_ref, k_ref, v_ref, g_ref, lse_ref, of_rows_ref, table_ref, *refs = refs
        (q_numbers_ref, kv_numbers_ref), refs = (refs[:2], refs[2:]) if numbers is not None else (absent, refs)
        dq_ref, *refs = refs
        (delta_ref, out_tile, delta_buffer), refs = ((refs[0], *refs[1:3]), refs[3:]) if sums else ((None,) * 3, refs)
        q_tile, g_tile, k_ring, v_ring, q_full, g_full, k_full, v_full = refs
        warpgroup = lax.axis_index("warpgroup")
        work = Work(table_ref, lax.axis_index("block"), width, n, row_tiles)
        item = functools.partial(work.item, fields=1 if numbers is None else 5)

        def located(batch: Any, head_of: Any, tile: Any, behind: Any) -> tuple[Any, Any, Any, Span]:
            row = tile * TILE
            return batch, head_of, row, Span(*behind) if behind else span_of_keys(static, row, TILE, keys)

        @pl.when(warpgroup == WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(FEEDING, action="decrease")

            def feed(i: Any, before: Any) -> Any:
                batch, head_of, row, span = located(*item(i))
                kv_head = head_of // group

                @fed_by(writers)
                def _() -> None:
                    def copy(ref: Any, tile: Any, half: int, full: Any) -> None:
                        of_half = ref.at[batch, pl.ds(row + half * ROWS, ROWS), head_of]
                        plgpu.copy_gmem_to_smem(of_half, tile.at[pl.ds(half * ROWS, ROWS)], full.at[half])

                    for half in range(WARPGROUPS):
                        free_queries.wait(half)
                        copy(q_ref, q_tile, half, q_full)
                        if sums:
                            copy(of_rows_ref, out_tile, half, q_full)

                    @pl.loop(span.first, span.last)
                    def _(step: Any) -> None:
                        place = before + step - span.first
                        slot = lax.rem(place, key_stages)
                        at = pl.ds(step * keys, keys)
                        free_keys.wait(slot)
                        plgpu.copy_gmem_to_smem(k_ref.at[batch, at, kv_head], k_ring.at[slot], k_full.at[slot])

                        @pl.when(step == span.first)
                        def _() -> None:
                            for half in range(WARPGROUPS):
                                free_cotangents.wait(half)
                                copy(g_ref, g_tile, half, g_full)

                        slot = slot if value_stages == key_stages else lax.rem(place, value_stages)
                        free_values.wait(slot)
                        plgpu.copy_gmem_to_smem(v_ref.at[batch, at, kv_head], v_ring.at[slot], v_full.at[slot])

                return before + span.steps

            lax.fori_loop(0, work.count, feed, jnp.int32(0))

        @pl.when(warpgroup < WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(MULTIPLYING, action="increase")
            free_queries.free(warpgroup)
            free_cotangents.free(warpgroup)
            for slot in range(max(key_stages, value_stages)):
                if slot < key_stages:
                    free_keys.free(slot)
                if slot < value_stages:
                    free_values.free(slot)
            mine = pl.ds(warpgroup * ROWS, ROWS)
            queries, cotangents = q_tile.at[mine], g_tile.at[mine]

            def placed(tile: Any, own: Any) -> Any:
                """`own`, this warpgroup's part of a tile; of wide heads with addresses made anew, which ptxas would keep, and spill."""
                return own if head <= WIDEST else tile.at[pl.ds(lax.optimization_barrier(warpgroup) * ROWS, ROWS)]

            def wide(x: jax.Array) -> jax.Array:
                return lax.broadcast_in_dim(x, shape, [0])

            def differentiate(i: Any, carry: Any) -> Any:
                before, of_table = carry
                batch, head_of, first_row, span = located(*of_table)
                row = first_row + warpgroup * ROWS
                at = (batch, head_of, pl.ds(row, ROWS))
                lse = read(lse_ref.at[at], OF_ROWS)
                if not sums:
                    delta = read(of_rows_ref.at[at], OF_ROWS)
                if numbers is not None:
                    q_numbers = read(q_numbers_ref.at[batch, pl.ds(row, ROWS)], OF_ROWS)

                def hide(s: jax.Array, step: Any) -> jax.Array:
                    key, same = step * keys, None
                    if numbers is not None:
                        kv_numbers = read(kv_numbers_ref.at[batch, pl.ds(key, keys)], OF_COLUMNS)
                        same = wide(q_numbers) == lax.broadcast_in_dim(kv_numbers, shape, [1])
                    return masked(static, s, row, key, 0, same)

                def slot_of(step: Any, stages: int = key_stages) -> Any:
                    return lax.rem(before + step - span.first, stages)

                def scores_of(step: Any, scores: Any) -> None:
                    plgpu.wgmma(scores, placed(q_tile, queries), k_ring.at[slot_of(step)].transpose((1, 0)))

                def first_scores(scores: Any) -> jax.Array:
                    scores_of(span.first, scores)
                    return scores[...]

                plgpu.barrier_wait(q_full.at[warpgroup])
                plgpu.barrier_wait(g_full.at[warpgroup])
                if sums:
                    result, cotangent = (
                        plgpu.load(tile.at[mine], layout=plgpu.Layout.WGMMA).astype(jnp.float32) for tile in (out_tile, g_tile)
                    )
                    delta = jnp.where(lse == jnp.inf, 0.0, (result * cotangent).sum(axis=1))
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    delta_buffer[warpgroup] = delta
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(delta_buffer.at[warpgroup], delta_ref.at[at])
                plgpu.barrier_wait(k_full.at[slot_of(span.first)])
                s = pl.run_scoped(first_scores, plgpu.ACC(shape, jnp.float32))

                def all_steps(dq_sum: Any) -> jax.Array:
                    def gradient(s: jax.Array, step: Any, last: bool = False) -> jax.Array:
                        slot = slot_of(step, value_stages)
                        tanh = s if static.cap is None else jnp.tanh(s * (static.scale / static.cap))
                        seen = lax.cond(span.needs_mask(step), lambda: hide(tanh, step), lambda: tanh) if may_mask else tanh
                        plgpu.barrier_wait(v_full.at[slot])

                        def weigh(dp: Any) -> jax.Array:
                            plgpu.wgmma(dp, placed(g_tile, cotangents), v_ring.at[slot].transpose((1, 0)))
                            p = jnp.exp2(seen * static.unit - wide(lse))
                            ds = p * (plgpu.wgmma_accumulator_load(dp, wait_n=0) - wide(delta))
                            return (ds if static.cap is None else ds * (1 - tanh * tanh)).astype(q.dtype)

                        ds = pl.run_scoped(weigh, plgpu.ACC(shape, jnp.float32))
                        free_values.free(slot)
                        if last:
                            free_cotangents.free(warpgroup)
                        return ds

                    def turn(step: Any, s: jax.Array) -> jax.Array:
                        ds = gradient(s, step)
                        plgpu.barrier_wait(k_full.at[slot_of(step + 1)])

                        def collect(scores: Any) -> jax.Array:
                            plgpu.wgmma(dq_sum, ds, k_ring.at[slot_of(step)])
                            scores_of(step + 1, scores)
                            plgpu.wgmma_wait(1)
                            free_keys.free(slot_of(step))
                            return plgpu.wgmma_accumulator_load(scores, wait_n=0)

                        return pl.run_scoped(collect, plgpu.ACC(shape, jnp.float32))

                    last = span.last - 1
                    scores = lax.fori_loop(span.first, last, turn, s)
                    free_queries.free(warpgroup)
                    ds = gradient(scores, last, last=True)
                    plgpu.wgmma(dq_sum, ds, k_ring.at[slot_of(last)])
                    plgpu.wgmma_wait(0)
                    free_keys.free(slot_of(last))
                    return dq_sum[...]

                dq = pl.run_scoped(all_steps, plgpu.ACC((ROWS, head), jnp.float32))
                of_table = item(jnp.minimum(i + 1, count - 1))
                write((dq * static.scale).astype(dq_ref.dtype), dq_ref.at[batch, pl.ds(row, ROWS), head_of], t - row)
                return before + span.steps, of_table

            count = work.count
            lax.fori_loop(0, count, differentiate, (jnp.int32(0), item(0)))
            plgpu.wait_smem_to_gmem(0, wait_read_only=False)

    def shared(*shape: int) -> Any:
        return in_groups(shape, q.dtype)

    launch = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(q.shape, q.dtype)] + [jax.ShapeDtypeStruct((b, n, row_tiles * TILE), jnp.float32)] * sums,
        scratch_types=[
            *([shared(TILE, head_v), plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32)] if sums else []),
            shared(TILE, head),
            shared(TILE, head_v),
            shared(key_stages, keys, head),
            shared(value_stages, keys, head_v),
            plgpu.Barrier(num_arrivals=1 + sums, num_barriers=WARPGROUPS),
            plgpu.Barrier(num_barriers=WARPGROUPS),
            plgpu.Barrier(num_barriers=key_stages),
            plgpu.Barrier(num_barriers=value_stages),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="attention_dq",
        compiler_params=PARAMS,
    )
    dq, *delta = launch(q, k, v, g, lse, of_rows, jnp.asarray(table.reshape(-1)), *(numbers or ()))
    return dq, delta[0] if sums else of_rows
