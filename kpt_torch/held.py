"""Masks and scalars that a module holds in buffers, known while a graph is planned: GPT-2's triangle is a causal mask, not some array.

Dynamo hands what a module holds to a graph as an input. Its values are looked at where there are at most two of them, which is what a
mask has, and the rewritten graph runs as long as they are the same. Identity and version counter say so, for torch counts every write (but
those through `.data`, which autograd does not see either); where one of them is another, the values are compared, and where these are,
the graph is planned anew without that input's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakTensorKeyDictionary

from kpt_torch.library import nobody_watches

MOST = 1 << 22  # elements: a triangle for 2048 positions, and it is held twice


@dataclasses.dataclass(eq=False)
class Held:
    """What a buffer held when its graph was planned, and the tensors that were found to hold it, at which version."""

    values: torch.Tensor
    seen: Any = dataclasses.field(default_factory=WeakTensorKeyDictionary)

    def by(self, t: torch.Tensor) -> bool:
        """Whether `t` holds it now."""
        if t.is_inference() or not nobody_watches([t]):
            return False
        if self.seen.get(t) == t._version:
            return True
        mine = self.values
        if (t.shape, t.dtype, t.device) != (mine.shape, mine.dtype, mine.device) or not torch.equal(t, mine):
            return False
        self.seen[t] = t._version
        return True


def held(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[int, Held]:
    """The inputs of Dynamo's graph that are such buffers, by number."""
    found = {}
    for i, (n, t) in enumerate(zip((n for n in gm.graph.nodes if n.op == "placeholder"), inputs, strict=True)):
        if isinstance(t, torch.Tensor) and not t.requires_grad and _of_a_module(n) and _readable(t):
            found[i] = Held(t.detach().clone())
            found[i].by(t)
    return found


def _of_a_module(n: fx.Node) -> bool:
    """Whether a module holds what comes in here, as a buffer or as a plain attribute."""
    source = getattr(n.meta.get("grapharg"), "source", None)
    base = getattr(source, "base", None)
    return getattr(base, "member", None) == "_buffers" or hasattr(source, "member") and type(base).__name__.endswith("NNModuleSource")


def _readable(t: torch.Tensor) -> bool:
    """Whether it is a scalar that is no count, or a matrix of no more than two values. (There are none that do not equal themselves.)"""
    if not 0 < t.numel() <= MOST or t.dtype.is_complex or t.is_inference() or not nobody_watches([t]):
        return False
    if t.ndim < 2 or min(t.shape[-2:]) < 2:
        return t.ndim == 0 and t.is_floating_point()
    return t.dtype == torch.bool or bool(((t == t.min()) | (t == t.max())).all())


def while_held(
    known: Mapping[int, Held], run: Callable[..., Any], again: Callable[[Sequence[Any], dict[int, Held]], Callable[..., Any]]
) -> Callable[..., Any]:  # fmt: skip
    """`run` while the inputs hold what they held; from the first call on for which some do not, what `again` makes of its arguments.

    `again` is given those that still do.
    """
    other: Callable[..., Any] | None = None

    def call(*args: Any) -> Any:
        nonlocal other
        if other is None:
            still = {i: h for i, h in known.items() if h.by(args[i])}
            if len(still) < len(known):
                other = again(args, still)
        return (other or run)(*args)

    return call
