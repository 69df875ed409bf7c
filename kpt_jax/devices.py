"""Which device jax computes on, and the profile of its chip."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax

import kpt.hardware as hardware_room
from kpt.config import config
from kpt.errors import HardwareError
from kpt.hardware import HardwareProfile
from kpt_jax import _compat


def device_of(arrays: Iterable[Any] = ()) -> Any:
    """The device that a program of these arrays runs on: that of the first array that was put on one, else jax's default."""
    for x in arrays:
        if isinstance(x, jax.Array) and not _compat.is_tracer(x) and x.committed:
            local = [d for d in x.devices() if d.process_index == jax.process_index()]
            if local:
                return min(local, key=lambda d: d.id)
    named = jax.config.jax_default_device
    if named is None:
        return jax.local_devices()[0]
    return jax.local_devices(backend=named)[0] if isinstance(named, str) else named


def name_of(device: Any) -> str:
    """"gpu:1": by which another process on this host finds a device."""
    number = getattr(device, "local_hardware_id", None)
    return str(device.platform) if number is None else f"{device.platform}:{number}"


def device_named(name: str) -> Any:
    """The device of `name_of`, in another process; of "cpu" the first."""
    platform, _, number = name.partition(":")
    devices = jax.local_devices(backend=platform)
    return next(d for d in devices if not number or d.local_hardware_id == int(number))


def here(arrays: Iterable[Any] = ()) -> HardwareProfile:
    """The profile of what jax computes on, given these arrays, whatever plans are for."""
    device = device_of(arrays)
    return _detected(_platform(device), device.device_kind)


def profile(hardware: str | HardwareProfile, arrays: Iterable[Any] = ()) -> HardwareProfile:
    """The profile that a `hardware=` argument names; "auto" detects that of the arrays' device."""
    if isinstance(hardware, HardwareProfile):
        return hardware
    if hardware == "auto":
        named = config().hardware
        return here(arrays) if named == "auto" else hardware_room.hardware_profile(named)
    if not isinstance(hardware, str):
        raise HardwareError(f"A {type(hardware).__name__} was given as the hardware", "It is a name or a HardwareProfile",
                            "Pass one of kpt.hardware.PROFILES, or describe yours with HardwareProfile.from_json")  # fmt: skip
    return hardware_room.hardware_profile(hardware)


@functools.cache
def _detected(platform: str, model: str) -> HardwareProfile:
    return hardware_room.detect_hardware(platform=platform, model=model)


def _platform(device: Any) -> str:
    """A device's platform by kpt's name: a GPU in the machine does not matter under JAX_PLATFORMS=cpu."""
    if device.platform in ("gpu", "cuda", "rocm"):
        return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
    return device.platform if device.platform in hardware_room.PLATFORMS else "cpu"
