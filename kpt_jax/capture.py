"""jaxpr -> neutral graph.

Calls to sub-functions (`jit` without shardings of its own) are flattened, custom_jvp functions without
products or control flow become regions, everything with control flow keeps its body as a graph. So does what was traced under another mesh
than what stands around it (`jax.sharding.auto_axes`, `explicit_axes`): no value of the one may be taken for an equal one of the other.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from kpt.graph.expr import ELEMENTWISE
from kpt.graph.graph import Graph, Node, Region
from kpt.ops.base import Spec
from kpt_jax import _compat


def _ints(xs: Any) -> tuple[int, ...]:
    return tuple(int(x) for x in xs)


def _dot(p: dict) -> tuple[str, dict]:
    (lc, rc), (lb, rb) = p["dimension_numbers"]
    precision = p.get("precision")
    return "dot_general", {"lhs_contract": _ints(lc), "rhs_contract": _ints(rc), "lhs_batch": _ints(lb),
                           "rhs_batch": _ints(rb), "precision": "" if precision is None else str(precision)}  # fmt: skip


def _gather(p: dict) -> tuple[str, dict]:
    d = p["dimension_numbers"]
    mode = str(getattr(p["mode"], "name", p["mode"])).lower()
    return "gather", {
        "offset_dims": _ints(d.offset_dims), "collapsed": _ints(d.collapsed_slice_dims),
        "index_map": _ints(d.start_index_map), "operand_batch": _ints(getattr(d, "operand_batching_dims", ())),
        "index_batch": _ints(getattr(d, "start_indices_batching_dims", ())), "sizes": _ints(p["slice_sizes"]),
        "mode": mode,
    }  # fmt: skip


def _reduce(p: dict) -> dict:
    return {"axes": _ints(p["axes"])}


def _slice(p: dict) -> tuple[str, dict]:
    start = _ints(p["start_indices"])
    return "slice", {"start": start, "limit": _ints(p["limit_indices"]),
                     "stride": _ints(p["strides"]) if p["strides"] else (1,) * len(start)}  # fmt: skip


def _put(p: dict) -> tuple[str, dict]:
    # jnp.asarray of a NumPy array in jax 0.7: a move to nowhere in particular.
    return ("identity" if tuple(p["devices"]) == (None,) else "opaque:device_put"), {}


# jax primitive -> (neutral op, attributes). Primitives with the op's own name and no attribute are in _SAME.
_SAME = (ELEMENTWISE - {"convert", "power", "select", "pow", "not"}) | {"dynamic_slice", "complex", "real", "imag"}
_TABLE: dict[str, Callable[[dict], tuple[str, dict]]] = {
    "dot_general": _dot,
    "gather": _gather,
    "slice": _slice,
    "not": lambda p: ("not", {}),
    "pow": lambda p: ("power", {}),
    "integer_pow": lambda p: ("pow", {"y": int(p["y"])}),
    "copy_p": lambda p: ("identity", {}),
    "copy": lambda p: ("identity", {}),
    "device_put": _put,
    **dict.fromkeys(_compat.PVARY_NAMES, lambda p: ("identity", {})),  # the same number on every device of a shard_map
    "convert_element_type": lambda p: ("convert", {"dtype": np.dtype(p["new_dtype"]).name}),
    "broadcast_in_dim": lambda p: ("broadcast", {"shape": _ints(p["shape"]), "dims": _ints(p["broadcast_dimensions"])}),
    "transpose": lambda p: ("transpose", {"perm": _ints(p["permutation"])}),
    "concatenate": lambda p: ("concatenate", {"axis": int(p["dimension"])}),
    "stack": lambda p: ("stack", {"axis": int(p["axis"])}),
    "unstack": lambda p: ("unstack", {"axis": int(p["axis"])}),
    "tile": lambda p: ("tile", {"reps": _ints(p["reps"])}),
    "iota": lambda p: ("iota", {"dimension": int(p["dimension"])}),
    "split": lambda p: ("split", {"axis": int(p["axis"]), "sizes": _ints(p["sizes"])}),
    "reduce_sum": lambda p: ("reduce_sum", _reduce(p)),
    "reduce_max": lambda p: ("reduce_max", _reduce(p)),
    "reduce_min": lambda p: ("reduce_min", _reduce(p)),
    "reduce_and": lambda p: ("reduce_and", _reduce(p)),
    "reduce_or": lambda p: ("reduce_or", _reduce(p)),
}
_RESHAPES = frozenset({"reshape", "squeeze", "expand_dims"})
# Cheap, and the same wherever they run: a loop body that reads one may as well compute it.
_MOVABLE = ELEMENTWISE | {"iota", "broadcast", "reshape", "transpose", "slice", "identity", "concatenate"}


def _neutral(eqn: Any) -> tuple[str, dict]:
    name = eqn.primitive.name
    p = eqn.params
    if name in _RESHAPES and len(eqn.invars) == 1:
        return "reshape", {"shape": tuple(eqn.outvars[0].aval.shape)}
    if name == "select_n":
        boolean = len(eqn.invars) == 3 and eqn.invars[0].aval.dtype == np.bool_
        return ("select", {}) if boolean else ("opaque:select_n", {})
    if name in _TABLE:
        if name == "convert_element_type" and _compat.dtype_name(eqn.outvars[0].aval) == "key":
            return "opaque:convert", {}
        return _TABLE[name](p)
    return (name, {}) if name in _SAME else (f"opaque:{name}", {})


def _spec(aval: Any) -> Spec:
    shape = getattr(aval, "shape", ())
    return Spec(tuple(d if isinstance(d, int) else int(d) for d in shape), _compat.dtype_name(aval))


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """The cyclic garbage collector paused: a trace is a hundred thousand live objects, which it would walk again and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def capture(closed: Any, name: str) -> Graph:
    """The neutral graph of a closed jaxpr that was traced under the mesh that is set now; dead code left out."""
    jaxpr, consts = _compat.open_jaxpr(closed)
    return _Capture(name, jax.sharding.get_abstract_mesh()).run(jaxpr, consts, {}).without_dead_nodes()


class _Capture:
    """State of one graph while it is built: values, and where each was made (for moving into bodies)."""

    def __init__(self, name: str, mesh: Any, parent: _Capture | None = None):
        self.graph = Graph(name)
        self.mesh = mesh
        self.parent = parent
        self.maker: dict[int, Node] = {}

    def run(self, jaxpr: Any, consts: tuple, moved: dict[int, int]) -> Graph:
        """`moved`: position of an input -> value of the parent that may be computed again in here."""
        g = self.graph
        env: dict[Any, int] = {}
        inputs = []
        for i, v in enumerate(jaxpr.invars):
            inputs.append(g.new_value(_spec(v.aval)))
            env[v] = self._import(moved[i]) if i in moved else inputs[-1]
        g.inputs = tuple(inputs)
        self._consts(env, jaxpr, consts)
        self._eqns(jaxpr, env, None)
        g.outputs = tuple(self._read(env, v) for v in jaxpr.outvars)
        return g

    def _consts(self, env: dict, jaxpr: Any, consts: tuple) -> None:
        for v, c in zip(jaxpr.constvars, consts, strict=True):
            env[v] = self._const(_spec(v.aval), c)

    def _const(self, spec: Spec, data: Any) -> int:
        v = self.graph.new_value(spec)
        if _compat.is_tracer(data) or spec.dtype == "key":
            # A value of an outer trace: known to run, not known to look at.
            node = Node("opaque:outer", (), (v,), payload=data)
            self.graph.nodes.append(node)
            return v
        self.graph.consts[v] = data
        return v

    def _read(self, env: dict, atom: Any) -> int:
        if _compat.is_literal(atom):
            return self._const(_spec(atom.aval), atom.val)
        return env[atom]

    def _closed(self, v: int, depth: int = 0) -> bool:
        """Whether `v` depends on no input, through cheap ops alone."""
        if v in self.graph.consts:
            return True
        n = self.maker.get(v)
        return n is not None and depth < 64 and n.op in _MOVABLE and n.region is None and all(
            self._closed(i, depth + 1) for i in n.inputs)  # fmt: skip

    def _import(self, v: int) -> int:
        """A copy, in this graph, of a closed value of the parent."""
        assert self.parent is not None
        spec = self.parent.graph.specs[v]
        if v in self.parent.graph.consts:
            return self._const(spec, self.parent.graph.consts[v])
        n = self.parent.maker[v]
        out = self.graph.new_value(spec)
        node = Node(n.op, tuple(self._import(i) for i in n.inputs), (out,), n.attrs, n.source, payload=n.payload)
        self._add(node)
        return out

    def _add(self, node: Node) -> None:
        self.graph.nodes.append(node)
        for v in node.outputs:
            self.maker[v] = node

    def _eqns(self, jaxpr: Any, env: dict, region: Region | None) -> None:
        read: dict[Any, float] = {}
        for here, group in itertools.groupby(enumerate(jaxpr.eqns), lambda e: _compat.mesh_of(e[1]) == self.mesh):
            if here:
                for _, eqn in group:
                    self._eqn(eqn, env, region)
            else:
                read = read or _last_read(jaxpr)
                places, eqns = zip(*group, strict=True)
                self._under_its_mesh(eqns, [v for e in eqns for v in e.outvars if read.get(v, -1) > places[-1]], env, region)

    def _under_its_mesh(self, eqns: tuple, results: list, env: dict, region: Region | None) -> None:
        """A node for equations that were traced under another mesh: its body is run under that mesh."""
        made = {v for e in eqns for v in e.outvars}
        given = list(dict.fromkeys(v for e in eqns for v in e.invars if not _compat.is_literal(v) and v not in made))
        inputs, outputs = tuple(env[v] for v in given), tuple(self.graph.new_value(_spec(v.aval)) for v in results)
        body = types.SimpleNamespace(constvars=(), invars=given, eqns=eqns, outvars=results)
        mesh, known = _compat.mesh_of(eqns[0]), {i: v for i, v in enumerate(inputs) if v in self.graph.consts}
        graph = _Capture("mesh", mesh, self).run(body, (), known).without_dead_nodes()
        effect = any(n.effect for n in graph.nodes)
        self._add(Node("mesh", inputs, outputs, {}, _compat.source_of(eqns[0])[0], effect, (graph,), region, mesh))
        env.update(zip(results, outputs, strict=True))

    def _eqn(self, eqn: Any, env: dict, region: Region | None) -> None:
        name = eqn.primitive.name
        inputs = tuple(self._read(env, v) for v in eqn.invars)
        if name in _compat.JIT_NAMES and _plain_jit(eqn.params):
            self._inline(eqn.params["jaxpr"], inputs, eqn, env, region)
        elif name in ("closed_call", "core_call"):
            self._inline(eqn.params["call_jaxpr"], inputs, eqn, env, region)
        elif name == "custom_jvp_call" and not _keeps_a_body(eqn.params["call_jaxpr"]):
            inner = Region(str(eqn.params.get("name", "custom_jvp")), inputs, (), eqn, region)
            self._inline(eqn.params["call_jaxpr"], inputs, eqn, env, inner)
            inner.outputs = tuple(env[v] for v in eqn.outvars)
        else:
            outputs = tuple(self.graph.new_value(_spec(v.aval)) for v in eqn.outvars)
            env.update(zip(eqn.outvars, outputs, strict=True))
            bodies = self._bodies(eqn, inputs)
            source, in_kernel = _compat.source_of(eqn)
            op, attrs = (name, {}) if bodies else (f"opaque:{name}", {}) if in_kernel else _neutral(eqn)
            if op == "select":  # select_n puts the value for False first; the graph, the one for True
                inputs = (inputs[0], inputs[2], inputs[1])
            self._add(Node(_BODY_OP.get(op, op), inputs, outputs, attrs, source,
                           bool(eqn.effects), bodies, region, eqn))  # fmt: skip

    def _inline(self, inner: Any, inputs: tuple, eqn: Any, env: dict, region: Region | None) -> None:
        jaxpr, consts = _compat.open_jaxpr(inner)
        local = dict(zip(jaxpr.invars, inputs, strict=True))
        self._consts(local, jaxpr, consts)
        self._eqns(jaxpr, local, region)
        for v, o in zip(eqn.outvars, jaxpr.outvars, strict=True):
            out = self._read(local, o)
            if region is not None and region.payload is eqn:
                # A region's outputs are its own values, so that they can come from the call run whole.
                fresh = self.graph.new_value(self.graph.specs[out])
                self._add(Node("identity", (out,), (fresh,), region=region))
                out = fresh
            env[v] = out

    def _bodies(self, eqn: Any, inputs: tuple[int, ...]) -> tuple[Graph, ...]:
        """Graphs of the functions that an equation calls, those it may be run again with."""
        name, p = eqn.primitive.name, eqn.params
        if name == "scan":
            k = _compat.scan_layout(eqn)[0]
            bodies = [(p["jaxpr"], 0, k)]
        elif name == "while":
            a, b = p["cond_nconsts"], p["body_nconsts"]
            bodies = [(p["cond_jaxpr"], 0, a), (p["body_jaxpr"], a, b)]
        elif name == "cond":
            bodies = [(j, 1, len(inputs) - 1) for j in p["branches"]]
        elif name in _compat.REMAT_NAMES or name in _compat.JIT_NAMES:
            bodies = [(p["jaxpr"], 0, len(inputs))]
        elif name == "shard_map":
            bodies = [(p["jaxpr"], 0, 0)]
        elif name == "custom_jvp_call":
            bodies = [(p["call_jaxpr"], 0, len(inputs))]
        elif name.startswith("custom_vjp_call") and _compat.custom_vjp_body(eqn) is not None:
            bodies = [(_compat.custom_vjp_body(eqn), 0, len(inputs))]
        else:
            return ()
        out = []
        for inner, first, count in bodies:
            jaxpr, consts = _compat.open_jaxpr(inner)
            moved = {i: v for i, v in enumerate(inputs[first : first + count]) if self._closed(v)}
            out.append(_Capture(name, _compat.mesh_in(eqn, jaxpr), self).run(jaxpr, consts, moved).without_dead_nodes())
        return tuple(out)


_BODY_OP = {"checkpoint": "remat", "remat2": "remat", "pjit": "jit", "custom_vjp_call_jaxpr": "custom_vjp",
            "custom_vjp_call": "custom_vjp", "custom_jvp_call": "custom_jvp"}  # fmt: skip


def _last_read(jaxpr: Any) -> dict[Any, float]:
    """For each variable, the place of the last equation that reads it; infinity for what is returned."""
    read: dict[Any, float] = {v: i for i, e in enumerate(jaxpr.eqns) for v in e.invars if not _compat.is_literal(v)}
    return read | dict.fromkeys((v for v in jaxpr.outvars if not _compat.is_literal(v)), math.inf)


def _plain_jit(params: dict) -> bool:
    """A jit that only groups: no shardings, layouts or compiler options to keep."""
    unset = all("Unspecified" in type(s).__name__ for k in ("in_shardings", "out_shardings") for s in params[k])
    layouts = all(x is None for k in ("in_layouts", "out_layouts") for x in params.get(k, ()))
    return unset and layouts and not params.get("compiler_options_kvs")


def _keeps_a_body(inner: Any) -> bool:
    """Whether a function holds what is no part of an elementwise region: a product, control flow, another mesh."""
    jaxpr, _ = _compat.open_jaxpr(inner)
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "scan", "while", "cond", "shard_map", "conv_general_dilated", "reshard", "mesh_cast"):
            return True
        for v in eqn.params.values():
            if (hasattr(v, "eqns") or hasattr(v, "jaxpr")) and _keeps_a_body(v):
                return True
    return False
