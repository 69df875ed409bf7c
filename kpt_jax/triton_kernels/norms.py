"""rms_norm and layer_norm in JAX, by the Triton kernels of `jitted/norms.py`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import triton

from kpt.ops.base import Specs
from kpt_jax.triton_kernels.launch import Out, as_rows, chip, launch, one_by_one, over_rows, zeros
from kpt_torch.triton_kernels.jitted import norms as jitted
from pallas_kernels.manual_axes import unpartitioned, vary_alike


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why the kernels cannot take a call, in one clause, or None."""
    return unpartitioned() or jitted.refusal(specs, params)


@dataclasses.dataclass(frozen=True)
class _Static:
    layer: bool
    eps: float
    offset: float
    out_dtype: str


def rms_norm(
    *,
    x: jax.Array,
    weight: jax.Array | None = None,
    residual: jax.Array | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    out_dtype: str | None = None,
) -> Any:
    """`h rsqrt(mean(h^2) + eps) (weight_offset + weight)` with `h = x + residual` (arXiv:1910.07467).

    Args:
      x: `[..., D]` float16, bfloat16 or float32. Statistics are float32.
      weight: `[D]`; without it the scale is 1.
      residual: `[..., D]`, added first; then `(y, h)` is returned, h in x's dtype.
      out_dtype: of y; x's by default.
    """
    return _of_rows(_Static(False, float(eps), float(weight_offset), str(jnp.dtype(out_dtype or x.dtype))), x, residual, weight, None)


def layer_norm(
    *,
    x: jax.Array,
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    eps: float = 1e-6,
    out_dtype: str | None = None,
) -> Any:
    """`(h - mean(h)) rsqrt(var(h) + eps) weight + bias` with `h = x + residual` (arXiv:1607.06450); arguments as of `rms_norm`."""
    return _of_rows(_Static(True, float(eps), 0.0, str(jnp.dtype(out_dtype or x.dtype))), x, residual, weight, bias)


def _of_rows(static: _Static, x, residual, weight, bias):
    rows = [None if a is None else as_rows(a) for a in (x, residual)]
    y, h = _norm(static, *vary_alike(*rows, weight, bias))
    return y.reshape(x.shape) if h is None else (y.reshape(x.shape), h.reshape(x.shape))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(static: _Static, x, residual, weight, bias):
    return over_rows(functools.partial(_forward, static), shared=2)(x, residual, weight, bias)[0]


def _forward(static: _Static, x, residual, weight, bias):
    """((y, h or None), (mean, what float32 could not hold of it, 1 / deviation))."""
    (rows, width), row = x.shape, Out(x.shape[:1], jnp.float32)
    y, h = Out(x.shape, static.out_dtype), None if residual is None else Out(x.shape, x.dtype)
    centre = row if static.layer else None
    if not x.size:
        return zeros(((y, h), (centre, centre, row)), x)
    whole = width <= jitted.WHOLE_FORWARD
    tile = jitted.forward_tile(width) if whole else jitted.WIDE
    made = launch(
        jitted.forward_whole if whole else jitted.forward_wide, (triton.cdiv(rows, tile.rows),),
        x, residual, weight, bias, y, h, centre, centre, row, rows, width, static.eps, static.offset,
        LAYER=static.layer, ROWS=tile.rows, BLOCK=tile.columns, warps=tile.warps,
    )  # fmt: skip
    return (made["y"], made.get("h")), (made.get("mean"), made.get("left"), made["rstd"])


def _fwd(static: _Static, x, residual, weight, bias):
    (y, h), kept = over_rows(functools.partial(_forward, static), shared=2)(x, residual, weight, bias)
    of_residual = None if residual is None else jnp.zeros((0,), residual.dtype)  # its dtype is all that is needed
    return (y, h), (x if h is None else h, of_residual, weight, bias, kept)


def _bwd(static: _Static, residuals, cotangents):
    h, of_residual, weight, bias, kept = residuals
    dy, dh = cotangents
    summed = weight is not None or bias is not None
    narrow = None if of_residual is None or of_residual.dtype == h.dtype else str(of_residual.dtype)
    run = functools.partial(_backward, static, narrow)
    dx, dresidual, dweight, dbias = (one_by_one(run) if summed else over_rows(run, shared=2))(h, dy, dh, *kept, weight, bias)
    return dx, None if of_residual is None else dx if dresidual is None else dresidual, dweight, dbias


_norm.defvjp(_fwd, _bwd)


def _backward(static: _Static, residual_dtype: str | None, h, dy, dh, mean, left, rstd, weight, bias):
    """(dx, that of the residual if its dtype is another, dweight, dbias)."""
    (rows, width), layer = h.shape, static.layer
    wanted = (Out(h.shape, h.dtype), None if residual_dtype is None else Out(h.shape, residual_dtype))
    vectors = [None if a is None else Out(a.shape, a.dtype) for a in (weight, bias)]
    if not h.size:
        return zeros((*wanted, *vectors), dy)
    gpu = chip()
    given = (h, weight, dy, dh, mean, left, rstd)

    def partial(count: int) -> list[Out | None]:
        return [None if a is None else Out((count, width), jnp.float32) for a in vectors]

    if width <= jitted.WHOLE_BACKWARD:
        tile = jitted.backward_tile(width)
        count = min(triton.cdiv(rows, tile.rows), tile.programs * gpu.processors)
        row_bytes = sum(a.dtype.itemsize for a in (h, dy, dh) if a is not None)
        made = launch(
            jitted.backward_whole, (count,), *given, *wanted, *partial(count), rows, width, static.offset, LAYER=layer, ROWS=tile.rows,
            BLOCK=tile.columns, STAGES=jitted.stages(tile, row_bytes, gpu.shared), warps=tile.warps,
        )  # fmt: skip
    else:
        made = launch(
            jitted.backward_wide, (rows,), *given, *wanted, rows, width, static.offset,
            LAYER=layer, BLOCK=jitted.WIDE.columns, warps=jitted.WIDE.warps,
        )  # fmt: skip
        tile = jitted.COLUMNS
        across = triton.cdiv(width, tile.columns)
        count = min(triton.cdiv(rows, tile.rows), max(1, 8 * gpu.processors // across))
        if any(vectors):
            made |= launch(
                jitted.columns, (across, count), h, dy, mean, left, rstd, *partial(count), rows, width,
                LAYER=layer, ROWS=tile.rows, BLOCK=tile.columns, warps=tile.warps,
            )  # fmt: skip
    added: dict[str, jax.Array] = {}
    if any(vectors):
        added = launch(
            jitted.sums, (triton.cdiv(width, jitted.SUMS.columns),), made.get("dweight"), made.get("dbias"), *vectors, count, width,
            ROWS=jitted.SUMS.rows, BLOCK=jitted.SUMS.columns, warps=jitted.SUMS.warps,
        )  # fmt: skip
    return made["dx"], made.get("dresidual"), added.get("dweight"), added.get("dbias")
