"""Arguments of a kernel inside `jax.shard_map`: all of them varying over the same mesh axes.

Inside `shard_map` a type says over which mesh axes a value differs from device to device. The gradient of a weight that every
device holds alike is summed over those that differ, which jax does where such a weight meets a varying array. A derivative rule
of our own hides that meeting: its backward pass returns the device's own part of the sum. Casting the weight to varying before
the rule brings the meeting, and with it the sum, back outside.
"""

from __future__ import annotations

from typing import Any

import jax


def in_shard_map() -> bool:
    """Whether the code that is being traced runs inside `jax.shard_map`."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def unpartitioned() -> str | None:
    """Why XLA may not be left to run a kernel without a rule for its partitioning, or None: it would gather the operands."""
    if jax.device_count() == 1 or in_shard_map():
        return None
    return f"runs on one device, and XLA may spread this program over {jax.device_count()}; optimize what a jax.shard_map runs"


def spread(a: Any) -> bool:
    """Whether the type of `a` says over which devices it lies: code that is traced for any platform may index no such dimension."""
    return any(axes is not None for axes in jax.typeof(a).sharding.spec)


def varying(a: Any) -> frozenset[str]:
    """Mesh axes over which `a` varies; none outside `shard_map`, and none where it does not check them."""
    kind = jax.typeof(a)
    if hasattr(kind, "vma"):  # until jax 0.9
        return kind.vma
    return frozenset(kind.manual_axis_type.varying)


def vary_alike(*arrays: Any) -> tuple[Any, ...]:
    """The arrays, each varying over the axes that any of them varies over; None stays None."""
    axes = frozenset().union(*(varying(a) for a in arrays if a is not None))

    def cast(a: Any) -> Any:
        missing = () if a is None else tuple(sorted(axes - varying(a)))
        if not missing:
            return a
        if hasattr(jax.lax, "pcast"):
            return jax.lax.pcast(a, missing, to="varying")
        pvary: Any = jax.lax.pvary  # type: ignore[attr-defined]  # before pcast, jax 0.7
        return pvary(a, missing)

    return tuple(cast(a) for a in arrays)
