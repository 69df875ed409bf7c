"""Attention by the Triton kernels of `jitted/attention.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton

from kpt.ops.base import Spec
from kpt_torch import library
from kpt_torch.library import Tensors, torch_dtype
from kpt_torch.triton_kernels import launch
from kpt_torch.triton_kernels.jitted import attention as jitted
from kpt_torch.triton_kernels.jitted.attention import refusal as refusal


def _rows_last(t: torch.Tensor) -> torch.Tensor:
    """Strided as it may be, but for the last dim."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _common(arrays: Tensors, params: Mapping[str, Any]) -> tuple[list[Any], list[Any], list[Any], dict[str, Any]]:
    """(q, k, v), (ids and lengths), (sizes and scalars), constants."""
    q, k, v = (_rows_last(arrays[n]) for n in "qkv")
    ids = [arrays[n].contiguous() if n in params["mask"].operands else None for n in ("q_segment_ids", "kv_segment_ids", "kv_lengths")]
    return [q, k, v], ids, *jitted.sizes(q.shape, k.shape, v.shape, params)


def _forward(arrays: Tensors, params: dict[str, Any]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    scale = params["scale"]
    if scale is not None and scale <= 0:
        # The most of scores is looked for among the products. 0 times what is hidden, -inf, would be NaN.
        arrays, params = arrays | {"q": -arrays["q"]}, params | {"scale": max(-scale, 1e-37)}
    (q, k, v), ids, sizes, constants = _common(arrays, params)
    batch, queries, heads, _ = q.shape
    dtype = q.dtype if params["out_dtype"] is None else torch_dtype(params["out_dtype"])
    out = torch.empty((*q.shape[:3], v.shape[-1]), dtype=dtype, device=q.device)
    wide = torch.empty_like(out, dtype=torch.float32) if params.get("early") and dtype != torch.float32 else None
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    empty, fill = jitted.may_be_empty(params["mask"]), params["mask"].fill
    means = v.mean(1, dtype=torch.float32).contiguous() if empty and math.isfinite(fill) else None
    tiles = jitted.tiles(launch.family(q), q.element_size(), constants)
    t = tiles.busy if constants["CAP"] or ids[0] is not None else tiles.forward
    with launch.on(q):
        launch.run(jitted.forward_blocks, (batch * heads * triton.cdiv(queries, t.queries),),
            q, k, v, *ids, means, out, wide, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *sizes, **constants,
            QUERIES=t.queries, KEYS=t.keys, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return [out], [lse] if wide is None else [lse, wide]


def _backward(arrays: Tensors, params: Any, results: Any, kept: Any, cotangents: Any, wanted: Sequence[str]) -> Tensors:
    (q, k, v), ids, sizes, constants = _common(arrays, params)
    (lse, *wide), g = kept, _rows_last(cotangents[0].to(q.dtype))
    out = wide[0] if wide else results[0]
    batch, queries, heads, _ = q.shape
    keys, shared = k.shape[1:3]
    delta = torch.empty_like(lse)
    found = {n: torch.empty(arrays[n].shape, dtype=arrays[n].dtype, device=q.device) for n in "qkv"}
    tiles, given = jitted.tiles(launch.family(q), q.element_size(), constants), (q, k, v, g, lse, delta, *ids)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *g.stride()[:3])
    with launch.on(q):
        launch.run(jitted.delta_rows, (batch * heads * triton.cdiv(queries, 32),),
            out, g, lse, delta, *g.stride()[:3], queries, heads, v.shape[-1], V_HEAD=constants["V_HEAD"], QUERIES=32
        )  # fmt: skip
        if "q" in wanted:
            t = tiles.dq
            launch.run(jitted.queries_backward, (batch * heads * triton.cdiv(queries, t.queries),),
                *given, found["q"], *strides, *sizes, **constants, QUERIES=t.queries, KEYS=t.keys, num_warps=t.warps, num_stages=t.stages
            )  # fmt: skip
        if "k" in wanted or "v" in wanted:
            t = tiles.dkv
            launch.run(jitted.keys_backward, (batch * shared * triton.cdiv(keys, t.keys),),
                *given, found["k"], found["v"], *strides, *sizes, **constants,
                QUERIES=t.queries, KEYS=t.keys, STAGES=t.stages, num_warps=t.warps,
            )  # fmt: skip
    if "v" in wanted and jitted.may_be_empty(params["mask"]):
        # Of a query that sees nothing the probabilities are those of equal scores, or NaN.
        unseen = (lse == math.inf).transpose(1, 2)[..., None]
        finite = math.isfinite(params["mask"].fill)
        each = (g * unseen).sum(1, dtype=torch.float32) / keys if finite else torch.where(unseen.any(1), math.nan, 0.0)
        spread = each.unflatten(1, (shared, heads // shared)).sum(2)
        found["v"] = (found["v"].float() + spread[:, None]).to(v.dtype)
    return found


def _kept(specs: dict[str, Spec], params: Mapping[str, Any]) -> Sequence[Spec]:
    (batch, queries, heads, _), v = specs["q"].shape, specs["v"].shape
    wide = params.get("early") and (params["out_dtype"] or specs["q"].dtype) != "float32"
    return Spec((batch, heads, queries), "float32"), *([Spec((batch, queries, heads, v[-1]), "float32")] if wide else [])


def _early(arrays: Tensors, names: Sequence[str]) -> str:
    """The result in float32: where one key has nearly all of the weight, gradients are differences that a rounded result spoils."""
    return "result"


attention = library.kernel("attention", "triton", _forward, _backward, kept=_kept, early=_early, reads=(0,), fresh=True)
