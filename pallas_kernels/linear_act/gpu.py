"""Linear with activation for NVIDIA Hopper: bias and activation are applied to the float32 sums before anything is written.

Where a gradient is wanted, the same epilogue also writes what the slope is derived from: the pre-activation in the compute dtype, or
nothing more where it is a function of the result. In the backward pass one kernel makes the gradient of the pre-activation and sums
that of the bias; XLA takes two passes. The products there are XLA's, which are at the ceiling.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kpt.kernels.stand_in import stood_for
from pallas_kernels.activations import ACTIVATIONS, SLOPE_OF_OUTPUT, Array
from pallas_kernels.hopper_gemm import Tiles, products, tiles_for
from pallas_kernels.hopper_gemm import refusal as refusal
from pallas_kernels.linear_act.xla import project_vjp
from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.rows import BLOCK, WARPGROUP, cut, kernel

SLOPE_BLOCKS = 2112
"""Thread blocks that go down columns, 16 for each multiprocessor of an H100."""
FEWEST_ROWS = 16
"""Of a thread block, since each writes sums of its own."""


def sigmoid(x: Array) -> Array:
    return 0.5 + 0.5 * jnp.tanh(0.5 * x)  # one instruction on the GPU, where exp and a division are many


def _softplus(x: Array) -> Array:
    return jnp.maximum(x, 0) + jnp.log(1 + jnp.exp(-jnp.abs(x)))


def _erf(x: Array) -> Array:
    """Abramowitz and Stegun 7.1.26, to 1.5e-7."""
    t = 1 / (1 + 0.3275911 * jnp.abs(x))
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    one = 1 - poly * jnp.exp(-x * x)
    return jnp.where(x < 0, -one, one)


# Mosaic has neither erf, log1p nor expm1.
IN_KERNEL = {name: function for name, (function, _) in ACTIVATIONS.items()} | {
    "gelu": lambda x: 0.5 * x * (1 + _erf(x * math.sqrt(0.5))),
    "silu": lambda x: x * sigmoid(x),
    "sigmoid": sigmoid,
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "elu": lambda x: jnp.where(x > 0, x, jnp.exp(jnp.minimum(x, 0)) - 1),
    "softplus": _softplus,
    "mish": lambda x: x * jnp.tanh(_softplus(x)),
}


def _d_mish(x: Array) -> Array:
    t = jnp.tanh(_softplus(x))
    return t + x * (1 - t * t) * sigmoid(x)


SLOPE_IN_KERNEL = {name: slope for name, (_, slope) in ACTIVATIONS.items()} | {
    "relu": lambda x: jnp.where(x > 0, 1.0, 0.0),
    "gelu": lambda x: 0.5 + 0.5 * _erf(x * math.sqrt(0.5)) + x * jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi),
    "mish": _d_mish,
}


def linear_act(
    *,
    x: Array,
    w: Array,
    b: Array | None = None,
    activation: str = "gelu_tanh",
    out_dtype: str | None = None,
    tiles: Tiles | None = None,
) -> Array:
    """`act(x w + b)`, the activation applied to float32 sums.

    Args:
      x: `[..., K]` bfloat16 or float16. w: `[K, N]`, of the same dtype. b: `[N]` or None.
      activation: a name of `pallas_kernels.activations.ACTIVATIONS`.
      out_dtype: x's, or None for it.
      tiles: of the forward product; `pallas_kernels.hopper_gemm.tiles_for` chooses them by default.

    Raises:
      KernelError: the tiles are not possible.
    """
    rows = x.reshape(-1, x.shape[-1])
    tiles = tiles or tiles_for(math.prod(stood_for("x", x.shape)[:-1]), stood_for("w", w.shape)[1])
    return _linear((activation, tiles), *vary_alike(rows, w, b)).reshape(*x.shape[:-1], w.shape[1])


def _forward(static, keep, x, w, b):
    activation, tiles = static

    def epilogue(acc: Array, *bias: Array) -> list[Array]:
        z = acc + bias[0] if bias else acc
        return [IN_KERNEL[activation](z), z][: 1 + keep]

    return products(x, [w], epilogue, 1 + keep, [] if b is None else [b], tiles=tiles, name="linear_act")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(static, x, w, b):
    return _forward(static, False, x, w, b)[0]


def _fwd(static, x, w, b):
    y, *z = _forward(static, static[0] not in SLOPE_OF_OUTPUT, x, w, b)
    return y, (x, w, b, z[0] if z else y)


def _bwd(static, residuals, g):
    x, w, b, kept = residuals
    activation = static[0]
    if activation == "identity":
        return project_vjp(x, w, b, g)
    of_output = activation in SLOPE_OF_OUTPUT
    slope = SLOPE_OF_OUTPUT[activation] if of_output and activation != "relu" else SLOPE_IN_KERNEL[activation]
    dz, db = gradient_before(slope, g, kept, b)
    dx, dw, _ = project_vjp(x, w, None, dz)
    return dx, dw, db


def gradient_before(slope: Callable[[Array], Array], g: Array, kept: Array, b: Array | None) -> tuple[Array, Array | None]:
    """`dz = g slope(kept)`, and the sum of its rows where there is a bias: a thread block goes down some columns of every n-th row."""
    rows, width = g.shape
    if width < WARPGROUP:
        dz = g.astype(jnp.float32) * slope(kept.astype(jnp.float32))
        return dz.astype(g.dtype), None if b is None else jnp.sum(dz, 0).astype(b.dtype)
    held = dataclasses.replace(cut(width, (g.dtype,), width), pieces=1, warpgroups=1)
    pieces = pl.cdiv(width, held.piece)
    parts = min(pl.cdiv(rows, FEWEST_ROWS), max(1, SLOPE_BLOCKS // pieces))

    def body(g_ref: Any, kept_ref: Any, dz_ref: Any, *refs: Any) -> None:
        *db_refs, _ = refs
        block = lax.axis_index(BLOCK)
        part = block // pieces
        place = pl.ds(jnp.minimum((block - part * pieces) * held.piece, width - held.piece), held.piece)

        def step(i: Any, total: Array) -> Array:
            row = part + i * parts
            g_row, kept_row = (plgpu.load(ref.at[row, place], layout=held.layout).astype(jnp.float32) for ref in (g_ref, kept_ref))
            dz = g_row * slope(kept_row)
            dz_ref[row, place] = dz.astype(dz_ref.dtype)
            return total + dz

        total = lax.fori_loop(0, (rows - part + parts - 1) // parts, step, held.zero())
        for ref in db_refs:
            ref[part, place] = total

    out = [jax.ShapeDtypeStruct(g.shape, g.dtype)] + [jax.ShapeDtypeStruct((parts, width), jnp.float32)] * (b is not None)
    dz, *partial = kernel(body, out, pieces * parts, held)(g, kept)
    return dz, None if b is None else jnp.sum(partial[0], 0).astype(b.dtype)


_linear.defvjp(_fwd, _bwd)
