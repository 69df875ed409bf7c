"""Norms, rope and losses in plain torch with backward passes of their own: fewer passes over memory than autograd makes of the formulas.

Everything a row needs is computed in float32 (float64 in float64), as the ops say, whatever the arrays are stored in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from kpt import ops
from kpt.kernels.stand_in import stood_for
from kpt.ops.base import Spec
from kpt.ops.shapes import keywords
from kpt_torch import library
from kpt_torch.library import Tensors, torch_dtype

CHUNK_BYTES = 64 << 20
"""Logits that linear_cross_entropy holds at a time, in bytes of float32."""


def wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _out(params: Mapping[str, Any], x: torch.Tensor) -> torch.dtype:
    return x.dtype if params["out_dtype"] is None else torch_dtype(params["out_dtype"])


def _acc(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


# -- norms ---------------------------------------------------------------------------------------------------------------------


def _summed(arrays: Tensors) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """(what is normalised, [it] if it is a result of its own)."""
    x = arrays["x"]
    if "residual" not in arrays:
        return x, []
    h = (wide(x) + wide(arrays["residual"])).to(x.dtype)
    return h, [h]


def rms_forward(arrays: Tensors, params: dict[str, Any]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    h, extra = _summed(arrays)
    z = wide(h)
    r = torch.rsqrt(z.square().mean(-1, keepdim=True) + params["eps"])
    y = z * r
    if "weight" in arrays:
        y = y * (wide(arrays["weight"]).to(z.dtype) + params["weight_offset"])
    return [y.to(_out(params, arrays["x"])), *extra], [r.squeeze(-1)]


def _rms_backward(arrays: Tensors, params: Any, results: Any, kept: Any, cotangents: Any, wanted: Sequence[str]) -> Tensors:
    x = arrays["x"]
    z = wide(results[1] if "residual" in arrays else x)
    r, g = kept[0].unsqueeze(-1), wide(cotangents[0]).to(z.dtype)
    n = z * r
    found: Tensors = {}
    if "weight" in wanted:
        found["weight"] = (g * n).reshape(-1, z.shape[-1]).sum(0)
    if "weight" in arrays:
        g = g * (wide(arrays["weight"]).to(z.dtype) + params["weight_offset"])
    return _norm_inputs(found, r * (g - n * (g * n).mean(-1, keepdim=True)), arrays, cotangents)


def _norm_inputs(found: Tensors, dz: torch.Tensor, arrays: Tensors, cotangents: Sequence[torch.Tensor]) -> Tensors:
    if "residual" in arrays:
        dz = dz + wide(cotangents[1])
        found["residual"] = dz
    found["x"] = dz
    return found


def _row_specs(count: int) -> library.Kept:
    return lambda specs, params: (Spec(specs["x"].shape[:-1], _acc(specs["x"].dtype)),) * count


rms_norm = library.kernel("rms_norm", "torch", rms_forward, _rms_backward, kept=_row_specs(1), reads=(1,))


def layer_forward(arrays: Tensors, params: dict[str, Any]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    h, extra = _summed(arrays)
    z = wide(h)
    mean = z.mean(-1, keepdim=True)
    c = z - mean
    left = c.mean(-1, keepdim=True)  # float32 may not hold the mean of nearly equal numbers, and r multiplies what is missing
    c = c - left
    r = torch.rsqrt(c.square().mean(-1, keepdim=True) + params["eps"])
    y = c * r
    if "weight" in arrays:
        y = y * wide(arrays["weight"]).to(z.dtype)
    if "bias" in arrays:
        y = y + wide(arrays["bias"]).to(z.dtype)
    return [y.to(_out(params, arrays["x"])), *extra], [mean.squeeze(-1), left.squeeze(-1), r.squeeze(-1)]


def _layer_backward(arrays: Tensors, params: Any, results: Any, kept: Any, cotangents: Any, wanted: Sequence[str]) -> Tensors:
    z = wide(results[1] if "residual" in arrays else arrays["x"])
    mean, left, r = (t.unsqueeze(-1) for t in kept)
    g = wide(cotangents[0]).to(z.dtype)
    n = (z - mean - left) * r
    found: Tensors = {}
    if "weight" in wanted:
        found["weight"] = (g * n).reshape(-1, z.shape[-1]).sum(0)
    if "bias" in wanted:
        found["bias"] = g.reshape(-1, z.shape[-1]).sum(0)
    if "weight" in arrays:
        g = g * wide(arrays["weight"]).to(z.dtype)
    dz = r * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
    return _norm_inputs(found, dz, arrays, cotangents)


_layer_norm = library.kernel("layer_norm", "torch", layer_forward, _layer_backward, kept=_row_specs(3), reads=(1,))


def layer_norm(**given: Any) -> Any:
    """torch's own where that says it in float32 or float64 (arrays of one dtype, no residual), else the formula with its own backward.

    A row of two is -1 and 1 whatever its numbers are, if they differ by enough for eps; torch is off by the rounding of their mean.

    Its gradients of weight and bias are summed in the arrays' dtype on a CPU: in bfloat16 they are off by 3% at a thousand rows.
    """
    keywords(ops.op("layer_norm"), given)
    x, weight, bias = given["x"], given.get("weight"), given.get("bias")
    plain = x.shape[-1] > 2 and given.get("residual") is None and given.get("out_dtype") in (None, library.dtype_name(x.dtype))
    if plain and x.dtype in (torch.float32, torch.float64) and all(t is None or t.dtype == x.dtype for t in (weight, bias)):
        return F.layer_norm(x, x.shape[-1:], weight, bias, given.get("eps", 1e-6))
    return _layer_norm(**given)


layer_norm.definition = _layer_norm.definition  # type: ignore[attr-defined]


# -- rope ----------------------------------------------------------------------------------------------------------------------


def _turned(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """rotate(x): (-x2, x1) of halves or of pairs."""
    if interleaved:
        pairs = x.unflatten(-1, (x.shape[-1] // 2, 2))
        return torch.stack((-pairs[..., 1], pairs[..., 0]), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def _parts(x: torch.Tensor, interleaved: bool) -> Sequence[torch.Tensor]:
    """The halves of rows, or the first and the second of their pairs."""
    return (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)


def _rotate(into: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, back: bool = False) -> None:
    """Writes `x cos + rotate(x) sin`, or its transpose: two passes over memory, and no half is negated or joined apart."""
    (y, z), (a, b), (c, d), (s, t) = (_parts(array, interleaved) for array in (into, x, cos, sin))
    if back:
        s, t = t, s
    sign = 1 if back else -1
    torch.mul(a, c, out=y).addcmul_(b, s, value=sign)
    torch.mul(b, d, out=z).addcmul_(a, t, value=-sign)


def _rotated(x: torch.Tensor, arrays: Tensors, interleaved: bool, back: bool = False) -> torch.Tensor:
    """In float32, or float64."""
    cos, sin = (wide(arrays[n])[:, :, None] for n in ("cos", "sin"))
    size, made = cos.shape[-1], torch.empty_like(x, memory_format=torch.contiguous_format)
    if size:
        _rotate(made[..., :size], x[..., :size], cos, sin, interleaved, back)
    if size < x.shape[-1]:
        made[..., size:] = x[..., size:]
    return made


def _rope_forward(arrays: Tensors, params: dict[str, Any]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    x = arrays["x"]
    return [_rotated(wide(x), arrays, params["interleaved"]).to(_out(params, x))], []


def rope_formula(arrays: Tensors, params: Mapping[str, Any]) -> torch.Tensor:
    """What autograd can go through."""
    x, out = arrays["x"], _out(params, arrays["x"])
    cos, sin = (wide(arrays[n])[:, :, None] for n in ("cos", "sin"))
    size = cos.shape[-1]
    z = wide(x[..., :size])
    y = (z * cos + _turned(z, params["interleaved"]) * sin).to(out) if size else z.to(out)
    return torch.cat((y, x[..., size:].to(out)), -1)


def _rope_backward(arrays: Tensors, params: Any, results: Any, kept: Any, cotangents: Any, wanted: Sequence[str]) -> Tensors:
    size, found, g = arrays["cos"].shape[-1], {}, wide(cotangents[0])
    if "x" in wanted:
        found["x"] = _rotated(g, arrays, params["interleaved"], back=True)
    if {"cos", "sin"} & set(wanted):
        z = wide(arrays["x"][..., :size])
        for name, factor in (("cos", z), ("sin", _turned(z, params["interleaved"]) if size else z)):
            if name in wanted:
                made = (g[..., :size] * factor).sum(2)
                found[name] = made.sum(0, keepdim=True) if arrays[name].shape[0] != made.shape[0] else made
    return found


rope = library.kernel("rope", "torch", _rope_forward, _rope_backward)


# -- losses --------------------------------------------------------------------------------------------------------------------


def _loss(z: torch.Tensor, labels: torch.Tensor, params: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, logsumexp, capped logits) of rows of logits, as `kpt.ops.cross_entropy` says."""
    z = _capped(z, params["logits_soft_cap"])
    vocab, smoothing, invalid = z.shape[-1], params["label_smoothing"], params["invalid"]
    lse = torch.logsumexp(z, -1)
    y = labels.long()
    outside = (y < 0) | (y >= vocab)
    picked = z.gather(-1, y.clamp(0, vocab - 1).unsqueeze(-1)).squeeze(-1)
    share = 1.0 - smoothing
    total: Any = lse
    if invalid in ("zero", "drop"):
        picked = torch.where(outside, 0.0, picked)
    if invalid == "drop":
        total = torch.where(outside, lse * smoothing if smoothing else torch.zeros_like(lse), lse)
    loss = total - (share * picked if share else 0.0)
    if smoothing:
        loss = loss - smoothing / vocab * z.sum(-1)
    if invalid == "nan":
        loss = torch.where(outside, float("nan"), loss)
    return loss, lse, z


def _capped(z: torch.Tensor, cap: float | None) -> torch.Tensor:
    return z if cap is None else cap * torch.tanh(z / cap)


def _dlogits(z: torch.Tensor, lse: torch.Tensor, labels: torch.Tensor, g: torch.Tensor, params: Mapping[str, Any]) -> torch.Tensor:
    """Gradient in the logits; `z` is capped, and is overwritten."""
    vocab, smoothing, invalid, cap = z.shape[-1], params["label_smoothing"], params["invalid"], params["logits_soft_cap"]
    slope = None if cap is None else 1 - (z / cap).square()
    y = labels.long()
    outside = (y < 0) | (y >= vocab)
    g = g.unsqueeze(-1)
    d = torch.exp(z - lse.unsqueeze(-1))
    if invalid == "drop":
        d = d * torch.where(outside, smoothing, 1.0).to(d.dtype).unsqueeze(-1)
    if smoothing:
        d = d - smoothing / vocab
    hot = torch.where(outside & (invalid != "clip"), 0.0, 1.0 - smoothing).to(d.dtype).unsqueeze(-1)
    d.scatter_add_(-1, y.clamp(0, vocab - 1).unsqueeze(-1), -hot)
    d = d * g
    return d if slope is None else d * slope


def ce_forward(arrays: Tensors, params: dict[str, Any]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    loss, lse, _ = _loss(wide(arrays["logits"]), arrays["labels"], params)
    return [loss], [lse]


def _ce_backward(arrays: Tensors, params: Any, results: Any, kept: Any, cotangents: Any, wanted: Sequence[str]) -> Tensors:
    z = _capped(wide(arrays["logits"]), params["logits_soft_cap"])
    return {"logits": _dlogits(z, kept[0], arrays["labels"], cotangents[0], params)}


cross_entropy = library.kernel(
    "cross_entropy", "torch", ce_forward, _ce_backward,
    kept=lambda specs, params: (Spec(specs["labels"].shape, _acc(specs["logits"].dtype)),),
)  # fmt: skip


def _chunks(rows: int, vocab: int) -> list[slice]:
    *tokens, _ = stood_for("x", (rows, 0))
    long = max(1, math.prod(tokens))
    step = max(1, min(long, max(CHUNK_BYTES // (4 * max(stood_for("w", (0, vocab))[1], 1)), 64)))
    step = max(1, -(-rows * step // long))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b, summed and given in float32 (float64 in float64)."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b.to(a.dtype)
    if a.is_cuda and a.dtype == b.dtype:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _lce_forward(arrays: Tensors, params: dict[str, Any]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    x, w = arrays["x"].reshape(-1, arrays["x"].shape[-1]), _operand(arrays["w"], arrays["x"])
    labels, shape = arrays["labels"].reshape(-1), arrays["labels"].shape
    losses, sums = [x.new_empty(0, dtype=wide(x[:0]).dtype)], [x.new_empty(0, dtype=wide(x[:0]).dtype)]
    for at in _chunks(x.shape[0], w.shape[1]):
        loss, lse, _ = _loss(_logits(x[at], w, arrays.get("b")), labels[at], params)
        losses.append(loss)
        sums.append(lse)
    loss = torch.cat(losses).reshape(shape)
    return [loss if "weights" not in arrays else loss * arrays["weights"].to(loss.dtype)], [torch.cat(sums).reshape(shape), loss]


def _operand(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The weight as the products want it: on a CPU, wide once for all chunks."""
    return w if x.is_cuda else wide(w)


def _logits(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    z = _product(x if x.is_cuda else wide(x), w)
    return z if b is None else z + b.to(z.dtype)


def _lce_backward(arrays: Tensors, params: Any, results: Any, kept: Any, cotangents: Any, wanted: Sequence[str]) -> Tensors:
    given, labels = arrays["x"], arrays["labels"].reshape(-1)
    x, w = given.reshape(-1, given.shape[-1]), _operand(arrays["w"], given)
    lse, loss = kept[0].reshape(-1), kept[1]
    g = cotangents[0]
    found: Tensors = {}
    if "weights" in wanted:
        found["weights"] = g * loss
    if "weights" in arrays:
        g = g * arrays["weights"].to(g.dtype)
    g = g.reshape(-1)
    acc = wide(x[:0]).dtype
    dx = torch.empty_like(x)
    dw = torch.zeros(w.shape, dtype=acc, device=x.device)
    db = torch.zeros(w.shape[1:], dtype=acc, device=x.device)
    for at in _chunks(x.shape[0], w.shape[1]):
        z = _capped(_logits(x[at], w, arrays.get("b")), params["logits_soft_cap"])
        d = _dlogits(z, lse[at], labels[at], g[at], params)
        db += d.sum(0)
        d = d.to(x.dtype) if x.is_cuda else d
        dx[at] = _product(d, w.t()).to(x.dtype)
        dw += _product((x[at] if x.is_cuda else wide(x[at])).t(), d)
    return found | {"x": dx.reshape(given.shape), "w": dw, "b": db}


linear_cross_entropy = library.kernel(
    "linear_cross_entropy", "torch", _lce_forward, _lce_backward,
    kept=lambda specs, params: (Spec(specs["labels"].shape, _acc(specs["x"].dtype)),) * 2,
)  # fmt: skip


