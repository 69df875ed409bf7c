"""Attention for Hopper, on one: against float64 at fixed and at random shapes and masks, forward and in every gradient; equal bits."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import kpt
from kpt.ops import op
from kpt.ops.mask import Causal, Lengths, Mask, Segments, Window
from tests.jax.certified import certify
from tests.jax.test_hopper_attention import MASKS, attended

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_hopper")]
KERNEL = "attention.pallas_gpu"
FUZZED = 200
FUZZED_TO_256 = 50


SHAPES = {
    "128": {"t": 640},
    "64": {"t": 640, "h": 64, "dtype": "float16"},
    "96": {"t": 640, "h": 96},
    "odd": {"t": 1003, "h": 120, "hv": 80},
    "odd, to 96": {"t": 1003, "h": 96, "hv": 80, "dtype": "float16"},
    "96, multi query, other length": {"t": 300, "s": 1100, "n": 4, "k": 1, "h": 96},
    "multi query, other length": {"t": 300, "s": 1100, "n": 4, "k": 1, "h": 64},
    "short": {"t": 5, "h": 48},
    "as long as a tile": {"t": 128, "h": 64},
    "groups as one": {"b": 16, "t": 500, "n": 16, "k": 8},
    "groups in parts": {"b": 1, "t": 500, "n": 12, "k": 2},
    "256, groups in parts": {"b": 1, "t": 500, "n": 6, "k": 1, "h": 256},
    "256": {"t": 640, "h": 256},
    "odd, to 256": {"t": 1003, "h": 136, "hv": 208, "dtype": "float16"},
    "256, multi query, other length": {"t": 300, "s": 1100, "n": 4, "k": 1, "h": 256},
    "256, short": {"t": 5, "h": 232},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_float64(mask, shape):
    mask = MASKS[mask]
    certify("attention", attended(mask=mask, **SHAPES[shape]), {"mask": mask}, fn=kpt.registry.load(KERNEL), seeds=(0,))


@pytest.mark.parametrize(
    "params", [{"logits_soft_cap": 5.0}, {"scale": -0.1}, {"scale": 0.0}, {"out_dtype": "float16"}], ids=lambda p: next(iter(p))
)
@pytest.mark.parametrize("h", [96, 128, 256])
def test_parameters_agree_with_float64(params, h):
    params = {"mask": MASKS["causal"], **params}
    certify("attention", attended(t=520, h=h), params, fn=kpt.registry.load(KERNEL), seeds=(0,))


def drawn(rng, heads=(64, 96, 128), eighths=(1, 17)):
    """A shape and a mask; a head dim of `heads`, or eight times one of `eighths`."""
    terms = [t for t, chance in ((Causal(int(rng.integers(-20, 40))), 0.5), (Segments(), 0.3), (Lengths(), 0.3)) if rng.random() < chance]
    if rng.random() < 0.4:
        terms.append(Window(int(rng.integers(0, 300)), None if rng.random() < 0.5 else int(rng.integers(0, 300))))
    mask = Mask(tuple(terms), fill=float(rng.choice([-np.inf, -1e30])))
    t, k = int(rng.integers(1, 700)), int(rng.integers(1, 3))
    return mask, attended(
        str(rng.choice(["bfloat16", "float16"])), int(rng.integers(1, 3)), t, t if rng.random() < 0.6 else int(rng.integers(1, 700)),
        k * int(rng.integers(1, 4)), k, int(rng.choice([*heads, 8 * rng.integers(*eighths)])), mask=mask,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(FUZZED))
def test_random_shapes_and_masks_agree_with_float64(seed):
    mask, specs = drawn(np.random.default_rng(seed))
    certify("attention", specs, {"mask": mask}, fn=kpt.registry.load(KERNEL), seeds=(seed,))


@pytest.mark.parametrize("seed", range(FUZZED_TO_256))
def test_random_shapes_and_masks_of_wide_heads_agree_with_float64(seed):
    mask, specs = drawn(np.random.default_rng(seed), heads=(256,), eighths=(17, 33))
    certify("attention", specs, {"mask": mask}, fn=kpt.registry.load(KERNEL), seeds=(seed,))


@pytest.mark.parametrize("mask", ["causal", "segments"])
@pytest.mark.parametrize("h", [96, 128, 256])
def test_equal_inputs_give_equal_bits(mask, h):
    mask = MASKS[mask]
    arrays = op("attention").sample(np.random.default_rng(0), attended(t=1000, n=8, h=h, mask=mask), mask=mask)
    fixed = {n: a for n, a in arrays.items() if n not in "qkv"}

    @jax.jit
    def step(moving):
        out, pull = jax.vjp(lambda d: kpt.registry.load(KERNEL)(**d, **fixed, mask=mask), moving)
        return out, pull(out)

    moving = {n: arrays[n] for n in "qkv"}
    first = jax.device_get(step(moving))
    for _ in range(5):
        jax.tree.map(np.testing.assert_array_equal, first, jax.device_get(step(moving)))
