import jax
import pytest

from kpt.kernels import registry
from tests.estimates import chosen


@pytest.fixture(autouse=True)
def estimated(monkeypatch):
    for name, kernel in chosen().items():
        monkeypatch.setitem(registry._kernels, name, kernel)


@pytest.fixture
def x64():
    """float64 arrays, for one test."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
