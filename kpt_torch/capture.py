"""A graph of ATen ops -> neutral graph.

Every FX node becomes neutral nodes that say exactly what it computes, dtype promotion and autocast included, with the FX node as
their payload; a semantic call (`linear`, `scaled_dot_product_attention`, `layer_norm`, `cross_entropy_loss`) is spelled out, so that the
one set of patterns sees it. What is not understood is "opaque:<op>". Nothing here runs: a site's results take the place of FX nodes
(`kpt_torch.apply`).
"""

from __future__ import annotations

import dataclasses
import math
import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils import _pytree as pytree

from kpt.graph.graph import Graph, Node, Region
from kpt.ops.base import Spec
from kpt_torch.autocast import State, casts
from kpt_torch.library import dtype_name
from kpt_torch.lower import effectful, mutates, storage
from kpt_torch.quiet import name_as_written
from kpt_torch.vocabulary import TABLE, Unknown


@dataclasses.dataclass(eq=False)
class Captured:
    """A neutral graph, and which FX node each of its values is.

    Attributes:
      made: value -> (FX node, index among its results or None); values inside of a spelled-out call have none.
      values: FX node -> value, or a list of them; nodes that make no tensor have none.
      autocast: what is in force where an FX node stands.
      marks: positions of the nodes that switch autocast or gradients.
      sizes: what symbolic sizes are taken to be.
    """

    graph: Graph
    made: dict[int, tuple[fx.Node, int | None]]
    values: dict[fx.Node, Any]
    autocast: dict[fx.Node, dict[str, torch.dtype]]
    marks: list[int]
    sizes: Sizes


class V:
    """A neutral value while it is put together."""

    __slots__ = ("b", "id")

    def __init__(self, b: Builder, id: int):
        self.b, self.id = b, id

    @property
    def shape(self) -> tuple[int, ...]:
        return self.b.graph.specs[self.id].shape

    @property
    def dtype(self) -> str:
        return self.b.graph.specs[self.id].dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Symbolic sizes as numbers: `at` gives some of the symbols another value than the example has."""

    at: Mapping[Any, int] = dataclasses.field(default_factory=dict)

    def __call__(self, x: Any) -> int:
        if not isinstance(x, torch.SymInt):
            return int(x)
        found = x.node.expr.xreplace({s: sympy.Integer(n) for s, n in self.at.items()}) if self.at else None
        if found is not None and getattr(found, "is_number", True):
            return int(found)
        if x.node.hint is None:
            raise Unknown("a size that depends on data")
        return int(x.node.hint)

    def spec(self, t: torch.Tensor) -> Spec:
        return Spec(tuple(self(n) for n in t.shape), dtype_name(t.dtype))


class Builder:
    """Writes neutral nodes for one FX node after the other."""

    def __init__(self, name: str, sizes: Sizes):
        self.graph = Graph(name)
        self.sizes = sizes
        self.fx: fx.Node | None = None
        self.source = ""
        self.region: Region | None = None

    def value(self, spec: Spec) -> V:
        return V(self, self.graph.new_value(spec))

    def op(self, op: str, *inputs: V, shape: Sequence[int], dtype: str, **attrs: Any) -> V:
        out = self.value(Spec(tuple(shape), dtype))
        attrs = {name.removesuffix("_"): v for name, v in attrs.items()}  # `shape_` and `dtype_`, beside those of the result
        self.graph.nodes.append(Node(op, tuple(v.id for v in inputs), (out.id,), attrs, self.source, region=self.region, payload=self.fx))
        return out

    def full(self, value: Any, dtype: str) -> V:
        """A scalar constant."""
        v = self.value(Spec((), dtype))
        self.graph.consts[v.id] = np.asarray(value, _numpy(dtype))
        return v

    def convert(self, a: V, dtype: str) -> V:
        return a if a.dtype == dtype else self.op("convert", a, shape=a.shape, dtype=dtype, dtype_=dtype)

    def reshape(self, a: V, shape: Sequence[int]) -> V:
        shape = tuple(shape)
        return a if a.shape == shape else self.op("reshape", a, shape=shape, dtype=a.dtype, shape_=shape)

    def transpose(self, a: V, perm: Sequence[int]) -> V:
        perm = tuple(perm)
        return a if perm == tuple(range(a.ndim)) else self.op("transpose", a, shape=[a.shape[p] for p in perm], dtype=a.dtype, perm=perm)

    def swap(self, a: V, i: int, j: int) -> V:
        perm = list(range(a.ndim))
        perm[i], perm[j] = perm[j], perm[i]
        return self.transpose(a, perm)

    def broadcast(self, a: V, shape: Sequence[int]) -> V:
        """As NumPy spreads: dims of 1, and new ones in front."""
        shape = tuple(shape)
        if a.shape == shape:
            return a
        lead = len(shape) - a.ndim
        return self.op("broadcast", a, shape=shape, dtype=a.dtype, shape_=shape, dims=tuple(range(lead, len(shape))))

    def elementwise(self, op: str, *args: V, dtype: str | None = None) -> V:
        """On arguments of one dtype, spread over each other."""
        shape = np.broadcast_shapes(*(a.shape for a in args))
        spread = [a if a.shape in (shape, ()) else self.broadcast(a, shape) for a in args]
        return self.op(op, *spread, shape=shape, dtype=dtype or args[0].dtype)

    def reduce(self, kind: str, a: V, axes: Sequence[int], keep: bool) -> V:
        axes = tuple(sorted(d % max(a.ndim, 1) for d in axes))
        if not axes:
            return a
        shape = [n for d, n in enumerate(a.shape) if d not in axes]
        out = self.op(f"reduce_{kind}", a, shape=shape, dtype=a.dtype, axes=axes)
        return self.reshape(out, [1 if d in axes else n for d, n in enumerate(a.shape)]) if keep else out

    def slice(self, a: V, start: Sequence[int], limit: Sequence[int], stride: Sequence[int]) -> V:
        shape = [-(-(b - s) // k) for s, b, k in zip(start, limit, stride, strict=True)]
        return self.op("slice", a, shape=shape, dtype=a.dtype, start=tuple(start), limit=tuple(limit), stride=tuple(stride))

    def dot(self, a: V, b: V, contract: tuple[int, int], batch: int, dtype: str | None = None) -> V:
        """Batch dims first in both; the result has them first, then what is left of `a`, then of `b`."""
        shape = [*a.shape[:batch], *(n for d, n in enumerate(a.shape) if d >= batch and d != contract[0]),
                 *(n for d, n in enumerate(b.shape) if d >= batch and d != contract[1])]  # fmt: skip
        return self.op("dot_general", a, b, shape=shape, dtype=dtype or a.dtype, lhs_contract=(contract[0],), rhs_contract=(contract[1],),
                       lhs_batch=tuple(range(batch)), rhs_batch=tuple(range(batch)), precision="")  # fmt: skip

    def iota(self, shape: Sequence[int], dimension: int, dtype: str) -> V:
        return self.op("iota", shape=shape, dtype=dtype, dimension=dimension)

    def identity(self, a: V) -> V:
        return self.op("identity", a, shape=a.shape, dtype=a.dtype)


def _any(x: Any) -> Any:
    """An argument of an FX node, whose type says little."""
    return x


def _numpy(dtype: str) -> Any:
    from kpt.graph.expr import numpy_dtype

    return numpy_dtype(dtype)


def capture(
    gm: fx.GraphModule, name: str, autocast: dict[str, torch.dtype] | None = None, gradients: bool = True, sizes: Sizes | None = None,
    known: Mapping[fx.Node, np.ndarray] | None = None,
) -> Captured:  # fmt: skip
    """The neutral graph of a lowered FX graph.

    Args:
      autocast: what is in force around the call: device type -> dtype.
      gradients: whether they are taken there.
      known: the values of inputs that are the same at every call.
    """
    b = Builder(name, sizes or Sizes())
    _spec = b.sizes.spec
    made: dict[int, tuple[fx.Node, int | None]] = {}
    values: dict[fx.Node, Any] = {}
    state = State(dict(autocast or {}), gradients)
    spoilt = mutated_storages(gm)
    inputs: list[int] = []
    where: dict[fx.Node, dict[str, torch.dtype]] = {}
    marks: list[int] = []
    for at, n in enumerate(gm.graph.nodes):
        b.fx, b.source = n, _source(n)
        val = n.meta.get("val")
        if n.op == "placeholder" or "state" in n.meta:
            if isinstance(val, torch.Tensor):
                values[n] = _opaque(b, n, val, made) if storage(val) in spoilt else b.value(_spec(val))
                made[values[n].id] = n, None
                if storage(val) in spoilt:
                    pass
                elif known is not None and n in known:
                    b.graph.consts[values[n].id] = known[n]
                else:
                    inputs.append(values[n].id)
            continue
        if n.op == "get_attr":
            found = _attribute(gm, str(n.target))
            if isinstance(found, torch.Tensor):
                values[n] = _constant(b, found)
                made[values[n].id] = n, None
            continue
        if n.op == "output":
            b.graph.outputs = tuple(values[a].id for a in pytree.tree_leaves(n.args[0]) if isinstance(values.get(a), V))
            continue
        where[n] = dict(state.autocast)
        if state.enters(n):
            marks.append(at)
            b.graph.nodes.append(Node("opaque:state", (), (), {}, b.source, True, payload=n))
            continue
        out = _node(b, n, values, state, {s for s, last in spoilt.items() if at <= last}, set(spoilt), made)
        if out is None:
            continue
        stopped = pytree.tree_map(lambda v: _stopped(b, v), out) if gradients and not state.gradients else out
        values[n] = stopped
        for outs in (out, stopped):
            for i, v in enumerate(outs if isinstance(outs, list) else [outs]):
                if isinstance(v, V):
                    made[v.id] = n, i if isinstance(outs, list) else None
    b.graph.inputs = tuple(inputs)
    return Captured(b.graph.without_dead_nodes(), made, values, where, marks, b.sizes)


def _node(
    b: Builder, n: fx.Node, values: dict[fx.Node, Any], state: State, spoilt: set[int], written: set[int], made: dict
) -> Any:  # fmt: skip
    """What a node makes. `spoilt` is memory that is written into from here on, `written` that which is anywhere in the graph."""
    val = n.meta.get("val")
    if n.target is operator.getitem:
        whole, index = values.get(_any(n.args[0])), _any(n.args[1])
        return b.identity(whole[index]) if isinstance(whole, list) and isinstance(whole[index], V) else None
    tensors = [t for t in pytree.tree_leaves(val) if isinstance(t, torch.Tensor)]
    if not tensors and not effectful(n):
        return None  # symbolic sizes
    touched = {storage(a.meta["val"]) for a in n.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)}
    touched |= {storage(t) for t in tensors}
    emit = TABLE.get(n.target)
    if emit is None and isinstance(val, torch.Tensor) and (number := _everywhere(b, n, val, written)) is not None:
        return b.broadcast(b.full(number, dtype_name(val.dtype)), b.sizes.spec(val).shape)
    if emit is None or effectful(n) or touched & spoilt or not isinstance(val, torch.Tensor | list | tuple):
        return _opaque(b, n, val, made, values)
    start = len(b.graph.nodes), len(b.graph.specs)
    try:
        out = _spelled(b, n, emit, values, state)
        _check(b, n, out, val)
        return out
    except Unknown:
        del b.graph.nodes[start[0] :]
        b.region = None
        return _opaque(b, n, val, made, values)


def _is_node(a: Any) -> bool:
    return isinstance(a, fx.Node)


def _number(b: Builder, a: Any) -> Any:
    return b.sizes(a) if isinstance(a, torch.SymInt) else a


_POSITIONS = 1 << 20  # elements


def _everywhere(b: Builder, n: fx.Node, val: torch.Tensor, written: set[int]) -> int | bool | None:
    """The one integer that all elements of a node are, where it is made of positions alone; else None.

    Models count where packed documents begin, `cumsum(diff(arange(n)) != 1)`, and without packing that is 0. Memory that the graph
    writes into holds something else than what the node made that it is of.
    """
    if val.is_floating_point() or val.is_complex() or effectful(n):
        return None
    known: dict[fx.Node, Any] = {}

    def run(m: fx.Node) -> Any:
        made = m.meta.get("val")
        if isinstance(made, torch.SymInt | int):
            return b.sizes(made)
        tensor = made if m.op == "call_function" and not effectful(m) and isinstance(made, torch.Tensor) else None
        if tensor is None or storage(tensor) in written or math.prod(map(b.sizes, tensor.shape)) > _POSITIONS:
            raise Unknown("more than positions")
        if m not in known:
            given = (tuple(m.args), dict(m.kwargs))
            args, kwargs = pytree.tree_map(lambda a: run(a) if isinstance(a, fx.Node) else _number(b, a), given, is_leaf=_is_node)
            target: Any = m.target
            known[m] = target(*args, **kwargs | ({"device": "cpu"} if "device" in kwargs else {}))
        return known[m]

    try:
        with unset_fake_temporarily(), torch.no_grad():
            found = run(n)
            same = found.numel() > 0 and bool((found == found.flatten()[0]).all())
        return found.flatten()[0].item() if same else None
    except (Unknown, RuntimeError, TypeError, ValueError):
        return None


def _spelled(b: Builder, n: fx.Node, emit: Any, values: dict[fx.Node, Any], state: State) -> Any:
    def given(a: Any) -> Any:
        if not isinstance(a, fx.Node):
            return a
        if a in values:
            return values[a]
        val = a.meta.get("val")
        if isinstance(val, torch.SymInt | int):
            return b.sizes(val)
        if isinstance(val, torch.SymFloat | torch.SymBool | float | bool):
            raise Unknown("a symbolic number")
        raise Unknown("an argument that is no tensor")

    args, kwargs = pytree.tree_map(given, (tuple(n.args), dict(n.kwargs)), is_leaf=_is_node)
    args, kwargs = pytree.tree_map(lambda a: _number(b, a), (args, kwargs))
    if state.autocast:
        args, kwargs = _autocast(b, n, args, kwargs, state)
    whole = emit.whole
    if whole:
        inputs = tuple(v.id for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, V))
        b.region = Region(str(n.target).removesuffix(".default"), inputs, (), n)
    out = emit.fn(b, *args, **kwargs)
    if isinstance(out, V) and out.id in {v.id for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, V)}:
        out = b.identity(out)
    if whole:
        assert b.region is not None
        b.region.outputs = (out.id,)
        b.region = None
    return out


def _autocast(b: Builder, n: fx.Node, args: Any, kwargs: Any, state: State) -> Any:
    """The arguments as autocast hands them on."""
    val = n.meta["val"]
    tensor = val if isinstance(val, torch.Tensor) else next(t for t in pytree.tree_leaves(val) if isinstance(t, torch.Tensor))
    dtype = state.autocast.get(tensor.device.type)
    if dtype is None:
        return args, kwargs
    flat, tree = pytree.tree_flatten((args, kwargs))
    to = casts(n, tensor.device.type, dtype)
    tensors = [i for i, v in enumerate(flat) if isinstance(v, V)]
    if len(to) != len(tensors):
        raise Unknown("autocast")
    if not any(to) and tensor.dtype == dtype:  # cast further inside: einsum, which makes products of views
        to = tuple(dtype_name(dtype) if flat[i].dtype == "float32" else None for i in tensors)
    for i, name in zip(tensors, to, strict=True):
        if name is not None:
            flat[i] = b.convert(flat[i], name)
    return pytree.tree_unflatten(flat, tree)


def _check(b: Builder, n: fx.Node, out: Any, val: Any) -> None:
    """What was written must be what the op makes, shape and dtype; a rule that is wrong costs a site, never a number."""
    outs, vals = (out, val) if isinstance(out, list) else ([out], [val])
    if len(outs) != len(vals) or any(v is not None and Spec(v.shape, v.dtype) != b.sizes.spec(t) for v, t in zip(outs, vals, strict=True)):
        raise Unknown("another result than the op's")


def _opaque(b: Builder, n: fx.Node, val: Any, made: dict, values: dict[fx.Node, Any] | None = None) -> Any:
    inputs = [v for a in n.all_input_nodes for v in pytree.tree_leaves((values or {}).get(a)) if isinstance(v, V)]
    flat, tree = pytree.tree_flatten(val)
    outs = [_of_known_size(b, t) if isinstance(t, torch.Tensor) else None for t in flat]
    known = tuple(v.id for v in outs if v is not None)
    lost = any(v is None and isinstance(t, torch.Tensor) for v, t in zip(outs, flat, strict=True))
    if known or lost or effectful(n):
        effect = (effectful(n) or lost) and n.op == "call_function"  # who reads what is lost is not seen: it is taken to be read
        b.graph.nodes.append(Node(f"opaque:{_name(n)}", tuple(v.id for v in inputs), known, {}, b.source, effect, payload=n))
    if isinstance(val, torch.Tensor):
        return outs[0]
    return list(outs) if isinstance(val, list | tuple) and len(flat) == len(val) else None


def _of_known_size(b: Builder, t: torch.Tensor) -> V | None:
    """A value; None where a size depends on data, as the number of tokens that go to an expert: no pattern looks at that."""
    try:
        return b.value(b.sizes.spec(t))
    except Unknown:
        return None


def _stopped(b: Builder, v: Any) -> Any:
    if not isinstance(v, V) or not v.dtype.startswith(("float", "bfloat", "complex")):
        return v
    return b.op("stop_gradient", v, shape=v.shape, dtype=v.dtype)


def _constant(b: Builder, tensor: torch.Tensor) -> V:
    spec = b.sizes.spec(tensor)
    v = b.value(spec)
    if isinstance(tensor, torch._subclasses.FakeTensor) or tensor.device.type == "meta" or tensor.numel() > 1 << 24:
        b.graph.nodes.append(Node("opaque:constant", (), (v.id,), {}, b.source, payload=b.fx))
    else:
        b.graph.consts[v.id] = to_numpy(tensor)
    return v


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A copy of the values of a tensor; bfloat16 as ml_dtypes has it.

    A copy on the CPU, too: memory that NumPy has seen can never be resized, and FSDP resizes that of its parameters.
    """
    t = tensor.detach().to("cpu", copy=True)
    if t.dtype == torch.bfloat16:
        return t.contiguous().view(torch.int16).numpy().view(_numpy("bfloat16"))
    return t.numpy()


def from_numpy(array: np.ndarray, device: Any = "cpu") -> torch.Tensor:
    """The inverse of `to_numpy`; the tensor owns its memory."""
    array = np.array(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(array).to(device)


def _attribute(gm: Any, target: str) -> Any:
    for part in target.split("."):
        gm = getattr(gm, part)
    return gm


def mutated_storages(gm: fx.GraphModule) -> dict[int, int]:
    """Memory that the graph writes into, and where it does last: up to there, what reads it reads now this, now that."""
    found: dict[int, int] = {}
    for at, n in enumerate(gm.graph.nodes):
        if n.op == "call_function" and mutates(n):
            schema = n.target._schema.arguments
            named = [(n.kwargs[s.name], s) for s in schema if s.name in n.kwargs]
            for a, s in (*zip(n.args, schema, strict=False), *named):
                if s.alias_info is not None and s.alias_info.is_write:
                    found |= {storage(x.meta["val"]): at for x in pytree.tree_leaves(a) if isinstance(x, fx.Node) and "val" in x.meta}
    return found


def _name(n: fx.Node) -> str:
    return getattr(n.target, "__name__", str(n.target)) if not isinstance(n.target, str) else n.target


_TORCH = os.path.dirname(torch.__file__) + os.sep


def _source(n: fx.Node) -> str:
    """The user's line: the innermost frame that stands in no library of torch's."""
    trace = n.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    for line in reversed(lines):
        parts = line.split('"')
        if len(parts) == 3 and not parts[1].startswith(_TORCH):
            rest = parts[2].split(", ")
            where = rest[1].removeprefix("line ") if len(rest) > 1 else "?"
            function = rest[2].removeprefix("in ") if len(rest) > 2 else ""
            return f"{parts[1].rsplit('/', 1)[-1]}:{where}" + (f" ({name_as_written(function)})" if function else "")
    return ""
