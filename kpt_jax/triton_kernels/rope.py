"""rope in JAX, by the Triton kernel of `jitted/rope.py`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import triton

from kpt.ops.base import Specs
from kpt_jax.triton_kernels.launch import Out, launch, over_rows, zeros
from kpt_torch.triton_kernels.jitted import rope as jitted
from pallas_kernels.manual_axes import unpartitioned, vary_alike
from pallas_kernels.rope.xla import table_gradients, with_gradients


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why the kernel cannot take a call, in one clause, or None."""
    return unpartitioned() or jitted.refusal(specs, params)


@dataclasses.dataclass(frozen=True)
class _Static:
    interleaved: bool
    out_dtype: str
    x_dtype: str


def rope(
    *, x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool = False, out_dtype: str | None = None
) -> jax.Array:
    """`x cos + rotate(x) sin` on the first `R` of the head dim (arXiv:2104.09864); the rest passes through.

    Args:
      x: `[B, T, N, H]` float16, bfloat16 or float32.
      cos, sin: `[B or 1, T, R]`, `R` even, `R <= H`.
      interleaved: rotate pairs `(x0, x1) -> (-x1, x0)` instead of halves `(a, b) -> (-b, a)`.
      out_dtype: of the result; x's by default.
    """
    static = _Static(bool(interleaved), str(jnp.dtype(out_dtype or x.dtype)), str(x.dtype))
    return _rope(static, *vary_alike(x, cos, sin))


def _run(interleaved: bool, backward: bool, dtype: str, x, cos, sin):
    (batch, times, heads, width), size = x.shape, cos.shape[-1]
    if not x.size:
        return zeros(Out(x.shape, dtype), x)
    if cos.shape[0] not in (1, batch):  # vmap has made one batch of several that share these
        cos, sin = (jnp.tile(a, (batch // a.shape[0], 1, 1)) for a in (cos, sin))
    tile, half, tail = jitted.tile(size, width, heads)
    strides = (times * heads * width, heads * width, width, 1)
    return launch(
        jitted.turn, (batch * times * triton.cdiv(heads, tile),),
        x, cos, sin, Out(x.shape, dtype), *strides, times * size if cos.shape[0] > 1 else 0, times, heads, size, width,
        INTERLEAVED=interleaved, BACKWARD=backward, HEADS=tile, BLOCK=half, TAIL=tail, warps=jitted.WARPS,
    )["y"]  # fmt: skip


def _turn(static: _Static, x, cos, sin):
    return over_rows(functools.partial(_run, static.interleaved, False, static.out_dtype), shared=2)(x, cos, sin)


def _back(static: _Static, g, cos, sin):
    return over_rows(functools.partial(_run, static.interleaved, True, static.x_dtype), shared=2)(g, cos, sin)


_rope = with_gradients(_turn, _back, lambda static, x, cos, sin, g: table_gradients(x, cos, sin, g, static.interleaved))
