"""Where autocast is in force, and what it does to the arguments of an op: asked of autocast itself, by running the op on fake tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from kpt_torch.library import dtype_name

KINDS = tuple(k for k in ("cpu", "cuda", "xpu", "mps", "xla") if torch.amp.is_autocast_available(k))


@dataclasses.dataclass
class State:
    """What the markers in a graph have switched: autocast by device, gradients."""

    autocast: dict[str, torch.dtype]
    gradients: bool
    left: dict[fx.Node, dict[str, torch.dtype]] = dataclasses.field(default_factory=dict)

    def enters(self, n: fx.Node) -> bool:
        """Whether `n` is a marker; takes note of it."""
        name = getattr(n.target, "__name__", "") if not isinstance(n.target, str) else n.target
        if name == "_enter_autocast":
            given: Any = n.args
            device, dtype, on, _ = given
            self.left[n] = dict(self.autocast)
            self.autocast.pop(str(device), None)
            if on:
                self.autocast[str(device)] = dtype or torch.get_autocast_dtype(str(device))
        elif name == "_exit_autocast":
            region: Any = n.args[0]
            self.autocast = self.left[region]
        elif name == "_set_grad_enabled":
            self.gradients = bool(n.args[0])
        else:
            return False
        return True


def in_force() -> dict[str, torch.dtype]:
    """What autocast is set to here: device type -> dtype."""
    return {kind: torch.get_autocast_dtype(kind) for kind in KINDS if torch.is_autocast_enabled(kind)}


@contextlib.contextmanager
def under(autocast: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Autocast as it is in force elsewhere."""
    with contextlib.ExitStack() as regions:
        if autocast != (here := in_force()):
            for kind in {**here, **autocast}:
                regions.enter_context(torch.autocast(kind, autocast.get(kind), enabled=kind in autocast))
        yield


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
