"""Programs timed against each other: compiled once, run in turn, in one process."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

SECONDS = 1.5
"""Time to spend on running each program."""
SAMPLE = 2e-3
"""Shortest sample, in seconds: shorter calls are repeated within one, for clocks and wake-ups cost microseconds."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call, one figure a round; `memory` is what the program needs besides its arguments, in bytes."""

    seconds: tuple[float, ...]
    memory: int | None


def measure(
    programs: Mapping[str, Callable[..., Any]], inputs: Sequence[Any], seconds: float = SECONDS
) -> dict[str, Timing]:
    """Times functions of the same arrays.

    In each round every program runs once, in an order that rotates, so that whatever else the machine does meets all.
    """
    compiled = {n: jax.jit(f).lower(*inputs).compile() for n, f in programs.items()}
    slowest = 0.0
    for run in compiled.values():
        jax.block_until_ready(run(*inputs))  # first touch of memory
        slowest = max(slowest, _sample(run, inputs, 1))
    repeats = max(1, math.ceil(SAMPLE / max(slowest, 1e-9)))
    rounds = min(101, max(9, math.ceil(seconds / max(repeats * slowest, 1e-9))))
    taken: dict[str, list[float]] = {n: [] for n in compiled}
    names = list(compiled)
    for i in range(rounds):
        first = i % len(names)
        for n in names[first:] + names[:first]:
            taken[n].append(_sample(compiled[n], inputs, repeats))
    return {n: Timing(tuple(taken[n]), _memory(compiled[n])) for n in names}


def _sample(run: Callable[..., Any], inputs: Sequence[Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        out = run(*inputs)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / repeats


def _memory(compiled: Any) -> int | None:
    try:
        found = compiled.memory_analysis()
        return int(found.temp_size_in_bytes + found.output_size_in_bytes)
    except (AttributeError, NotImplementedError, TypeError):  # not every backend tells
        return None


def gain(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """`(log of the speedup, its standard error)` over rounds that ran side by side.

    The median of the ratios' logarithms, for a busy machine leaves outliers, and for it the error of a median,
    1.2533 sigma / sqrt(n), with sigma from the median absolute deviation, 1.4826 MAD.
    """
    logs = [math.log(b / a) for b, a in zip(before, after, strict=True)]
    middle = statistics.median(logs)
    mad = statistics.median(abs(x - middle) for x in logs)
    return middle, 1.2533 * 1.4826 * mad / math.sqrt(len(logs))


def loss_and_gradients(fn: Callable[..., Any], inputs: Sequence[Any]) -> Callable[..., Any] | None:
    """`fn` with its gradients in every float input, if it returns one float scalar; else None."""
    out = jax.eval_shape(fn, *inputs)
    leaves = jax.tree.leaves(out)
    floats = tuple(i for i, x in enumerate(inputs) if jnp.issubdtype(jax.typeof(x).dtype, jnp.floating))
    if len(leaves) != 1 or leaves[0].shape != () or not jnp.issubdtype(leaves[0].dtype, jnp.floating) or not floats:
        return None
    return jax.value_and_grad(lambda *xs: jax.tree.leaves(fn(*xs))[0], floats)
