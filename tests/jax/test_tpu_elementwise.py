"""rope and cross_entropy for TPU without one: interpreted against float64, lowered, under transformations, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

import kpt
from kpt.errors import KernelError
from kpt.ops import Spec
from pallas_kernels.cross_entropy import tpu as loss
from pallas_kernels.rope import tpu as turn
from tests.jax.certified import specs_of
from tests.jax.tpu import CHIPS, agrees, interpreted, lowers, needs_pallas_tpu, refused, under_transformations

pytestmark = needs_pallas_tpu


def turned(dtype="bfloat16", b=2, t=20, n=2, h=64, r=64, tables=1):
    return specs_of(dtype, x=(b, t, n, h), cos=((tables, t, r), "float32"), sin=((tables, t, r), "float32"))


def losses(dtype="bfloat16", rows=(130,), classes=200):
    return specs_of(dtype, logits=(*rows, classes)) | {"labels": Spec(rows, "int32")}


CASES = {
    "rope": ("rope", turned(), {"blocks": turn.Blocks(16)}),
    "cross_entropy": ("cross_entropy", losses(), {"blocks": loss.Blocks(128, 128), "label_smoothing": 0.1}),
}
MORE = {
    "rope, interleaved": ("rope", turned("float32", h=128, r=128, tables=2), {"interleaved": True}),
    "rope, part of the head": ("rope", turned(n=4, h=32, r=20), {"out_dtype": "float32"}),
    "cross_entropy, cap": ("cross_entropy", losses("float32", (2, 3), 7), {"logits_soft_cap": 5.0, "invalid": "drop"}),
    "cross_entropy, one row": ("cross_entropy", losses("float32", (), 300), {"invalid": "clip"}),
}


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_float64(case):
    agrees(*CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_more_agree_with_float64(case):
    agrees(*MORE[case])


@pytest.mark.slow
@pytest.mark.parametrize("invalid", ["nan", "zero", "clip", "drop"])
def test_labels_outside_and_infinities(invalid):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((6, 200), np.float32)
    logits[0, 3], logits[1, 3], logits[2, :], logits[3, 7] = np.inf, -np.inf, -np.inf, np.nan
    labels = np.array([5, 5, 5, 5, -1, 200], np.int32)
    (exact,) = kpt.ops.op("cross_entropy").reference(logits=logits, labels=labels, invalid=invalid)
    with interpreted():
        got = loss.cross_entropy(logits=logits, labels=labels, invalid=invalid, blocks=loss.Blocks(128, 128))
    np.testing.assert_allclose(got, exact, rtol=1e-6)


LARGE = {
    "rope": ("rope", turned("bfloat16", 4, 4096, 32, 128, 128), {}, 2),
    "cross_entropy": ("cross_entropy", losses("bfloat16", (8192,), 128256), {}, 1),
}


@CHIPS
@pytest.mark.parametrize("case", LARGE)
def test_lowers_for_tpu_in_both_passes(case, chip):
    *call, kernels = LARGE[case]
    assert lowers(*call, chip=chip) == kernels


@pytest.mark.slow
@pytest.mark.parametrize("case", ["rope, interleaved", "cross_entropy, cap"])
def test_transformations(case):
    under_transformations(*MORE[case])


def test_blocks_that_cannot_be():
    with pytest.raises(KernelError, match="bytes of VMEM"):
        lowers(*LARGE["rope"][:2], {"blocks": turn.Blocks(4096)})
    with pytest.raises(KernelError, match="bytes of VMEM"):
        lowers(*LARGE["cross_entropy"][:2], {"blocks": loss.Blocks(8192, 8192)})


@pytest.mark.parametrize(
    ("name", "specs", "why"),
    [
        ("rope", turned(h=80, r=80), "do not fill"),
        ("rope", turned(n=1), "do not fill"),
        ("rope", turned(r=0), "empty"),
        ("rope", turned(n=4096, h=128, r=128), "holds 16 positions"),
        ("cross_entropy", losses(rows=(0,)), "empty"),
    ],
)
def test_refused(name, specs, why):
    assert why in refused(name, specs, {})
