"""RMS norm for NVIDIA Hopper."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.norm_rows import Norm, norm
from pallas_kernels.norm_rows import refusal as refusal
from pallas_kernels.norm_rows import refusal_shared as refusal_shared


def rms_norm(
    *,
    x: jax.Array,
    weight: jax.Array | None = None,
    residual: jax.Array | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    out_dtype: str | None = None,
) -> Any:
    """`h rsqrt(mean(h^2) + eps) (weight_offset + weight)` with `h = x + residual` (Zhang and Sennrich 2019, arXiv:1910.07467).

    Args:
      x: `[..., D]` float16, bfloat16 or float32. Statistics are float32.
      weight: `[D]`; without it the scale is 1.
      residual: `[..., D]` in x's dtype, added first; then `(y, h)` is returned, and h is normalised as it is returned.
      out_dtype: of y; x's by default.
    """
    static = Norm(False, float(eps), float(weight_offset), residual is not None, str(jnp.dtype(out_dtype or x.dtype)))
    return norm(static, *vary_alike(x, residual, weight))
