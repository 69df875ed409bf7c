"""Attention for NVIDIA Hopper, backward, in one pass over the blocks of scores that the mask leaves: five products a block.

A thread block holds a tile of keys and values, 64 of them a warpgroup, and walks over the queries of all heads that read them. Scores
are `[keys, queries]`, so that weights and their gradients are left factors from registers in the products for dv and dk. The
gradients go through shared memory for the product for dq, which sums over the keys of all warpgroups and is added to dq in memory,
in float32, by copies that add (Shah et al. 2024, arXiv:2407.08608, appendix B.1). The order of those sums is the hardware's.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.attention.hopper import (
    OF_COLUMNS,
    OF_ROWS,
    PARAMS,
    ROWS,
    TILED,
    WARPGROUP,
    Buffers,
    Span,
    Static,
    Work,
    bar,
    masked,
    numbers_in_tiles,
    padded,
    plan,
    plan_by_data,
    span_of_keys,
    span_of_queries,
    spans_by_data,
)
from pallas_kernels.hopper_gemm import SHARED_BYTES

WARPGROUPS = 2
BACKWARD_COST = 2
"""What a tile of keys costs besides its steps, in steps."""


@dataclasses.dataclass(frozen=True)
class Backward:
    """Queries of a step and steps in flight. A tile has 64 keys for each of two warpgroups."""

    queries: int = 64
    stages: int = 2

    @property
    def keys(self) -> int:
        return ROWS * WARPGROUPS

    def shared_bytes(self, head: int, head_v: int) -> int:
        tile, ring = self.keys * (head + head_v), self.stages * self.queries * (head + head_v)
        rows = pl.cdiv(4 * self.stages * self.queries, 1024) * 1024
        return 2 * (tile + ring + 2 * self.keys * self.queries) + 3 * rows + 1024


def backward_tiles(head: int, head_v: int) -> Backward:
    for tiles in (Backward(128, 2), Backward(64, 3), Backward(64, 2)):
        # Of a thread's registers the sums for dk and dv take (H + Hv) / 2, scores and their gradients a number of queries.
        if tiles.shared_bytes(head, head_v) <= SHARED_BYTES and (head + head_v) // 2 + tiles.queries <= 192:
            return tiles
    raise AssertionError(f"head dims {head} and {head_v} are refused")


def sums_shape(batch: int, queries: int, heads: int, head: int) -> tuple[int, ...]:
    """Of dq's sums: tiles of 64 queries by 64 elements, each in the order that its threads hold them, so that they add 16 bytes at once.

    The last axes are pairs of groups of 8 columns, halves of 8 rows, warps, rows, columns two by two, groups, and columns.
    """
    return batch, heads, 2 * pl.cdiv(queries, 2 * ROWS), head // ROWS, 4, 2, 4, 8, 4, 2, 2


def ordered(sums: jax.Array, queries: int) -> jax.Array:
    """dq's sums as `[B, T, N, H]`."""
    rows = sums.transpose(0, 2, 6, 5, 7, 1, 3, 4, 9, 8, 10)
    return rows.reshape(rows.shape[0], rows.shape[1] * ROWS, rows.shape[5], -1)[:, :queries]


def add_to_sums(tile: Any, x: jax.Array) -> None:
    """Adds a `[64, 64]` block to one tile of dq's sums."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def emit(_: Any, tile: Any, x: Any) -> None:
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, llvm, vector

        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        thread = arith.remui(utils.thread_idx(), utils.c(WARPGROUP, i32))
        start = llvm.ptrtoint(i64, utils.memref_ptr(tile))
        address = arith.addi(start, arith.extui(i64, arith.muli(thread, utils.c(16, i32))))
        registers = x.registers.reshape(8, 2)  # by groups of 8 columns and halves of 8 rows, two columns each
        for turn, (pair, half) in enumerate(itertools.product(range(4), range(2))):
            two = registers[2 * pair, half], registers[2 * pair + 1, half]
            values = [vector.extract(r, dynamic_position=[], static_position=[j]) for r in two for j in range(2)]
            place = f"[$0 + {turn * WARPGROUP * 16}]"
            utils.inline_ptx(f"red.relaxed.gpu.global.add.v4.f32 {place}, {{$1, $2, $3, $4}};", address, *values, has_side_effects=True)

    emit(tile, x)


def backward(
    static: Static,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    numbers: tuple[jax.Array, jax.Array] | None = None,
    blind: jax.Array | None = None,
    dq: Any = None,
    tiles: Backward | None = None,
) -> tuple[jax.Array, jax.Array]:
    """dk and dv, and dq by the way.

    Args:
      q, k, v: as `forward` takes them. g: the cotangent, `[B, T, N, Hv]`. lse: as `forward` gives it.
      delta: `[B, N, T]` float32, for each query the product of result and cotangent; 0 for those that see no key.
      numbers: as `forward` takes them.
      blind: `[B, K, Hv]` float32, a part of dv that all keys have.
      dq: a `jax.Ref` of `sums_shape` in float32, which `dq / scale` is added to. None: it is not computed.

    Returns:
      `[B, S, K, H]` and `[B, S, K, Hv]`.
    """
    (b, t, n, head), (_, s, kv_heads, head_v) = q.shape, v.shape
    tiles = tiles or backward_tiles(head, head_v)
    group, key_tiles = n // kv_heads, pl.cdiv(s, tiles.keys)
    if numbers is None:
        spans = span_of_queries(static, np.arange(key_tiles) * tiles.keys, tiles.keys, tiles.queries)
        # What is read, and dq in float32.
        of_head = 2 * t * group * (head + head_v) + (4 * t * group * head if dq is not None else 0)
        table: Any = plan(key_tiles, b * kv_heads, 1, of_head, group * spans.steps + BACKWARD_COST)
    else:
        numbers = numbers_in_tiles(*numbers, tiles.queries, tiles.keys)
        table = plan_by_data(spans_by_data(static, *numbers, tiles.queries, tiles.keys, of_keys=True), kv_heads)
    blocks, width = table.shape
    by_columns = tiles.queries == ROWS  # how the warpgroups share dq of a step out
    dq_shape = (ROWS, head // WARPGROUPS) if by_columns else (tiles.queries // WARPGROUPS, head)
    shape = (ROWS, tiles.queries)
    # Barrier 0 is the block's, and each warpgroup has one.
    together = WARPGROUPS + 2
    free_tile = Buffers(together + 1, WARPGROUPS)
    free_queries = Buffers(free_tile.index + 1, WARPGROUPS)
    free_cotangents = Buffers(free_queries.index + tiles.stages, WARPGROUPS)

    def meet() -> None:
        bar("sync", together, WARPGROUPS * WARPGROUP)

    def body(*refs: Any) -> None:
        q_ref, k_ref, v_ref, g_ref, lse_ref, delta_ref, table_ref, *refs = refs
        (q_numbers_ref, kv_numbers_ref), refs = (refs[:2], refs[2:]) if numbers is not None else ((None, None), refs)
        blind_ref, refs = (refs[0], refs[1:]) if blind is not None else (None, refs)
        dq_ref, refs = (refs[0], refs[1:]) if dq is not None else (None, refs)
        dk_ref, dv_ref, k_tile, v_tile, q_ring, g_ring, lse_ring, delta_ring, *refs = refs
        tile_full, q_full, g_full, *refs = refs
        ds_ring, refs = (refs[0], refs[1:]) if dq is not None else (None, refs)
        (numbers_ring,) = refs or (None,)
        warpgroup = lax.axis_index("warpgroup")
        work = Work(table_ref, lax.axis_index("block"), width, kv_heads, key_tiles)

        def item(i: Any) -> tuple[Any, Any, Any, Span]:
            batch, kv_head, tile, behind = work.item(i, 1 if numbers is None else 5)
            key = tile * tiles.keys
            return batch, kv_head, key, Span(*behind) if behind else span_of_queries(static, key, tiles.keys, tiles.queries)

        def start(span: Span, key: Any) -> Any:
            """Where to begin, another place for each tile of keys: together they would add to the same part of dq."""
            return span.first + lax.rem(key // tiles.queries, span.steps)

        def following(span: Span, begun: Any, head_of: Any, step: Any) -> tuple[Any, Any]:
            """The next step: round through the queries of a head, then those of the next."""
            step = jnp.where(step + 1 == span.last, span.first, step + 1)
            return jnp.where(step == begun, head_of + 1, head_of), step

        @pl.when(warpgroup == WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(24, action="decrease")

            def copy_queries(batch: Any, head_of: Any, step: Any, slot: Any) -> None:
                at = pl.ds(step * tiles.queries, tiles.queries)
                free_queries.wait(slot)
                plgpu.copy_gmem_to_smem(q_ref.at[batch, at, head_of], q_ring.at[slot], q_full.at[slot])
                plgpu.copy_gmem_to_smem(lse_ref.at[batch, head_of, at], lse_ring.at[slot], q_full.at[slot])
                if numbers is not None:
                    plgpu.copy_gmem_to_smem(q_numbers_ref.at[batch, at], numbers_ring.at[slot], q_full.at[slot])

            def feed(i: Any, before: Any) -> Any:
                batch, kv_head, key, span = item(i)
                steps, begun = group * span.steps, start(span, key)

                @plgpu.warp_map
                def _(warp: Any) -> None:
                    @pl.when(warp == 0)
                    def _() -> None:
                        def step_of(j: Any, place: Any) -> Any:
                            head_of, step = place
                            slot = lax.rem(before + j, tiles.stages)
                            copy_queries(batch, head_of, step, slot)

                            @pl.when(j == 0)
                            def _() -> None:
                                free_tile.wait()
                                at = pl.ds(key, tiles.keys)
                                plgpu.copy_gmem_to_smem(k_ref.at[batch, at, kv_head], k_tile, tile_full)
                                plgpu.copy_gmem_to_smem(v_ref.at[batch, at, kv_head], v_tile, tile_full)

                            at = pl.ds(step * tiles.queries, tiles.queries)
                            free_cotangents.wait(slot)
                            plgpu.copy_gmem_to_smem(g_ref.at[batch, at, head_of], g_ring.at[slot], g_full.at[slot])
                            plgpu.copy_gmem_to_smem(delta_ref.at[batch, head_of, at], delta_ring.at[slot], g_full.at[slot])
                            return following(span, begun, head_of, step)

                        lax.fori_loop(0, steps, step_of, (kv_head * group, begun))

                return before + steps

            fed = lax.fori_loop(0, work.count, feed, jnp.int32(0))

            # Behind the last step those who multiply look for one more, as they do between tiles.
            @plgpu.warp_map
            def _(warp: Any) -> None:
                @pl.when(warp == 0)
                def _() -> None:
                    copy_queries(0, 0, 0, lax.rem(fed, tiles.stages))

        @pl.when(warpgroup < WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(240, action="increase")
            for slot in range(tiles.stages):
                free_queries.free(slot)
                free_cotangents.free(slot)
            free_tile.free()
            mine = pl.ds(warpgroup * ROWS, ROWS)
            keys, values = k_tile.at[mine], v_tile.at[mine]

            def wide(x: jax.Array) -> jax.Array:
                return lax.broadcast_in_dim(x, shape, [1])

            def differentiate(i: Any, before: Any) -> Any:
                batch, kv_head, first_key, span = item(i)
                steps, begun = group * span.steps, start(span, first_key)

                if numbers is not None:
                    place = kv_numbers_ref.at[batch, pl.ds(first_key + warpgroup * ROWS, ROWS)]
                    kv_numbers = plgpu.load(place, layout=OF_ROWS, optimized=False)

                def hide(s: jax.Array, step: Any, slot: Any) -> jax.Array:
                    same = None
                    if numbers is not None:
                        same = lax.broadcast_in_dim(kv_numbers, shape, [0]) == wide(plgpu.load(numbers_ring.at[slot], layout=OF_COLUMNS))
                    return masked(static, s, step * tiles.queries, first_key + warpgroup * ROWS, 1, same)

                plgpu.barrier_wait(tile_full)
                slot = lax.rem(before, tiles.stages)

                def first_scores(scores: Any) -> jax.Array:
                    plgpu.wgmma(scores, keys, q_ring.at[slot].transpose((1, 0)))
                    return scores[...]

                s = pl.run_scoped(first_scores, plgpu.ACC(shape, jnp.float32))

                def all_steps(dk_sum: Any, dv_sum: Any) -> tuple[jax.Array, jax.Array]:
                    def turn(j: Any, carry: Any) -> Any:
                        s, head_of, step = carry
                        slot, next_slot = lax.rem(before + j, tiles.stages), lax.rem(before + j + 1, tiles.stages)
                        half = lax.rem(before + j, 2)
                        tanh = s if static.cap is None else jnp.tanh(s * (static.scale / static.cap))
                        seen = hide(tanh, step, slot)  # in every step: a branch costs more than it saves
                        plgpu.barrier_wait(g_full.at[slot])

                        # No branch, and so no wait for a copy, while products are on their way: the compiler would make them wait for
                        # each other.
                        def weigh(dp: Any) -> jax.Array:
                            plgpu.wgmma(dp, values, g_ring.at[slot].transpose((1, 0)))
                            p = jnp.exp2(seen * static.unit - wide(plgpu.load(lse_ring.at[slot], layout=OF_COLUMNS)))
                            weights = p.astype(v.dtype)
                            plgpu.wgmma(dv_sum, weights, g_ring.at[slot])
                            if tiles.queries > ROWS:  # where registers are scarce, what was rounded is enough
                                p = lax.optimization_barrier(weights).astype(jnp.float32)
                            off = wide(plgpu.load(delta_ring.at[slot], layout=OF_COLUMNS))
                            ds = p * (plgpu.wgmma_accumulator_load(dp, wait_n=1) - off)
                            return (ds if static.cap is None else ds * (1 - tanh * tanh)).astype(q.dtype)

                        ds = pl.run_scoped(weigh, plgpu.ACC(shape, jnp.float32))
                        if dq_ref is not None:
                            ds_ring[half, mine] = ds
                            plgpu.commit_smem()
                            meet()  # also: the other half has been read
                        plgpu.wgmma_wait(0)
                        free_cotangents.free(slot)
                        # After the last step of a tile, the first queries of the next one: without a condition, for the compiler's sake.
                        plgpu.barrier_wait(q_full.at[next_slot])

                        def collect(dq_sum: Any, scores: Any) -> jax.Array:
                            plgpu.wgmma(dk_sum, ds, q_ring.at[slot])
                            if dq_ref is not None:
                                if by_columns:
                                    columns = pl.ds(warpgroup * dq_shape[1], dq_shape[1])
                                    plgpu.wgmma(dq_sum, ds_ring.at[half].transpose((1, 0)), k_tile.at[:, columns])
                                else:
                                    rows = pl.ds(warpgroup * dq_shape[0], dq_shape[0])
                                    plgpu.wgmma(dq_sum, ds_ring.at[half, :, rows].transpose((1, 0)), k_tile)
                            plgpu.wgmma(scores, keys, q_ring.at[next_slot].transpose((1, 0)))
                            plgpu.wgmma_wait(1 + (dq_ref is not None))
                            free_queries.free(slot)
                            if dq_ref is not None:
                                place = (step, warpgroup) if by_columns else (2 * step + warpgroup, 0)
                                add_to_sums(dq_ref.at[batch, head_of, *place], plgpu.wgmma_accumulator_load(dq_sum, wait_n=1))
                            return plgpu.wgmma_accumulator_load(scores, wait_n=0)

                        s = pl.run_scoped(collect, plgpu.ACC(dq_shape, jnp.float32), plgpu.ACC(shape, jnp.float32))
                        return s, *following(span, begun, head_of, step)

                    lax.fori_loop(0, steps, turn, (s, kv_head * group, begun))
                    return dk_sum[...], dv_sum[...]

                dk, dv = pl.run_scoped(all_steps, plgpu.ACC((ROWS, head), jnp.float32), plgpu.ACC((ROWS, head_v), jnp.float32))
                meet()  # all keys are read by all
                keys[...] = (dk * static.scale).astype(dk_ref.dtype)
                if blind_ref is not None:
                    share = plgpu.load(blind_ref.at[batch, kv_head], layout=OF_COLUMNS, optimized=False)
                    dv = dv + lax.broadcast_in_dim(share, dv.shape, [1])
                values[...] = dv.astype(dv_ref.dtype)
                plgpu.commit_smem()
                at = pl.ds(first_key + warpgroup * ROWS, ROWS)
                plgpu.copy_smem_to_gmem(keys, dk_ref.at[batch, at, kv_head])
                plgpu.copy_smem_to_gmem(values, dv_ref.at[batch, at, kv_head])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                free_tile.free()
                return before + steps

            plgpu.barrier_wait(q_full.at[0])
            lax.fori_loop(0, work.count, differentiate, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0, wait_read_only=False)

    def shared(*shape: int) -> Any:
        return plgpu.SMEM(shape, q.dtype, transforms=TILED)

    scratch = [
        shared(tiles.keys, head),
        shared(tiles.keys, head_v),
        shared(tiles.stages, tiles.queries, head),
        shared(tiles.stages, tiles.queries, head_v),
        plgpu.SMEM((tiles.stages, tiles.queries), jnp.float32),
        plgpu.SMEM((tiles.stages, tiles.queries), jnp.float32),
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(num_arrivals=2 + (numbers is not None), num_barriers=tiles.stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
    ]
    if dq is not None:
        scratch.append(shared(2, tiles.keys, tiles.queries))
    if numbers is not None:
        scratch.append(plgpu.SMEM((tiles.stages, tiles.queries), jnp.int32))
    out = [jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)]
    mesh: dict[str, Any] = {
        "grid": (blocks,), "grid_names": ("block",), "num_threads": WARPGROUPS + 1, "thread_name": "warpgroup",
        "kernel_name": "attention_backward" if dq is not None else "attention_dk_dv",
    }  # fmt: skip
    inputs = [q, k, v, g, lse, delta, jnp.asarray(table.reshape(-1)), *(numbers or ()), *([] if blind is None else [blind])]
    if dq is None:
        return plgpu.kernel(body, out_type=out, scratch_types=scratch, compiler_params=PARAMS, **mesh)(*inputs)

    def scoped(*refs: Any) -> None:  # `plgpu.kernel` takes no references
        pl.run_scoped(lambda *more: body(*refs, *more), *scratch, collective_axes="warpgroup")

    return pl.kernel(scoped, out_type=out, mesh=plgpu.Mesh(**mesh), compiler_params=PARAMS)(*inputs, dq)


DQ_KEYS, DQ_STAGES = 128, 2
"""Of a step of `backward_queries`, and steps in flight."""


def backward_queries(
    static: Static,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    numbers: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """dq alone, in its own dtype and with sums in one order: where `backward` cannot add to a reference. Arguments as there."""
    (b, t, n, head), (_, s, kv_heads, head_v) = q.shape, v.shape
    rows, group = ROWS * WARPGROUPS, n // kv_heads
    row_tiles = pl.cdiv(t, rows)
    lse, delta = (padded(a, 2, rows) for a in (lse, delta))  # loads are no copies of the engine, which reads zeros outside
    if numbers is None:
        spans = span_of_keys(static, np.arange(row_tiles) * rows, rows, DQ_KEYS)
        table: Any = plan(row_tiles, b * kv_heads, group, 2 * s * (head + head_v), spans.steps + BACKWARD_COST)
    else:
        numbers = numbers_in_tiles(*numbers, rows, DQ_KEYS)
        table = plan_by_data(spans_by_data(static, *numbers, rows, DQ_KEYS, of_keys=False), n)
    blocks, width = table.shape
    shape, may_mask = (ROWS, DQ_KEYS), static.masks(DQ_KEYS)
    free_tile = Buffers(WARPGROUPS + 2, WARPGROUPS)
    free_keys = Buffers(free_tile.index + 1, WARPGROUPS)
    free_values = Buffers(free_keys.index + DQ_STAGES, WARPGROUPS)

    def body(*refs: Any) -> None:
        q_ref, k_ref, v_ref, g_ref, lse_ref, delta_ref, table_ref, *refs = refs
        (q_numbers_ref, kv_numbers_ref), refs = (refs[:2], refs[2:]) if numbers is not None else ((None, None), refs)
        dq_ref, q_tile, g_tile, k_ring, v_ring, tile_full, k_full, v_full = refs
        warpgroup = lax.axis_index("warpgroup")
        work = Work(table_ref, lax.axis_index("block"), width, n, row_tiles)

        def item(i: Any) -> tuple[Any, Any, Any, Span]:
            batch, head_of, tile, behind = work.item(i, 1 if numbers is None else 5)
            row = tile * rows
            return batch, head_of, row, Span(*behind) if behind else span_of_keys(static, row, rows, DQ_KEYS)

        @pl.when(warpgroup == WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(24, action="decrease")

            def feed(i: Any, before: Any) -> Any:
                batch, head_of, row, span = item(i)
                kv_head = head_of // group

                @plgpu.warp_map
                def _(warp: Any) -> None:
                    @pl.when(warp == 0)
                    def _() -> None:
                        free_tile.wait()
                        plgpu.copy_gmem_to_smem(q_ref.at[batch, pl.ds(row, rows), head_of], q_tile, tile_full)
                        plgpu.copy_gmem_to_smem(g_ref.at[batch, pl.ds(row, rows), head_of], g_tile, tile_full)

                        @pl.loop(span.first, span.last)
                        def _(step: Any) -> None:
                            slot = lax.rem(before + step - span.first, DQ_STAGES)
                            at = pl.ds(step * DQ_KEYS, DQ_KEYS)
                            free_keys.wait(slot)
                            plgpu.copy_gmem_to_smem(k_ref.at[batch, at, kv_head], k_ring.at[slot], k_full.at[slot])
                            free_values.wait(slot)
                            plgpu.copy_gmem_to_smem(v_ref.at[batch, at, kv_head], v_ring.at[slot], v_full.at[slot])

                return before + span.steps

            lax.fori_loop(0, work.count, feed, jnp.int32(0))

        @pl.when(warpgroup < WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(240, action="increase")
            free_tile.free()
            for slot in range(DQ_STAGES):
                free_keys.free(slot)
                free_values.free(slot)
            mine = pl.ds(warpgroup * ROWS, ROWS)
            queries, cotangents = q_tile.at[mine], g_tile.at[mine]

            def wide(x: jax.Array) -> jax.Array:
                return lax.broadcast_in_dim(x, shape, [0])

            def differentiate(i: Any, before: Any) -> Any:
                batch, head_of, first_row, span = item(i)
                row = first_row + warpgroup * ROWS
                at = (batch, head_of, pl.ds(row, ROWS))
                lse, delta = (plgpu.load(ref.at[at], layout=OF_ROWS, optimized=False) for ref in (lse_ref, delta_ref))
                if numbers is not None:
                    q_numbers = plgpu.load(q_numbers_ref.at[batch, pl.ds(row, ROWS)], layout=OF_ROWS, optimized=False)

                def hide(s: jax.Array, step: Any) -> jax.Array:
                    key, same = step * DQ_KEYS, None
                    if numbers is not None:
                        kv_numbers = plgpu.load(kv_numbers_ref.at[batch, pl.ds(key, DQ_KEYS)], layout=OF_COLUMNS, optimized=False)
                        same = wide(q_numbers) == lax.broadcast_in_dim(kv_numbers, shape, [1])
                    return masked(static, s, row, key, 0, same)

                plgpu.barrier_wait(tile_full)

                def slot_of(step: Any) -> Any:
                    return lax.rem(before + step - span.first, DQ_STAGES)

                def scores_of(step: Any, scores: Any) -> None:
                    plgpu.wgmma(scores, queries, k_ring.at[slot_of(step)].transpose((1, 0)))

                def first_scores(scores: Any) -> jax.Array:
                    scores_of(span.first, scores)
                    return scores[...]

                plgpu.barrier_wait(k_full.at[slot_of(span.first)])
                s = pl.run_scoped(first_scores, plgpu.ACC(shape, jnp.float32))

                def all_steps(dq_sum: Any) -> jax.Array:
                    def gradient(s: jax.Array, step: Any) -> jax.Array:
                        slot = slot_of(step)
                        tanh = s if static.cap is None else jnp.tanh(s * (static.scale / static.cap))
                        seen = lax.cond(span.needs_mask(step), lambda: hide(tanh, step), lambda: tanh) if may_mask else tanh
                        plgpu.barrier_wait(v_full.at[slot])

                        def weigh(dp: Any) -> jax.Array:
                            plgpu.wgmma(dp, cotangents, v_ring.at[slot].transpose((1, 0)))
                            p = jnp.exp2(seen * static.unit - wide(lse))
                            ds = p * (plgpu.wgmma_accumulator_load(dp, wait_n=0) - wide(delta))
                            return (ds if static.cap is None else ds * (1 - tanh * tanh)).astype(q.dtype)

                        ds = pl.run_scoped(weigh, plgpu.ACC(shape, jnp.float32))
                        free_values.free(slot)
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
                    ds = gradient(lax.fori_loop(span.first, last, turn, s), last)
                    plgpu.wgmma(dq_sum, ds, k_ring.at[slot_of(last)])
                    plgpu.wgmma_wait(0)
                    free_keys.free(slot_of(last))
                    return dq_sum[...]

                dq = pl.run_scoped(all_steps, plgpu.ACC((ROWS, head), jnp.float32))
                queries[...] = (dq * static.scale).astype(dq_ref.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(queries, dq_ref.at[batch, pl.ds(row, ROWS), head_of])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                free_tile.free()
                return before + span.steps

            lax.fori_loop(0, work.count, differentiate, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0, wait_read_only=False)

    def shared(*shape: int) -> Any:
        return plgpu.SMEM(shape, q.dtype, transforms=TILED)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=[
            shared(rows, head),
            shared(rows, head_v),
            shared(DQ_STAGES, DQ_KEYS, head),
            shared(DQ_STAGES, DQ_KEYS, head_v),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_barriers=DQ_STAGES),
            plgpu.Barrier(num_barriers=DQ_STAGES),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="attention_dq",
        compiler_params=PARAMS,
    )(q, k, v, g, lse, delta, jnp.asarray(table.reshape(-1)), *(numbers or ()))
