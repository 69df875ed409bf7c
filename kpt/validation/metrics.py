"""How far one array is from another, in float64."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from kpt.errors import ValidationError

PERCENTILES = ("50", "90", "99", "99.9")
_BLOCK = 1 << 17  # elements: 1 MiB of float64
KEPT = 1 << 18  # errors that percentiles are taken of


@dataclasses.dataclass(frozen=True)
class ErrorMetrics:
    """Distance of `actual` from `reference`. All figures are over the elements where both are finite.

    Attributes:
      size: number of elements.
      max_abs: largest `|a - r|`.
      max_rel: largest `|a - r| / |r|` over `r != 0`.
      rel_l2: `||a - r||_2 / ||r||_2`; 0 where both vanish, inf where only the reference does.
      max_ulp: largest `|a - r|` in units of the spacing of `actual`'s dtype at `r`.
      percentiles: of `|a - r|`, keyed "50", "90", "99", "99.9"; of more than 262,144 elements, of one in so many that no
        more are left.
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
    blocks = in_blocks(functools.partial(_part, actual.reshape(-1), reference.reshape(-1)), actual.size)
    mismatch = sum(b.mismatch for b in blocks)
    errors = np.concatenate([b.errors for b in blocks]) if blocks else np.empty(0)
    if not errors.size:
        nothing = dict.fromkeys(PERCENTILES, 0.0)
        return ErrorMetrics(actual.size, 0.0, 0.0, 0.0, 0.0, nothing, 0.0, 0.0, 0.0, mismatch)
    abs_l2, reference_l2 = math.hypot(*(b.abs_l2 for b in blocks)), math.hypot(*(b.reference_l2 for b in blocks))
    percentiles = np.percentile(errors, [float(p) for p in PERCENTILES])
    return ErrorMetrics(
        size=actual.size,
        max_abs=max(b.max_abs for b in blocks),
        max_rel=max(b.max_rel for b in blocks),
        rel_l2=abs_l2 / reference_l2 if reference_l2 else (math.inf if abs_l2 else 0.0),
        max_ulp=max(b.max_ulp for b in blocks),
        percentiles=dict(zip(PERCENTILES, map(float, percentiles), strict=True)),
        abs_l2=abs_l2,
        reference_l2=reference_l2,
        reference_max=max(b.reference_max for b in blocks),
        nonfinite_mismatch=mismatch,
    )


def in_blocks[Result](function: Callable[[slice], Result], size: int) -> list[Result]:
    """`function` of each block of `size` elements, in order: blocks that stay in a cache, on all cores where there are many."""
    slices = [slice(i, min(i + _BLOCK, size)) for i in range(0, size, _BLOCK)]
    if len(slices) < 8:
        return [function(s) for s in slices]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # NumPy lets others run while it computes
        return list(pool.map(function, slices))


@dataclasses.dataclass(frozen=True)
class _Part:
    """The figures of one block, and the errors of it that percentiles are taken of."""

    max_abs: float
    max_rel: float
    max_ulp: float
    abs_l2: float
    reference_l2: float
    reference_max: float
    mismatch: int
    errors: np.ndarray


def _part(actual: np.ndarray, reference: np.ndarray, block: slice) -> _Part:
    every = math.ceil(actual.size / KEPT)
    dtype = actual.dtype
    with np.errstate(all="ignore"):
        a, r = actual[block].astype(np.float64), reference[block].astype(np.float64)
        finite = np.isfinite(a) & np.isfinite(r)
        mismatch = 0
        if not finite.all():
            # A correctly rounded result is infinite where the exact one is out of range.
            out_of_range = np.isinf(r.astype(dtype).astype(np.float64)) if dtype.kind not in "iub" else False
            overflowed = out_of_range & (a == np.copysign(np.inf, r))
            matched = ~np.isfinite(a) & ((np.isnan(a) & np.isnan(r)) | (a == r) | overflowed)
            mismatch = int(a.size - np.count_nonzero(finite | matched))
            a, r = a[finite], r[finite]
        if not a.size:
            return _Part(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, mismatch, a)
        error, size_of_r = np.abs(a - r), np.abs(r)
        return _Part(
            max_abs=float(error.max()),
            max_rel=float(np.divide(error, size_of_r, out=np.zeros_like(r), where=r != 0).max()),
            max_ulp=float((error / _spacing(r, dtype)).max()),
            abs_l2=_norm(error),
            reference_l2=_norm(r),
            reference_max=float(size_of_r.max()),
            mismatch=mismatch,
            errors=error[::every],
        )


def _norm(x: np.ndarray) -> float:
    """Euclidean norm that neither overflows nor underflows."""
    scale = float(np.abs(x).max(initial=0.0))
    # Not np.linalg.norm: BLAS would start threads of its own in each thread that this runs in.
    return scale * math.sqrt(float(np.square(x / scale).sum())) if scale > 0 else 0.0


def _spacing(r: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Distance between neighbouring numbers of `dtype` at `r`; 1 for integers."""
    if dtype.kind in "iub":
        return np.ones_like(r)
    import ml_dtypes  # NumPy's own finfo does not know bfloat16

    info = ml_dtypes.finfo(dtype)
    # frexp writes |r| = f * 2**e with f in [0.5, 1); zero counts as the smallest normal.
    exponent = np.maximum(np.frexp(r)[1], info.minexp + 1)
    return np.ldexp(1.0, np.maximum(exponent - 1 - info.nmant, -1074))
