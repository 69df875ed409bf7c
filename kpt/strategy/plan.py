"""A plan: which sites of a program get which kernel, why, and on what evidence. Made here, applied anywhere."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kpt.errors import KernelError, PlanError
from kpt.kernels import KernelRegistry
from kpt.kernels import registry as process_registry
from kpt.kernels.spec import ORIGINAL, OtherHardware, elsewhere
from kpt.ops.base import Spec
from kpt.strategy import wire

FORMAT = 1
"""Version of the JSON. It rises when an older reader would misread a plan; a new field alone does not raise it."""


@dataclasses.dataclass(frozen=True)
class Site:
    """One place in a program that computes an op.

    Attributes:
      op: the op found there.
      kernel: the kernel that runs it, by name; "original" where the user's own code stays.
      version: of the kernel; None for the original.
      path: where it is in the program: "layers.3.attention", "scan/body/7".
      source: the user's line: "model.py:41"; "" where unknown.
      reason: a sentence: why this kernel, or why none.
      time_before, time_after: seconds per call of the original and of the kernel; None where not measured.
      error: largest relative L2 error over the certified outputs; None where not certified.
      error_gradient: the same over the gradients.
      params: of the op, by name.
      specs: the op's arrays, by name.
      fingerprint: structure of the matched graph; a plan is applied only where it is the same.
      certificate: `Certificate.to_json()`, or None.
      alternatives: every other kernel of the framework by name, and why not; an `OtherHardware` for one that is for another chip.
    """

    op: str
    kernel: str
    version: int | None
    path: str
    source: str
    reason: str
    time_before: float | None = None
    time_after: float | None = None
    error: float | None = None
    error_gradient: float | None = None
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    specs: Mapping[str, Spec] = dataclasses.field(default_factory=dict)
    fingerprint: str = ""
    certificate: Mapping[str, Any] | None = None
    alternatives: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.kernel == ORIGINAL) != (self.version is None):
            raise PlanError(
                f"A site of {self.op} with kernel {self.kernel!r} and version {self.version} was described",
                "The original has no version, and every kernel has one",
                "Pass KernelSpec.name and KernelSpec.version, or 'original' and None",
            )
        if not self.reason:
            raise PlanError(f"The site of {self.op} at {self.path!r} has no reason", advice="Say why it is as it is")

    def __str__(self) -> str:
        kernel = self.kernel if self.version is None else f"{self.kernel} v{self.version}"
        return f"{self.op} at {self.path or self.source or '?'}: {kernel}"


def differentiated(path: str) -> bool:
    """Whether what is at a path is in a part of which the program itself takes gradients."""
    return any(re.fullmatch(r"grad\d+", part) for part in path.split("/"))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is done to one function for one signature of its arguments.

    Attributes:
      function: name of the function or model.
      level: "conservative", "balanced" or "aggressive".
      hardware: name of the profile it was made for.
      framework: "jax" or "torch".
      versions: of the packages it was made with, by name.
      sites: where a kernel runs.
      skipped: where the original stays; each says why.
      notes: what a reader should know besides.
    """

    function: str
    level: str
    hardware: str
    framework: str
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sites: tuple[Site, ...] = ()
    skipped: tuple[Site, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for site, listed in [(s, "sites") for s in self.sites] + [(s, "skipped") for s in self.skipped]:
            if (site.kernel == ORIGINAL) != (listed == "skipped"):
                raise PlanError(
                    f"{site} was listed under {listed!r}",
                    "`sites` are those with a kernel, `skipped` those where the original stays",
                )

    @property
    def hash(self) -> str:
        """Identity of what the plan does to the program; times, errors, reasons and notes do not count."""
        does = {
            "level": self.level,
            "framework": self.framework,
            "sites": [
                [s.op, s.kernel, s.version, s.path, s.fingerprint, wire.encode(s.params), wire.encode(s.specs)]
                for s in self.sites
            ],
        }
        return hashlib.sha256(json.dumps(does, sort_keys=True).encode()).hexdigest()[:16]

    def outdated(self, registry: KernelRegistry | None = None) -> tuple[str, ...]:
        """Sites whose kernel is not what it was when the plan was made, one sentence each."""
        installed = registry or process_registry
        found = []
        for site in self.sites:
            try:
                now = installed.get(site.kernel).version
            except KernelError:
                found.append(f"{site} is not installed here; install its package or plan again.")
                continue
            if now != site.version:
                found.append(f"{site}, and version {now} is installed; its numerics or signature changed, plan again.")
        return tuple(found)

    def explain(self) -> str:
        """The plan for people: each site, its kernel, where it is, why, and the evidence."""
        from kpt.strategy.explain import explain

        return explain(self)

    def __str__(self) -> str:
        return self.explain()

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` is the inverse."""
        data: dict[str, Any] = {"kind": "kpt.plan", "format": FORMAT, "hash": self.hash}
        data |= {name: getattr(self, name) for name in _STRINGS}
        data |= {"versions": wire.encode(self.versions), "notes": list(self.notes)}
        for name in ("sites", "skipped"):
            data[name] = [
                {k: wire.encode(v) for k, v in vars(site).items()} | {"elsewhere": list(elsewhere(site.alternatives))}
                for site in getattr(self, name)
            ]
        return json.dumps(data, indent=1, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Reads a plan. Fields that are not known here are left out, and the plan's notes say so.

        Raises:
          PlanError: the text is no JSON, no plan, malformed, or of a newer format.
        """
        try:
            data = json.loads(text)
        except ValueError as e:
            raise PlanError("A plan was read", f"The text is no JSON: {e}", _AGAIN) from e
        if not isinstance(data, dict) or data.get("kind") != "kpt.plan":
            raise PlanError("A plan was read", 'The JSON has no "kind": "kpt.plan"; it is something else', _AGAIN)
        if type(data.get("format")) is not int or data["format"] > FORMAT:
            raise PlanError(
                "A plan was read",
                f"It has format {data.get('format')!r}, and this version reads up to {FORMAT}",
                "Upgrade kpt, or make the plan again here",
            )
        try:
            return _plan(data)
        except PlanError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise PlanError("A plan was read", f"It is malformed: {type(e).__name__}: {e}", _AGAIN) from e

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON. The file is whole at every moment: what was there stays until the new text is complete."""
        target = Path(path)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.to_json())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Reads what `save` wrote.

        Raises:
          PlanError: there is no such file, or it holds no plan. The file is left as it is.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise PlanError(f"The plan {os.fspath(path)!r} was read", f"{type(e).__name__}: {e}", _AGAIN) from e
        try:
            return Plan.from_json(text)
        except PlanError as e:
            raise PlanError(f"The plan {os.fspath(path)!r} was read", e.possible, e.advice) from e


_AGAIN = "Make the plan again with kpt_jax.plan or kpt_torch.plan"
_STRINGS = ("function", "level", "hardware", "framework")
_TYPES: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("op", "kernel", "path", "source", "reason", "fingerprint"), str),
    **dict.fromkeys(("time_before", "time_after", "error", "error_gradient"), (int, float, type(None))),
    **dict.fromkeys(("params", "specs", "alternatives"), dict),
    "version": (int, type(None)),
    "certificate": (dict, type(None)),
    "elsewhere": list,  # names among `alternatives`: of its words JSON keeps no kind
}


def _plan(data: dict[str, Any]) -> Plan:
    known = {f.name for f in dataclasses.fields(Plan)}
    unknown = sorted(set(data) - known - {"kind", "format", "hash"})
    values = {k: wire.decode(data[k]) for k in known & set(data) - {"sites", "skipped"}}
    for name in _STRINGS:
        if not isinstance(values.get(name), str):
            raise PlanError("A plan was read", f"Its {name!r} is {values.get(name)!r}, and not a string", _AGAIN)
    for name in ("sites", "skipped"):
        sites = []
        for site in data[name]:
            fields = {k: wire.decode(v) for k, v in site.items() if k in _TYPES}
            unknown += [f"{name}.{k}" for k in site if k not in _TYPES]
            for key, value in fields.items():
                if not isinstance(value, _TYPES[key]):
                    raise PlanError("A plan was read", f"The {key!r} of one of its {name} is {value!r}", _AGAIN)
            for key, kind in (("specs", Spec), ("alternatives", str)):
                if not all(isinstance(v, kind) for v in fields.get(key, {}).values()):
                    raise PlanError("A plan was read", f"The {key!r} of one of its {name} is {fields[key]!r}", _AGAIN)
            if others := fields.pop("elsewhere", []):
                fields["alternatives"] = {k: OtherHardware(why) if k in others else why for k, why in fields["alternatives"].items()}
            sites.append(Site(**fields))
        values[name] = tuple(sites)
    versions, notes = values.setdefault("versions", {}), values.get("notes", [])
    if not isinstance(versions, dict) or not all(isinstance(v, str) for v in versions.values()):
        raise PlanError("A plan was read", f"Its 'versions' is {versions!r}, and not strings by name", _AGAIN)
    if not isinstance(notes, list | tuple):
        raise PlanError("A plan was read", f"Its 'notes' is {notes!r}, and not a list", _AGAIN)
    values["notes"] = tuple(map(str, notes))
    if unknown:
        values["notes"] += (f"Fields unknown to this version were left out: {', '.join(dict.fromkeys(unknown))}.",)
    plan = Plan(**values)
    if "hash" in data and data["hash"] != plan.hash:
        note = "The plan was edited after it was made: its hash is not that of its content."
        plan = dataclasses.replace(plan, notes=(*plan.notes, note))
    return plan
