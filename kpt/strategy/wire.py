"""Plan values as JSON and back: masks, specs, tuples and numbers that JSON has no word for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from kpt.errors import PlanError
from kpt.ops.base import Spec
from kpt.ops.mask import Mask


def encode(value: Any) -> Any:
    """A JSON-ready form; `decode` is the inverse.

    Raises:
      PlanError: the value has no such form.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mask):
        return {"$mask": value.to_json()}
    if isinstance(value, Spec):
        return {"$spec": [list(value.shape), value.dtype]}
    if isinstance(value, Mapping):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return {"$tuple": [encode(v) for v in value]}
    if isinstance(value, list):
        return [encode(v) for v in value]
    raise PlanError(
        f"{value!r} of type {type(value).__name__} was put into a plan",
        "A plan holds None, booleans, numbers, strings, masks, specs, and lists, tuples and dicts of them",
        "Convert it to one of those",
    )


def decode(data: Any) -> Any:
    """Inverse of `encode`."""
    if isinstance(data, list):
        return [decode(v) for v in data]
    if not isinstance(data, dict):
        return data
    if len(data) == 1:
        (key, value), *_ = data.items()
        if key == "$float":
            return float(value)
        if key == "$mask":
            return Mask.from_json(value)
        if key == "$spec":
            return Spec(tuple(value[0]), value[1])
        if key == "$tuple":
            return tuple(decode(v) for v in value)
    return {k: decode(v) for k, v in data.items()}
