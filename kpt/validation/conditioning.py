"""How much of an input's last bit a computation turns into error: what cancellation costs any program."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

# Small enough for the first-order term to dominate, large enough to stand far above float64's own rounding.
_STEP = 2.0**-20


def sensitivity(
    function: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]],
    arrays: Mapping[str, np.ndarray],
    rng: np.random.Generator,
    outputs: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Movement of each output element per unit of relative change of the inputs: `|f(x (1 + h d)) - f(x)| / h`.

    `d` is uniform in [-1, 1], drawn for each element, as rounding errors are in units of the last place. Integer and
    boolean arrays stay as they are.

    Args:
      function: from named arrays to named outputs, computed in float64.
      arrays: where to measure.
      outputs: `function(arrays)`, if already known.

    Returns:
      By output name, in float64, with the shape of the output.
    """
    base = function(arrays) if outputs is None else outputs
    # One draw may miss the direction that matters. Many elements average over directions, few do not.
    draws = min(16, max(1, 4096 // max(1, sum(np.size(v) for v in base.values()))))
    moved = {name: np.zeros(np.shape(v)) for name, v in base.items()}
    with np.errstate(all="ignore"):
        for _ in range(draws):
            shifted = {
                name: a * (1 + _STEP * rng.uniform(-1, 1, np.shape(a))) if a.dtype.kind == "f" else a
                for name, a in arrays.items()
            }
            for name, value in function(shifted).items():
                step = np.abs(np.asarray(value, np.float64) - np.asarray(base[name], np.float64)) / _STEP
                moved[name] = np.fmax(moved[name], step)  # an infinity minus itself is no movement
    return moved
