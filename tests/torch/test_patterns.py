"""Every spelling gives exactly the sites that it says, and runs to the same numbers and gradients with them."""

from __future__ import annotations

import math

import pytest
import torch

import kpt_torch
from kpt.validation import compare
from kpt_torch.capture import to_numpy
from tests.torch.spellings import ONE_CALL, TABLE

DEFAULTS = {"weight_offset": 0.0, "label_smoothing": 0.0, "interleaved": False}


def agrees(found, expect) -> bool:
    """Whether a site has these parameters and array shapes."""
    for name, want in expect.items():
        if name == "terms":
            got = found.params["mask"].terms
        elif name in found.specs:
            got = found.specs[name].shape
        else:
            got = found.params.get(name, DEFAULTS.get(name))
        if isinstance(want, float) and isinstance(got, float):
            if not math.isclose(got, want, rel_tol=1e-6):
                return False
        elif got != want:
            return False
    return True


def results_and_gradients(fn, args):
    leaves = [a.detach().clone().requires_grad_(a.requires_grad) for a in args]
    out = fn(*leaves)
    torch.manual_seed(0)
    moving = [a for a in leaves if a.requires_grad]
    grads = torch.autograd.grad(out, moving, torch.randn_like(out))
    return {"out": to_numpy(out)} | {f"d{i}": to_numpy(g) for i, g in enumerate(grads)}


def assert_same(fn, fast, args, dtype="float32"):
    want, got = results_and_gradients(fn, args), results_and_gradients(fast, args)
    verdict = compare(got, want, dtype, 64, gradients=[n for n in want if n != "out"])
    assert verdict.passed, verdict.summary()


@pytest.mark.parametrize("spelling", TABLE, ids=lambda s: s.fn.__name__)
def test_spelling(spelling):
    args = spelling.args()
    fast = kpt_torch.optimize(spelling.fn)
    plan = fast.plan(*args)
    assert [s.op for s in plan.sites] == [op for op, _ in spelling.sites], plan.explain()
    for found, (_, expect) in zip(plan.sites, spelling.sites, strict=True):
        assert agrees(found, expect), plan.explain()
        assert found.error is not None and found.error_gradient is not None
    assert_same(spelling.fn, fast, args)


@pytest.mark.parametrize("spelling", ONE_CALL, ids=lambda s: s.fn.__name__)
def test_what_is_one_call_already_is_left_alone(spelling):
    args = spelling.args()
    plan = kpt_torch.plan(spelling.fn, *args)
    assert plan.sites == ()
    assert [s.op for s in plan.skipped] == [spelling.sites[0][0]], plan.explain()
    assert "one call of" in plan.skipped[0].reason


@pytest.mark.parametrize("name", ["masked_fill", "grouped_by_expand", "rms_as_in_llama", "shifted_with_ignored_labels"])
def test_in_bfloat16(name):
    spelling = next(s for s in TABLE if s.fn.__name__ == name)
    args = spelling.args(torch.bfloat16)
    fast = kpt_torch.optimize(spelling.fn)
    assert [s.op for s in fast.plan(*args).sites] == [op for op, _ in spelling.sites], fast.explain(*args)
    assert_same(spelling.fn, fast, args, "bfloat16")
