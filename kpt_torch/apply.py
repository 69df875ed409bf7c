"""A graph with kernels in place of its sites: the original's FX nodes, less those that a kernel takes the place of.

`Emission` says how a value comes about: by a site, by the FX node that makes it, or, inside of a call that a site cut into (the mean
of a cross entropy), by its formula. `rebuilt` writes a GraphModule by it, `Eager` runs it, for proofs.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils import _pytree as pytree

from kpt.fusion.program import Match, Program
from kpt.fusion.site import leaf_values
from kpt.graph.graph import Node
from kpt_torch.capture import Captured, V, from_numpy
from kpt_torch.emit import compute
from kpt_torch.library import dtype_name, torch_dtype
from kpt_torch.lower import aten, drop_dead, effectful, storage

Kernel = Callable[..., Any]


@dataclasses.dataclass(eq=False)
class Rewrite:
    """A captured graph, and what replaces its sites."""

    module: fx.GraphModule
    captured: Captured
    program: Program
    sites: list[tuple[Match, Kernel]]
    pairs: Mapping[int, tuple[int, int, Kernel]] = dataclasses.field(default_factory=dict)
    """By each of the two sites: both, and the kernel that runs them in one launch."""
    read: Mapping[fx.Node, tuple[int, Kernel]] = dataclasses.field(default_factory=dict)
    """By a linear layer that alone reads a site's result: the site, and the kernel that computes both."""


class Unavailable(Exception):
    """An FX node cannot be run beside its program: it draws random numbers or writes, or what it reads is not given."""


class Emission:
    """How values come about, whatever `call` makes of a torch call.

    Args:
      given: values that are there already.
    """

    def __init__(self, captured: Captured, program: Program, sites: Sequence[tuple[Match, Kernel]], given: Mapping[int, Any], device: Any):
        self.captured, self.program, self.sites, self.device = captured, program, sites, device
        self.done: dict[int, Any] = dict(given)
        self.nodes: dict[fx.Node, Any] = {}
        self.maker: dict[int, Node] = captured.graph.producers()
        self.site_of = {v: i for i, (m, _) in enumerate(sites) for v in m.results}
        self.memo: dict[int, Any] = {}
        self.handed: dict[fx.Node, dict[fx.Node, int]] = {}  # a call -> its argument -> what it is handed in its place
        self.cut = {n for v in self.site_of if (n := self._owner(v)) is not None and not self._is_made(v) and not self._handed(n, v)}

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def copied(self, n: fx.Node) -> Any:
        """What the FX node itself makes."""
        raise NotImplementedError

    def size(self, n: int) -> Any:
        return n

    def _owner(self, v: int) -> fx.Node | None:
        node = self.maker.get(v)
        return node.payload if node is not None else None

    def _handed(self, n: fx.Node, v: int) -> bool:
        """Whether `v` is what autocast makes of an argument of the call `n`, which may then be handed `v` itself."""
        cast, dtypes = self.maker[v], self.captured.autocast.get(n, {}).values()
        if cast.op != "convert" or self.program.graph.specs[v].dtype not in map(dtype_name, dtypes):
            return False
        of = [a for a in n.all_input_nodes if isinstance(x := self.captured.values.get(a), V) and x.id == cast.inputs[0]]
        for a in of:
            self.handed.setdefault(n, {})[a] = v
        return bool(of)

    def argument(self, n: fx.Node, a: fx.Node) -> Any:
        """What the call `n` is given for its argument `a`."""
        v = self.handed.get(n, {}).get(a)
        return self.old(a) if v is None else self.value(v)

    def _is_made(self, v: int) -> bool:
        return v in self.captured.made

    def by_formula(self, values: Iterable[int]) -> None:
        """Takes calls apart that these values are made inside of (a mask's cast, where an addition promotes it): so that they are read."""
        self.cut |= {n for v in values if not self._is_made(v) and (n := self._owner(v)) is not None}

    def value(self, v: int) -> Any:
        if v in self.done:
            return self.done[v]
        if v in self.site_of:
            self._site(self.site_of[v])
            return self.done[v]
        n, index = self.captured.made.get(v, (None, None))
        got = None
        if n is not None and (n not in self.cut or n not in self.captured.values):
            try:
                whole = self.old(n)
                got = whole if index is None else self.call(operator.getitem, whole, index)
            except Unavailable:
                if v not in self.captured.graph.consts and (v not in self.maker or self.maker[v].op.startswith("opaque:")):
                    raise
        if got is not None:
            pass
        elif v in self.captured.graph.consts:
            got = self.constant(v)
        else:
            node = self.maker[v]
            args = [self.value(i) for i in node.inputs]
            attrs = dict(node.attrs)
            if node.op == "dot_general":
                attrs["ranks"] = tuple(len(self.captured.graph.specs[i].shape) for i in node.inputs)
            got = compute(node.op, attrs, self.captured.graph.specs[v], args, self.call, self.device, self.size)
        self.done[v] = got
        return got

    def constant(self, v: int) -> Any:
        data = np.asarray(self.captured.graph.consts[v])
        dtype = torch_dtype(self.captured.graph.specs[v].dtype)
        if data.shape == ():
            return self.call(aten.full.default, [], data.item(), dtype=dtype, device=self.device)
        return self.array(from_numpy(data))

    def array(self, tensor: torch.Tensor) -> Any:
        raise NotImplementedError

    def old(self, n: fx.Node) -> Any:
        """What stands for an FX node of the original."""
        if n not in self.nodes:
            v = self.captured.values.get(n)
            if isinstance(v, V) and (v.id in self.done or v.id in self.site_of or n in self.cut):
                self.nodes[n] = self.value(v.id)
            else:
                self.nodes[n] = self.copied(n)
        return self.nodes[n]

    def _site(self, i: int) -> None:
        match, kernel = self.sites[i]
        arrays = {name: self.expr(e) for name, e in match.arrays.items()}
        made = self.call(kernel, **arrays)
        several = len({e["index"] for e in _outs(match)}) > 1 or "residual" in match.arrays
        self._results(match, [self.call(operator.getitem, made, k) for k in range(2)] if several else [made])

    def _results(self, match: Match, outs: Sequence[Any]) -> None:
        """Writes down what a site's kernel made, as the views of it that the program has."""
        memo: dict[int, Any] = {}
        standing: dict[Any, Any] = {}  # what the kernel made -> the memory that it stands for in the original
        for v, e in match.results.items():
            got, place = self.expr(e, outs, memo), self._place(v)
            # A copy, or the same formula written twice, is one value in memory of its own: someone may write into one of them.
            copied = place is not None and standing.setdefault(_viewed(e), place) != place
            self.done[v] = self.call(aten.clone.default, got) if copied else got

    def _place(self, v: int) -> Any:
        n, index = self.captured.made.get(v, (None, None))
        val = n.meta.get("val") if n is not None else None
        val = val[index] if index is not None and isinstance(val, list | tuple) else val
        return storage(val) if isinstance(val, torch.Tensor) else None

    def expr(self, e: Any, outs: Sequence[Any] | None = None, memo: dict[int, Any] | None = None) -> Any:
        """The array that an expression stands for."""
        memo = self.memo if memo is None else memo
        if id(e) in memo:
            return memo[id(e)]
        if e.op == "out":
            assert outs is not None
            got = outs[e["index"]]
        elif e.origins:
            got = self.value(next((v for v in e.origins if v in self.done), self._best(e.origins)))
        elif e.op == "const":
            got = self.array(from_numpy(np.asarray(self.program.exprs.consts[e["key"]])))
        else:
            args = [self.expr(a, outs, memo) for a in e.args]
            got = compute(e.op, dict(e.attrs), e.spec, args, self.call, self.device, self.size)
        memo[id(e)] = got
        return got

    def _best(self, origins: Sequence[int]) -> int:
        """The first name of a value; all of them are one value."""
        return origins[0]


def _viewed(e: Any) -> Any:
    """What an expression is a view of."""
    while e.op in ("reshape", "transpose", "broadcast", "slice") and not e.origins:
        e = e.args[0]
    return e


def _outs(match: Match) -> list[Any]:
    found, todo = [], list(match.results.values())
    while todo:
        e = todo.pop()
        if e.op == "out":
            found.append(e)
        todo.extend(e.args)
    return found


class Eager(Emission):
    """Runs what it emits."""

    def __init__(self, *args: Any, module: fx.GraphModule, pure: bool = False):
        super().__init__(*args)
        self.module, self.pure = module, pure

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    def array(self, tensor: torch.Tensor) -> Any:
        return tensor.to(self.device)

    def copied(self, n: fx.Node) -> Any:
        val = n.meta.get("val")
        if isinstance(val, torch.SymInt):
            if val.node.hint is None:
                raise Unavailable(f"{n} depends on data")
            return self.captured.sizes(val)
        if n.op == "get_attr":
            return operator.attrgetter(str(n.target))(self.module)
        if n.op != "call_function" or self.pure and effectful(n):
            raise Unavailable(f"{n} is neither given nor computed twice alike")
        leaf = lambda a: isinstance(a, fx.Node)  # noqa: E731
        to = lambda a: self.argument(n, a) if isinstance(a, fx.Node) else a  # noqa: E731
        args, kwargs = pytree.tree_map(to, (tuple(n.args), dict(n.kwargs)), is_leaf=leaf)
        kind = torch.device(self.device).type
        dtype = self.captured.autocast.get(n, {}).get(kind)
        with torch.autocast(kind, dtype, enabled=dtype is not None):
            target: Any = n.target
            return target(*args, **kwargs)


class _Writing(Emission):
    """Writes FX nodes."""

    def __init__(self, rw: Rewrite, device: Any):
        super().__init__(rw.captured, rw.program, rw.sites, {}, device)
        self.rw, self.graph = rw, fx.Graph()
        self.root = rw.module
        self.table = _symbols(rw)
        self.sizes: dict[int, Any] = {}
        self.like: fx.Node | None = None

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        made = self.graph.call_function(target, args, kwargs)
        if self.like is not None:
            made.meta = {k: v for k, v in self.like.meta.items() if k in ("stack_trace", "nn_module_stack")}
        return made

    def _site(self, i: int) -> None:
        if i not in self.rw.pairs:
            return super()._site(i)
        first, second, kernel = self.rw.pairs[i]
        (match, _), (behind, _) = self.sites[first], self.sites[second]
        arrays = {name: self.expr(e) for name, e in match.arrays.items()}
        made = self.call(kernel, **arrays, other=self.expr(behind.arrays["x"]))
        for k, m in enumerate((match, behind)):
            self._results(m, [self.call(operator.getitem, made, k)])
        return None

    def array(self, tensor: torch.Tensor) -> Any:
        name = f"_kpt_constant{sum(1 for _ in self.root.buffers(recurse=False))}"
        self.root.register_buffer(name, tensor.to(self.device), persistent=False)
        return self.graph.get_attr(name)

    def size(self, n: int) -> Any:
        place = self.table.get(n)
        if place is None:
            return n
        if n not in self.sizes:
            node, d = place
            whole = self.old(node)
            self.sizes[n] = whole if d is None else self.call(aten.sym_size.int, whole, d)
        return self.sizes[n]

    def copied(self, n: fx.Node) -> Any:
        if n in self.rw.read:
            i, kernel = self.rw.read[n]
            weight = self.argument(n, n.args[1])  # type: ignore[arg-type]
            cast = self.captured.autocast.get(n, {}).get(torch.device(self.device).type)
            if cast is not None:
                weight = self.call(aten.to.dtype, weight, cast)
            arrays = {name: self.expr(e) for name, e in self.sites[i][0].arrays.items()}
            return self.call(kernel, **arrays, w_down=self.call(aten.t.default, weight))
        if n.op == "call_function":
            for a in n.all_input_nodes:
                self.argument(n, a)
        return self.graph.node_copy(n, lambda a: self.argument(n, a))


def _symbols(rw: Rewrite) -> dict[int, tuple[fx.Node, int | None]]:
    """Numbers of the neutral graph that stand for symbolic sizes: number -> (an input, its dim) or (a symbolic input, None)."""
    found: dict[int, tuple[fx.Node, int | None]] = {}
    sizes = rw.captured.sizes
    for n in rw.module.graph.nodes:
        val = n.meta.get("val")
        if n.op == "placeholder" and isinstance(val, torch.SymInt):
            found.setdefault(sizes(val), (n, None))
    for n in rw.module.graph.nodes:
        val = n.meta.get("val")
        if isinstance(val, torch.Tensor) and n in rw.captured.values:
            for d, s in enumerate(val.shape):
                if is_symbolic(s):
                    found.setdefault(sizes(s), (n, d))
    return found


def is_symbolic(n: Any) -> bool:
    """Whether a size is a symbol's, and may be another at the next call."""
    return isinstance(n, torch.SymInt) and not n.node.is_constant()


def positions(module: fx.GraphModule) -> dict[fx.Node, int]:
    return {n: i for i, n in enumerate(module.graph.nodes)}


def misplaced(captured: Captured, program: Program, match: Match, order: Mapping[fx.Node, int]) -> str | None:
    """Why a kernel cannot stand where the site's first result does, or None: what it reads is made later, past a switch of state."""
    place = span(captured, program, match, order)
    if place is None:
        return None
    first, last = place
    nodes = [n for n, i in order.items() if first <= i <= last]
    if first < last and (any(first <= m <= last for m in captured.marks) or any(effectful(n) for n in nodes)):
        return "what it reads is computed only after its first result, past a random number, a write or a switch of autocast or gradients"
    return None


def span(captured: Captured, program: Program, match: Match, order: Mapping[fx.Node, int]) -> tuple[int, int] | None:
    """Where a site's first result is made, and the last of what it reads."""
    results = [order[captured.made[v][0]] for v in match.results if v in captured.made]
    maker = captured.graph.producers()
    results += [order[maker[v].payload] for v in match.results if v not in captured.made and v in maker]
    reads = [order[captured.made[v][0]] for v in leaf_values(program, match) if v in captured.made]
    return (min(results), max(reads)) if results and reads else None


def rebuilt(rw: Rewrite, device: Any) -> fx.GraphModule:
    """The graph with the sites' kernels, every other node as it was, in the order that it was in; dead nodes left out."""
    w = _Writing(rw, device)
    inner = {layer.args[0] for layer in rw.read}  # what the call of its reader makes and keeps to itself
    for n in rw.module.graph.nodes:
        if n in inner:
            continue
        w.like = n
        if n.op == "output":
            w.graph.node_copy(n, w.old)
        else:
            w.old(n)
    made = fx.GraphModule(rw.module, w.graph)
    drop_dead(made.graph)  # what the kernels took the place of
    made.recompile()
    return made
