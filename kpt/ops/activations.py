"""Activations: float64 NumPy functions and their derivatives, by name. The table says what the names mean."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Array = np.ndarray
_C = math.sqrt(2 / math.pi)


def erf(x: Array) -> Array:
    """The error function, in float64, element by element."""
    return np.vectorize(math.erf, otypes=[np.float64])(x) if np.size(x) else np.zeros(np.shape(x))


def erfc(x: Array) -> Array:
    return np.vectorize(math.erfc, otypes=[np.float64])(x) if np.size(x) else np.zeros(np.shape(x))


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) without overflow: the exponential is always of a negative number."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def softplus(x: Array) -> Array:
    with np.errstate(invalid="ignore"):  # NaN in, NaN out, nothing said
        return np.logaddexp(x, 0.0)


def _gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(_C * (x + 0.044715 * x**3)))


def _d_gelu_tanh(x: Array) -> Array:
    t = np.tanh(_C * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * _C * (1 + 3 * 0.044715 * x * x)


def _d_mish(x: Array) -> Array:
    t = np.tanh(softplus(x))
    return t + x * (1 - t * t) * sigmoid(x)


def _scaled_silu(a: float) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    def slope(x: Array) -> Array:
        s = sigmoid(a * x)
        return s * (1 + a * x * (1 - s))

    return lambda x: x * sigmoid(a * x), slope


ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "identity": (lambda x: x, np.ones_like),
    "relu": (lambda x: np.maximum(x, 0.0), lambda x: (x > 0).astype(np.float64)),
    "gelu": (
        lambda x: 0.5 * x * erfc(-x * math.sqrt(0.5)),
        lambda x: 0.5 * erfc(-x * math.sqrt(0.5)) + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi),
    ),
    "gelu_tanh": (_gelu_tanh, _d_gelu_tanh),
    "silu": _scaled_silu(1.0),
    "quick_gelu": _scaled_silu(1.702),
    "sigmoid": (sigmoid, lambda x: sigmoid(x) * sigmoid(-x)),
    "tanh": (np.tanh, lambda x: 1 - np.tanh(x) ** 2),
    "relu2": (lambda x: np.maximum(x, 0.0) ** 2, lambda x: 2 * np.maximum(x, 0.0)),
    "softplus": (softplus, sigmoid),
    "elu": (lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))), lambda x: np.where(x > 0, 1.0, np.exp(np.minimum(x, 0)))),
    "mish": (lambda x: x * np.tanh(softplus(x)), _d_mish),
}
"""Name -> (function, derivative)."""
