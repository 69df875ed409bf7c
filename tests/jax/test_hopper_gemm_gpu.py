"""The kernels for Hopper that multiply, on one: against float64 at fixed and at random shapes, forward and in every gradient; equal bits."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from kpt.ops.activations import ACTIVATIONS
from tests.jax.certified import certify
from tests.jax.test_hopper_gemm import gated, head, kernel_of, linear, meaning_of, product

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_hopper")]


@pytest.fixture
def as_large(monkeypatch):
    """Small calls go the way of large ones: several chunks of tokens, and a gradient of x by a kernel."""
    monkeypatch.setattr("pallas_kernels.hopper_gemm.FEWEST", 1)
    monkeypatch.setattr("pallas_kernels.linear_cross_entropy.gpu.CHUNK_BYTES", 2**20)


ALL = {"label_smoothing": 0.1, "logits_soft_cap": 5.0, "invalid": "drop"}
FIXED = {
    "linear_act": ("linear_act", linear(m=1000, k=1088, n=2112), {}),
    "linear_act float16, batch, no bias": ("linear_act", linear("float16", 264, 512, 4096, False, (2,)), {"activation": "silu"}),
    "glu": ("glu", gated(m=1000, k=1088, n=2112), {}),
    "glu float16, biases": ("glu", gated("float16", 520, 512, 4032, b_gate=(4032,), b_up=(4032,)), {"activation": "gelu"}),
    "glu, dx in one product": ("glu", gated(m=2048, k=1088, n=576), {}),
    "glu_linear": ("glu_linear", gated(m=1000, k=1088, n=2112, w_down=(2112, 1088)), {}),
    "glu_linear float16, biases": (
        "glu_linear",
        gated("float16", 2048, 512, 4032, b_gate=(4032,), b_up=(4032,), w_down=(4032, 576)),
        {"activation": "gelu"},
    ),
    "glu_linear, 64 columns": ("glu_linear", gated(m=8192, k=64, n=64, w_down=(64, 320)), {}),
    "glu_linear, one row of tiles": ("glu_linear", gated(m=72, k=128, n=16448, w_down=(16448, 64)), {"activation": "gelu_tanh"}),
    "matmul": ("matmul", product(m=1000, k=1088, n=2112), {}),
    "matmul float16": ("matmul", product("float16", 2048, 2048, 512), {}),
    "linear_cross_entropy": ("linear_cross_entropy", head(tokens=1000, k=512, classes=4992), {}),
    "linear_cross_entropy float16, all": (
        "linear_cross_entropy",
        head("float16", 520, 512, 5056, b=(5056,), weights=((520,), "float32")),
        ALL,
    ),
    "linear_cross_entropy odd": ("linear_cross_entropy", head(tokens=77, k=100, classes=5003, b=((5003,), "float32")), ALL),
} | {f"linear_act {a}": ("linear_act", linear(m=136, k=128, n=1088), {"activation": a}) for a in ACTIVATIONS}
FIXED |= {f"glu_linear {a}": ("glu_linear", gated("float16", 136, 128, 8256, w_down=(8256, 64)), {"activation": a}) for a in ACTIVATIONS}


@pytest.mark.parametrize("case", FIXED)
def test_agrees_with_float64(case):
    name, specs, params = FIXED[case]
    certify(meaning_of(name), specs, params, fn=kernel_of(name), seeds=(0,))


@pytest.mark.parametrize("case", ["linear_cross_entropy", "linear_cross_entropy float16, all"])
def test_chunks_agree_with_float64(case, as_large):
    test_agrees_with_float64(case)


@pytest.mark.parametrize("case", ["linear_act", "glu", "glu_linear", "matmul", "linear_cross_entropy"])
def test_equal_inputs_give_equal_bits(case, as_large):
    name, specs, params = FIXED[case]
    arrays = meaning_of(name).sample(np.random.default_rng(0), specs, **params)
    fixed = {n: a for n, a in arrays.items() if n == "labels"}

    @jax.jit
    def step(moving):
        out, pull = jax.vjp(lambda d: kernel_of(name)(**d, **fixed, **params), moving)
        return out, pull(out)

    moving = {n: a for n, a in arrays.items() if n not in fixed}
    first = jax.device_get(step(moving))
    for _ in range(5):
        jax.tree.map(np.testing.assert_array_equal, first, jax.device_get(step(moving)))


@pytest.mark.parametrize("case", ["linear_act", "glu", "matmul"])
def test_every_tiling_gives_the_same_bits(case):
    from pallas_kernels.hopper_gemm import BED

    name, specs, params = FIXED[case]
    arrays = meaning_of(name).sample(np.random.default_rng(0), specs, **params)
    takes = [t for t in BED if t.takes(2 if name == "glu" else 1)]
    first, *others = (jax.device_get(jax.jit(lambda a, t=t: kernel_of(name)(**a, **params, tiles=t))(arrays)) for t in takes)
    for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("name", ["linear_act", "glu", "glu_linear", "matmul", "linear_cross_entropy"])
@pytest.mark.parametrize("seed", range(20))
def test_random_calls(name, seed, as_large):
    """Ten a seed, 200 an op: any multiple of 8 rows and of 64 columns."""
    rng = np.random.default_rng(seed)
    for _ in range(10):
        m, k, n = 8 * int(rng.integers(1, 200)), 64 * int(rng.integers(1, 20)), 64 * int(rng.integers(1, 40))
        dtype, bias = str(rng.choice(["bfloat16", "float16"])), bool(rng.integers(2))
        params = {} if name in ("matmul", "linear_cross_entropy") else {"activation": str(rng.choice(list(ACTIVATIONS)))}
        specs = {
            "linear_act": linear(dtype, m, k, n, bias),
            "glu": gated(dtype, m, k, n, **({"b_gate": (n,), "b_up": (n,)} if bias else {})),
            "glu_linear": gated(dtype, m, k, n, w_down=(n, k), **({"b_gate": (n,), "b_up": (n,)} if bias else {})),
            "matmul": product(dtype, m, k, n),
            "linear_cross_entropy": head(dtype, m, k, n + 1024, **({"b": (n + 1024,)} if bias else {})),
        }[name]
        certify(meaning_of(name), specs, params, fn=kernel_of(name), seeds=(int(rng.integers(1 << 30)),))
