"""RMS norm and layer norm for TPU: whole rows in VMEM, one pass over HBM forward and one backward.

The backward pass makes each row's statistics again from the array that it reads anyway. Gradients of weight and bias are summed in VMEM
over the blocks of rows that a TensorCore walks; their sum over the cores is left to XLA.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from kpt.ops.base import Specs
from pallas_kernels import tensorcore, tuned
from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.tensorcore import SUBLANES, budget, launch, once, padded_bytes, require_fit, require_multiples


@dataclasses.dataclass(frozen=True)
class RowBlocks:
    """Rows of a block, a multiple of 16."""

    MULTIPLE: ClassVar[int] = SUBLANES
    rows: int

    def __post_init__(self) -> None:
        require_multiples(self)


@dataclasses.dataclass(frozen=True)
class Norm:
    """What is known before tracing.

    Attributes:
      centred: subtract the mean, as a layer norm does.
      offset: added to the weight.
      out_dtype: of the normalised result.
      blocks: None for the default.
    """

    centred: bool
    eps: float
    offset: float
    out_dtype: str
    blocks: RowBlocks | None


BLOCK_BYTES = 2 << 20
"""Of an array in float32: enough for HBM's bandwidth, few enough that the first block comes soon."""


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why these arrays cannot be taken, or None."""
    if (why := tensorcore.refusal(specs, params)) is not None:
        return why
    x = specs["x"]
    if "residual" in specs and specs["residual"].dtype != x.dtype:
        return f"adds arrays of one dtype, and these are {x.dtype} and {specs['residual'].dtype}"
    if (need := _need(SUBLANES, x.shape[-1], jnp.promote_types(x.dtype, params.get("out_dtype") or x.dtype))) > budget():
        return f"holds {SUBLANES} rows in VMEM, and those of {x.shape[-1]} elements take {need} bytes of {budget()}"
    return None


def norm(static: Norm, x: jax.Array, residual: jax.Array | None, weight: jax.Array | None, bias: jax.Array | None) -> Any:
    """The norm over the last axis; with a residual, `(y, x + residual)`."""
    rows = [None if a is None else a.reshape(-1, x.shape[-1]) for a in (x, residual)]
    columns = [None if a is None else a.reshape(1, -1) for a in (weight, bias)]
    y, *h = _norm(static, *vary_alike(*rows, *columns))
    return (y.reshape(x.shape), h[0].reshape(x.shape)) if h else y.reshape(x.shape)


def _need(rows: int, width: int, dtype: Any) -> int:
    """Bytes of VMEM: at most five arrays in two buffers each, and as many float32 values in between."""
    return 10 * padded_bytes((rows, width), dtype) + 5 * padded_bytes((rows, width), jnp.float32)


def default_blocks(specs: Specs, params: Mapping[str, Any]) -> RowBlocks:
    x = specs["x"]
    return _rule(x.shape[-1], jnp.promote_types(x.dtype, params.get("out_dtype") or x.dtype))


def _rule(width: int, dtype: Any) -> RowBlocks:
    fitting = min(BLOCK_BYTES // (4 * width), budget() // _need(SUBLANES, width, dtype) * SUBLANES)
    return RowBlocks(max(SUBLANES, fitting // SUBLANES * SUBLANES))


def tuned_rows(op: str, out_dtype: Any, x: jax.Array, **arrays: jax.Array | None) -> RowBlocks | None:
    """The table's blocks for a call of a norm."""

    def fits(found: RowBlocks) -> bool:
        return tensorcore.fits(_need(found.rows, x.shape[-1], jnp.promote_types(x.dtype, out_dtype or x.dtype)))

    found: RowBlocks | None = tuned.blocks(op, RowBlocks, {"out_dtype": out_dtype}, fits, x=x, **arrays)
    return found


def _rows(static: Norm, x: jax.Array) -> int:
    (rows, width), dtype = x.shape, jnp.promote_types(x.dtype, static.out_dtype)
    chosen = static.blocks or _rule(width, dtype)
    require_fit(chosen, _need(chosen.rows, width, dtype))
    return min(chosen.rows, rows)


def _normalised(static: Norm, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`(h - mean) r` and `r = rsqrt(var + eps)`, of float32 rows."""
    if static.centred:
        for _ in range(2):  # the mean of nearly equal numbers rounds by as much as they differ: what is left of it goes too
            h = h - jnp.mean(h, 1, keepdims=True)
    r = jax.lax.rsqrt(jnp.mean(h * h, 1, keepdims=True) + static.eps)
    return h * r, r


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(static: Norm, x, residual, weight, bias):
    (rows, width), given = x.shape, [a for a in (x, residual, weight, bias) if a is not None]
    block = _rows(static, x)
    of_rows, of_columns = pl.BlockSpec((block, width), lambda i: (i, 0)), pl.BlockSpec((1, width), lambda i: (0, 0))

    def kernel(*refs: Any) -> None:
        queue = iter(refs)
        x_ref = next(queue)
        residual_ref, weight_ref, bias_ref = (None if a is None else next(queue) for a in (residual, weight, bias))
        y_ref, *h_ref = queue
        h = x_ref[...].astype(jnp.float32)
        if residual_ref is not None:
            h_ref[0][...] = (h + residual_ref[...].astype(jnp.float32)).astype(x.dtype)
            h = h_ref[0][...].astype(jnp.float32)
        y, _ = _normalised(static, h)
        if weight_ref is not None:
            y = y * (static.offset + weight_ref[...].astype(jnp.float32))
        if bias_ref is not None:
            y = y + bias_ref[...].astype(jnp.float32)
        y_ref[...] = y.astype(y_ref.dtype)

    out = [(x.shape, static.out_dtype), (x.shape, x.dtype)][: 1 if residual is None else 2]
    return launch(
        kernel,
        *given,
        out=out,
        in_specs=[of_columns if a is weight or a is bias else of_rows for a in given],
        out_specs=[of_rows] * len(out),
        grid=(pl.cdiv(rows, block),),
        semantics=("parallel",),
        cost=once(given, out, (8 if static.centred else 4) * x.size, rows),
        name="layer_norm" if static.centred else "rms_norm",
    )


def _fwd(static: Norm, x, residual, weight, bias):
    y, *h = _norm(static, x, residual, weight, bias)
    return [y, *h], (h[0] if h else x, weight, bias)


def _bwd(static: Norm, residuals, cotangents):
    h, weight, bias = residuals
    dy, *dh = cotangents
    rows, width = h.shape
    block = _rows(static, h)
    blocks = pl.cdiv(rows, block)
    parts = min(tensorcore.generation().cores, blocks)  # two cores must not write one block
    steps = pl.cdiv(blocks, parts)
    given = [h, dy, *dh, *([] if weight is None else [weight])]
    summed = [a for a in (weight, bias) if a is not None]
    of_rows = pl.BlockSpec((block, width), lambda p, s: (jnp.minimum(p * steps + s, blocks - 1), 0))
    of_columns = pl.BlockSpec((1, width), lambda p, s: (0, 0))
    of_part = pl.BlockSpec((None, 1, width), lambda p, s: (p, 0, 0))

    def kernel(*refs: Any) -> None:
        inputs, (dx_ref, *sum_refs) = refs[: len(given)], refs[len(given) :]
        h, g, *kept = (ref[...].astype(jnp.float32) for ref in inputs[: 2 + len(dh)])
        n, r = _normalised(static, h)
        gw = g if weight is None else g * (static.offset + inputs[-1][...].astype(jnp.float32))
        dx = gw - n * jnp.mean(gw * n, 1, keepdims=True)
        if static.centred:
            dx = dx - jnp.mean(gw, 1, keepdims=True)
        dx = r * dx + kept[0] if kept else r * dx
        dx_ref[...] = dx.astype(dx_ref.dtype)

        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            for ref in sum_refs:
                ref[...] = jnp.zeros_like(ref)

        first = (pl.program_id(0) * steps + pl.program_id(1)) * block
        inside = first + jax.lax.broadcasted_iota(jnp.int32, h.shape, 0) < rows
        terms = [g * n] * (weight is not None) + [g] * (bias is not None)
        for ref, term in zip(sum_refs, terms, strict=True):
            ref[...] += jnp.sum(jnp.where(inside, term, 0.0), 0, keepdims=True)

    out = [(h.shape, h.dtype), *[((parts, 1, width), jnp.float32)] * len(summed)]
    dx, *partials = launch(
        kernel,
        *given,
        out=out,
        in_specs=[*[of_rows] * (2 + len(dh)), *([] if weight is None else [of_columns])],
        out_specs=[of_rows, *[of_part] * len(summed)],
        grid=(parts, steps),
        semantics=("parallel", "arbitrary"),
        cost=once(given, out, (18 if static.centred else 12) * h.size, rows),
        name="layer_norm_vjp" if static.centred else "rms_norm_vjp",
    )
    queue = iter(partials)
    d_weight, d_bias = (None if a is None else jnp.sum(next(queue), 0).astype(a.dtype) for a in (weight, bias))
    return dx, dx if dh else None, d_weight, d_bias


_norm.defvjp(_fwd, _bwd)
