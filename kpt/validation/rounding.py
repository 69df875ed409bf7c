"""What is rounding alone, because it cancels to 0 in exact arithmetic, and so is not held to itself.

The gradient of a key's bias is such: softmax does not see what is added to all scores of a query. Two programs that both are correct
agree in no digit of it, nor in what an optimizer makes of its sign. Two sizes bound what they may differ by:

1. A gradient is a sum of terms as large as those of other gradients: it may be off by the rounding of gradients of the usual size
   (`usual_size`, which goes to `compare` as the terms that cancel).
2. What is made of it is off by as much as it moves with the last bits of the inputs (`with_last_bits`, which goes there as the
   sensitivity).
"""

from __future__ import annotations

from collections.abc import Iterable

from kpt.validation.metrics import ErrorMetrics
from kpt.validation.tolerance import Tolerance

_LAST_BITS = 8
"""Times what last bits move, of what is rounding alone: its squares, which Adam keeps, have long tails. Anywhere else the roundings of
sums and functions are allowed as much (`kpt.validation.tolerance`)."""


def usual_size(gradients: Iterable[tuple[float, int]]) -> float:
    """The largest root mean square among gradients, each given as its Euclidean norm and its number of elements; 0 without any."""
    return max((norm / size**0.5 for norm, size in gradients if size), default=0.0)


def with_last_bits(sensitivity: tuple[float, float], moved: ErrorMetrics, bound: Tolerance) -> tuple[float, float]:
    """The sensitivity of an array, at least so large that `bound` allows what the last bits of the inputs moved it by, eightfold.

    Args:
      sensitivity: norm and maximum, of larger movements of the inputs.
      moved: the array after its inputs moved by their last bits, beside the array before.
      bound: what it is held to.
    """
    l2, largest = sensitivity
    return max(l2, _LAST_BITS * moved.abs_l2 / bound.rtol_l2), max(largest, _LAST_BITS * moved.max_abs / bound.atol_max)
