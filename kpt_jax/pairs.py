"""Sites that run together with the product that reads them, and keep nothing for it.

A gated MLP's last product keeps what it multiplies for the backward pass, and what glu keeps says the same. A kernel that can make its
result again has an attribute `then_linear`, a kernel of the same arrays and `w_down`, the weight of the product. Each site is planned and
proved alone; then site and product are held to the two apart, and are one site of the program that runs.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from kpt.fusion.program import Match, Program
from kpt.ops.base import Spec
from kpt.strategy.certify import draw
from kpt.validation import compare
from kpt_jax.on_device import ROOM

log = logging.getLogger("kpt")

Kept = Sequence[tuple[Match, Callable[..., Any]]]


def read_by_linear(program: Program, kept: Kept, proved: bool = True) -> dict[int, tuple[Match, Callable[..., Any]]]:
    """The sites, by their places in `kept`, that run with the product that alone reads them: what they are with it, and its kernel.

    Args:
      proved: only those that were held to the two apart.
    """
    inside = {id(n) for m, _ in kept for n in program.consumed(m)}
    found: dict[int, tuple[Match, Callable[..., Any]]] = {}
    for i, (match, kernel) in enumerate(kept):
        together = _with_reader(program, match, inside) if hasattr(kernel, "then_linear") else None
        if together is None:
            continue
        call = tuple((n, e.spec) for n, e in together.arrays.items()), tuple(sorted(match.params.items()))
        if not proved or _agrees(kernel, *call, jax.default_backend()):
            found[i] = together, kernel.then_linear  # type: ignore[attr-defined]
    return found


def _with_reader(program: Program, match: Match, inside: set[int]) -> Match | None:
    """The site and its reader, a plain product over the last dimension of its one result with a matrix; None where there is none, or
    something else sees that result."""
    made = next(iter(match.results.values()))
    readers = [n for v in match.results for n in program.readers(v) if n.op == "dot_general"]
    if made.op != "out" or any(e is not made for e in match.results.values()) or len(readers) != 1 or id(readers[0]) in inside:
        return None
    (reader,) = readers
    (v, w), (out,) = reader.inputs, reader.outputs
    weight, spec = program.env[w], program.graph.specs[out]
    plain = (reader.attrs["lhs_batch"], reader.attrs["rhs_batch"], reader.attrs["precision"]) == ((), (), "")
    if v not in match.results or w in match.results or not plain:
        return None
    if reader.attrs["lhs_contract"] != (len(made.shape) - 1,) or len(weight.shape) != 2 or {spec.dtype, weight.dtype} != {made.dtype}:
        return None
    if reader.payload.params.get("out_sharding") is not None:
        return None
    if reader.attrs["rhs_contract"] == (1,):
        weight = program.exprs.transpose(weight, (1, 0))
    together = program.as_read(dataclasses.replace(match, arrays={**match.arrays, "w_down": weight},
                                                   results={out: program.exprs.out(0, spec)},
                                                   inner=(*match.inner, program.env[v])))  # fmt: skip
    return together if program.unsafe(together) is None else None


@functools.cache
def _agrees(kernel: Any, specs: tuple[tuple[str, Spec], ...], params: tuple[tuple[str, Any], ...], backend: str) -> bool:
    """Whether one call gives what two give, results and gradients, within the tolerance: what is made again is of what was rounded."""
    try:
        return _compared(kernel, dict(specs), dict(params))
    except Exception as error:  # what fails costs memory, never the user's run
        log.warning("%s runs alone: %s: %s", getattr(kernel, "__name__", kernel), type(error).__name__, error)
        return False


def _compared(kernel: Any, specs: dict[str, Spec], params: dict[str, Any]) -> bool:
    def apart(*, w_down: jax.Array, **rest: Any) -> jax.Array:
        y: jax.Array = kernel(**rest)
        return y @ w_down

    def side(fn: Callable[..., jax.Array]) -> dict[str, Any]:
        @jax.jit
        def both(arrays: dict[str, jax.Array], cotangent: jax.Array) -> dict[str, jax.Array]:
            out, pull = jax.vjp(lambda given: fn(**given, **params), arrays)
            return {"result": out} | {f"d{n}": g for n, g in pull(cotangent)[0].items()}

        made: dict[str, Any] = ROOM.fetched(both(arrays, cotangent))
        return made

    arrays = {n: draw(np.random.default_rng(i), s, "w" if n == "w_down" else n, specs, ROOM) for i, (n, s) in enumerate(specs.items())}
    x, w = specs["x"], specs["w_down"]
    cotangent = ROOM.normal(0, Spec((*x.shape[:-1], w.shape[1]), w.dtype), 0.0, 1.0)
    one, two = side(kernel.then_linear), side(apart)
    terms = max(math.prod(x.shape[:-1]), *(n for s in specs.values() for n in s.shape))
    certificate = compare(one, two, w.dtype, terms, gradients=[n for n in two if n != "result"], where="random inputs",
                          measure=ROOM.metrics, chain=2)  # fmt: skip
    if not certificate.passed:
        log.warning("%s runs alone: %s", getattr(kernel, "__name__", kernel), certificate.summary())
    return certificate.passed
