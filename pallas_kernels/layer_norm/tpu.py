"""Layer norm for TPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.norm_blocks import Norm, norm, tuned_rows
from pallas_kernels.norm_blocks import RowBlocks as Blocks
from pallas_kernels.norm_blocks import default_blocks as default_blocks
from pallas_kernels.norm_blocks import refusal as refusal


def layer_norm(
    *,
    x: jax.Array,
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    eps: float = 1e-6,
    out_dtype: str | None = None,
    blocks: Blocks | None = None,
) -> Any:
    """`(h - mean(h)) rsqrt(var(h) + eps) weight + bias` with `h = x + residual` (Ba et al. 2016, arXiv:1607.06450).

    Args:
      x: `[..., D]` bfloat16 or float32. Statistics are float32.
      weight, bias: `[D]`; either may be missing.
      residual: `[..., D]` in x's dtype, added first; then `(y, h)` is returned, and h is normalised as it is returned.
      out_dtype: of y; x's by default.
      blocks: of rows, in both passes.

    Raises:
      KernelError: the blocks do not fit VMEM.
    """
    blocks = blocks or tuned_rows("layer_norm", out_dtype, x=x, weight=weight, bias=bias, residual=residual)
    static = Norm(True, float(eps), 0.0, str(jnp.dtype(out_dtype or x.dtype)), blocks)
    return norm(static, x, residual, weight, bias)
