"""matmul, linear_act and glu for TPU without one: interpreted against float64, lowered, under transformations, and what they refuse."""

from __future__ import annotations

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpt
from kpt.errors import KernelError, OpError
from kpt.ops import Spec, op
from kpt.ops.activations import ACTIVATIONS
from kpt.validation import tolerance
from pallas_kernels import tensorcore
from pallas_kernels.linear_act.tpu import IN_KERNEL
from pallas_kernels.matmul.tpu import Blocks, matmul
from tests.jax.certified import specs_of
from tests.jax.tpu import CHIPS, agrees, interpreted, kernel, lowers, needs_pallas_tpu, refused, under_transformations

pytestmark = needs_pallas_tpu
SMALL = {"blocks": Blocks(128, 128, 128)}
F32 = "float32"
CASES = {
    "matmul, nothing divides": ("matmul", specs_of("bfloat16", a=(130, 200), b=(200, 9)), SMALL | {"out_dtype": F32}),
    "linear_act": ("linear_act", specs_of("bfloat16", x=(5, 27, 40), w=(40, 12), b=((12,), F32)), SMALL),
    "glu": ("glu", specs_of("bfloat16", x=(5, 13, 200), w_gate=(200, 12), w_up=(200, 12), b_up=(12,)), SMALL),
}
MORE = {
    "matmul": ("matmul", specs_of("bfloat16", a=(256, 384), b=(384, 256)), SMALL),
    "matmul, float32": ("matmul", specs_of(F32, a=(130, 200), b=(200, 131)), SMALL),
    "matmul, tiny": ("matmul", specs_of("bfloat16", a=(1, 3), b=(3, 5)), {}),
    "matmul, two dtypes": ("matmul", specs_of("bfloat16", a=(17, 20), b=((20, 33), F32)), {}),
    "linear_act, identity": ("linear_act", specs_of(F32, x=(20,), w=(20, 130)), {"activation": "identity"}),
    "linear_act, silu": ("linear_act", specs_of("bfloat16", x=(9, 20), w=(20, 12)), {"activation": "silu"}),
    "glu, biases": ("glu", specs_of(F32, x=(9, 20), w_gate=(20, 12), w_up=(20, 12), b_gate=(12,), b_up=(12,)), {"activation": "gelu"}),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c == "matmul, nothing divides" else [pytest.mark.slow]) for c in CASES])
def test_agrees_with_float64(case):
    agrees(*CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_more_agree_with_float64(case):
    agrees(*MORE[case])


def test_int8_is_exact():
    specs = specs_of("int8", a=(70, 300), b=(300, 150))
    arrays = op("matmul").sample(np.random.default_rng(0), specs)
    arrays["a"][0], arrays["b"][:, 0] = -128, -128  # the largest sum
    (expected,) = op("matmul").reference(**arrays)
    assert op("matmul").infer(specs) == (Spec((70, 150), "int32"),)
    with interpreted():
        got = kernel("matmul")(**arrays, **SMALL)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(kpt.registry.load("matmul.xla")(**arrays), expected)
    assert refused("matmul", specs, {}) is None
    for chip in (tensorcore.V4, tensorcore.V7X):
        with mock.patch.object(tensorcore, "generation", lambda chip=chip: chip):
            assert f"int8 on {chip.name}" in refused("matmul", specs, {})
    with pytest.raises(OpError, match="int32"):
        op("matmul").infer(specs, out_dtype="float32")
    with pytest.raises(OpError, match="It takes"):
        op("matmul").infer(specs | {"b": Spec((300, 150), "float32")})


@pytest.mark.tpu
def test_int8_is_compiled_for_every_generation_that_multiplies_it():
    from kpt.tpu import GENERATIONS
    from kpt_jax.tpu import compile_programs
    from kpt_jax.tpu_programs import program

    on = [g for g in GENERATIONS.values() if tensorcore.DEVICE_KINDS[g.kind].int8]
    made = compile_programs([program("matmul", (1024, 4096, 1024), dtype="int8", passes="forward")], on, schedules=False)
    assert [(m.generation, m.error) for m in made] == [("v5e", None), ("v5p", None), ("v6e", None)]


@pytest.mark.parametrize("activation", IN_KERNEL)
def test_activations_that_mosaic_takes(activation):
    x = np.linspace(-12, 12, 2001).astype(np.float32)
    exact = ACTIVATIONS[activation][0](x.astype(np.float64))
    # A small result may be the difference of terms as large as x.
    allowed = tolerance(F32, 1).allowed_max(np.abs(exact).max(), 12.0)
    np.testing.assert_allclose(IN_KERNEL[activation](jnp.asarray(x)), exact, rtol=0, atol=allowed)


@pytest.mark.parametrize("activation", IN_KERNEL)
def test_infinities(activation):
    x = np.array([-np.inf, np.inf, np.nan], np.float32)
    with np.errstate(all="ignore"):
        exact = ACTIVATIONS[activation][0](x.astype(np.float64))
    np.testing.assert_array_equal(IN_KERNEL[activation](jnp.asarray(x)), exact)


LARGE = {
    "matmul": ("matmul", specs_of("bfloat16", a=(4096, 4096), b=(4096, 4096)), {}),
    "matmul, float32": ("matmul", specs_of(F32, a=(4096, 1000), b=(1000, 4096)), {}),
    "glu": ("glu", specs_of("bfloat16", x=(8, 1024, 4096), w_gate=(4096, 14336), w_up=(4096, 14336)), {}),
} | {a: ("linear_act", specs_of("bfloat16", x=(4096, 1024), w=(1024, 4096), b=(4096,)), {"activation": a}) for a in IN_KERNEL}


@CHIPS
@pytest.mark.parametrize("case", LARGE)
def test_lowers_for_tpu_in_both_passes(case, chip):
    assert lowers(*LARGE[case], chip=chip) == 3


@pytest.mark.slow
@pytest.mark.parametrize("case", ["matmul, tiny", "linear_act, silu", "glu, biases"])
def test_transformations(case):
    name, specs, params = MORE[case]
    first = next(iter(specs))
    under_transformations(name, specs, params, shared=[n for n in specs if n != first])


@pytest.mark.parametrize(
    ("size", "why"), [(100, "multiples of 128"), (0, "multiples of 128"), (16384, "bytes of VMEM. A kernel on tpu-v5e has 100663296")]
)
def test_blocks_that_cannot_be(size, why):
    specs = specs_of("bfloat16", a=(16384, 16384), b=(16384, 16384))
    with pytest.raises(KernelError, match=why):
        lowers("matmul", specs, {"blocks": Blocks(size, size, size)}, fn=matmul)


@pytest.mark.parametrize(
    ("specs", "params", "why"),
    [
        (specs_of("bfloat16", a=(0, 3), b=(3, 5)), {}, "empty"),
        (specs_of("bfloat16", a=(2, 3), b=((3, 5), "float16")), {}, "there is float16"),
        (specs_of("bfloat16", a=(2, 3), b=(3, 5)), {"out_dtype": "float64"}, "there is float64"),
        (specs_of("float16", a=(2, 3), b=(3, 5)), {}, "computes in"),
    ],
)
def test_refused(specs, params, why):
    assert why in refused("matmul", specs, params)


def test_refused_where_xla_may_partition(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert "shard_map" in refused("matmul", MORE["matmul"][1], {})
