"""One site of a program: what it reads, and its code alone. Both front ends replace sites by these."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np

from kpt import ops
from kpt.fusion.program import Match, Program
from kpt.graph.expr import numpy_dtype
from kpt.graph.graph import Graph, Node
from kpt.ops.base import Spec


def leaf_values(program: Program, match: Match) -> tuple[int, ...]:
    """The program values that a site is computed from: by the kernel, and by its own code, which may read what cancels."""
    return tuple(sorted(kernel_reads(program, match) | cancelled_values(program, match)))


def cancelled_values(program: Program, match: Match) -> set[int]:
    """What a site's own code reads and the kernel does not: a number added to all logits, say. No result depends on it."""
    reads, nodes = kernel_reads(program, match), program.consumed(match)
    named = reads | {v for leaf in reads for v in program.env[leaf].origins} | {v for n in nodes for v in n.outputs}
    return {program.env[v].origins[0] for n in nodes for v in n.inputs if v not in named and v not in program.graph.consts}


def kernel_reads(program: Program, match: Match) -> set[int]:
    return set().union(*(program.leaves(a) for a in (*match.arrays.values(), *match.results.values())))


def isolated(program: Program, match: Match) -> Graph:
    """The code of one site alone: from its leaves to its results."""
    g = program.graph
    leaves = leaf_values(program, match)
    consts = {v: c for v, c in g.consts.items() if v not in leaves}
    nodes = program.consumed(match)
    made = {v for n in nodes for v in n.outputs}
    # A leaf may go by several names (a copy, a call's argument); the code may read it under any of them.
    names = {v: leaf for leaf in leaves for v in program.env[leaf].origins if v not in made and v != leaf}
    copies = [Node("identity", (leaf,), (v,)) for v, leaf in names.items()]
    return Graph(g.name, leaves, tuple(match.results), g.specs, consts, copies + nodes)


def original_bytes(program: Program, match: Match) -> int:
    """Memory that the site's own code may take, forward and backward: an upper estimate, in bytes."""
    specs = [program.graph.specs[v] for n in program.consumed(match) for v in n.outputs]
    size = sum(math.prod(s.shape) * numpy_dtype(s.dtype).itemsize for s in specs if s.dtype not in ("key", "token"))
    return 2 * size


def fingerprint(program: Program, match: Match) -> str:
    """Structure of a site: its code, shapes, dtypes and parameters; not where it stands."""
    number: dict[int, int] = {}
    parts: list = [match.op, sorted((n, e.shape, e.dtype) for n, e in match.arrays.items())]
    parts.append(sorted((k, repr(v)) for k, v in match.params.items()))
    for n in program.consumed(match):
        ins = [number.setdefault(v, len(number)) for v in n.inputs]
        outs = [number.setdefault(v, len(number)) for v in n.outputs]
        g = program.graph
        known = [np.asarray(g.consts[v]).item() if v in g.consts and g.specs[v].shape == () else "" for v in n.inputs]
        made = [(g.specs[v].shape, g.specs[v].dtype) for v in n.outputs]
        parts.append((n.op, ins, outs, sorted(n.attrs.items()), made, known))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def specs_of(match: Match) -> dict[str, Spec]:
    """Specs of the arrays, the op's first array first: it carries the dtype."""
    return in_order(match.op, {n: e.spec for n, e in match.arrays.items()})


def in_order(op: str, specs: Mapping[str, Spec]) -> dict[str, Spec]:
    names = [n for n in (*ops.op(op).arrays, *ops.op(op).optional) if n in specs]
    return {n: specs[n] for n in names}


def reduced_specs(match: Match, largest: int = 96) -> dict[str, Spec]:
    """The site's arrays with long dimensions cut short, equal sizes staying equal, and what is left over from tiles left over."""
    sizes = sorted({n for e in match.arrays.values() for n in e.shape if n > largest})
    to = {n: largest + 64 * i + n % 64 for i, n in enumerate(sizes)}
    short = {name: Spec(tuple(to.get(n, n) for n in e.shape), e.dtype) for name, e in match.arrays.items()}
    return in_order(match.op, short) | short
