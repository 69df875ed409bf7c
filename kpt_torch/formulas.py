"""Ops as formulas of torch: what the second derivative of a kernel is taken of, whoever's kernel it is.

    y, = FORMULAS["rms_norm"]({"x": x, "weight": w}, {"eps": 1e-5, ...})      # arrays by name, all parameters

A kernel's backward pass has no derivative of its own. Where one is asked for (a gradient penalty, a Hessian), it is the formula's, which
autograd can differentiate any number of times; the formula keeps what autograd keeps of it. Computed in float32 (float64 in float64).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from kpt_torch.kernels import rows
from kpt_torch.kernels.attention import seen
from kpt_torch.library import Tensors, torch_dtype

Formula = Callable[[Tensors, Mapping[str, Any]], Sequence[torch.Tensor]]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda x: x, "relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "sigmoid": torch.sigmoid, "tanh": torch.tanh,
    "relu2": lambda x: F.relu(x).square(), "softplus": F.softplus, "elu": F.elu, "mish": lambda x: x * torch.tanh(F.softplus(x)),
}  # fmt: skip
"""The names of `kpt.ops.activations`."""


def _rounded(y: torch.Tensor, params: Mapping[str, Any], x: torch.Tensor) -> torch.Tensor:
    return y.to(x.dtype if params["out_dtype"] is None else torch_dtype(params["out_dtype"]))


def _project(arrays: Tensors, w: str, b: str) -> torch.Tensor:
    y = rows.wide(arrays["x"]) @ rows.wide(arrays[w])
    return y + rows.wide(arrays[b]) if b in arrays else y


def _linear_act(arrays: Tensors, params: Mapping[str, Any]) -> Sequence[torch.Tensor]:
    return [_rounded(ACTIVATIONS[params["activation"]](_project(arrays, "w", "b")), params, arrays["x"])]


def _glu(arrays: Tensors, params: Mapping[str, Any]) -> Sequence[torch.Tensor]:
    gate, up = _project(arrays, "w_gate", "b_gate"), _project(arrays, "w_up", "b_up")
    return [_rounded(ACTIVATIONS[params["activation"]](gate) * up, params, arrays["x"])]


def _glu_linear(arrays: Tensors, params: Mapping[str, Any]) -> Sequence[torch.Tensor]:
    (h,) = _glu(arrays, params)
    return [(rows.wide(h) @ rows.wide(arrays["w_down"])).to(h.dtype)]


def _matmul(arrays: Tensors, params: Mapping[str, Any]) -> Sequence[torch.Tensor]:
    return [_rounded(rows.wide(arrays["a"]) @ rows.wide(arrays["b"]), params, arrays["a"])]


def _rope_pair(arrays: Tensors, params: dict[str, Any]) -> Sequence[torch.Tensor]:
    return [rows.rope_formula(arrays | {"x": arrays[n]}, params) for n in ("x", "other")]


def _linear_cross_entropy(arrays: Tensors, params: dict[str, Any]) -> Sequence[torch.Tensor]:
    (loss,), _ = rows.ce_forward({"logits": _project(arrays, "w", "b"), "labels": arrays["labels"]}, params)
    return [loss * rows.wide(arrays["weights"]).to(loss.dtype) if "weights" in arrays else loss]


def weighed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, change: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """`softmax(change(scale q k^T)) v`, [B, N, T, H], with grouped queries."""
    q, k, v = (rows.wide(t) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // max(t.shape[1], 1), 1) for t in (k, v))
    return torch.softmax(change(q @ k.mT * (1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale)), -1) @ v


def _attention(arrays: Tensors, params: Mapping[str, Any]) -> Sequence[torch.Tensor]:
    q, mask, cap = arrays["q"], params["mask"], params["logits_soft_cap"]
    operands = (arrays.get(n) for n in ("keep", "q_segment_ids", "kv_segment_ids", "kv_lengths"))
    shown, _ = seen(mask, q, arrays["k"], *operands)

    def change(s: torch.Tensor) -> torch.Tensor:
        s = s if cap is None else cap * torch.tanh(s / cap)
        s = s + rows.wide(arrays["bias"]) if "bias" in arrays else s
        return s if shown is None else torch.where(shown, s, s + mask.fill if mask.additive else mask.fill)

    y = weighed(q.transpose(1, 2), arrays["k"].transpose(1, 2), arrays["v"].transpose(1, 2), params["scale"], change)
    return [_rounded(y.transpose(1, 2), params, q)]


FORMULAS: dict[str, Formula] = {
    "rms_norm": lambda arrays, params: rows.rms_forward(arrays, dict(params))[0],
    "layer_norm": lambda arrays, params: rows.layer_forward(arrays, dict(params))[0],
    "rope": lambda arrays, params: [rows.rope_formula(arrays, params)],
    "rope_pair": lambda arrays, params: _rope_pair(arrays, dict(params)),
    "cross_entropy": lambda arrays, params: rows.ce_forward(arrays, dict(params))[0],
    "linear_cross_entropy": lambda arrays, params: _linear_cross_entropy(arrays, dict(params)),
    "linear_act": _linear_act, "glu": _glu, "glu_linear": _glu_linear, "matmul": _matmul, "attention": _attention,
}  # fmt: skip
"""By the name of the op."""


def pulled_back(formula: Callable[..., Sequence[torch.Tensor]], given: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor]) -> Any:
    """Gradients of `formula(*given)`, which can be differentiated themselves wherever they are asked for: in `torch.func`, too."""
    made, back = torch.func.vjp(lambda *arrays: tuple(formula(*arrays)), *given)
    return back(tuple(c.to(y.dtype) for c, y in zip(cotangents, made, strict=True)))
