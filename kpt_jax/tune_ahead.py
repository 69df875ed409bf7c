"""`kpt tune`: the kernels of this machine timed at the shapes of `kpt bench`, before any program asks."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from kpt.strategy.tune import Call, Tuned, tune
from kpt.tuning.measurements import BOTH, FORWARD
from kpt_jax.bench_ops import BENCHES
from kpt_jax.optimize import here
from kpt_jax.planner import FRONT
from kpt_jax.tpu_programs import cases
from kpt_jax.trials import ready


def calls(names: Sequence[str], dtype: str) -> list[Call]:
    """Of these benchmarks or ops, all where none is named, at every shape for what jax computes on.

    Raises:
      KptError: no benchmark has such a name.
    """
    chosen = dict.fromkeys(name for name, _ in cases(names))
    shapes = {n: BENCHES[n].cpu_shapes if jax.default_backend() == "cpu" else BENCHES[n].shapes for n in chosen}
    return [Call(BENCHES[n].op, BENCHES[n].specs(dtype, *dims), BENCHES[n].params) for n in chosen for dims in shapes[n]]


def fill(
    names: Sequence[str], dtype: str | None, level: str, budget: float, done: Callable[..., None] = lambda trial, outcome: None
) -> Tuned:
    """Times what was not timed yet, forward and with the backward pass, until the budget is spent."""
    device, end = jax.default_backend(), time.monotonic() + budget
    given = calls(names, dtype or ("float32" if device == "cpu" else "bfloat16"))
    found = []
    for passes in (BOTH, FORWARD):
        more: dict[str, Any] = {"ready": ready} if device == "tpu" else {}
        found.append(tune(given, here(), here=here(), framework="jax", level=level, compilers=FRONT.compilers, passes=passes,
                          budget=max(0.0, end - time.monotonic()), device=device, module="kpt_jax.trials", done=done, **more))  # fmt: skip
    both, forward = found
    sums = {f: getattr(both, f) + getattr(forward, f) for f in ("measured", "known", "left", "failed", "seconds")}
    return dataclasses.replace(both, dropped={**both.dropped, **forward.dropped}, **sums)
