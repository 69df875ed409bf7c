"""What autocast does to the arguments of an op: asked of autocast itself, by running the op on fake tensors and seeing what is cast."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from kpt_torch.library import dtype_name


class _Casts(TorchDispatchMode):
    """Notes the casts of given tensors."""

    def __init__(self, given: list[torch.Tensor]):
        super().__init__()
        self.given, self.seen = given, [None] * len(given)  # type: list[torch.Tensor], list[str | None]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            for i, t in enumerate(self.given):
                if args[0] is t and self.seen[i] is None:
                    self.seen[i] = dtype_name(out.dtype)
        return out


def casts(n: fx.Node, device: str, dtype: torch.dtype) -> tuple[str | None, ...]:
    """For each tensor among the arguments of `n`, in order, the dtype that autocast casts it to, or None."""
    leaf = lambda a: isinstance(a, fx.Node)  # noqa: E731
    flat, tree = pytree.tree_flatten((tuple(n.args), dict(n.kwargs)), is_leaf=leaf)
    items: list[Any] = []
    for a in flat:
        val = a.meta.get("val") if isinstance(a, fx.Node) else a
        if isinstance(val, torch.Tensor):
            items.append(("tensor", tuple(_hint(s) for s in val.shape), val.dtype))
        elif isinstance(val, torch.SymInt):
            items.append(("number", _hint(val)))
        else:
            items.append(("number", val))
    try:
        return _asked(n.target, tuple(items), tree, device, dtype)
    except TypeError:  # an argument that cannot be hashed
        return _asked.__wrapped__(n.target, tuple(items), tree, device, dtype)


def _hint(n: Any) -> int:
    return int(n.node.hint) if isinstance(n, torch.SymInt) else int(n)


@functools.lru_cache(maxsize=4096)
def _asked(target: Any, items: tuple, tree: Any, device: str, dtype: torch.dtype) -> tuple[str | None, ...]:
    with torch._guards.tracing(None), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        flat = [torch.empty(i[1], dtype=i[2], device=device) if i[0] == "tensor" else i[1] for i in items]
        tensors = [t for t in flat if isinstance(t, torch.Tensor)]
        args, kwargs = pytree.tree_unflatten(flat, tree)
        with _Casts(tensors) as seen, torch.autocast(device, dtype):
            target(*args, **kwargs)
    return tuple(seen.seen)
