"""Rotary embedding for NVIDIA Hopper, forward and back by one kernel that reads and writes each element once, 16 bytes at a time where the
head dim allows it.

A thread block takes some positions and a group of heads. It holds the tables of its positions in registers, and walks over the heads:
a tile of them is `[positions, width]`, a row for each position, so that tables and heads lie alike and any number of heads will do. Tiles
at the end of a sequence, or of the heads, reach back over what another block has: it is computed twice and written twice alike.

Halves of a pair are two tiles. Neighbours are in one vector of one thread, and change places in its registers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from kpt.ops.base import Specs
from pallas_kernels.manual_axes import unpartitioned, vary_alike
from pallas_kernels.rope.xla import table_gradients, with_gradients
from pallas_kernels.rows import BLOCK, WARPGROUP

HEADS = 16
"""Of a thread block at most: tables are read once for so many heads, an eighth of what the heads themselves are."""
LOADS = 8
"""Of a thread that are in flight together: with 16 bytes each and five thread blocks, 80 KiB a multiprocessor."""
MOST, MOST_ANGLES = 64, 96
"""Elements of a head, and of the tables in float32, that a thread holds."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a thread block holds `positions` of one head.

    Attributes:
      vector: elements of one load of a thread.
      widths: of the parts that turn, one or two halves, and of what passes through, which may be 0.
    """

    positions: int
    vector: int
    widths: tuple[int, ...]

    def layout(self, width: int) -> Any:
        return plgpu.Layout.WG_STRIDED((self.positions, width), vec_size=self.vector)

    def load(self, ref: Any, *index: Any, parts: slice = slice(None)) -> list[jax.Array]:
        """The parts of `ref[index]`, whose axes are positions and elements of a head."""
        return [plgpu.load(ref.at[(*index, place)], layout=self.layout(place.size)) for place in self.places()[parts]]

    def places(self) -> list[Any]:
        starts = np.cumsum((0, *self.widths)).tolist()
        return [pl.ds(start, width) for start, width in zip(starts, self.widths, strict=False) if width]


@dataclasses.dataclass(frozen=True)
class _Static:
    interleaved: bool
    out_dtype: str
    x_dtype: str


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why these arrays cannot be taken, or None."""
    x, r = specs["x"], specs["cos"].shape[-1]
    out_dtype = params.get("out_dtype") or x.dtype
    if (why := unpartitioned()) is not None:
        return why
    if 0 in x.shape or r == 0:
        return "has no empty arrays and no heads that do not turn"
    if "float64" in (out_dtype, *(s.dtype for s in specs.values())):
        return "computes in float32, and these arrays are of float64"
    if tile(x.shape[-1], r, bool(params.get("interleaved")), (x.dtype, out_dtype)) is None:
        pairs = ", in neighbours," if params.get("interleaved") else ""
        return f"has no tile of registers for heads of {x.shape[-1]} of which {r}{pairs} turn"
    return None


def tile(h: int, r: int, interleaved: bool, dtypes: Sequence[Any]) -> Tile | None:
    """The tile with the widest loads that are aligned in every row and leave a thread enough registers, or None.

    Args:
      h, r: elements of a head, and those of them that turn.
      dtypes: of the arrays that are loaded and stored.
    """
    widths = ((r,) if interleaved else (r // 2, r // 2)) + (h - r,)
    vector = math.gcd(*widths, 16 // min(jnp.dtype(d).itemsize for d in dtypes))
    while vector > (1 if interleaved else 0):  # neighbours share a vector
        positions = math.lcm(*(WARPGROUP * vector // math.gcd(w, WARPGROUP * vector) for w in widths))
        if positions * h <= MOST * WARPGROUP and 2 * positions * r <= MOST_ANGLES * WARPGROUP:
            return Tile(positions, vector, widths)
        vector //= 2
    return None


def rope(
    *, x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool = False, out_dtype: str | None = None
) -> jax.Array:
    """`x cos + rotate(x) sin` on the first `R` of the head dim (Su et al. 2021, arXiv:2104.09864); the rest passes through.

    Args:
      x: `[B, T, N, H]` float16, bfloat16 or float32, that `refusal` lets pass.
      cos, sin: `[B or 1, T, R]`, `R` even, `R <= H`.
      interleaved: rotate pairs `(x0, x1) -> (-x1, x0)` instead of halves `(a, b) -> (-b, a)`.
      out_dtype: of the result; x's by default.
    """
    static = _Static(bool(interleaved), str(jnp.dtype(out_dtype or x.dtype)), str(x.dtype))
    return _rope(static, *vary_alike(x, cos, sin))


def _apply(static: _Static, x: jax.Array, cos: jax.Array, sin: jax.Array, back: bool) -> jax.Array:
    """The turn of `x`, or the turn back (its transpose), which gives x's dtype."""
    (batch, t, heads, h), r, shape = x.shape, cos.shape[-1], x.shape
    held = tile(h, r, static.interleaved, (static.x_dtype, static.out_dtype))
    assert held is not None
    if t < held.positions:  # few positions are those of the whole batch, and some more
        x, cos, sin = (jnp.broadcast_to(a, (batch, *a.shape[1:])).reshape(1, batch * t, *a.shape[2:]) for a in (x, cos, sin))
        more = max(0, held.positions - batch * t)
        x, cos, sin = (jnp.pad(a, [(0, more if i == 1 else 0) for i in range(a.ndim)]) for a in (x, cos, sin))
    tiles, groups = pl.cdiv(x.shape[1], held.positions), pl.cdiv(heads, HEADS)
    group, parts = pl.cdiv(heads, groups), len(held.widths) - 1
    together = min(group, max(1, LOADS * WARPGROUP * held.vector // (held.positions * h)))

    def kernel(x_ref: Any, cos_ref: Any, sin_ref: Any, y_ref: Any) -> None:
        block = lax.axis_index(BLOCK)
        example, number = block // (tiles * groups), lax.rem(block // groups, tiles)
        positions = pl.ds(jnp.minimum(number * held.positions, x.shape[1] - held.positions), held.positions)
        first = jnp.minimum(lax.rem(block, groups) * group, heads - group)
        of_tables = (example if cos.shape[0] > 1 else 0, positions)
        c, s = ([a.astype(jnp.float32) for a in held.load(ref, *of_tables, parts=slice(parts))] for ref in (cos_ref, sin_ref))

        def turned(z: list[jax.Array]) -> list[jax.Array]:
            if static.interleaved:
                return [z[0] * c[0] - _quarter(z[0] * s[0], held) if back else z[0] * c[0] + _quarter(z[0], held) * s[0]]
            (a, b), (ca, cb), (sa, sb) = z, c, s
            return [a * ca + b * sb, b * cb - a * sa] if back else [a * ca - b * sa, b * cb + a * sb]

        def turn(head: Any, count: int) -> None:
            found = [held.load(x_ref, example, positions, head + i) for i in range(count)]
            for i, z in enumerate(found):
                made = turned([a.astype(jnp.float32) for a in z[:parts]]) + z[parts:]
                for place, a in zip(held.places(), made, strict=True):
                    y_ref[example, positions, head + i, place] = a.astype(y_ref.dtype)

        steps, rest = divmod(group, together)
        lax.fori_loop(0, steps, lambda i, _: turn(first + i * together, together), None)
        turn(first + steps * together, rest)

    launch = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(x.shape, static.x_dtype if back else static.out_dtype),
        grid=(x.shape[0] * tiles * groups,),  # one dimension: the others of CUDA have 65535 blocks
        grid_names=(BLOCK,),
        # A thread reads what it alone writes.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )
    # Inside `shard_map` a kernel's results are typed as if all devices held the same.
    y = vary_alike(launch(x, cos, sin), x)[0]
    return y if y.shape == shape else y[:, : batch * t].reshape(shape)


def neighbours(vector: int) -> list[int]:
    """Of a vector and its negative, one after the other: what a quarter turn of its pairs takes, `(z0, z1) -> (-z1, z0)`."""
    return [vector + i + 1 if i % 2 == 0 else i - 1 for i in range(vector)]


def _quarter(z: jax.Array, held: Tile) -> jax.Array:
    """The quarter turn of every pair of neighbours, in float32: other names for registers, and signs."""
    layout = held.layout(z.shape[-1])
    out: Any = plgpu.ShapeDtypeStruct(z.shape, z.dtype, layout)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=out)
    def emit(_: Any, z: Any) -> Any:
        from jax.experimental.mosaic.gpu import FragmentedArray
        from jaxlib.mlir.dialects import arith, vector

        made = np.empty_like(z.registers)
        for i, register in np.ndenumerate(z.registers):
            made[i] = vector.shuffle(register, arith.negf(register), neighbours(held.vector))
        return FragmentedArray(_registers=made, _layout=z.layout, _is_signed=None)

    return emit(z)


def _turn(static, x, cos, sin):
    return _apply(static, x, cos, sin, back=False)


def _back(static, g, cos, sin):
    return _apply(static, g, cos, sin, back=True)


_rope = with_gradients(_turn, _back, lambda static, x, cos, sin, g: table_gradients(x, cos, sin, g, static.interleaved))
