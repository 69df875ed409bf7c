"""What bounds every kernel, and the families of GPUs that tiles go by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kpt.ops.base import Specs

MOST = 2**31 - 1
"""Offsets inside of a row, and numbers of programs, are 32-bit integers."""


def family(major: int, amd: bool = False) -> str:
    """That of a GPU by the major number of its compute capability; the one name of AMD's."""
    return "cdna" if amd else "blackwell" if major > 9 else "hopper" if major == 9 else "ampere"


def block(length: int, most: int) -> int:
    """The power of two that covers `length`, or the largest that is at most `most`."""
    return min(1 << (max(length, 1) - 1).bit_length(), 1 << (most.bit_length() - 1))


def wide_floats(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why a kernel that computes in float32 cannot take a call, in one clause: an array or a result is float64, or none of the usual."""
    known = ("float32", "bfloat16", "float16")
    for name, spec in specs.items():
        if spec.dtype not in known and name != "labels":
            return f"computes in float32, and {name} is {spec.dtype}"
    if params.get("out_dtype") not in (None, *known):
        return f"computes in float32, and out_dtype is {params['out_dtype']}"
    return None
