"""JAX as a front end of the planner, and the rewrite of a program, bodies included, by what it plans."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kpt import ops
from kpt.errors import KernelError
from kpt.fusion.program import Match, NearMiss, Program
from kpt.fusion.site import fingerprint, leaf_values
from kpt.graph.graph import Graph
from kpt.kernels.validate import validate
from kpt.ops.base import Spec
from kpt.strategy import planner as core
from kpt.strategy.arrays import Arrays
from kpt.strategy.explain import LINEAR, SHARING, apart, joined, paired
from kpt.strategy.planner import FrontEnd, one_line, same_miss
from kpt.tuning.settings import Setting
from kpt.validation import Certificate
from kpt_jax import _compat
from kpt_jax.apply import REBUILT, Rewrite, run
from kpt_jax.capture import uncollected
from kpt_jax.certify import certify_site, rules_text, uncertifiable
from kpt_jax.on_device import ROOM
from kpt_jax.pairs import Differs, Proved, beside, read_by_linear
from kpt_jax.settings import SETTINGS


class _Jax:
    framework = "jax"
    packages: tuple[str, ...] = ("jax", "jaxlib", "flax", "numpy")
    compilers: tuple[str, ...] = ("jax", "jaxlib")
    settings: tuple[Setting, ...] = SETTINGS
    arrays: Arrays = ROOM

    def backend(self) -> str:
        return jax.default_backend()

    def rules_text(self, program: Program, match: Match) -> str:
        return rules_text(program, match)

    def uncertifiable(self, program: Program, match: Match) -> str | None:
        return uncertifiable(program, match)

    def ahead(self, chosen: Iterable[tuple[Match, Callable[..., Any]]]) -> None:
        """XLA compiles a proof as one program."""

    def certify(self, program: Program, match: Match, kernel: Callable[..., Any], example: Mapping[int, Any] | None) -> Certificate:
        return certify_site(program, match, kernel, example=example)

    def against_reference(self, match: Match, specs: dict[str, Spec], kernel: Callable[..., Any]) -> Certificate:
        return _against_reference(match, specs, kernel)

    @contextlib.contextmanager
    def proving(self) -> Iterator[None]:
        token = active.set(None)  # the derivatives that a proof takes are not the user's
        try:
            yield
        finally:
            active.reset(token)


FRONT: FrontEnd = _Jax()


@dataclasses.dataclass(eq=False)
class Planner(core.Planner):
    """The planner of a program while it is traced.

    Attributes:
      nested: how many parts have been planned so far: functions differentiated in the program, optimized ones called in it.
      within: path of the part being traced, "" or "grad0/".
    """

    nested: int = 0
    within: str = ""
    token: object = dataclasses.field(default_factory=object)

    def rewrite(self, graph: Graph, path: str = "", example: Sequence[Any] | None = None) -> Rewrite:
        """The graph with the kernels that were chosen and proved, bodies included."""

        def woven(miss: NearMiss) -> bool:
            """Forward and backward woven together: what was offered before differentiation is under grad<n>."""
            return bool(self.nested) and not path and (miss.reason.startswith("an inner value") or same_miss(miss, self.skipped))

        program, kept = self.sites_of(graph, path, Example(graph, example).leaves, uncollected, woven)

        def proved(beside_what: str) -> Proved | None:
            def held(i: int, together: Match, differs: Differs) -> bool:
                try:
                    why = differs(self.proved_at(program, together, self.kernels[id(kept[i][0])]))
                except KernelError as error:
                    why = one_line(error)
                if why:
                    self.notes.append(apart(kept[i][0].op, beside_what, why))
                return not why

            return held if self.certify != "off" else None

        read = read_by_linear(program, kept, proved(LINEAR))
        sites = [read.get(i, site) for i, site in enumerate(kept)]
        pairs = beside(program, sites, proved(SHARING))
        self.notes += [words(len(found)) for words, found in ((joined, read), (paired, pairs)) if found]
        if self.elsewhere:
            there, first = [*self.elsewhere, *kept], len(self.elsewhere)
            absent = [(joined, sum(i < first for i in read_by_linear(program, there)))]
            absent += [(paired, sum(min(p) < first for p in beside(program, there)))]
            self.notes += [f"On {self.hardware.name}, {words(n).removesuffix('.')}, if that is proved there." for words, n in absent if n]
        one = {i: site for (i, _), site in pairs.items()}
        second = {j for _, j in pairs}
        rw = Rewrite(graph, program, [one.get(i, site) for i, site in enumerate(sites) if i not in second])
        for n, bodies in self.bodies_of(graph, path):
            if n.op in REBUILT:
                rw.bodies[id(n)] = tuple(self.rewrite(b, where) for where, b in bodies)
        return rw


active: contextvars.ContextVar[Planner | None] = contextvars.ContextVar("kpt_planner", default=None)
"""The planner of the program being traced, for the parts of it that are differentiated inside."""


def _against_reference(match: Match, specs: dict[str, Spec], fn: Callable[..., Any]) -> Certificate:
    """A kernel against float64 on random arrays; each of its two programs is compiled once for all samples."""
    op, kernel = ops.op(match.op), functools.partial(fn, **match.params)

    @jax.jit
    def forward(arrays: dict[str, Any]) -> Any:
        return kernel(**arrays)

    @jax.jit
    def backward(arrays: dict[str, Any], cotangents: list[Any]) -> Any:
        moving = {n: a for n, a in arrays.items() if n in op.differentiable}
        out, pull = jax.vjp(lambda moving: kernel(**arrays | moving), moving)
        return pull(tuple(cotangents) if isinstance(out, tuple) else cotangents[0])[0]

    def run(_: Any, arrays: Mapping[str, np.ndarray], params: Any) -> Any:
        return jax.device_get(forward(dict(arrays)))

    def run_vjp(_: Any, arrays: Mapping[str, np.ndarray], params: Any, cotangents: Any) -> dict:
        return jax.device_get(backward(dict(arrays), list(cotangents)))

    with _compat.concrete():  # and no constants that are computed at once: a kernel's own axes are not bound to anything then
        return validate(fn, op, specs, match.params, run=run, run_vjp=run_vjp)


class Example:
    """The values that a graph takes on the user's inputs, computed when a certificate first asks."""

    def __init__(self, graph: Graph, inputs: Sequence[Any] | None):
        self.graph, self.inputs = graph, inputs
        self.seen: set[str] = set()

    def leaves(self, program: Program, match: Match) -> dict[int, Any] | None:
        """Values of a match's leaves, for the first site of each shape of site; None where they are not known."""
        if self.inputs is None:
            return None
        print_ = fingerprint(program, match)
        if print_ in self.seen:
            return None
        self.seen.add(print_)
        wanted = leaf_values(program, match)
        part = dataclasses.replace(self.graph, outputs=wanted).without_dead_nodes()
        if any(n.effect for n in part.nodes):
            return None
        with _compat.with_mesh_of(self.inputs):
            got = ROOM.fetched(jax.jit(lambda *xs: run(Rewrite(part), xs))(*self.inputs))
        return dict(zip(wanted, got, strict=True))


__all__ = ["FRONT", "Example", "Planner", "active"]
