"""linear_cross_entropy for TPU without one: interpreted against float64, lowered, under transformations, and what it refuses."""

from __future__ import annotations

import pytest

from kpt.errors import KernelError
from kpt.ops import Spec
from pallas_kernels.linear_cross_entropy.tpu import Blocks
from tests.jax.certified import specs_of
from tests.jax.tpu import CHIPS, agrees, lowers, needs_pallas_tpu, refused, under_transformations

pytestmark = needs_pallas_tpu
SMALL = {"blocks": Blocks(128, 128)}


def tokens(dtype="bfloat16", rows=(130,), inputs=24, classes=200, **more):
    return specs_of(dtype, x=(*rows, inputs), w=(inputs, classes), **more) | {"labels": Spec(rows, "int32")}


CASES = {"nothing divides": (tokens(b=(200,), weights=((130,), "float32")), SMALL | {"label_smoothing": 0.1})}
MORE = {
    "float32, cap": (tokens("float32", (2, 3), 5, 7), {"logits_soft_cap": 5.0, "invalid": "drop"}),
    "blocks divide": (tokens("float32", (256,), 128, 256), SMALL | {"invalid": "clip"}),
    "one token": (tokens(rows=(), classes=1000), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_float64(case):
    agrees("linear_cross_entropy", *CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_more_agree_with_float64(case):
    agrees("linear_cross_entropy", *MORE[case])


LARGE = tokens(rows=(8192,), inputs=4096, classes=128256)


@CHIPS
def test_lowers_for_tpu_in_both_passes(chip):
    assert lowers("linear_cross_entropy", LARGE, {}, chip=chip) == 3


@pytest.mark.slow
def test_transformations():
    under_transformations("linear_cross_entropy", *MORE["float32, cap"], shared=("w",))


def test_blocks_that_cannot_be():
    with pytest.raises(KernelError, match="bytes of VMEM"):
        lowers("linear_cross_entropy", LARGE, {"blocks": Blocks(2048, 2048)})


def test_refused():
    assert "100000 take" in refused("linear_cross_entropy", tokens(inputs=100_000), {})
