"""What a kernel is, as data: which op it computes, where, at which dtype, and what it honours."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

from kpt.errors import KernelError
from kpt.install import install
from kpt.ops import OPS, REQUIRED
from kpt.ops.base import Cost, Specs
from kpt.ops.mask import Mask

LEVELS = ("conservative", "balanced", "aggressive")
FRAMEWORKS = ("jax", "torch")
ORIGINAL = "original"

Predicate = Callable[[Specs, Mapping[str, Any]], str | None]
CostModel = Callable[[Specs, Mapping[str, Any]], Cost]


@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """One implementation of one op.

    A kernel's version rises with every change of its numerics (order of sums, where it rounds, another algorithm) or of
    its signature (the arrays, parameters, masks and dtypes it takes). Plans record the version, and a plan made with
    an older kernel says so (`Plan.outdated`). A faster kernel with the same results keeps its version.

    Attributes:
      name: unique, "<op>.<provider>": "attention.xla".
      op: the op it computes, by the op's name.
      version: positive; see the rule above.
      provider: "xla", "pallas_tpu", "pallas_gpu", "triton", "cudnn", or a third party's name. "original" is the user's
        own code.
      framework: whose arrays it takes: "jax" or "torch".
      platforms: of "cpu", "cuda", "rocm", "tpu", "xpu".
      architectures: of those platforms, as `HardwareProfile.architecture` spells them; empty for any.
      dtypes: of the first array.
      masks: mask kinds it honours (`Mask.kinds`). A parameter `mask` with another kind is refused.
      fills: what a row that sees no key may become: "-inf" for NaN, "finite" for the mean of the values.
      additive: whether it honours `Mask.additive`.
      arrays: every array it takes, required and optional; None for all that the op has.
      params: for a parameter, the values it takes; a parameter without an entry may have any value.
      accepts: `accepts(specs, params) -> str | None`, further conditions on shapes: None, or the reason for refusing in
        one clause ("head dim 80 is not a multiple of 64"). A callable, or "module:function", imported at its first use.
      level: the lowest level at which it may be used.
      requires: package versions: "jax>=0.11.1". Looked up without importing the package.
      loader: "module:function"; the function takes the op's arrays and parameters by keyword.
      cost: `cost(specs, params) -> Cost`, the work it really does; None where that is the op's own cost.
      efficiency: fraction of the roofline it is expected to reach, in (0, 1], for estimates where nothing was measured.
      efficiency_on: the same by platform, where it is another.
      deterministic: whether equal inputs give equal bits.
    """

    name: str
    op: str
    version: int
    provider: str
    framework: str
    platforms: tuple[str, ...]
    loader: str
    dtypes: tuple[str, ...]
    architectures: tuple[str, ...] = ()
    masks: frozenset[str] = frozenset()
    fills: frozenset[str] = frozenset({"-inf", "finite"})
    additive: bool = False
    arrays: frozenset[str] | None = None
    params: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict, hash=False)
    accepts: Predicate | str | None = None
    level: str = "conservative"
    requires: tuple[str, ...] = ()
    cost: CostModel | None = None
    efficiency: float = 0.5
    efficiency_on: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    deterministic: bool = True

    def __post_init__(self) -> None:
        for wrong, problem in (
            (not self.name or not self.op, "name and op must not be empty"),
            (type(self.version) is not int or self.version < 1, f"version {self.version!r} is not a positive integer"),
            (self.framework not in FRAMEWORKS, f"framework {self.framework!r} is none of {', '.join(FRAMEWORKS)}"),
            (self.level not in LEVELS, f"level {self.level!r} is none of {', '.join(LEVELS)}"),
            (not self.platforms or not self.dtypes, "platforms and dtypes must not be empty"),
            (not self.fills <= {"-inf", "finite"}, f"fills {sorted(self.fills)} are not among '-inf', 'finite'"),
            (not 0 < self.efficiency <= 1, f"efficiency {self.efficiency} is outside (0, 1]"),
            (self.provider != ORIGINAL and ":" not in self.loader, f"loader {self.loader!r} is not 'module:function'"),
        ):
            if wrong:
                raise KernelError(f"Kernel {self.name!r} was described", problem, "Correct its KernelSpec")
        for requirement in self.requires:
            _parse_requirement(requirement)

    @property
    def signature(self) -> str:
        """Hash of what callers rely on; it must not change without a new version."""
        arrays = None if self.arrays is None else sorted(self.arrays)
        takes = (self.op, self.framework, sorted(self.dtypes), sorted(self.masks), sorted(self.fills), self.additive,
                 arrays, sorted(self.params.items(), key=repr))  # fmt: skip
        return hashlib.sha256(repr(takes).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return self.name if self.provider == ORIGINAL else f"{self.name} v{self.version}"


def original(op: str, framework: str) -> KernelSpec:
    """The user's own code as a candidate: it takes everything, everywhere."""
    anywhere = ("cpu", "cuda", "rocm", "tpu", "xpu")
    return KernelSpec(ORIGINAL, op, 1, ORIGINAL, framework, anywhere, loader="", dtypes=("any",))


def resolve(reference: str) -> Any:
    """Imports what "module:name" names.

    Raises:
      KernelError: the module cannot be imported, or lacks the name.
    """
    module, _, name = reference.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise KernelError(
            f"{reference!r} was to be loaded", f"{type(e).__name__}: {e}", "Install or repair the package it is in"
        ) from e


def unmet(requirement: str) -> str | None:
    """Why a requirement like "jax>=0.11.1" is not met here, or None; reads package metadata, imports nothing."""
    package, bounds = _parse_requirement(requirement)
    found = _installed(package)
    if found is None:
        line = f": {install(_EXTRAS[package])}" if package in _EXTRAS else ""
        return f"needs {requirement}, and {package} is not installed{line}"
    for operator, bound in bounds:
        if not _COMPARE[operator](*_pad(_release(found), _release(bound))):
            return f"needs {requirement}, and {package} {found} is installed"
    return None


_EXTRAS = {"jax-triton": "jax-triton"}
"""What no front end brings by itself, and which extra does."""


@functools.cache  # a look-up reads the disk, and a model asks once for each of its sites
def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    ">=": lambda a, b: a >= b,
    ">": lambda a, b: a > b,
    "<=": lambda a, b: a <= b,
    "<": lambda a, b: a < b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}


def _parse_requirement(text: str) -> tuple[str, list[tuple[str, str]]]:
    match = re.fullmatch(r"\s*([A-Za-z0-9._-]*[A-Za-z0-9])\s*(.*?)\s*", text)
    if match and not match[2]:
        return match[1], []
    given = match[2].split(",") if match else []
    bounds = [re.fullmatch(r"(>=|<=|==|!=|>|<)\s*([0-9][\w.+-]*)", bound.strip()) for bound in given]
    if not match or not all(bounds):
        raise KernelError(
            f"The requirement {text!r} was read",
            "A package name is followed by bounds with >=, >, <=, <, == or !=, separated by commas",
            "Write it like 'jax>=0.11.1,<0.13'",
        )
    return match[1], [(b[1], b[2]) for b in bounds if b]


def _release(version: str) -> tuple[int, ...]:
    """The numeric release of a version: "2.11.0+cu130" is (2, 11, 0). Local and pre-release parts do not count."""
    return tuple(int(n) for n in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))  # type: ignore[index]


def _pad(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    pairs = list(itertools.zip_longest(a, b, fillvalue=0))
    return tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)


class OtherHardware(str):
    """Words of `refusal` that say that a kernel is for other hardware: no call can go to it here."""

    __slots__ = ()


def refusal(
    kernel: KernelSpec,
    op: str,
    hardware: Any,
    dtype: str,
    specs: Specs,
    params: Mapping[str, Any],
    level: str,
    framework: str,
) -> str | None:
    """Why `kernel` cannot compute this call here, in one clause a user can act on; None where it can.

    `hardware` needs `name`, `platform` and `architecture`. The checks that import nothing come first.
    """
    if kernel.op != op:
        return f"computes {kernel.op}"
    if kernel.framework != framework:
        return f"takes {kernel.framework} arrays, and this is {framework} code"
    if hardware.platform not in kernel.platforms:
        chip = "this" if hardware.name == hardware.platform else hardware.name
        return OtherHardware(f"runs on {' or '.join(kernel.platforms)}, and {chip} is {hardware.platform}")
    if kernel.architectures and hardware.architecture not in kernel.architectures:
        return OtherHardware(f"is built for {', '.join(kernel.architectures)}, and {hardware.name} is {hardware.architecture}")
    if LEVELS.index(kernel.level) > LEVELS.index(level):
        return f"changes more than level {level!r} allows; pass level={kernel.level!r}"
    if dtype not in kernel.dtypes:
        return f"computes in {', '.join(kernel.dtypes)}, and the arrays are {dtype}"
    if reason := _params_refused(kernel, specs, params):
        return reason
    for requirement in kernel.requires:
        if reason := unmet(requirement):
            return reason
    accepts = resolve(kernel.accepts) if isinstance(kernel.accepts, str) else kernel.accepts
    return accepts(specs, params) if accepts else None


def elsewhere(reasons: Mapping[str, str]) -> tuple[str, ...]:
    """The names among reasons of `refusal` whose kernel is for other hardware."""
    return tuple(name for name, why in reasons.items() if isinstance(why, OtherHardware))


def _params_refused(kernel: KernelSpec, specs: Specs, params: Mapping[str, Any]) -> str | None:
    mask = params.get("mask")
    if isinstance(mask, Mask):
        if missing := mask.kinds - kernel.masks:
            return f"does not honour {' and '.join(sorted(missing))} masks"
        restricts = mask.kinds - {"bias"}
        fill = "-inf" if mask.fill == float("-inf") else "finite"
        if restricts and mask.additive and not kernel.additive:
            return "replaces hidden scores, and this mask adds to them"
        if restricts and not mask.additive and fill not in kernel.fills:
            return f"does not honour masks with a{' finite' if fill == 'finite' else 'n infinite'} fill"
    if kernel.arrays is not None and (extra := sorted(set(specs) - kernel.arrays)):
        return f"does not take {', '.join(extra)}"
    known = OPS[kernel.op].params if kernel.op in OPS else {}
    for name, allowed in kernel.params.items():
        value = params.get(name, known.get(name, REQUIRED))
        if value is not REQUIRED and value not in allowed:
            return f"takes {name} of {', '.join(map(repr, allowed))}, and this is {value!r}"
    return None
