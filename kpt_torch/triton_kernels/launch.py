"""What every launch needs: the device of its arrays, its family, and how many processors and bytes of shared memory it has."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import torch

from kpt_torch.triton_kernels.jitted import bounds


def on(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's device the one that kernels are launched on: Triton launches on the current one, whatever it is given."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def family(tensor: torch.Tensor) -> str:
    """That of the tensor's device, by which tiles go; for Triton's interpreter, Ampere's."""
    return bounds.family(torch.cuda.get_device_capability(tensor.device)[0] if tensor.is_cuda else 8, amd=bool(torch.version.hip))


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
