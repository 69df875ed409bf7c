"""How attention for TPU walks over scores: which blocks are visited, what the mask leaves of each, and how a kernel is launched on them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
import numpy as np

from kpt.ops.mask import Causal, Mask, Window
from pallas_kernels.attention.blocks import data_terms, visible_range
from pallas_kernels.tensorcore import LANES, launch, require_multiples

HIDDEN = -0.7 * float(np.finfo(np.float32).max)
LOWEST = HIDDEN / 2
"""A maximum is HIDDEN where nothing was seen, and LOWEST where -inf alone was, which makes NaN."""
MOST_PATTERNS = 6
"""Code is made for these; blocks with rarer patterns of tiles are masked as a whole."""
FIRST, LAST = 1, 2
"""Flags of a step: it opens or closes a block of the result."""
UNSEEN, UNCUT, CUT = 0, 1, 2
"""Of a tile by the mask; and of a block by segments and lengths, at run time."""


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
class Static:
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


def padded(length: int, block: int = LANES) -> int:
    return pl.cdiv(length, block) * block


@dataclasses.dataclass(frozen=True)
class Step:
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
class Chunk:
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


def chunks(states: np.ndarray, sizes: tuple[int, int], by_rows: bool, by_data: bool) -> Iterator[Chunk]:
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
            yield Chunk(
                slice(start * LANES, (start + len(here)) * LANES), slice(low * LANES, high * LANES), cut, by_rows, by_data or any(cut)
            )


class Call:
    """What the kernels share: padded operands, the list of blocks, and the mask."""

    def __init__(self, static: Static, block_q: int, block_kv: int, q: Any, k: Any, v: Any, q_ids: Any, kv_ids: Any, lengths: Any):
        self.static, self.lengths, self.block_q, self.block_kv = static, lengths, block_q, block_kv
        self.batch, self.heads, rows, self.head = q.shape
        self.rows, self.keys = padded(rows, block_q), padded(static.keys, block_kv)
        self.arrays = {"q": self.pad(q, 2), "k": pad_axis(k, 2, self.keys), "v": pad_axis(v, 2, self.keys)}
        self.ids = None if q_ids is None else (self.pad(q_ids, 1), pad_axis(kv_ids, 1, self.keys))
        self.by_data = bool(data_terms(static.mask))
        # Of each row the visible keys by causality and windows. Rows of padding see what the last row sees.
        positions = np.minimum(np.arange(self.rows), rows - 1) // static.group
        first, last = visible_range(static.mask, positions, static.keys)
        self.may_be_blind = self.by_data or not np.all(first < last)
        self.states = tiles(first, last, self.keys).reshape(self.rows // block_q, block_q // LANES, self.keys // block_kv, -1)
        self.states = self.states.swapaxes(1, 2)  # [row blocks, key blocks, tiles, tiles]

    def pad(self, a: Any, axis: int) -> Any:
        return pad_axis(a, axis, self.rows)

    def masked(self, step: Step, inputs: dict[str, Any], s: jax.Array, chunk: Chunk, by_data: bool) -> jax.Array:
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

    def _see(self, step: Step, inputs: Any, shape: Any, rows: slice, keys: slice, by_rows: bool, cut: bool, by_data: bool) -> jax.Array:
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

    def run(self, step: Step, body: Any, sizes: tuple[int, int], by_rows: bool = True) -> None:
        """`body(chunks, by_data)` for the block's pattern of tiles, unless it is hidden."""
        for n, states in enumerate(self.patterns):
            for by_data in (False, True) if self.by_data else (False,):
                left = list(chunks(states, sizes, by_rows, by_data))
                pl.when((step.pattern == n) & (step.state == (CUT if by_data else UNCUT)))(functools.partial(body, left, by_data))

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
            step = Step(
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


def tiles(first: np.ndarray, last: np.ndarray, keys: int) -> np.ndarray:
    """State of each 128 x 128 tile, from the first and one past the last key that each row sees: `[rows / 128, keys / 128]`."""
    starts = np.arange(0, keys, LANES)[None]
    low, high = first.reshape(-1, LANES), last.reshape(-1, LANES)
    empty = (low >= high).all(1)[:, None]
    hidden = empty | (starts >= high.max(1)[:, None]) | (starts + LANES <= low.min(1)[:, None])
    whole = (starts >= low.max(1)[:, None]) & (starts + LANES <= high.min(1)[:, None])
    return np.where(hidden, UNSEEN, np.where(whole, UNCUT, CUT)).astype(np.uint8)


def pad_axis(a: Any, axis: int, length: int) -> Any:
    more = length - a.shape[axis]
    return jnp.pad(a, [(0, more if d == axis else 0) for d in range(a.ndim)]) if more else a
