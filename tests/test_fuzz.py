"""Every op's providers on random cases against float64, forward and gradients. `python -m tests.fuzz` runs any seed."""

import os

import pytest

from tests import fuzz as table
from tests.cases import CASES, masks_in_numbers
from tests.fuzz import fuzz, providers

# Ops for which torch has no provider that runs everywhere: as written, they are as good as what could be put there.
NOT_IN_TORCH = {"linear_act", "glu", "matmul", "ragged_matmul"}


@pytest.mark.parametrize("op", CASES)
def test_a_slice(op):
    pytest.importorskip("jax", reason="the JAX providers are fuzzed; pip install -e '.[jax]'")
    assert providers(op), f"no provider of {op} runs everywhere"
    assert not fuzz([op], cases=80, seed=20261123)


@pytest.mark.parametrize("op", CASES)
def test_a_slice_in_torch(op):
    pytest.importorskip("torch", reason="the PyTorch providers are fuzzed; pip install -e '.[torch]'")
    assert bool(providers(op, "torch")) == (op not in NOT_IN_TORCH)
    assert not fuzz([op], cases=80, seed=20261123, framework="torch")


@pytest.mark.parametrize("framework", table.FRAMEWORKS)
def test_masks_that_come_as_numbers(framework, monkeypatch):
    """Rows of the smallest float and of -inf, in which scores drown, are never drawn from a normal distribution."""
    pytest.importorskip(framework, reason="the kernels of both frameworks are held to the reference")
    monkeypatch.setattr(table, "KINDS", {})
    for i, case in enumerate(masks_in_numbers()):
        for kernel in providers("attention", framework):
            assert table.refused(kernel, case) is None
            assert list(table.check(kernel, case, 5 * i)) == [], f"{kernel.name}: {case}"


@pytest.mark.slow
def test_five_hundred_cases_of_each_op():
    """At one seed, so that a change fails by what it changes; `python -m tests.fuzz` draws a new one, and two thousand cases."""
    print("seed 20261123")
    assert not fuzz(list(CASES), cases=500, seed=20261123, jobs=os.cpu_count() or 1)
