"""Which patterns exist, and how their finds become disjoint sites."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator

from kpt import ops
from kpt.errors import GraphError, OpError
from kpt.fusion import attention, cross_entropy, linear, norms, rope
from kpt.fusion.program import Match, NearMiss, Program
from kpt.fusion.site import specs_of
from kpt.graph.graph import Graph

log = logging.getLogger("kpt")
Pattern = Callable[[Program], Iterator[Match | NearMiss]]


@dataclasses.dataclass
class FusionRegistry:
    """Patterns by name, tried in the order of registration: an earlier find keeps what it takes."""

    patterns: dict[str, Pattern] = dataclasses.field(default_factory=dict)

    def register(self, name: str, pattern: Pattern) -> None:
        """Adds a pattern: a function from a `Program` to the matches and near misses in it.

        Raises:
          GraphError: the name is taken.
        """
        if name in self.patterns:
            raise GraphError(f"pattern {name!r} is registered twice", "Names are unique", "Choose another name")
        self.patterns[name] = pattern

    def find(self, graph: Graph, accept: Callable[[Match], str | None] = lambda m: None) -> tuple[Program, list[Match], list[NearMiss]]:
        """Disjoint, safe matches of one graph (not of its bodies), and what was left alone with the reason.

        Args:
          accept: returns why a match must not be taken (no kernel, a level), or None to take it. Where a
            match is declined, a smaller one over the same code may still be taken.
        """
        program = Program(graph)
        taken: list[Match] = []
        missed: list[NearMiss] = []
        claimed: dict[int, Match] = {}
        replaced: dict[tuple[str, int], set[int]] = {}  # what a match that was left alone would have taken
        for name, pattern in self.patterns.items():
            for found in _finds(name, pattern, program):
                if isinstance(found, NearMiss):
                    missed.append(found)
                    continue
                found = program.as_read(found)
                value = next(iter(found.results))
                core = _core(program, found)
                why = _malformed(found) or program.unsafe(found) or _overlap(claimed, core) or accept(found)
                if why is not None:
                    missed.append(NearMiss(found.op, value, why, found.source))
                    replaced[found.op, value] = core
                    continue
                claimed |= dict.fromkeys(core, found)
                taken.append(found)
        done = {v for m in taken for v in m.results}
        inside = {id(n) for m in taken for n in program.consumed(m)}

        def gone(m: NearMiss) -> bool:
            """Whether the code in question is replaced all the same, as itself or as part of something larger."""
            core = replaced.get((m.op, m.value))
            return m.value in done or (core <= inside if core else id(program.node_of.get(m.value)) in inside)

        return program, taken, [m for m in _unique(missed) if not gone(m)]


def _finds(name: str, pattern: Pattern, program: Program) -> Iterator[Match | NearMiss]:
    """What a pattern finds; a fault in it costs what it had not found yet, never the user's program."""
    try:
        yield from pattern(program)
    except Exception:
        log.warning("pattern %r failed on %s; please report it", name, program.graph.name, exc_info=True)


def _malformed(m: Match) -> str | None:
    """Why a match is no call of its op, or None: a pattern that reads an array wrongly costs a site, never the graph."""
    try:
        ops.op(m.op).infer(specs_of(m), **m.params)
    except OpError as error:
        return f"it was read as a call that the op does not have: {error}"
    return None


def _core(p: Program, m: Match) -> set[int]:
    """The nodes that only this match may take: those made from its inner values, their makers, and the makers of its results."""
    nodes = p.consumed(m)
    dying = {v for e in m.inner for v in e.origins}
    out: set[int] = set()
    for n in nodes:
        if any(v in dying for v in (*n.inputs, *n.outputs)) or any(v in m.results for v in n.outputs):
            out.add(id(n))
            dying.update(n.outputs)
    return out


def _overlap(claimed: dict[int, Match], core: set[int]) -> str | None:
    """Why a match that takes `core` cannot be taken beside those that were, or None."""
    other = next((claimed[n] for n in core if n in claimed), None)
    if other is None:
        return None
    return f"part of it is already replaced by {other.op}{' at ' + other.source if other.source else ''}"


def _unique(missed: Iterable[NearMiss]) -> list[NearMiss]:
    return list({(m.op, m.value): m for m in missed}.values())


def default_fusion() -> FusionRegistry:
    """A registry with one pattern per op that kpt knows, larger ones first."""
    r = FusionRegistry()
    r.register("attention", attention.find)
    r.register("cross_entropy", cross_entropy.find)
    r.register("linear", linear.find)
    r.register("norms", norms.find)
    r.register("rope", rope.find)
    return r
