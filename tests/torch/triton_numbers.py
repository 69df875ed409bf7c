"""Holds the Triton kernels to float64: `TRITON_INTERPRET=1 python -m tests.torch.triton_numbers OP CASES SEED`.

A program of its own, since the variable is read when triton is imported: with it the kernels run in Triton's interpreter, on a CPU,
without it on the GPU, where shapes beyond what an interpreter is good for are held too. Every other case runs in small blocks, so that
small shapes have many, ragged ones among them. Prints what fails; exit status 1 if anything does.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
from triton.runtime import interpreter

import kpt
from kpt.ops import Spec
from kpt_torch.planner import calls
from kpt_torch.triton_kernels import cross_entropy, norms, rope
from tests import fuzz
from tests.cases import CASES, Case

SMALL = (
    (norms, "WHOLE_FORWARD", 16), (norms, "WHOLE_BACKWARD", 16), (norms, "WIDE", norms.Tile(1, 16, 1)),
    (norms, "COLUMNS", norms.Tile(2, 8, 1)), (norms, "SUMS", norms.Tile(2, 8, 1)),
    (cross_entropy, "FORWARD_BLOCK", 16), (cross_entropy, "BACKWARD_BLOCK", 16), (rope, "TILE", 16),
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
    *(Case("rope", {"x": Spec((2, 1027, 33, h), "bfloat16"), "cos": Spec((1, 1027, r), "float32"), "sin": Spec((1, 1027, r), "float32")}, {"interleaved": i})
      for h, r in ((128, 128), (192, 64), (80, 80)) for i in (False, True)),
]  # fmt: skip
patch_tensor = interpreter._patch_lang_tensor


def patched(tensor: type) -> None:
    """NumPy 2.5 makes no number of an array of one element, which is what triton 3.5's interpreter has for a scalar."""
    patch_tensor(tensor)
    tensor.__index__ = lambda self: self.handle.data.item()  # type: ignore[attr-defined]


def on_gpu(op: Any, specs: Any, params: dict[str, Any], fn: Any) -> fuzz.Call:
    run, run_vjp = calls(op.differentiable, "cuda")
    return fuzz.Call(lambda arrays: run(fn, arrays, params), lambda arrays, cotangents: run_vjp(fn, arrays, params, cotangents))


def main(op: str, cases: int, seed: int) -> int:
    fuzz.KINDS = {kind: (1, change, gradients) for kind, (_, change, gradients) in fuzz.KINDS.items()}
    drawn = [CASES[op](np.random.default_rng([seed, i]), 17) for i in range(cases)]
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpreter._patch_lang_tensor = patched
    else:
        fuzz.FRAMEWORKS["torch"] = on_gpu
        drawn = [CASES[op](np.random.default_rng([seed, i])) for i in range(cases)]
        drawn += [case for case in LARGE if case.op == op]
    kernel, failures = kpt.registry.get(f"{op}.triton"), 0
    large = [(module, name, getattr(module, name)) for module, name, _ in SMALL]
    for i, case in enumerate(drawn):
        small = i % 2 == 1 and i < cases
        for module, name, value in SMALL if small else large:
            setattr(module, name, value)
        for why in fuzz.check(kernel, case, fuzz.VALUES_PER_SHAPE * i):
            failures += 1
            print(f"{case}{' in small blocks' if small else ''}, case {i} of seed {seed}\n  {why}")
    print(f"{op}: {len(drawn)} cases, {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
