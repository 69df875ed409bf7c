"""linear_cross_entropy: logits of some tokens at a time, by the products of torch and the Triton kernels of cross_entropy.

Where gradients will be asked for, the forward pass makes them of the sum of the losses while it has a chunk's logits: the gradient of
the logits in their place, and from it dx and a term of dw, three products in all (arXiv:2410.10989). dx is whole by then but for
a factor of each row. In dw the rows are summed, so it can be scaled only where tokens have one cotangent, as under a mean or a sum
of losses that `weights` has weighted. Where the backward pass finds that they have not, it makes dw anew from the logits made
anew. Tokens with a label outside the vocabulary are left out of the sum beforehand, since their losses are usually masked away.

Logits and their gradients are rounded to x's dtype, and so is dw after each chunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from kpt.kernels.stand_in import stood_for
from kpt.ops.base import Spec, Specs
from kpt_torch import library
from kpt_torch.library import Tensors
from kpt_torch.triton_kernels import cross_entropy, launch
from kpt_torch.triton_kernels.jitted import bounds

CHUNK_BYTES = 1 << 30
"""Of logits. One such array is alive at a time. The fewer chunks, the fewer passes over dw (docs/benchmarks/triton-notes.md)."""
MOST_CHUNKS = 16
"""Each rounds dw once, by 0.4 u of what is summed by then. Of 16 that adds to `0.4 u sqrt(16 / 2)`, and a gradient is allowed 4 u."""
BLOCK, WARPS = 2048, 4
TOKENS = 128
"""A chunk has a multiple of so many, for the tiles of its products."""


def chunks(tokens: int, vocab: int, itemsize: int) -> list[slice]:
    """Of tokens, of equal length but for the last one."""
    long = math.prod(stood_for("x", (tokens, 0))[:-1]), stood_for("w", (0, vocab))[1]
    least = min(max(-(-math.prod(long) * itemsize // CHUNK_BYTES), 1), MOST_CHUNKS)
    length = max(-(-tokens // (least * TOKENS)), 1) * TOKENS
    return [slice(start, min(start + length, tokens)) for start in range(0, tokens, length)]


def _rows(arrays: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    return launch.rows(arrays["x"]), arrays["labels"].reshape(-1).contiguous()


def _sweep(
    arrays: Tensors, params: Mapping[str, Any], loss: torch.Tensor | None, lse: torch.Tensor, made: Sequence[str], each: torch.Tensor
) -> list[torch.Tensor]:
    """Goes over the chunks: writes losses, if they are to be written, and logsumexps, and returns the gradients `made`.

    Args:
      loss: `[tokens]`, or None where `lse` is known.
      made: of "x", the gradient of each token's own loss, "w" or "w.T", and "b", both of the sum of losses times `each`.
    """
    (x, labels), w, b = _rows(arrays), arrays["w"], arrays.get("b")
    one = torch.ones_like(lse)
    shapes = {"x": x.shape, "w": w.shape, "w.T": w.t().shape, "b": w.shape[1:]}
    found = {n: torch.empty(shapes[n], dtype=x.dtype, device=x.device) for n in made}
    if "b" in found:
        found["b"] = torch.zeros(shapes["b"], device=x.device)
    if not len(x):
        return [t.zero_() for t in found.values()]
    for at in chunks(len(x), w.shape[1], x.element_size()):
        z = x[at] @ w if b is None else torch.addmm(b.to(x.dtype), x[at], w)
        if loss is not None:
            cross_entropy.put_losses(z, labels[at], loss[at], lse[at], params)
        if made:
            cross_entropy.put_gradients(z, labels[at], lse[at], one[at], z, params)
            weighted = (x[at] * each[at, None]).to(x.dtype)
        if "x" in found:
            torch.mm(z, w.t(), out=found["x"][at])
        if "w" in found:
            found["w"].addmm_(weighted.t(), z, beta=float(at.start > 0))
        if "w.T" in found:
            found["w.T"].addmm_(z.t(), weighted, beta=float(at.start > 0))
        if "b" in found:
            found["b"] += each[at].to(x.dtype) @ z
        del z  # before the next chunk's are made
    return list(found.values())


def _scaled(each: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of tokens as a scale, `[1]`, and what is left of them, up to 1: float16 holds that, and not all of `1e-5`."""
    scale = each.abs().amax(0, keepdim=True) if len(each) else each.new_ones(1)
    scale = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
    return scale, each / scale


def _outside(labels: torch.Tensor, vocab: int) -> torch.Tensor:
    return (labels < 0) | (labels >= vocab)


def _unmoved(params: Mapping[str, Any]) -> bool:
    """Whether no logit moves the loss of a token whose label is outside the vocabulary."""
    return params["invalid"] == "drop" and params["label_smoothing"] == 0


def _weights(arrays: Tensors, params: Mapping[str, Any]) -> torch.Tensor:
    """Of tokens in the sum of losses whose gradients the forward pass makes."""
    _, labels = _rows(arrays)
    each = arrays["weights"].reshape(-1).float() if "weights" in arrays else torch.ones(labels.shape, device=labels.device)
    # Left out by a factor 0, not by a choice: 0 times NaN is NaN, as in plain code.
    return each if params["invalid"] == "clip" else each * ~_outside(labels, arrays["w"].shape[1])


def _common(g: torch.Tensor, arrays: Tensors, params: Mapping[str, Any]) -> torch.Tensor | None:
    """The cotangent, `[1]`, of all tokens in the sum of the forward pass, if they have one, and those left out have 0."""
    every = params["invalid"] == "clip"
    if (every or _unmoved(params)) and g.numel() and all(s == 0 or d == 1 for s, d in zip(g.stride(), g.shape, strict=True)):
        return g[(0,) * g.dim()].reshape(1)  # one number in memory, as under a mean: there is nothing to compare
    if g.is_cuda and torch.cuda.is_current_stream_capturing():
        return None  # nothing can be asked of the device
    (_, labels), g = _rows(arrays), g.reshape(-1)
    outside = _outside(labels, arrays["w"].shape[1])
    free = outside if _unmoved(params) else torch.zeros_like(outside)
    if "weights" in arrays:
        free = free | (arrays["weights"].reshape(-1) == 0)
    summed = ~free if every else ~(free | outside)
    c = g[summed][:1] if bool(summed.any()) else g.new_zeros(1)
    return c if bool(((g == torch.where(summed, c, 0.0)) | free).all()) else None


@triton.jit
def scale_rows(values, factors, out, width, BLOCK: tl.constexpr):
    """`values factors`, a factor for each row; `out` may be `values`. torch rounds a lone factor, or takes three times as long."""
    across = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // across).to(tl.int64)
    col = (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(values + row * width + col, mask=col < width, other=0.0).to(tl.float32)
    tl.store(out + row * width + col, (v * tl.load(factors + row)).to(out.dtype.element_ty), mask=col < width)


def _times(gradient: torch.Tensor, factors: torch.Tensor, over: bool) -> torch.Tensor:
    """The product of a contiguous array and float32 factors of its rows, or one for all; in the array's memory if `over`."""
    out = gradient if over else torch.empty_like(gradient)
    if out.numel():
        width = out.numel() // len(factors)
        with launch.on(out):
            launch.run(scale_rows, (len(factors) * triton.cdiv(width, BLOCK),),
                gradient, factors.contiguous(), out, width, BLOCK=BLOCK, num_warps=WARPS
            )  # fmt: skip
    return out


def _early(arrays: Tensors, names: Sequence[str]) -> str:
    """A weight that is the transpose of what lies in memory, as torch's are, gets such a gradient."""
    turned = arrays["w"].stride(0) == 1 and arrays["w"].stride(1) != 1
    return " ".join("w.T" if n == "w" and turned else n for n in names if n != "weights")


def _forward(arrays: Tensors, params: dict[str, Any]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    shape = arrays["labels"].shape
    loss = torch.full((math.prod(shape),), -math.inf, dtype=torch.float32, device=arrays["x"].device)  # the loss of no vocabulary
    lse, made = torch.empty_like(loss), params.get("early", "").split()
    gradients = _sweep(arrays, params, loss, lse, made, _scaled(_weights(arrays, params))[1])
    loss = loss.reshape(shape)
    return [loss if "weights" not in arrays else loss * arrays["weights"].float()], [lse, loss, *gradients]


def _kept(specs: dict[str, Spec], params: Mapping[str, Any]) -> Sequence[Spec]:
    (tokens, width), (_, vocab) = (math.prod(specs["labels"].shape), specs["x"].shape[-1]), specs["w"].shape
    dtype = specs["x"].dtype
    shapes = {"x": ((tokens, width), dtype), "w": ((width, vocab), dtype), "w.T": ((vocab, width), dtype), "b": ((vocab,), "float32")}
    gradients = (Spec(*shapes[n]) for n in params.get("early", "").split())
    return (Spec((tokens,), "float32"), Spec(specs["labels"].shape, "float32"), *gradients)


def _backward(arrays: Tensors, params: Any, results: Any, kept: Any, cotangents: Any, wanted: Sequence[str]) -> Tensors:
    lse, loss, *early = kept
    g, last = cotangents[0], params.get("last", False)
    made = dict(zip(params.get("early", "").split(), early, strict=True))
    sums = [n for n in _early(arrays, wanted).split() if n != "x"]
    by_token = (g * arrays["weights"].float() if "weights" in arrays else g).reshape(-1)
    factor = None
    if sums and all(n in made for n in sums) and (c := _common(g, arrays, params)) is not None:
        factor = c * _scaled(_weights(arrays, params))[0]
    anew = ["x"] * ("x" in wanted and "x" not in made) + sums * (factor is None)
    over = dict.fromkeys(made, last) | dict.fromkeys(anew, True)
    if anew:
        scale, each = _scaled(by_token)
        made |= dict(zip(anew, _sweep(arrays, params, None, lse, anew, each), strict=True))
        factor = scale if factor is None else factor
    found: Tensors = {n.removesuffix(".T"): _times(made[n], factor, over[n]) for n in sums if factor is not None}
    if "w.T" in sums:
        found["w"] = found["w"].t()
    if "x" in wanted:
        found["x"] = _times(made["x"], by_token, over["x"]).reshape(arrays["x"].shape)
    if "weights" in wanted:
        found["weights"] = g * loss
    return found


linear_cross_entropy = library.kernel("linear_cross_entropy", "triton", _forward, _backward, kept=_kept, early=_early)


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why the kernels cannot take a call, in one clause, or None."""
    x, w = specs["x"], specs["w"]
    if x.dtype != w.dtype:
        return f"multiplies arrays of one dtype, and these are {x.dtype} and {w.dtype}"
    logits = Spec((math.prod(x.shape[:-1]), w.shape[1]), x.dtype)
    if math.prod(w.shape) > bounds.MOST - BLOCK:
        return f"takes up to 2^31 weights, and w is {list(w.shape)}"
    return cross_entropy.refusal({"logits": logits}, params) or bounds.wide_floats(specs, params)
