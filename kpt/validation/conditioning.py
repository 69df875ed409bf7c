"""How much of an input's last bit a computation turns into error: what cancellation costs any program."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# Small enough for the first-order term to dominate, large enough to stand far above the rounding of what computes:
FINE = 2.0**-20  # in float64
COARSE = 2.0**-7  # in what programs store, float32 or narrower

MARK = 1e30
"""From which size on a number marks what is hidden, as the smallest float does in a mask: it is exact, and nothing is computed from it."""


def sensitivity[Name](
    function: Callable[[Mapping[Name, np.ndarray]], Mapping[str, np.ndarray]],
    arrays: Mapping[Name, np.ndarray],
    rng: np.random.Generator,
    outputs: Mapping[str, np.ndarray] | None = None,
    step: float = FINE,
) -> dict[str, np.ndarray]:
    """Movement of each output element per unit of relative change of the inputs: `|f(x (1 + h d)) - f(x)| / h`.

    `d` is uniform in [-1, 1], drawn for each element, as rounding errors are in units of the last place. Integer and
    boolean arrays stay as they are, and so do marks: moved, they would choose among what they hide.

    Args:
      function: from named arrays to named outputs.
      arrays: where to measure.
      outputs: `function(arrays)`, if already known.
      step: `h`: `FINE` where the function computes in float64, else `COARSE`.

    Returns:
      By output name, in float64, with the shape of the output.
    """
    base = function(arrays) if outputs is None else outputs
    moved = {name: np.zeros(np.shape(v)) for name, v in base.items()}
    with np.errstate(all="ignore"):
        for _ in range(draws(base)):
            shifted = {
                name: nudged(a, rng, step) if is_float(a) else a
                for name, a in arrays.items()
            }
            for name, value in function(shifted).items():
                distance = np.abs(np.asarray(value, np.float64) - np.asarray(base[name], np.float64)) / step
                moved[name] = np.fmax(moved[name], distance)  # an infinity minus itself is no movement
    return moved


def draws(outputs: Mapping[str, Any]) -> int:
    """How often to look. One draw may miss the direction that matters. Many elements average over directions, few do not."""
    return min(16, max(1, 4096 // max(1, sum(math.prod(np.shape(v)) for v in outputs.values()))))


def nudged(a: np.ndarray, rng: np.random.Generator, step: float) -> np.ndarray:
    """`a (1 + step d)`, `d` uniform in [-1, 1] for each element, in a's dtype; marks stay as they are."""
    return np.where(np.abs(a) < MARK, a * (1 + step * rng.uniform(-1, 1, np.shape(a))), a).astype(a.dtype)


def is_float(a: np.ndarray) -> bool:
    return a.dtype.name.startswith(("float", "bfloat"))
