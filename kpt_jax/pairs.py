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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kpt.fusion.program import Match, Program
from kpt.graph.graph import Node
from kpt.kernels.stand_in import standing_for
from kpt.ops.base import Spec
from kpt.strategy.certify import draw
from kpt.tuning.settings import found as settings
from kpt.validation import compare
from kpt_jax.on_device import ROOM
from kpt_jax.settings import SETTINGS

log = logging.getLogger("kpt")

Kept = Sequence[tuple[Match, Callable[..., Any]]]
Named = tuple[tuple[str, Spec], ...]
ProvedAt = Callable[[int, Match], Mapping[str, Spec] | None]


def read_by_linear(program: Program, kept: Kept, proved_at: ProvedAt | None = None) -> dict[int, tuple[Match, Callable[..., Any]]]:
    """The sites, by their places in `kept`, that run with the product that alone reads them: what they are with it, and its kernel.

    Args:
      proved_at: the arrays, by a place in `kept` and what the site is with its product, on which it is held to the two apart; only those
        that agree are given. None where nothing is proved, and of a site that cannot be.
    """
    inside = {id(n) for m, _ in kept for n in program.consumed(m)}
    found: dict[int, tuple[Match, Callable[..., Any]]] = {}
    for i, (match, kernel) in enumerate(kept):
        together = _with_reader(program, match, inside) if hasattr(kernel, "then_linear") else None
        if together is None:
            continue
        if proved_at is not None:
            short, long = proved_at(i, together), {n: e.spec for n, e in together.arrays.items()}
            under = tuple(sorted(match.params.items())), jax.default_backend(), repr(settings(SETTINGS))
            if short is None or not _agrees(kernel, tuple(short.items()), tuple(long.items()), *under):
                continue
        found[i] = together, kernel.then_linear  # type: ignore[attr-defined]
    return found


def _with_reader(program: Program, match: Match, inside: set[int]) -> Match | None:
    """The site and its reader, a plain product over the last dimension of its one result with a matrix; None where there is none, or
    something else sees that result. Its rows may be in another shape than the kernel's, which sees no dimension of 1, and be reshaped."""
    env, specs = program.env, program.graph.specs
    made = next(iter(match.results.values()))
    y = made.args[0] if made.op == "reshape" else made
    if y.op != "out" or made.shape[-1:] != y.shape[-1:] or any(e is not made for e in match.results.values()):
        return None
    names, readers = list(match.results), []
    for v in names:  # which grows
        for n in program.readers(v):
            same = [u for u in n.outputs if env[u] is env[v] or _rows(n, specs[v].shape, specs[u].shape)]
            names += [u for u in same if u not in names]
            readers += [] if same else [n]
    if len(readers) != 1 or id(readers[0]) in inside or readers[0].op != "dot_general" or set(names) & set(program.graph.outputs):
        return None
    (reader,) = readers
    (v, w), (out,) = reader.inputs, reader.outputs
    weight, spec = env[w], specs[out]
    plain = (reader.attrs["lhs_batch"], reader.attrs["rhs_batch"], reader.attrs["precision"]) == ((), (), "")
    if v not in names or w in names or not plain:
        return None
    if reader.attrs["lhs_contract"] != (len(specs[v].shape) - 1,) or len(weight.shape) != 2 or {spec.dtype, weight.dtype} != {y.dtype}:
        return None
    if reader.payload.params.get("out_sharding") is not None:
        return None
    if reader.attrs["rhs_contract"] == (1,):
        weight = program.exprs.transpose(weight, (1, 0))
    product = program.exprs.out(0, Spec((*y.shape[:-1], weight.shape[1]), spec.dtype))
    together = program.as_read(dataclasses.replace(match, arrays={**match.arrays, "w_down": weight},
                                                   results={out: program.exprs.reshape(product, spec.shape)},
                                                   inner=(*match.inner, *(env[u] for u in names))))  # fmt: skip
    return together if program.unsafe(together) is None else None


def _rows(n: Node, before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether a node gives the same rows in another shape, and not in another place."""
    adds = n.op == "broadcast" and list(n.attrs["dims"]) == sorted(n.attrs["dims"]) and math.prod(before) == math.prod(after)
    return (adds or n.op == "reshape") and before[-1:] == after[-1:] and n.payload.params.get("sharding") is None


@functools.cache
def _agrees(kernel: Any, specs: Named, long: Named, params: tuple[tuple[str, Any], ...], *under: str) -> bool:
    """Whether one call gives what two give, results and gradients, within the tolerance: what is made again is of what was rounded."""
    try:
        with standing_for(dict(long)):
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
