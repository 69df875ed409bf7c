"""Activations and their derivatives, as jax functions of float32 (or float64) arrays."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array
_C = math.sqrt(2 / math.pi)


def _d_gelu(x: Array) -> Array:
    return 0.5 * jax.lax.erfc(-x * math.sqrt(0.5)) + x * jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _d_gelu_tanh(x: Array) -> Array:
    t = jnp.tanh(_C * (x + 0.044715 * x * x * x))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * _C * (1 + 3 * 0.044715 * x * x)


def _d_silu(x: Array) -> Array:
    s = jax.nn.sigmoid(x)
    return s * (1 + x * (1 - s))


def _d_quick_gelu(x: Array) -> Array:
    s = jax.nn.sigmoid(1.702 * x)
    return s * (1 + 1.702 * x * (1 - s))


def _d_mish(x: Array) -> Array:
    t = jnp.tanh(jax.nn.softplus(x))
    return t + x * (1 - t * t) * jax.nn.sigmoid(x)


def _d_sigmoid(x: Array) -> Array:
    s = jax.nn.sigmoid(x)
    return s * (1 - s)


def _step(x: Array) -> Array:
    return (x > 0).astype(x.dtype)


ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "identity": (lambda x: x, jnp.ones_like),
    "relu": (lambda x: jnp.maximum(x, 0), _step),
    "gelu": (lambda x: 0.5 * x * jax.lax.erfc(-x * math.sqrt(0.5)), _d_gelu),
    "gelu_tanh": (lambda x: 0.5 * x * (1 + jnp.tanh(_C * (x + 0.044715 * x * x * x))), _d_gelu_tanh),
    "silu": (lambda x: x * jax.nn.sigmoid(x), _d_silu),
    "sigmoid": (jax.nn.sigmoid, _d_sigmoid),
    "tanh": (jnp.tanh, lambda x: 1 - jnp.tanh(x) ** 2),
    "quick_gelu": (lambda x: x * jax.nn.sigmoid(1.702 * x), _d_quick_gelu),
    "relu2": (lambda x: jnp.square(jnp.maximum(x, 0)), lambda x: 2 * jnp.maximum(x, 0)),
    "softplus": (jax.nn.softplus, jax.nn.sigmoid),
    "elu": (jax.nn.elu, lambda x: jnp.where(x > 0, 1.0, jnp.exp(jnp.minimum(x, 0))).astype(x.dtype)),
    "mish": (lambda x: x * jnp.tanh(jax.nn.softplus(x)), _d_mish),
}
"""Name -> (function, derivative)."""

SLOPE_OF_OUTPUT: dict[str, Callable[[Array], Array]] = {
    "identity": jnp.ones_like,
    "relu": _step,
    "sigmoid": lambda y: y * (1 - y),
    "tanh": lambda y: 1 - y * y,
}
"""Name -> derivative as a function of the activation's result, where it is one."""


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype that statistics and sums run in: float32, float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)
