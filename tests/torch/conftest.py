import pytest

from kpt.kernels import registry
from tests.estimates import chosen


@pytest.fixture(autouse=True)
def estimated(monkeypatch):
    for name, kernel in chosen().items():
        monkeypatch.setitem(registry._kernels, name, kernel)
