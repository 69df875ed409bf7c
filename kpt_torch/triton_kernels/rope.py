"""rope in Triton: `x cos + rotate(x) sin` on the first R of the head dim (arXiv:2104.09864).

A position's angles are read once for a tile of its heads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from kpt import ops
from kpt.ops.base import Cost, Spec, Specs
from kpt_torch import library
from kpt_torch.library import Tensors, torch_dtype
from kpt_torch.triton_kernels import launch

TILE, WARPS = 4096, 4


@triton.jit
def _turned(a, b, ca, cb, sa, sb, BACKWARD: tl.constexpr):
    """Pairs (a, b) turned by their angles; backward, by the transposed matrix."""
    if BACKWARD:
        return a * ca + b * sb, b * cb - a * sa
    return a * ca - b * sa, b * cb + a * sb


@triton.jit
def _turn(
    x, cos, sin, y, place, head, x_batch, x_time, x_head, x_dim, table_batch, times, heads, size, width,
    INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """A tile of heads at one position. `x` is strided, `y` contiguous; `BLOCK` covers R / 2, `TAIL` what is past R, or is 0."""
    batch, time = place // times, place % times
    read = x + batch * x_batch + time * x_time + head[:, None] * x_head
    write = y + (place * heads + head[:, None]) * width
    table = batch * table_batch + time * size
    if INTERLEAVED:  # neighbours come in one piece and are parted in registers, so that loads stay wide
        i = tl.arange(0, 2 * BLOCK)
        there = (head < heads)[:, None] & (i < size)[None, :]
        z = tl.load(read + i[None, :] * x_dim, mask=there, other=0.0).to(tl.float32)
        c = tl.load(cos + table + i, mask=i < size, other=0.0).to(tl.float32)
        s = tl.load(sin + table + i, mask=i < size, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(z, [HEADS, BLOCK, 2]))
        ca, cb = tl.split(tl.reshape(c, [1, BLOCK, 2]))
        sa, sb = tl.split(tl.reshape(s, [1, BLOCK, 2]))
        a, b = _turned(a, b, ca, cb, sa, sb, BACKWARD)
        tl.store(write + i[None, :], tl.reshape(tl.join(a, b), [HEADS, 2 * BLOCK]).to(y.dtype.element_ty), mask=there)
    else:
        half = size // 2
        i = tl.arange(0, BLOCK)
        there = (head < heads)[:, None] & (i < half)[None, :]
        a = tl.load(read + i[None, :] * x_dim, mask=there, other=0.0).to(tl.float32)
        b = tl.load(read + (half + i)[None, :] * x_dim, mask=there, other=0.0).to(tl.float32)
        ca = tl.load(cos + table + i, mask=i < half, other=0.0).to(tl.float32)[None, :]
        cb = tl.load(cos + table + half + i, mask=i < half, other=0.0).to(tl.float32)[None, :]
        sa = tl.load(sin + table + i, mask=i < half, other=0.0).to(tl.float32)[None, :]
        sb = tl.load(sin + table + half + i, mask=i < half, other=0.0).to(tl.float32)[None, :]
        a, b = _turned(a, b, ca, cb, sa, sb, BACKWARD)
        tl.store(write + i[None, :], a.to(y.dtype.element_ty), mask=there)
        tl.store(write + (half + i)[None, :], b.to(y.dtype.element_ty), mask=there)
    if TAIL:
        i = size + tl.arange(0, TAIL)
        there = (head < heads)[:, None] & (i < width)[None, :]
        z = tl.load(read + i[None, :] * x_dim, mask=there, other=0.0).to(tl.float32)
        tl.store(write + i[None, :], z.to(y.dtype.element_ty), mask=there)


@triton.jit
def turn(
    x, cos, sin, y, x_batch, x_time, x_head, x_dim, table_batch, times, heads, size, width,
    INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(heads, HEADS)
    place = (tl.program_id(0) // across).to(tl.int64)
    head = (tl.program_id(0) % across) * HEADS + tl.arange(0, HEADS)
    _turn(x, cos, sin, y, place, head, x_batch, x_time, x_head, x_dim, table_batch, times, heads, size, width,
          INTERLEAVED, BACKWARD, HEADS, BLOCK, TAIL)  # fmt: skip


@triton.jit
def turn_both(
    x, other, cos, sin, y, z, x_batch, x_time, x_head, x_dim, other_batch, other_time, other_head, other_dim, table_batch, times,
    heads, other_heads, size, width,
    INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, HEADS: tl.constexpr, OTHER_HEADS: tl.constexpr, BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Two arrays by the same tables: a position's tiles of the one, then those of the other, while its angles are in the cache."""
    across, behind = tl.cdiv(heads, HEADS), tl.cdiv(other_heads, OTHER_HEADS)
    place = (tl.program_id(0) // (across + behind)).to(tl.int64)
    tile = tl.program_id(0) % (across + behind)
    if tile < across:
        _turn(x, cos, sin, y, place, tile * HEADS + tl.arange(0, HEADS), x_batch, x_time, x_head, x_dim, table_batch, times, heads, size,
              width, INTERLEAVED, BACKWARD, HEADS, BLOCK, TAIL)  # fmt: skip
    else:
        head = (tile - across) * OTHER_HEADS + tl.arange(0, OTHER_HEADS)
        _turn(other, cos, sin, z, place, head, other_batch, other_time, other_head, other_dim, table_batch, times, other_heads, size,
              width, INTERLEAVED, BACKWARD, OTHER_HEADS, BLOCK, TAIL)  # fmt: skip


def _tile(size: int, width: int, heads: int) -> tuple[int, int, int]:
    """(heads, half of what turns, tail) of a program: powers of two; a tail of 0 is none."""
    half = launch.block(size // 2, launch.MOST)
    tail = triton.next_power_of_2(width - size) if width > size else 0
    return launch.block(heads, max(1, TILE // (2 * half + tail))), half, tail


def _run(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype, interleaved: bool, backward: bool) -> torch.Tensor:
    batch, times, heads, width = x.shape
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    size = cos.shape[-1]
    if y.numel():
        tile, half, tail = _tile(size, width, heads)
        with launch.on(x):
            turn[(batch * times * triton.cdiv(heads, tile),)](
                x, cos.contiguous(), sin.contiguous(), y, *x.stride(), times * size if cos.shape[0] > 1 else 0, times, heads, size, width,
                INTERLEAVED=interleaved, BACKWARD=backward, HEADS=tile, BLOCK=half, TAIL=tail, num_warps=WARPS,
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
    (tile, half, tail), (other_tile, _, _) = _tile(size, width, heads), _tile(size, width, more)
    with launch.on(x):
        turn_both[(batch * times * (triton.cdiv(heads, tile) + triton.cdiv(more, other_tile)),)](
            x, other, cos.contiguous(), sin.contiguous(), y, z, *x.stride(), *other.stride(),
            times * size if cos.shape[0] > 1 else 0, times, heads, more, size, width,
            INTERLEAVED=interleaved, BACKWARD=backward, HEADS=tile, OTHER_HEADS=other_tile, BLOCK=half, TAIL=tail, num_warps=WARPS,
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


rope = library.kernel("rope", "triton", _forward, _backward)


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
rope_pair = library.kernel(BOTH, "triton", _both_forward, _both_backward)
rope.pair = rope_pair  # type: ignore[attr-defined]  # see kpt_torch/pairs.py


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why the kernel cannot take a call, in one clause, or None."""
    shape = specs["x"].shape
    if shape[-1] > TILE or math.prod(shape[:-1]) > launch.MOST:
        return f"takes head dims up to {TILE}, and x is {list(shape)}"
    return launch.wide_floats(specs, params)
