"""rope: x cos + rotate(x) sin, halves or interleaved pairs, whole or split into the two halves."""

from __future__ import annotations

from collections.abc import Iterator

from kpt.fusion.formula import args, terms
from kpt.fusion.mask import narrow
from kpt.fusion.program import Match, NearMiss, Program
from kpt.fusion.view import Axes, Ref
from kpt.graph.expr import Expr
from kpt.ops.base import Spec


def find(p: Program) -> Iterator[Match | NearMiss]:
    for e in list(p.exprs_with("add")):
        match = _whole(p, e)
        if match is not None:
            yield match
    for e in list(p.exprs_with("concatenate")):
        match = _halves(p, e)
        if match is not None:
            yield match


def _half(e: Expr, axis: int) -> tuple[Expr, str] | None:
    """(source, "first" | "second" | "even" | "odd") where `e` is that half of source along `axis`."""
    if e.op != "slice":
        return None
    src = e.args[0]
    n = src.shape[axis]
    for d, (a, b, s) in enumerate(zip(e["start"], e["limit"], e["stride"], strict=True)):
        if d != axis and (a, b, s) != (0, src.shape[d], 1):
            return None
    a, b, s = e["start"][axis], e["limit"][axis], e["stride"][axis]
    if n % 2:
        return None
    if s == 1:
        which = {(0, n // 2): "first", (n // 2, n): "second"}.get((a, b))
    elif s == 2 and b >= n - 1:
        which = {0: "even", 1: "odd"}.get(a)
    else:
        which = None
    return (src, which) if which else None


def _rotated(e: Expr) -> tuple[Expr, int] | None:
    """(x, axis) where `e` is concat(-second half of x, first half of x)."""
    if e.op != "concatenate" or len(e.args) != 2:
        return None
    axis = e["axis"]
    a, b = e.args
    if a.op != "neg":
        return None
    second, first = _half(a.args[0], axis), _half(b, axis)
    if second is None or first is None or second[0] is not first[0] or (second[1], first[1]) != ("second", "first"):
        return None
    return first[0], axis


def _rotated_pairs(ax: Axes, r: Ref) -> tuple[Ref, tuple[int, ...]] | None:
    """x where `r` is stack(-odd, even, -1) flattened: every pair (a, b) of x as (-b, a)."""
    e = r.expr
    if e.op != "concatenate" or len(e.args) != 2:
        return None
    axis = e["axis"]
    if any(a.shape[axis] != 1 for a in e.args):
        return None
    sides = []
    for a in e.args:
        sides.append(ax.strip(Ref(a, tuple(() if i == axis else d for i, d in enumerate(r.dims)))))
    neg, pos = sides
    if neg.expr.op != "neg":
        return None
    odd = ax.strip(Ref(neg.expr.args[0], neg.dims))
    got = [_member(ax, s) for s in (odd, pos)]
    if None in got:
        return None
    (x1, i1, d1), (x0, i0, d0) = got  # type: ignore[misc]
    if x1 is not x0 or (i1, i0) != (1, 0) or d0 != d1:
        return None
    return Ref(x0, d0), ()


def _member(ax: Axes, r: Ref) -> tuple[Expr, int, tuple] | None:
    """(pairs, index, dims) where `r` is pairs[..., index] of a last dimension of size 2, or a strided slice."""
    e = r.expr
    if e.op != "slice":
        return None
    src = e.args[0]
    differ = [i for i, (a, b) in enumerate(zip(src.shape, e.shape, strict=True)) if a != b]
    if len(differ) != 1:
        return None
    (d,) = differ
    if src.shape[d] == 2 and e.shape[d] == 1:
        return src, e["start"][d], tuple(r.dims)
    if e["stride"][d] == 2 and src.shape[d] == 2 * e.shape[d]:
        return src, e["start"][d], tuple(r.dims)
    return None


def _whole(p: Program, e: Expr) -> Match | None:
    ax = Axes()
    out = ax.root(e)
    const, parts = terms(ax, out, lambda r: r.expr.op == "mul")
    if const or len(parts) != 2 or any(c != 1 for c, _ in parts) or any(r.expr.op != "mul" for _, r in parts):
        return None
    sides = [[_uncast(a) for a in args(r)] for _, r in parts]
    for plain, turned in (sides, sides[::-1]):
        for rot, sin in (turned, turned[::-1]):
            half = _rotated(rot.expr)
            if half is None:
                continue
            src, axis = half
            for x, cos in (plain, plain[::-1]):
                if x.expr is _uncast(Ref(src, x.dims)).expr and ax.resolve(x).dims == ax.resolve(rot).dims:
                    return _build(p, ax, e, out, x, ax.strip(cos), ax.strip(sin), axis, False)
    return None


def _uncast(r: Ref) -> Ref:
    while r.expr.op == "convert" and r.expr.args[0].dtype.startswith(("float", "bfloat")):
        r = Ref(r.expr.args[0], r.dims)
    return r


def _halves(p: Program, e: Expr) -> Match | None:
    """concat(x1 cos - x2 sin, x2 cos + x1 sin)."""
    if len(e.args) != 2 or e.args[0].shape != e.args[1].shape:
        return None
    axis = e["axis"]
    ax = Axes()
    out = ax.root(e)
    half_axis = ax.new(e.args[0].shape[axis])
    dims = tuple(half_axis if i == axis else d for i, d in enumerate(out.dims))
    got = []
    for a in e.args:
        const, parts = terms(ax, Ref(a, dims), lambda r: r.expr.op == "mul")
        if const or len(parts) != 2 or any(r.expr.op != "mul" for _, r in parts):
            return None
        row = {}
        for c, r in parts:
            for x, factor in (args(r), args(r)[::-1]):
                sx = ax.strip(x)
                half = _half(sx.expr, axis) if len(sx.expr.shape) == len(e.shape) else None
                if half is not None and half[1] in ("first", "second") and ax.resolve(sx).dims == tuple(map(ax.flat, dims)):
                    row[half[1]] = (c, half[0], ax.strip(factor))
                    break
        if set(row) != {"first", "second"}:
            return None
        got.append(row)
    top, bottom = got
    src = top["first"][1]
    if any(r[k][1] is not src for r in got for k in r):
        return None
    if (top["first"][0], top["second"][0], bottom["second"][0], bottom["first"][0]) != (1, -1, 1, 1):
        return None
    cos, sin = top["first"][2], top["second"][2]
    if not (ax.same(cos, bottom["second"][2]) and ax.same(sin, bottom["first"][2])):
        return None
    return _build(p, ax, e, out, Ref(src, out.dims), cos, sin, axis, False, half=half_axis)


def _build(
    p: Program, ax: Axes, e: Expr, out: Ref, x: Ref, cos: Ref, sin: Ref, axis: int, interleaved: bool, half: tuple[int, ...] = ()
) -> Match | None:
    xs = p.exprs
    rot = ax.flat(ax.resolve(out).dims[axis])
    tables = []
    for t in (cos, sin):
        t = narrow(p, ax, t)
        tables.append(t)
    over = [a for a in ax.of(out) if any(a in ax.of(t) for t in tables) and a not in rot]
    others = [a for a in ax.of(out) if a not in over and a not in rot]
    # Positions are the axes that the tables run over; a table that also runs over the batch keeps it.
    dims = [d for d in ax.resolve(out).dims if d and d != rot]
    with_table = [d for d in dims if set(d) <= set(over)]
    plain = [d for d in dims if not set(d) & set(over)]
    if len(with_table) + len(plain) != len(dims) or len(with_table) > 2:
        return None
    seq = with_table[-1] if with_table else ()
    table_batch = with_table[0] if len(with_table) == 2 else ()
    batch = table_batch if table_batch else (plain[0] if len(plain) > 1 else ())
    heads = tuple(a for d in plain if d is not batch and d != batch for a in d)
    target = (batch, seq, heads, rot)
    arrays: dict[str, Expr] = {}
    got = ax.arrange(ax.resolve(x), target, xs)
    if got is None:
        return None
    arrays["x"] = got
    for name, t in zip(("cos", "sin"), tables, strict=True):
        last = half or rot
        small = ax.arrange(t, (table_batch, seq, last), xs)
        if small is None:
            return None
        if half:
            shape = (*small.shape[:-1], 2 * small.shape[-1])
            small = xs.make("concatenate", (small, small), (("axis", 2),), shape, small.dtype)
        if not p.grounded(small):
            return None
        arrays[name] = small
    leaf = xs.out(0, Spec(got.shape, e.dtype))
    result = ax.arrange(Ref(leaf, target), ax.resolve(out).dims, xs)
    if result is None or others is None:
        return None
    params = {"interleaved": interleaved, "out_dtype": e.dtype}
    inner = tuple(a for a in e.args)
    return Match("rope", arrays, params, p.result(e, result), inner, p.source(e))


__all__ = ["find"]
