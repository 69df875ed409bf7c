"""What a proof does with arrays, wherever a front end has them."""

from __future__ import annotations

import hashlib
import math
from typing import Any, Protocol

import numpy as np

from kpt.graph.expr import numpy_dtype
from kpt.ops.base import Spec
from kpt.validation import ErrorMetrics, metrics
from kpt.validation.metrics import in_blocks


class Arrays(Protocol):
    """Arrays of a front end, which have shapes. What is on a GPU is drawn and compared there: its way to the CPU takes longer."""

    def put(self, array: np.ndarray) -> Any:
        """An array of the front end's with these values."""
        ...

    def get(self, array: Any) -> np.ndarray:
        """The inverse of `put`."""
        ...

    def normal(self, seed: int, spec: Spec, mean: float, deviation: float) -> Any:
        """Normal random numbers."""
        ...

    def metrics(self, actual: Any, reference: Any) -> ErrorMetrics:
        """The figures of `kpt.validation.metrics`."""
        ...

    def digest(self, array: Any) -> str:
        """Digits that other values do not have."""
        ...


class _Numpy:
    def put(self, array: np.ndarray) -> np.ndarray:
        return array

    def get(self, array: Any) -> np.ndarray:
        return np.asarray(array)

    def normal(self, seed: int, spec: Spec, mean: float, deviation: float) -> np.ndarray:
        """Those of a large array are drawn in blocks, each from a generator of its own, on all cores."""
        out = np.empty(math.prod(spec.shape), numpy_dtype(spec.dtype))

        def fill(block: slice) -> None:
            own = np.random.default_rng((seed, block.start))
            out[block] = (mean + deviation * own.standard_normal(block.stop - block.start)).astype(out.dtype)

        in_blocks(fill, out.size)
        return out.reshape(spec.shape)

    def metrics(self, actual: Any, reference: Any) -> ErrorMetrics:
        return metrics(np.asarray(actual), np.asarray(reference))

    def digest(self, array: Any) -> str:
        return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


NUMPY: Arrays = _Numpy()
"""For a front end that hands NumPy arrays over."""
