"""Which thread block makes which tiles of attention on NVIDIA Hopper, and in what order, before a kernel starts.

From a mask of positions it is known at tracing, in plain integers; where segments and lengths decide, on the device.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.attention.calls import Static
from pallas_kernels.attention.hopper import Numbers, loaded, span_of_queries, spans_by_data
from pallas_kernels.hopper_gemm import MULTIPROCESSORS

L2_BYTES = 8 * 2**20
"""Of what is read again and again and is worked on at a time, in an L2 of 50 MiB."""
MOST_PLANNED = 1 << 16
"""Items that are given out by their costs; beyond, in turn."""
UNEVEN = 1.01
"""How much more than its share a multiprocessor may have, for the L2's sake."""
ADDING, LAUNCH = 3.3, 4
"""What adding parts of sums costs, in steps of a multiprocessor: the first for each number of a part's sums by those of a step's scores,
where 8 bytes at 3 TB/s stand beside 4 (H + Hv) operations at 5 TFLOP/s; the second at all."""
MOST_SUMS = 256 * 2**20
"""Bytes of them."""
WORTH = 0.97
"""What is left of the time, at most, where there are more parts than one."""


def plan(tiles: int, outer: int, inner: int, bytes_of_outer: int, costs: np.ndarray) -> tuple[np.ndarray, float]:
    """Which multiprocessor makes what: items are tiles of `inner` heads that read the same, `outer` times.

    As many of the outer ones as the L2 holds are made at a time, and of those the tiles that cost most come first, so that what is
    left for the end is short. Where even so one has more than `UNEVEN` says, twice as many are made at a time, and twice again.

    Args:
      costs: of each tile, with something for its beginning and end.

    Returns:
      A row for each multiprocessor, of how many items and which, `(outer * inner + inner's) * tiles + tile`; and the cost of what that
      one has who has most.
    """
    longest_first = np.argsort(-costs, kind="stable")
    workers = min(MULTIPROCESSORS, tiles * outer * inner)
    even = np.sum(costs) * outer * inner / workers
    together = max(1, L2_BYTES // bytes_of_outer)
    found = []
    while True:
        starts = range(0, outer, together)
        heads = [np.arange(start * inner, min(start + together, outer) * inner) for start in starts]
        items = np.concatenate([(of[None] * tiles + longest_first[:, None]).reshape(-1) for of in heads])
        owners, most = shares(costs[items % tiles], workers)
        found.append((most, together, items, owners))
        if most <= UNEVEN * even or together >= outer or len(items) > MOST_PLANNED:
            break
        together *= 2
    most, _, items, owners = min(found, key=lambda f: f[:2])
    counts = np.bincount(owners, minlength=workers)
    table = np.zeros((workers, 1 + counts.max()), np.int32)
    table[:, 0] = counts
    for worker in range(workers):
        table[worker, 1 : 1 + counts[worker]] = items[owners == worker]
    return table, most


def shares(costs: np.ndarray, workers: int) -> tuple[np.ndarray, float]:
    """The worker of each item, and the cost of what that one has who has most. In their order, each goes to who has least so far."""
    if len(costs) > MOST_PLANNED:
        owners = np.arange(len(costs)) % workers
    else:
        load = [(0, worker) for worker in range(workers)]
        owners = np.empty(len(costs), np.int64)
        for i, cost in enumerate(costs.tolist()):
            done, owners[i] = load[0]
            heapq.heapreplace(load, (done + cost, int(owners[i])))
    return owners, float(np.bincount(owners, costs).max())


def plan_of_keys(
    static: Static, q: jax.Array, v: jax.Array, numbers: Numbers | None, keys: int, queries: int, tile_cost: int
) -> tuple[int, Any]:
    """In how many parts the query heads of a key head are taken where dk and dv are summed, and the plan.

    A tile of keys is as much work as its head has query heads, and few tiles of much work cannot be shared out. A part of the heads is
    an item of its own, whose sums are added to those of the other parts later. What data hide is not known here: then there are parts
    only where half of the multiprocessors would have nothing.

    Args:
      numbers: in tiles. keys, queries: of a tile, and of a step. tile_cost: what an item costs besides its steps, in steps.

    Returns:
      The parts, and items as of `plan` or `plan_by_data`, where head `kv_head * parts + part` is for a part.
    """
    (b, t, n, head), (_, length, kv_heads, head_v) = q.shape, v.shape
    group, tiles = n // kv_heads, pl.cdiv(length, keys)
    items, sums = b * kv_heads * tiles, b * kv_heads * length
    divisors = [p for p in range(1, group + 1) if group % p == 0]
    divisors = [p for p in divisors if p == 1 or (4 * p * sums * (head + head_v) <= MOST_SUMS and p * items <= MOST_PLANNED)]
    if numbers is not None:
        few = 2 * items <= MULTIPROCESSORS
        parts = next((p for p in divisors if p * items >= MULTIPROCESSORS), divisors[-1]) if few else 1
        return parts, plan_by_data(spans_by_data(static, *numbers, queries, keys, of_keys=True), kv_heads * parts, tiles)
    steps = np.broadcast_to(span_of_queries(static, np.arange(tiles) * keys, keys, queries).steps, tiles)
    best, parts, table = math.inf, 1, np.empty(0)
    for p in divisors:
        heads = group // p
        candidate, most = plan(tiles, b * kv_heads * p, 1, 2 * t * heads * (head + head_v), heads * steps + tile_cost)
        cost = most if p == 1 else most + LAUNCH + p * ADDING * sums / (keys * queries)
        if cost < WORTH * best:
            best, parts, table = cost, p, candidate
        if most * MULTIPROCESSORS <= UNEVEN * b * kv_heads * np.sum(group * steps + tile_cost):
            break
    return parts, table


def sums_of_parts(like: jax.Array, parts: int) -> jax.ShapeDtypeStruct:
    """Where the kernel for dk or dv writes: results, or float32 sums of each part."""
    return jax.ShapeDtypeStruct(like.shape, like.dtype) if parts == 1 else jax.ShapeDtypeStruct((parts, *like.shape), jnp.float32)


def place_of_sums(parts: int, batch: Any, part: Any, rows: Any) -> tuple[Any, ...]:
    """Of `sums_of_parts`, where those of some keys are; `part` counts through the parts of all heads."""
    of_head = batch, rows, part // parts
    return of_head if parts == 1 else (lax.rem(part, parts), *of_head)


def added(sums: jax.Array, like: jax.Array, share: jax.Array | None = None) -> jax.Array:
    """What `sums_of_parts` is of, and `share`, `[B, K, H]`, for every key."""
    whole = sums.sum(0)
    return (whole if share is None else whole + share[:, None]).astype(like.dtype)


def plan_by_data(spans: jax.Array, heads: int, tiles: int) -> jax.Array:
    """As `plan`, from spans that the device knows, `[B, tiles, 4]`: behind each item its span.

    The most costly come first, and go to all workers in turn, there and back.
    """
    batch = len(spans)
    assert spans.shape == (batch, tiles, 4), (spans.shape, tiles)
    spans = spans.reshape(-1, 4)
    order = jnp.argsort(spans[:, 0] - spans[:, 1])
    workers = min(MULTIPROCESSORS, batch * tiles * heads)
    turn, worker = np.arange(pl.cdiv(batch * tiles * heads, workers)), np.arange(workers)[:, None]
    place = turn * workers + np.where(turn % 2, workers - 1 - worker, worker)
    counts = (place < batch * tiles * heads).sum(1, keepdims=True)
    place = np.minimum(place, batch * tiles * heads - 1)
    tile = order[place // heads]
    item = (tile // tiles * heads + place % heads) * tiles + tile % tiles
    table = jnp.concatenate([item[..., None], spans[tile]], -1).reshape(workers, -1)
    return jnp.concatenate([counts, table], 1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Work:
    """The items of a thread block, read from a plan of `width` integers a block, of `heads` and `tiles`."""

    table: Any
    block: Any
    width: int
    heads: int
    tiles: int

    @property
    def count(self) -> Any:
        return loaded(self.table[self.block * self.width])

    def item(self, i: Any, fields: int) -> tuple[Any, Any, Any, list[Any]]:
        """Batch, head, tile, and what stands behind."""
        place = self.block * self.width + 1 + i * fields
        code = loaded(self.table[place])
        head_of_batch = code // self.tiles
        behind = [loaded(self.table[place + j]) for j in range(1, fields)]
        return head_of_batch // self.heads, lax.rem(head_of_batch, self.heads), lax.rem(code, self.tiles), behind
