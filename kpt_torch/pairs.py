"""Two sites of one op that share arrays as one launch: a layer's queries and keys, turned by the same angles.

A kernel that can says so by an attribute `pair`, a kernel of the same arrays and `other`, the second site's x, which returns both results.
Each site has been planned and proved alone; a pair is made only of two that give the same bits together.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from kpt.fusion.program import Match, Program
from kpt_torch.apply import span
from kpt_torch.capture import Captured
from kpt_torch.library import torch_dtype
from kpt_torch.lower import effectful

log = logging.getLogger("kpt")

Kept = Sequence[tuple[Match, Callable[..., Any]]]


def found(captured: Captured, program: Program, kept: Kept, order: Mapping[fx.Node, int], device: torch.device) -> list[tuple[int, int]]:
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
            if _same_bits(kept[i][1], *_call(kept[i][0]), kept[j][0].arrays["x"].spec, device):
                pairs.append((i, j))
                taken |= {i, j}
    return pairs


def _alike(a: Match, b: Match) -> bool:
    """Whether two sites differ in x alone, and in x by its heads alone: `[B, T, N, H]`."""
    shared = [n for n in a.arrays if n != "x"]
    x, other = a.arrays["x"].spec, b.arrays["x"].spec
    sizes = [(s.shape[:2], s.shape[3], s.dtype) for s in (x, other)]
    return a.op == b.op and a.params == b.params and all(a.arrays[n] is b.arrays[n] for n in shared) and sizes[0] == sizes[1]


def _call(match: Match) -> tuple[Any, ...]:
    return tuple((n, e.spec) for n, e in match.arrays.items()), tuple(sorted(match.params.items()))


@functools.cache
def _same_bits(kernel: Any, specs: Any, params: Any, other: Any, device: torch.device) -> bool:
    """Whether the pair gives what two calls give, results and gradients of both, to the bit."""
    try:
        return _compared(kernel, specs, params, other, device)
    except Exception as error:  # a pair that fails costs a launch, never the user's run
        log.warning("%s was not paired: %s: %s", getattr(kernel, "__name__", kernel), type(error).__name__, error)
        return False


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
