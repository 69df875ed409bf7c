"""From a captured program to the kernels that are put into it: match, choose, certify. Both front ends plan by this."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any, Protocol

from kpt import kernels as kernel_room
from kpt import ops
from kpt.config import config
from kpt.errors import KernelError, StoreError
from kpt.fusion.program import Match, NearMiss, Program
from kpt.fusion.registry import FusionRegistry, default_fusion
from kpt.fusion.site import fingerprint, in_order, original_bytes, reduced_specs, specs_of
from kpt.graph.graph import Graph
from kpt.hardware import HardwareProfile
from kpt.kernels import KernelSpec
from kpt.kernels.spec import ORIGINAL, refusal
from kpt.kernels.stand_in import standing_for
from kpt.ops.base import Spec
from kpt.strategy.arrays import Arrays
from kpt.strategy.certify import digest
from kpt.strategy.levels import choose
from kpt.strategy.plan import Plan, Site, differentiated
from kpt.tuning import Measurements, trials
from kpt.tuning.measurements import BOTH, FORWARD
from kpt.tuning.settings import Setting, counted, found
from kpt.validation import Certificate

log = logging.getLogger("kpt")
Kernel = Callable[..., Any]


@functools.cache
def patterns() -> FusionRegistry:
    return default_fusion()


class FrontEnd(Protocol):
    """What a framework does for the planner.

    Attributes:
      framework: "jax" or "torch", as `KernelSpec.framework` spells it.
      packages: whose versions a plan records.
      compilers: those of them on whose versions the time of a kernel depends.
      settings: what a program can set that changes times or numbers of kernels.
      arrays: what its proofs do with arrays.
    """

    framework: str
    packages: tuple[str, ...]
    compilers: tuple[str, ...]
    settings: tuple[Setting, ...]

    @property
    def arrays(self) -> Arrays:
        ...

    def backend(self) -> str:
        """What proofs are made on: a proof made on a CPU is none for a GPU."""

    def rules_text(self, program: Program, match: Match) -> str:
        """What the derivative rules inside a site compute: code that is equal but for them is not equal."""

    def uncertifiable(self, program: Program, match: Match) -> str | None:
        """Why a site must not be taken on the word of the float64 reference, which knows the op and not the code it replaces."""

    def ahead(self, chosen: Iterable[tuple[Match, Kernel]]) -> None:
        """Told of the kernels that were chosen before the first one is proved: what they need may be made ready together."""

    def certify(self, program: Program, match: Match, kernel: Kernel, example: Mapping[int, Any] | None) -> Certificate:
        """The kernel beside the code it replaces."""

    def against_reference(self, match: Match, specs: dict[str, Spec], kernel: Kernel) -> Certificate:
        """The kernel against float64, on random arrays of these specs."""

    def proving(self) -> contextlib.AbstractContextManager[Any]:
        """Entered around a proof."""


Leaves = Callable[[Program, Match], Mapping[int, Any] | None]
"""The user's values of a site's leaves, for the first site of each shape of site; None where they are not known."""


@dataclasses.dataclass(eq=False)
class Planner:
    """Gathers the sites of one program, nested parts included.

    Attributes:
      front: the framework.
      hardware: to choose kernels for.
      foreign: sites of a plan of another framework, to follow instead: a site is one of them if op, shapes and parameters agree. What
        is followed is taken off the list; what is left has no counterpart.
      here: what the program runs on, where that may be something else.
      wanted: a plan to follow: `(path, op, fingerprint) -> Site`; other sites keep their own code.
      banned: sites that keep their own code, by path, and why.
      dropped: kernels that are not to be used, by name, and why.
      elsewhere: of the last graph, the matches whose kernels cannot run here, and these.
      kernels: what those and the matches that got a kernel got, by the id of the match.
    """

    front: FrontEnd
    level: str
    hardware: HardwareProfile
    wanted: Mapping[tuple[str, str, str], Site] | None = None
    banned: Mapping[str, str] = dataclasses.field(default_factory=dict)
    certify: str = "full"
    here: HardwareProfile | None = None
    foreign: list[Site] | None = None
    dropped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sites: list[Site] = dataclasses.field(default_factory=list)
    skipped: list[Site] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    elsewhere: list[tuple[Match, Kernel]] = dataclasses.field(default_factory=list)
    kernels: dict[int, KernelSpec] = dataclasses.field(default_factory=dict)

    def plan(self, function: str) -> Plan:
        met = {(s.path, s.op, s.fingerprint) for s in (*self.sites, *self.skipped)}
        for key, site in (self.wanted or {}).items():
            if key not in met:
                at = f" ({site.source})" if site.source else ""
                self.notes.append(f"The plan that was given names {site.op} at {site.path}{at}, which this function does not have.")
        log.info("%s: %d sites swapped, %d left as they are", function, len(self.sites), len(self.skipped))
        return Plan(function, self.level, self.hardware.name, self.front.framework, versions(self.front.packages), tuple(self.sites),
                    tuple(self.skipped), tuple(dict.fromkeys(self.notes)))  # fmt: skip

    def sites_of(
        self,
        graph: Graph,
        path: str,
        leaves: Leaves,
        within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        seen: Callable[[NearMiss], bool] = lambda miss: False,
        fits: Callable[[Program, Match, KernelSpec], str | None] = lambda program, match, kernel: None,
    ) -> tuple[Program, list[tuple[Match, Kernel]]]:
        """The matches of one graph, bodies apart, that get a kernel: chosen, wanted and proved.

        Args:
          within: entered around the search.
          seen: near misses that need no mention.
          fits: further reasons of the front end to leave a site alone.
        """
        chosen: dict[int, tuple[KernelSpec, Kernel, str, dict[str, str]]] = {}
        refusals: dict[int, tuple[dict[str, str], Mapping[str, Spec], Mapping[str, Any]]] = {}
        choices: dict[Any, tuple[KernelSpec | None, str, dict[str, str]]] = {}
        passes = (BOTH,) if differentiated(path) else (BOTH, FORWARD)

        def accept(match: Match) -> str | None:
            specs = specs_of(match)
            call = match.op, tuple(specs.items()), repr(match.params)
            if call not in choices:  # layers are alike
                choices[call] = self._choose(match, specs, self.dropped, passes)
            kernel, reason, others = choices[call]
            if kernel is None:
                refusals[next(iter(match.results))] = others, *((specs, dict(match.params)) if others else ({}, {}))
                return reason
            try:
                chosen[id(match)] = kernel, kernel_room.registry.load(kernel), reason, others
            except Exception as error:  # a broken kernel costs a site, never the user's run
                return f"{kernel.name} cannot be loaded: {error}"
            return None

        with within():
            program, matches, missed = patterns().find(graph, accept)
        if self.certify != "off":
            self.front.ahead((m, chosen[id(m)][1]) for m in matches)
        kept: list[tuple[Match, Kernel]] = []
        self.elsewhere, self.kernels = [], {}
        for i, match in enumerate(sorted(matches, key=lambda m: max(m.results))):
            kernel, fn, reason, others = chosen[id(match)]
            where = f"{path}/{match.op}{i}" if path else f"{match.op}{i}"
            failed = dict(self.dropped)
            while True:
                site = _site(program, match, kernel, where, reason, others)
                why = self._unwanted(site) or fits(program, match, kernel)
                if why is not None or (elsewhere := self._elsewhere(kernel, site)) is not None:
                    break
                site, why = self._proved(program, match, kernel, fn, site, leaves)
                if why is None or (other := self._instead(match, failed, kernel, why, passes)) is None:
                    break
                kernel, fn, reason, others = other
            if why is not None:
                self._skip(match.op, where, match.source, why, site)
                continue
            self.kernels[id(match)] = kernel
            if elsewhere is not None:
                self.elsewhere.append((match, fn))
                self.sites.append(dataclasses.replace(site, reason=f"{site.reason} {elsewhere}"))
            else:
                kept.append((match, fn))
                self.sites.append(site)
        for miss in missed:
            if not seen(miss):
                self._skip(miss.op, path, miss.source, miss.reason, None, *refusals.get(miss.value, ()))
        return program, kept

    def _choose(
        self, match: Match, specs: Mapping[str, Spec], dropped: Mapping[str, str], passes: Sequence[str]
    ) -> tuple[KernelSpec | None, str, dict[str, str]]:
        known = self._known(match.op, specs, match.params, passes)
        return choose(match.op, specs, match.params, hardware=self.hardware, level=self.level, framework=self.front.framework,
                      measurements=known, dropped=dropped)  # fmt: skip

    def _known(
        self, op: str, specs: Mapping[str, Spec], params: Mapping[str, Any], passes: Sequence[str] = (BOTH, FORWARD)
    ) -> dict[str, tuple[float, float]]:
        """What was measured of an op's kernels on such a chip, under this driver and these compilers, in the first of `passes` that was."""
        place = place_of(self.hardware, self.front.compilers, self.front.settings)
        kernels = [k for k in kernel_room.registry.kernels(op) if k.framework == self.front.framework]
        try:
            return trials.known(Measurements(), place, kernels, specs, params, passes)
        except StoreError as problem:  # a file that cannot be read costs what it knows, never the user's run
            log.warning("%s", problem)
            return {}

    def _instead(
        self, match: Match, failed: dict[str, str], kernel: KernelSpec, why: str, passes: Sequence[str]
    ) -> tuple[KernelSpec, Kernel, str, dict[str, str]] | None:
        """The next best kernel for a site whose first one failed its proof, unless a plan asks for that one."""
        if self.wanted is not None or self.foreign is not None or kernel.name in failed:
            return None
        failed[kernel.name] = why
        while True:
            other, reason, others = self._choose(match, specs_of(match), failed, passes)
            if other is None:
                return None
            try:
                return other, kernel_room.registry.load(other), reason, others
            except Exception as error:  # a broken kernel costs a site, never the user's run
                failed[other.name] = f"cannot be loaded: {error}"

    def bodies_of(self, graph: Graph, path: str) -> Iterable[tuple[Any, list[tuple[str, Graph]]]]:
        """The nodes of a graph that have bodies, and these with their paths: "scan0", "cond1.0", "cond1.1"."""
        count: dict[str, int] = {}
        for n in graph.nodes:
            if not n.bodies:
                continue
            i = count[n.op] = count.get(n.op, -1) + 1
            here = f"{path}/{n.op}{i}" if path else f"{n.op}{i}"
            yield n, [(here if len(n.bodies) == 1 else f"{here}.{k}", b) for k, b in enumerate(n.bodies)]

    def _unwanted(self, site: Site) -> str | None:
        if site.path in self.banned:
            return self.banned[site.path]
        if self.foreign is not None:
            twin = next((s for s in self.foreign if corresponds(s, site)), None)
            if twin is None:
                return "The plan that was given is another framework's, and names no site of these shapes and parameters that is left."
            self.foreign.remove(twin)
            return None
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
        why = self._refused(kernel, site.op, site.specs, site.params)
        return None if why is None else f"Not certified and not run on this machine ({self.here.name}): {kernel.name} {why}."

    def _refused(self, kernel: KernelSpec, op: str, specs: Mapping[str, Spec], params: Mapping[str, Any]) -> str | None:
        dtype = next(iter(specs.values())).dtype
        return refusal(kernel, op, self.here or self.hardware, dtype, specs, params, self.level, self.front.framework)

    def _certify_bytes(self) -> int:
        given = config().certify_bytes
        if given is not None:
            return given
        device = self.here or self.hardware
        return 2 << 30 if device.platform == "cpu" or not device.memory_bytes else int(device.memory_bytes) // 8

    def proved_at(self, program: Program, match: Match, kernel: KernelSpec) -> dict[str, Spec]:
        """The arrays of a site where kernel and code can be compared, else `_reduced`."""
        if original_bytes(program, match) <= self._certify_bytes():
            return {n: e.spec for n, e in match.arrays.items()}
        return self._reduced(match, kernel)

    def _reduced(self, match: Match, kernel: KernelSpec) -> dict[str, Spec]:
        """Where the user's own code is too large to run: the site's arrays, long dimensions as short as the kernel takes them.

        Raises:
          KernelError: it takes no short ones.
        """
        why: str | None = None
        for largest in (96, 512, 1024):
            specs = reduced_specs(match, largest)
            why = self._refused(kernel, match.op, in_order(match.op, specs), match.params)
            if why is None:
                return specs
        raise KernelError(f"{kernel.name} was to be certified at reduced size", f"It {why}", "Raise KPT_CERTIFY_BYTES")

    def _against_reference(self, match: Match, kernel: KernelSpec, fn: Kernel) -> Certificate:
        specs = self._reduced(match, kernel)
        with standing_for(specs_of(match)):
            return self.front.against_reference(match, specs, fn)

    def _skip(
        self, op: str, path: str, source: str, reason: str, site: Site | None, refused: Mapping[str, str] | None = None,
        specs: Mapping[str, Spec] | None = None, params: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        base = site or Site(op, ORIGINAL, None, path, source, reason, params=params or {}, specs=specs or {},
                            alternatives=dict(refused or {}))  # fmt: skip
        others = {k: why for k, why in base.alternatives.items() if k != ORIGINAL}  # it is the choice now
        self.skipped.append(dataclasses.replace(base, kernel=ORIGINAL, version=None, reason=reason, alternatives=others))

    def _proved(
        self, program: Program, match: Match, kernel: KernelSpec, fn: Kernel, site: Site, leaves: Leaves
    ) -> tuple[Site, str | None]:
        if self.certify == "off":
            return site, None
        with self.front.proving():
            return self._prove(program, match, kernel, fn, site, leaves)

    def _prove(
        self, program: Program, match: Match, kernel: KernelSpec, fn: Kernel, site: Site, leaves: Leaves
    ) -> tuple[Site, str | None]:
        needed = original_bytes(program, match)
        compared = needed <= self._certify_bytes()
        if not compared and (why := self.front.uncertifiable(program, match)) is not None:
            return site, f"It is too large to be compared with its own code, and {why}; raise KPT_CERTIFY_BYTES to compare the two."
        note = ""
        try:
            rules = self.front.rules_text(program, match)
            under = self.front.backend(), repr(found(self.front.settings))
            drawn: tuple = (kernel.name, kernel.version, site.fingerprint, rules, compared, *under)
            example = leaves(program, match) if self.certify == "full" else None
            key = drawn if example is None else (*drawn, digest(example, self.front.arrays))
            certificate = _CERTIFICATES.get(key)
            if certificate is None:
                certificate = (
                    self.front.certify(program, match, fn, example) if compared else self._against_reference(match, kernel, fn)
                )
                _CERTIFICATES[key] = certificate
                if certificate.passed:  # on random inputs, too
                    _CERTIFICATES.setdefault(drawn, certificate)
        except Exception as error:  # whatever a kernel does wrong, the user's own code goes on running
            log.warning("%s failed while it was certified: %s", site, error)
            return site, f"{kernel.name} failed while it was certified: {one_line(error)}"
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


def place_of(
    hardware: HardwareProfile, compilers: tuple[str, ...], settings: tuple[Setting, ...] = (), values: Mapping[str, Any] | None = None
) -> trials.Place:
    """Where measurements of kernels for that hardware hold, under the versions of these packages, and these values of settings or what
    they are now."""
    values = found(settings) if values is None else values
    return trials.Place.of(hardware.name, hardware.platform, versions(compilers), counted(settings, hardware.platform, values))


def _site(program: Program, match: Match, kernel: KernelSpec, path: str, reason: str, others: dict[str, str]) -> Site:
    return Site(match.op, kernel.name, kernel.version, path, match.source, reason, params=dict(match.params),
                specs=specs_of(match), fingerprint=fingerprint(program, match), alternatives=others)  # fmt: skip


def corresponds(a: Site, b: Site) -> bool:
    """Whether two sites are the same call of the same op, whatever framework each is in: arrays, shapes, float dtypes, parameters."""

    def known(s: Site) -> dict[str, tuple[tuple[int, ...], str]]:
        return {n: (x.shape, x.dtype if "float" in x.dtype else "") for n, x in s.specs.items()}

    def equal(x: Any, y: Any) -> bool:
        both = isinstance(x, float) and isinstance(y, float)
        return math.isclose(x, y, rel_tol=1e-5) if both else x == y

    defaults = ops.op(a.op).params
    if a.op != b.op or known(a) != known(b):
        return False
    return all(equal(a.params.get(n, default), b.params.get(n, default)) for n, default in defaults.items())


def same_miss(miss: NearMiss, skipped: Sequence[Site]) -> bool:
    """Whether a skipped site already says what a near miss does."""
    return any((s.op, s.source, s.reason) == (miss.op, miss.source, miss.reason) for s in skipped)


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


@functools.cache
def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """The installed versions of these packages."""
    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
