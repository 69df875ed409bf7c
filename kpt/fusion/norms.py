"""rms_norm: x rsqrt(mean(x^2) + eps) w.  layer_norm: (x - mean) rsqrt(var + eps) w + b."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from fractions import Fraction

from kpt.fusion.formula import factors, mean, scalar, terms
from kpt.fusion.program import Match, NearMiss, Program, Refuse
from kpt.fusion.view import TRANSPARENT, Axes, Dims, Ref
from kpt.graph.expr import Expr, numpy_dtype
from kpt.ops.base import Spec

_HALF = Fraction(-1, 2)
_STEPS = TRANSPARENT | {"mul", "add", "sub", "div", "sqrt", "pow", "neg"}


def find(p: Program) -> Iterator[Match | NearMiss]:
    done: set[int] = set()
    for root in list(p.exprs_with("rsqrt", "sqrt", "pow")):
        if root.op == "pow" and root["y"] not in (-0.5, 0.5) or id(root) in done:
            continue
        done.add(id(root))
        try:
            if not _is_statistic(p, root):
                continue
        except Refuse as refusal:
            yield NearMiss("rms_norm", root.origins[0], str(refusal), p.source(root))
            continue
        refusals: list[str] = []
        taken: set[int] = set()
        shared: set[int] = set()
        unsafe: Match | None = None
        for match in _readings(p, root, refusals):  # one statistic may serve several norms, each with its own weight
            nodes = {id(n) for n in p.consumed(match)}
            if nodes & (taken | shared):
                continue
            if p.unsafe(match) is not None:
                unsafe = unsafe or match
                if not any(p.node_of[v].op == "convert" for v in match.results):  # before a cast there may be a norm that is safe
                    shared |= nodes
                continue
            taken |= nodes
            fused = _with_residual(p, match)
            if fused is not None:
                yield fused
            yield match
        if not taken and unsafe is not None:
            yield unsafe
        elif not taken:
            why = refusals[-1] if refusals else "what follows the root mean square is not x times it"
            yield NearMiss("rms_norm", root.origins[0], why, p.source(root))


def _with_residual(p: Program, match: Match) -> Match | None:
    """The norm together with the sum h = x + residual before it, where h is also used later (else the sum is read once)."""
    h = match.arrays["x"]
    if h.op != "add" or not h.origins or any(a.op in TRANSPARENT or not a.origins or a.spec != h.spec for a in h.args):
        return None
    mine, same = {id(n) for n in p.consumed(match)}, set(h.origins)  # a cast to its own dtype is no use of it
    users = [n for v in h.origins for n in p.readers(v) if id(n) not in mine and not same.issuperset(n.outputs)]
    if not users and not set(h.origins) & set(p.graph.outputs):
        return None
    a, b = h.args
    if a is b:
        return None
    arrays = {**match.arrays, "x": a, "residual": b}
    return dataclasses.replace(match, arrays=arrays, results={**match.results, **p.result(h, p.exprs.out(1, h.spec))})


def _readings(p: Program, root: Expr, refusals: list[str]) -> Iterator[Match]:
    """The norms that `root` is the root of, the one that takes most first: with a cast behind it, with a bias, without."""
    for e in reversed(_downstream(p, root)):
        if e.op in ("reshape", "transpose", "broadcast") or e.op == "convert" and _widens(e):
            continue  # a view of the result; what it views is the result
        try:
            match = _match(p, e, root)
        except Refuse as refusal:
            refusals.append(str(refusal))
            continue
        if match is not None:
            yield match


def _widens(e: Expr) -> bool:
    a, b = e.args[0].dtype, e.dtype
    return all(d.startswith(("float", "bfloat")) for d in (a, b)) and numpy_dtype(a).itemsize < numpy_dtype(b).itemsize


def _downstream(p: Program, root: Expr, limit: int = 48) -> list[Expr]:
    """What is made from `root` by products, sums and views, nearest first."""
    out: list[Expr] = []
    at = [root]
    while at and len(out) < limit:
        e = at.pop(0)
        for u in p.users(e):
            if u.op in _STEPS and u not in out:
                out.append(u)
                at.append(u)
    return out


def _statistic(ax: Axes, root: Ref) -> tuple[float, Ref, str, tuple[int, ...]] | None:
    """(eps, x, "rms" | "layer", axis) where `root` is rsqrt or sqrt of mean square + eps or variance + eps."""
    inner = Ref(root.expr.args[0], root.dims)
    eps, parts = terms(ax, inner, lambda r: r.expr.op in ("max", "reduce_sum"))
    if len(parts) == 1:
        c, r = parts[0]
        if r.expr.op == "max":  # max(var, 0) against rounding
            a, b = (Ref(v, r.dims) for v in r.expr.args)
            r = a if scalar(ax.strip(b)) == 0 else b if scalar(ax.strip(a)) == 0 else r
            e0, parts = terms(ax, r, lambda q: q.expr.op == "reduce_sum")
            if e0:
                return None
            parts = [(c * k, q) for k, q in parts]
    got = []
    for c, r in parts:
        n = _mean_of(ax, c, r)
        if n is None:
            return None
        got.append(n)
    if len(got) == 1 and got[0][0] == 1:
        _, m, axis = got[0]
        base = _square_of(ax, m)
        if base is None:
            return None
        centred = _centred(ax, base, axis)
        return (eps, base, "rms", axis) if centred is None else (eps, centred, "layer", axis)
    return None


def _mean_of(ax: Axes, c: float, r: Ref) -> tuple[float, Ref, tuple[int, ...]] | None:
    if r.expr.op != "reduce_sum":
        return None
    inner, fresh = ax.reduced(r)
    if abs(c * math.prod(ax.extent(f) for f in fresh) - 1.0) > 1e-5:
        return None
    if len(fresh) != 1:
        raise Refuse("the norm runs over two axes; the kernels normalise the last axis of a matrix")
    return 1.0, ax.strip(inner), fresh[0]


def _square_of(ax: Axes, r: Ref) -> Ref | None:
    if r.expr.op == "square":
        return ax.strip(Ref(r.expr.args[0], r.dims))
    if r.expr.op == "mul":
        a, b = (ax.strip(Ref(v, r.dims)) for v in r.expr.args)
        return a if ax.same(a, b) else None
    return None


def _centred(ax: Axes, r: Ref, axis: tuple[int, ...]) -> Ref | None:
    """x where `r` is x - mean(x) over `axis`."""
    if r.expr.op != "sub":
        return None
    x, m = (ax.strip(Ref(v, r.dims)) for v in r.expr.args)
    got = mean(ax, m)
    if got is None:
        return None
    inner, over = got
    # The mean's own axis is a fresh one; everything else must run as x does.
    here, there = ax.resolve(x), ax.resolve(inner)
    if here.expr is not there.expr:
        return None
    return x if _renamed(there.dims, ax.flat(over), ax.flat(axis)) == here.dims else None


def _renamed(dims: Dims, old: tuple[int, ...], new: tuple[int, ...]) -> Dims:
    """`dims` with the axes `old` called `new`. They may be a part of a dimension: a norm over each head of a projection."""

    def one(d: tuple[int, ...]) -> tuple[int, ...]:
        at = next((i for i in range(len(d) - len(old) + 1) if d[i : i + len(old)] == old), None) if old else None
        return d if at is None else d[:at] + new + d[at + len(old) :]

    return tuple(map(one, dims))


def _is_statistic(p: Program, root: Expr) -> bool:
    ax = Axes()
    r = ax.root(root)
    return _statistic(ax, r) is not None or _fast_variance(ax, r) is not None


def _fast_variance(ax: Axes, root: Ref) -> tuple[float, Ref, str, tuple[int, ...]] | None:
    """var = mean(x^2) - mean(x)^2, perhaps clipped at 0."""
    eps, parts = terms(ax, Ref(root.expr.args[0], root.dims), lambda r: r.expr.op in ("max", "square"))
    if len(parts) == 1 and parts[0][0] == 1 and parts[0][1].expr.op == "max":
        r = parts[0][1]
        a, b = (Ref(v, r.dims) for v in r.expr.args)
        r = a if scalar(ax.strip(b)) == 0 else b if scalar(ax.strip(a)) == 0 else r
        e0, parts = terms(ax, r, lambda q: q.expr.op in ("square", "reduce_sum"))
        if e0:
            return None
    plus = [(c, r) for c, r in parts if c > 0]
    minus = [(c, r) for c, r in parts if c < 0]
    if len(plus) != 1 or len(minus) != 1 or minus[0][0] != -1:
        return None
    second = _mean_of(ax, *plus[0])
    m = _square_of(ax, minus[0][1])
    first = None if m is None else mean(ax, m)
    if second is None or first is None:
        return None
    x = _square_of(ax, second[1])
    if x is None:
        return None
    a, b = ax.resolve(x), ax.resolve(first[0])
    same = a.expr is b.expr and _renamed(b.dims, ax.flat(first[1]), ax.flat(second[2])) == a.dims
    return (eps, x, "layer", second[2]) if same else None


def _match(p: Program, e: Expr, root: Expr) -> Match | None:
    ax = Axes()
    out = ax.root(e)
    is_root = lambda r: r.expr is root  # noqa: E731
    const, parts = terms(ax, out, lambda r: r.expr.op in ("mul", "div") and _holds(r.expr, root))
    if const:
        return None
    main = [(c, r) for c, r in parts if _holds(r.expr, root)]
    rest = [(c, r) for c, r in parts if not _holds(r.expr, root)]
    if len(main) == 2 and main[0][0] < 0:
        main.reverse()
    if len(rest) > 1 or not (len(main) == 1 or len(main) == 2 and main[0][0] == -main[1][0]):
        return None
    scale, product = main[0]
    # First find the statistic, to know x; then read the product again without opening x.
    _, fs = factors(ax, product, is_root)
    at = [(f, r) for f, r in fs if r.expr is root]
    if len(at) != 1:
        loose = [r for f, r in fs if f == -1 and r.expr.op == "add" and _holds(r.expr, root)]
        if loose:
            raise Refuse("epsilon is added outside the root: x / (sqrt(mean) + eps) is another function")
        return None
    power = at[0][0] * (Fraction(1) if root.op == "rsqrt" else Fraction(root["y"] if root.op == "pow" else Fraction(1, 2)) / _HALF)
    if power != 1:
        return None
    stat = _statistic(ax, at[0][1]) or _fast_variance(ax, at[0][1])
    if stat is None:
        return None
    eps, x, kind, axis = stat
    axis = ax.flat(axis)
    x = ax.resolve(x)

    def is_x(r: Ref) -> bool:
        return r.expr is x.expr or r.expr is root or (kind == "layer" and r.expr.op == "sub")

    c, fs = factors(ax, product, is_x)
    hits = [(f, r) for f, r in fs if r.expr is not root]
    apart = len(main) == 2  # x s - mean s
    numer = [r for f, r in hits if f == 1 and _numerator(ax, r, x, "rms" if apart else kind)]
    if len(numer) != 1 or apart and kind != "layer":
        return None
    numer_ref = numer[0]
    own_axis = _norm_axis(ax, numer_ref, x, axis, "rms" if apart else kind)
    if own_axis is None:
        return None
    weights = [(f, r) for f, r in hits if r is not numer_ref]
    if apart and not _same_but_mean(ax, main[1][1], numer_ref, own_axis, c, [(f, r) for f, r in fs if r is not numer_ref]):
        return None
    arrays: dict[str, Expr] = {}
    xs = p.exprs
    params: dict = {"eps": eps, "out_dtype": e.dtype}
    if weights:
        if len(weights) != 1 or weights[0][0] != 1:
            return None
        w = weights[0][1]
        k, inner = terms(ax, w, lambda r: bool(r.expr.origins) and r.expr.op != "add")
        if k and kind == "rms" and len(inner) == 1 and inner[0][0] == 1:
            w, params["weight_offset"] = inner[0][1], k
        weight = ax.arrange(ax.strip(w), (own_axis,), xs, fill=False)
        if weight is None or weight.shape != (ax.extent(own_axis),):
            return None
        arrays["weight"] = weight
    if c * scale != 1.0:
        return None
    if rest:
        if kind != "layer" or rest[0][0] != 1:
            return None
        bias = ax.arrange(ax.strip(rest[0][1]), (own_axis,), xs, fill=False)
        if bias is None or bias.shape != (ax.extent(own_axis),):
            return None
        arrays["bias"] = bias
    base = _source(ax, numer_ref, x, "rms" if apart else kind)
    lead = tuple(d for d in ax.resolve(out).dims if d != own_axis)
    if any(set(d) & set(own_axis) for d in lead):
        return None
    target = (*lead, own_axis)
    arranged = ax.arrange(base, target, xs)
    if arranged is None:
        return None
    if "int" in arranged.dtype:
        raise Refuse("integer input; cast it to a float dtype first")
    arrays["x"] = arranged
    leaf = xs.out(0, Spec(arranged.shape, e.dtype))
    result = ax.arrange(Ref(leaf, target), ax.resolve(out).dims, xs)
    if result is None:
        return None
    # Every row gives its one result; a result that is narrower than x (sliced) is another thing.
    inner_values = (root,)
    return Match(f"{kind}_norm", arrays, params, p.result(e, result), inner_values, p.source(root))


def _same_but_mean(ax: Axes, product: Ref, x: Ref, axis: tuple[int, ...], c: float, others: list[tuple[Fraction, Ref]]) -> bool:
    """Whether `product` is c * mean(x over `axis`) * others."""
    x = ax.resolve(x)
    k, fs = factors(ax, product, lambda r: any(r.expr is o.expr for _, o in others) or r.expr.op == "reduce_sum")
    left = list(fs)
    for f, o in others:
        hit = next((i for i, (g, r) in enumerate(left) if g == f and ax.same(r, o)), None)
        if hit is None:
            return False
        left.pop(hit)
    if len(left) != 1 or left[0][0] != 1 or left[0][1].expr.op != "reduce_sum":
        return False
    inner, fresh = ax.reduced(left[0][1])
    if len(fresh) != 1 or abs(k * ax.extent(fresh[0]) - c) > 1e-6 * abs(c):
        return False
    inner = ax.strip(inner)
    return inner.expr is x.expr and _renamed(inner.dims, ax.flat(fresh[0]), axis) == x.dims


def _holds(e: Expr, target: Expr, depth: int = 0) -> bool:
    """Whether `target` is reached from `e` through products, sums and views."""
    if e is target:
        return True
    return depth < 10 and e.op in _STEPS and any(_holds(a, target, depth + 1) for a in e.args)


def _numerator(ax: Axes, r: Ref, x: Ref, kind: str) -> bool:
    if kind == "rms":
        return r.expr is x.expr
    return r.expr.op == "sub" and ax.strip(Ref(r.expr.args[0], r.dims)).expr is x.expr


def _source(ax: Axes, r: Ref, x: Ref, kind: str) -> Ref:
    return ax.resolve(r) if kind == "rms" else ax.strip(Ref(r.expr.args[0], r.dims))


def _counterpart(mine: Dims, theirs: Dims, axis: tuple[int, ...]) -> tuple[int, ...] | None:
    """What `axis` of `theirs` is in `mine`, which are alike but for it. It may be several dimensions that a view made one of."""
    if any(len(a) != len(b) for a, b in zip(mine, theirs, strict=True)):
        return None
    other = {y: x for a, b in zip(mine, theirs, strict=True) for x, y in zip(a, b, strict=True) if x != y}
    return tuple(other[a] for a in axis) if set(other) == set(axis) else None


def _norm_axis(ax: Axes, r: Ref, x: Ref, axis: tuple[int, ...], kind: str) -> tuple[int, ...] | None:
    """The axis of the result over which the statistic was taken; every other axis must agree."""
    mine = ax.resolve(_source(ax, r, x, kind))
    theirs = ax.resolve(x)
    if mine.expr is not theirs.expr:
        return None
    own = _counterpart(mine.dims, theirs.dims, axis)
    if own is not None and ax.extent(own) == ax.extent(axis):
        return own if kind == "rms" or _centred(ax, r, own) is not None else None
    own = None
    for a, b in zip(mine.dims, theirs.dims, strict=True):
        if b == axis:
            own = a
        elif a != b:
            before = next((i for i in range(len(b)) if b[i : i + len(axis)] == axis), len(b))
            own = a[before : len(a) - len(b) + before + len(axis)]
            if _renamed((b,), axis, own) != (a,) or ax.extent(own) != ax.extent(axis):
                return None
    if own is None or _renamed(theirs.dims, axis, own) != mine.dims:
        return None
    if kind == "layer":
        return own if _centred(ax, r, own) is not None else None
    return own


__all__ = ["find"]
