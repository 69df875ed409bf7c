"""Gated linear unit for TPU: both products share the blocks of x, and meet in VMEM.

Where a gradient is wanted, the two projections are written beside their product and kept. Their gradients share the blocks of the
cotangents: one call adds both parts of x's gradient in one accumulator, one call makes the gradients of both weights.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.activations import ACTIVATIONS, Array
from pallas_kernels.linear_act.tpu import IN_KERNEL, sum_rows
from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.matmul.tpu import Blocks, products, tuned_start
from pallas_kernels.matmul.tpu import default_blocks as default_blocks
from pallas_kernels.tensorcore import refusal as refusal


def glu(
    *,
    x: Array,
    w_gate: Array,
    w_up: Array,
    b_gate: Array | None = None,
    b_up: Array | None = None,
    activation: str = "silu",
    out_dtype: str | None = None,
    blocks: Blocks | None = None,
) -> Array:
    """`act(x w_gate + b_gate) * (x w_up + b_up)` (Shazeer 2020, arXiv:2002.05202), of float32 sums.

    Args:
      x: `[..., K]`. w_gate, w_up: `[K, N]`. b_gate, b_up: `[N]` or None. bfloat16 or float32.
      activation: a name of `pallas_kernels.activations.ACTIVATIONS`.
      out_dtype: of the result; x's by default.
      blocks: of these products and of those of the backward pass.

    Raises:
      KernelError: the blocks do not fit VMEM.
    """
    blocks = blocks or tuned_start("glu", out_dtype, x=x, w_gate=w_gate, w_up=w_up, b_gate=b_gate, b_up=b_up)
    static = (activation, str(jnp.dtype(out_dtype or x.dtype)), blocks)
    biases = (None if b is None else b.reshape(1, -1) for b in (b_gate, b_up))
    y = _glu(static, *vary_alike(x.reshape(-1, x.shape[-1]), w_gate, w_up, *biases))
    return y.reshape(*x.shape[:-1], w_gate.shape[1])


def _forward(static, keep, x, w_gate, w_up, b_gate, b_up):
    activation, out_dtype, blocks = static

    def epilogue(gate, up, *biases):
        queue = iter(biases)
        gate, up = (z if b is None else z + next(queue).astype(z.dtype) for z, b in ((gate, b_gate), (up, b_up)))
        return [IN_KERNEL[activation](gate) * up, gate, up][: 1 + 2 * keep]

    kept = _compute(x, w_gate, w_up)
    dtypes = [out_dtype, kept, kept][: 1 + 2 * keep]
    biases = [b for b in (b_gate, b_up) if b is not None]
    return products([x], [w_gate, w_up], [[(0, 0)], [(0, 1)]], epilogue, dtypes, biases, blocks=blocks, name="glu")


def _compute(*arrays):
    return functools.reduce(jnp.promote_types, (a.dtype for a in arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _glu(static, x, w_gate, w_up, b_gate, b_up):
    return _forward(static, False, x, w_gate, w_up, b_gate, b_up)[0]


def _fwd(static, *arrays):
    y, gate, up = _forward(static, True, *arrays)
    return y, (*arrays, gate, up)


def _bwd(static, residuals, g):
    (x, w_gate, w_up, b_gate, b_up, gate, up), (activation, _, blocks) = residuals, static
    act, slope = ACTIVATIONS[activation]
    gf, gate_f, up_f = (a.astype(jnp.float32) for a in (g, gate, up))
    d_gate = (gf * up_f * slope(gate_f)).astype(gate.dtype)
    d_up = (gf * act(gate_f)).astype(gate.dtype)
    cotangents, weights = [d_gate, d_up], [w_gate, w_up]
    both = [[(0, 0), (1, 1)]]
    (dx,) = products(cotangents, weights, both, lambda acc: [acc], [x.dtype], rhs_axis=1, blocks=blocks, name="glu_dx")
    each = [[(0, 0)], [(0, 1)]]
    dw_gate, dw_up = products([x], cotangents, each, lambda *acc: acc, [w.dtype for w in weights], lhs_axis=0, blocks=blocks, name="glu_dw")
    return dx, dw_gate, dw_up, sum_rows(d_gate, b_gate), sum_rows(d_up, b_up)


_glu.defvjp(_fwd, _bwd)
