"""What the chips can do, which one is here, and the time it needs at least."""

from kpt.hardware.detect import detect_hardware, planned_elsewhere
from kpt.hardware.profiles import ALIASES, CACHES, DTYPES, PLATFORMS, PROFILES, HardwareProfile, hardware_profile
from kpt.hardware.roofline import Roofline, time_bound

__all__ = [
    "ALIASES", "CACHES", "DTYPES", "PLATFORMS", "PROFILES", "HardwareProfile", "Roofline", "detect_hardware",
    "hardware_profile", "planned_elsewhere", "time_bound",
]  # fmt: skip
