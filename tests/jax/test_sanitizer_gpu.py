"""NVIDIA's compute-sanitizer over calls of every kernel for Hopper, both passes: nothing read or written outside of an array.

`make test-gpu` runs them by themselves: beside other programs on the GPU the tool was seen to crash, and not to end.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import kpt
from kpt.kernels.spec import unmet
from kpt.kernels.stand_in import standing_for
from tests.jax import test_hopper_attention as attention
from tests.jax import test_hopper_gemm as gemm
from tests.jax.certified import certify, specs_of
from tests.jax.test_hopper_rows import pair_and_two_calls, queries_and_keys

TOO_OLD = unmet("jax>=0.11.2")


class Case(NamedTuple):
    """A call, how many kernels of ours its two passes launch, and the call that it stands for."""

    specs: dict[str, Any]
    kernels: int
    params: dict[str, Any] = {}
    long: dict[str, Any] = {}


def _rows(width: int, *weights: str) -> dict[str, Any]:
    return specs_of("bfloat16", x=(30, width), **{w: ((width,), "float32") for w in weights})


TURNED = specs_of("bfloat16", x=(2, 35, 17, 96), cos=((1, 35, 64), "float32"), sin=((1, 35, 64), "float32"))

CASES = {
    "attention.pallas_gpu": Case(attention.attended(t=203, s=331, mask=attention.DOCUMENTS), 3, {"mask": attention.DOCUMENTS}),
    "attention.pallas_gpu_wide": Case(attention.attended(t=203, s=331, h=200, mask=attention.CAUSAL), 3, {"mask": attention.CAUSAL}),
    "linear_act.pallas_gpu": Case(gemm.linear(m=136, k=128, n=320), 2, {"activation": "gelu"}),
    "glu.pallas_gpu": Case(gemm.gated(m=136, k=128, n=320), 2, {}, gemm.gated(m=8192, k=4096, n=14336)),
    "matmul.pallas_gpu": Case(gemm.product(m=136, k=128, n=64), 3),
    "linear_cross_entropy.pallas_gpu": Case(gemm.head(tokens=304, k=128, classes=1088), 4, {},
                                            gemm.head(tokens=8192, k=4096, classes=128256)),
    "layer_norm.pallas_gpu": Case(_rows(1111, "weight", "bias"), 2),
    "layer_norm.pallas_gpu, rows of several warpgroups": Case(_rows(12345, "weight", "bias"), 3),
    "rms_norm.pallas_gpu": Case(_rows(2880, "weight"), 2),
    "layer_norm.pallas_gpu_wide": Case(_rows(20000, "weight", "bias"), 2),
    "rms_norm.pallas_gpu_wide": Case(_rows(16392, "weight"), 2),
    "cross_entropy.pallas_gpu": Case(specs_of("bfloat16", logits=(8, 5003), labels=((8,), "int32")), 1),
    "rope.pallas_gpu": Case(TURNED, 2),
    "rope.pallas_gpu_interleaved": Case(TURNED, 2, {"interleaved": True}),
}  # fmt: skip

OF_TWO_ARRAYS: dict[str, dict[str, Any]] = {"rope of two arrays": {}, "rope of two arrays, neighbours": {"interleaved": True}}
"""Parameters of calls beside those of one array, whose bits they have to have."""


def call(name: str) -> None:
    if name in OF_TWO_ARRAYS:
        specs = queries_and_keys(t=35, n=17, k=2, h=96, r=64)
        jax.tree.map(np.testing.assert_array_equal, *pair_and_two_calls(specs, OF_TWO_ARRAYS[name]))
    else:
        _certify(name)
    print("certified", name)


def _certify(name: str) -> None:
    case, kernel = CASES[name], name.split(",")[0]
    with standing_for(case.long) if case.long else contextlib.nullcontext():
        certify(kpt.registry.get(kernel).op, case.specs, case.params, fn=kpt.registry.load(kernel), seeds=(0,))


@pytest.mark.skipif(TOO_OLD is not None, reason=TOO_OLD or "")
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if "warpgroups" in n else n for n in CASES])
def test_a_case_launches_all_kernels_of_both_passes(name):
    case = CASES[name]
    with standing_for(case.long) if case.long else contextlib.nullcontext():
        assert gemm.kernels_of(name.split(",")[0], case.specs, case.params) == case.kernels


def test_every_kernel_for_hopper_has_a_case():
    kernels = {spec.name for spec in kpt.registry.kernels() if ".pallas_gpu" in spec.name}
    assert kernels == {name.split(",")[0] for name in CASES}


@pytest.mark.gpu
@pytest.mark.sanitizer
@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize("name", [*CASES, *OF_TWO_ARRAYS])
def test_memory_is_used_as_it_was_given(name, monkeypatch):
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        pytest.skip("needs compute-sanitizer, which comes with NVIDIA's CUDA toolkit")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")  # an allocation an array, so that its end is known
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=0")
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")
    program = f"from tests.jax.test_sanitizer_gpu import call; call({name!r})"
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and f"certified {name}" in done.stdout and "ERROR SUMMARY: 0 errors" in done.stdout, (
        done.stdout[-6000:] + done.stderr[-3000:]
    )
