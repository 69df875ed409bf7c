"""ragged_matmul for TPU without one: interpreted against float64, lowered, under transformations, and what it refuses."""

from __future__ import annotations

import pytest

from kpt.errors import KernelError
from kpt.ops import Spec
from pallas_kernels.matmul.tpu import Blocks
from tests.jax.certified import specs_of
from tests.jax.tpu import CHIPS, agrees, lowers, needs_pallas_tpu, refused, under_transformations

pytestmark = needs_pallas_tpu
SMALL = {"blocks": Blocks(128, 128, 128)}


def ragged(dtype="bfloat16", rows=200, inputs=24, outputs=40, groups=3):
    return specs_of(dtype, x=(rows, inputs), w=(groups, inputs, outputs)) | {"group_sizes": Spec((groups,), "int32")}


CASES = {"two blocks": (ragged(), SMALL)}
MORE = {
    "nothing divides": (ragged("float32", 300, 200, 130, 4), SMALL),
    "more groups than rows": (ragged(rows=5, groups=9), {"out_dtype": "float32"}),
    "one group": (ragged("float32", 7, 3, 5, 1), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_float64(case):
    agrees("ragged_matmul", *CASES[case], seeds=(0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_more_agree_with_float64(case):
    agrees("ragged_matmul", *MORE[case], seeds=(0, 1, 2))


LARGE = {"bfloat16": ragged("bfloat16", 16384, 4096, 2048, 64), "float32": ragged("float32", 4096, 1000, 2048, 8)}


@CHIPS
@pytest.mark.parametrize("dtype", LARGE)
def test_lowers_for_tpu_in_both_passes(dtype, chip):
    assert lowers("ragged_matmul", LARGE[dtype], {}, chip=chip) == 3


@pytest.mark.slow
def test_transformations():
    under_transformations("ragged_matmul", *MORE["one group"], shared=("w",))


def test_blocks_that_cannot_be():
    with pytest.raises(KernelError, match="bytes of VMEM"):
        lowers("ragged_matmul", LARGE["bfloat16"], {"blocks": Blocks(4096, 4096, 4096)})


def test_blocks_whose_visits_scalar_memory_does_not_hold():
    with pytest.raises(KernelError, match="visits of groups"):
        lowers("ragged_matmul", ragged(rows=5_000_000), SMALL)


def test_the_default_blocks_of_two_dtypes_fit():
    """The cotangents have the wider one, which the product for x is made of."""
    specs = specs_of("float32", x=((4096, 1408), "bfloat16"), w=(4, 1408, 1408)) | {"group_sizes": Spec((4,), "int32")}
    assert lowers("ragged_matmul", specs, {}, chip="TPU7x") == 3


def test_refused():
    assert "lists at most" in refused("ragged_matmul", ragged(rows=17_000_000), {})
    assert refused("ragged_matmul", ragged(rows=16_000_000), {}) is None
    assert "empty" in refused("ragged_matmul", ragged(rows=0), {})
