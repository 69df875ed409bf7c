"""Rotary embedding for NVIDIA Hopper, of one array or of two by one launch, forward and back by one kernel that reads and writes each
element once.

A thread block takes some positions of some heads. The copy engine brings them to shared memory, while a warpgroup reads the tables of its
positions into registers; it turns one head after the other and writes them from registers. A tile is `[positions, width]`, a row for each
position, so that tables and heads lie alike and any number of heads will do. Tiles at the end of a sequence, or of the heads, reach back
over what another block has: it is computed twice and written twice alike.

Halves of a pair are two tiles. Neighbours are in one vector of one thread, and change places in its registers.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
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

CHUNK = 16384
"""Bytes that a thread block turns, at most, where a head of a tile's positions is not more."""
BOX = 256
"""Elements of a dimension that one copy takes."""
MOST, MOST_ANGLES = 64, 96
"""Elements of a head, and of the tables in float32, that a thread holds."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a thread block holds `positions` of one head.

    Attributes:
      vector: elements that a thread holds side by side, 16 bytes of the narrowest array.
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
    _, t, _, h = x.shape
    out_dtype = params.get("out_dtype") or x.dtype
    if (why := unpartitioned()) is not None:
        return why
    if 0 in x.shape or r == 0:
        return "has no empty arrays and no heads that do not turn"
    if "float64" in (out_dtype, *(s.dtype for s in specs.values())):
        return "computes in float32, and these arrays are of float64"
    held = tile(h, r, bool(params.get("interleaved")), (x.dtype, out_dtype))
    if h > BOX or held is None:
        parts = f"{r} elements that turn" if params.get("interleaved") else f"halves of {r // 2} elements"
        return f"holds some positions of a head, 16 bytes of it to a thread, and has no tile for heads of {h} with {parts}"
    if t < held.positions:
        return f"turns {held.positions} positions at a time, and these are {t}; XLA fuses so few with what is around them"
    return None


def tile(h: int, r: int, interleaved: bool, dtypes: Sequence[Any]) -> Tile | None:
    """The tile whose loads are aligned in every row and leave a thread enough registers, or None.

    Args:
      h, r: elements of a head, and those of them that turn.
      dtypes: of the arrays that are loaded and stored; 16 bytes of the narrowest are a load.
    """
    widths = ((r,) if interleaved else (r // 2, r // 2)) + (h - r,)
    vector = 16 // min(jnp.dtype(d).itemsize for d in dtypes)
    positions = math.lcm(*(WARPGROUP * vector // math.gcd(w, WARPGROUP * vector) for w in widths))
    fits = positions * h <= MOST * WARPGROUP and 2 * positions * r <= MOST_ANGLES * WARPGROUP
    return Tile(positions, vector, widths) if fits and not any(w % vector for w in widths) else None


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
    return _of(interleaved, out_dtype, cos, sin, x)[0]


def pair(
    *, x: jax.Array, other: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool = False, out_dtype: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """`rope` of two arrays by one launch, a layer's queries and keys.

    Args:
      x, other: `[B, T, N, H]` and `[B, T, K, H]` of one dtype, float16, bfloat16 or float32, each of which `refusal` lets pass.
      cos, sin, interleaved, out_dtype: as `rope` takes them.

    Returns:
      What `rope` gives of each, to the bit, in their shapes and in `out_dtype`.
    """
    y, z = _of(interleaved, out_dtype, cos, sin, x, other)
    return y, z


rope.pair = pair  # type: ignore[attr-defined]  # see kpt_jax/pairs.py


def _of(interleaved: bool, out_dtype: str | None, cos: jax.Array, sin: jax.Array, *xs: jax.Array) -> tuple[jax.Array, ...]:
    static = _Static(bool(interleaved), str(jnp.dtype(out_dtype or xs[0].dtype)), str(xs[0].dtype))
    cos, sin, *given = vary_alike(cos, sin, *xs)
    made: tuple[jax.Array, ...] = _rope(static, tuple(given), cos, sin)
    return made


def _apply(static: _Static, xs: tuple[jax.Array, ...], cos: jax.Array, sin: jax.Array, back: bool) -> tuple[jax.Array, ...]:
    """The turn of each of `xs`, or the turn back (its transpose), which gives x's dtype."""
    launch = functools.partial(_launch, static, back)
    made: tuple[jax.Array, ...] = _mapped_apart(launch, [lambda x, *tables: launch((x,), *tables)[0]] * len(xs))(xs, cos, sin)
    return made


def _mapped_apart(launch: Callable[..., Any], alone: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    """`launch(xs, cos, sin)`, or `alone` of each of the arrays where `vmap` maps some of them only: it maps a launch as a whole, results of
    what is the same for all too."""
    apart = jax.custom_batching.custom_vmap(launch)

    @apart.def_vmap
    def _(size: int, mapped: Any, xs: Any, *tables: jax.Array) -> Any:
        of_xs, *of_tables = mapped
        axes = [0 if m else None for m in (*of_xs, *of_tables)]

        def over(fn: Callable[..., Any], axis: Any) -> Callable[..., Any]:
            return jax.vmap(fn, (axis, *axes[len(xs) :]), axis_size=size)

        of_each = [m or any(of_tables) for m in of_xs]
        each = [over(fn, axis) if m else fn for fn, axis, m in zip(alone, axes, of_each, strict=False)]
        if len(set(of_xs)) == 1:
            return _mapped_apart(over(launch, tuple(axes[: len(xs)])), each)(tuple(xs), *tables), tuple(of_each)
        return tuple(fn(x, *tables) for fn, x in zip(each, xs, strict=True)), tuple(of_each)

    return apart


def _launch(static: _Static, back: bool, xs: tuple[jax.Array, ...], cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, ...]:
    (examples, length, _, h), r = xs[0].shape, cos.shape[-1]
    held = tile(h, r, static.interleaved, (static.x_dtype, static.out_dtype))
    assert held is not None
    made = static.x_dtype if back else static.out_dtype
    given, parts = xs[0].dtype, len(held.widths) - 1
    most = max(1, CHUNK // (held.positions * h * given.itemsize))
    heads = [min(most, x.shape[2]) for x in xs]
    sizes = sorted(set(heads))
    blocks = [pl.cdiv(x.shape[2], n) for x, n in zip(xs, heads, strict=True)]
    tiles, of_tile = pl.cdiv(length, held.positions), sum(blocks)

    def kernel(*refs: Any) -> None:
        x_refs, (cos_ref, sin_ref), y_refs = refs[: len(xs)], refs[len(xs) :][:2], refs[len(xs) + 2 :][: len(xs)]
        *boxes, full = refs[2 * len(xs) + 2 :]
        arrived = [boxes[sizes.index(n)] for n in heads]
        number, block = lax.axis_index(BLOCK) // of_tile, lax.rem(lax.axis_index(BLOCK), of_tile)
        example, start = number // tiles, jnp.minimum(lax.rem(number, tiles) * held.positions, length - held.positions)
        positions = pl.ds(start, held.positions)

        def mine(arrays: Sequence[Any], use: Callable[[Any, int], None]) -> None:
            """`use` of this thread block's heads, which are of one of the arrays, and that array's place."""
            first = 0
            for i, ref in enumerate(arrays):
                head = jnp.minimum((block - first) * heads[i], ref.shape[2] - heads[i])
                run = functools.partial(use, ref.at[example, positions, pl.ds(head, heads[i])], i)
                run() if len(arrays) == 1 else pl.when((block >= first) & (block < first + blocks[i]))(run)
                first += blocks[i]

        def turned(z: list[jax.Array]) -> list[jax.Array]:
            if static.interleaved:
                return [z[0] * c[0] - _quarter(z[0] * s[0], held) if back else z[0] * c[0] + _quarter(z[0], held) * s[0]]
            (a, b), (ca, cb), (sa, sb) = z, c, s
            return [a * ca + b * sb, b * cb - a * sa] if back else [a * ca - b * sa, b * cb + a * sb]

        def store(ref: Any, i: int) -> None:
            for head in range(heads[i]):
                z = held.load(arrived[i], slice(None), head)
                y = turned([a.astype(jnp.float32) for a in z[:parts]]) + z[parts:]
                for at, a in zip(held.places(), y, strict=True):
                    ref[:, head, at] = a.astype(ref.dtype)

        mine(x_refs, lambda ref, i: plgpu.copy_gmem_to_smem(ref, arrived[i], full))
        of_tables = (example if cos.shape[0] > 1 else 0, positions)
        c, s = ([a.astype(jnp.float32) for a in held.load(ref, *of_tables, parts=slice(parts))] for ref in (cos_ref, sin_ref))
        plgpu.barrier_wait(full)
        mine(y_refs, store)

    launch = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(x.shape, made) for x in xs],
        scratch_types=[*(plgpu.SMEM((held.positions, n, h), given) for n in sizes), plgpu.Barrier()],
        grid=(examples * tiles * of_tile,),  # one dimension: the others of CUDA have 65535 blocks
        grid_names=(BLOCK,),
        # The engine alone writes what threads read.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )
    # Inside `shard_map` a kernel's results are typed as if all devices held the same.
    return vary_alike(*launch(*xs, cos, sin), xs[0])[: len(xs)]


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


def _turn(static, xs, cos, sin):
    return _apply(static, xs, cos, sin, back=False)


def _back(static, gs, cos, sin):
    return _apply(static, gs, cos, sin, back=True)


def _tables(static, xs, cos, sin, gs):
    each = (table_gradients(x, cos, sin, g, static.interleaved) for x, g in zip(xs, gs, strict=True))
    return functools.reduce(lambda a, b: (a[0] + b[0], a[1] + b[1]), each)


_rope = with_gradients(_turn, _back, _tables)
