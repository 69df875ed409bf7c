"""What each level may change, as data, and the choice of a kernel under it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kpt.errors import ConfigError
from kpt.kernels import KernelRegistry, KernelSpec, Measurement
from kpt.kernels import registry as process_registry
from kpt.kernels.spec import ORIGINAL, elsewhere
from kpt.ops.base import Specs


@dataclasses.dataclass(frozen=True)
class Level:
    """A level of freedom.

    Attributes:
      ops: the ops that may be swapped; None for all, those of third parties included. Of their kernels, those whose own
        level is no higher: one that computes in a narrower dtype than the code it replaces is "aggressive".
      meaning: one clause for people.
    """

    name: str
    ops: frozenset[str] | None
    meaning: str


_REORDERED = frozenset({"attention", "rms_norm", "layer_norm", "rope", "cross_entropy", "linear_cross_entropy"})
_FUSED = _REORDERED | {"linear_act", "glu", "matmul", "ragged_matmul"}

LEVELS: Mapping[str, Level] = {
    level.name: level
    for level in (
        Level("conservative", _REORDERED, "same dtypes, float32 accumulation, reordered sums only"),
        Level("balanced", _FUSED, "also accumulation order of products, fused epilogues and recomputation"),
        Level("aggressive", None, "also narrower dtypes, where the certificate stays inside its bound"),
    )
}


def level_named(name: str) -> Level:
    """The level of that name.

    Raises:
      ConfigError: there is none.
    """
    if name not in LEVELS:
        raise ConfigError(f"Level {name!r} was asked for", f"Levels are {', '.join(LEVELS)}", "Pass one of them")
    return LEVELS[name]


def choose(
    op: str,
    specs: Specs,
    params: Mapping[str, Any],
    *,
    hardware: Any,
    level: str = "balanced",
    registry: KernelRegistry | None = None,
    framework: str = "jax",
    measurements: Mapping[str, Measurement] | None = None,
    dropped: Mapping[str, str] | None = None,
) -> tuple[KernelSpec | None, str, dict[str, str]]:
    """Chooses the kernel of one site, under a level.

    Args:
      specs: the op's arrays; the first of them carries the dtype.
      registry: `kpt.registry` by default.
      measurements: seconds by kernel name, "original" for the user's own code.
      dropped: kernels that are no candidates, by name, and why.

    Returns:
      The kernel, or None where the user's own code stays; a sentence that says why; and for each other candidate, by
      name, why not.

    Raises:
      ConfigError: no such level.
    """
    allowed = level_named(level)
    if allowed.ops is not None and op not in allowed.ops:
        lowest = next(n for n, other in LEVELS.items() if other.ops is None or op in other.ops)
        return None, f"Level {level!r} leaves {op} as it is: {allowed.meaning}. Pass level={lowest!r} to allow it.", {}
    dtype = next(iter(specs.values())).dtype
    found = (registry or process_registry).select(
        op, hardware, dtype, specs, params=params, level=level, framework=framework, measurements=measurements, dropped=dropped
    )
    reasons = dict(found.reasons)
    if found.choice.provider != ORIGINAL:
        return found.choice, f"{found.why[0].upper()}{found.why[1:]}.", reasons
    if not reasons:
        return None, f"No kernel for {op} in {framework} is registered; install one or register a KernelSpec.", reasons
    others = elsewhere(reasons)
    refused = [f"{name} {reason}" for name, reason in reasons.items() if name not in others]
    refused += [f"{len(others)} for other hardware"] if others else []
    return None, f"The original stays: {found.why} ({'; '.join(refused)}).", reasons
