"""Holds the Triton kernels to float64: `TRITON_INTERPRET=1 python -m tests.torch.triton_numbers OP CASES SEED`.

A program of its own, since the variable is read when triton is imported: with it the kernels run in Triton's interpreter, on a CPU,
without it on the GPU, where shapes beyond what an interpreter is good for are held too. Every other case runs in small blocks, so that
small shapes have many, ragged ones among them; the first three cases without empty arrays are put through opcheck as well. Prints what
fails; exit status 1 if anything does.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import sys
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

import kpt
from kpt.kernels.spec import refusal
from kpt.kernels.validate import validate
from kpt.ops import Causal, Mask, Spec, Window
from kpt_torch.library import _encoded
from kpt_torch.planner import calls, from_numpy, to_numpy
from kpt_torch.triton_kernels import glu as glus
from kpt_torch.triton_kernels import linear_cross_entropy, rope
from kpt_torch.triton_kernels.jitted import attention, cross_entropy, glu, norms, product
from kpt_torch.triton_kernels.jitted import rope as rotation
from tests import fuzz
from tests.cases import CASES, Case

SIXTEEN = dict.fromkeys((64, 128, 256), attention.Tiles(*[attention.Tile(16, 16, 1, 1)] * 4))
SMALL = (
    (norms, "WHOLE_FORWARD", 16), (norms, "WHOLE_BACKWARD", 16), (norms, "WIDE", norms.Tile(1, 16, 1)),
    (norms, "COLUMNS", norms.Tile(2, 8, 1)), (norms, "SUMS", norms.Tile(2, 8, 1)),
    (cross_entropy, "FORWARD_BLOCK", 16), (cross_entropy, "BACKWARD_BLOCK", 16), (rotation, "TILE", 16),
    (linear_cross_entropy, "CHUNK_BYTES", 2048), (linear_cross_entropy, "TOKENS", 4), (linear_cross_entropy, "BLOCK", 16),
    (glu, "BLOCK", 16), (attention, "TILES", dict.fromkeys(("ampere", "hopper", "blackwell"), SIXTEEN)),
    (product, "TILES", dict.fromkeys(("ampere", "hopper", "cdna"), product.Tile(16, 16, 16, 1, 1))), (product, "WIDE", product.Tile(16, 32, 16, 1, 1)),
    (product, "GROUP", 2), (product, "BLOCK", 16),
)  # fmt: skip
LARGE = [
    *(Case(op, {"x": Spec(shape, dtype), "weight": Spec(shape[-1:], dtype)}, {"eps": 1e-5})
      for op in ("rms_norm", "layer_norm") for shape in ((1031, 4096), (300, 5, 1000), (517, 8192), (301, 8200), (67, 16384), (35, 16392), (9, 65536))
      for dtype in ("bfloat16", "float32")),
    Case("layer_norm", {"x": Spec((1025, 4099), "bfloat16"), "weight": Spec((4099,), "float32"), "bias": Spec((4099,), "bfloat16"),
                        "residual": Spec((1025, 4099), "bfloat16")}, {}),
    Case("rms_norm", {"x": Spec((33, 40000), "float16"), "weight": Spec((40000,), "float16"), "residual": Spec((33, 40000), "float32")}, {}),
    *(Case("cross_entropy", {"logits": Spec((17, v), dtype), "labels": Spec((17,), "int64")}, params)
      for v in (50257, 128256) for dtype in ("bfloat16", "float32")
      for params in ({"label_smoothing": s, "logits_soft_cap": cap, "invalid": "zero"} for s, cap in ((0.0, None), (0.1, None), (0.0, 30.0)))),
    *(Case("linear_cross_entropy", {"x": Spec((517, 256), dtype), "w": Spec((256, 50257), dtype), "labels": Spec((517,), "int32"),
                                    "b": Spec((50257,), dtype)}, {"invalid": "drop"}) for dtype in ("bfloat16", "float16")),
    *(Case("glu", {"x": Spec((3, 517, 512), dtype), "w_gate": Spec((512, 1100), dtype), "w_up": Spec((512, 1100), dtype),
                   "b_up": Spec((1100,), dtype)}, {"activation": a}) for dtype in ("bfloat16", "float32") for a in ("silu", "gelu_tanh", "gelu")),
    *(Case("linear_act", {"x": Spec((3, 517, 512), dtype), "w": Spec((512, 1100), dtype), "b": Spec((1100,), dtype)}, {"activation": a})
      for dtype in ("bfloat16", "float16", "float32") for a in ("gelu", "gelu_tanh", "silu", "identity")),
    *(Case("matmul", {"a": Spec((m, k), dtype), "b": Spec((k, n), dtype)}, {"out_dtype": out})
      for m, k, n in ((1031, 517, 777), (4096, 1024, 2048), (1, 4096, 4096)) for dtype, out in (("bfloat16", None), ("float16", "float32"), ("float32", None))),
    *(Case("attention", {"q": Spec((1, t, 4, h), dtype), "k": Spec((1, s, 2, h), dtype), "v": Spec((1, s, 2, h), dtype)}, {"mask": mask})
      for t, s, h, dtype in ((517, 517, 128, "bfloat16"), (300, 700, 64, "float16"), (257, 257, 256, "bfloat16"), (260, 260, 64, "float32"))
      for mask in (Mask(), Mask((Causal(0),)), Mask((Causal(0), Window(100, None, 0))))),
    *(Case("rope", {"x": Spec((2, 1027, 33, h), "bfloat16"), "cos": Spec((1, 1027, r), "float32"), "sin": Spec((1, 1027, r), "float32")}, {"interleaved": i})
      for h, r in ((128, 128), (192, 64), (80, 80)) for i in (False, True)),
]  # fmt: skip
# Bounds that leave no room in 32 bits, for sums with positions.
FAR = [
    Case("attention", {"q": Spec((1, 20, 4, 16), "float32"), "k": Spec((1, 24, 2, 16), "float32"), "v": Spec((1, 24, 2, 16), "float32")}, {"mask": mask})
    for mask in (Mask((Window(2**31 - 1, 0),)), Mask((Causal(), Window(2**63 - 1, None))), Mask((Window(None, 2**31 - 1),)), Mask((Causal(2**31 - 1),)))
]  # fmt: skip
patch_tensor = interpreter._patch_lang_tensor


def patched(tensor: type) -> None:
    """NumPy 2.5 makes no number of an array of one element, which is what triton 3.5's interpreter has for a scalar."""
    patch_tensor(tensor)
    tensor.__index__ = lambda self: self.handle.data.item()  # type: ignore[attr-defined]


multiply = interpreter.InterpreterBuilder.create_dot


def multiplied(self: Any, a: Any, b: Any, *more: Any) -> Any:
    """triton 3.5's interpreter holds bfloat16 as integers, and multiplies them."""
    wide = lambda t: interpreter.TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32)  # noqa: E731
    return multiply(self, *(wide(t) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b)), *more)


def on_device(device: str, op: Any, specs: Any, params: dict[str, Any], fn: Any) -> fuzz.Call:
    run, run_vjp = calls(op.differentiable, device)
    return fuzz.Call(lambda arrays: run(fn, arrays, params), lambda arrays, cotangents: run_vjp(fn, arrays, params, cotangents))


def in_a_sum(device: str, op: Any, specs: Any, params: dict[str, Any], fn: Any) -> fuzz.Call:
    """Cotangents given as weights, so that all tokens have the cotangent 1: what linear_cross_entropy makes in its forward pass counts.

    The weight is the transpose of what lies in memory, as in torch's linear layers. Half of the time the cotangents are one number in memory.
    """
    once = on_device(device, op, specs, params, fn)

    def pulled(arrays: dict[str, np.ndarray], cotangents: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        given = {n: from_numpy(a, device) for n, a in arrays.items()}
        (g,) = (from_numpy(c, device) for c in cotangents)
        given |= {"weights": given["weights"].float() * g if "weights" in given else g, "w": given["w"].t().contiguous().t()}
        moving = [n for n in op.differentiable if n in given]
        loss = fn(**{n: t.requires_grad_(n in moving) for n, t in given.items()}, **params)
        total = loss.sum() if len(arrays) % 2 else (loss * torch.ones_like(loss)).sum()
        found = dict(zip(moving, torch.autograd.grad(total, [given[n] for n in moving]), strict=True))
        found["weights"] = found["weights"] * g
        return {n: to_numpy(found[n].to(getattr(torch, s.dtype))) for n, s in specs.items() if n in found}

    return fuzz.Call(once.run, pulled)


def opcheck(device: str, case: Case) -> str:
    """What torch finds wrong with the custom op, or "". Where forward may make gradients, with it doing so."""
    op, kernel = kpt.ops.op(case.op), kpt.registry.load(f"{case.op}.triton")
    arrays = {n: from_numpy(a, device) for n, a in op.sample(np.random.default_rng(0), case.specs, **case.params).items()}
    given = [arrays[n].requires_grad_(n in op.differentiable) if n in arrays else None for n in (*op.arrays, *op.optional)]
    module = importlib.import_module(f"kpt_torch.triton_kernels.{case.op}")
    early = {"early": module._early(arrays, [n for n in op.differentiable if n in arrays])} if hasattr(module, "_early") else {}
    try:
        torch.library.opcheck(kernel.definition, (*given, _encoded(case.params | early)))
    except Exception as e:  # of many kinds
        return f"opcheck: {type(e).__name__}: {' '.join(str(e).split())[:600]}"
    return ""


def turned_in_pairs(device: str, case: Case, seed: int) -> str:
    """What is wrong with a rotation of these arrays and of others with 1 to 5 heads, in one launch, or ""."""
    b, t, _, h = case.specs["x"].shape
    specs = {"x": case.specs["x"], "other": Spec((b, t, 1 + seed % 5, h), case.specs["x"].dtype)} | case.specs
    run, run_vjp = calls(rope.BOTH.differentiable, device)
    found = validate(rope.rope_pair, rope.BOTH, specs, case.params, run=run, run_vjp=run_vjp, seeds=[seed])
    if not found.passed:
        return found.summary()
    if seed < 2 and all(0 not in s.shape for s in specs.values()):
        given = [from_numpy(a, device).requires_grad_() for a in rope.BOTH.sample(np.random.default_rng(0), specs, **case.params).values()]
        given = dict(zip(specs, given, strict=True))
        torch.library.opcheck(rope.rope_pair.definition, (*(given[n] for n in rope.BOTH.arrays), _encoded(case.params)))
    return ""


def read_by_a_linear_layer(device: str, case: Case, seed: int) -> str:
    """What is wrong with a glu and a product of its result with a weight in one call, or ""."""
    narrow = case.specs["w_gate"]
    specs = case.specs | {"w_down": Spec((narrow.shape[1], 1 + seed % 7), narrow.dtype)}
    params = case.params | {"out_dtype": None}
    run, run_vjp = calls(glus.LINEAR.differentiable, device)
    found = validate(glus.glu_linear, glus.LINEAR, specs, params, run=run, run_vjp=run_vjp, seeds=[seed])
    if not found.passed:
        return found.summary()
    if seed < 2 and all(0 not in s.shape for s in specs.values()):
        arrays = {n: from_numpy(a, device).requires_grad_() for n, a in glus.LINEAR.sample(np.random.default_rng(0), specs, **params).items()}
        given = [arrays.get(n) for n in (*glus.LINEAR.arrays, *glus.LINEAR.optional)]
        for early in ("", "factors"):
            torch.library.opcheck(glus.glu_linear.definition, (*given, _encoded(params | {"early": early})))
    return ""


def not_a_number(case: Case, arrays: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Poison for attention: NaN in place of infinities, since a query all of whose visible scores are -inf is NaN in a kernel that visits
    no hidden key, and what the hidden keys have in the formula."""
    return {n: np.where(np.isinf(a), np.nan, a).astype(a.dtype) if n in "qkv" else a for n, a in fuzz.poisoned(case, arrays, rng).items()}


def drawn_cases(op: str, cases: int, seed: int, most: int) -> list[Case]:
    """Of the shared table, those that the kernel takes."""
    kernel, found, i = kpt.registry.get(f"{op}.triton"), [], 0
    while len(found) < cases:
        case = CASES[op](np.random.default_rng([seed, i]), most)
        dtype = next(iter(case.specs.values())).dtype
        if refusal(kernel, op, kpt.hardware_profile("h100"), dtype, case.specs, case.params, "aggressive", "torch") is None:
            found.append(case)
        i += 1
    return found


def main(op: str, cases: int, seed: int) -> int:
    fuzz.KINDS = {kind: (1, change, gradients) for kind, (_, change, gradients) in fuzz.KINDS.items()}
    if op == "attention":
        fuzz.KINDS["poisoned"] = (1, not_a_number, False)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    drawn = drawn_cases(op, cases, seed, {"attention": 33}.get(op, 17) if interpreted else 130)
    if interpreted:
        interpreter._patch_lang_tensor = patched
        interpreter.InterpreterBuilder.create_dot = multiplied
        device = "cpu"
    else:
        device = "cuda"
        drawn += [case for case in LARGE if case.op == op]
    drawn += [case for case in FAR if case.op == op]
    kernel, failures = kpt.registry.get(f"{op}.triton"), 0
    to_check = 3
    large = [(module, name, getattr(module, name)) for module, name, _ in SMALL]
    for i, case in enumerate(drawn):
        small = i % 2 == 1 and i < cases
        for module, name, value in SMALL if small else large:
            setattr(module, name, value)
        summed = op == "linear_cross_entropy" and i % 3 > 0
        fuzz.FRAMEWORKS["torch"] = functools.partial(in_a_sum if summed else on_device, device)
        whole = to_check > 0 and all(0 not in s.shape for s in case.specs.values()) and "mask" not in case.params
        whole |= to_check > 0 and op == "attention" and math.isfinite(case.params["mask"].fill)  # NaN would not equal itself
        to_check -= whole
        for why in filter(None, [*fuzz.check(kernel, case, fuzz.VALUES_PER_SHAPE * i), opcheck(device, case) if whole else ""]):
            failures += 1
            print(f"{case}{' in small blocks' if small else ''}, case {i} of seed {seed}\n  {why}")
        for why in filter(None, [turned_in_pairs(device, case, i)] if op == "rope" else []):
            failures += 1
            print(f"{case}{' in small blocks' if small else ''}, case {i} of seed {seed}, beside other heads\n  {why}")
        for why in filter(None, [read_by_a_linear_layer(device, case, i)] if op == "glu" else []):
            failures += 1
            print(f"{case}{' in small blocks' if small else ''}, case {i} of seed {seed}, read by a linear layer\n  {why}")
    print(f"{op}: {len(drawn)} cases, {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
