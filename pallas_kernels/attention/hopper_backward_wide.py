"""Attention for NVIDIA Hopper, backward, dk and dv of head dims above 128: of the same 64 keys one warpgroup sums dv, the other dk.

Sums of 64 keys by 256 columns are 128 registers a thread, and no warpgroup has room for two. The first makes scores and weights, the second
the gradients of weights; what the second needs of weights comes through shared memory, rounded as a product takes it. So there are four
products, as in the kernel for smaller head dims, two to each warpgroup, and while one computes, the tensor cores are the other's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
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
    bar,
    fed_by,
    feeders,
    in_groups,
    masked,
    numbers_in_tiles,
    read,
    span_of_queries,
    write,
)
from pallas_kernels.attention.hopper_backward import FEEDING, MULTIPLYING, READERS, TILE_COST, WARPGROUPS
from pallas_kernels.attention.hopper_plan import Work, added, place_of_sums, plan_of_keys, sums_of_parts
from pallas_kernels.hopper_gemm import SHARED_BYTES

QUERIES, STAGES = 64, 2
"""Of a step, and steps in flight."""
PASSED = 2
"""Blocks of weights on their way from one warpgroup to the other."""


def shared_bytes(head: int) -> int:
    rows = 3 * pl.cdiv(4 * STAGES * QUERIES, 1024) * 1024
    return 2 * ((2 * ROWS + 2 * STAGES * QUERIES) * head + PASSED * ROWS * QUERIES) + rows + 1024


@dataclasses.dataclass(frozen=True)
class Ring:
    """Queries, or cotangents, in flight: where they are, what says that they are there, and that they have been read."""

    tiles: Any
    full: Any
    free: Buffers


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
    """dk and dv; arguments and results as those of `hopper_backward.gradients_of_keys`, q and v of one head dim."""
    (*_, n, head), (_, length, kv_heads, head_v) = q.shape, v.shape
    if head != head_v or shared_bytes(head) > SHARED_BYTES:
        raise AssertionError(f"head dims {head} and {head_v} are refused")
    key_tiles = pl.cdiv(length, ROWS)
    if numbers is not None:
        numbers = numbers_in_tiles(numbers, q, k, QUERIES, ROWS)
    parts, table = plan_of_keys(static, q, v, numbers, ROWS, QUERIES, TILE_COST)
    group, share = n // kv_heads // parts, blind
    if parts > 1:
        blind = None  # is added where parts are
    blocks, width = table.shape
    shape = (ROWS, QUERIES)
    writers = feeders()
    free_tile = Buffers(WARPGROUPS + 2, READERS, writers)  # barrier 0 is the block's, and each warpgroup has one
    free_queries = Buffers(free_tile.index + 1, READERS, writers)
    free_cotangents = Buffers(free_queries.index + STAGES, READERS, writers)
    free_weights = Buffers(free_cotangents.index + STAGES, WARPGROUP, WARPGROUP)
    weights_there = free_weights.index + PASSED

    def body(*given: Any) -> None:
        refs: Any = given
        absent: Any = (None, None)
        q_ref, k_ref, v_ref, g_ref, lse_ref, delta_ref, table_ref, *refs = refs
        (q_numbers_ref, kv_numbers_ref), refs = (refs[:2], refs[2:]) if numbers is not None else (absent, refs)
        blind_ref, refs = (refs[0], refs[1:]) if blind is not None else (None, refs)
        dk_ref, dv_ref, k_tile, v_tile, q_ring, g_ring, weights_ring, lse_ring, delta_ring, tile_full, q_full, g_full, *refs = refs
        numbers_ring: Any = refs[0] if refs else None
        queries, cotangents = Ring(q_ring, q_full, free_queries), Ring(g_ring, g_full, free_cotangents)
        warpgroup = lax.axis_index("warpgroup")
        work = Work(table_ref, lax.axis_index("block"), width, kv_heads * parts, key_tiles)
        item = functools.partial(work.item, fields=1 if numbers is None else 5)

        def located(batch: Any, part: Any, tile: Any, behind: Any) -> tuple[Any, Any, Any, Span]:
            key = tile * ROWS
            return batch, part, key, Span(*behind) if behind else span_of_queries(static, key, ROWS, QUERIES)

        @pl.when(warpgroup == WARPGROUPS)
        def _() -> None:
            plgpu.set_max_registers(FEEDING, action="decrease")

            def feed(i: Any, before: Any) -> Any:
                batch, part, key, span = located(*item(i))
                steps = group * span.steps

                @fed_by(writers)
                def _() -> None:
                    @pl.loop(0, steps)
                    def _(j: Any) -> None:
                        slot, head_of = lax.rem(before + j, STAGES), part * group + j // span.steps
                        at = pl.ds((span.first + lax.rem(j, span.steps)) * QUERIES, QUERIES)
                        free_queries.wait(slot)
                        plgpu.copy_gmem_to_smem(q_ref.at[batch, at, head_of], q_ring.at[slot], q_full.at[slot])
                        plgpu.copy_gmem_to_smem(lse_ref.at[batch, head_of, at], lse_ring.at[slot], q_full.at[slot])
                        if numbers is not None:
                            plgpu.copy_gmem_to_smem(q_numbers_ref.at[batch, at], numbers_ring.at[slot], q_full.at[slot])
                        free_cotangents.wait(slot)
                        plgpu.copy_gmem_to_smem(g_ref.at[batch, at, head_of], g_ring.at[slot], g_full.at[slot])
                        plgpu.copy_gmem_to_smem(delta_ref.at[batch, head_of, at], delta_ring.at[slot], g_full.at[slot])

                        @pl.when(j == 0)
                        def _() -> None:
                            free_tile.wait()
                            at = pl.ds(key, ROWS)
                            plgpu.copy_gmem_to_smem(k_ref.at[batch, at, part // parts], k_tile, tile_full)
                            plgpu.copy_gmem_to_smem(v_ref.at[batch, at, part // parts], v_tile, tile_full)

                return before + steps

            lax.fori_loop(0, work.count, feed, jnp.int32(0))

        def wide(x: jax.Array) -> jax.Array:
            return lax.broadcast_in_dim(x, shape, [1])

        def sum_up(
            tile: Any, scored: Ring, summed: Ring, factor: Callable[..., Any], out_ref: Any, finish: Callable[..., jax.Array]
        ) -> None:
            """What a warpgroup does: products of its tile with `scored` become left factors of products with `summed`, which it sums.

            Args:
              tile: keys or values.
              factor: `factor(batch, key, span)(product, step, slot, place)`, the left factor; reads the rows that came with `scored`.
              finish: `finish(sums, batch, part)`, what is written.
            """
            plgpu.set_max_registers(MULTIPLYING, action="increase")
            for slot in range(STAGES):
                free_queries.free(slot)
                free_cotangents.free(slot)
            free_tile.free()

            def differentiate(i: Any, carry: Any) -> Any:
                before, of_table = carry
                batch, part, key, span = located(*of_table)
                steps, factor_of = group * span.steps, factor(batch, key, span)

                def slot_of(j: Any) -> Any:
                    return lax.rem(before + j, STAGES)

                def multiply(out: Any, j: Any) -> None:
                    plgpu.wgmma(out, tile, scored.tiles.at[slot_of(j)].transpose((1, 0)))

                def first(out: Any) -> jax.Array:
                    multiply(out, 0)
                    return out[...]

                plgpu.barrier_wait(tile_full)
                plgpu.barrier_wait(scored.full.at[slot_of(0)])
                product = pl.run_scoped(first, plgpu.ACC(shape, jnp.float32))

                def all_steps(sums: Any) -> jax.Array:
                    def left(product: jax.Array, j: Any) -> jax.Array:
                        slot = slot_of(j)
                        made = factor_of(product, span.first + lax.rem(j, span.steps), slot, lax.rem(before + j, PASSED))
                        scored.free.free(slot)
                        plgpu.barrier_wait(summed.full.at[slot])
                        return made

                    def turn(j: Any, product: jax.Array) -> jax.Array:
                        made = left(product, j)
                        plgpu.barrier_wait(scored.full.at[slot_of(j + 1)])

                        def products(out: Any) -> jax.Array:
                            plgpu.wgmma(sums, made, summed.tiles.at[slot_of(j)])
                            multiply(out, j + 1)
                            plgpu.wgmma_wait(1)
                            summed.free.free(slot_of(j))
                            return plgpu.wgmma_accumulator_load(out, wait_n=0)

                        return pl.run_scoped(products, plgpu.ACC(shape, jnp.float32))

                    last = steps - 1
                    product_of_last = lax.fori_loop(0, last, turn, product)
                    free_tile.free()
                    made = left(product_of_last, last)
                    plgpu.wgmma(sums, made, summed.tiles.at[slot_of(last)])
                    plgpu.wgmma_wait(0)
                    summed.free.free(slot_of(last))
                    return sums[...]

                sums = pl.run_scoped(all_steps, plgpu.ACC((ROWS, head), jnp.float32))
                of_table = item(jnp.minimum(i + 1, count - 1))
                made = finish(sums, batch, part).astype(out_ref.dtype)
                write(made, out_ref.at[place_of_sums(parts, batch, part, pl.ds(key, ROWS))], length - key)
                return before + steps, of_table

            count = work.count
            lax.fori_loop(0, count, differentiate, (jnp.int32(0), item(0)))

        @pl.when(warpgroup == 0)
        def _() -> None:
            def weights(batch: Any, key: Any, span: Span) -> Callable[..., jax.Array]:
                if numbers is not None:
                    kv_numbers = read(kv_numbers_ref.at[batch, pl.ds(key, ROWS)], OF_ROWS)

                def hide(s: jax.Array, step: Any, slot: Any) -> jax.Array:
                    same = None
                    if numbers is not None:
                        same = lax.broadcast_in_dim(kv_numbers, shape, [0]) == wide(plgpu.load(numbers_ring.at[slot], layout=OF_COLUMNS))
                    return masked(static, s, step * QUERIES, key, 1, same)

                def factor(s: jax.Array, step: Any, slot: Any, place: Any) -> jax.Array:
                    tanh = s if static.cap is None else jnp.tanh(s * (static.scale / static.cap))
                    seen = lax.cond(span.needs_mask(step), lambda: hide(tanh, step, slot), lambda: tanh) if static.masks(ROWS) else tanh
                    p = jnp.exp2(seen * static.unit - wide(plgpu.load(lse_ring.at[slot], layout=OF_COLUMNS)))
                    made = p.astype(v.dtype)
                    free_weights.wait(place)
                    weights_ring[place] = made if static.cap is None else (p * (1 - tanh * tanh)).astype(q.dtype)
                    bar("arrive", weights_there + place, 2 * WARPGROUP)
                    return made

                return factor

            def finish(dv: jax.Array, batch: Any, part: Any) -> jax.Array:
                if blind_ref is None:
                    return dv
                return dv + lax.broadcast_in_dim(read(blind_ref.at[batch, part // parts], OF_COLUMNS), dv.shape, [1])

            sum_up(k_tile, queries, cotangents, weights, dv_ref, finish)

        @pl.when(warpgroup == 1)
        def _() -> None:
            for place in range(PASSED):
                free_weights.free(place)

            def gradients(batch: Any, key: Any, span: Span) -> Callable[..., jax.Array]:
                def factor(dp: jax.Array, step: Any, slot: Any, place: Any) -> jax.Array:
                    off = wide(plgpu.load(delta_ring.at[slot], layout=OF_COLUMNS))
                    bar("sync", weights_there + place, 2 * WARPGROUP)
                    p = plgpu.load(weights_ring.at[place], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
                    free_weights.free(place)
                    return (p * (dp - off)).astype(q.dtype)

                return factor

            sum_up(v_tile, cotangents, queries, gradients, dk_ref, lambda dk, batch, part: dk * static.scale)

    def shared(*shape: int) -> Any:
        return in_groups(shape, q.dtype)

    def ring_of_rows(dtype: Any) -> Any:
        return plgpu.SMEM((STAGES, QUERIES), dtype)

    launch = plgpu.kernel(
        body,
        out_type=[sums_of_parts(k, parts), sums_of_parts(v, parts)],
        scratch_types=[
            shared(ROWS, head),
            shared(ROWS, head),
            shared(STAGES, QUERIES, head),
            shared(STAGES, QUERIES, head),
            shared(PASSED, ROWS, QUERIES),
            ring_of_rows(jnp.float32),
            ring_of_rows(jnp.float32),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=2 + (numbers is not None), num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            *([] if numbers is None else [ring_of_rows(jnp.int32)]),
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="attention_dk_dv_wide",
        compiler_params=PARAMS,
    )
    dk, dv = launch(q, k, v, g, lse, delta, jnp.asarray(table.reshape(-1)), *(numbers or ()), *([] if blind is None else [blind]))
    if parts == 1:
        return dk, dv
    return added(dk, k), added(dv, v, share)
