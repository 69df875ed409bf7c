"""Dynamo's graph at the level of ATen, before autograd takes it apart.

Dynamo gives the user's calls (functions, methods, modules); `make_fx(pre_dispatch=True)` gives each as the ATen op that the
dispatcher meets first: `linear`, `scaled_dot_product_attention`, `layer_norm`, `cross_entropy_loss` are still single calls, and autograd
differentiates the graph as it would have differentiated the program. Three things are put in order on the way:

- `vmap` (which Hugging Face builds its masks by) is carried out: between its markers, ops mean something else than they say.
- An in-place op on a tensor that the graph itself made, and that nothing else looks into, becomes its functional twin.
- A higher-order op (`torch.utils.checkpoint`, `cond`) keeps its body as a graph of its own.

Tensors whose address is to stay (`mark_static_address`: a static cache of keys) are attributes of Dynamo's graph, which it may write into.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from kpt_torch.autocast import State, casts, in_force, under

aten = torch.ops.aten


def lower(gm: fx.GraphModule, example: Sequence[Any]) -> fx.GraphModule:
    """The graph of `gm` in ATen ops; every node has the fake tensor (or symbolic number) that it makes in `meta["val"]`.

    Args:
      example: fake tensors and symbolic numbers for its placeholders.
    """
    attributes = {str(n.target): n.meta.get("example_value") for n in gm.graph.nodes if n.op == "get_attr"}
    state = {name: fake for name, fake in attributes.items() if isinstance(fake, FakeTensor)}
    given = [*example, *state.values()]
    lowered = _traced(gm, given, _mode_of(given), pre_dispatch=True, state=list(state))
    _carry_out_vmap(lowered)
    _functional(lowered)
    drop_dead(lowered.graph)
    _held(lowered, {name: operator.attrgetter(name)(gm) for name in state})
    lowered.recompile()
    return lowered


def _held(lowered: fx.GraphModule, state: Mapping[str, torch.Tensor]) -> None:
    """Makes attributes of the last placeholders again, marked as what is no constant."""
    holders = [n for n in lowered.graph.nodes if n.op == "placeholder"]
    for i, (n, tensor) in enumerate(zip(holders[len(holders) - len(state) :], state.values(), strict=True)):
        lowered.register_buffer(f"_state_{i}", tensor, persistent=False)
        n.op, n.target, n.meta["state"] = "get_attr", f"_state_{i}", True


def _traced(
    gm: fx.GraphModule, example: Sequence[Any], mode: FakeTensorMode, pre_dispatch: bool, state: Sequence[str] = ()
) -> fx.GraphModule:  # fmt: skip
    run = _Lowering(gm, state)
    # The graph is traced beside whatever compiles it: its fake tensors are its own. Dynamo lets numbers out of tensors for `tolist` alone.
    with torch._guards.tracing(None), mode, mock.patch.object(mode, "allow_scalar_outputs", True), fx.traceback.preserve_node_meta():
        try:
            return make_fx(run.of, pre_dispatch=pre_dispatch, tracing_mode="real", _allow_non_fake_inputs=True)(*example)
        finally:
            for region in reversed(run.entered):  # none, unless the trace failed inside of one
                region.__exit__(None, None, None)


def _mode_of(values: Iterable[Any]) -> FakeTensorMode:
    """That of the fake tensors among these; one of its own for a graph that reads none (a mask made of positions, after a graph break)."""
    mode = next((x.fake_mode for x in values if isinstance(x, FakeTensor)), None)
    return mode or FakeTensorMode(allow_non_fake_inputs=True)


class _Lowering(fx.Interpreter):
    """Runs a graph so that make_fx records it; a higher-order op is recorded whole."""

    def __init__(self, gm: fx.GraphModule, state: Sequence[str]):
        super().__init__(gm)
        self.entered: list[Any] = []  # autocast regions
        self.state: dict[str, Any] = dict.fromkeys(state)

    def of(self, *given: Any) -> Any:
        """Runs it on its inputs, and after them what the attributes named in `state` hold."""
        count = len(given) - len(self.state)
        self.state = dict(zip(self.state, given[count:], strict=True))
        return self.run(*given[:count])

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.state[target] if target in self.state else super().get_attr(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        with fx.traceback.set_current_meta(n):
            return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(target, torch._ops.HigherOrderOperator) and _bodies((args, kwargs)):
            return _recorded(target, args, kwargs)
        # Entered in truth, so that what stands inside is traced in the dtypes that it will have; the region records itself.
        if target is torch.amp.autocast_mode._enter_autocast:
            self.entered.append(torch.autocast(*args, **kwargs))
            self.entered[-1].__enter__()
            return self.entered[-1]
        if target is torch.amp.autocast_mode._exit_autocast:
            self.entered.pop().__exit__(None, None, None)
            return None
        return super().call_function(target, args, kwargs)


def _bodies(x: Any) -> list[fx.GraphModule]:
    return [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, fx.GraphModule)]


def _recorded(target: Any, args: Any, kwargs: Any) -> Any:
    mode = get_proxy_mode()
    assert mode is not None
    tracer: Any = mode.tracer
    with disable_proxy_modes_tracing():
        body = next(iter(_bodies((args, kwargs))))
        if target is torch.ops.higher_order.tag_activation_checkpoint:
            out = body(*(a for a in args if a is not body))
        else:  # it says what its bodies are given: cond, a rule of the user's
            out = target(*args, **kwargs)

    def proxy(x: Any) -> Any:
        if isinstance(x, fx.GraphModule):
            name = f"body_{sum(1 for _ in tracer.root.named_children())}"
            setattr(tracer.root, name, x)
            return tracer.create_proxy("get_attr", name, (), {})
        return tracer.unwrap_proxy(x)

    given, named = pytree.tree_map(proxy, (tuple(args), dict(kwargs)))
    made = tracer.create_proxy("call_function", target, given, named)
    return track_tensor_tree(out, made, constant=None, tracer=tracer)


def effectful(n: fx.Node) -> bool:
    """Whether a node does something besides making its result."""
    if n.op != "call_function":
        return n.op in ("placeholder", "output")
    if isinstance(n.target, torch._ops.OpOverload):
        random = torch.Tag.nondeterministic_seeded in n.target.tags and not _draws_nothing(n)
        return mutates(n) or random or n.target in _ASSERTS
    return not isinstance(n.target, torch._ops.HigherOrderOperator) and n.target not in _PURE


def drop_dead(graph: fx.Graph) -> None:
    """Takes out what nothing uses, here alone.

    `Graph.eliminate_dead_code` goes on into bodies of higher-order ops, which are the user's, and takes `mask.floor_()` there for dead.
    """
    for n in reversed(graph.nodes):
        if not n.users and not effectful(n):
            graph.erase_node(n)


def _draws_nothing(n: fx.Node) -> bool:
    """Dropout that is off."""
    if n.target is aten.dropout.default:
        return bool(n.args[1] == 0 or n.args[2] is False)
    if n.target is aten.scaled_dot_product_attention.default:
        return bool((n.args[4] if len(n.args) > 4 else n.kwargs.get("dropout_p", 0.0)) == 0)
    return False


_ASSERTS = {aten._assert_async.msg, aten._assert_async.default, aten._assert_scalar.default, aten.sym_constrain_range_for_size.default}
_PURE = {operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg, operator.truediv,
         operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, torch.sym_max, torch.sym_min, torch.sym_int,
         torch.sym_float, torch.sym_not, pow, operator.pow}  # fmt: skip


def storage(t: torch.Tensor) -> Any:
    """Identity of the memory behind a tensor."""
    return StorageWeakRef(t.untyped_storage()).cdata if t.layout == torch.strided else None


def mutates(n: fx.Node) -> bool:
    return isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable


# -- vmap --------------------------------------------------------------------------------------------------------------------


def _level(n: fx.Node) -> int:
    name = getattr(n.target, "__name__", "") if n.op == "call_function" else ""
    return {"_vmap_increment_nesting": 1, "_vmap_decrement_nesting": -1}.get(name, 0)


def _carry_out_vmap(gm: fx.GraphModule) -> None:
    """Every outermost stretch between vmap's markers, traced again below vmap."""
    stretch: list[fx.Node] = []
    depth, state = 0, State(in_force(), True)
    for n in list(gm.graph.nodes):
        state.enters(n)
        if getattr(n.target, "__name__", "") == "lazy_load_decompositions":
            gm.graph.erase_node(n)
            continue
        if depth or _level(n) > 0:
            stretch.append(n)
        depth += _level(n)
        if stretch and depth == 0:
            with under(state.autocast):
                _inline_batched(gm, stretch)
            stretch = []


def _inline_batched(gm: fx.GraphModule, stretch: list[fx.Node]) -> None:
    inside = set(stretch)
    given = list(dict.fromkeys(a for n in stretch for a in n.all_input_nodes if a not in inside and a.op != "get_attr"))
    wanted = [n for n in stretch if any(u not in inside for u in n.users)]
    part = fx.Graph()
    to: dict[fx.Node, fx.Node] = {a: part.placeholder(a.name) for a in given}
    for n in stretch:
        for a in n.all_input_nodes:
            if a.op == "get_attr" and a not in to:
                to[a] = part.node_copy(a)
        to[n] = part.node_copy(n, lambda a: to[a])
    part.output(tuple(to[n] for n in wanted))
    mode = _mode_of(n.meta.get("val") for n in gm.graph.nodes)
    small = _traced(fx.GraphModule(gm, part), [a.meta["val"] for a in given], mode, pre_dispatch=False)
    local: dict[fx.Node, Any] = {}
    with gm.graph.inserting_before(stretch[0]):
        for p, a in zip((n for n in small.graph.nodes if n.op == "placeholder"), given, strict=True):
            local[p] = a
        for n in small.graph.nodes:
            if n.op == "get_attr":
                name = f"{n.target}_{n.name}_{len(list(gm.graph.nodes))}"
                setattr(gm, name, getattr(small, n.target))
                local[n] = gm.graph.get_attr(name)
                local[n].meta = dict(n.meta)
            elif n.op == "call_function":
                local[n] = gm.graph.node_copy(n, lambda a: local[a])
                local[n].meta = {**stretch[0].meta, **n.meta}
    results = next(n for n in small.graph.nodes if n.op == "output").args[0]
    for n, made in zip(wanted, results, strict=True):
        n.replace_all_uses_with(local[made])
    for n in reversed(stretch):
        gm.graph.erase_node(n)


# -- in-place ops --------------------------------------------------------------------------------------------------------------


def _functional(gm: fx.GraphModule) -> None:
    """`x.add_(y)` becomes `x = x.add(y)` where `x` is made here and is looked into under no other name afterwards."""
    if not any(mutates(n) for n in gm.graph.nodes):
        return
    order, state = {n: i for i, n in enumerate(gm.graph.nodes)}, State(in_force(), True)
    for n in list(gm.graph.nodes):
        if state.enters(n) or not mutates(n) or not n.args or not isinstance(n.args[0], fx.Node):
            continue
        x = n.args[0]
        if n.target is aten.detach_.default:
            twin: Any = aten.detach.default
        else:
            twin = _twin(n.target)
        if twin is None or not _is_own(x, n, order):
            continue
        later = [u for u in x.users if u is not n and order.get(u, -1) > order[n]]
        with gm.graph.inserting_before(n):
            made = _placed(gm, twin, n.args, n.kwargs, n)
            kind = x.meta["val"].device.type
            if kind in state.autocast and any(casts(made, kind, state.autocast[kind])):  # which casts nothing that is written into
                gm.graph.erase_node(made)
                continue
            if made.meta["val"].dtype != x.meta["val"].dtype:
                made = _placed(gm, aten.to.dtype, (made, x.meta["val"].dtype), {}, n)
        order[made] = order[n]
        n.replace_all_uses_with(made)
        for u in later:
            u.replace_input_with(x, made)
        gm.graph.erase_node(n)


def _twin(target: Any) -> Any:
    """`aten.add.Tensor` for `aten.add_.Tensor`, `aten.pow.Tensor_Scalar` for `aten.pow_.Scalar`, or None: by what they take."""
    name = target._schema.name.removeprefix("aten::")
    if not name.endswith("_") or target.namespace != "aten":
        return None
    packet = getattr(aten, name[:-1], None)
    twins = [getattr(packet, overload) for overload in packet.overloads()] if packet is not None else []
    return next((t for t in twins if not t._schema.is_mutable and _takes(t) == _takes(target)), None)


def _takes(target: Any) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in target._schema.arguments]


def _placed(gm: fx.GraphModule, target: Any, args: Any, kwargs: Any, like: fx.Node) -> fx.Node:
    made = gm.graph.call_function(target, args, kwargs)
    leaf = lambda a: isinstance(a, fx.Node)  # noqa: E731
    vals, named = pytree.tree_map(lambda a: a.meta["val"] if isinstance(a, fx.Node) else a, (tuple(args), dict(kwargs)), is_leaf=leaf)
    with _mode_of([like.meta["val"]]):
        made.meta = {**like.meta, "val": target(*vals, **named)}
    return made


def _is_own(x: fx.Node, at: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether the graph made the memory of `x`, and `x` is the only name that it has had up to the node `at`."""
    val = x.meta.get("val")
    if x.op != "call_function" or not isinstance(val, torch.Tensor):
        return False
    for n in order:
        other = n.meta.get("val")
        if n is x or n not in order or order[n] >= order[at]:
            continue  # names that are made of it later are made of its twin
        if isinstance(other, torch.Tensor) and storage(other) == storage(val):
            return False
    return True
