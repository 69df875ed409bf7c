"""The time that a chip needs at least."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from kpt.errors import HardwareError
from kpt.hardware.profiles import HardwareProfile

if TYPE_CHECKING:  # the ops bring NumPy, which nothing else here needs
    from kpt.ops.base import Cost


@dataclasses.dataclass(frozen=True)
class Roofline:
    """A lower bound on a call's time, in seconds, and what sets it.

    Attributes:
      seconds: the larger of the two below.
      compute_seconds: FLOPs at the peak rate of the dtype.
      memory_seconds: bytes at the peak bandwidth of device memory.
      bound: "compute" or "memory".
    """

    seconds: float
    compute_seconds: float
    memory_seconds: float
    bound: str


def time_bound(cost: Cost, profile: HardwareProfile, dtype: str) -> Roofline:
    """The roofline of one call on one device of a chip.

        seconds = max(flops / peak_flops[dtype], bytes / memory_bandwidth)

    S. Williams, A. Waterman, D. Patterson: Roofline, Communications of the ACM 52(4), 2009.

    Args:
      cost: FLOPs, and bytes that must cross device memory.
      profile: of the chip; where a framework sees several devices on it, one of them is meant (`per_device`).
      dtype: of the operands. One without native rate runs at that of the next wider dtype (`HardwareProfile.peak`).

    Raises:
      HardwareError: the profile has no rate for the dtype, or no memory bandwidth.
    """
    device = profile.per_device()
    peak = device.peak(dtype)
    if peak is None:
        raise HardwareError(
            f"A time bound at {dtype} on {profile.name} was asked for",
            f"Rates are known at {', '.join(profile.peak_flops) or 'no dtype'}",
            "Pass one of these, or a profile that has the rate",
        )
    if device.memory_bandwidth is None:
        raise HardwareError(
            f"A time bound on {profile.name} was asked for",
            "Its memory bandwidth is not known",
            "Pass a profile that has it: HardwareProfile.from_json",
        )
    compute, memory = cost.flops / peak, cost.bytes / device.memory_bandwidth
    return Roofline(max(compute, memory), compute, memory, "compute" if compute > memory else "memory")
