"""RMS norm for TPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.norm_blocks import Norm, norm, tuned_rows
from pallas_kernels.norm_blocks import RowBlocks as Blocks
from pallas_kernels.norm_blocks import default_blocks as default_blocks
from pallas_kernels.norm_blocks import refusal as refusal


def rms_norm(
    *,
    x: jax.Array,
    weight: jax.Array | None = None,
    residual: jax.Array | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    out_dtype: str | None = None,
    blocks: Blocks | None = None,
) -> Any:
    """`h rsqrt(mean(h^2) + eps) (weight_offset + weight)` with `h = x + residual` (Zhang and Sennrich 2019, arXiv:1910.07467).

    Args:
      x: `[..., D]` bfloat16 or float32. Statistics are float32.
      weight: `[D]`; without it the scale is 1.
      residual: `[..., D]` in x's dtype, added first; then `(y, h)` is returned, and h is normalised as it is returned.
      out_dtype: of y; x's by default.
      blocks: of rows, in both passes.

    Raises:
      KernelError: the blocks do not fit VMEM.
    """
    blocks = blocks or tuned_rows("rms_norm", out_dtype, x=x, weight=weight, residual=residual)
    static = Norm(False, float(eps), float(weight_offset), str(jnp.dtype(out_dtype or x.dtype)), blocks)
    return norm(static, x, residual, weight, None)
