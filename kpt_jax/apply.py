"""Runs a graph with kernels in place of its sites, as the program it was captured from.

What no site touches runs as it stood: primitives by their own `bind`, functions with a derivative
rule whole, loops and branches through jax's public functions where a body changed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from kpt.fusion.program import Match, Program
from kpt.fusion.site import isolated, leaf_values
from kpt.graph.graph import Graph, Node, Region
from kpt_jax import _compat
from kpt_jax.bind import bind
from kpt_jax.both_modes import both_modes
from kpt_jax.emit import emit


@dataclasses.dataclass(eq=False)
class Rewrite:
    """A graph, what replaces its sites, and the rewrites of its bodies (by node, where any site is in them)."""

    graph: Graph
    program: Program | None = None
    sites: list[tuple[Match, Callable[..., Any]]] = dataclasses.field(default_factory=list)
    bodies: dict[int, tuple[Rewrite, ...]] = dataclasses.field(default_factory=dict)
    steps: list[tuple[str, Any]] | None = None
    reads: list[tuple[int, ...]] = dataclasses.field(default_factory=list)  # by site: the values that it is computed from

    @property
    def changed(self) -> bool:
        return bool(self.sites) or any(b.changed for bs in self.bodies.values() for b in bs)


def run(rw: Rewrite, args: Sequence[Any]) -> list[Any]:
    """The graph's outputs for these inputs."""
    if rw.steps is None:
        rw.steps = schedule(rw)
    g = rw.graph
    env: dict[int, Any] = dict(g.consts)
    env.update(zip(g.inputs, args, strict=True))
    for kind, what in rw.steps:
        if kind == "node":
            outs = _run_node(rw, what, [env[v] for v in what.inputs])
            env.update(zip(what.outputs, outs, strict=True))
        elif kind == "region":
            outs = bind(what.payload, [env[v] for v in what.inputs])
            env.update(zip(what.outputs, outs, strict=True))
        else:
            env.update(_run_site(rw, what, env))
    return [env[v] for v in g.outputs]


def schedule(rw: Rewrite) -> list[tuple[str, Any]]:
    """What to run, in order: only what the outputs and effects need."""
    g = rw.graph
    maker = g.producers()
    site_of = {v: i for i, (m, _) in enumerate(rw.sites) for v in m.results}
    consumed: set[int] = set()
    rw.reads = []
    for m, _ in rw.sites:
        assert rw.program is not None
        consumed |= {id(n) for n in rw.program.consumed(m)}
        rw.reads.append(leaf_values(rw.program, m))

    def step_for(v: int) -> tuple[str, Any] | None:
        if v in site_of:
            return "site", site_of[v]
        n = maker.get(v)
        if n is None:
            return None
        region: Region | None = n.region
        whole = None
        while region is not None:
            if v in region.outputs:
                whole = region
            region = region.parent
        return ("region", whole) if whole is not None else ("node", n)

    def needs(step: tuple[str, Any]) -> Sequence[int]:
        return rw.reads[step[1]] if step[0] == "site" else step[1].inputs

    done: set[tuple[str, int]] = set()
    steps: list[tuple[str, Any]] = []

    def demand(roots: Sequence[int]) -> None:
        stack: list[tuple[int | None, tuple[str, Any] | None]] = [(v, None) for v in reversed(roots)]
        while stack:
            v, ready = stack.pop()
            if ready is not None:
                steps.append(ready)
                continue
            assert v is not None
            step = step_for(v)
            if step is None:
                continue
            key = (step[0], step[1] if step[0] == "site" else id(step[1]))
            if key in done:
                continue
            done.add(key)
            stack.append((None, step))
            stack.extend((u, None) for u in reversed(needs(step)))

    for n in g.nodes:
        if n.effect:
            demand(n.inputs)
            if ("node", id(n)) not in done:
                done.add(("node", id(n)))
                steps.append(("node", n))
    demand(g.outputs)
    return steps


def _run_site(rw: Rewrite, i: int, env: dict[int, Any]) -> dict[int, Any]:
    match, _ = rw.sites[i]
    reads = rw.reads[i]
    assert rw.program is not None
    part = isolated(rw.program, match)

    def kernel(*xs: Any) -> list[Any]:
        return _replaced(rw, i, rw.graph.consts | dict(zip(reads, xs, strict=True)))

    def original(*xs: Any) -> list[Any]:
        given = rw.graph.consts | dict(zip(reads, xs, strict=True))
        return run(Rewrite(part), [given[v] for v in part.inputs])

    kernel = _partitioned(kernel, original)
    floats = [j for j, v in enumerate(reads) if rw.graph.specs[v].dtype.startswith(("float", "bfloat"))]
    outs = both_modes(kernel, original, floats)(*(env[v] for v in reads))
    return dict(zip(match.results, map(_compat.vary, outs, axes(rw.program, match)), strict=True))


def _partitioned(kernel: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, under a mesh whose shardings are part of types: XLA partitions what is inside, as under any other mesh, and the results
    lie as those of the code whose place it takes. Of gradients jax says itself that they lie as their arrays do.

    What `vmap` maps along such a mesh keeps nothing for its backward pass: types of what is inside say nothing of where it lies.
    """

    def call(*xs: Any) -> Any:
        axes = {a for x in xs for s in [_compat.placement(jax.typeof(x))[0]] if s is not None for a in s.mesh.explicit_axes}
        if not axes:
            return kernel(*xs)
        among = frozenset().union(*(_compat.varying_axes(jax.typeof(x)) for x in xs))

        def alike(*xs: Any) -> list[Any]:
            return original(*(_compat.vary(x, among) for x in xs))

        lie = [x.sharding for x in jax.make_jaxpr(alike)(*map(jax.typeof, xs)).out_avals]
        partitioned: Callable[..., Any] = jax.sharding.auto_axes(kernel, axes=tuple(sorted(axes)), out_sharding=lie)
        return jax.checkpoint(partitioned)(*xs) if _compat.mapped_over_mesh() else partitioned(*xs)

    return call


def axes(program: Program, match: Match) -> list[frozenset[str]]:
    """For each result of a site: the manual axes over which it varies in the user's code, for what reads it there."""
    found = []
    for v in match.results:
        n = program.node_of[v]
        while n.payload is None and n.op == "identity" and n.inputs[0] in program.node_of:  # what a region gives
            v, n = n.inputs[0], program.node_of[n.inputs[0]]
        eqn = n.payload
        found.append(_compat.varying_axes(eqn.outvars[n.outputs.index(v)].aval) if hasattr(eqn, "outvars") else frozenset())
    return found


def _replaced(rw: Rewrite, i: int, env: Mapping[int, Any]) -> list[Any]:
    """What the kernel makes of a site, in the order of the match's results."""
    match, kernel = rw.sites[i]
    assert rw.program is not None
    x = rw.program.exprs
    memo: dict[int, Any] = {}

    def known(e: Any) -> Any:
        return env[e.origins[0]] if e.origins and e.op != "out" else None

    arrays = {name: emit(e, x, known, memo) for name, e in match.arrays.items()}
    outs = _once(kernel, match.params)(**arrays)
    outs = outs if isinstance(outs, tuple) else (outs,)

    def with_outs(e: Any) -> Any:
        return outs[e["index"]] if e.op == "out" else known(e)

    out_memo: dict[int, Any] = {}
    # A result's own origins are what is being computed: look only below them.
    return [emit(e, x, with_outs, out_memo) for e in match.results.values()]


_jitted: dict[tuple[int, str], Callable[..., Any]] = {}


def _once(kernel: Callable[..., Any], params: Mapping[str, Any]) -> Callable[..., Any]:
    """The kernel with its parameters, as a function that jax traces and lowers once for all sites alike: a kernel takes half a second.

    Kernels are told apart by identity, for they need not be hashable, and parameters by repr, for 1 == 1.0 and 0.0 == -0.0.
    """
    key = id(kernel), repr(sorted(params.items()))  # what is kept holds the kernel, whose id is therefore no other's
    if key not in _jitted:
        _jitted[key] = jax.jit(functools.partial(kernel, **params))
    return _jitted[key]


def _run_node(rw: Rewrite, n: Node, args: list[Any]) -> list[Any]:
    if n.op == "identity" and (n.payload is None or n.payload.primitive.name not in _compat.PVARY_NAMES):
        return args
    if n.op == "opaque:outer":
        return [n.payload]
    if n.op == "select":
        return bind(n.payload, [args[0], args[2], args[1]])
    bodies = rw.bodies.get(id(n))
    if n.op == "mesh":
        return _mesh(n, bodies or (Rewrite(n.bodies[0]),), args)
    if not bodies or not any(b.changed for b in bodies):
        return bind(n.payload, args)
    return _AGAIN[n.op](n, bodies, args)


def _mesh(n: Node, bodies: tuple[Rewrite, ...], args: list[Any]) -> list[Any]:
    with _compat.under(n.payload):
        return run(bodies[0], args)


def _scan(n: Node, bodies: tuple[Rewrite, ...], args: list[Any]) -> list[Any]:
    p = n.payload.params
    k, c = _compat.scan_layout(n.payload)
    consts, init, xs = args[:k], args[k : k + c], args[k + c :]

    def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        outs = run(bodies[0], [*consts, *carry, *x])
        return outs[:c], outs[c:]

    carry, ys = jax.lax.scan(body, init, xs, length=p["length"], reverse=p["reverse"], unroll=p["unroll"])
    return [*carry, *ys]


def _while(n: Node, bodies: tuple[Rewrite, ...], args: list[Any]) -> list[Any]:
    a, b = n.payload.params["cond_nconsts"], n.payload.params["body_nconsts"]
    cc, bc, init = args[:a], args[a : a + b], args[a + b :]
    return jax.lax.while_loop(lambda s: run(bodies[0], [*cc, *s])[0], lambda s: run(bodies[1], [*bc, *s]), init)


def _cond(n: Node, bodies: tuple[Rewrite, ...], args: list[Any]) -> list[Any]:
    def branch(b: Rewrite) -> Callable[..., Any]:
        return lambda *xs: run(b, xs)

    return jax.lax.switch(args[0], [branch(b) for b in bodies], *args[1:])


def _remat(n: Node, bodies: tuple[Rewrite, ...], args: list[Any]) -> list[Any]:
    p = n.payload.params
    fn = jax.checkpoint(lambda *xs: run(bodies[0], xs), policy=p["policy"], prevent_cse=p["prevent_cse"])
    return fn(*args)


def _jit(n: Node, bodies: tuple[Rewrite, ...], args: list[Any]) -> list[Any]:
    p = n.payload.params
    fn = jax.jit(
        lambda *xs: run(bodies[0], xs),
        in_shardings=tuple(_given(s) for s in p["in_shardings"]) if _any_given(p["in_shardings"]) else None,
        out_shardings=[_given(s) for s in p["out_shardings"]] if _any_given(p["out_shardings"]) else None,
        keep_unused=True,
    )
    return fn(*args)


def _given(s: Any) -> Any:
    return None if "Unspecified" in type(s).__name__ else s


def _any_given(shardings: Any) -> bool:
    return any(_given(s) is not None for s in shardings)


def _shard_map(n: Node, bodies: tuple[Rewrite, ...], args: list[Any]) -> list[Any]:
    p = n.payload.params
    fn = jax.shard_map(
        lambda *xs: tuple(run(bodies[0], xs)),
        mesh=p["mesh"],
        in_specs=tuple(p["in_specs"]),
        out_specs=tuple(p["out_specs"]),
        axis_names=frozenset(p.get("newly_manual_axes", p.get("manual_axes", ()))),
        check_vma=p.get("check_vma", True),
    )
    return list(fn(*args))


def _custom_jvp(n: Node, bodies: tuple[Rewrite, ...], args: list[Any]) -> list[Any]:
    """The rewritten primal; derivatives by the rule that came with the code."""
    fn = jax.custom_jvp(lambda *xs: tuple(run(bodies[0], xs)))
    fn.defjvp(lambda primals, tangents: jax.jvp(lambda *xs: tuple(bind(n.payload, list(xs))), primals, tangents))
    return list(fn(*args))


def _custom_vjp(n: Node, bodies: tuple[Rewrite, ...], args: list[Any]) -> list[Any]:
    fn = jax.custom_vjp(lambda *xs: tuple(run(bodies[0], xs)))
    fn.defvjp(lambda *xs: jax.vjp(lambda *ys: tuple(bind(n.payload, list(ys))), *xs), lambda vjp, cts: vjp(cts))
    return list(fn(*args))


_AGAIN: dict[str, Callable[..., list[Any]]] = {
    "mesh": _mesh, "scan": _scan, "while": _while, "cond": _cond, "remat": _remat, "jit": _jit, "shard_map": _shard_map,
    "custom_jvp": _custom_jvp, "custom_vjp": _custom_vjp,
}  # fmt: skip
REBUILT = frozenset(_AGAIN)
