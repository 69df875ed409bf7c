"""Several cotangents at once, a backward pass for each: `torch.func.vmap` over a gradient, and the older vmap that autograd has itself.

`torch.autograd.grad(..., is_grads_batched=True)`, and with it `torch.autograd.functional.jacobian(..., vectorize=True)`, batch tensors
under the dispatch key `Batched`. `torch.library` has no way to give an op a rule for it, and torch has no fallback for lists of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

Pass = Callable[..., Sequence[torch.Tensor]]

_keys: Any = torch._C._dispatch_keys
_BATCHED = torch._C._parse_dispatch_key("Batched")  # which is not among the names of `DispatchKey`


def of_vmap(fn: Pass, info: Any, dims: tuple, *given: Any) -> tuple[list[torch.Tensor], list[int]]:
    """The rule of `fn` for `torch.func.vmap`."""
    flat, tree = pytree.tree_flatten(given)
    made = _each(lambda *flat: fn(*pytree.tree_unflatten(flat, tree)), flat, pytree.tree_leaves(dims), info.batch_size)
    return made, [0] * len(made)


def of_older_vmap(fn: Pass, *given: Any) -> Sequence[torch.Tensor]:
    """`fn`, for each of what the older vmap has batched in its arguments; as it is where that has batched nothing."""
    flat, tree = pytree.tree_flatten(given)
    if not any(isinstance(t, torch.Tensor) and _keys(t).has(_BATCHED) for t in flat):
        return fn(*given)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return _at(level, lambda *flat: fn(*pytree.tree_unflatten(flat, tree)), flat)


def _at(level: int, fn: Pass, flat: Sequence[Any]) -> Sequence[torch.Tensor]:
    """`fn` for each of what is batched at this level of the nesting, and at those outside of it."""
    if level == 0:
        return fn(*flat)
    # What is not batched at this level is expanded to the size that is named here. No batch is empty.
    whole = [torch._remove_batch_dim(t, level, 0, 0) if isinstance(t, torch.Tensor) else None for t in flat]
    sizes = [0 if t is None else t.shape[0] for t in whole]
    if not any(sizes):
        return _at(level - 1, fn, flat)
    parts = [w if size else t for t, w, size in zip(flat, whole, sizes, strict=True)]
    made = _each(lambda *flat: _at(level - 1, fn, flat), parts, [0 if size else None for size in sizes], max(sizes))
    return [torch._add_batch_dim(t, 0, level) for t in made]


def _each(fn: Pass, flat: Sequence[Any], dims: Sequence[int | None], size: int) -> list[torch.Tensor]:
    """`fn` for each of the slices along these dims, what it makes of them stacked."""
    made = [fn(*(t if d is None else t.select(d, i) for t, d in zip(flat, dims, strict=True))) for i in range(size)]
    return [torch.stack(each) for each in zip(*made, strict=True)]
