"""Which chip this process runs on, found without loading a framework, a driver library other than NVML, or a TPU."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from kpt.config import setting
from kpt.errors import HardwareError
from kpt.hardware import probes
from kpt.hardware.cpu import cpu_profile
from kpt.hardware.host import Host
from kpt.hardware.profiles import PLATFORMS, PROFILES, HardwareProfile


def detect_hardware(
    *,
    platform: str | None = None,
    model: str | None = None,
    root: str | os.PathLike[str] = "/",
    environ: Mapping[str, str] | None = None,
    nvml: Any = None,
) -> HardwareProfile:
    """The chip that this process runs on. Whatever the host is like, it returns; `notes` say what could not be read.

    `KPT_HARDWARE`, which is what plans are for, changes nothing here. A TPU is looked for first, then NVIDIA, AMD and
    Intel GPUs, then the CPU, and the first that is there is taken. No framework, metadata server or TPU runtime is
    touched.

    Args:
      platform: look for this kind alone: "tpu", "cuda", "rocm", "xpu" or "cpu". A framework that has settled on one
        knows better than the order above. The CPU is described where there is no such chip.
      model: of several NVIDIA GPUs, describe the one that its maker gives this name, as frameworks tell it of each device: CUDA counts
        GPUs in another order than the driver. Without it, or where none has that name, the first.
      root: directory that has `dev`, `proc` and `sys`.
      environ: read instead of `os.environ`.
      nvml: used instead of the module `pynvml`.

    Raises:
      HardwareError: `platform` is none of these.
    """
    if platform is not None and platform not in PLATFORMS:
        raise HardwareError(f"Hardware of platform {platform!r} was asked for", f"Known are {', '.join(PLATFORMS)}", "Pass one of them")
    here = os.fspath(root) == "/"
    host = Host(pathlib.Path(root), os.environ if environ is None else environ, _affinity() if here else None)
    accelerators: Mapping[str, Callable[[Host], HardwareProfile | None]] = {
        "tpu": probes.tpu,
        "cuda": lambda host: probes.cuda(host, nvml, model),
        "rocm": probes.rocm,
        "xpu": probes.xpu,
    }
    for name, probe in accelerators.items():
        if platform in (None, name):
            found = _tried(host, name, probe)
            if found is not None:
                return dataclasses.replace(found, notes=(*found.notes, *host.notes))
    if platform not in (None, "cpu"):
        host.notes.append(f"{platform}: none was found; this is the CPU")
    found = _tried(host, "cpu", cpu_profile) or PROFILES["cpu"]
    return dataclasses.replace(found, notes=(*found.notes, *host.notes))


def planned_elsewhere(here: HardwareProfile) -> bool:
    """Whether `KPT_HARDWARE` names another chip than the one that is here and is about to be measured; then a warning says so."""
    named = setting("hardware", os.environ)
    if named in ("auto", here.name):
        return False
    warnings.warn(f"KPT_HARDWARE is {named}; what is measured is this machine, {here.name}.", stacklevel=3)
    return True


def _tried(host: Host, name: str, probe: Callable[[Host], HardwareProfile | None]) -> HardwareProfile | None:
    try:
        return probe(host)
    except Exception as e:  # a broken driver must not stop a program that can run without it
        host.notes.append(f"{name}: {type(e).__name__}: {e}")
        return None


def _affinity() -> int | None:
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not Linux
        return os.cpu_count()
