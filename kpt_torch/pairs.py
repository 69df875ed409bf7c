"""Sites that run together with what stands beside them: in one launch, or with less kept for the backward pass.

Two sites of one op that share arrays are one launch: a layer's queries and keys, turned by the same angles. A kernel that can says so by an
attribute `pair`, a kernel of the same arrays and `other`, the second site's x, which returns both results. A site whose result one
linear layer alone reads is one call with it, and its result is not kept: a gated MLP. A kernel that can has an attribute `then_linear`, a
kernel of the same arrays and `w_down`, the layer's weight. Each site is planned and proved alone; what runs together gives the same bits.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from kpt.fusion.program import Match, Program
from kpt_torch.apply import is_symbolic, span
from kpt_torch.capture import Captured
from kpt_torch.library import torch_dtype
from kpt_torch.lower import aten, effectful

log = logging.getLogger("kpt")

Kept = Sequence[tuple[Match, Callable[..., Any]]]
Apart = Callable[[int, str], None]
"""Is told of a site, by its place in `kept`, that it runs apart from what stands beside it, and why."""


def found(
    captured: Captured, program: Program, kept: Kept, order: Mapping[fx.Node, int], device: torch.device, apart: Apart
) -> list[tuple[int, int]]:
    """Pairs of sites, by their places in `kept`, in which the second one can run where the first one does.

    That is: what the second one reads is there before the first one's result, and nothing is written, drawn or switched between the two.
    """
    spans = {i: span(captured, program, m, order) for i, (m, fn) in enumerate(kept) if hasattr(fn, "pair")}
    by_place = sorted((s[0], i) for i, s in spans.items() if s is not None)
    pairs: list[tuple[int, int]] = []
    taken: set[int] = set()
    for at, (first, i) in enumerate(by_place):
        for second, j in by_place[at + 1 :]:
            if {i, j} & taken or kept[i][1] is not kept[j][1] or not _alike(kept[i][0], kept[j][0]):
                continue
            _, reads = spans[j]  # type: ignore[misc]
            between = [n for n, place in order.items() if first <= place <= second]
            if reads >= first or any(first <= m <= second for m in captured.marks) or any(effectful(n) for n in between):
                continue
            if why := _differs(kept[i][1], *_call(kept[i][0]), kept[j][0].arrays["x"].spec, device):
                apart(i, why)
                continue
            pairs.append((i, j))
            taken |= {i, j}
    return pairs


def read_by_linear(
    captured: Captured, program: Program, kept: Kept, order: Mapping[fx.Node, int], device: torch.device, apart: Apart
) -> dict[fx.Node, int]:  # fmt: skip
    """Linear layers without bias that alone read a site's result, where nothing is written, drawn or switched in between; the site's place
    in `kept` by the layer's node."""
    inside = {n.payload for m, _ in kept for n in program.consumed(m)}
    layers: dict[fx.Node, int] = {}
    for i, (match, fn) in enumerate(kept):
        place = span(captured, program, match, order) if hasattr(fn, "then_linear") else None
        (v, e), *more = match.results.items()
        node, index = captured.made.get(v, (None, None))
        if place is None or more or e.op != "out" or node is None or index is not None or len(node.users) != 1:
            continue
        (layer,) = node.users
        if layer.target is not aten.linear.default or layer in inside or layer.args[0] is not node or len(layer.all_input_nodes) != 2:
            continue
        between = [n for n, at in order.items() if place[0] <= at <= order[layer]]
        if any(place[0] <= m <= order[layer] for m in captured.marks) or any(effectful(n) for n in between):
            continue
        weight = layer.args[1].meta.get("val")  # type: ignore[union-attr]
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or any(map(is_symbolic, weight.shape)):
            continue
        dtype, x = captured.autocast.get(layer, {}).get(device.type) or weight.dtype, match.arrays["x"].spec.dtype
        if dtype != torch_dtype(x) or e.spec.dtype != x:
            continue
        if why := _differs_with_linear(fn, *_call(match), tuple(map(int, weight.shape)), device):
            apart(i, why)
        else:
            layers[layer] = i
    return layers


def _alike(a: Match, b: Match) -> bool:
    """Whether two sites differ in x alone, and in x by its heads alone: `[B, T, N, H]`."""
    shared = [n for n in a.arrays if n != "x"]
    x, other = a.arrays["x"].spec, b.arrays["x"].spec
    sizes = [(s.shape[:2], s.shape[3], s.dtype) for s in (x, other)]
    return a.op == b.op and a.params == b.params and all(a.arrays[n] is b.arrays[n] for n in shared) and sizes[0] == sizes[1]


def _call(match: Match) -> tuple[Any, ...]:
    return tuple((n, e.spec) for n, e in match.arrays.items()), tuple(sorted(match.params.items()))


@functools.cache
def _differs(kernel: Any, specs: Any, params: Any, other: Any, device: torch.device) -> str:
    """How the pair differs from two calls in results and gradients of both, "" where it has their bits."""
    return _tried(kernel, lambda: _compared(kernel, specs, params, other, device))


@functools.cache
def _differs_with_linear(kernel: Any, specs: Any, params: Any, weight: tuple[int, ...], device: torch.device) -> str:
    """How one call of the kernel and a linear layer differs from two, in result and gradients, "" where it has their bits."""
    return _tried(kernel, lambda: _compared_with_linear(kernel, specs, params, weight, device))


def _tried(kernel: Any, compared: Callable[[], bool]) -> str:
    try:
        why = "" if compared() else "its results or gradients have other bits"
    except Exception as error:  # what fails costs a launch, never the user's run
        why = f"{type(error).__name__}: {error}"
    if why:
        log.warning("%s runs alone: %s", getattr(kernel, "__name__", kernel), why)
    return why


def _compared(kernel: Any, specs: Any, params: Any, other: Any, device: torch.device) -> bool:
    generator = torch.Generator(device).manual_seed(0)

    def drawn(spec: Any) -> torch.Tensor:
        return torch.randn(spec.shape, generator=generator, device=device).to(torch_dtype(spec.dtype))

    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        arrays = {n: drawn(s) for n, s in specs}
        x, second = arrays.pop("x").requires_grad_(), drawn(other).requires_grad_()
        both = kernel.pair(x=x, other=second, **arrays, **dict(params))
        alone = [kernel(x=t, **arrays, **dict(params)) for t in (x, second)]
        weights = [drawn(s).to(y.dtype) for s, y in zip((dict(specs)["x"], other), alone, strict=True)]
        slopes = [torch.autograd.grad(made, (x, second), weights) for made in (both, alone)]
    return all(torch.equal(a, b) for a, b in zip((*both, *slopes[0]), (*alone, *slopes[1]), strict=True))


def _compared_with_linear(kernel: Any, specs: Any, params: Any, weight: tuple[int, ...], device: torch.device) -> bool:
    generator = torch.Generator(device).manual_seed(0)

    def drawn(shape: Sequence[int], dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)

    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        arrays = {n: drawn(s.shape, torch_dtype(s.dtype), s.shape[0] ** -0.5 if n.startswith("w") else 1.0) for n, s in specs}
        # The weights of linear layers are turned in memory; the layout decides which product is called.
        arrays = {n: (t.t().contiguous().t() if n.startswith("w") else t).requires_grad_() for n, t in arrays.items()}
        w = drawn(weight, arrays["x"].dtype, weight[1] ** -0.5).requires_grad_()
        made = [kernel.then_linear(**arrays, w_down=w.t(), **dict(params)), F.linear(kernel(**arrays, **dict(params)), w)]
        g = drawn(made[0].shape, made[0].dtype)
        slopes = [torch.autograd.grad(y, (*arrays.values(), w), g) for y in made]
    return all(torch.equal(a, b) for a, b in zip((made[0], *slopes[0]), (made[1], *slopes[1]), strict=True))
