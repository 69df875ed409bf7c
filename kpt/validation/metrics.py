"""How far one array is from another, in float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from kpt.errors import ValidationError

_PERCENTILES = ("50", "90", "99", "99.9")


@dataclasses.dataclass(frozen=True)
class ErrorMetrics:
    """Distance of `actual` from `reference`. All figures are over the elements where both are finite.

    Attributes:
      size: number of elements.
      max_abs: largest `|a - r|`.
      max_rel: largest `|a - r| / |r|` over `r != 0`.
      rel_l2: `||a - r||_2 / ||r||_2`; 0 where both vanish, inf where only the reference does.
      max_ulp: largest `|a - r|` in units of the spacing of `actual`'s dtype at `r`.
      percentiles: of `|a - r|`, keyed "50", "90", "99", "99.9".
      abs_l2: `||a - r||_2`.
      reference_l2: `||r||_2`.
      reference_max: largest `|r|`.
      nonfinite_mismatch: elements where exactly one is NaN, or the infinities differ. A finite reference beyond the
        range of `actual`'s dtype may come back as the infinity of its sign.
    """

    size: int
    max_abs: float
    max_rel: float
    rel_l2: float
    max_ulp: float
    percentiles: Mapping[str, float]
    abs_l2: float
    reference_l2: float
    reference_max: float
    nonfinite_mismatch: int

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict; inf and NaN become strings, which JSON lacks numbers for."""
        data = dataclasses.asdict(self)
        data["percentiles"] = {k: _plain(v) for k, v in self.percentiles.items()}
        return {k: _plain(v) if isinstance(v, float) else v for k, v in data.items()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ErrorMetrics:
        """Inverse of `to_json`."""
        known = {f.name for f in dataclasses.fields(ErrorMetrics)}
        values: dict[str, Any] = {k: float(v) if isinstance(v, str) else v for k, v in data.items() if k in known}
        values["percentiles"] = {k: float(v) for k, v in data["percentiles"].items()}
        return ErrorMetrics(**values)


def _plain(x: float) -> float | str:
    return float(x) if math.isfinite(x) else repr(float(x))


def metrics(actual: np.ndarray, reference: np.ndarray) -> ErrorMetrics:
    """Compares two arrays of the same shape; every dtype is widened to float64 first.

    Integers and booleans are compared as numbers. bfloat16 arrives as an ml_dtypes array.

    Raises:
      ValidationError: the shapes differ, or a dtype has no real number value.
    """
    actual, reference = np.asarray(actual), np.asarray(reference)
    if actual.shape != reference.shape:
        raise ValidationError(
            f"An array of shape {actual.shape} was compared with one of shape {reference.shape}",
            "Only equal shapes are compared; nothing is broadcast",
        )
    for array in (actual, reference):
        if array.dtype.kind in "cOSUMm":
            raise ValidationError(f"Arrays of dtype {array.dtype} were compared", "Only real numbers and booleans are")
    with np.errstate(all="ignore"):
        a, r = actual.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
        # A correctly rounded result is infinite where the exact one is out of range.
        out_of_range = np.isinf(r.astype(actual.dtype).astype(np.float64)) if actual.dtype.kind not in "iub" else False
        overflowed = out_of_range & (a == np.copysign(np.inf, r))
        matched = ~np.isfinite(a) & ((np.isnan(a) & np.isnan(r)) | (a == r) | overflowed)
        finite = np.isfinite(a) & np.isfinite(r)
        mismatch = int(a.size - np.count_nonzero(finite | matched))
        a, r = a[finite], r[finite]
        if not a.size:
            nothing = dict.fromkeys(_PERCENTILES, 0.0)
            return ErrorMetrics(actual.size, 0.0, 0.0, 0.0, 0.0, nothing, 0.0, 0.0, 0.0, mismatch)
        error, size_of_r = np.abs(a - r), np.abs(r)
        abs_l2, reference_l2 = _norm(error), _norm(r)
        nonzero = r != 0
        percentiles = np.percentile(error, [float(p) for p in _PERCENTILES])
        return ErrorMetrics(
            size=actual.size,
            max_abs=float(error.max()),
            max_rel=float((error[nonzero] / size_of_r[nonzero]).max(initial=0.0)),
            rel_l2=abs_l2 / reference_l2 if reference_l2 else (math.inf if abs_l2 else 0.0),
            max_ulp=float((error / _spacing(r, actual.dtype)).max()),
            percentiles=dict(zip(_PERCENTILES, map(float, percentiles), strict=True)),
            abs_l2=abs_l2,
            reference_l2=reference_l2,
            reference_max=float(size_of_r.max()),
            nonfinite_mismatch=mismatch,
        )


def _norm(x: np.ndarray) -> float:
    """Euclidean norm that neither overflows nor underflows."""
    scale = float(np.abs(x).max(initial=0.0))
    return scale * float(np.linalg.norm(x / scale)) if scale > 0 else 0.0


def _spacing(r: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Distance between neighbouring numbers of `dtype` at `r`; 1 for integers."""
    if dtype.kind in "iub":
        return np.ones_like(r)
    import ml_dtypes  # NumPy's own finfo does not know bfloat16

    info = ml_dtypes.finfo(dtype)
    # frexp writes |r| = f * 2**e with f in [0.5, 1); zero counts as the smallest normal.
    exponent = np.maximum(np.frexp(r)[1], info.minexp + 1)
    return np.ldexp(1.0, np.maximum(exponent - 1 - info.nmant, -1074))
