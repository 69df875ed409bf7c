"""The Triton kernels in JAX without a GPU: numbers in Triton's interpreter, every launch compiled ahead of time, and what is refused.

jax-triton launches on GPUs alone: a stand-in for its one function has its place here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("triton", reason="the Triton kernels are tested")
pytest.importorskip("torch", reason="Triton's interpreter runs on tensors of torch")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kpt
from kpt.install import install
from kpt.kernels.spec import refusal
from kpt.ops import Causal, Lengths, Mask, Segments, Spec, Window
from kpt.strategy.levels import choose
from tests.jax.certified import specs_of
from tests.torch.triton_ahead import SHARED, spills

OPS = ("rms_norm", "layer_norm", "rope", "cross_entropy", "glu", "linear_act", "attention")
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int32": "*i32"}
NVIDIA = ("sm75", "sm80", "sm89", "sm90", "sm100")
CAUSAL = Mask((Causal(),))


def attended(t=512, s=512, n=8, kv=2, h=128, dtype="bfloat16", **more):
    return specs_of(dtype, q=(2, t, n, h), k=(2, s, kv, h), v=(2, s, kv, h), **more)


IDS = {"q_segment_ids": ((2, 512), "int32"), "kv_segment_ids": ((2, 512), "int32"), "kv_lengths": ((2,), "int32")}
CASES = {
    "rms_norm": (specs_of("bfloat16", x=(4, 256, 4096), weight=(4096,), residual=(4, 256, 4096)), {}),
    "layer_norm": (specs_of("bfloat16", x=(100, 1000), weight=(1000,), bias=(1000,)), {}),
    "layer_norm of wide rows": (specs_of("bfloat16", x=(100, 20000), weight=(20000,), bias=(20000,)), {}),
    "rope": (specs_of("bfloat16", x=(2, 128, 33, 128), cos=((1, 128, 128), "float32"), sin=((1, 128, 128), "float32")), {}),
    "rope of neighbours": (specs_of("bfloat16", x=(2, 128, 33, 192), cos=(2, 128, 64), sin=(2, 128, 64)), {"interleaved": True}),
    "cross_entropy": (specs_of("bfloat16", logits=(64, 128256), labels=((64,), "int32")), {}),
    "cross_entropy of odd rows": (specs_of("bfloat16", logits=(64, 50257), labels=((64,), "int32")),
                                  {"label_smoothing": 0.1, "logits_soft_cap": 30.0, "invalid": "drop"}),
    "cross_entropy of ones": (specs_of("bfloat16", logits=(1, 1), labels=((1,), "int32")), {"label_smoothing": 1.0, "logits_soft_cap": 1.0}),
    "glu": (specs_of("bfloat16", x=(64, 128), w_gate=(128, 256), w_up=(128, 256)), {"activation": "mish"}),
    "linear_act": (specs_of("bfloat16", x=(64, 128), w=(128, 256), b=(256,)), {}),
    "linear_act of odd sizes": (specs_of("bfloat16", x=(63, 127), w=(127, 255)), {"activation": "mish"}),
    "attention": (attended(), {"mask": CAUSAL}),
    "attention, everything": (attended(**IDS), {"mask": Mask((Causal(), Segments(), Lengths())), "logits_soft_cap": 30.0}),
    "attention, odd sizes": (attended(500, 503, h=80), {"mask": Mask((Causal(3), Window(100, None, 3)))}),
    "attention of one": (attended(1, 1, 1, 1, 16), {"mask": CAUSAL}),
    "attention, decoding": (attended(1, 777, kv_lengths=((2,), "int32")), {"mask": Mask((Lengths(),), -1e30)}),
    "attention, 256": (attended(h=256), {"mask": CAUSAL}),
}  # fmt: skip


# Bytes that registers spill by triton 3.5, a register or two in one kernel of each; all else spills none.
SPILLED = {("sm89", "attention of one"): 16, ("sm90", "cross_entropy of odd rows"): 8, ("sm100", "cross_entropy of odd rows"): 8,
           ("sm100", "attention"): 8, ("sm100", "attention, odd sizes"): 8, ("sm100", "attention, 256"): 16}  # fmt: skip


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch):
    """`launches(case, architecture)`: what forward and backward pass of a case launch on such a GPU."""
    if "jax_triton" not in sys.modules:
        monkeypatch.setitem(sys.modules, "jax_triton", types.SimpleNamespace(triton_call=None))
    from kpt_jax.triton_kernels import launch

    found: list[dict[str, Any]] = []

    def record(*, kernel, grid, out_type, **given):
        found.append({"kernel": kernel, "grid": grid, "out": out_type, "given": given})
        return [jnp.zeros(s.shape, s.dtype) for s in out_type]

    monkeypatch.setattr(launch.jax_triton, "triton_call", record)

    def run(case: str, architecture: str) -> list[dict[str, Any]]:
        number = architecture.removeprefix("sm")
        gpu = types.SimpleNamespace(platform="gpu", client=types.SimpleNamespace(platform_version="cuda 12080"), core_count=108,
                                    compute_capability=f"{number[:-1]}.{number[-1]}", shared_memory_per_block_optin=SHARED[architecture] - 1024)  # fmt: skip
        name = case.replace(",", "").split()[0]
        specs, params = CASES[case]
        op, fn = kpt.ops.op(name), kpt.registry.load(f"{name}.jax_triton")
        halves = {"bfloat16": "float16"} if architecture == "sm75" else {}
        arrays = {n: jax.ShapeDtypeStruct(s.shape, halves.get(s.dtype, s.dtype)) for n, s in specs.items()}

        def both(arrays):
            moving = {n: a for n, a in arrays.items() if n in op.differentiable}
            out, pull = jax.vjp(lambda d: fn(**arrays | d, **params), moving)
            return pull(jax.tree.map(jnp.ones_like, out))

        found.clear()
        with monkeypatch.context() as m:
            m.setattr(jax, "devices", lambda *_: [gpu])
            launch.chip.cache_clear()
            launch.chip()
        try:
            jax.clear_caches()
            jax.eval_shape(both, arrays)
        finally:
            launch.chip.cache_clear()
        return list(found)

    return run


def compiled(made: dict[str, Any], architecture: str) -> Any:
    """As jax-triton compiles a launch: arrays begin at multiples of 16 bytes, and of numbers it says nothing."""
    kernel, given = made["kernel"], dict(made["given"])
    options = {"num_warps": given.pop("num_warps")} | ({"num_stages": s} if (s := given.pop("num_stages")) else {})
    out = iter(made["out"])
    given |= {n: next(out) for n in kernel.arg_names if n not in given}
    constant = {p.name for p in kernel.params if p.is_constexpr}
    signature = {
        n: "constexpr" if n in constant or given[n] is None else TYPES[str(given[n].dtype)] if hasattr(given[n], "dtype") else "fp32"
        for n in kernel.arg_names
    }
    constants = {n: given[n] for n, kind in signature.items() if kind == "constexpr"}
    assert all(isinstance(v, float) for n, v in given.items() if signature[n] == "fp32"), "an integer is no constant"
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    target = GPUTarget("cuda", int(architecture.removeprefix("sm")), 32)
    return triton.compile(ASTSource(kernel, signature, constants, aligned), target=target, options=options)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", ["sm80", *(pytest.param(a, marks=pytest.mark.slow) for a in NVIDIA if a != "sm80")])
def test_launches_compile(case, architecture, launches, tmp_path):
    if architecture == "sm75" and case.startswith(("attention", "linear_act")):
        pytest.skip("products of Triton's spill on Turing: it is not registered there")
    made = launches(case, architecture)
    assert made
    for one in made:
        assert all(0 < size < 2**31 for size in one["grid"])
        assert spills(compiled(one, architecture), tmp_path) <= SPILLED.get((architecture, case), 0), one["kernel"]


@pytest.mark.parametrize("case,kernel", [("rms_norm", "forward_whole"), ("rms_norm", "backward_whole"), ("glu", "forward_blocks"), ("cross_entropy", "forward_rows")])
def test_rows_are_read_16_bytes_at_a_time(case, kernel, launches):
    (made,) = (m for m in launches(case, "sm80") if m["kernel"].fn.__name__ == kernel)
    code = compiled(made, "sm80").asm["ptx"]
    assert ".v4.b32" in code or "cp.async.cg.shared.global [" in code


def interpreted(op: str, cases: int, seed: int) -> None:
    """In a process of its own: TRITON_INTERPRET holds for all of one, from the import on."""
    command = [sys.executable, "-m", "tests.jax.triton_numbers", op, str(cases), str(seed)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("op", ["rms_norm", "linear_act"])  # one of rows and one of products; all are below
def test_numbers(op):
    interpreted(op, cases=1, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_numbers_of_more_cases(op):
    interpreted(op, cases=2, seed=2)


def test_no_torch_is_needed():
    code = """
import sys, types
sys.modules["jax_triton"] = types.ModuleType("jax_triton")
import kpt
for kernel in kpt.registry.kernels():
    if kernel.provider == "jax_triton":
        kpt.registry.load(kernel)
print("kpt_jax.triton_kernels.attention" in sys.modules, "torch" in sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert found.stdout.split() == ["True", "False"], found.stdout + found.stderr


def specs_for(op: str) -> tuple[dict[str, Spec], dict[str, Any]]:
    return next(CASES[c] for c in CASES if c.replace(",", "").split()[0] == op)


def here(name: str, hardware: str = "a100", framework: str = "jax", **changed: Spec) -> str | None:
    kernel = kpt.registry.get(name)
    specs, params = specs_for(kernel.op)
    specs = specs | changed
    return refusal(kernel, kernel.op, kpt.hardware_profile(hardware), next(iter(specs.values())).dtype, specs, params, "balanced", framework)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """As if jax-triton and its triton were installed."""
    monkeypatch.setattr("kpt.kernels.spec._installed", lambda package: {"jax-triton": "0.4.1", "triton": "3.7.0"}.get(package, jax.__version__))
    if "jax_triton" not in sys.modules:
        monkeypatch.setitem(sys.modules, "jax_triton", types.SimpleNamespace(triton_call=None))


@pytest.mark.parametrize("op", OPS)
def test_without_jax_triton_it_says_how_to_have_it(op, monkeypatch):
    monkeypatch.setattr("kpt.kernels.spec._installed", lambda package: None if package == "jax-triton" else "99")
    assert here(f"{op}.jax_triton") == "needs jax-triton>=0.4.1, and jax-triton is not installed: " + install("jax-triton")


@pytest.mark.parametrize("op", OPS)
def test_what_is_taken_and_what_is_refused(op, installed, monkeypatch):
    name = f"{op}.jax_triton"
    assert here(name) is None and here(name, "h100") is None
    assert "runs on" in (here(name, "cpu") or "") and "is built for" in (here(name, "t4") or "")
    first = next(iter(specs_for(op)[0]))
    assert "float64" in (here(name, **{first: Spec(specs_for(op)[0][first].shape, "float64")}) or "")
    other = next((n for n, s in specs_for(op)[0].items() if n != first and s.dtype != "int32"), None)
    if other:
        assert "float64" in (here(name, **{other: Spec(specs_for(op)[0][other].shape, "float64")}) or "")
    monkeypatch.setattr(jax, "device_count", lambda *_: 8)
    assert "jax.shard_map" in (here(name) or "")


def test_turing_has_the_kernels_that_do_not_multiply():
    named = {k.op for k in kpt.registry.kernels() if k.provider == "jax_triton" and "sm75" in k.architectures}
    assert named == set(OPS) - {"attention", "linear_act"}
    assert all("bfloat16" not in k.dtypes for k in kpt.registry.kernels() if k.provider == "jax_triton" and "sm75" in k.architectures)


@pytest.mark.parametrize("hardware", ["h100", "a100", "l4"])
@pytest.mark.parametrize("op", OPS)
def test_no_estimate_chooses_what_was_never_timed(op, hardware, installed):
    specs, params = specs_for(op)
    chosen, _, others = choose(op, specs, params, hardware=kpt.hardware_profile(hardware), level="balanced")
    assert chosen is None or chosen.provider != "jax_triton"
    assert f"{op}.jax_triton" in others
