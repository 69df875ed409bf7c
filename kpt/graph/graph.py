"""The neutral graph: what both front ends capture a program into.

A `Graph` is a list of nodes in execution order over numbered values. It keeps the whole program, so
that a front end can run it again: what the core does not understand is a node whose op starts with
"opaque:", carried by the front end's own `payload`. Calls to plain sub-functions are flattened into
their caller; loops, branches and the like keep their body as a graph of its own (`Node.bodies`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kpt.ops.base import Spec


@dataclasses.dataclass(eq=False, slots=True)
class Region:
    """A flattened call with a derivative rule of its own (`custom_jvp`).

    Its nodes stand in the graph so that patterns see them. A front end runs the call whole, rule
    included, unless a site replaces everything that it gives to the rest of the program.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    payload: Any = None
    parent: Region | None = None


@dataclasses.dataclass(eq=False, slots=True)
class Node:
    """One operation: value ids in, value ids out.

    Attributes:
      op: a name of the vocabulary ("dot_general", "add", "reduce_sum", ...), a higher-order name with
        `bodies` ("scan", "while", "cond", "remat", ...), or "opaque:<primitive>".
      attrs: hashable, framework-neutral parameters of the op.
      source: where the user's code says it ("file.py:12 (attend)"), "" if unknown.
      effect: the node must run even if nothing uses its outputs, and no rewrite may cross it.
      payload: the front end's own object, never looked at by the core.
    """

    op: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    attrs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    source: str = ""
    effect: bool = False
    bodies: tuple[Graph, ...] = ()
    region: Region | None = None
    payload: Any = None


@dataclasses.dataclass(eq=False, slots=True)
class Graph:
    """A program over numbered values.

    Attributes:
      name: the function's name, or the path of the body ("loss_fn", "scan0").
      inputs, outputs: value ids; an output may repeat or be an input.
      specs: shape and dtype of every value, indexed by id.
      consts: values known while tracing: value id -> array (NumPy-convertible).
      nodes: in execution order.
    """

    name: str
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    specs: list[Spec] = dataclasses.field(default_factory=list)
    consts: dict[int, Any] = dataclasses.field(default_factory=dict)
    nodes: list[Node] = dataclasses.field(default_factory=list)

    def new_value(self, spec: Spec) -> int:
        """A fresh value id with this shape and dtype."""
        self.specs.append(spec)
        return len(self.specs) - 1

    def producers(self) -> dict[int, Node]:
        """Value id -> the node that makes it. Inputs and constants have none."""
        return {v: n for n in self.nodes for v in n.outputs}

    def users(self) -> dict[int, list[Node]]:
        """Value id -> the nodes that read it, in execution order."""
        out: dict[int, list[Node]] = {}
        for n in self.nodes:
            for v in dict.fromkeys(n.inputs):
                out.setdefault(v, []).append(n)
        return out

    def walk(self, path: str = "") -> Iterator[tuple[str, Graph]]:
        """This graph and every body inside it, with the path that leads there ("", "scan0", "scan0/remat2")."""
        yield path, self
        count: dict[str, int] = {}
        for n in self.nodes:
            for body in n.bodies:
                i = count[n.op] = count.get(n.op, -1) + 1
                yield from body.walk(f"{path}/{n.op}{i}" if path else f"{n.op}{i}")

    def without_dead_nodes(self) -> Graph:
        """The same program less the nodes whose results nobody uses. Effects stay."""
        live = set(self.outputs)
        kept = []
        for n in reversed(self.nodes):
            if n.effect or any(v in live for v in n.outputs):
                live.update(n.inputs)
                kept.append(n)
        kept.reverse()
        return dataclasses.replace(self, nodes=kept)

    def __str__(self) -> str:
        return pretty(self)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict of the structure: ops, values, attributes, sources. Payloads and constants' data stay out."""
        return {
            "name": self.name,
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "values": [[s.dtype, list(s.shape)] for s in self.specs],
            "consts": sorted(self.consts),
            "nodes": [
                {
                    "op": n.op,
                    "inputs": list(n.inputs),
                    "outputs": list(n.outputs),
                    "attrs": {k: _plain(v) for k, v in n.attrs.items()},
                    "source": n.source,
                    "effect": n.effect,
                    "bodies": [b.to_json() for b in n.bodies],
                }
                for n in self.nodes
            ],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Graph:
        """The inverse of `to_json`, for reading and comparing; a graph read back cannot be run."""
        return Graph(
            name=data["name"],
            inputs=tuple(data["inputs"]),
            outputs=tuple(data["outputs"]),
            specs=[Spec(tuple(shape), dtype) for dtype, shape in data["values"]],
            consts=dict.fromkeys(data["consts"]),
            nodes=[
                Node(
                    n["op"],
                    tuple(n["inputs"]),
                    tuple(n["outputs"]),
                    {k: _hashable(v) for k, v in n["attrs"].items()},
                    n["source"],
                    n["effect"],
                    tuple(Graph.from_json(b) for b in n["bodies"]),
                )
                for n in data["nodes"]
            ],
        )


def pretty(graph: Graph, indent: str = "") -> str:
    """The graph as text, one line a node: `%7 f32[4,8] = add %3 %5    # file.py:12`."""

    def show(v: int) -> str:
        return f"%{v}"

    def typed(v: int) -> str:
        s = graph.specs[v]
        return f"%{v} {s.dtype}[{','.join(map(str, s.shape))}]"

    lines = [f"{indent}{graph.name}({', '.join(map(typed, graph.inputs))}):"]
    for v in graph.consts:
        lines.append(f"{indent}  {typed(v)} = const")
    for n in graph.nodes:
        attrs = " ".join(f"{k}={_short(v)}" for k, v in n.attrs.items())
        line = f"{indent}  {', '.join(map(typed, n.outputs))} = {n.op} {' '.join(map(show, n.inputs))}"
        lines.append((line + (f" [{attrs}]" if attrs else "") + (f"    # {n.source}" if n.source else "")).rstrip())
        lines.extend(pretty(b, indent + "    ") for b in n.bodies)
    lines.append(f"{indent}  return {', '.join(map(show, graph.outputs))}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    text = repr(value).replace(" ", "")
    return text if len(text) <= 60 else text[:57] + "..."


def _plain(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | bool | type(None)) else (float(value) if isinstance(value, float) else int(value))


def _hashable(value: Any) -> Any:
    return tuple(_hashable(v) for v in value) if isinstance(value, list) else value
