"""Kernels that compute what they should, late; for both frameworks. Another process can import them."""

from __future__ import annotations

import time
from typing import Any


def rms_norm(x: Any, weight: Any, eps: float = 1e-6, weight_offset: float = 0.0, out_dtype: Any = None) -> Any:
    import jax
    import jax.numpy as jnp

    y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps) * weight
    m = jnp.eye(256) * 0.999 + x[0, 0] * 1e-6
    for _ in range(100):
        m = m @ m
    return y + 0 * jnp.minimum(jnp.sum(m), 1.0)


def rms_norm_late_at_32(x: Any, weight: Any, **more: Any) -> Any:
    import jax
    import jax.numpy as jnp

    if x.shape[-1] == 32:
        return rms_norm(x, weight, **more)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + more["eps"]) * weight


def torch_rms_norm_late_at_32(x: Any, weight: Any, **more: Any) -> Any:
    if x.shape[-1] == 32:
        return torch_rms_norm(x, weight, **more)
    return x * (x.square().mean(-1, keepdim=True) + more["eps"]).rsqrt() * weight


def torch_rms_norm(x: Any, weight: Any, eps: float = 1e-6, weight_offset: float = 0.0, out_dtype: Any = None) -> Any:
    time.sleep(0.01)
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def hanging(**arrays: Any) -> Any:
    time.sleep(1000)


def wrong(x: Any, weight: Any, eps: float = 1e-6, weight_offset: float = 0.0, out_dtype: Any = None) -> Any:
    return x * weight
