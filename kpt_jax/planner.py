"""From a captured program to its plan and its rewrite: match, choose, certify, in every body of the program."""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np

from kpt import kernels as kernel_room
from kpt import ops
from kpt.config import config
from kpt.errors import KernelError
from kpt.fusion.program import Match, NearMiss, Program
from kpt.fusion.registry import FusionRegistry, default_fusion
from kpt.graph.graph import Graph
from kpt.hardware import HardwareProfile
from kpt.kernels import KernelSpec
from kpt.kernels.spec import refusal
from kpt.kernels.validate import validate
from kpt.ops.base import Spec
from kpt.strategy import Plan, Site, choose
from kpt.validation import Certificate
from kpt_jax.apply import REBUILT, Rewrite, leaf_values, run
from kpt_jax.capture import uncollected
from kpt_jax.certify import certify_site, original_bytes, reduced_specs, rules_text, uncertifiable

log = logging.getLogger("kpt")
ORIGINAL = "original"


@functools.cache
def patterns() -> FusionRegistry:
    return default_fusion()


@dataclasses.dataclass(eq=False)
class Planner:
    """Gathers the sites of one program, nested parts included, while it is traced.

    Attributes:
      hardware: to choose kernels for.
      here: what the program runs on, where that may be something else.
      wanted: a plan to follow: `(path, op, fingerprint) -> Site`; other sites keep their own code.
      nested: how many parts have been planned so far: functions differentiated in the program, optimized ones called in it.
      within: path of the part being traced, "" or "grad0/".
    """

    level: str
    hardware: HardwareProfile
    wanted: Mapping[tuple[str, str, str], Site] | None = None
    banned: frozenset[str] = frozenset()
    certify: str = "full"
    here: HardwareProfile | None = None
    sites: list[Site] = dataclasses.field(default_factory=list)
    skipped: list[Site] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    nested: int = 0
    within: str = ""
    token: object = dataclasses.field(default_factory=object)

    def plan(self, function: str) -> Plan:
        met = {(s.path, s.op, s.fingerprint) for s in (*self.sites, *self.skipped)}
        for key, site in (self.wanted or {}).items():
            if key not in met:
                at = f" ({site.source})" if site.source else ""
                self.notes.append(f"The plan that was given names {site.op} at {site.path}{at}, which this function does not have.")
        log.info("%s: %d sites swapped, %d left as they are", function, len(self.sites), len(self.skipped))
        return Plan(function, self.level, self.hardware.name, "jax", versions(), tuple(self.sites), tuple(self.skipped),
                    tuple(dict.fromkeys(self.notes)))  # fmt: skip

    def rewrite(self, graph: Graph, path: str = "", example: Sequence[Any] | None = None) -> Rewrite:
        """The graph with the kernels that were chosen and proved, bodies included."""
        chosen: dict[int, tuple[KernelSpec, Callable[..., Any], str, dict[str, str]]] = {}
        refusals: dict[int, dict[str, str]] = {}
        choices: dict[Any, tuple[KernelSpec | None, str, dict[str, str]]] = {}

        def accept(match: Match) -> str | None:
            specs = _first_array_first(match.op, {n: e.spec for n, e in match.arrays.items()})
            call = match.op, tuple(specs.items()), repr(match.params)
            if call not in choices:  # layers are alike
                choices[call] = choose(match.op, specs, match.params, hardware=self.hardware, level=self.level, framework="jax")
            kernel, reason, others = choices[call]
            if kernel is None:
                refusals[next(iter(match.results))] = others
                return reason
            try:
                chosen[id(match)] = kernel, kernel_room.registry.load(kernel), reason, others
            except Exception as error:  # a broken kernel costs a site, never the user's run
                return f"{kernel.name} cannot be loaded: {error}"
            return None

        with uncollected():
            program, matches, missed = patterns().find(graph, accept)
        kept: list[tuple[Match, Callable[..., Any]]] = []
        values = _Example(graph, example)
        for i, match in enumerate(sorted(matches, key=lambda m: max(m.results))):
            kernel, fn, reason, others = chosen[id(match)]
            where = f"{path}/{match.op}{i}" if path else f"{match.op}{i}"
            site = _site(program, match, kernel, where, reason, others)
            why = self._unwanted(site)
            if why is None and (elsewhere := self._elsewhere(kernel, site)) is not None:
                self.sites.append(dataclasses.replace(site, reason=f"{site.reason} {elsewhere}"))
                continue
            if why is None:
                site, why = self._proved(program, match, kernel, fn, site, values)
            if why is not None:
                self._skip(match.op, where, match.source, why, site)
                continue
            kept.append((match, fn))
            self.sites.append(site)
        for miss in missed:
            if self.nested and not path and (miss.reason.startswith("an inner value") or _same(miss, self.skipped)):
                continue  # forward and backward woven together: what was offered before differentiation is under grad<n>
            self._skip(miss.op, path, miss.source, miss.reason, None, refusals.get(miss.value, {}))
        rw = Rewrite(graph, program, kept)
        count: dict[str, int] = {}
        for n in graph.nodes:
            if not n.bodies:
                continue
            i = count[n.op] = count.get(n.op, -1) + 1
            here = f"{path}/{n.op}{i}" if path else f"{n.op}{i}"
            if n.op not in REBUILT:
                continue
            rw.bodies[id(n)] = tuple(self.rewrite(b, here if len(n.bodies) == 1 else f"{here}.{k}") for k, b in enumerate(n.bodies))
        return rw

    def _unwanted(self, site: Site) -> str | None:
        if f"{site.path}" in self.banned:
            return "The whole program disagreed with the original while this site was in; a bisection found it."
        if self.wanted is None:
            return None
        asked = self.wanted.get((site.path, site.op, site.fingerprint))
        if asked is None:
            return ("The plan that was given has no such site here: the code, a shape, a dtype or a parameter is another than when it "
                    "was made. Make a new plan to include it.")  # fmt: skip
        if asked.kernel != site.kernel:
            return f"The plan asks for {asked.kernel}, which cannot be had here (this machine would take {site.kernel})."
        if asked.version != site.version:
            self.notes.append(f"{asked} was planned with version {asked.version}; version {site.version} runs here.")
        return None

    def _elsewhere(self, kernel: KernelSpec, site: Site) -> str | None:
        """What to say of a kernel that was chosen for other hardware than this and cannot run here; its site runs as written."""
        if self.here is None or self.here == self.hardware:
            return None
        dtype = next(iter(site.specs.values())).dtype
        why = refusal(kernel, site.op, self.here, dtype, site.specs, site.params, self.level, "jax")
        return None if why is None else f"Not certified and not run on this machine ({self.here.name}): {kernel.name} {why}."

    def _certify_bytes(self) -> int:
        given = config().certify_bytes
        if given is not None:
            return given
        device = self.here or self.hardware
        return 2 << 30 if device.platform == "cpu" or not device.memory_bytes else int(device.memory_bytes) // 8

    def _against_reference(self, match: Match, kernel: KernelSpec, fn: Callable[..., Any]) -> Certificate:
        """Where the user's own code is too large to run: the kernel against float64, long dimensions as short as it takes them.

        Raises:
          KernelError: it takes no short ones.
        """
        why: str | None = None
        for largest in (96, 512, 1024):
            specs = reduced_specs(match, largest)
            dtype = next(iter(_first_array_first(match.op, specs).values())).dtype
            why = refusal(kernel, match.op, self.here or self.hardware, dtype, specs, match.params, self.level, "jax")
            if why is None:
                return _against_reference(match, specs, fn)
        raise KernelError(f"{kernel.name} was to be certified at reduced size", f"It {why}", "Raise KPT_CERTIFY_BYTES")

    def _skip(self, op: str, path: str, source: str, reason: str, site: Site | None, others: Mapping[str, str] | None = None) -> None:
        base = site or Site(op, ORIGINAL, None, path, source, reason, alternatives=dict(others or {}))
        self.skipped.append(dataclasses.replace(base, kernel=ORIGINAL, version=None, reason=reason))

    def _proved(
        self, program: Program, match: Match, kernel: KernelSpec, fn: Callable[..., Any], site: Site, values: _Example
    ) -> tuple[Site, str | None]:
        if self.certify == "off":
            return site, None
        token = active.set(None)  # the derivatives that a proof takes are not the user's
        try:
            return self._prove(program, match, kernel, fn, site, values)
        finally:
            active.reset(token)

    def _prove(
        self, program: Program, match: Match, kernel: KernelSpec, fn: Callable[..., Any], site: Site, values: _Example
    ) -> tuple[Site, str | None]:
        needed = original_bytes(program, match)
        compared = needed <= self._certify_bytes()
        if not compared and (why := uncertifiable(program, match)) is not None:
            return site, f"It is too large to be compared with its own code, and {why}; raise KPT_CERTIFY_BYTES to compare the two."
        note = ""
        try:
            key: tuple = (kernel.name, kernel.version, site.fingerprint, rules_text(program, match), compared, jax.default_backend())
            example = values.leaves(program, match) if self.certify == "full" else None
            if example is not None:
                key = (*key, _digest(example))
            certificate = _CERTIFICATES.get(key)
            if certificate is None:
                certificate = certify_site(program, match, fn, example=example) if compared else self._against_reference(match, kernel, fn)
                _CERTIFICATES[key] = certificate
        except Exception as error:  # whatever a kernel does wrong, the user's own code goes on running
            log.warning("%s failed while it was certified: %s", site, error)
            return site, f"{kernel.name} failed while it was certified: {_one_line(error)}"
        if not compared:
            note = (f" Certified at reduced size against float64, because its own code may need {needed / 2**30:.1f} GiB;"
                    " raise KPT_CERTIFY_BYTES to compare the two at full size.")  # fmt: skip
        site = dataclasses.replace(
            site,
            reason=site.reason + note,
            error=certificate.worst(gradient=False),
            error_gradient=certificate.worst(gradient=True),
            certificate=certificate.to_json(),
        )
        if certificate.passed:
            return site, None
        log.warning("%s disagrees with the code it replaces: %s", site, certificate.summary())
        return site, f"{kernel.name} disagrees with the original: {certificate.summary()}."


_CERTIFICATES: dict[Any, Certificate] = {}
"""Proofs made in this process: equal code with the same kernel is proved once."""

active: contextvars.ContextVar[Planner | None] = contextvars.ContextVar("kpt_planner", default=None)
"""The planner of the program being traced, for the parts of it that are differentiated inside."""


def _against_reference(match: Match, specs: dict[str, Spec], fn: Callable[..., Any]) -> Certificate:
    """A kernel against float64 on random arrays."""

    def call(kernel: Callable[..., Any], arrays: Mapping[str, np.ndarray], params: Mapping[str, Any]) -> Any:
        return jax.device_get(jax.jit(lambda a: kernel(**a, **params))(arrays))

    op = ops.op(match.op)

    def vjp(kernel: Callable[..., Any], arrays: Mapping[str, np.ndarray], params: Mapping[str, Any], cts: Any) -> dict:
        diff = {n: a for n, a in arrays.items() if n in op.differentiable}
        rest = {n: a for n, a in arrays.items() if n not in diff}

        def run(d: Any, c: Any) -> Any:
            out, pull = jax.vjp(lambda d: kernel(**d, **rest, **params), d)
            return pull(tuple(c) if isinstance(out, tuple) else c[0])[0]

        return jax.device_get(jax.jit(run)(diff, list(cts)))

    with jax.ensure_compile_time_eval():
        return validate(fn, op, specs, match.params, run=call, run_vjp=vjp)


class _Example:
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
        got = jax.device_get(jax.jit(lambda *xs: run(Rewrite(part), xs))(*self.inputs))
        return dict(zip(wanted, got, strict=True))


def fingerprint(program: Program, match: Match) -> str:
    """Structure of a site: its code, shapes, dtypes and parameters; not where it stands."""
    number: dict[int, int] = {}
    parts: list[Any] = [match.op, sorted((n, e.shape, e.dtype) for n, e in match.arrays.items())]
    parts.append(sorted((k, repr(v)) for k, v in match.params.items()))
    for n in program.consumed(match):
        ins = [number.setdefault(v, len(number)) for v in n.inputs]
        outs = [number.setdefault(v, len(number)) for v in n.outputs]
        g = program.graph
        known = [np.asarray(g.consts[v]).item() if v in g.consts and g.specs[v].shape == () else "" for v in n.inputs]
        made = [(g.specs[v].shape, g.specs[v].dtype) for v in n.outputs]
        parts.append((n.op, ins, outs, sorted(n.attrs.items()), made, known))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _digest(example: Mapping[int, Any]) -> str:
    """The user's own data is part of a proof that was made on it."""
    found = hashlib.sha256()
    for v, a in example.items():
        found.update(f"{v}{np.shape(a)}".encode() + np.ascontiguousarray(a).tobytes())
    return found.hexdigest()


def _site(program: Program, match: Match, kernel: KernelSpec, path: str, reason: str, others: dict[str, str]) -> Site:
    specs = {n: e.spec for n, e in match.arrays.items()}
    return Site(match.op, kernel.name, kernel.version, path, match.source, reason, params=dict(match.params),
                specs=_first_array_first(match.op, specs), fingerprint=fingerprint(program, match), alternatives=others)  # fmt: skip


def _same(miss: NearMiss, skipped: Sequence[Site]) -> bool:
    return any((s.op, s.source, s.reason) == (miss.op, miss.source, miss.reason) for s in skipped)


def _first_array_first(op: str, specs: dict[str, Any]) -> dict[str, Any]:
    names = [n for n in (*ops.op(op).arrays, *ops.op(op).optional) if n in specs]
    return {n: specs[n] for n in names}


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


@functools.cache
def versions() -> dict[str, str]:
    found = {}
    for name in ("jax", "jaxlib", "flax", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


__all__ = ["NearMiss", "Planner", "active", "fingerprint", "patterns", "versions"]
