"""Estimated time of a call where nothing was measured: its roofline, divided by the fraction of it that is reached."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from kpt.kernels.spec import ORIGINAL, KernelSpec
from kpt.ops.base import Cost, Spec, Specs

_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2}


def _size(spec: Spec) -> int:
    return math.prod(spec.shape) * _BYTES.get(spec.dtype, 1)


def _scores(specs: Specs) -> float:
    (b, t, n, _), s = specs["q"].shape, specs["k"].shape[1]
    return b * n * t * s * _BYTES.get(specs["q"].dtype, 1)


def _hidden(specs: Specs, weight: str) -> float:
    x = specs["x"]
    return math.prod(x.shape[:-1]) * specs[weight].shape[1] * _BYTES.get(x.dtype, 1)


# Bytes that a program written op by op moves besides its inputs and outputs, when the compiler fuses elementwise chains
# into their neighbours but nothing across a product, and not a row reduction with what uses its result.
_INTERMEDIATE: Mapping[str, Callable[[Specs], float]] = {
    "attention": lambda s: 4 * _scores(s),  # scores and probabilities, each written and read
    "rms_norm": lambda s: _size(s["x"]),  # the input once more, after its statistics
    "layer_norm": lambda s: 2 * _size(s["x"]),  # once for the mean, once for the variance
    "linear_act": lambda s: 2 * _hidden(s, "w"),  # the product, written and read
    "glu": lambda s: 4 * _hidden(s, "w_gate"),  # both products, written and read
    "rope": lambda s: 2 * _size(s["x"]),  # the rotated copy, written and read
    "cross_entropy": lambda s: _size(s["logits"]),  # once for the maximum
    "linear_cross_entropy": lambda s: 3 * _hidden(s, "w"),  # logits written, read for the maximum and for the sum
}

# Ops that XLA compiles into one kernel as people write them, at 92% to 101% of the speed of a copy on an H100
# (docs/benchmarks/hopper-notes-mem.md): what has no intermediates cannot be beaten by leaving them out.
_ONE_KERNEL: Mapping[str, frozenset[str]] = {"cuda": frozenset({"rms_norm", "layer_norm", "rope"})}


def estimate(
    kernel: KernelSpec,
    cost: Callable[..., Cost] | None,
    specs: Specs,
    params: Mapping[str, Any],
    hardware: Any,
    dtype: str,
) -> float | None:
    """Seconds that one forward call may take, or None where the hardware's or the op's figures are not known.

        (max(flops / peak_flops[dtype], bytes / memory_bandwidth) + intermediates / memory_bandwidth) / efficiency

    Intermediates are those of the user's own code: passes of their own, that no product runs beside; infinite time where
    half of them, an array that is written and read again, exceeds the device's memory. An estimate ranks candidates; it
    is no measurement.

    Args:
      cost: `Op.cost` of the kernel's op.
      hardware: needs `peak_flops`, FLOP/s by dtype, and `memory_bandwidth` in bytes/s.
    """
    if hasattr(hardware, "per_device"):  # a chip may be several devices, and a narrow dtype may run at a wider one's rate
        hardware = hardware.per_device()
    peak = hardware.peak(dtype) if hasattr(hardware, "peak") else (getattr(hardware, "peak_flops", None) or {}).get(dtype)
    bandwidth = getattr(hardware, "memory_bandwidth", None)
    if not peak or not bandwidth or not (kernel.cost or cost):
        return None
    work = kernel.cost(specs, params) if kernel.cost else cost(specs, **params)  # type: ignore[misc]
    platform = getattr(hardware, "platform", "")
    extra = 0.0
    compiled = _ONE_KERNEL.get(platform, frozenset()) if kernel.framework == "jax" else frozenset()  # torch runs them op by op
    if kernel.provider == ORIGINAL and kernel.op in _INTERMEDIATE and kernel.op not in compiled:
        extra = _INTERMEDIATE[kernel.op](specs)
        if extra / 2 > (getattr(hardware, "memory_bytes", None) or math.inf):
            return math.inf
    efficiency = kernel.efficiency_on.get(platform, kernel.efficiency)
    return (max(work.flops / peak, work.bytes / bandwidth) + extra / bandwidth) / efficiency


def seconds(t: float) -> str:
    """A time for people, with the unit that fits it."""
    if t == math.inf:
        return "more memory than there is"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if t >= scale:
            return f"{t / scale:.3g} {unit}"
    return f"{t / 1e-9:.3g} ns"
