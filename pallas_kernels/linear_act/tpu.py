"""Linear with activation for TPU: bias and activation are applied to the accumulator in VMEM.

Where a gradient is wanted, the same epilogue also writes the pre-activation in the compute dtype. The product that would make it again
costs K operations an element, keeping it costs two bytes written and read.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.activations import ACTIVATIONS, Array
from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.matmul.tpu import Blocks, product, products, tuned_start
from pallas_kernels.matmul.tpu import default_blocks as default_blocks
from pallas_kernels.tensorcore import refusal as refusal

# Mosaic has neither erfc nor expm1.
IN_KERNEL = {name: function for name, (function, _) in ACTIVATIONS.items()} | {
    "gelu": lambda x: 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5))),
    "elu": lambda x: jnp.where(x > 0, x, jnp.exp(jnp.minimum(x, 0)) - 1),
    "softplus": lambda x: _softplus(x),
    "mish": lambda x: x * jnp.tanh(_softplus(x)),
}


def _softplus(x: Array) -> Array:
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def linear_act(
    *,
    x: Array,
    w: Array,
    b: Array | None = None,
    activation: str = "gelu_tanh",
    out_dtype: str | None = None,
    blocks: Blocks | None = None,
) -> Array:
    """`act(x w + b)`, the activation applied to float32 sums.

    Args:
      x: `[..., K]`. w: `[K, N]`. b: `[N]` or None. bfloat16 or float32.
      activation: a name of `pallas_kernels.activations.ACTIVATIONS`.
      out_dtype: of the result; x's by default.
      blocks: of this product and of those of the backward pass.

    Raises:
      KernelError: the blocks do not fit VMEM.
    """
    rows = x.reshape(-1, x.shape[-1])
    blocks = blocks or tuned_start("linear_act", out_dtype, x=x, w=w, b=b)
    static = (activation, str(jnp.dtype(out_dtype or x.dtype)), blocks)
    return _linear(static, *vary_alike(rows, w, None if b is None else b.reshape(1, -1))).reshape(*x.shape[:-1], w.shape[1])


def _forward(static, keep, x, w, b):
    activation, out_dtype, blocks = static

    def epilogue(acc, *bias):
        z = acc + bias[0].astype(acc.dtype) if bias else acc
        return [IN_KERNEL[activation](z), z][: 1 + keep]

    dtypes = [out_dtype, jnp.promote_types(x.dtype, w.dtype)][: 1 + keep]
    return products([x], [w], [[(0, 0)]], epilogue, dtypes, [] if b is None else [b], blocks=blocks, name="linear_act")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(static, x, w, b):
    return _forward(static, False, x, w, b)[0]


def _fwd(static, x, w, b):
    y, *z = _forward(static, static[0] != "identity", x, w, b)
    return y, (x, w, b, z[0] if z else None)


def _bwd(static, residuals, g):
    (x, w, b, z), (activation, _, blocks) = residuals, static
    dz = g.astype(jnp.float32)
    if z is not None:
        dz = dz * ACTIVATIONS[activation][1](z.astype(jnp.float32))
    dz = dz.astype(jnp.promote_types(x.dtype, w.dtype))
    dx = product(dz, w, x.dtype, b_axis=1, blocks=blocks, name="linear_act_dx")
    dw = product(x, dz, w.dtype, a_axis=0, blocks=blocks, name="linear_act_dw")
    return dx, dw, sum_rows(dz, b)


def sum_rows(dz: Array, b: Array | None) -> Array | None:
    """Gradient of a bias `[1, N]`."""
    return None if b is None else jnp.sum(dz.astype(jnp.float32), 0, keepdims=True).astype(b.dtype)


_linear.defvjp(_fwd, _bwd)
