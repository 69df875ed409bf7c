"""rms_norm and layer_norm for TPU without one: interpreted against float64, lowered, under transformations, and what they refuse."""

from __future__ import annotations

import pytest

from kpt.errors import KernelError
from pallas_kernels import tensorcore
from pallas_kernels.norm_blocks import RowBlocks
from tests.jax.certified import specs_of
from tests.jax.tpu import CHIPS, agrees, lowers, needs_pallas_tpu, refused, under_transformations

pytestmark = needs_pallas_tpu
SMALL = {"blocks": RowBlocks(16)}


def rows(dtype, *shape, names=(), residual=False):
    more = {"residual": shape} if residual else {}
    return specs_of(dtype, x=shape, **more, **{n: (shape[-1:], "float32") for n in names})


CASES = {
    "rms_norm, residual": ("rms_norm", rows("bfloat16", 3, 13, 40, names=("weight",), residual=True), SMALL | {"weight_offset": 1.0}),
    "layer_norm": ("layer_norm", rows("bfloat16", 40, 130, names=("weight", "bias")), SMALL),
}
MORE = {
    "layer_norm, residual": (
        "layer_norm",
        rows("float32", 40, 130, names=("bias",), residual=True),
        {"eps": 1e-3, "out_dtype": "bfloat16"},
    ),
    "layer_norm, one row": ("layer_norm", rows("float32", 7), {}),
    "rms_norm": ("rms_norm", rows("bfloat16", 5, 3), {"out_dtype": "float32"}),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c == "layer_norm" else [pytest.mark.slow]) for c in CASES])
def test_agrees_with_float64_on_two_cores(case, monkeypatch):
    monkeypatch.setattr(tensorcore, "generation", lambda: tensorcore.V5P)
    agrees(*CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_agrees_with_float64(case):
    agrees(*MORE[case])


LARGE = {
    "rms_norm": ("rms_norm", rows("bfloat16", 8, 4096, 4096, names=("weight",), residual=True), {}),
    "layer_norm": ("layer_norm", rows("float32", 1000, 2880, names=("weight", "bias")), {}),
}


@CHIPS
@pytest.mark.parametrize("case", LARGE)
def test_lowers_for_tpu_in_both_passes(case, chip):
    assert lowers(*LARGE[case], chip=chip) == 2


def test_transformations():
    under_transformations("layer_norm", rows("bfloat16", 5, 40, names=("weight", "bias")), {}, shared=("weight", "bias"))


def test_blocks_that_cannot_be():
    name, specs, _ = LARGE["rms_norm"]
    with pytest.raises(KernelError, match="multiples of 16"):
        RowBlocks(8)
    with pytest.raises(KernelError, match="671088640 bytes of VMEM"):
        lowers(name, specs, {"blocks": RowBlocks(4096)})


@pytest.mark.parametrize(
    ("specs", "why"),
    [
        (rows("bfloat16", 2, 1_000_000), "640040960 bytes of 100663296"),
        (rows("bfloat16", 0, 40), "empty"),
        (specs_of("bfloat16", x=(2, 40), residual=((2, 40), "float32")), "one dtype"),
    ],
)
def test_refused(specs, why):
    assert why in refused("rms_norm", specs, {})
