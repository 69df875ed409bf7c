"""Rows of a matrix in the registers of a Mosaic GPU kernel.

A row is cut into pieces of 128 threads times one 16-byte load; several warpgroups may share a row, and several thread blocks of a
cluster, which read each other's sums in shared memory. A width that the pieces do not divide is covered by letting the last ones reach
back over elements that another piece owns: what overlaps is computed twice and written twice alike, and counted once in sums.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.manual_axes import vary_alike

WARPGROUP = 128
BLOCK, SHARE, WARPGROUPS = "block", "share", "warpgroup"
"""Names of the grid axis, of the axis of thread blocks in a cluster, and of the axis of warpgroups in a thread block."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """How thread blocks hold a row.

    Attributes:
      width: elements of a row.
      vector: elements of one load of a thread.
      pieces: of each warpgroup.
      warpgroups: of a thread block, which holds one row, or its share of one, at a time.
      shares: thread blocks of a cluster that hold a row together.
    """

    width: int
    vector: int
    pieces: int
    warpgroups: int
    shares: int = 1

    @property
    def piece(self) -> int:
        return WARPGROUP * self.vector

    @property
    def layout(self) -> Any:
        return plgpu.Layout.WG_STRIDED((self.piece,), vec_size=self.vector)

    def place(self, j: Any) -> tuple[Any, Any]:
        """Where piece `j` of this warpgroup starts, and how many of its first elements another piece owns."""
        first = ((self.share() * self.warpgroups + self.warpgroup()) * self.pieces + j) * self.piece
        last = self.width - self.piece
        start = min(first, last) if isinstance(first, int) else jnp.minimum(first, last)
        return start, first - start

    def places(self) -> list[tuple[Any, Any]]:
        return [self.place(j) for j in range(self.pieces)]

    def warpgroup(self) -> Any:
        return lax.axis_index(WARPGROUPS) if self.warpgroups > 1 else 0

    def share(self) -> Any:
        return lax.axis_index(SHARE) if self.shares > 1 else 0

    def load(self, ref: Any, *index: Any) -> list[jax.Array]:
        """This warpgroup's pieces of `ref[index]`, a row, in the dtype of the array."""
        return [plgpu.load(ref.at[(*index, pl.ds(start, self.piece))], layout=self.layout) for start, _ in self.places()]

    def store(self, ref: Any, pieces: Sequence[jax.Array], *index: Any) -> None:
        """Writes this warpgroup's pieces to `ref[index]`, a row, in the dtype of the array."""
        for (start, _), piece in zip(self.places(), pieces, strict=True):
            ref[(*index, pl.ds(start, self.piece))] = piece.astype(ref.dtype)

    def owned(self, piece: jax.Array, foreign: Any) -> jax.Array:
        """The piece, 0 in its first `foreign` elements."""
        if self.width == self.shares * self.warpgroups * self.pieces * self.piece or (isinstance(foreign, int) and foreign == 0):
            return piece
        place = plgpu.broadcasted_iota(jnp.int32, (self.piece,), 0, layout=self.layout)
        return jnp.where(place >= foreign, piece, jnp.zeros_like(piece))

    def widened(self, pieces: Sequence[jax.Array]) -> list[jax.Array]:
        """The pieces in float32, to be used once: what stays in registers until the next use is the narrow array."""
        if self.vector > 1:  # Mosaic holds pairs of narrow numbers
            pieces = [lax.optimization_barrier(a) for a in pieces]
        return [a.astype(jnp.float32) for a in pieces]

    def once(self, write: Callable[[], None]) -> None:
        """Runs `write` in one of the warpgroups that share a row."""
        write() if self.warpgroups * self.shares == 1 else pl.when(self.share() * self.warpgroups + self.warpgroup() == 0)(write)

    def zero(self) -> jax.Array:
        return plgpu.layout_cast(jnp.zeros((self.piece,), jnp.float32), self.layout)


def cut(width: int, dtypes: Sequence[Any], resident: int, shares: int = 1) -> Cut:
    """The widest loads that keep their alignment in every row, and a power of two of warpgroups that hold `resident` elements each.

    Args:
      width: at least `WARPGROUP`.
      dtypes: of the arrays that are loaded and stored.
      shares: thread blocks that hold a row together, at most 8.
    """
    vector = math.gcd(width, 16 // min(jnp.dtype(d).itemsize for d in dtypes))
    while WARPGROUP * vector > width:
        vector //= 2
    warpgroups = 1 << (pl.cdiv(width, resident * shares) - 1).bit_length()
    return Cut(width, vector, pl.cdiv(width, WARPGROUP * vector * warpgroups * shares), warpgroups, shares)


def meet() -> None:
    """All threads of a cluster wait for each other, and see what the others wrote to shared memory.

    `plgpu.ClusterBarrier` (jax 0.11) does not promise the second: its arrivals name no scope, which in PTX is that of one thread block.
    """

    @plgpu.inline_mgpu()
    def emit(_: Any) -> None:
        from jax.experimental.mosaic.gpu import utils

        utils.inline_ptx("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;", has_side_effects=True, convergent=True)

    emit()


def over_cluster(half: Any, own: jax.Array, held: Cut, boxes: Any) -> jax.Array:
    """The sum of what each thread block of a cluster has found.

    Args:
      half: 0 or 1, and not that of the call before.
      boxes: `[2 WARPGROUP]` float32 in shared memory, half of which may still be read from the call before.
    """
    one, both = (plgpu.Layout.WG_STRIDED((n * WARPGROUP,), vec_size=n) for n in (1, 2))
    boxes[pl.ds(half * WARPGROUP, WARPGROUP)] = plgpu.layout_cast(jnp.full((WARPGROUP,), own), one)
    meet()
    # A part of another block's memory does not lower (jax 0.11), so all of it is read.
    found = [plgpu.load(plgpu.cluster_ref(boxes, {SHARE: i}), layout=both) for i in range(held.shares)]
    place = plgpu.broadcasted_iota(jnp.int32, (2 * WARPGROUP,), 0, layout=both)
    of_half = (place >= half * WARPGROUP) & (place < (half + 1) * WARPGROUP)
    total = functools.reduce(jnp.add, [jnp.where(of_half, a, jnp.zeros_like(a)) for a in found])
    return jnp.sum(total) / WARPGROUP  # one number, which so many elements have


class Sums:
    """Sums over a row, which several warpgroups hold, of one thread block or of a cluster.

    Args:
      scratch: `[2, warpgroups, piece]` float32 in shared memory, and a barrier of `warpgroups` arrivals; None for one warpgroup.
      boxes: `[2 WARPGROUP]` float32 in shared memory; None for one thread block.
    """

    def __init__(self, held: Cut, scratch: Any = None, barrier: Any = None, boxes: Any = None):
        self.held, self.scratch, self.barrier, self.boxes = held, scratch, barrier, boxes

    def __call__(self, turn: Any, pieces: Sequence[jax.Array]) -> Any:
        """The sum of all elements of a row, from all of its pieces.

        Args:
          turn: differs in parity from that of the call before: two calls share no shared memory, so that one barrier is enough.
        """
        places = self.held.places()
        return self.of(turn, functools.reduce(jnp.add, [self.held.owned(a, n) for a, (_, n) in zip(pieces, places, strict=True)]))

    def of(self, turn: Any, own: jax.Array) -> Any:
        """The same from one piece for each warpgroup, in which it has added up the elements that it owns.

        Mosaic (jax 0.11) gives a reduction to a scalar the same scratch memory in every warpgroup. So warpgroups exchange vectors, and
        all of them reduce the same one; the barrier keeps one call from the next.
        """
        half = 0 if self.held.warpgroups * self.held.shares == 1 else lax.rem(jnp.int32(turn), 2)
        found = self._of_block(half, own)
        return found if self.boxes is None else over_cluster(half, found, self.held, self.boxes)

    def _of_block(self, half: Any, own: jax.Array) -> Any:
        if self.held.warpgroups == 1:
            return jnp.sum(own)
        self.scratch[half, self.held.warpgroup()] = own
        plgpu.barrier_arrive(self.barrier)
        plgpu.barrier_wait(self.barrier)
        all_of_them = [plgpu.load(self.scratch.at[half, w], layout=self.held.layout) for w in range(self.held.warpgroups)]
        return jnp.sum(functools.reduce(jnp.add, all_of_them))


def kernel(body: Callable[..., None], out: Sequence[Any], blocks: int, held: Cut) -> Callable[..., Any]:
    """`body(*inputs, *outputs, Sums)` on `blocks` thread blocks, or clusters of them."""
    more: dict[str, Any] = {}
    scratch: dict[str, Any] = {}
    if held.warpgroups > 1:
        scratch["scratch"] = plgpu.SMEM((2, held.warpgroups, held.piece), jnp.float32)
        scratch["barrier"] = plgpu.Barrier(num_arrivals=held.warpgroups)
        more |= {"num_threads": held.warpgroups, "thread_name": WARPGROUPS}
    if held.shares > 1:
        scratch["boxes"] = plgpu.SMEM((2 * WARPGROUP,), jnp.float32)
        more |= {"cluster": (held.shares,), "cluster_names": (SHARE,)}

    def whole(*refs: Any) -> None:
        arrays, inner = refs[: len(refs) - len(scratch)], refs[len(refs) - len(scratch) :]
        body(*arrays, Sums(held, **dict(zip(scratch, inner, strict=True))))
        if held.shares > 1:  # none is gone while another reads its shared memory
            meet()

    launch = plgpu.kernel(
        whole,
        out_type=tuple(out),
        scratch_types=tuple(scratch.values()),
        grid=(blocks,),
        grid_names=(BLOCK,),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **more,
    )
    # Inside `shard_map` a kernel's results are typed as if all devices held the same.
    return lambda *inputs: vary_alike(*launch(*inputs), *inputs)[: len(out)]
