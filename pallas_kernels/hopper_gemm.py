"""Matrix products for NVIDIA Hopper, with an epilogue on the float32 sums before anything is written.

A thread block stays on its multiprocessor and makes one tile of the result after another. One warpgroup feeds a ring of buffers in
shared memory through the copy engine and never waits for a tile to end; two warpgroups multiply, each its part of a tile, and write
the epilogue's results through small buffers while the ring fills for the next tile. Tiles follow each other along a snake, so
that those that are made at one time share rows and columns in the L2.

Sizes that tiles do not divide need no mask: the copy engine reads zeros outside an array, and writes nothing there. Rows of 64
elements and groups of 8 rows are the exception, for they are what it swizzles. A result of 64 columns is another: jax drops a dimension
that has one such group, and with it how far outside of the array a copy would begin, so that the copy lands on what there is.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kpt.errors import KernelError
from kpt.ops.base import Specs
from pallas_kernels.manual_axes import in_shard_map, unpartitioned, vary_alike

CONSUMERS = 2
"""Warpgroups that multiply; one more copies."""
BUFFERS = 2
"""Of each warpgroup for `[64, 64]` results on their way out."""
SHARED_BYTES = 227 * 1024
SWIZZLE = 128
"""Bytes of a row of a tile in shared memory that banks are spread over; the widest there is."""
MULTIPROCESSORS = 132
_FEEDING, _MULTIPLYING = 40, 232  # registers of a thread


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a product `[m, k] [k, n]` is cut.

    Attributes:
      m, n: rows and columns of the sums that a thread block holds, for all right factors together; 64 divides both.
      k: of one step; 64, a row of the widest swizzle.
      stages: of the ring.
      split: which of "m" and "n" the two warpgroups share out.
      along: which of "m" and "n" follows fastest in the order of tiles, and `width`: how many of them before the other one moves.
    """

    m: int = 128
    n: int = 256
    k: int = 64
    stages: int = 4
    split: str = "m"
    along: str = "m"
    width: int = 8

    def __post_init__(self) -> None:
        wrong = [f"{name}={getattr(self, name)}" for name in ("m", "n", "k") if getattr(self, name) <= 0 or getattr(self, name) % 64]
        wrong += [f"{name}={getattr(self, name)!r}" for name in ("split", "along") if getattr(self, name) not in ("m", "n")]
        wrong += [f"{name}={getattr(self, name)}" for name in ("stages", "width") if getattr(self, name) < 1]
        if not wrong and getattr(self, self.split) % (64 * CONSUMERS):
            wrong.append(f"{self.split}={getattr(self, self.split)}, which {CONSUMERS} warpgroups share")
        if not wrong and self.m * self.n // (CONSUMERS * 128) > 128:
            wrong.append(f"m={self.m} n={self.n}, more than 128 sums a thread")
        if not wrong and self.shared_bytes > SHARED_BYTES:
            wrong.append(f"stages={self.stages}, which take {self.shared_bytes} bytes of shared memory")
        if wrong:
            raise KernelError(
                f"Tiles were given with {'; '.join(wrong)}",
                f"m, n and k are multiples of 64 that fit {SHARED_BYTES} bytes and 128 sums a thread",
                "Leave tiles out to get the default",
            )

    @property
    def own(self) -> tuple[int, int]:
        """Rows and columns of one warpgroup."""
        return (self.m // CONSUMERS, self.n) if self.split == "m" else (self.m, self.n // CONSUMERS)

    @property
    def shared_bytes(self) -> int:
        """Of the ring and of the output buffers."""
        return 2 * self.stages * self.k * (self.m + self.n) + 2 * CONSUMERS * BUFFERS * 64 * 64

    def takes(self, factors: int) -> bool:
        """Whether so many right factors can share the sums: each has groups of 64 columns in both warpgroups."""
        return self.own[1] % (64 * factors) == 0

    def rounds(self, m: int, n: int, factors: int = 1) -> int:
        """How often all multiprocessors make a tile of `[m, n]` results."""
        return pl.cdiv(pl.cdiv(m, self.m) * pl.cdiv(n * factors, self.n), MULTIPROCESSORS)

    def __str__(self) -> str:
        return f"{self.m}x{self.n}"


BED = {Tiles(): 1.0, Tiles(n=192): 0.76, Tiles(m=256, n=128): 1.01, Tiles(n=128, stages=6): 0.53, Tiles(m=64, split="n"): 0.55}
"""How products may be cut, and the time of one such tile in that of the first one's."""


def tiles_for(m: int, n: int, factors: int = 1) -> Tiles:
    """The tiles that `[m, n]` results of so many right factors take least time in.

    All multiprocessors make tiles at a time, so that the last of them costs as much as a full round: smaller tiles are each a little
    slower for their size, and leave less of a round empty.
    """
    return min((t for t in BED if t.takes(factors)), key=lambda t: t.rounds(m, n, factors) * BED[t])


FEWEST = 64
"""Tiles of a result, below which XLA's product is faster: half of the multiprocessors would have nothing to do."""


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why these arrays cannot be taken, or None: for all ops whose arrays are a product's left factor, right factors and biases."""
    if (why := unpartitioned()) is not None:
        return why
    if any(0 in s.shape for s in specs.values()):
        return "has no empty arrays"
    first = "a" if "a" in specs else "x"  # one row alone has one dimension, as biases have
    factors = {first: specs[first]} | {n: s for n, s in specs.items() if len(s.shape) > 1}
    dtypes = sorted({s.dtype for s in factors.values()})
    if len(dtypes) > 1:
        return f"multiplies arrays of one dtype, and these are {' and '.join(dtypes)}"
    if params.get("out_dtype") not in (None, *dtypes):
        return f"rounds its result to {dtypes[0]}"
    for name, s in factors.items():
        if s.shape[-1] % 64:
            return f"cuts rows into 64 elements, and those of {name} have {s.shape[-1]}"
        if math.prod(s.shape[:-1]) % 8:
            return f"copies 8 rows at a time, and {name} has {math.prod(s.shape[:-1])}"
    left, *right = factors.values()
    m, n = math.prod(left.shape[:-1]), sum(s.shape[1] for s in right)
    if not enough(m, n):
        return f"is slower than XLA below {FEWEST} tiles of {Tiles.m} by {Tiles.n} sums, and here are {m} by {n} sums"
    return None


def enough(m: int, n: int) -> bool:
    """Whether `[m, n]` sums keep the chip busy."""
    return pl.cdiv(m, Tiles.m) * pl.cdiv(n, Tiles.n) >= FEWEST


Epilogue = Callable[..., Sequence[jax.Array]]


def products(
    a: jax.Array,
    bs: Sequence[jax.Array],
    epilogue: Epilogue,
    outputs: int,
    rows: Sequence[jax.Array] = (),
    beside: Sequence[jax.Array] = (),
    *,
    a_axis: int = 1,
    b_axis: int = 0,
    tiles: Tiles | None = None,
    name: str = "gemm",
    then: tuple[jax.Array, jax.Array] | None = None,
    onto: Any = None,
) -> tuple[jax.Array, ...]:
    """`epilogue(*[a b for b in bs], *rows, *beside)`, tile by tile.

    Args:
      a: a matrix, summed over its axis `a_axis`: `[M, K]`, or `[K, M]` for 0.
      bs: one or two matrices of one shape, summed over `b_axis`: `[K, N]`, or `[N, K]` for 1. All of a's dtype, bfloat16 or float16.
      epilogue: elementwise; gets float32 sums, each row broadcast to them, and what lies beside them, in float32 too.
      outputs: how many arrays the epilogue gives; each is rounded to a's dtype.
      rows: `[N]`, of biases.
      beside: `[M, N]`, of a's dtype. They take memory of the ring, which has as many stages of `tiles` as fit then.
      then: a left and a right factor like the first ones, whose product is added to the sums before the epilogue.
      onto: a `jax.Ref` of the result's shape and dtype, which the one output is added to; nothing is returned then.

    Returns:
      `[M, N]` arrays.

    Raises:
      KernelError: tiles that are not possible.
    """
    m, k, n = a.shape[1 - a_axis], a.shape[a_axis], bs[0].shape[1 - b_axis]
    factors = len(bs)
    tiles = tiles or tiles_for(m, n, factors)
    if beside:
        room = (SHARED_BYTES - tiles.shared_bytes - 2 * CONSUMERS * len(beside) * 64 * 64) // (2 * tiles.k * (tiles.m + tiles.n))
        tiles = dataclasses.replace(tiles, stages=min(tiles.stages, tiles.stages + room))
    tile_n = tiles.n // factors  # columns of the result
    own_m, own_n = tiles.own[0], tiles.own[1] // factors
    grid = (pl.cdiv(m, tiles.m), pl.cdiv(n, tile_n))
    pairs = [(a, *bs)] if then is None else [(a, *bs), then]
    steps = pl.cdiv(k, tiles.k)
    all_steps = steps * len(pairs)
    blocks = min(MULTIPROCESSORS, grid[0] * grid[1])
    tiled: Any = plgpu.TilingTransform  # abstract, by its annotations alone
    swizzled: Any = plgpu.SwizzleTransform
    transforms = (tiled((8, SWIZZLE // 2)), swizzled(SWIZZLE))
    # Loads of a row are no copies of the engine, so it is as long as the tiles are.
    rows = [jnp.pad(row.astype(jnp.float32), (0, grid[1] * tile_n - n)) for row in rows]

    def place(i: Any) -> tuple[Any, Any]:
        return plgpu.planar_snake(i, grid, "mn".index(tiles.along), tiles.width)

    def body(*refs: Any) -> None:
        queue = iter(refs)
        factor_refs = [[next(queue) for _ in pair] for pair in pairs]
        row_refs, beside_refs = [next(queue) for _ in rows], [next(queue) for _ in beside]
        out_refs = [next(queue) for _ in range(outputs)]
        a_ring, b_rings, out_buffer, full, empty, landings = queue
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == CONSUMERS)
        def _() -> None:
            plgpu.set_max_registers(_FEEDING, action="decrease")

            @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="block")
            def _(tile: Any) -> None:
                i, j = place(tile.index[0])
                at_m, at_n = pl.ds(i * tiles.m, tiles.m), pl.ds(j * tile_n, tile_n)

                def feed(step: Any, _: None) -> None:
                    count = tile.local_index * all_steps + step
                    slot = lax.rem(count, jnp.int32(tiles.stages))

                    @pl.when(count >= tiles.stages)
                    def wait() -> None:
                        plgpu.barrier_wait(empty.at[slot])

                    # The epilogue reads in a hurry, for nothing is multiplied meanwhile: what it reads waits in the L2 by then.
                    down, across = step // (tile_n // 64), lax.rem(step, jnp.int32(tile_n // 64))
                    piece = pl.ds(i * tiles.m + down * 64, 64), pl.ds(j * tile_n + across * 64, 64)
                    for ref in beside_refs:
                        plgpu.async_prefetch(ref.at[piece], predicate=down < tiles.m // 64)

                    for turn, pair_refs in enumerate(factor_refs):

                        @pl.when(step // steps == turn)
                        def copy(turn: int = turn, pair_refs: Any = pair_refs) -> None:
                            at_k = pl.ds((step - turn * steps) * tiles.k, tiles.k)
                            left = pair_refs[0].at[(at_m, at_k) if a_axis else (at_k, at_m)]
                            plgpu.copy_gmem_to_smem(left, a_ring.at[slot], full.at[slot])
                            for b_ref, b_ring in zip(pair_refs[1:], b_rings, strict=True):
                                right = b_ref.at[(at_n, at_k) if b_axis else (at_k, at_n)]
                                plgpu.copy_gmem_to_smem(right, b_ring.at[slot], full.at[slot])

                lax.fori_loop(0, all_steps, feed, None)

            # The last phases are nothing to wait for, but jax's interpreter wants every phase seen.
            fed = pl.cdiv(grid[0] * grid[1] - lax.axis_index("block"), blocks) * all_steps

            def see(i: Any, _: None) -> None:
                plgpu.barrier_wait(empty.at[lax.rem(i, jnp.int32(tiles.stages))])

            lax.fori_loop(jnp.maximum(fed - tiles.stages, 0), fed, see, None)

        @pl.when(warpgroup < CONSUMERS)
        def _() -> None:
            plgpu.set_max_registers(_MULTIPLYING, action="increase")
            first_m, first_n = (warpgroup * own_m, 0) if tiles.split == "m" else (0, warpgroup * own_n)
            mine_m = pl.ds(first_m, own_m) if tiles.split == "m" else slice(None)
            mine_n = pl.ds(first_n, own_n) if tiles.split == "n" else slice(None)
            # Of a result of 64 columns, the one piece across that there is.
            pieces = [*itertools.product(range(0, own_m, 64), range(0, own_n if n > 64 else 64, 64))]
            alone = pl.when(warpgroup == 0) if n <= 64 and tiles.split == "n" else lambda do: do()

            @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="block")
            def _(tile: Any) -> None:
                i, j = place(tile.index[0])

                def at(r: int, c: int) -> tuple[Any, Any]:
                    return pl.ds(i * tiles.m + first_m + r, 64), pl.ds(j * tile_n + first_n + c, 64)

                def copy(r: int, c: int) -> None:
                    for ref, (buffer, landed) in zip(beside_refs, landings, strict=True):
                        plgpu.copy_gmem_to_smem(ref.at[at(r, c)], buffer.at[warpgroup], landed.at[warpgroup])

                alone(lambda: copy(*pieces[0]))

                def multiply(*accs: Any) -> list[jax.Array]:
                    def step(s: Any, _: None) -> None:
                        slot = lax.rem(tile.local_index * all_steps + s, jnp.int32(tiles.stages))
                        plgpu.barrier_wait(full.at[slot])
                        left = a_ring.at[slot, mine_m] if a_axis else a_ring.at[slot, :, mine_m].transpose((1, 0))
                        for acc, b_ring in zip(accs, b_rings, strict=True):
                            right = b_ring.at[slot, mine_n].transpose((1, 0)) if b_axis else b_ring.at[slot, :, mine_n]
                            plgpu.wgmma(acc, left, right)
                        plgpu.wgmma_wait(0)  # the other warpgroup multiplies meanwhile
                        plgpu.barrier_arrive(empty.at[slot])

                    lax.fori_loop(0, all_steps, step, None)
                    return [acc[...] for acc in accs]

                sums = pl.run_scoped(multiply, *[plgpu.ACC((own_m, own_n), jnp.float32)] * factors)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # those of the last tile left the buffers long ago
                for turn, (r, c) in enumerate(pieces):

                    def write(turn: int = turn, r: int = r, c: int = c) -> None:
                        there = at(r, c)
                        # Straight from device memory, each thread what it needs.
                        wide = [plgpu.load(ref.at[there[1]], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False) for ref in row_refs]
                        wide = [lax.broadcast_in_dim(row, (64, 64), (1,)) for row in wide]
                        for buffer, landed in landings:
                            plgpu.barrier_wait(landed.at[warpgroup])
                            wide.append(plgpu.load(buffer.at[warpgroup], layout=plgpu.Layout.WGMMA).astype(jnp.float32))
                        if landings and turn + 1 < len(pieces):  # arrives while this piece is made
                            plgpu.commit_smem()  # no copy may overtake the loads of the piece before it
                            copy(*pieces[turn + 1])
                        made = epilogue(*(s[r : r + 64, c : c + 64] for s in sums), *wide)
                        for number, (out_ref, result) in enumerate(zip(out_refs, made, strict=True)):
                            buffer = out_buffer.at[warpgroup, (turn * outputs + number) % BUFFERS]
                            plgpu.wait_smem_to_gmem(BUFFERS - 1, wait_read_only=True)
                            buffer[...] = result.astype(out_ref.dtype)
                            plgpu.commit_smem()
                            plgpu.copy_smem_to_gmem(buffer, out_ref.at[there], reduction_op=None if onto is None else "add")

                    alone(write)

            plgpu.wait_smem_to_gmem(0, wait_read_only=False)

    def ring(*shape: int) -> Any:
        return plgpu.SMEM((tiles.stages, *shape), a.dtype, transforms=transforms)

    landing = plgpu.SMEM((CONSUMERS, 64, 64), a.dtype, transforms=transforms), plgpu.Barrier(num_arrivals=1, num_barriers=CONSUMERS)
    scratch = (
        ring(*((tiles.m, tiles.k) if a_axis else (tiles.k, tiles.m))),
        [ring(*((tile_n, tiles.k) if b_axis else (tiles.k, tile_n)))] * factors,
        plgpu.SMEM((CONSUMERS, BUFFERS, 64, 64), a.dtype, transforms=transforms),
        plgpu.Barrier(num_arrivals=1 + factors, num_barriers=tiles.stages),
        plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tiles.stages),
        [landing] * len(beside),
    )
    mesh: dict[str, Any] = {
        "grid": (blocks,), "grid_names": ("block",), "num_threads": CONSUMERS + 1, "thread_name": "warpgroup", "kernel_name": name
    }  # fmt: skip
    params = plgpu.CompilerParams(approx_math=True)
    inputs = [*itertools.chain(*pairs), *rows, *beside]
    if onto is not None:  # `plgpu.kernel` takes no references

        def scoped(*refs: Any) -> None:
            pl.run_scoped(functools.partial(body, *refs), *scratch, collective_axes="warpgroup")

        pl.kernel(scoped, out_type=(), mesh=plgpu.Mesh(**mesh), compiler_params=params)(*inputs, onto)
        return ()
    out = [jax.ShapeDtypeStruct((m, n), a.dtype)] * outputs
    launch = plgpu.kernel(body, out_type=out, scratch_types=scratch, compiler_params=params, **mesh)
    # Inside `shard_map` a kernel's results are typed as if all devices held the same.
    return vary_alike(*launch(*inputs), *inputs)[:outputs]


def product(a: jax.Array, b: jax.Array, *, a_axis: int = 1, b_axis: int = 0, tiles: Tiles | None = None, name: str = "gemm") -> jax.Array:
    """One product of two matrices over the axes named."""
    return products(a, [b], lambda acc: [acc], 1, a_axis=a_axis, b_axis=b_axis, tiles=tiles, name=name)[0]


@jax.custom_batching.sequential_vmap
def add_product(total: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """`total + a^T b` in the memory of `total`, where nothing else needs that: `[M, N]`, `[K, M]`, `[K, N]`.

    The product is rounded before it is added, and the sum again.
    """
    if in_shard_map():  # jax 0.11 gives kernels no references that differ from device to device
        return total + product(a, b, a_axis=0, tiles=Tiles(), name="add_product")
    ref = jax.new_ref(total)
    products(a, [b], lambda acc: [acc], 1, a_axis=0, tiles=Tiles(), name="add_product", onto=ref)
    return jax.freeze(ref)
