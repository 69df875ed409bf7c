import dataclasses

import pytest

from kpt.kernels import registry


@pytest.fixture(autouse=True)
def estimated(monkeypatch):
    """Norms and rotations are what most tests of swapping swap; on a CPU no estimate chooses their kernels."""
    for name in ("rms_norm.torch", "rope.torch"):
        monkeypatch.setitem(registry._kernels, name, dataclasses.replace(registry.get(name), efficiency_on={"cpu": 0.41}))
