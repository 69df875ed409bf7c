"""Evidence that a kernel computes what it should: every output, every gradient, its error and its allowance."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from kpt.errors import ValidationError
from kpt.validation.metrics import ErrorMetrics, metrics
from kpt.validation.tolerance import Tolerance, tolerance


@dataclasses.dataclass(frozen=True)
class Check:
    """One array compared.

    Attributes:
      name: of the output, or of the array whose gradient this is.
      gradient: whether it is a gradient.
      where: what it was computed on: a seed or an example.
      metrics: the distances, or None where the arrays could not be compared.
      allowed_l2, allowed_max: bounds on `metrics.abs_l2` and `metrics.max_abs`.
      problem: why it failed, "" where it passed.
    """

    name: str
    gradient: bool
    where: str
    metrics: ErrorMetrics | None
    allowed_l2: float
    allowed_max: float
    problem: str

    @property
    def passed(self) -> bool:
        return not self.problem


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
        """Largest relative L2 error over the outputs or the gradients; None where there are none."""
        found = [c.metrics.rel_l2 for c in self.checks if c.gradient == gradient and c.metrics]
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
    where: str = "",
) -> Certificate:
    """Holds a program's arrays to the exact ones.

    An array passes when its NaNs and infinities stand where the reference's do, and

        ||a - r||_2 <= rtol_l2 * (1 + 2 / sqrt(size)) * max(||r||_2, ||s||_2)
        max|a - r|  <= atol_max * max(max|r|, max|s|)

    up to the smallest subnormal of the dtype. `s` is the sensitivity: how far each element moves per unit of relative
    change of the inputs (`kpt.validation.sensitivity` measures it) or of the terms that it is the difference of. For
    most data `s` is below `r`. Where the result is what is left after cancellation, as `logsumexp - logit` of a
    confident classifier is, a program in finite precision errs by the last bit of what cancels, not of what is left
    (Higham, "Accuracy and Stability of Numerical Algorithms", sections 1.6 and 1.7).

    Args:
      actual: what the program returned, in the dtype that it returns.
      reference: the same names in float64, computed from the same (rounded) inputs.
      dtype: what the program stores its arrays in.
      reduction_length: terms summed into one element; one number, or one for each name.
      gradients: the names that are gradients.
      sensitivity: by name, in the shape of the reference; may lack names.
      where: what the arrays were computed on, for the record: "seed 3", "example".

    Returns:
      A certificate with a check for each name of either side; a missing array or a wrong shape is a failed check.

    Raises:
      ValidationError: for a dtype without a tolerance.
    """
    return _hold(actual, reference, dtype, reduction_length, gradients, sensitivity, where, 1.0, "float64")


def compare(
    actual: Mapping[str, np.ndarray],
    original: Mapping[str, np.ndarray],
    dtype: str,
    reduction_length: int | Mapping[str, int],
    *,
    gradients: Collection[str] = (),
    sensitivity: Mapping[str, np.ndarray] | None = None,
    where: str = "",
) -> Certificate:
    """Holds a kernel's arrays to those of the user's own code, both in `dtype`.

    Neither side is exact. If each is within `t` of the exact result, they are within `2 t` of each other by the
    triangle inequality, so the tolerance is that of `certify`, doubled. Arguments and result are as there.
    """
    return _hold(actual, original, dtype, reduction_length, gradients, sensitivity, where, 2.0, "the original")


def _hold(
    actual: Mapping[str, np.ndarray],
    reference: Mapping[str, np.ndarray],
    dtype: str,
    reduction_length: int | Mapping[str, int],
    gradients: Collection[str],
    sensitivity: Mapping[str, np.ndarray] | None,
    where: str,
    factor: float,
    against: str,
) -> Certificate:
    checks = []
    for name in dict.fromkeys((*reference, *actual)):
        length = reduction_length if isinstance(reduction_length, int) else reduction_length[name]
        bound = tolerance(dtype, length, gradient=name in gradients).times(factor)
        given = (sensitivity or {}).get(name)
        checks.append(_check(name, name in gradients, where, actual.get(name), reference.get(name), given, bound))
    return Certificate(dtype, against, tuple(checks))


def _check(
    name: str,
    gradient: bool,
    where: str,
    actual: np.ndarray | None,
    reference: np.ndarray | None,
    sensitivity: np.ndarray | None,
    bound: Tolerance,
) -> Check:
    if actual is None or reference is None:
        problem = "it was not computed" if actual is None else "there is no such array"
        return Check(name, gradient, where, None, 0.0, 0.0, problem)
    try:
        found = metrics(actual, reference)
    except ValidationError as e:
        return Check(name, gradient, where, None, 0.0, 0.0, str(e))
    norm, magnitude = found.reference_l2, found.reference_max
    if sensitivity is not None:
        moved = np.abs(np.asarray(sensitivity, np.float64))
        moved = moved[np.isfinite(moved)]
        norm = max(norm, float(np.linalg.norm(moved)))
        magnitude = max(magnitude, float(moved.max(initial=0.0)))
    allowed_l2, allowed_max = bound.allowed_l2(norm, found.size), bound.allowed_max(magnitude)
    if found.nonfinite_mismatch:
        problem = f"{found.nonfinite_mismatch} of {found.size} elements are NaN or infinite on one side only"
    elif found.abs_l2 > allowed_l2:
        problem = f"its L2 error {found.abs_l2:.2e} exceeds {allowed_l2:.2e}"
    elif found.max_abs > allowed_max:
        problem = f"its largest error {found.max_abs:.2e} exceeds {allowed_max:.2e}"
    else:
        problem = ""
    return Check(name, gradient, where, found, allowed_l2, allowed_max, problem)
