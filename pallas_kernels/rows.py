"""Rows of a matrix in the registers of a Mosaic GPU kernel.

A row is cut into pieces of 128 threads times one 16-byte load; several warpgroups may share a row. A width that the pieces do not
divide is covered by letting the last ones reach back over elements that another piece owns: what overlaps is computed twice and
written twice alike, and counted once in sums.
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
BLOCK, WARPGROUPS = "block", "warpgroup"
"""Names of the grid axis and of the axis of warpgroups in a thread block."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """How thread blocks hold a row.

    Attributes:
      width: elements of a row.
      vector: elements of one load of a thread.
      pieces: of each warpgroup.
      warpgroups: of a thread block, which holds one row at a time.
    """

    width: int
    vector: int
    pieces: int
    warpgroups: int

    @property
    def piece(self) -> int:
        return WARPGROUP * self.vector

    @property
    def layout(self) -> Any:
        return plgpu.Layout.WG_STRIDED((self.piece,), vec_size=self.vector)

    def place(self, j: Any) -> tuple[Any, Any]:
        """Where piece `j` of this warpgroup starts, and how many of its first elements another piece owns."""
        first = (self.warpgroup() * self.pieces + j) * self.piece
        last = self.width - self.piece
        start = min(first, last) if isinstance(first, int) else jnp.minimum(first, last)
        return start, first - start

    def places(self) -> list[tuple[Any, Any]]:
        return [self.place(j) for j in range(self.pieces)]

    def warpgroup(self) -> Any:
        return lax.axis_index(WARPGROUPS) if self.warpgroups > 1 else 0

    def load(self, ref: Any, *index: Any) -> list[jax.Array]:
        """This warpgroup's pieces of `ref[index]`, a row, in the dtype of the array."""
        return [plgpu.load(ref.at[(*index, pl.ds(start, self.piece))], layout=self.layout) for start, _ in self.places()]

    def store(self, ref: Any, pieces: Sequence[jax.Array], *index: Any) -> None:
        """Writes this warpgroup's pieces to `ref[index]`, a row, in the dtype of the array."""
        for (start, _), piece in zip(self.places(), pieces, strict=True):
            ref[(*index, pl.ds(start, self.piece))] = piece.astype(ref.dtype)

    def owned(self, piece: jax.Array, foreign: Any) -> jax.Array:
        """The piece, 0 in its first `foreign` elements."""
        if self.width == self.warpgroups * self.pieces * self.piece or (isinstance(foreign, int) and foreign == 0):
            return piece
        place = plgpu.broadcasted_iota(jnp.int32, (self.piece,), 0, layout=self.layout)
        return jnp.where(place >= foreign, piece, jnp.zeros_like(piece))

    def widened(self, pieces: Sequence[jax.Array]) -> list[jax.Array]:
        """The pieces in float32, to be used once: what stays in registers until the next use is the narrow array."""
        if self.vector > 1:  # Mosaic holds pairs of narrow numbers
            pieces = [lax.optimization_barrier(a) for a in pieces]
        return [a.astype(jnp.float32) for a in pieces]

    def once(self, write: Callable[[], None]) -> None:
        """Runs `write` in one warpgroup of the thread block."""
        write() if self.warpgroups == 1 else pl.when(self.warpgroup() == 0)(write)

    def zero(self) -> jax.Array:
        return plgpu.layout_cast(jnp.zeros((self.piece,), jnp.float32), self.layout)


def cut(width: int, dtypes: Sequence[Any], resident: int) -> Cut:
    """The widest loads that keep their alignment in every row, and a power of two of warpgroups that hold `resident` elements each.

    Args:
      width: at least `WARPGROUP`.
      dtypes: of the arrays that are loaded and stored.
    """
    vector = math.gcd(width, 16 // min(jnp.dtype(d).itemsize for d in dtypes))
    while WARPGROUP * vector > width:
        vector //= 2
    warpgroups = 1 << (pl.cdiv(width, resident) - 1).bit_length()
    return Cut(width, vector, pl.cdiv(width, WARPGROUP * vector * warpgroups), warpgroups)


class Sums:
    """Sums over a row, which several warpgroups hold.

    Args:
      scratch: `[2, warpgroups, piece]` float32 in shared memory, and a barrier of `warpgroups` arrivals; None for one warpgroup.
    """

    def __init__(self, held: Cut, scratch: Any = None, barrier: Any = None):
        self.held, self.scratch, self.barrier = held, scratch, barrier

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
        if self.held.warpgroups == 1:
            return jnp.sum(own)
        half = lax.rem(jnp.int32(turn), 2)
        self.scratch[half, self.held.warpgroup()] = own
        plgpu.barrier_arrive(self.barrier)
        plgpu.barrier_wait(self.barrier)
        all_of_them = [plgpu.load(self.scratch.at[half, w], layout=self.held.layout) for w in range(self.held.warpgroups)]
        return jnp.sum(functools.reduce(jnp.add, all_of_them))


def kernel(body: Callable[..., None], out: Sequence[Any], blocks: int, held: Cut) -> Callable[..., Any]:
    """`body(*inputs, *outputs, Sums)` on `blocks` thread blocks."""
    more: dict[str, Any] = {}
    if held.warpgroups > 1:
        scratch = (plgpu.SMEM((2, held.warpgroups, held.piece), jnp.float32), plgpu.Barrier(num_arrivals=held.warpgroups))
        more = {"scratch_types": scratch, "num_threads": held.warpgroups, "thread_name": WARPGROUPS}
    inner = len(more.get("scratch_types", ()))

    def whole(*refs: Any) -> None:
        arrays, scratch = refs[: len(refs) - inner], refs[len(refs) - inner :]
        body(*arrays, Sums(held, *scratch))

    launch = plgpu.kernel(
        whole,
        out_type=tuple(out),
        grid=(blocks,),
        grid_names=(BLOCK,),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **more,
    )
    # Inside `shard_map` a kernel's results are typed as if all devices held the same.
    return lambda *inputs: vary_alike(*launch(*inputs), *inputs)[: len(out)]
