"""What is rounding alone, because it cancels to 0 in exact arithmetic, and so is not held to itself.

The gradient of a key's bias is such: softmax does not see what is added to all scores of a query. Two programs that both are correct
agree in no digit of it, nor in what an optimizer makes of its sign. Two sizes bound what they may differ by:

1. Such a gradient is a sum of terms as large as those of other gradients: it may be off by the rounding of the largest of those
   (`cancelling`, which goes to `compare` as the terms that cancel). It is told by moving as far as it is large when the inputs move by
   their last bits. Any other, small as it may be, is held to its own size.
2. What is made of it is off by as much as it moves with the last bits of the inputs (`with_last_bits`, which goes there as the
   sensitivity).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kpt.validation.certificate import Sensitivity
from kpt.validation.conditioning import COARSE, draws, sensitivity
from kpt.validation.metrics import ErrorMetrics
from kpt.validation.tolerance import Tolerance

_LAST_BITS = 8
"""Times what last bits move, of what is rounding alone: its squares, which Adam keeps, have long tails. Anywhere else the roundings of
sums and functions are allowed as much (`kpt.validation.tolerance`)."""

_ALONE = 1 / 4
"""Of its own size, what a gradient that is rounding alone moves by at least. Roundings drawn anew move it by 1.4; what is determined moves
by epsilon / sqrt 3 times its condition number, which in bfloat16 is less up to one of 55."""

_DRAWS = 2  # what has few elements may come out alike by chance


def cancelling(nearby: Callable[[], Mapping[str, ErrorMetrics]]) -> dict[str, float]:
    """Of the gradients that are rounding alone, by name, the size of the terms that cancel in them: the largest root mean square of all.

    A gradient that is 0 and stays 0 is none of them: all of it is known.

    Args:
      nearby: each gradient after its inputs moved by their last bits, beside the gradient before, of another draw at each call. The last
        bits are those of the narrowest dtype on the way: float32 weights that are read as bfloat16 have to move as far as these do.
    """
    found: dict[str, float] = {}
    for _ in range(_DRAWS):
        moved = nearby()
        usual = max((m.reference_l2 / m.size**0.5 for m in moved.values() if m.size), default=0.0)
        found |= {n: usual for n, m in moved.items() if m.abs_l2 and m.abs_l2 >= _ALONE * m.reference_l2}
    return found


def movements[Arrays: Mapping[str, Any]](
    original: Arrays,
    nearby: Callable[[float | None], Arrays],
    distances: Callable[[Arrays], Mapping[str, ErrorMetrics]],
    host: Callable[[Any], np.ndarray],
    bound: Callable[[str], Tolerance],
    narrowest: float,
) -> dict[str, Sensitivity]:
    """How far what a whole program makes moves per unit of relative change of its inputs, at least `with_last_bits`.

    Args:
      original: what it makes of its inputs.
      nearby: what it makes of inputs that were moved by so much, each time another way; None: by their last bits.
      distances: how far that is from `original`; may empty what it is given, and lack names.
      host: an array for NumPy.
      bound: what an array of this name is held to.
      narrowest: epsilon of the narrowest dtype on the way. float32 weights that are read as bfloat16 have to move as far for what is
        rounding alone to be drawn anew; anything else would be allowed too much by it.
    """
    if draws(original) > 1:  # of few numbers
        base = {n: host(x) for n, x in original.items()}
        made = sensitivity(lambda _: {n: host(x) for n, x in nearby(COARSE).items()}, {}, np.random.default_rng(0), base, COARSE)
        far = {n: (float(np.linalg.norm(m)), float(m.max(initial=0.0))) for n, m in made.items()}
    else:
        far = {n: (m.abs_l2 / COARSE, m.max_abs / COARSE) for n, m in distances(nearby(COARSE)).items()}
    # What is rounding alone moves as far with the last bits as with more.
    for _ in range(_DRAWS):
        for n, m in distances(nearby(None)).items():
            far[n] = with_last_bits(far.get(n, (0.0, 0.0)), m, bound(n))
        for n, m in distances(nearby(narrowest)).items():
            if m.abs_l2 >= _ALONE * m.reference_l2:
                far[n] = with_last_bits(far.get(n, (0.0, 0.0)), m, bound(n))
    return dict(far)


def with_last_bits(sensitivity: tuple[float, float], moved: ErrorMetrics, bound: Tolerance) -> tuple[float, float]:
    """The sensitivity of an array, at least so large that `bound` allows what the last bits of the inputs moved it by, eightfold.

    Args:
      sensitivity: norm and maximum, of larger movements of the inputs.
      moved: the array after its inputs moved by their last bits, beside the array before.
      bound: what it is held to.
    """
    l2, largest = sensitivity
    return max(l2, _LAST_BITS * moved.abs_l2 / bound.rtol_l2), max(largest, _LAST_BITS * moved.max_abs / bound.atol_max)
