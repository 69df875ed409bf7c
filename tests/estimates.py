"""On a CPU no estimate chooses the kernels of norms, losses and rotations, which are what most tests of swapping swap. For these, one does."""

import dataclasses

from kpt.kernels import KernelSpec, registry


def chosen() -> dict[str, KernelSpec]:
    """Kernels by name, for `registry._kernels`."""
    names = ("rms_norm.xla", "cross_entropy.xla", "rms_norm.torch", "rope.torch")
    return {name: dataclasses.replace(registry.get(name), efficiency_on={"cpu": 0.41}) for name in names}
