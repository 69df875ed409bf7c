"""The row kernels and cuDNN's attention on a Hopper GPU: against float64 at fixed and at random shapes; equal bits where promised."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import kpt
from kpt.hardware import hardware_profile
from kpt.kernels.spec import refusal
from kpt.ops import Spec, op
from kpt.ops.mask import Causal, Lengths, Mask, Window
from tests.cases import CASES
from tests.jax.certified import certify, specs_of
from tests.jax.test_hopper_rows import pair_and_two_calls, queries_and_keys

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_hopper")]
KERNELS = ("layer_norm.pallas_gpu", "rms_norm.pallas_gpu", "layer_norm.pallas_gpu_wide", "rms_norm.pallas_gpu_wide",
           "cross_entropy.pallas_gpu", "rope.pallas_gpu", "rope.pallas_gpu_interleaved", "attention.cudnn",
           "attention.cudnn_wide")  # fmt: skip

ROWS, WIDE = (512, 1000, 1024, 1111, 2880, 4096, 5120, 9000, 16000), (16392, 20000, 32768, 40960, 50264, 65536)


def rows(dtype, n, width, *names):
    return specs_of(dtype, x=(n, width), residual=(n, width), **{a: ((width,), "float32") for a in names})


def turned(dtype, n, h, r):
    return specs_of(dtype, x=(2, 300, n, h), cos=((1, 300, r), "float32"), sin=((1, 300, r), "float32"))


def attended(dtype="bfloat16", t=256, s=256, h=64, **more):
    return specs_of(dtype, q=(2, t, 4, h), k=(2, s, 2, h), v=(2, s, 2, h), **more)


FIXED = {
    f"layer_norm {width} {dtype}": ("layer_norm.pallas_gpu", rows(dtype, n, width, "weight", "bias"), {})
    for n, width, dtype in (
        (300, 4096, "bfloat16"), (300, 8192, "float16"), (30, 16384, "bfloat16"), (30, 12345, "float32"))
} | {
    "rms_norm 2880": ("rms_norm.pallas_gpu", rows("bfloat16", 300, 2880, "weight"), {"weight_offset": 1.0}),
    "rms_norm 16384": ("rms_norm.pallas_gpu", rows("float16", 30, 16384, "weight"), {}),
    "layer_norm 65536": ("layer_norm.pallas_gpu_wide", rows("bfloat16", 300, 65536, "weight", "bias"), {}),
    "rms_norm 20000": ("rms_norm.pallas_gpu_wide", rows("float32", 30, 20000, "weight"), {}),
    "cross_entropy 128256": ("cross_entropy.pallas_gpu", specs_of("bfloat16", logits=(8, 128256), labels=((8,), "int32")), {}),
    "cross_entropy 50257": ("cross_entropy.pallas_gpu", specs_of("float32", logits=(8, 50257), labels=((8,), "int32")), {}),
    "rope": ("rope.pallas_gpu", turned("bfloat16", 17, 128, 128), {}),
    "rope, neighbours": ("rope.pallas_gpu_interleaved", turned("bfloat16", 32, 128, 128), {"interleaved": True}),
    "rope, neighbours, float32": ("rope.pallas_gpu_interleaved", turned("float32", 3, 96, 64), {"interleaved": True}),
    "rope, a part of the head": ("rope.pallas_gpu", turned("float16", 28, 80, 32), {}),
    "cudnn causal, cross": ("attention.cudnn", attended(t=128), {"mask": Mask((Causal(),))}),
    "cudnn window": ("attention.cudnn", attended(t=300, s=300), {"mask": Mask((Causal(), Window(50, None)))}),
    "cudnn lengths": ("attention.cudnn", attended(kv_lengths=((2,), "int32")), {"mask": Mask((Lengths(),), -1e9)}),
    "cudnn 256": ("attention.cudnn_wide", attended("float16", h=256), {"mask": Mask((Causal(),))}),
}


@pytest.mark.parametrize("case", FIXED)
def test_agrees_with_float64(case):
    kernel, specs, params = FIXED[case]
    certify(kpt.registry.get(kernel).op, specs, params, fn=kpt.registry.load(kernel))


def _wider(rng: np.random.Generator, kernel: str):
    """A random call, with rows long enough for a warpgroup and even lengths of sequences."""
    case = CASES[kpt.registry.get(kernel).op](rng)
    width, rest = int(rng.choice(WIDE if kernel.endswith("gpu_wide") else ROWS)), int(rng.integers(1, 30))
    head = 8 * int(rng.integers(17, 33) if kernel == "attention.cudnn_wide" else rng.integers(1, 17))
    specs, times = {}, int(rng.choice([1, 4, 8]))
    for name, spec in case.specs.items():
        shape = spec.shape
        if case.op == "rope":
            shape = (*shape[:-1], times * shape[-1])
        elif name in ("x", "residual"):
            shape = (rest, width)
        elif name in ("weight", "bias") and len(shape) == 1:
            shape = (width,)
        elif name in ("logits", "labels"):
            shape = (rest, width + 512)[: 2 if name == "logits" else 1]
        elif name in ("q", "k", "v"):
            shape = (shape[0], shape[1] + shape[1] % 2, shape[2], head)
        specs[name] = Spec(shape, spec.dtype)
    return specs, case.params


def _draw(rng: np.random.Generator, kernel: str):
    while True:
        specs, params = _wider(rng, kernel)
        spec = kpt.registry.get(kernel)
        dtype = specs[op(spec.op).arrays[0]].dtype
        if not refusal(spec, spec.op, hardware_profile("h100-sxm"), dtype, specs, params, "balanced", "jax"):
            return specs, params


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("seed", range(20))
def test_random_calls(kernel, seed):
    """Ten a seed, 200 a kernel."""
    rng = np.random.default_rng(seed)
    for _ in range(10):
        specs, params = _draw(rng, kernel)
        certify(kpt.registry.get(kernel).op, specs, params, fn=kpt.registry.load(kernel), seeds=(int(rng.integers(1 << 30)),))


@pytest.mark.parametrize("case", ["layer_norm 4096 bfloat16", "layer_norm 8192 float16", "layer_norm 16384 bfloat16", "layer_norm 65536",
                                  "rms_norm 2880", "rms_norm 16384", "rms_norm 20000", "cross_entropy 128256",
                                  "rope", "rope, neighbours"])  # fmt: skip
def test_equal_inputs_give_equal_bits(case):
    kernel, specs, params = FIXED[case]
    name = kpt.registry.get(kernel).op
    arrays = op(name).sample(np.random.default_rng(0), specs, **params)
    fixed = {n: a for n, a in arrays.items() if n == "labels"}

    @jax.jit
    def step(moving):
        out, pull = jax.vjp(lambda d: kpt.registry.load(kernel)(**d, **fixed, **params), moving)
        return out, pull(out)

    moving = {n: a for n, a in arrays.items() if n not in fixed}
    first = jax.device_get(step(moving))
    for _ in range(5):
        jax.tree.map(np.testing.assert_array_equal, first, jax.device_get(step(moving)))


@pytest.mark.parametrize("params", [{}, {"interleaved": True}], ids=str)
@pytest.mark.parametrize("heads", [(32, 8), (16, 16), (17, 1)], ids=str)
def test_two_arrays_by_one_launch_have_the_bits_of_two(heads, params):
    n, k = heads
    jax.tree.map(np.testing.assert_array_equal, *pair_and_two_calls(queries_and_keys(t=300, n=n, k=k, h=128, r=128), params))
