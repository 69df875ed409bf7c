"""Rotary embedding for TPU, forward and back by one kernel: the other half of each pair comes by turning whole rows of lanes.

Heads lie side by side in the lanes, as in memory, and every head is `x c + partner(x) s` with tables that carry the signs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp

from kpt.ops.base import Specs
from pallas_kernels import tensorcore, tuned
from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.rope.xla import table_gradients, with_gradients
from pallas_kernels.tensorcore import LANES, SUBLANES, budget, launch, once, padded_bytes, require_fit, require_multiples


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Positions of a block, a multiple of 16; it has all heads of them."""

    MULTIPLE: ClassVar[int] = SUBLANES
    positions: int

    def __post_init__(self) -> None:
        require_multiples(self)


BLOCK_BYTES = 2 << 20
"""Of an array in float32."""


@dataclasses.dataclass(frozen=True)
class _Static:
    interleaved: bool
    out_dtype: str
    x_dtype: str
    blocks: Blocks | None


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why these arrays cannot be taken, or None."""
    if (why := tensorcore.refusal(specs, params)) is not None:
        return why
    _, _, heads, h = specs["x"].shape
    if (LANES % h and h % LANES) or heads * h % max(h, LANES):
        return f"turns whole rows of {LANES} lanes, and {heads} heads of {h} do not fill them"
    if (need := _need(SUBLANES, heads * h, max(h, LANES))) > budget():
        return f"holds {SUBLANES} positions in VMEM, and those of {heads} heads take {need} bytes of {budget()}"
    return None


def rope(
    *,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    interleaved: bool = False,
    out_dtype: str | None = None,
    blocks: Blocks | None = None,
) -> jax.Array:
    """`x cos + rotate(x) sin` on the first `R` of the head dim (Su et al. 2021, arXiv:2104.09864); the rest passes through.

    Args:
      x: `[B, T, N, H]` bfloat16 or float32.
      cos, sin: `[B or 1, T, R]`, `R` even, `R <= H`.
      interleaved: rotate pairs `(x0, x1) -> (-x1, x0)` instead of halves `(a, b) -> (-b, a)`.
      out_dtype: of the result; x's by default.
      blocks: of positions, in both passes.

    Raises:
      KernelError: the blocks do not fit VMEM.
    """
    heads, h = x.shape[2:]

    def fits(found: Blocks) -> bool:
        return tensorcore.fits(_need(found.positions, heads * h, max(h, LANES)))

    blocks = blocks or tuned.blocks("rope", Blocks, {"out_dtype": out_dtype}, fits, x=x, cos=cos, sin=sin)
    static = _Static(bool(interleaved), str(jnp.dtype(out_dtype or x.dtype)), str(x.dtype), blocks)
    return _rope(static, *vary_alike(x, cos, sin))


def _need(positions: int, width: int, lanes: int) -> int:
    """Bytes of VMEM: x and the result in two buffers, two tables, and the values of one row of heads."""
    return 4 * padded_bytes((positions, width), jnp.float32) + 10 * padded_bytes((positions, lanes), jnp.float32)


def default_blocks(specs: Specs, params: Mapping[str, Any]) -> Blocks:
    return _rule(*specs["x"].shape[2:])


def _rule(heads: int, h: int) -> Blocks:
    fitting = min(BLOCK_BYTES // (4 * heads * h), budget() // _need(SUBLANES, heads * h, max(h, LANES)) * SUBLANES)
    return Blocks(max(SUBLANES, fitting // SUBLANES * SUBLANES))


def _apply(static: _Static, x: jax.Array, cos: jax.Array, turned: jax.Array, out_dtype: str) -> jax.Array:
    """`x cos + partner(x) turned`, where `turned` holds sines with their signs."""
    (batch, t, heads, h), r = x.shape, cos.shape[-1]
    lanes = max(h, LANES)
    chosen = static.blocks or _rule(heads, h)
    require_fit(chosen, _need(chosen.positions, heads * h, lanes))
    block = min(chosen.positions, t)
    distance = 1 if static.interleaved else r // 2

    def spread(table: jax.Array) -> jax.Array:
        return jnp.tile(jnp.pad(table.astype(jnp.float32), ((0, 0), (0, 0), (0, h - r))), (1, 1, lanes // h))

    def kernel(x_ref: Any, cos_ref: Any, sin_ref: Any, y_ref: Any) -> None:
        place = jax.lax.broadcasted_iota(jnp.int32, (block, lanes), 1) % h
        first = place % 2 == 0 if static.interleaved else place < distance
        for start in range(0, heads * h, lanes):
            here = x_ref[:, start : start + lanes].astype(jnp.float32)
            turned = here
            if r:
                partner = jnp.where(first, pltpu.roll(here, lanes - distance, 1), pltpu.roll(here, distance, 1))
                turned = here * cos_ref[...] + partner * sin_ref[...]
            y_ref[:, start : start + lanes] = jnp.where(place < r, turned, here).astype(y_ref.dtype)

    rows = pl.BlockSpec((None, block, heads * h), lambda b, i: (b, i, 0))
    table = pl.BlockSpec((None, block, lanes), lambda b, i: (b if cos.shape[0] > 1 else 0, i, 0))
    given, out = (x.reshape(batch, t, heads * h), spread(cos), spread(turned)), [((batch, t, heads * h), out_dtype)]
    (y,) = launch(
        kernel,
        *given,
        out=out,
        in_specs=[rows, table, table],
        out_specs=[rows],
        grid=(batch, pl.cdiv(t, block)),
        semantics=("parallel", "parallel"),
        cost=once(given, out, 3 * x.size, 0),
        name="rope",
    )
    return y.reshape(x.shape)


def _rotate(a: jax.Array, interleaved: bool) -> jax.Array:
    """The quarter turn of every pair."""
    if interleaved:
        return jnp.stack([-a[..., 1::2], a[..., ::2]], -1).reshape(a.shape)
    low, high = jnp.split(a, 2, -1)
    return jnp.concatenate([-high, low], -1)


def _turn(static, x, cos, sin):
    sign = _rotate(jnp.ones_like(sin), static.interleaved)
    return _apply(static, x, cos, sign * sin, static.out_dtype)


def _back(static, g, cos, sin):
    return _apply(static, g, cos, -_rotate(sin, static.interleaved), static.x_dtype)


_rope = with_gradients(_turn, _back, lambda static, x, cos, sin, g: table_gradients(x, cos, sin, g, static.interleaved))
