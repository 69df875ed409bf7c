"""What every launch needs: the device of its arrays, how many processors that has, and a block that covers a length."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
import triton

from kpt.ops.base import Specs

MOST = 2**31 - 1
"""Offsets inside of a row, and numbers of programs, are 32-bit integers."""


def on(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's device the one that kernels are launched on: Triton launches on the current one, whatever it is given."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def processors(tensor: torch.Tensor) -> int:
    """Multiprocessors of the tensor's device; 2 for Triton's interpreter, so that loops over rows turn more than once."""
    return _processors(tensor.device) if tensor.is_cuda else 2


def shared_bytes(tensor: torch.Tensor) -> int:
    """Of shared memory on a multiprocessor of the tensor's device; 0 where that is not known, and for Triton's interpreter."""
    return _shared_bytes(tensor.device) if tensor.is_cuda else 0


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_multiprocessor", 0)


def rows(x: torch.Tensor) -> torch.Tensor:
    """The array as a matrix, `[rows, last dim]`."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def block(length: int, most: int) -> int:
    """The power of two that covers `length`, or the largest that is at most `most`."""
    return min(triton.next_power_of_2(max(length, 1)), 1 << (most.bit_length() - 1))


def wide_floats(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why a kernel that computes in float32 cannot take a call, in one clause: an array or a result is float64, or none of the usual."""
    known = ("float32", "bfloat16", "float16")
    for name, spec in specs.items():
        if spec.dtype not in known and name != "labels":
            return f"computes in float32, and {name} is {spec.dtype}"
    if params.get("out_dtype") not in (None, *known):
        return f"computes in float32, and out_dtype is {params['out_dtype']}"
    return None
