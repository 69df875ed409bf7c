"""What the attention kernels for NVIDIA Hopper share: which tiles of scores are made, what is hidden in them, and how
threads wait for each other and write. Which thread block makes what is in `hopper_plan.py`.

Causality and windows are arithmetic on positions. Segments and lengths become one thing, a number for each query and each key that must
be equal; from the least and the largest number of a tile follows, on the device, which tiles are skipped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.calls import Static
from pallas_kernels.hopper_gemm import SWIZZLE
from pallas_kernels.manual_axes import in_shard_map, varying

WARP, WARPGROUP = 32, 128
OF_ROWS, OF_COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
_tiled: Any = plgpu.TilingTransform  # abstract, by its annotations alone
_swizzled: Any = plgpu.SwizzleTransform
PARAMS = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0)
HIDDEN_KEY = -(2**31)
"""The number of a key that no query sees."""

Numbers = tuple[jax.Array, jax.Array]
"""Of queries `[B, T]` and keys `[B, S]`, int32: a query sees the keys that have its own one."""


@dataclasses.dataclass(frozen=True)
class Span:
    """Steps `[first, last)` over tiles of one axis, of which those in `[whole, end)` need no mask. At least one, so that all is written."""

    first: Any
    last: Any
    whole: Any
    end: Any

    @property
    def steps(self) -> Any:
        return self.last - self.first

    def within(self, span: Span) -> Span:
        """These steps, which begin no sooner than those of `span`, as far as they are among them; and one where there is none."""
        return dataclasses.replace(self, first=jnp.minimum(self.first, span.last - 1), last=jnp.minimum(self.last, span.last))

    def needs_mask(self, step: Any) -> Any:
        return (step < self.whole) | (step >= self.end)

    def parts(self, static: Static) -> list[tuple[Any, Any, bool]]:
        """`(first, last, whether they need a mask)` of the steps, in order, over queries that see a tile of keys."""
        whole = jnp.minimum(self.whole, self.last)
        if static.diagonals[0] is None and not static.by_data:  # nothing ends what causality lets see
            return [(self.first, whole, True), (whole, self.last, False)]
        end = jnp.clip(self.end, whole, self.last)
        return [(self.first, whole, True), (whole, end, False), (end, self.last, True)]


def span_of_keys(static: Static, row: Any, rows: int, step: int) -> Span:
    """The tiles of `step` keys that queries `[row, row + rows)` see, by causality and windows; of numbers or of arrays."""
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


def span_of_queries(static: Static, key: Any, keys: int, step: int) -> Span:
    """The tiles of `step` queries that see some of the keys `[key, key + keys)`, by causality and windows; of numbers or of arrays."""
    np_ = jnp if isinstance(key, jax.Array) else np
    low, high = static.diagonals
    tiles = -(-static.queries // step)

    def bound(x: Any) -> Any:
        return np_.clip(x, 0, static.queries)

    first = 0 * key if high is None else np_.minimum(bound(key - high + 1) // step, tiles - 1)
    whole = first if high is None else (bound(key + keys - high) + step - 1) // step
    reach = static.queries if low is None else bound(key + keys - low)
    common = tiles * step if low is None else bound(key - low + 1)
    last = np_.maximum(np_.minimum((reach + step - 1) // step, tiles), first + 1)
    # Keys past the end have weights that nothing keeps finite.
    whole = np_.where(key + keys > static.keys, last, whole)
    return Span(first, last, whole, common // step + 0 * key)


def numbers_of(
    static: Static, q_segment_ids: jax.Array | None, kv_segment_ids: jax.Array | None, kv_lengths: jax.Array | None, batch: int
) -> Numbers:
    """What the mask's terms of data say."""
    if q_segment_ids is None or kv_segment_ids is None:
        q_numbers, kv_numbers = jnp.zeros((batch, static.queries), jnp.int32), jnp.zeros((batch, static.keys), jnp.int32)
    else:
        q_numbers, kv_numbers = (jnp.maximum(ids.astype(jnp.int32), HIDDEN_KEY + 1) for ids in (q_segment_ids, kv_segment_ids))
    if kv_lengths is not None:
        kv_numbers = jnp.where(jnp.arange(static.keys) < kv_lengths[:, None], kv_numbers, HIDDEN_KEY)
    return q_numbers, kv_numbers


def numbers_in_tiles(numbers: Numbers, q: jax.Array, k: jax.Array, rows: int, keys: int) -> Numbers:
    """As long as the tiles of `q` and `k` are, which may be padded beyond what is seen."""
    q_numbers, kv_numbers = numbers
    more_rows, more_keys = (pl.cdiv(a.shape[1], tile) * tile - of.shape[1] for a, tile, of in ((q, rows, q_numbers), (k, keys, kv_numbers)))
    kv_numbers = jnp.pad(kv_numbers, ((0, 0), (0, more_keys)), constant_values=HIDDEN_KEY)
    return jnp.pad(q_numbers, ((0, 0), (0, more_rows)), mode="edge"), kv_numbers


def spans_by_data(static: Static, q_numbers: jax.Array, kv_numbers: jax.Array, rows: int, keys: int, of_keys: bool) -> jax.Array:
    """`Span`s as `[B, tiles of queries, 4]` of the keys they see, or, `of_keys`, `[B, tiles of keys, 4]` of the queries that see them."""
    of_q, of_kv = q_numbers.reshape(len(q_numbers), -1, 1, rows), kv_numbers.reshape(len(kv_numbers), 1, -1, keys)
    q_least, q_most, kv_most = of_q.min(-1), of_q.max(-1), of_kv.max(-1)
    kv_least = jnp.where(of_kv == HIDDEN_KEY, 2**31 - 1, of_kv).min(-1)
    q_tiles, kv_tiles = q_least.shape[1], kv_most.shape[2]
    by_position, tile = span_of_keys(static, np.arange(q_tiles) * rows, rows, keys), np.arange(kv_tiles)

    def between(first: Any, last: Any) -> np.ndarray:
        return (tile >= np.broadcast_to(first, q_tiles)[:, None]) & (tile < np.broadcast_to(last, q_tiles)[:, None])

    seen = (q_least <= kv_most) & (kv_least <= q_most) & between(by_position.first, by_position.last)
    same = (q_least == q_most) & (of_kv.min(-1) == kv_most) & (q_least == kv_most)
    whole = same & between(by_position.whole, by_position.end)
    axis = 1 if of_keys else 2
    count = seen.shape[axis]

    def ends(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.argmax(x, axis), count - jnp.argmax(jnp.flip(x, axis), axis)

    (first, last), (whole_first, whole_last) = ends(seen), ends(whole)
    any_seen = seen.any(axis)
    first, last = jnp.where(any_seen, first, 0), jnp.where(any_seen, last, 1)
    gap = whole.sum(axis) != whole_last - whole_first
    whole_first, whole_last = jnp.where(gap, last, whole_first), jnp.where(gap, last, whole_last)
    return jnp.stack([first, last, whole_first, whole_last], -1).astype(jnp.int32)


def masked(static: Static, s: jax.Array, row: Any, key: Any, rows_axis: int, same: jax.Array | None = None) -> jax.Array:
    """Scores of queries from `row` and keys from `key` on, -inf where the mask hides them and past the last key.

    Args:
      s: of 64 rows. rows_axis: of it, that queries run along.
      same: where the numbers of query and key are one.
    """
    low, high = static.diagonals
    least = [] if low is None else [low - key + row]
    most = [] if high is None else [high - key + row]
    left = [] if same is not None or static.keys % s.shape[1 - rows_axis] == 0 else [static.keys - key]
    if same is not None:
        s = jnp.where(same, s, -jnp.inf)
    bounds = [jnp.asarray(x, jnp.int32) for x in (*least, *most, *left)]
    return _within(s, rows_axis, bounds, bool(least), bool(most), bool(left)) if bounds else s


def _within(s: jax.Array, rows_axis: int, bounds: list[jax.Array], has_least: bool, has_most: bool, has_left: bool) -> jax.Array:
    """Scores where `least <= key - query < most` and `key < left`, counted from the block's first ones; -inf elsewhere.

    A thread compares one number of its own with constants. Arrays of positions would be loop invariants, one register for each score.
    """
    splat = plgpu.Layout.WG_SPLAT
    out: Any = plgpu.ShapeDtypeStruct(s.shape, s.dtype, plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, *[splat] * len(bounds)), return_type=out)
    def emit(_: Any, s: Any, *bounds: Any) -> Any:
        from jax.experimental.mosaic.gpu import FragmentedArray, utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, vector

        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        constant: Any = arith.constant

        def number(x: int) -> Any:
            return utils.c(x, i32)

        # Of an element in half `h` of 8 rows, and column `e` of group `g` of 8: row `first_row + 8 h`, column `first_column + 8 g + e`.
        first_row, quarter = _place_in_block()
        first_column = arith.muli(quarter, number(2))
        ahead = arith.subi(first_column, first_row)
        if rows_axis == 1:
            ahead = arith.subi(first_row, first_column)
        queue = [bound.registers[()] for bound in bounds]
        least = arith.subi(queue.pop(0), ahead) if has_least else None
        most = arith.subi(queue.pop(0), ahead) if has_most else None
        left = arith.subi(queue.pop(0), first_column if rows_axis == 0 else first_row) if has_left else None
        hidden = constant(f32, ir.FloatAttr.get(f32, -math.inf))
        registers = s.registers.reshape(-1, 2)
        made = np.empty_like(registers)
        for (group, half), register in np.ndenumerate(registers):
            for e in range(2):
                column, row = 8 * group + e, 8 * half
                further = column - row if rows_axis == 0 else row - column
                score = vector.extract(register, dynamic_position=[], static_position=[e])
                for bound, place, hides in (
                    (least, further, arith.CmpIPredicate.sgt),
                    (most, further, arith.CmpIPredicate.sle),
                    (left, column if rows_axis == 0 else row, arith.CmpIPredicate.sle),
                ):
                    if bound is not None:
                        score = arith.select(arith.cmpi(hides, bound, number(place)), hidden, score)
                register = vector.insert(score, register, dynamic_position=[], static_position=[e])
            made[group, half] = register
        return FragmentedArray(_registers=made.reshape(s.registers.shape), _layout=s.layout, _is_signed=None)

    return emit(s, *bounds)


def _place_in_block() -> tuple[Any, Any]:
    """Of the elements of a thread in a block of 64 rows: the first row, and which two columns of each eight."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    def number(x: int) -> Any:
        return utils.c(x, ir.IntegerType.get_signless(32))

    thread = arith.remui(utils.thread_idx(), number(WARPGROUP))
    of_warp = arith.muli(arith.divui(thread, number(WARP)), number(16))
    row = arith.addi(of_warp, arith.divui(arith.remui(thread, number(WARP)), number(4)))
    return row, arith.remui(thread, number(4))


def write(x: jax.Array, ref: Any, rows: Any) -> None:
    """Writes the first `rows` of 64 rows to device memory from registers: no shared memory is taken, and nothing waits.

    A thread has two columns of each eight, of float32 8 bytes of 32 that are beside each other. Of 16 bits neighbours exchange those of
    every second eight, so that each has four, and as many bytes.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def emit(_: Any, x: Any, ref: Any, rows: Any) -> None:
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith

        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)

        def number(x: int) -> Any:
            return utils.c(x, i32)

        narrow = utils.bitwidth(x.mlir_dtype) == 16
        first_row, quarter = _place_in_block()
        odd = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(quarter, number(1)), number(0))
        column = arith.muli(quarter, number(2))
        if narrow:
            column = arith.addi(arith.select(odd, number(8), number(0)), arith.muli(arith.divui(quarter, number(2)), number(4)))
        (stride, _), _ = ref.type.get_strides_and_offset()
        registers = x.registers.reshape(-1, 2)
        for half in range(2):
            row = arith.addi(first_row, number(8 * half))
            inside = arith.cmpi(arith.CmpIPredicate.slt, row, rows.registers[()])
            element = arith.addi(arith.muli(row, number(stride)), column)
            start = utils.getelementptr(utils.memref_ptr(ref), [element], x.mlir_dtype)
            for group in range(0, len(registers), 1 + narrow):
                place = utils.getelementptr(start, [8 * group], x.mlir_dtype)
                if narrow:
                    mine, next_ = (utils.bitcast(register, i32) for register in registers[group : group + 2, half])
                    got = utils.shfl_bfly(arith.select(odd, mine, next_), 1)
                    words = arith.select(odd, got, mine), arith.select(odd, next_, got)
                    utils.inline_ptx("st.global.v2.b32 [$0], {$1, $2};", place, *words, predicate=inside, has_side_effects=True)
                else:
                    both = utils.bitcast(registers[group, half], i64)
                    utils.inline_ptx("st.global.b64 [$0], $1;", place, both, predicate=inside, has_side_effects=True)

    emit(x, ref, jnp.asarray(rows, jnp.int32))


def group_of(columns: int) -> int:
    """Of a row of so many 16-bit columns, those that are swizzled together: 128 bytes, or 64 where 128 do not divide the row, as of 96."""
    return SWIZZLE // 2 if columns % (SWIZZLE // 2) == 0 else SWIZZLE // 4


def in_groups(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory for rows of 16-bit numbers, laid out for the copy engine and the tensor cores."""
    group = group_of(shape[-1])
    return plgpu.SMEM(shape, dtype, transforms=(_tiled((8, group)), _swizzled(2 * group)))


def bar(operation: str, index: Any, threads: int) -> None:
    """`bar.arrive` or `bar.sync` on one of the 16 barriers of a block: every thread arrives for itself, so no warp is left behind."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def emit(_: Any, index: Any) -> None:
        from jax.experimental.mosaic.gpu import utils

        utils.inline_ptx(f"bar.{operation} $0, {threads};", index.registers[()], has_side_effects=True)

    emit(jnp.asarray(index, jnp.int32))


def feeders() -> int:
    """Threads that feed a block: one warp; inside `shard_map`, where jax's `warp_map` takes no arrays, its whole warpgroup."""
    return WARPGROUP if in_shard_map() else WARP


def fed_by(threads: int) -> Callable[[Callable[[], None]], None]:
    """Runs what it decorates in so many threads of a warpgroup."""

    def run(body: Callable[[], None]) -> None:
        if threads == WARPGROUP:
            return body()

        @plgpu.warp_map
        def _(warp: Any) -> None:
            pl.when(warp == 0)(body)

        return None

    return run


@dataclasses.dataclass(frozen=True)
class Buffers:
    """Barriers for buffers that `readers` threads have read and `writers` fill again; the first one is `index`."""

    index: int
    readers: int
    writers: int

    def free(self, slot: Any = 0) -> None:
        bar("arrive", self.index + slot, self.readers + self.writers)

    def wait(self, slot: Any = 0) -> None:
        bar("sync", self.index + slot, self.readers + self.writers)


def loaded(x: jax.Array, layout: Any = plgpu.Layout.WG_SPLAT) -> jax.Array:
    """`x`, read from device memory, of the type that values made in a kernel have.

    Inside `shard_map` what is read is typed as differing from device to device, which branches and loops hold against the rest.
    """
    if not varying(x):
        return x
    out: Any = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout)
    return plgpu.inline_mgpu(arg_types=(layout,), return_type=out)(lambda _, x: x)(x)


def read(ref: Any, layout: Any) -> jax.Array:
    """A part of a row in device memory, each thread what it needs of it."""
    return loaded(plgpu.load(ref, layout=layout, optimized=False), layout)


def padded(a: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Zeros behind, up to a multiple."""
    more = -a.shape[axis] % multiple
    return jnp.pad(a, [(0, more if i == axis else 0) for i in range(a.ndim)]) if more else a
