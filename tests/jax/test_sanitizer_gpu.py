"""NVIDIA's compute-sanitizer over one call of each kernel for Hopper, both passes: nothing read or written outside of an array.

To be run by itself, without workers: beside other programs on the GPU the tool was seen to crash, and not to end.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import Any

import pytest

import kpt
from tests.jax import test_hopper_attention as attention
from tests.jax import test_hopper_gemm as gemm
from tests.jax.certified import certify, specs_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_hopper")]


def _rows(width: int, *weights: str) -> dict[str, Any]:
    return specs_of("bfloat16", x=(30, width), **{w: ((width,), "float32") for w in weights})


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "attention.pallas_gpu": (attention.attended(t=203, s=331, mask=attention.DOCUMENTS), {"mask": attention.DOCUMENTS}),
    "attention.pallas_gpu_wide": (attention.attended(t=203, s=331, h=200, mask=attention.CAUSAL), {"mask": attention.CAUSAL}),
    "linear_act.pallas_gpu": (gemm.linear(m=136, k=128, n=320), {"activation": "gelu"}),
    "glu.pallas_gpu": (gemm.gated(m=136, k=128, n=320), {}),
    "matmul.pallas_gpu": (gemm.product(m=136, k=128, n=64), {}),
    "linear_cross_entropy.pallas_gpu": (gemm.head(tokens=77, k=100, classes=1030), {}),
    "layer_norm.pallas_gpu": (_rows(1111, "weight", "bias"), {}),
    "rms_norm.pallas_gpu": (_rows(2880, "weight"), {}),
    "layer_norm.pallas_gpu_wide": (_rows(20000, "weight", "bias"), {}),
    "rms_norm.pallas_gpu_wide": (_rows(16392, "weight"), {}),
    "cross_entropy.pallas_gpu": (specs_of("bfloat16", logits=(8, 5003), labels=((8,), "int32")), {}),
    "rope.pallas_gpu": (specs_of("bfloat16", x=(2, 35, 17, 96), cos=((1, 35, 64), "float32"), sin=((1, 35, 64), "float32")), {}),
}


def call(case: str) -> None:
    specs, params = CASES[case]
    certify(kpt.registry.get(case).op, specs, params, fn=kpt.registry.load(case), seeds=(0,))
    print("certified", case)


def test_every_kernel_for_hopper_has_a_case():
    kernels = {spec.name for spec in kpt.registry.kernels() if ".pallas_gpu" in spec.name}
    assert kernels == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_memory_is_used_as_it_was_given(case, monkeypatch):
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        pytest.skip("needs compute-sanitizer, which comes with NVIDIA's CUDA toolkit")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")  # an allocation an array, so that its end is known
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=0")
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")
    program = f"from tests.jax.test_sanitizer_gpu import call; call({case!r})"
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and f"certified {case}" in done.stdout and "ERROR SUMMARY: 0 errors" in done.stdout, (
        done.stdout[-6000:] + done.stderr[-3000:]
    )
