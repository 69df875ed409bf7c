"""glu and linear_act in JAX. Triton makes what stands between the products of XLA, by `jitted/glu.py`, or a product with what follows it,
by `jitted/product.py`. The two products of a glu and the sums of a linear_act are kept for the backward pass, in x's dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import triton

from kpt.ops.base import Specs
from kpt_jax.triton_kernels.launch import Out, as_rows, chip, launch, over_rows, zeros
from kpt_torch.triton_kernels.jitted import glu as gated
from kpt_torch.triton_kernels.jitted import product
from pallas_kernels.linear_act.xla import contract, project, project_vjp, weight_vjp
from pallas_kernels.manual_axes import unpartitioned, vary_alike


def refuse_glu(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why the kernels cannot take a call, in one clause, or None."""
    return unpartitioned() or gated.refusal(specs, params)


def refuse_linear_act(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why the kernels cannot take a call, in one clause, or None."""
    return unpartitioned() or product.refusal(specs, params, "x", "w")


def glu(
    *,
    x: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    b_gate: jax.Array | None = None,
    b_up: jax.Array | None = None,
    activation: str = "silu",
    out_dtype: str | None = None,
) -> jax.Array:
    """`act(x w_gate + b_gate) (x w_up + b_up)` (arXiv:2002.05202), each product rounded to x's dtype.

    Args:
      x: `[..., K]` float16, bfloat16 or float32. w_gate, w_up: `[K, N]`, of the same dtype. b_gate, b_up: `[N]` or None.
      activation: a name of `kpt.ops.activations.ACTIVATIONS`.
      out_dtype: of the result; x's by default.
    """
    y = _glu((activation, str(jnp.dtype(out_dtype or x.dtype))), *vary_alike(as_rows(x), w_gate, w_up, b_gate, b_up))
    return y.reshape(*x.shape[:-1], w_gate.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _glu(static, *arrays):
    return _glu_fwd(static, *arrays)[0]


def _glu_fwd(static, x, w_gate, w_up, b_gate, b_up):
    gate, up = (_projected(x, w, b) for w, b in ((w_gate, b_gate), (w_up, b_up)))
    return over_rows(functools.partial(_gated, *static))(gate, up), (x, w_gate, w_up, b_gate, b_up, gate, up)


def _projected(x, w, b):
    return contract(x, w, ((1,), (0,)), x.dtype) if b is None else project(x, w, b).astype(x.dtype)


def _gated(activation: str, dtype: str, gate, up):
    if not gate.size:
        return zeros(Out(gate.shape, dtype), gate)
    return launch(
        gated.forward_blocks, (triton.cdiv(gate.size, gated.BLOCK),), gate, up, Out(gate.shape, dtype), gate.size,
        ACTIVATION=activation, BLOCK=gated.BLOCK, warps=gated.WARPS,
    )["y"]  # fmt: skip


def _gated_back(activation: str, gate, up, g):
    like = Out(gate.shape, gate.dtype)
    if not gate.size:
        return zeros((like, like), g)
    made = launch(
        gated.backward_blocks, (triton.cdiv(gate.size, gated.BLOCK),), gate, up, g, like, like, gate.size,
        ACTIVATION=activation, BLOCK=gated.BLOCK, warps=gated.WARPS,
    )  # fmt: skip
    return made["dgate"], made["dup"]


def _glu_bwd(static, residuals, g):
    x, w_gate, w_up, b_gate, b_up, gate, up = residuals
    d_gate, d_up = over_rows(functools.partial(_gated_back, static[0]))(gate, up, g)
    dx = contract(d_gate, w_gate, ((1,), (1,)), x.dtype) + contract(d_up, w_up, ((1,), (1,)), x.dtype)
    (dw_gate, db_gate), (dw_up, db_up) = (weight_vjp(x, b, d) for b, d in ((b_gate, d_gate), (b_up, d_up)))
    return dx, dw_gate, dw_up, db_gate, db_up


_glu.defvjp(_glu_fwd, _glu_bwd)


def linear_act(
    *, x: jax.Array, w: jax.Array, b: jax.Array | None = None, activation: str = "gelu_tanh", out_dtype: str | None = None
) -> jax.Array:
    """`act(x w + b)`, bias and activation applied to float32 sums.

    Args:
      x: `[..., K]` float16, bfloat16 or float32. w: `[K, N]`, of the same dtype. b: `[N]` or None.
      activation: a name of `kpt.ops.activations.ACTIVATIONS`.
      out_dtype: of the result; x's by default.
    """
    y = _linear((activation, str(jnp.dtype(out_dtype or x.dtype))), *vary_alike(as_rows(x), w, b))
    return y.reshape(*x.shape[:-1], w.shape[1])


def _product(static: tuple[str, str], keep: bool, x, w, b):
    """(result, sums or None)."""
    activation, dtype = static
    (rows, inner), columns = x.shape, w.shape[1]
    y, z = Out((rows, columns), dtype), Out((rows, columns), x.dtype) if keep else None
    if not rows * columns:
        return zeros((y, z), x)
    t = product.tile(chip().family, x.dtype.itemsize)
    made = launch(
        product.product_blocks, (triton.cdiv(rows, t.rows) * triton.cdiv(columns, t.columns),),
        x, w, b, z, y, rows, columns, inner, inner, 1, columns, 1,
        ACTIVATION=activation, BIAS=b is not None, KEEP=keep, ROWS=t.rows, COLUMNS=t.columns, INNER=t.inner, GROUP=product.GROUP,
        warps=t.warps, stages=t.stages,
    )  # fmt: skip
    return made["y"], made.get("z")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(static, x, w, b):
    return over_rows(functools.partial(_product, static, False), shared=2)(x, w, b)[0]


def _linear_fwd(static, x, w, b):
    y, z = over_rows(functools.partial(_product, static, static[0] != "identity"), shared=2)(x, w, b)
    return y, (x, w, b, z)


def _linear_bwd(static, residuals, g):
    x, w, b, z = residuals
    dz = g.astype(x.dtype) if z is None else over_rows(functools.partial(_sloped, static[0]))(z, g)
    return project_vjp(x, w, b, dz)


_linear.defvjp(_linear_fwd, _linear_bwd)


def _sloped(activation: str, z, g):
    if not z.size:
        return zeros(Out(z.shape, z.dtype), z)
    return launch(
        product.slope_blocks, (triton.cdiv(z.size, product.BLOCK),), z, g, Out(z.shape, z.dtype), z.size,
        ACTIVATION=activation, BLOCK=product.BLOCK, warps=product.WARPS,
    )["dz"]  # fmt: skip
