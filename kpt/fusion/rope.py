"""rope: x cos + rotate(x) sin, halves or interleaved pairs, whole or split into the two halves."""

from __future__ import annotations

from collections.abc import Iterator

from kpt.fusion.formula import args, terms
from kpt.fusion.mask import narrow
from kpt.fusion.program import Match, NearMiss, Program, widened
from kpt.fusion.view import Axes, Ref
from kpt.graph.expr import Expr
from kpt.ops.base import Spec


def find(p: Program) -> Iterator[Match | NearMiss]:
    for e in list(p.exprs_with("add")):
        match = _whole(p, e)
        if match is not None:
            yield match
    for e in list(p.exprs_with("concatenate")):
        match = _interleaved(p, e) or _halves(p, e)
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


def _pairs(ax: Axes, r: Ref) -> tuple[Ref, Ref, tuple[int, ...], tuple[int, ...]] | None:
    """(first, second, pair axis, rotated dimension) where `r` interleaves two arrays: stack([first, second], -1), flattened.

    The members run over the axes of `r` without the pair axis.
    """
    e = r.expr
    if e.op != "concatenate" or len(e.args) != 2 or any(a.shape[e["axis"]] != 1 for a in e.args):
        return None
    r = ax.resolve(r)
    pair = r.dims[e["axis"]]
    dims = tuple(() if i == e["axis"] else d for i, d in enumerate(r.dims))
    first, second = (ax.strip(Ref(a, dims)) for a in e.args)
    return first, second, pair, dims[e["axis"] - 1] if e["axis"] else ()


def _member(ax: Axes, r: Ref, pair: tuple[int, ...], half: tuple[int, ...]) -> tuple[Ref, int] | None:
    """(x, 0 or 1) where `r` is x[..., ::2] or x[..., 1::2], or member 0 or 1 of a last dimension of size 2."""
    e = r.expr
    if e.op != "slice":
        return None
    src = e.args[0]
    cut = [i for i, (m, n) in enumerate(zip(e.shape, src.shape, strict=True)) if m != n]
    if len(cut) != 1:
        return None
    (d,) = cut
    dims = list(r.dims)
    start, stride = e["start"][d], e["stride"][d]
    if src.shape[d] == 2 and e.shape[d] == 1:
        dims[d] = pair
    elif stride == 2 and src.shape[d] == 2 * e.shape[d] and start in (0, 1) and ax.flat(r.dims[d]) == half:
        dims[d] = half + pair
    else:
        return None
    return ax.strip(Ref(src, tuple(dims))), start


def _is_member(ax: Axes, r: Ref, index: int, x: Ref, pair: tuple[int, ...], half: tuple[int, ...]) -> bool:
    got = _member(ax, r, pair, half)
    return got is not None and got[1] == index and ax.same(got[0], x)


def _rotated_pairs(ax: Axes, r: Ref) -> tuple[Ref, tuple[int, ...]] | None:
    """(x, its rotated axes) where `r` is every pair (a, b) of x as (-b, a)."""
    got = _pairs(ax, r)
    if got is None or got[0].expr.op != "neg":
        return None
    minus, first, pair, half = got
    x = _member(ax, first, pair, half)
    second = ax.strip(args(minus)[0])
    if x is None or x[1] != 0 or not _is_member(ax, second, 1, x[0], pair, half):
        return None
    return x[0], half + pair


def _interleaved(p: Program, e: Expr) -> Match | None:
    """stack([x0 cos - x1 sin, x1 cos + x0 sin], -1)."""
    ax = Axes()
    out = ax.root(e)
    got = _pairs(ax, out)
    if got is None:
        return None
    first, second, pair, half = got
    products = []
    for r in (first, second):
        const, parts = terms(ax, r, lambda q: q.expr.op == "mul")
        if const or len(parts) != 2 or any(q.expr.op != "mul" for _, q in parts):
            return None
        row = {}
        for c, q in parts:
            for a, b in (args(q), args(q)[::-1]):
                member = _member(ax, _uncast(ax.strip(a)), pair, half)
                if member is not None and member[1] not in row:
                    row[member[1]] = (c, member[0], ax.strip(b))
                    break
        if set(row) != {0, 1}:
            return None
        products.append(row)
    top, bottom = products
    x, cos, sin = top[0][1], top[0][2], top[1][2]
    if (top[0][0], top[1][0], bottom[1][0], bottom[0][0]) != (1, -1, 1, 1):
        return None
    if not all(ax.same(row[k][1], x) for row in products for k in row):
        return None
    if not (ax.same(cos, bottom[1][2]) and ax.same(sin, bottom[0][2])):
        return None
    return _build(p, ax, e, out, x, cos, sin, half + pair, True)


def _whole(p: Program, e: Expr) -> Match | None:
    ax = Axes()
    out = ax.root(e)
    const, parts = terms(ax, out, lambda r: r.expr.op == "mul")
    if const or len(parts) != 2 or any(c != 1 for c, _ in parts) or any(r.expr.op != "mul" for _, r in parts):
        return None
    sides = [[_uncast(a) for a in args(r)] for _, r in parts]
    for plain, turned in (sides, sides[::-1]):
        for rot, sin in (turned, turned[::-1]):
            pairs = _rotated_pairs(ax, ax.strip(rot))
            half = _rotated(rot.expr)
            for x, cos in (plain, plain[::-1]):
                if pairs is not None and ax.same(ax.strip(x), pairs[0]):
                    return _build(p, ax, e, out, pairs[0], ax.strip(cos), ax.strip(sin), pairs[1], True)
                if half is None or ax.resolve(x).dims != ax.resolve(rot).dims:
                    continue
                if x.expr is _uncast(Ref(half[0], x.dims)).expr:
                    return _build(p, ax, e, out, x, ax.strip(cos), ax.strip(sin), ax.resolve(out).dims[half[1]], False)
    return None


def _uncast(r: Ref) -> Ref:
    return _uncast(Ref(r.expr.args[0], r.dims)) if widened(r.expr) else r


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
    return _build(p, ax, e, out, Ref(src, out.dims), cos, sin, out.dims[axis], False, half=half_axis)


def _build(
    p: Program, ax: Axes, e: Expr, out: Ref, x: Ref, cos: Ref, sin: Ref, rot: tuple[int, ...], interleaved: bool, half: tuple[int, ...] = ()
) -> Match | None:
    xs = p.exprs
    rot, x = ax.flat(rot), _uncast(ax.strip(x))
    tables = []
    for t in (cos, sin):
        t = narrow(p, ax, t)
        tables.append(t)
    over = [a for a in ax.of(out) if any(a in ax.of(t) for t in tables) and a not in rot]
    # Positions are the axes that the tables run over; a table that also runs over the batch keeps it.
    each = [d for d in ax.resolve(out).dims if not d or not set(d) <= set(rot)]
    dims = [d for d in (tuple(a for a in d if a not in rot) for d in each) if d]
    with_table = [d for d in dims if set(d) <= set(over)]
    plain = [d for d in dims if not set(d) & set(over)]
    if len(with_table) + len(plain) != len(dims) or len(with_table) > 2:
        return None
    seq = with_table[-1] if with_table else ()
    table_batch = with_table[0] if len(with_table) == 2 else ()
    one_head = len(plain) == 1 and plain[0] in each and () in each[each.index(plain[0]) :]  # `[B, T, 1, H]`
    batch = table_batch if table_batch else (plain[0] if len(plain) > 1 or one_head else ())
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

    def written(made: Expr, inner: tuple[Expr, ...], views: tuple[Expr, ...] = ()) -> Match | None:
        leaf = xs.out(0, Spec(got.shape, made.dtype))
        result = ax.arrange(Ref(leaf, target), ax.resolve(out).dims, xs)
        if result is None:
            return None
        for view in views:
            result = xs.reshape(result, view.shape) if view.op == "reshape" else xs.transpose(result, view["perm"])
        params = {"interleaved": interleaved, "out_dtype": made.dtype}
        return Match("rope", arrays, params, p.result(made, result), inner, p.source(e))

    views = p.viewed(e)  # pairs are flattened before they are rounded
    cast = p.rounded(views[-1] if views else e)
    match = written(cast, (*e.args, e, *views), views) if cast is not None else None
    return match if match is not None and p.unsafe(match) is None else written(e, e.args)


__all__ = ["find"]
