"""linear_act: act(x w + b).  glu: act(x w_gate + b_gate) * (x w_up + b_up)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

from kpt.fusion.formula import activation, gate
from kpt.fusion.program import Match, NearMiss, Program
from kpt.fusion.view import TRANSPARENT, Axes, Ref
from kpt.graph.expr import ELEMENTWISE, Expr
from kpt.ops.base import Spec

BATCHED = (
    "each of a batch has weights of its own, and a kernel takes the weights of one; where the batch is made by vmap, optimize what is "
    "mapped: vmap(optimize(f)) for optimize(vmap(f))"
)


@dataclasses.dataclass(frozen=True)
class Projection:
    """`ref` = x w + b: operands with axes, the contracted axes, and the product itself."""

    x: Ref
    w: Ref
    b: Ref | None
    contracted: tuple[int, ...]
    columns: tuple[int, ...]
    dot: Expr


def projection(p: Program, ax: Axes, ref: Ref) -> Projection | None:
    """Reads `ref` as a product with a weight, plus a bias over its columns, perhaps sliced.

    A slice of the product is the product with a slice (of the weight's columns, or of the rows of x).
    """
    cuts: Cuts = {}
    parts = _summands(ax, ref, cuts)
    dots = [(r, got) for r in parts if (got := _dot(ax, r)) is not None]
    if len(parts) > 2 or len(dots) != 1:  # x w + h w: two products, or none
        return None
    at, (x, w, contracted, dot) = dots[0]
    rest = [r for r in parts if r is not at]
    whole = [_cut(p, ax, r, cuts) for r in (x, w, *rest)]
    sliced = [r for r in whole if r is not None]
    if len(sliced) != len(whole):
        return None
    x, w, rest = sliced[0], sliced[1], sliced[2:]
    columns = tuple(a for a in ax.of(w) if a not in ax.flat(contracted))
    if not columns or set(columns) & set(ax.of(x)):
        return None
    b = None
    if rest:
        b = ax.strip(rest[0])
        if not set(ax.of(b)) <= set(columns) or len(ax.of(b)) != len(columns):
            return None
    return Projection(ax.resolve(x), ax.resolve(w), b, ax.flat(contracted), columns, dot)


# An axis of a sliced value -> (start, limit) of the slice, and the axes that the result has in its place.
Cuts = dict[int, tuple[int, int, tuple[int, ...]]]


def _summands(ax: Axes, r: Ref, cuts: Cuts) -> list[Ref]:
    """The terms of a sum, behind views and slices. Axes that a slice shortens are noted in `cuts`."""
    r = ax.strip(r)
    if r.expr.op == "slice" and all(s == 1 for s in r.expr["stride"]):
        src = r.expr.args[0]
        dims = list(r.dims)
        for i, (a, b, n) in enumerate(zip(r.expr["start"], r.expr["limit"], src.shape, strict=True)):
            if b - a != n:
                dims[i] = ax.new(n)
                cuts[dims[i][0]] = (a, b, ax.flat(r.dims[i]))
        return _summands(ax, Ref(src, tuple(dims)), cuts)
    if r.expr.op == "add":
        return [q for a in r.expr.args for q in _summands(ax, Ref(a, r.dims), cuts)]
    return [r]


def _cut(p: Program, ax: Axes, r: Ref, cuts: Cuts) -> Ref | None:
    """The slice of `r` that `cuts` says, so that it runs over the result's axes."""
    for axis, (start, limit, kept) in reversed(cuts.items()):
        r = ax.resolve(r)
        if ax.flat((axis,)) != (axis,):  # a view regrouped the axis that was cut
            if set(ax.flat((axis,))) & set(ax.of(r)):
                return None
            continue
        if axis not in ax.of(r):
            continue
        if (axis,) not in r.dims:
            flat = ax.of(r)
            r = Ref(p.exprs.reshape(r.expr, tuple(ax.size[a] for a in flat)), tuple((a,) for a in flat))
        at = r.dims.index((axis,))
        lo = tuple(start if i == at else 0 for i in range(len(r.dims)))
        hi = tuple(limit if i == at else n for i, n in enumerate(r.expr.shape))
        e = p.exprs.slice(r.expr, lo, hi, (1,) * len(lo))
        r = Ref(e, tuple(kept if i == at else d for i, d in enumerate(r.dims)))
    return ax.resolve(r)


def _dot(ax: Axes, r: Ref) -> tuple[Ref, Ref, tuple[int, ...], Expr] | None:
    """x, w, contracted axes of a dot_general without batch axes, the weight being the operand with fewer rows."""
    e = r.expr
    if e.op != "dot_general" or e["lhs_batch"] or not e.dtype.startswith(("float", "bfloat")):
        return None
    x, w, contracted = ax.dot(r)
    if not contracted:
        return None
    if len(ax.strip(w).expr.shape) != 2 and len(ax.strip(x).expr.shape) == 2:
        x, w = w, x
    xs, ws = ax.strip(x), ax.strip(w)
    # A cast of the weight stays outside the kernel only if x is not cast alike.
    if xs.expr.dtype != ws.expr.dtype:
        xs, ws = ax.strip(x, casts=False), ax.strip(w, casts=False)
    return xs, ws, contracted, e


def find(p: Program) -> Iterator[Match | NearMiss]:
    """Gated units first; a projection that one takes is not offered as linear_act again."""
    taken: set[int] = set()
    matches: list[Match] = []
    for e in list(p.exprs_with("mul", "div")):
        match = _glu(p, e)
        if match is not None:
            matches.append(match)
            taken.update(id(d) for d in match.inner)
        elif any(_batched(_behind(a)) for a in e.args):
            ax = Axes()
            for _, source, up in _factored(p, ax, ax.root(e)):
                gate, other = _behind(source.expr), _behind(up.expr)
                if _batched(gate) and _batched(other) and gate is not other:
                    yield NearMiss("glu", e.origins[0], BATCHED, p.source(e))
                    break
    yield from matches
    for e in list(p.exprs_with("dot_general")):
        if id(e) not in taken:
            match = _linear_act(p, e)
            if match is not None:
                yield match


def _batched(e: Expr) -> bool:
    """Whether `e` is a product with batch axes."""
    return e.op == "dot_general" and bool(e["lhs_batch"])


def _elementwise_after(p: Program, e: Expr, limit: int = 24) -> list[Expr]:
    """Elementwise results and views made from `e` alone or with scalars, in the order of execution."""
    out: list[Expr] = []
    at = [e]
    while at and len(out) < limit:
        u = at.pop(0)
        for n in p.users(u):
            if (n.op in ELEMENTWISE or n.op in TRANSPARENT) and n not in out and n.op != "stop_gradient":
                out.append(n)
                at.append(n)
    return sorted(out, key=lambda u: u.origins[-1] if u.origins else -1)


def _activated(p: Program, e: Expr) -> tuple[str, Expr] | None:
    """(activation, its argument) where `e` is an activation of something: the farthest source that fits."""
    if id(e) not in p.activated:
        p.activated[id(e)] = _find_activation(p, e) if e.op in ELEMENTWISE and _nonlinear(e) else None
    return p.activated[id(e)]


def _find_activation(p: Program, e: Expr) -> tuple[str, Expr] | None:
    seen: set[int] = set()
    level = [e]
    candidates: list[Expr] = []
    for _ in range(12):
        nxt = []
        for a in level:
            for s in a.args:
                if id(s) in seen or s.op == "full" or s.shape != e.shape:
                    continue
                seen.add(id(s))
                candidates.append(s)
                if s.op in ELEMENTWISE:
                    nxt.append(s)
        level = nxt
        if not level:
            break
    for s in reversed(candidates):
        name = activation(s, e, p.exprs)
        if name is not None and name != "identity":
            # a cast between belongs to neither: take the source before an upcast
            return name, s
    return None


def _nonlinear(e: Expr, depth: int = 0) -> bool:
    if e.op in ("exp", "tanh", "erf", "erfc", "logistic", "max", "log1p", "square", "pow", "integer_pow"):
        return True
    if e.op in ("gt", "ge", "lt", "le", "expm1", "abs", "min", "clamp"):
        return True
    return depth < 12 and e.op in ELEMENTWISE and any(_nonlinear(a, depth + 1) for a in e.args)


def _projection_arrays(
    p: Program, ax: Axes, pr: Projection, rows: tuple[int, ...], names: tuple[str, str]
) -> dict[str, Expr] | None:
    w = ax.arrange(pr.w, (pr.contracted, pr.columns), p.exprs)
    if w is None:
        return None
    out = {names[0]: w}
    if pr.b is not None:
        b = ax.arrange(pr.b, (pr.columns,), p.exprs)
        if b is None:
            return None
        out[names[1]] = b
    return out


def _rows(ax: Axes, ref: Ref, columns: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The leading dimensions of the result, each a tuple of axes, columns left out."""
    out = []
    for d in ax.resolve(ref).dims:
        kept = tuple(a for a in d if a not in columns)
        if kept:
            out.append(kept)
    return tuple(out)


def _linear_act(p: Program, dot: Expr) -> Match | None:
    for e in reversed(_elementwise_after(p, dot)):
        got = _activated(p, e)
        if got is None:
            continue
        name, source = got
        ax = Axes()
        out = ax.root(e)
        pr = projection(p, ax, Ref(source, out.dims))
        if pr is None or pr.dot is not dot:
            continue
        return _build(p, ax, out, e, "linear_act", [(pr, ("w", "b"))], name, (dot, source))
    return None


def _glu(p: Program, e: Expr) -> Match | None:
    ax = Axes()
    out = ax.root(e)
    for name, source, up in itertools.chain(_factored(p, ax, out), _mingled(p, ax, out)):
        a = projection(p, ax, source)
        b = projection(p, ax, up)
        if a is None or b is None or a.dot is b.dot and a.w.expr is b.w.expr:
            continue
        if not ax.same(a.x, b.x) and not _same_rows(ax, a, b):
            continue
        if a.columns != b.columns and ax.extent(a.columns) != ax.extent(b.columns):
            continue
        inner = (a.dot, b.dot, source.expr)
        match = _build(p, ax, out, e, "glu", [(a, ("w_gate", "b_gate")), (b, ("w_up", "b_up"))], name, inner)
        if match is not None:
            return match
    return None


def _factored(p: Program, ax: Axes, out: Ref) -> Iterator[tuple[str, Ref, Ref]]:
    """(activation, its argument, the other factor) for a product of an activation with something else."""
    if out.expr.op != "mul":
        return
    sides = [ax.strip(Ref(a, out.dims)) for a in out.expr.args]
    for gated, up in (sides, sides[::-1]):
        got = _activated(p, gated.expr)
        if got is not None:
            yield got[0], Ref(got[1], gated.dims), up


def _mingled(p: Program, ax: Axes, out: Ref) -> Iterator[tuple[str, Ref, Ref]]:
    """The same where the factors of the activation and the other one stand in any order: a * up * sigmoid(a)."""
    e = out.expr
    todo, seen, sources = [e], set(), []
    while todo:
        s = todo.pop()
        if id(s) in seen or s.op == "full":
            continue
        seen.add(id(s))
        if s.op in ELEMENTWISE and s.shape == e.shape and not _biased_product(s):
            todo.extend(s.args)
        else:
            sources.append(s)
        if len(seen) > 40 or len(sources) > 2:
            return
    if len(sources) != 2 or not all(_behind(s).op in ("dot_general", "slice") or _biased_product(s) for s in sources):
        return
    for a, b in (sources, sources[::-1]):
        name = gate(a, b, e, p.exprs)
        if name is not None and name != "identity":
            yield name, Ref(a, out.dims), Ref(b, out.dims)


def _behind(e: Expr) -> Expr:
    while e.op in TRANSPARENT:
        e = e.args[0]
    return e


def _biased_product(e: Expr) -> bool:
    """x w + b, the bias being smaller than the product."""
    e = _behind(e)
    if e.op != "add":
        return False
    ops = [_behind(a) for a in e.args]
    return any(a.op == "dot_general" and math.prod(b.shape) < math.prod(e.shape) for a, b in (ops, ops[::-1]))


def _same_rows(ax: Axes, a: Projection, b: Projection) -> bool:
    """Whether both project the same x: equal but for the contracted axes, which are fresh in each."""
    x, y = ax.resolve(a.x), ax.resolve(b.x)
    if x.expr is not y.expr:
        return False
    to = dict(zip(b.contracted, a.contracted, strict=False))
    return all(tuple(to.get(i, i) for i in e) == d for d, e in zip(x.dims, y.dims, strict=True))


def _build(
    p: Program, ax: Axes, out: Ref, e: Expr, op: str, parts: list[tuple[Projection, tuple[str, str]]], name: str, inner: tuple[Expr, ...]
) -> Match | None:
    first = parts[0][0]
    rows = _rows(ax, out, first.columns)
    x = ax.arrange(first.x, (*rows, first.contracted), p.exprs)
    if x is None:
        return None
    arrays = {"x": x}
    for pr, names in parts:
        made = _projection_arrays(p, ax, pr, (), names)
        if made is None:
            return None
        arrays |= made
    shape = (*x.shape[:-1], ax.extent(first.columns))
    leaf = p.exprs.out(0, Spec(shape, e.dtype))
    result = ax.arrange(Ref(leaf, (*rows, first.columns)), ax.resolve(out).dims, p.exprs)
    if result is None:
        return None
    params = {"activation": name, "out_dtype": e.dtype}
    return Match(op, arrays, params, p.result(e, result), inner, p.source(parts[0][0].dot))


__all__ = ["Projection", "find", "projection"]
