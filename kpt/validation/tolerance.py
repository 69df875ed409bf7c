"""The one tolerance of the project: how far a correct program may be from the exact result.

Derivation. Let `u = eps / 2` be the unit roundoff of the dtype `d` that arrays are stored in, and `eps_acc` the
epsilon of the dtype that sums run in: float32 for everything narrower, else `d` itself.

1. Storing in `d`. One rounding has a relative error below `u`, about 0.4 u in the root mean square over random
   mantissas. Independent roundings add in squares, so a chain of some twenty of them stays below `2 u = eps` in
   relative L2. This term is there only where `d` is narrower than the accumulator. Where `chain` such computations
   follow each other, each proved by itself, their errors add in squares, too: `sqrt(chain) eps`.
2. Summing. A running sum of `n` terms commits `n` roundings, each relative to a partial sum. For terms of random sign
   the partial sums grow as `sqrt(k)`, for terms of one sign as `k`; either way the errors, relative to the final sum,
   add to about `sqrt(n) u / 2` (Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019:
   `sqrt(n) u`, where the worst case is `n u`). Blocked and pairwise sums err less. Allowed: `sqrt(n) eps_acc`.
3. Elementary functions. exp, tanh, erf, rsqrt of vectorised libraries err by a few ulp, and an operation chains a few
   of them. Allowed: `8 eps_acc`.

    rtol_l2 = g * (sqrt(chain) * eps_d [d narrower than the accumulator] + (8 + sqrt(n)) * eps_acc)

with `g = 1` for outputs, and `g = 2` for gradients: a backward pass reads forward results that were already rounded,
and then does as much arithmetic again.

The largest single error exceeds the root mean square by `sqrt(2 ln m)` over `m` elements, which stays below 6 for any
array in use, while rtol_l2 leaves a factor of about 2 over the expected root mean square:

    atol_max = 3 * rtol_l2, times the largest magnitude of the reference.

What cancels inside. Some results are the small difference of large terms that do not show in the inputs: the loss
`logsumexp - logit` of a confident classifier, `1 + tanh` in the tail of gelu, `dp - sum(p dp)` in the gradient of a
saturated softmax. Sums and elementary functions err by `rtol_sum = g (8 + sqrt(n)) eps_acc` of those terms, whatever is
left of them. In a gradient those terms are made of forward results that were stored in `d` in between (the output, in
`sum(dy * y)`), so there they count with all of rtol_l2.

A relative L2 error over few elements is not yet an average; its allowance is `1 + 2 / sqrt(m)` times as large.
"""

from __future__ import annotations

import dataclasses
import math

from kpt.errors import ValidationError

# Epsilon (distance from 1 to the next number) and smallest subnormal. tfloat32 is what tensor cores read of a float32.
_EPS: dict[str, tuple[float, float]] = {
    "float64": (2.0**-52, 2.0**-1074),
    "float32": (2.0**-23, 2.0**-149),
    "tfloat32": (2.0**-10, 2.0**-149),
    "float16": (2.0**-10, 2.0**-24),
    "bfloat16": (2.0**-7, 2.0**-133),
}


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """What a correct result may differ by.

    Attributes:
      rtol_l2: bound on `||actual - reference||_2 / ||reference||_2` over a large array.
      atol_max: bound on `max|actual - reference|`, in units of `max|reference|`.
      rtol_sum: error relative to the terms that cancel: the part of rtol_l2 that sums and elementary functions cause,
        and all of it for a gradient.
      atol: absolute spacing below which the dtype cannot tell numbers apart (its smallest subnormal).
    """

    rtol_l2: float
    atol_max: float
    rtol_sum: float
    atol: float

    def allowed_l2(self, norm: float, size: int, terms: float = 0.0) -> float:
        """Largest `||actual - reference||_2` for `size` elements of norm `norm`, left of terms of norm `terms`."""
        few = 1 + 2 / math.sqrt(max(size, 1))
        return few * (self.rtol_l2 * norm + self.rtol_sum * terms) + self.atol * math.sqrt(size)

    def allowed_max(self, magnitude: float, terms: float = 0.0) -> float:
        """Largest `|actual - reference|` where the reference reaches `magnitude`, left of terms of size `terms`."""
        return self.atol_max * (magnitude + self.rtol_sum / self.rtol_l2 * terms) + self.atol


def epsilon(dtype: str) -> float:
    """Distance from 1 to the next larger number of `dtype`.

    Raises:
      ValidationError: `dtype` is not one of float64, float32, tfloat32, float16, bfloat16.
    """
    if dtype not in _EPS:
        raise ValidationError(
            f"A tolerance was asked for dtype {dtype!r}",
            "Tolerances exist for " + ", ".join(_EPS),
            "Pass the floating dtype that the arrays are stored in",
        )
    return _EPS[dtype][0]


def tolerance(dtype: str, reduction_length: int, *, gradient: bool = False, chain: int = 1) -> Tolerance:
    """Tolerance against an exact reference; the module's docstring derives it.

    Args:
      dtype: what the arrays are stored in. "tfloat32" is for float32 arrays whose products run on tensor cores.
      reduction_length: number of terms summed into one element.
      gradient: whether the array is a gradient.
      chain: how many computations follow each other, of which each is within this tolerance by itself.

    Raises:
      ValidationError: for a dtype without a tolerance or a negative length.
    """
    eps = epsilon(dtype)
    if reduction_length < 0:
        raise ValidationError(
            f"A tolerance was asked for reduction length {reduction_length}", advice="Pass the number of terms summed"
        )
    accumulator = min(eps, _EPS["float32"][0])
    storage = math.sqrt(max(1, chain)) * eps if eps > accumulator else 0.0
    twice = 2.0 if gradient else 1.0
    sums = twice * (8 + math.sqrt(reduction_length)) * accumulator
    rtol = twice * storage + sums
    return Tolerance(rtol_l2=rtol, atol_max=3 * rtol, rtol_sum=rtol if gradient else sums, atol=_EPS[dtype][1])
