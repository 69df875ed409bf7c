"""Who can compute an op, where, at which dtype and version."""

from kpt.kernels.builtin import KERNELS
from kpt.kernels.kernel_registry import ENTRY_POINTS, KernelRegistry, Measurement, Selection
from kpt.kernels.spec import LEVELS, KernelSpec

registry = KernelRegistry(KERNELS, entry_points=ENTRY_POINTS)
"""The kernels of this process: those of kpt, and those that installed packages offer as entry points "kpt.kernels"."""

__all__ = ["ENTRY_POINTS", "LEVELS", "KernelRegistry", "KernelSpec", "Measurement", "Selection", "registry"]
