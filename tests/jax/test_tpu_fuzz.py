"""TPU kernels on the shared table's random cases, interpreted with poisoned memory, race detection and bounds checks."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest

import kpt
from tests import fuzz
from tests.cases import CASES
from tests.jax.tpu import interpreted, needs_pallas_tpu, refused

pytestmark = needs_pallas_tpu
SEED = 20261126


def poisoned(case, arrays, rng):
    """As in the shared table; but where hidden scores are a finite number, -inf among the visible ones would choose hidden values,
    and the kernel gives NaN, as its docstring says."""
    out = fuzz.poisoned(case, arrays, rng)
    if case.op == "attention" and np.isfinite(case.params["mask"].fill):
        out["q"] = np.where(np.isinf(out["q"].astype(np.float32)), np.nan, out["q"]).astype(out["q"].dtype)
    return out


# One set of values of each kind: what costs here is to interpret a shape.
ONE_OF_EACH = {name: (1, poisoned if name == "poisoned" else change, grads) for name, (_, change, grads) in fuzz.KINDS.items()}


def taken(op: str, count: int):
    """The first cases of the table that the kernel takes."""
    found, i = [], 0
    while len(found) < count:
        case = CASES[op](np.random.default_rng([SEED, i]), 130)
        i += 1
        assert i < 500 * count, f"{op}.pallas_tpu takes {len(found)} of {i} cases"
        if refused(op, case.specs, case.params) is None:
            found.append((i, case))
    return found


def failures(op: str, count: int) -> list[str]:
    with mock.patch.dict(fuzz.KINDS, ONE_OF_EACH), interpreted():
        kernel = kpt.registry.get(f"{op}.pallas_tpu")
        return [f"{case}: {why}" for i, case in taken(op, count) for why in fuzz.check(kernel, case, i)]


@pytest.mark.parametrize("op", CASES)
def test_a_case(op):
    assert failures(op, 1) == []


@pytest.mark.slow
@pytest.mark.parametrize("op", CASES)
def test_six_cases(op):
    assert failures(op, 6) == []
