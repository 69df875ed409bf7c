"""Finds what a better kernel computes in code its user already has, swaps it in, and shows the evidence."""

import importlib
from typing import TYPE_CHECKING, Any

from kpt._version import __version__

if TYPE_CHECKING:
    from kpt.auto import auto_optimize
    from kpt.hardware import HardwareProfile, detect_hardware, hardware_profile
    from kpt.kernels import KernelRegistry, KernelSpec, registry
    from kpt.pipeline import ProductionPipeline
    from kpt.strategy import Plan, Site
    from kpt.validation import Certificate

# Imported at their first use: `kpt --help` has no need of NumPy.
_HOMES = {
    "Certificate": "kpt.validation",
    "HardwareProfile": "kpt.hardware",
    "KernelRegistry": "kpt.kernels",
    "KernelSpec": "kpt.kernels",
    "Plan": "kpt.strategy",
    "ProductionPipeline": "kpt.pipeline",
    "Site": "kpt.strategy",
    "auto_optimize": "kpt.auto",
    "detect_hardware": "kpt.hardware",
    "hardware_profile": "kpt.hardware",
    "registry": "kpt.kernels",
}

__all__ = [
    "Certificate",
    "HardwareProfile",
    "KernelRegistry",
    "KernelSpec",
    "Plan",
    "ProductionPipeline",
    "Site",
    "__version__",
    "auto_optimize",
    "detect_hardware",
    "hardware_profile",
    "registry",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kpt' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
