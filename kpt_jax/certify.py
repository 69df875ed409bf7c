"""Proof of a swap: the kernel beside the code that it replaces, on random inputs and on the user's own."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kpt.fusion.program import Match, Program
from kpt.fusion.site import isolated
from kpt.strategy import certify as core
from kpt.strategy.certify import Leaves, Sides, moving_leaves
from kpt.validation import Certificate
from kpt_jax import _compat
from kpt_jax.apply import Rewrite, run
from kpt_jax.bind import bind
from kpt_jax.emit import emit
from kpt_jax.on_device import ROOM


def rules(program: Program, match: Match) -> list[Any]:
    """The calls with a derivative rule of their own (custom_jvp) that a site takes the place of."""
    found: dict[int, Any] = {}
    for n in program.consumed(match):
        region = n.region
        while region is not None:
            found[id(region)] = region.payload
            region = region.parent
    return list(found.values())


def rules_text(program: Program, match: Match) -> str:
    """What those rules compute: code that is equal but for them is not equal."""
    parts = []
    for eqn in rules(program, match):
        structs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
        moving = [i for i, s in enumerate(structs) if jnp.issubdtype(s.dtype, jnp.inexact)]

        def pushed(args: list[Any], tangents: list[Any], eqn: Any = eqn, moving: list[int] = moving) -> Any:
            def run(*xs: Any) -> list[Any]:
                given = dict(zip(moving, xs, strict=True))
                return bind(eqn, [given.get(i, a) for i, a in enumerate(args)])

            return jax.jvp(run, [args[i] for i in moving], tangents)

        closed = jax.make_jaxpr(pushed)(structs, [structs[i] for i in moving])
        parts.append(re.sub(r"0x[0-9a-f]+", "", str(closed)) + repr([np.asarray(c) for c in _compat.open_jaxpr(closed)[1]]))
    return "".join(parts)


def uncertifiable(program: Program, match: Match) -> str | None:
    """Why a site must not be taken on the word of the float64 reference, which knows the op and not the code it replaces.

    Where site and code are compared, these two are left to the comparison.
    """
    for eqn in rules(program, match):
        if not all(any(home in source for home in _libraries()) for source in _compat.rule_sources(eqn)):
            return "a derivative rule of your own is part of it"
    return core.rounds_on_the_way(program, match)


def _libraries() -> list[str]:
    """Folders of the libraries whose derivative rules are those of the functions that they belong to."""
    loaded = (sys.modules.get(name) for name in ("jax", "flax", "optax"))
    return [os.path.dirname(m.__file__) + os.sep for m in loaded if m is not None and m.__file__]


def _sides(program: Program, match: Match, kernel: Callable[..., Any]) -> Sides:
    g = isolated(program, match)
    wrt = moving_leaves(program, match)

    def side(rw: Rewrite) -> Callable[..., Any]:
        @jax.jit
        def both(leaves: dict[int, Any], cotangents: list[Any]) -> Any:
            def forward(diff: list[Any]) -> list[Any]:
                given = {**leaves, **dict(zip(wrt, diff, strict=True))}
                return run(rw, [given[v] for v in g.inputs])

            outs, vjp = jax.vjp(forward, [leaves[v] for v in wrt])
            return outs, vjp(list(cotangents))[0]

        def on_arrays(leaves: Leaves, cotangents: Sequence[Any]) -> Any:
            return ROOM.fetched(both(dict(leaves), list(cotangents)))

        return on_arrays

    def of_op(leaves: Leaves) -> dict[str, Any]:
        memo: dict[int, Any] = {}

        def known(e: Any) -> Any:
            return leaves.get(e.origins[0], program.graph.consts.get(e.origins[0])) if e.origins else None

        return {name: emit(e, program.exprs, known, memo) for name, e in match.arrays.items()}

    return Sides(side(Rewrite(g)), side(Rewrite(g, program, [(match, kernel)])), of_op, ROOM)


def certify_site(
    program: Program,
    match: Match,
    kernel: Callable[..., Any],
    seeds: Sequence[int] | None = None,
    example: Mapping[int, Any] | None = None,
) -> Certificate:
    """`kpt.strategy.certify.certify_site`, both sides compiled by jax."""
    with _compat.concrete():
        return core.certify_site(program, match, _sides(program, match, kernel), seeds, example)
