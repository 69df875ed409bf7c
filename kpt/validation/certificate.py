"""Evidence that a kernel computes what it should: every output, every gradient, its error and its allowance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from kpt.errors import ValidationError
from kpt.validation.metrics import ErrorMetrics, metrics
from kpt.validation.tolerance import Tolerance, tolerance

Sensitivity = np.ndarray | tuple[float, float]
"""How far each element of an array moves, or Euclidean norm and maximum of that."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One array compared.

    Attributes:
      name: of the output, or of the array whose gradient this is.
      gradient: whether it is a gradient.
      where: what it was computed on: a seed or an example.
      metrics: the distances, or None where the arrays could not be compared.
      allowed_l2: bound on `metrics.abs_l2`.
      allowed_max: bound on the error of the element that comes nearest to its own.
      problem: why it failed, "" where it passed.
      scale: what the L2 error is relative to: the norm of the reference, or how far the inputs' last bits move it by their own
        size, or the size of what cancels in it, whichever is larger; 0 where that is not known.
    """

    name: str
    gradient: bool
    where: str
    metrics: ErrorMetrics | None
    allowed_l2: float
    allowed_max: float
    problem: str
    scale: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.problem

    @property
    def relative(self) -> float:
        """The L2 error relative to `scale`; NaN where there was nothing to compare with."""
        size = max(self.scale, self.metrics.reference_l2) if self.metrics else 0.0
        return self.metrics.abs_l2 / size if self.metrics and size else math.nan


@dataclasses.dataclass(frozen=True)
class Certificate:
    """All checks of one kernel at one site, and the dtype and tolerance they were held to."""

    dtype: str
    against: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether anything was compared and all of it is within its bounds."""
        return bool(self.checks) and all(c.passed for c in self.checks)

    def worst(self, *, gradient: bool) -> float | None:
        """Largest relative L2 error over the outputs or the gradients; None where there are none. What is 0 has none.

        What passed and is nothing but rounding (the gradient of a key's bias, which softmax does not see) is measured by what it is
        left of.
        """
        compared = [c for c in self.checks if c.gradient == gradient and c.metrics and c.metrics.reference_l2]
        found = [c.relative if c.passed else c.metrics.rel_l2 for c in compared if c.metrics]
        return max(found, default=None)

    def summary(self) -> str:
        """One line for people."""
        parts = [
            f"{label} {worst:.1e}"
            for label, worst in (("forward", self.worst(gradient=False)), ("gradients", self.worst(gradient=True)))
            if worst is not None
        ]
        failed = [c for c in self.checks if not c.passed]
        verdict = "no array was compared" if not self.checks else "within tolerance"
        if failed:
            first = f"{'gradient of ' if failed[0].gradient else ''}{failed[0].name}: {failed[0].problem}"
            verdict = f"{len(failed)} of {len(self.checks)} checks failed, first {first}"
        return f"{self.dtype} against {self.against}: {', '.join([*parts, verdict])}"

    def merge(self, other: Certificate) -> Certificate:
        """The checks of both, for example of several seeds.

        Raises:
          ValidationError: the two were held to different tolerances.
        """
        if (self.dtype, self.against) != (other.dtype, other.against):
            raise ValidationError(
                f"A certificate for {self.dtype} against {self.against} was merged with one for "
                f"{other.dtype} against {other.against}",
                advice="Keep them apart",
            )
        return dataclasses.replace(self, checks=self.checks + other.checks)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict; `from_json` is the inverse."""
        checks = []
        for c in self.checks:
            fields = {f.name: getattr(c, f.name) for f in dataclasses.fields(c)}
            checks.append(fields | {"metrics": c.metrics.to_json() if c.metrics else None})
        return {"dtype": self.dtype, "against": self.against, "passed": self.passed, "checks": checks}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Certificate:
        """Inverse of `to_json`.

        Raises:
          ValidationError: `data` is not a certificate.
        """
        try:
            known = {f.name for f in dataclasses.fields(Check)}
            checks = []
            for fields in data["checks"]:
                found = ErrorMetrics.from_json(fields["metrics"]) if fields["metrics"] else None
                checks.append(Check(**{k: v for k, v in fields.items() if k in known} | {"metrics": found}))
            return Certificate(data["dtype"], data["against"], tuple(checks))
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise ValidationError("A certificate was read", f"The data is not one ({e!r})", "Validate again") from e


def certify(
    actual: Mapping[str, np.ndarray],
    reference: Mapping[str, np.ndarray],
    dtype: str,
    reduction_length: int | Mapping[str, int],
    *,
    gradients: Collection[str] = (),
    sensitivity: Mapping[str, np.ndarray] | None = None,
    terms: Mapping[str, np.ndarray | float] | None = None,
    where: str = "",
) -> Certificate:
    """Holds a program's arrays to the exact ones.

    An array passes when its NaNs and infinities stand where the reference's do, and

        ||a - r||_2 <= (1 + 2 / sqrt(size)) * (rtol_l2 * max(||r||_2, ||s||_2) + rtol_sum * ||t||_2)
        |a - r|     <= 3 * (rtol_l2 * max(max|r|, max|s|) + rtol_sum * |t|)     for each element

    up to the smallest subnormal of the dtype. The second bound is the one that binds beside elements of large `t`.
    `s` is the sensitivity: how far each element moves per unit of relative change of the inputs
    (`kpt.validation.sensitivity` measures it). For most data it is below `r`; where inputs cancel, a program errs by
    their last bit times `s`. `t` is the size of the terms that cancel inside, where the inputs do not show it; 0 for
    most (Higham, "Accuracy and Stability of Numerical Algorithms", sections 1.6 and 1.7).

    Args:
      actual: what the program returned, in the dtype that it returns.
      reference: the same names in float64, computed from the same (rounded) inputs.
      dtype: what the program stores its arrays in.
      reduction_length: terms summed into one element; one number, or one for each name.
      gradients: the names that are gradients.
      sensitivity: `s`, by name, in the shape of the reference; may lack names.
      terms: `t`, by name, in the shape of the reference or one number for all of its elements; may lack names.
      where: what the arrays were computed on, for the record: "seed 3", "example".

    Returns:
      A certificate with a check for each name of either side; a missing array or a wrong shape is a failed check.

    Raises:
      ValidationError: for a dtype without a tolerance.
    """

    def tolerances(name: str) -> Tolerance:
        return tolerance(dtype, _length(reduction_length, name), gradient=name in gradients)

    return _hold(actual, reference, dtype, tolerances, gradients, sensitivity, terms, where, "float64")


def compare(
    actual: Mapping[str, Any],
    original: Mapping[str, Any],
    dtype: str,
    reduction_length: int | Mapping[str, int],
    *,
    gradients: Collection[str] = (),
    sensitivity: Mapping[str, Sensitivity] | None = None,
    terms: Mapping[str, np.ndarray | float] | None = None,
    where: str = "",
    measure: Callable[[Any, Any], ErrorMetrics] = metrics,
    chain: int = 1,
) -> Certificate:
    """Holds a kernel's arrays to those of the user's own code, both in `dtype`.

    Neither side is exact. If each is within `t` of the exact result, they are within `2 t` of each other by the
    triangle inequality, so the tolerance is that of `certify`, doubled. User code also rounds inner results to `dtype`
    that a kernel keeps in float32, so the terms that cancel count with rtol_l2 in place of rtol_sum. Arguments and
    result are as there, of a sensitivity its norm and its largest element will do, and `measure` is what compares two
    arrays: of a front end's own, which NumPy need not know where no arrays of sensitivities or terms are given. `chain` is
    the number of kernels in a whole program, each held to its own code before.
    """

    def tolerances(name: str) -> Tolerance:
        one = tolerance(dtype, _length(reduction_length, name), gradient=name in gradients, chain=chain)
        return Tolerance(2 * one.rtol_l2, 2 * one.atol_max, 2 * one.rtol_l2, 2 * one.atol)

    return _hold(actual, original, dtype, tolerances, gradients, sensitivity, terms, where, "the original", measure)


def _length(reduction_length: int | Mapping[str, int], name: str) -> int:
    return reduction_length if isinstance(reduction_length, int) else reduction_length[name]


def _hold(
    actual: Mapping[str, np.ndarray],
    reference: Mapping[str, np.ndarray],
    dtype: str,
    tolerances: Callable[[str], Tolerance],
    gradients: Collection[str],
    sensitivity: Mapping[str, Sensitivity] | None,
    terms: Mapping[str, np.ndarray | float] | None,
    where: str,
    against: str,
    measure: Callable[[Any, Any], ErrorMetrics] = metrics,
) -> Certificate:
    checks = []
    for name in dict.fromkeys((*reference, *actual)):
        pair = actual.get(name), reference.get(name)
        moved, cancelling = (sensitivity or {}).get(name), (terms or {}).get(name, 0.0)
        checks.append(_check(name, name in gradients, where, *pair, moved, cancelling, tolerances(name), measure))
    return Certificate(dtype, against, tuple(checks))


def _check(
    name: str,
    gradient: bool,
    where: str,
    actual: np.ndarray | None,
    reference: np.ndarray | None,
    sensitivity: Sensitivity | None,
    terms: np.ndarray | float,
    bound: Tolerance,
    measure: Callable[[Any, Any], ErrorMetrics],
) -> Check:
    if actual is None or reference is None:
        problem = "it was not computed" if actual is None else "there is no such array"
        return Check(name, gradient, where, None, 0.0, 0.0, problem)
    try:
        found = measure(actual, reference)
    except ValidationError as e:
        return Check(name, gradient, where, None, 0.0, 0.0, str(e))
    if sensitivity is None or isinstance(sensitivity, tuple):
        s_norm, s_max = sensitivity or (0.0, 0.0)
    else:
        s_norm, s_max = _size(sensitivity, np.shape(reference))
    t_norm, _ = _size(terms, np.shape(reference))
    allowed_l2 = bound.allowed_l2(max(found.reference_l2, s_norm), found.size, t_norm)
    error, t = _nearest(actual, reference, terms, bound) if np.ndim(terms) else (found.max_abs, _finite(float(terms)))
    allowed_max = bound.allowed_max(max(found.reference_max, s_max), t)
    if found.nonfinite_mismatch:
        problem = f"{found.nonfinite_mismatch} of {found.size} elements are NaN or infinite on one side only"
    elif found.abs_l2 > allowed_l2:
        problem = f"its L2 error {found.abs_l2:.2e} exceeds {allowed_l2:.2e}"
    elif error > allowed_max:
        problem = f"its largest error {error:.2e} exceeds {allowed_max:.2e}"
    else:
        problem = ""
    scale = max(found.reference_l2, s_norm, t_norm * bound.rtol_sum / bound.rtol_l2)
    return Check(name, gradient, where, found, allowed_l2, allowed_max, problem, scale if math.isfinite(scale) else 0.0)


def _nearest(
    actual: np.ndarray, reference: np.ndarray, terms: np.ndarray | float, bound: Tolerance
) -> tuple[float, float]:
    """Error and term of the element whose error exceeds what its own term allows by most."""
    with np.errstate(all="ignore"):
        error = np.abs(np.asarray(actual, np.float64) - np.asarray(reference, np.float64)).ravel()
        t = np.abs(np.broadcast_to(np.asarray(terms, np.float64), np.shape(reference))).ravel()
    t = np.where(np.isfinite(t), t, 0.0)
    finite = np.isfinite(error)
    if not finite.any():
        return 0.0, 0.0
    error, t = error[finite], t[finite]
    i = int(np.argmax(error - bound.allowed_max(0.0, 1.0) * t))
    return float(error[i]), float(t[i])


def _size(values: np.ndarray | float, shape: tuple[int, ...]) -> tuple[float, float]:
    """Euclidean norm and largest magnitude of the finite values, spread over a shape."""
    if not np.ndim(values):
        one = _finite(float(values))
        return one * math.sqrt(math.prod(shape)), one if math.prod(shape) else 0.0
    spread = np.abs(np.broadcast_to(np.asarray(values, np.float64), shape))
    finite = spread[np.isfinite(spread)]
    return float(np.linalg.norm(finite)), float(finite.max(initial=0.0))


def _finite(x: float) -> float:
    return abs(x) if math.isfinite(x) else 0.0
