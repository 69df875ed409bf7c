"""Linear layer and cross entropy for TPU: a block of logits lives in VMEM and never in HBM.

Forward: a block of tokens meets one block of classes after the other, in an online softmax. Backward: two kernels make the logits again,
one for x, whose gradient is summed over classes, one for w and b, summed over tokens: five products where plain code has three.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp

from kpt.errors import OpError
from kpt.ops.base import Specs
from pallas_kernels import tensorcore, tuned
from pallas_kernels.cross_entropy.tpu import clipped, column, online
from pallas_kernels.cross_entropy.xla import check, loss_of_row
from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.tensorcore import LANES, budget, cut, dot, launch, padded_bytes, require_fit, require_multiples


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tokens and classes of a block of logits, multiples of 128. All inputs of a token are in VMEM together."""

    MULTIPLE: ClassVar[int] = LANES
    rows: int
    classes: int

    def __post_init__(self) -> None:
        require_multiples(self)


def _need(blocks: Blocks, inputs: int, dtype: Any) -> int:
    """Bytes of VMEM: both factors and one gradient in two buffers, its sum, and five blocks of logits."""
    factors = padded_bytes((blocks.rows, inputs), dtype) + padded_bytes((inputs, blocks.classes), dtype)
    widest = max(blocks.rows, blocks.classes)
    splits = 2 * factors if dtype == jnp.float32 else 0  # into three of bfloat16
    gradient = 2 * padded_bytes((widest, inputs), dtype) + 2 * padded_bytes((widest, inputs), jnp.float32)
    return 2 * factors + splits + gradient + 5 * padded_bytes((blocks.rows, blocks.classes), jnp.float32)


def default_blocks(specs: Specs, params: Mapping[str, Any]) -> Blocks:
    x, w = specs["x"], specs["w"]
    return _rule(w.shape[0], jnp.promote_types(x.dtype, w.dtype))


def _rule(inputs: int, dtype: Any) -> Blocks:
    """As many tokens as the chip does operations a byte, halved until they fit."""
    blocks = Blocks(512, 512) if tensorcore.generation().mxu == 128 else Blocks(1024, 512)
    while _need(blocks, inputs, dtype) > budget() and max(blocks.rows, blocks.classes) > LANES:
        larger = "rows" if blocks.rows >= blocks.classes else "classes"
        blocks = dataclasses.replace(blocks, **{larger: getattr(blocks, larger) // 2})
    return blocks


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why these arrays cannot be taken, or None."""
    if (why := tensorcore.refusal(specs, params)) is not None:
        return why
    inputs, dtype = specs["w"].shape[0], jnp.promote_types(specs["x"].dtype, specs["w"].dtype)
    if (need := _need(Blocks(LANES, LANES), inputs, dtype)) > budget():
        return f"holds all inputs of {LANES} tokens in VMEM, and {inputs} take {need} bytes of {budget()}"
    return None


def linear_cross_entropy(
    *,
    x: jax.Array,
    w: jax.Array,
    labels: jax.Array,
    b: jax.Array | None = None,
    weights: jax.Array | None = None,
    label_smoothing: float = 0.0,
    logits_soft_cap: float | None = None,
    invalid: str = "nan",
    blocks: Blocks | None = None,
) -> jax.Array:
    """`cross_entropy(x w + b, labels) * weights`, the logits float32 and never in HBM.

    Args:
      x: `[..., K]`. w: `[K, V]`. bfloat16 or float32.
      labels: `[...]` integers.
      b: `[V]` or None.
      weights: `[...]`, or None for ones.
      label_smoothing, logits_soft_cap, invalid: as in `pallas_kernels.cross_entropy.xla.cross_entropy`.
      blocks: of logits, in all passes.

    Returns:
      Loss `[...]`, float32.

    Raises:
      OpError: shapes do not fit, or `invalid` is unknown.
      KernelError: the blocks do not fit VMEM.
    """
    asked = f"linear_cross_entropy of x{list(x.shape)} w{list(w.shape)}"
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[0]:
        raise OpError(asked, "x is [..., K], w is [K, V]", "Check the axes")
    labels = check(asked, x.shape[:-1], labels, invalid)
    dtype = jnp.promote_types(x.dtype, w.dtype)

    def fits(found: Blocks) -> bool:
        return tensorcore.fits(_need(found, x.shape[-1], dtype))

    found = blocks or tuned.blocks("linear_cross_entropy", Blocks, {}, fits, x=x, w=w, labels=labels, b=b, weights=weights)
    chosen = found or _rule(x.shape[-1], dtype)
    require_fit(chosen, _need(chosen, x.shape[-1], dtype))
    x, w, labels, b = vary_alike(x, w, labels, b)
    bias = None if b is None else b.reshape(1, -1)
    static = (label_smoothing, logits_soft_cap, invalid, chosen)
    loss = _loss(static, x.reshape(-1, x.shape[-1]), w, bias, labels.reshape(-1)).reshape(labels.shape)
    return loss if weights is None else loss * weights.astype(loss.dtype)


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """How tokens and classes are cut."""

    rows: int
    classes: int
    bm: int
    bv: int

    @property
    def grid(self) -> tuple[int, int]:
        return pl.cdiv(self.rows, self.bm), pl.cdiv(self.classes, self.bv)

    def weight(self, ref: Any, j: Any) -> jax.Array:
        """A block of w, 0 past the last class."""
        return _inside(ref[...], 1, j * self.bv, self.classes)

    def token(self, ref: Any, i: Any) -> jax.Array:
        """A block of x, 0 past the last token."""
        return _inside(ref[...], 0, i * self.bm, self.rows)


def _inside(block: jax.Array, axis: int, first: Any, end: int) -> jax.Array:
    if end % block.shape[axis] == 0:
        return block
    place = first + jax.lax.broadcasted_iota(jnp.int32, block.shape, axis)
    return jnp.where(place < end, block, jnp.zeros_like(block))


def _tiles(x: jax.Array, w: jax.Array, blocks: Blocks) -> _Tiles:
    rows, classes = x.shape[0], w.shape[1]
    return _Tiles(rows, classes, cut(rows, blocks.rows), cut(classes, blocks.classes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(static, x, w, b, labels):
    return _fwd(static, x, w, b, labels)[0]


def _fwd(static, x, w, b, labels):
    label_smoothing, cap, invalid, blocks = static
    tiles = _tiles(x, w, blocks)
    per_token = pl.BlockSpec((tiles.bm, 1), lambda i, j: (i, 0))

    def kernel(*refs: Any) -> None:
        x_ref, w_ref, *b_ref = refs[: 2 + (b is not None)]
        label_ref, *rest = refs[2 + (b is not None) :]
        z = dot(x_ref[...], w_ref[...])
        if b_ref:
            z = z + b_ref[0][...].astype(z.dtype)
        online(rest[:4], rest[4:], pl.program_id(1), tiles.grid[1], z, label_ref[...], cap, tiles.classes)

    found = launch(
        kernel,
        *(a for a in (x, w, b) if a is not None),
        column(clipped(labels, tiles.classes, invalid)),
        out=[((tiles.rows, 1), jnp.float32)] * 4,
        in_specs=[*_factors(tiles, x, b, lambda i, j: (i, j)), per_token],
        out_specs=[per_token] * 4,
        grid=tiles.grid,
        semantics=("parallel", "arbitrary"),
        scratch=[pltpu.VMEM((tiles.bm, 1), jnp.float32)] * 4,
        cost=pl.CostEstimate(flops=2 * x.size * w.shape[1], bytes_accessed=x.nbytes + w.nbytes * tiles.grid[0], transcendentals=0),
        name="linear_cross_entropy",
    )
    m, total, picked, summed = (a[:, 0] for a in found)
    loss = loss_of_row(m, total, picked, summed / tiles.classes, labels, tiles.classes, label_smoothing, invalid)
    return loss, (x, w, b, labels, m, total)


def _factors(tiles: _Tiles, x: jax.Array, b: jax.Array | None, place: Any) -> list[Any]:
    """Blocks of x, w and b where the grid's indices, by `place`, are those of tokens and classes."""
    inputs = x.shape[1]
    return [
        pl.BlockSpec((tiles.bm, inputs), lambda *n: (place(*n)[0], 0)),
        pl.BlockSpec((inputs, tiles.bv), lambda *n: (0, place(*n)[1])),
        *([] if b is None else [pl.BlockSpec((1, tiles.bv), lambda *n: (0, place(*n)[1]))]),
    ]


def _bwd(static, residuals, g):
    label_smoothing, cap, invalid, blocks = static
    x, w, b, labels, m, total = residuals
    tiles = _tiles(x, w, blocks)
    compute = jnp.promote_types(x.dtype, w.dtype)
    share = g / total
    if invalid == "drop":
        share = jnp.where((labels >= 0) & (labels < tiles.classes), share, share * label_smoothing)
    columns = [column(a) for a in (clipped(labels, tiles.classes, invalid), m, share, g)]
    given = [a for a in (x, w, b) if a is not None]

    def slope(refs: Any, i: Any, j: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The gradient of a block of logits, and the blocks of x and w that it is made of."""
        xs, ws = tiles.token(refs[0], i), tiles.weight(refs[1], j)
        z = dot(xs, ws)
        if b is not None:
            z = z + refs[2][...].astype(z.dtype)
        label, m, share, g = (ref[...] for ref in refs[len(given) :])
        t = None if cap is None else jnp.tanh(z / cap)
        z = z if t is None or cap is None else cap * t
        place = j * tiles.bv + jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
        d = jnp.exp(z - m) * share - jnp.where(place == label, (1 - label_smoothing) * g, 0.0)
        if label_smoothing:
            d = d - label_smoothing / tiles.classes * g
        d = d if t is None else d * (1 - t * t)
        d = _inside(_inside(d, 0, i * tiles.bm, tiles.rows), 1, j * tiles.bv, tiles.classes)
        return d, xs, ws

    def dx_kernel(*refs: Any) -> None:
        *inputs, dx_ref, acc_ref = refs
        j = pl.program_id(1)

        @pl.when(j == 0)
        def _() -> None:
            acc_ref[...] = jnp.zeros_like(acc_ref)

        d, _xs, ws = slope(inputs, pl.program_id(0), j)
        acc_ref[...] += dot(d.astype(compute), ws, 1, 1)

        @pl.when(j == tiles.grid[1] - 1)
        def _() -> None:
            dx_ref[...] = acc_ref[...].astype(dx_ref.dtype)

    def dw_kernel(*refs: Any) -> None:
        inputs, (dw_ref, db_ref, acc_ref) = refs[:-3], refs[-3:]
        i = pl.program_id(1)

        @pl.when(i == 0)
        def _() -> None:
            acc_ref[...] = jnp.zeros_like(acc_ref)
            db_ref[...] = jnp.zeros_like(db_ref)

        d, xs, _ws = slope(inputs, i, pl.program_id(0))
        acc_ref[...] += dot(xs, d.astype(compute), 0, 0)
        db_ref[...] += jnp.sum(d, 0, keepdims=True)

        @pl.when(i == tiles.grid[0] - 1)
        def _() -> None:
            dw_ref[...] = acc_ref[...].astype(dw_ref.dtype)

    flops = 4 * x.size * w.shape[1]
    (dx,) = launch(
        dx_kernel,
        *given,
        *columns,
        out=[(x.shape, x.dtype)],
        in_specs=[*_factors(tiles, x, b, lambda i, j: (i, j)), *[pl.BlockSpec((tiles.bm, 1), lambda i, j: (i, 0))] * 4],
        out_specs=[pl.BlockSpec((tiles.bm, x.shape[1]), lambda i, j: (i, 0))],
        grid=tiles.grid,
        semantics=("parallel", "arbitrary"),
        scratch=[pltpu.VMEM((tiles.bm, x.shape[1]), jnp.float32)],
        cost=pl.CostEstimate(flops=flops, bytes_accessed=2 * x.nbytes + w.nbytes * tiles.grid[0], transcendentals=0),
        name="linear_cross_entropy_dx",
    )
    dw, db = launch(
        dw_kernel,
        *given,
        *columns,
        out=[(w.shape, w.dtype), ((1, tiles.classes), jnp.float32)],
        in_specs=[*_factors(tiles, x, b, lambda j, i: (i, j)), *[pl.BlockSpec((tiles.bm, 1), lambda j, i: (i, 0))] * 4],
        out_specs=[
            pl.BlockSpec((x.shape[1], tiles.bv), lambda j, i: (0, j)),
            pl.BlockSpec((1, tiles.bv), lambda j, i: (0, j)),
        ],
        grid=tiles.grid[::-1],
        semantics=("parallel", "arbitrary"),
        scratch=[pltpu.VMEM((x.shape[1], tiles.bv), jnp.float32)],
        cost=pl.CostEstimate(flops=flops, bytes_accessed=2 * w.nbytes + x.nbytes * tiles.grid[1], transcendentals=0),
        name="linear_cross_entropy_dw",
    )
    return dx, dw, None if b is None else db.astype(b.dtype), None


_loss.defvjp(_fwd, _bwd)
