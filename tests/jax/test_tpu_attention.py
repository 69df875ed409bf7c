"""attention for TPU without one: interpreted against float64, lowered, under transformations, and what it refuses."""

from __future__ import annotations

from unittest import mock

import pytest

from kpt.errors import KernelError
from kpt.ops.mask import Bias, Causal, Lengths, Mask, Segments, Window
from pallas_kernels.attention import tpu
from pallas_kernels.attention.tpu import Blocks
from tests.jax.certified import specs_of
from tests.jax.tpu import CHIPS, agrees, lowers, needs_pallas_tpu, refused, under_transformations

pytestmark = needs_pallas_tpu
SMALL = {"blocks": Blocks(128, 128, 128, 128)}
CAUSAL = Mask((Causal(),))


def arrays(dtype="bfloat16", t=200, s=200, heads=2, kv=1, h=40, hv=None, b=1, ids=False, lengths=False):
    more = {"q_segment_ids": ((b, t), "int32"), "kv_segment_ids": ((b, s), "int32")} if ids else {}
    more |= {"kv_lengths": ((b,), "int32")} if lengths else {}
    return specs_of(dtype, q=(b, t, heads, h), k=(b, s, kv, h), v=(b, s, kv, hv or h), **more)


CASES = {
    "causal, grouped": ("attention", arrays(), SMALL | {"mask": CAUSAL}),
    "segments and lengths, soft cap": (
        "attention",
        arrays("float32", t=20, s=150, heads=1, b=2, hv=16, ids=True, lengths=True),
        SMALL | {"mask": Mask((Segments(), Lengths()), -1e30), "logits_soft_cap": 5.0},
    ),
}
MORE = {
    "full": ("attention", arrays("float32", t=130, s=70, h=3, hv=5), {"scale": 0.3, "out_dtype": "bfloat16"}),
    "one": ("attention", arrays(t=1, s=1, heads=1, h=1), {}),
    "window": ("attention", arrays(t=300, s=300), SMALL | {"mask": Mask((Window(20, 3),))}),
    "sees none, finite": ("attention", arrays(t=300, s=200), SMALL | {"mask": Mask((Causal(-140),), -1e30)}),
    "sees none, NaN": ("attention", arrays(t=300, s=200, kv=2), SMALL | {"mask": Mask((Window(10, -3),))}),
    "causal lengths": ("attention", arrays(b=2, lengths=True), SMALL | {"mask": Mask((Causal(), Lengths()))}),
}  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c == "causal, grouped" else [pytest.mark.slow]) for c in CASES])
def test_agrees_with_float64(case):
    agrees(*CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_more_agree_with_float64(case):
    agrees(*MORE[case])


LARGE = {
    "causal": ("attention", arrays(t=4096, s=4096, heads=32, kv=8, h=128, b=4), {"mask": CAUSAL}),
    "packed": ("attention", arrays(t=3000, s=5000, h=64, ids=True, lengths=True), {"mask": Mask((Segments(), Lengths()))}),
    "float32": ("attention", arrays("float32", t=2048, s=2048, h=256), {"logits_soft_cap": 30.0}),
}


@CHIPS
@pytest.mark.parametrize("case", LARGE)
def test_lowers_for_tpu_in_both_passes(case, chip):
    fused = chip != "TPU v4"  # dq of all rows is summed in VMEM, if it fits
    assert lowers(*LARGE[case], chip=chip) == 2 + (not fused)


@pytest.mark.slow
def test_a_backward_pass_in_two_calls():
    name, specs, params = CASES["causal, grouped"]
    with mock.patch.object(tpu, "budget", lambda: tpu._need(params["blocks"], 40, 40, "bfloat16")):
        assert lowers(name, specs, params) == 3
        agrees(name, specs, params)


@pytest.mark.slow
def test_transformations():
    under_transformations("attention", arrays(b=2, t=20, s=30, lengths=True), {"mask": Mask((Causal(), Lengths()))})


def test_blocks_that_cannot_be():
    with pytest.raises(KernelError, match="multiples of 128"):
        Blocks(64, 128, 128, 128)
    name, specs, params = LARGE["causal"]
    with pytest.raises(KernelError, match="bytes of VMEM"):
        lowers(name, specs, params | {"blocks": Blocks(1 << 15, 1 << 14, 128, 128)})


@pytest.mark.parametrize(
    ("specs", "params", "why"),
    [
        (arrays(), {"mask": Mask((Causal(),), -1e4)}, "may have some"),
        (arrays(), {"mask": Mask((Causal(),), -1e9, True)}, "adds to them"),
        (arrays(), {"mask": Mask((Bias(),))}, "bias masks"),
        (arrays(t=0), {}, "empty"),
        (specs_of("bfloat16", q=(1, 2, 1, 8), k=(1, 2, 1, 8), v=((1, 2, 1, 8), "float32")), {}, "one dtype"),
        (arrays(t=400_000, s=400_000), {}, "integers on blocks"),
        (arrays(h=1 << 16), {}, "holds 128 queries"),
    ],
)
def test_refused(specs, params, why):
    assert why in refused("attention", specs, params)


def test_lists_that_scalar_memory_does_not_hold_are_refused_before_anything_is_compiled():
    import jax

    q = jax.ShapeDtypeStruct((1, 65536, 1, 64), "bfloat16")
    with pytest.raises(KernelError, match="bytes of scalar memory"):
        jax.eval_shape(lambda a: tpu.attention(q=a, k=a, v=a, **SMALL), q)


@pytest.mark.parametrize(("batch", "row_blocks", "key_blocks", "held"), [(9, 122, 122, 16), (5, 85, 257, 8), (3, 53, 529, 4)])
def test_rows_of_scalar_memory_come_in_whole_tiles(batch, row_blocks, key_blocks, held):
    """libtpu found 1,195,377 of 1,048,576 bytes for the first of these, and 3,686 too many for the second."""
    q, k = (specs_of("bfloat16", a=(batch, n * 128, 1, 128))["a"] for n in (row_blocks, key_blocks))
    count = tpu._integers(SMALL["blocks"], q, k, Mask((Lengths(),)))
    assert count == (4 + held) * row_blocks * key_blocks and (count > tpu.MOST_INTEGERS) == (batch != 3)


@pytest.mark.parametrize("term", [Segments(), Lengths()])
def test_a_mask_without_its_arrays(term):
    import jax

    q = jax.ShapeDtypeStruct((1, 128, 1, 64), "bfloat16")
    with pytest.raises(KernelError, match="not given"):
        jax.eval_shape(lambda a: tpu.attention(q=a, k=a, v=a, mask=Mask((term,))), q)
