"""What every launch needs: the device of its arrays, its family, and how many processors and bytes of shared memory it has."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton

from kpt_torch.triton_kernels.jitted import bounds

log = logging.getLogger("kpt")
_HERE = contextlib.nullcontext()
_AHEAD = threading.local()


def on(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's device the one that kernels are launched on: Triton launches on the current one, whatever it is given."""
    here = not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device()
    return _HERE if here else torch.cuda.device(tensor.device)


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """`kernel[grid](*args, **constants)`; what Triton has compiled for such arguments before is launched without asking it again.

    Triton looks at each argument, and at its own settings, before it finds what it has compiled. What it compiles anew for is the dtype of
    a tensor and whether its address is a multiple of 16, whether an integer is one, and whether it is a multiple of 16, or wide.
    """
    if (ahead := getattr(_AHEAD, "pool", None)) is not None:
        ahead.compile(kernel, grid, args, constants)
        return
    device = torch.cuda.current_device() if _LAUNCHES and torch.cuda.is_initialized() else None
    if device is None or _is_watched():
        kernel[grid](*args, **constants)
        return
    key = (kernel, device, *map(_kind, args), *constants.items())
    found = _COMPILED.get(key)
    if found is None:
        made = kernel[grid](*args, **constants)
        names = kernel.arg_names[len(args) :]
        if made is not None and all(n in constants for n in names):
            _COMPILED[key] = made.run, made.function, made.packed_metadata, tuple(constants[n] for n in names)
        return
    start, function, metadata, more = found
    sizes = (*grid, 1, 1)
    stream = torch._C._cuda_getCurrentRawStream(device)
    start(sizes[0], sizes[1], sizes[2], stream, function, metadata, None, None, None, *args, *more)


_COMPILED: dict[tuple, tuple[Any, Any, Any, tuple]] = {}
# As Triton of these versions launches on NVIDIA's GPUs; of AMD's it looks at the size of a tensor's memory, too.
_LAUNCHES = torch.version.hip is None and tuple(map(int, triton.__version__.split(".")[:2])) in ((3, 5), (3, 6))


@contextlib.contextmanager
def compiled_ahead(device: torch.device) -> Iterator[None]:
    """Within, kernels that this thread launches are compiled for the device, side by side, and nothing runs. At the end all are ready.

    Triton compiles one kernel after the other, as they are launched, and waits for ptxas and a C compiler to end. What cannot be
    compiled is reported when it is launched.
    """
    pool = ThreadPoolExecutor(COMPILERS, thread_name_prefix="kpt-compile")
    _AHEAD.pool = _Pool(pool, device)
    try:
        try:
            yield
        finally:
            _AHEAD.pool = None
        pool.shutdown()
    finally:  # an interrupt does not wait for what has not begun
        pool.shutdown(wait=False, cancel_futures=True)


class _Pool:
    def __init__(self, pool: ThreadPoolExecutor, device: torch.device):
        self.pool, self.device = pool, torch.device(device.type, torch.cuda.current_device() if device.index is None else device.index)
        self.seen: set[Any] = set()

    def compile(self, kernel: Any, grid: tuple[int, ...], args: tuple, constants: dict[str, Any]) -> None:
        # No memory of a tensor is read: its dtype stands for one whose address is a multiple of 16, as new memory's is.
        given = tuple(a.dtype if isinstance(a, torch.Tensor) else a for a in args)
        key = (kernel, *map(_kind, given), *constants.items())
        if key not in self.seen:
            self.seen.add(key)
            kernel.device_caches[self.device.index]  # made here, once: threads that find none would make one each
            self.pool.submit(self._ready, kernel, grid, given, constants)

    def _ready(self, kernel: Any, grid: tuple[int, ...], given: tuple, constants: dict[str, Any]) -> None:
        try:
            with torch.cuda.device(self.device):
                kernel.warmup(*given, grid=grid, **constants).run  # noqa: B018  # which compiles what launches it, and loads both
        except Exception as problem:
            log.info("%s was not compiled ahead: %s", getattr(kernel, "__name__", kernel), problem)


COMPILERS = 8
"""Threads that compile."""


def _kind(arg: Any) -> Any:
    """What of an argument decides which of a kernel's compilations it goes to, or more."""
    if arg is None or type(arg) is float:
        return type(arg)
    if type(arg) is int:
        return arg == 1, arg % 16 == 0, arg.bit_length() > 31
    if isinstance(arg, torch.Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    return arg


def _is_watched() -> bool:
    """Whether somebody is to be told of launches: a profiler of Triton's."""
    runtime: Any = triton.knobs.runtime
    return bool(_calls(runtime.launch_enter_hook) or _calls(runtime.launch_exit_hook))


def _calls(hook: Any) -> Any:
    return getattr(hook, "calls", hook)


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
