"""Sites that run together with what stands beside them: in one launch, or with less kept for the backward pass.

Two sites of one op that share arrays are one call: a layer's queries and keys, turned by the same angles. A kernel that can says so by an
attribute `pair`, a kernel of the same arrays and `other`, the second site's x, which returns both results.

A gated MLP's last product keeps what it multiplies for the backward pass, and what glu keeps says the same. A kernel that can make its
result again has an attribute `then_linear`, a kernel of the same arrays and `w_down`, the weight of the product.

Each site is planned and proved alone; then what runs together is held to what runs apart, and is one site of the program that runs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kpt.fusion.program import Match, Program
from kpt.graph.expr import Expr
from kpt.graph.graph import Node
from kpt.kernels.stand_in import standing_for
from kpt.ops.base import Spec
from kpt.strategy.certify import draw, narrowest
from kpt.strategy.planner import one_line
from kpt.tuning.settings import found as settings
from kpt.validation import compare
from kpt_jax.apply import Rewrite, axes, schedule
from kpt_jax.on_device import ROOM
from kpt_jax.settings import SETTINGS

log = logging.getLogger("kpt")

Site = tuple[Match, Callable[..., Any]]
Kept = Sequence[Site]
Named = tuple[tuple[str, Spec], ...]
Compared = Callable[[Any, dict[str, Spec], dict[str, Any]], str]
Differs = Callable[[Mapping[str, Spec]], str]
Proved = Callable[[int, Match, Differs], bool]


def read_by_linear(program: Program, kept: Kept, proved: Proved | None = None) -> dict[int, Site]:
    """The sites, by their places in `kept`, that run with the product that alone reads them: what they are with it, and its kernel.

    Args:
      proved: whether a site, by its place in `kept`, may run as what it is with its product, by what says of arrays on which the one call
        is held to the two how they differ, "" where they do not. None where nothing is proved.
    """
    inside = {id(n) for m, _ in kept for n in program.consumed(m)}
    found: dict[int, Site] = {}
    for i, (match, kernel) in enumerate(kept):
        together = _with_reader(program, match, inside) if hasattr(kernel, "then_linear") else None
        if together is not None and (proved is None or proved(i, together, _differs(_compared, kernel, together))):
            found[i] = together, kernel.then_linear  # type: ignore[attr-defined]
    return found


def beside(program: Program, kept: Kept, proved: Proved | None = None) -> dict[tuple[int, int], Site]:
    """Pairs of sites, by their places in `kept`, that run as one call: what they are together, and its kernel.

    Of the sites that share their tables, in the order of the program, one and the next, the nearest first; where neither is computed from
    the other, by way of other pairs either, and none from what has an effect, whose order stays.

    Args:
      proved: as in `read_by_linear`; of a pair, by the place of its first site.
    """
    place = {i: min(m.results) for i, (m, kernel) in enumerate(kept) if hasattr(kernel, "pair")}
    groups: list[list[int]] = []
    for i in sorted(place, key=place.__getitem__):
        alike = next((g for g in groups if _alike(program, kept[g[0]], kept[i])), None)
        if alike is None:
            groups.append([i])
        else:
            alike.append(i)
    near = [p for g in groups for p in itertools.pairwise(g)]
    above = _above(program, kept) if near else {}
    found: dict[tuple[int, int], Site] = {}
    taken: set[int] = set()
    for i, j in sorted(near, key=lambda p: place[p[1]] - place[p[0]]):
        if {i, j} & taken or not {i, j} <= above.keys():
            continue
        (match, kernel), (behind, _) = kept[i], kept[j]
        both, read = 1 << i | 1 << j, above[i] | above[j]
        together = None if read & both or read >> len(kept) else _both(program, match, behind)
        if together is None or (proved is not None and not proved(i, together, _differs(_compared_pair, kernel, together))):
            continue
        found[i, j] = together, kernel.pair  # type: ignore[attr-defined]
        taken |= {i, j}
        above |= {n: bits | both | read for n, bits in above.items() if bits & both}
    return found


def _alike(program: Program, one: Site, other: Site) -> bool:
    """Whether two sites of one kernel differ in x alone, and in x by its heads alone, `[B, T, N, H]`; and their results vary alike."""
    (a, kernel), (b, same) = one, other
    sizes = [(x.shape[:2], x.shape[3:], x.dtype) for x in (a.arrays["x"], b.arrays["x"])]
    if kernel is not same or (a.op, a.params, a.arrays.keys()) != (b.op, b.params, b.arrays.keys()) or sizes[0] != sizes[1]:
        return False
    if any(e is not b.arrays[n] for n, e in a.arrays.items() if n != "x"):
        return False
    vary = [frozenset.intersection(*axes(program, m)) for m in (a, b)]
    return vary[0] == vary[1]


def _above(program: Program, kept: Kept) -> dict[int, int]:
    """Of each site that runs, by its place in `kept`: what it is computed from, a bit for each site and one more for all effects."""
    rw = Rewrite(program.graph, program, list(kept))
    of: dict[int, int] = {}
    found: dict[int, int] = {}
    for kind, what in schedule(rw):
        reads, made = (rw.reads[what], kept[what][0].results) if kind == "site" else (what.inputs, what.outputs)
        bits = functools.reduce(operator.or_, (of.get(v, 0) for v in reads), 0)
        if kind == "site":
            found[what] = bits
            bits |= 1 << what
        elif what.effect if kind == "node" else what.payload.effects:
            bits |= 1 << len(kept)
        of |= dict.fromkeys(made, bits)
    return found


def _both(program: Program, first: Match, second: Match) -> Match | None:
    """Two sites as one, whose kernel's results are that of the first and that of the second."""

    def of_second(e: Expr) -> Expr:
        if e.op == "out":
            return program.exprs.out(1, e.spec)
        args = e.args if e.origins else tuple(map(of_second, e.args))
        return e if args == e.args else program.exprs.make(e.op, args, e.attrs, e.shape, e.dtype)

    results = {**first.results, **{v: of_second(e) for v, e in second.results.items()}}
    together = dataclasses.replace(first, arrays={**first.arrays, "other": second.arrays["x"]}, results=results,
                                   inner=(*first.inner, *second.inner))  # fmt: skip
    return together if program.unsafe(together) is None else None


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


def _differs(compared: Compared, kernel: Any, together: Match) -> Differs:
    """How one call differs from two, on arrays that stand for those of the program."""
    long = tuple((n, e.spec) for n, e in together.arrays.items())
    under = tuple(sorted(together.params.items())), jax.default_backend(), repr(settings(SETTINGS))
    return lambda short: _difference_of(compared, kernel, tuple(short.items()), long, *under)


@functools.cache
def _difference_of(compared: Compared, kernel: Any, specs: Named, long: Named, params: tuple[tuple[str, Any], ...], *under: str) -> str:
    try:
        with standing_for(dict(long)):
            why = compared(kernel, dict(specs), dict(params))
    except Exception as error:  # what fails costs memory or a launch, never the user's run
        why = one_line(error)
    if why:
        log.warning("%s runs alone: %s", getattr(kernel, "__name__", kernel), why)
    return why


def _compared(kernel: Any, specs: dict[str, Spec], params: dict[str, Any]) -> str:
    """Within the tolerance: what is made again is of what was rounded."""

    def apart(*, w_down: jax.Array, **rest: Any) -> jax.Array:
        y: jax.Array = kernel(**rest)
        return y @ w_down

    return _difference(kernel.then_linear, apart, specs, params)


def _compared_pair(kernel: Any, specs: dict[str, Spec], params: dict[str, Any]) -> str:
    """To the bit, but for gradients of what the two share, which are sums of two."""

    def apart(*, x: jax.Array, other: jax.Array, **rest: Any) -> tuple[jax.Array, jax.Array]:
        return kernel(x=x, **rest), kernel(x=other, **rest)

    return _difference(kernel.pair, apart, specs, params, exact=("result0", "result1", "dx", "dother"))


def _difference(
    together: Callable[..., Any], apart: Callable[..., Any], specs: dict[str, Spec], params: dict[str, Any], exact: Collection[str] = ()
) -> str:
    """How results and gradients of one call differ from those of two, "" where they are within the tolerance, and `exact` ones equal."""

    def side(fn: Callable[..., Any]) -> dict[str, Any]:
        @jax.jit
        def both(arrays: dict[str, jax.Array], cotangents: list[jax.Array]) -> dict[str, jax.Array]:
            outs, pull = jax.vjp(lambda given: jax.tree.leaves(fn(**given, **params)), arrays)
            return {f"result{i}": y for i, y in enumerate(outs)} | {f"d{n}": g for n, g in pull(cotangents)[0].items()}

        made: dict[str, Any] = ROOM.fetched(both(arrays, cotangents))
        return made

    arrays = {n: draw(np.random.default_rng(i), s, "w" if n == "w_down" else n, specs, ROOM) for i, (n, s) in enumerate(specs.items())}
    results = jax.tree.leaves(jax.eval_shape(lambda given: apart(**given, **params), arrays))
    cotangents = [ROOM.normal(i, Spec(y.shape, y.dtype.name), 0.0, 1.0) for i, y in enumerate(results)]
    one, two = side(together), side(apart)
    dtype = narrowest([s.dtype for s in specs.values()] + [y.dtype.name for y in results])
    terms = max(math.prod(specs["x"].shape[:-1]), *(n for s in specs.values() for n in s.shape))
    certificate = compare(one, two, dtype, terms, gradients=[f"d{n}" for n in specs], where="random inputs", measure=ROOM.metrics, chain=2)
    if not certificate.passed:
        return certificate.summary()
    off = [c.name for c in certificate.checks if c.name in exact and c.metrics and c.metrics.max_abs]
    return f"{', '.join(off)} in other bits" if off else ""
