"""Gated linear unit in plain JAX. The backward pass keeps the two projections, not what is made of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.activations import ACTIVATIONS, wide
from pallas_kernels.linear_act.xla import project, project_vjp
from pallas_kernels.manual_axes import vary_alike


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
    """`act(x w_gate + b_gate) * (x w_up + b_up)` (Shazeer 2020, arXiv:2002.05202).

    Args:
      x: `[..., K]`. w_gate, w_up: `[K, N]`. b_gate, b_up: `[N]` or None. float16 to float64; sums are float32.
      activation: a name of `pallas_kernels.activations.ACTIVATIONS`.
      out_dtype: of the result; x's by default.
    """
    return _glu((activation, str(jnp.dtype(out_dtype or x.dtype))), *vary_alike(x, w_gate, w_up, b_gate, b_up))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _glu(static, x, w_gate, w_up, b_gate, b_up):
    return _fwd(static, x, w_gate, w_up, b_gate, b_up)[0]


def _fwd(static, x, w_gate, w_up, b_gate, b_up):
    activation, out_dtype = static
    gate, up = project(x, w_gate, b_gate), project(x, w_up, b_up)
    kept = jnp.promote_types(jnp.promote_types(x.dtype, w_gate.dtype), w_up.dtype)
    y = (ACTIVATIONS[activation][0](gate) * up).astype(out_dtype)
    return y, (x, w_gate, w_up, b_gate, b_up, gate.astype(kept), up.astype(kept))


def _bwd(static, residuals, g):
    x, w_gate, w_up, b_gate, b_up, gate, up = residuals
    act, slope = ACTIVATIONS[static[0]]
    acc = wide(gate.dtype)
    gf, gate_f = g.astype(acc), gate.astype(acc)
    d_gate = (gf * up.astype(acc) * slope(gate_f)).astype(gate.dtype)
    d_up = (gf * act(gate_f)).astype(gate.dtype)
    dx_gate, dw_gate, db_gate = project_vjp(x, w_gate, b_gate, d_gate, acc)
    dx_up, dw_up, db_up = project_vjp(x, w_up, b_up, d_up, acc)
    return (dx_gate + dx_up).astype(x.dtype), dw_gate, dw_up, db_gate, db_up


_glu.defvjp(_fwd, _bwd)
