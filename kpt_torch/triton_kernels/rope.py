"""rope by the Triton kernels of `jitted/rope.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

from kpt import ops
from kpt.ops.base import Cost, Spec, Specs
from kpt_torch import library
from kpt_torch.library import Tensors, torch_dtype
from kpt_torch.triton_kernels import launch
from kpt_torch.triton_kernels.jitted import rope as jitted
from kpt_torch.triton_kernels.jitted.rope import refusal as refusal


def _run(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype, interleaved: bool, backward: bool) -> torch.Tensor:
    batch, times, heads, width = x.shape
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    size = cos.shape[-1]
    if y.numel():
        tile, half, tail = jitted.tile(size, width, heads)
        with launch.on(x):
            launch.run(jitted.turn, (batch * times * triton.cdiv(heads, tile),),
                x, cos.contiguous(), sin.contiguous(), y, *x.stride(), times * size if cos.shape[0] > 1 else 0, times, heads, size, width,
                INTERLEAVED=interleaved, BACKWARD=backward, HEADS=tile, BLOCK=half, TAIL=tail, num_warps=jitted.WARPS,
            )  # fmt: skip
    return y


def _run_both(
    x: torch.Tensor, other: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype, interleaved: bool, backward: bool
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    batch, times, heads, width = x.shape
    y, z = (torch.empty(t.shape, dtype=dtype, device=t.device) for t in (x, other))
    size, more = cos.shape[-1], other.shape[2]
    if not y.numel() or not z.numel():
        return tuple(_run(t, cos, sin, dtype, interleaved, backward) for t in (x, other))  # type: ignore[return-value]
    (tile, half, tail), (other_tile, _, _) = jitted.tile(size, width, heads), jitted.tile(size, width, more)
    with launch.on(x):
        launch.run(jitted.turn_both, (batch * times * (triton.cdiv(heads, tile) + triton.cdiv(more, other_tile)),),
            x, other, cos.contiguous(), sin.contiguous(), y, z, *x.stride(), *other.stride(),
            times * size if cos.shape[0] > 1 else 0, times, heads, more, size, width,
            INTERLEAVED=interleaved, BACKWARD=backward, HEADS=tile, OTHER_HEADS=other_tile, BLOCK=half, TAIL=tail, num_warps=jitted.WARPS,
        )  # fmt: skip
    return y, z


def _forward(arrays: Tensors, params: dict[str, Any]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    x = arrays["x"]
    out = x.dtype if params["out_dtype"] is None else torch_dtype(params["out_dtype"])
    return [_run(x, arrays["cos"], arrays["sin"], out, params["interleaved"], False)], []


def _backward(arrays: Tensors, params: Any, results: Any, kept: Any, cotangents: Any, wanted: Sequence[str]) -> Tensors:
    x, cos, sin, g = arrays["x"], arrays["cos"], arrays["sin"], cotangents[0]
    found: Tensors = {"x": _run(g, cos, sin, x.dtype, params["interleaved"], True)} if "x" in wanted else {}
    return found | _tables([(x, g)], cos, params["interleaved"], wanted)


def _tables(given: Sequence[tuple[torch.Tensor, torch.Tensor]], cos: torch.Tensor, interleaved: bool, wanted: Sequence[str]) -> Tensors:
    """Gradients of the tables from arrays and their cotangents.

    Angles are learned by few: sums over heads, and over the batch where it shares them, in plain torch.
    """
    found: Tensors = {}
    size = cos.shape[-1]
    for name in ("cos", "sin"):
        for x, g in given if name in wanted else ():
            z = x[..., :size].float()
            if name == "sin":
                z = _rotated(z, interleaved)
            made = (g[..., :size].float() * z).sum(2)
            made = made.sum(0, keepdim=True) if cos.shape[0] != made.shape[0] else made
            found[name] = found[name] + made if name in found else made
    return found


def _rotated(z: torch.Tensor, interleaved: bool) -> torch.Tensor:
    pairs = z.unflatten(-1, (z.shape[-1] // 2, 2) if interleaved else (2, z.shape[-1] // 2))
    a, b = pairs.unbind(-1 if interleaved else -2)
    return torch.stack((-b, a), -1 if interleaved else -2).reshape(z.shape)


rope = library.kernel("rope", "triton", _forward, _backward, fresh=True)


def _both_forward(arrays: Tensors, params: dict[str, Any]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    x = arrays["x"]
    out = x.dtype if params["out_dtype"] is None else torch_dtype(params["out_dtype"])
    return _run_both(x, arrays["other"], arrays["cos"], arrays["sin"], out, params["interleaved"], False), []


def _both_backward(arrays: Tensors, params: Any, results: Any, kept: Any, cotangents: Any, wanted: Sequence[str]) -> Tensors:
    cos, sin, interleaved = arrays["cos"], arrays["sin"], params["interleaved"]
    turned: Sequence[torch.Tensor] = ()
    if "x" in wanted or "other" in wanted:  # both, if either: what would be saved is half of one launch
        turned = _run_both(cotangents[0], cotangents[1], cos, sin, arrays["x"].dtype, interleaved, True)
    given = [(arrays[n], g) for n, g in zip(("x", "other"), cotangents, strict=True)]
    return dict(zip(("x", "other"), turned, strict=False)) | _tables(given, cos, interleaved, wanted)


def _of_each(fn: Callable[..., Any]) -> Callable[..., tuple]:
    """Of x and of the other array, by a function of one."""
    return lambda *, x, other, **rest: (*fn(x=x, **rest), *fn(x=other, **rest))


def _specs_of_each(specs: Specs) -> list[dict[str, Spec]]:
    return [{"x": specs[n], "cos": specs["cos"], "sin": specs["sin"]} for n in ("x", "other")]


def _infer_both(specs: Specs, **params: Any) -> tuple[Spec, ...]:
    return tuple(s for each in _specs_of_each(specs) for s in ROPE.infer(each, **params))


def _cost_of_both(specs: Specs, **params: Any) -> Cost:
    a, b = (ROPE.cost(each, **params) for each in _specs_of_each(specs))
    return Cost(a.flops + b.flops, a.bytes + b.bytes)


def _reference_vjp_both(cotangents: tuple, *, x: Any, other: Any, **rest: Any) -> dict[str, Any]:
    a, b = (ROPE.reference_vjp((g,), x=z, **rest) for g, z in zip(cotangents, (x, other), strict=True))
    return {"x": a["x"], "other": b["x"], "cos": a["cos"] + b["cos"], "sin": a["sin"] + b["sin"]}


ROPE = ops.op("rope")
BOTH = dataclasses.replace(
    ROPE, name="rope_pair", arrays=("x", "other", "cos", "sin"), differentiable=("x", "other", "cos", "sin"), infer=_infer_both,
    reference=_of_each(ROPE.reference), reference_vjp=_reference_vjp_both,
    cost=_cost_of_both,
)  # fmt: skip
"""Two calls of the op by one pair of tables: no op that programs are searched for, but how two sites of one are run."""
rope_pair = library.kernel(BOTH, "triton", _both_forward, _both_backward, fresh=True)
rope.pair = rope_pair  # type: ignore[attr-defined]  # see kpt_torch/pairs.py
