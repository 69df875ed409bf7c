"""A graph made ready for matching, and what a pattern gives back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kpt.graph.expr import ELEMENTWISE, Expr, Exprs, numpy_dtype
from kpt.graph.graph import Graph, Node
from kpt.graph.normalize import normalize

# What a front end can compute between a program and a kernel.
GROUND = frozenset({"full", "const", "iota", "out"})
EMITTABLE = (ELEMENTWISE | frozenset("reshape transpose broadcast slice concatenate reduce_or reduce_sum real imag".split())) - frozenset(
    "erf erfc erf_inv log1p expm1 exp2 cbrt ceil round pow power atan2".split()
)


# What tells one value in other words: the code may read the one, and the rest of the program make the other.
_WORDS = frozenset("reshape transpose broadcast slice convert not".split())
_VIEWS = ("reshape", "transpose", "broadcast", "slice")
_READ = ("bfloat16", "float16", "float32")  # what ops take; rounding to 8 bits is no cast that a kernel could make up for


def widened(e: Expr) -> bool:
    """Whether `e` is another value in float32, of a narrower dtype that ops take: a kernel that computes in float32 may read that one."""
    return e.op == "convert" and e.dtype == "float32" and e.args[0].dtype in _READ and e.args[0].dtype != e.dtype


class Refuse(Exception):
    """Raised inside a pattern once it knows what the code means but cannot honour it. The text is for the user."""


@dataclasses.dataclass(frozen=True)
class Match:
    """An op found in a graph.

    Attributes:
      op: name in `kpt.ops`.
      arrays: the op's arrays, as expressions over the program's values.
      params: the op's parameters.
      results: program value id -> the expression, over "out" leaves and values of the program, that it equals.
      inner: expressions that the kernel will not produce; nothing else may use them.
      source: where the code stands.
    """

    op: str
    arrays: Mapping[str, Expr]
    params: Mapping[str, Any]
    results: Mapping[int, Expr]
    inner: tuple[Expr, ...]
    source: str = ""


@dataclasses.dataclass(frozen=True)
class NearMiss:
    """Code that looks like an op and was left alone, and why."""

    op: str
    value: int
    reason: str
    source: str = ""


class Program:
    """A graph with its expressions and users; what patterns look at."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.exprs, self.env = normalize(graph)
        self.node_of = graph.producers()
        self._users = graph.users()
        self._order = {id(n): i for i, n in enumerate(graph.nodes)}
        self._outputs = set(graph.outputs)
        self._consumed: dict[int, tuple[Match, list[Node]]] = {}
        self._unnamed = Exprs()  # formulas of values under whose own names nobody reads them
        self.activated: dict[int, tuple[str, Expr] | None] = {}  # what `linear` found out about expressions

    def exprs_with(self, *ops: str) -> Iterator[Expr]:
        """Expressions of the program's values with one of these ops, in execution order, each once."""
        seen: set[int] = set()
        for n in self.graph.nodes:
            for v in n.outputs:
                e = self.env[v]
                if e.op in ops and id(e) not in seen and e.origins:
                    seen.add(id(e))
                    yield e

    def users(self, e: Expr) -> list[Expr]:
        """Expressions made directly from `e`, each once, in execution order."""
        nodes = {id(n): n for v in e.origins for n in self._users.get(v, ())}
        found: dict[int, Expr] = {}
        for n in sorted(nodes.values(), key=lambda n: self._order[id(n)]):
            for v in n.outputs:
                u = self.env[v]
                if u is e:  # an identity: look through it
                    continue
                found.setdefault(id(u), u)
        return list(found.values())

    def readers(self, v: int) -> Iterable[Node]:
        """The nodes that read a value."""
        return self._users.get(v, ())

    def source(self, e: Expr) -> str:
        """Where in the user's code `e` is computed."""
        for v in e.origins:
            n = self.node_of.get(v)
            if n is not None and n.source:
                return n.source
        return ""

    def called(self, e: Expr) -> str:
        """The op that made `e`; a value that patterns do not look into has the front end's name for it."""
        node = next((self.node_of[v] for v in e.origins if v in self.node_of), None)
        return node.op.removeprefix("opaque:").removesuffix(".default") if e.op == "value" and node is not None else e.op

    def result(self, e: Expr, out: Expr) -> dict[int, Expr]:
        """`results` of a match: every program value that `e` is becomes `out`."""
        return dict.fromkeys(e.origins, out)

    def viewed(self, e: Expr) -> tuple[Expr, ...]:
        """The reshapes and transposes, one after the other, that are all that becomes of `e`."""
        views: list[Expr] = []
        while len(users := self.users(e)) == 1 and users[0].op in ("reshape", "transpose"):
            (e,) = users
            if any(e is v for v in views):  # there and back: equal shapes of one value are one expression
                break
            views.append(e)
        return tuple(views)

    def rounded(self, e: Expr) -> Expr | None:
        """The cast to a narrower float dtype that is all that becomes of `e`: a kernel may write its result in that dtype."""
        users = self.users(e)
        if len(users) != 1 or set(e.origins) & self._outputs or users[0].op != "convert":
            return None
        dtype, wide = users[0].dtype, e.dtype
        narrower = dtype in _READ and wide in (*_READ, "float64") and numpy_dtype(dtype).itemsize < numpy_dtype(wide).itemsize
        return users[0] if narrower else None

    def grounded(self, e: Expr, depth: int = 0) -> bool:
        """Whether a front end can compute `e` from the program's values."""
        if e.origins or e.op in GROUND:
            return True
        return e.op in EMITTABLE and depth < 64 and all(self.grounded(a, depth + 1) for a in e.args)

    def leaves(self, e: Expr) -> set[int]:
        """The program values that computing `e` reads."""
        out: set[int] = set()
        todo, seen = [e], set()
        while todo:
            x = todo.pop()
            if id(x) in seen:
                continue
            seen.add(id(x))
            if x.origins:
                out.add(x.origins[0])
            else:
                todo.extend(x.args)
        return out

    def consumed(self, match: Match) -> list[Node]:
        """The nodes between a match's arrays and its results: what the kernel takes the place of."""
        known = self._consumed.get(id(match))
        if known is not None:
            return known[1]
        stop: set[int] = set()
        for a in (*match.arrays.values(), *match.results.values()):
            for leaf in self.leaves(a):
                stop.update(self.env[leaf].origins)
        todo = [v for v in match.results]
        nodes: dict[int, Node] = {}
        while todo:
            v = todo.pop()
            n = self.node_of.get(v)
            if n is None or id(n) in nodes or (v in stop and v not in match.results):
                continue
            nodes[id(n)] = n
            todo.extend(i for i in n.inputs if i not in stop)
        found = sorted(nodes.values(), key=lambda n: self._order[id(n)])
        self._consumed[id(match)] = match, found  # the match is kept, so that its id stays its own
        return found

    def as_read(self, match: Match) -> Match:
        """The match with its arrays in the precision they are read in: what the code rounds first reaches the kernel rounded.

        And made of what the code reads: a weight that is read as it lies is no other value because its transpose is, too, elsewhere.
        """
        match = self._of_what_is_read(match)
        if match.op == "attention":  # whose three arrays have one dtype, which its pattern finds
            return match
        nodes = {id(n) for n in self.consumed(match)}
        read = {name: self._read_as(e, nodes) for name, e in match.arrays.items()}
        if not any(read.values()):
            return match
        arrays = {name: self.exprs.convert(e, read[name] or e.dtype) for name, e in match.arrays.items()}
        return dataclasses.replace(match, arrays=arrays)

    def _of_what_is_read(self, match: Match) -> Match:
        read = {v for n in self.consumed(match) for v in n.inputs}

        def of_it(e: Expr) -> Expr | None:
            """`e` by way of the first of the values it is a view of that is read; None where none is."""
            below = of_it(e.args[0]) if e.op in _WORDS else None
            if below is None:
                return e if read & set(e.origins) else None
            same = below is e.args[0] and not e.origins
            return e if same else self._unnamed.make(e.op, (below,), e.attrs, e.shape, e.dtype)

        arrays = {name: of_it(e) or e for name, e in match.arrays.items()}
        same = all(arrays[name] is e for name, e in match.arrays.items())
        return match if same else dataclasses.replace(match, arrays=arrays)

    def _read_as(self, e: Expr, nodes: set[int]) -> str | None:
        """The narrower float dtype that these nodes cast `e` to before anything else, or None."""
        leaves = self.leaves(e)
        if len(leaves) != 1 or not e.dtype.startswith(("float", "bfloat")):
            return None
        todo, found = [*self.env[min(leaves)].origins], set()
        while todo:
            v = todo.pop()
            for n in self._users.get(v, ()):
                if id(n) not in nodes:
                    continue
                made = self.env[n.outputs[0]]
                if made.op == "convert" and made is not self.env[v]:
                    found.add(made.dtype)
                elif made is self.env[v] or made.op in _VIEWS:
                    todo.extend(n.outputs)
                else:
                    return None
        (dtype,) = found if len(found) == 1 else (e.dtype,)
        return dtype if dtype in _READ and numpy_dtype(dtype).itemsize < numpy_dtype(e.dtype).itemsize else None

    def unsafe(self, match: Match) -> str | None:
        """Why the match may not be swapped in, or None."""
        return validate_fusion_safety(self, match)


def validate_fusion_safety(p: Program, match: Match) -> str | None:
    """Why replacing `match` would change more than the values it names, or None where it is safe.

    No other user of an inner value, nor of an input that is widened; no effect crossed; no derivative rule cut in two; the result keeps
    its dtype and shape; every array can be computed from the program.
    """
    for name, a in match.arrays.items():
        if not p.grounded(a):
            return f"array {name!r} is not a value of the program"
    for v, e in match.results.items():
        if p.graph.specs[v] != e.spec:
            return f"the kernel's result is {e.spec}, the program's {p.graph.specs[v]}"
    nodes = p.consumed(match)
    inside = {id(n) for n in nodes}
    if any(n.effect for n in nodes):
        return "an effect (print, callback, state) stands between its inputs and its result"
    results = set(match.results)
    dying = {v for e in match.inner for v in e.origins}
    for n in nodes:  # whatever is made from a dying value dies too
        if any(v in dying for v in n.inputs):
            dying.update(n.outputs)
    dying -= results
    reached = {v for n in nodes for v in n.outputs} & dying
    for v in sorted(reached):
        if v in p._outputs:
            return f"an inner value ({p.env[v].op}) is also returned; drop it from the outputs to let a kernel in"
        for user in p._users.get(v, ()):
            if id(user) not in inside:
                where = f" at {user.source}" if user.source else ""
                return f"an inner value ({p.env[v].op}) is also used by {user.op}{where}"
    for e in (p.env[v] for n in nodes for v in n.outputs if v not in results):
        if e.op == "convert" and _misrounds(e.args[0].dtype, e.dtype):
            return f"{e.args[0].dtype} is rounded to {e.dtype} on the way, which no kernel does"
    # What is an array in float32, and views of it. A loss and a metric often read the same logits: that is put up with.
    wide: set[int] = set()
    for n in nodes if match.op != "cross_entropy" else ():
        e = p.env[n.outputs[0]]
        if n.outputs[0] in results or not (widened(e) or e.op in _VIEWS and wide.intersection(n.inputs)):
            continue
        wide.update(n.outputs)
        for user in p._users.get(n.outputs[0], ()):
            if id(user) not in inside and any(p.graph.specs[u].dtype.startswith(("float", "bfloat")) for u in user.outputs):
                where = f" at {user.source}" if user.source else ""
                return (f"one of its inputs is widened to float32 and read so by {user.op}{where} too: what comes back from both is summed"
                        " before it is rounded, and a kernel would round first")  # fmt: skip
    leaf_nodes = {id(p.node_of[v]): v for a in match.arrays.values() for v in p.leaves(a) if v in p.node_of}
    for n in nodes:
        r = n.region
        while r is not None:
            if not _region_falls(p, r, inside, results):
                return f"it cuts through {r.name}, which has a derivative rule of its own"
            r = r.parent
    for i, v in leaf_nodes.items():
        n = p.node_of[v]
        r = n.region
        while r is not None:
            if v not in r.outputs and i not in inside:
                return f"one of its inputs is made inside {r.name}, which has a derivative rule of its own"
            r = r.parent
    return None


def _misrounds(before: str, after: str) -> bool:
    """Whether a cast between float dtypes is neither a widening nor a rounding that kernels read their arrays in."""
    floats = all(d.startswith(("float", "bfloat")) for d in (before, after))
    return floats and (after not in (*_READ, "float64") or {before, after} == {"bfloat16", "float16"})


def _region_falls(p: Program, region: Any, inside: set[int], results: set[int]) -> bool:
    """Whether all that a region gives to the program is replaced."""
    for v in region.outputs:
        if v in results:
            continue
        if v in p._outputs or any(id(u) not in inside for u in p._users.get(v, ())):
            return False
    return True
