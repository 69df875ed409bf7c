import dataclasses

import jax
import pytest

from kpt.kernels import registry


@pytest.fixture(autouse=True)
def estimated(monkeypatch):
    """Norms and losses are what most tests of swapping swap; on a CPU no estimate chooses their kernels."""
    for name in ("rms_norm.xla", "cross_entropy.xla"):
        monkeypatch.setitem(registry._kernels, name, dataclasses.replace(registry.get(name), efficiency_on={"cpu": 0.4}))


@pytest.fixture
def x64():
    """float64 arrays, for one test."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
