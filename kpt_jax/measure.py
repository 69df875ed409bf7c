"""Programs timed against each other: compiled once, run in turn, in one process."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kpt.tuning import SECONDS, rounds
from kpt_jax import _compat

log = logging.getLogger("kpt")


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call, one figure a round; `memory` is what the program needs besides its arguments, in bytes."""

    seconds: tuple[float, ...]
    memory: int | None


@dataclasses.dataclass(frozen=True)
class Timed:
    """What is timed of a function: under jax.jit, of the arrays of a call; `trained`: as `loss_and_gradients`, else a list of results."""

    jitted: Any
    trained: bool


def measure(
    programs: Mapping[str, Callable[..., Any]], inputs: Sequence[Any], seconds: float = SECONDS
) -> dict[str, Timing]:
    """Times functions of the same arrays, jitted ones as they are, in turn (`kpt.tuning.rounds`)."""
    jitted: dict[str, Any] = {n: f if _compat.is_jitted(f) else jax.jit(f) for n, f in programs.items()}
    compiled = {n: f.lower(*inputs).compile() for n, f in jitted.items()}
    taken = rounds({n: functools.partial(sample, run, inputs) for n, run in compiled.items()}, seconds)
    return {n: Timing(taken[n], _memory(compiled[n])) for n in compiled}


def sample(run: Callable[..., Any], inputs: Sequence[Any], repeats: int) -> float:
    """Seconds a call, over as many calls."""
    start = time.perf_counter()
    out = None
    for _ in range(repeats):
        del out  # a training step returns as much as it is given: there may be room for one such result
        out = run(*inputs)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / repeats


def _memory(compiled: Any) -> int | None:
    try:
        found = compiled.memory_analysis()
        return int(found.temp_size_in_bytes + found.output_size_in_bytes)
    except (AttributeError, NotImplementedError, TypeError):  # not every backend tells
        return None


def loss_and_gradients(fn: Callable[..., Any], inputs: Sequence[Any]) -> Callable[..., Any] | None:
    """`fn` with its gradients in every float input, if it returns one float scalar and has such; else None."""
    out = jax.eval_shape(fn, *inputs)
    leaves = jax.tree.leaves(out)
    floats = tuple(i for i, x in enumerate(inputs) if jnp.issubdtype(jax.typeof(x).dtype, jnp.floating))
    if len(leaves) != 1 or leaves[0].shape != () or not jnp.issubdtype(leaves[0].dtype, jnp.floating) or not floats:
        return None
    both = jax.value_and_grad(lambda *xs: jax.tree.leaves(fn(*xs))[0], floats)
    try:
        jax.eval_shape(both, *inputs)
    except Exception as error:  # a while loop, a callback: it has none
        log.info("measured without gradients: %s", error)
        return None
    return both
