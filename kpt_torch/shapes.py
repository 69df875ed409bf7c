"""The calls that are timed where no program is named: `python -m kpt_torch.bench` and `kpt tune --framework torch`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kpt.ops import Causal, Mask, Spec

PARAMS: dict[str, dict[str, Any]] = {"attention": {"mask": Mask((Causal(0),))}}
SHAPES = {
    "layer_norm": ((16384, 4096), (32768, 8192)), "rms_norm": ((16384, 4096), (32768, 8192)),
    "cross_entropy": ((8192, 128256),), "rope": ((4, 4096, 32, 128),),
    "linear_cross_entropy": ((8192, 4096, 128256),), "glu": ((8192, 4096, 14336),), "swiglu": ((8192, 14336),),
    "attention": ((4, 4096, 16, 128), (4, 4096, 32, 64), (1, 16384, 16, 128)),
}  # fmt: skip
CPU_SHAPES = {
    "layer_norm": ((2048, 1024),), "rms_norm": ((2048, 1024),), "cross_entropy": ((512, 32000),), "rope": ((1, 512, 8, 64),),
    "linear_cross_entropy": ((512, 256, 8192),), "glu": ((512, 512, 1376),), "attention": ((1, 512, 8, 64),),
}  # fmt: skip


def specs_of(op: str, shape: Sequence[int], dtype: str) -> dict[str, Spec]:
    """The arrays of a call; "swiglu" is the part of glu between its products."""
    shape = tuple(shape)
    if op == "linear_cross_entropy":
        tokens, width, vocab = shape
        return {"x": Spec((tokens, width), dtype), "w": Spec((width, vocab), dtype), "labels": Spec((tokens,), "int64")}
    if op == "attention":
        return dict.fromkeys("qkv", Spec(shape, dtype))
    if op == "glu":
        rows, width, inner = shape
        return {"x": Spec((rows, width), dtype)} | dict.fromkeys(("w_gate", "w_up"), Spec((width, inner), dtype))
    if op == "swiglu":
        return dict.fromkeys(("gate", "up"), Spec(shape, dtype))
    if op == "cross_entropy":
        return {"logits": Spec(shape, dtype), "labels": Spec(shape[:-1], "int64")}
    if op == "rope":
        table = Spec((1, shape[1], shape[3]), dtype)
        return {"x": Spec(shape, dtype), "cos": table, "sin": table}
    vectors = ("weight", "bias") if op == "layer_norm" else ("weight",)
    return {"x": Spec(shape, dtype)} | {n: Spec(shape[-1:], dtype) for n in vectors}
