import jax
import pytest

from kpt_jax import pairs


@pytest.fixture
def x64():
    """float64 arrays, for one test."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture(scope="module")
def on_hopper():
    """Skips a module where jax's first device is not what its kernels are written for."""
    gpu = jax.devices()[0]
    if getattr(gpu, "compute_capability", None) != "9.0":
        pytest.skip(f"needs a GPU of compute capability 9.0, and this is {gpu.device_kind}")


@pytest.fixture
def unproved():
    """No site was held to what runs beside it before this test, nor is what the test says of one kept."""
    pairs._difference_of.cache_clear()
    yield
    pairs._difference_of.cache_clear()
