"""Layer norm for NVIDIA Hopper."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.norm_rows import Norm, norm
from pallas_kernels.norm_rows import refusal as refusal
from pallas_kernels.norm_rows import refusal_shared as refusal_shared


def layer_norm(
    *,
    x: jax.Array,
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    eps: float = 1e-6,
    out_dtype: str | None = None,
) -> Any:
    """`(h - mean(h)) rsqrt(var(h) + eps) weight + bias` with `h = x + residual` (Ba et al. 2016, arXiv:1607.06450).

    Args:
      x: `[..., D]` float16, bfloat16 or float32. Statistics are float32, the variance taken around the mean.
      weight, bias: `[D]`, either may be absent.
      residual: `[..., D]` in x's dtype, added first; then `(y, h)` is returned, and h is normalised as it is returned.
      out_dtype: of y; x's by default.
    """
    static = Norm(True, float(eps), 0.0, residual is not None, str(jnp.dtype(out_dtype or x.dtype)))
    return norm(static, *vary_alike(x, residual, weight, bias))
