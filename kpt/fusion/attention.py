"""attention: softmax(mask(cap(scale * q k^T) + bias)) v, in any layout and spelling."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping

from kpt.fusion.formula import Softmax, args, factors, scalar, softmax, strip_shape, sum_of_exp, terms, unshifted, zeroed
from kpt.fusion.mask import Layout, narrow
from kpt.fusion.program import Match, NearMiss, Program, Refuse
from kpt.fusion.scores import depends_on, mask_of, reaches_dot, read_scores
from kpt.fusion.view import TRANSPARENT, Axes, Ref
from kpt.graph.expr import Expr, Exprs
from kpt.ops.base import Spec
from kpt.ops.mask import Causal, Explicit, Lengths, Mask, Segments, Window


def find(p: Program) -> Iterator[Match | NearMiss]:
    for e in list(p.exprs_with("div", "mul", "exp")):
        soft = softmax(e, p.exprs)
        try:
            if soft is None:
                late = _normalised_late(e) if e.op != "exp" else None
                if late is not None and reaches_dot(late.scores):
                    yield _match(p, late)
                elif e.op == "div" and _has_a_sink(e):
                    raise Refuse("the sum of the softmax has a term that is no key's (an attention sink); no kernel has one yet")
            elif reaches_dot(soft.scores):
                yield _match(p, _in_order(p, _values_product(p, e), e, soft))
        except Refuse as why:
            yield NearMiss("attention", e.origins[0], str(why), p.source(e))


def _has_a_sink(e: Expr) -> bool:
    """exp(scores) / (sum(exp(scores)) + something)."""
    ax = Axes()
    num, den = (ax.strip(a) for a in args(ax.root(e)))
    if num.expr.op != "exp" or den.expr.op != "add" or not reaches_dot(num.expr.args[0]):
        return False
    sums = [total for r in terms(ax, den)[1] if (total := sum_of_exp(ax, r[1])) is not None]
    return any(total[0].expr is num.expr for total in sums)


def _values_product(p: Program, soft: Expr) -> Expr:
    """The product of the probabilities with the values."""
    at = soft
    if any(u.op == "slice" for u in p.users(soft)):
        raise Refuse("the softmax has a column that is no key's and is cut off again (an attention sink); no kernel has one yet")
    for _ in range(12):
        users = p.users(at)
        dots = [u for u in users if u.op == "dot_general"]
        if dots:
            return dots[0]
        views = [u for u in users if u.op in TRANSPARENT or _only_hides(p, u, at)]
        if len(users) == 1 and views:
            at = views[0]
            continue
        if any(v in p.graph.outputs for v in at.origins) and not views:
            raise Refuse("the attention weights are returned, so they have to be computed")
        what = ", ".join(sorted({p.called(u) for u in users})) or "nothing"
        if len(users) > 1 and views:
            raise Refuse(f"the attention weights are used in more than one place ({what})")
        raise Refuse(
            f"between softmax and the values stands {what}; if that is dropout, turn it off (deterministic=True, rate 0) or drop "
            "out the output instead of the weights"
        )
    raise Refuse("no product with values follows the softmax")


def _only_hides(p: Program, e: Expr, weights: Expr) -> bool:
    """Whether `e` is the weights, or 0 where a boolean says so that no random number has made."""
    ax = Axes()
    kept = zeroed(ax, ax.root(e), p.exprs) if e.op in ("select", "mul") else None
    return kept is not None and ax.strip(kept[1]).expr is strip_shape(weights)


@dataclasses.dataclass(frozen=True)
class _Weighted:
    """The outer half of attention: `out` = weights @ values, the weights being softmax(scores) over `axis`.

    Attributes:
      out: the result, with its axes.
      weights, values: operands of the product.
      axis: the dimension of the scores that softmax runs over.
      inner: expressions that no kernel produces.
      product: the product itself.
      hides: booleans that the exponentials are put to 0 by, as a score of -inf is.
      idle: booleans that the sum or the weights are put to 0 by once more; the scores' own mask must say the same.
      zeroed: whether the weights are, so that a query that sees nothing gives 0.
    """

    ax: Axes
    out: Ref
    weights: Ref
    values: Ref
    scores: Expr
    axis: int
    inner: tuple[Expr, ...]
    product: Expr
    hides: tuple[Ref, ...] = ()
    idle: tuple[Ref, ...] = ()
    zeroed: bool = False


def _back_to(p: Program, ax: Axes, r: Ref, e: Expr) -> tuple[Ref, list[Ref]]:
    """`r` without views and without booleans that put it to 0, down to `e` if it is there; and the booleans."""
    keeps: list[Ref] = []
    r = ax.strip(r)
    while strip_shape(r.expr) is not e and (kept := zeroed(ax, r, p.exprs)) is not None:
        keeps.append(kept[0])
        r = ax.strip(kept[1])
    return r, keeps


def _in_order(p: Program, product: Expr, e: Expr, soft: Softmax) -> _Weighted:
    """softmax, then the product with the values."""
    ax = Axes()
    out = ax.root(product)
    left, right, contracted = ax.dot(out)
    values, weights, idle = right, *_back_to(p, ax, left, e)
    if strip_shape(weights.expr) is not e:
        values, weights, idle = left, *_back_to(p, ax, right, e)
    if strip_shape(weights.expr) is not e:
        raise Refuse("the way from softmax to the product with the values cannot be followed")
    key = ax.flat(weights.dims[soft.axis])
    if not key or set(key) != set(ax.flat(contracted)):
        raise Refuse("softmax runs over another axis than the one summed with the values")
    hides = tuple(Ref(b, weights.dims) for b in soft.hides)
    post = bool(idle or soft.zeroed)
    idle += [Ref(b, weights.dims) for b in (*soft.summed, *soft.zeroed)]
    inner = (*soft.inner, e)
    return _Weighted(ax, out, weights, _read(ax, values), soft.scores, soft.axis, inner, product, hides, tuple(idle), post)


def _normalised_late(e: Expr) -> _Weighted | None:
    """(exp(scores - shift) @ values) / sum(exp(scores - shift))."""
    ax = Axes()
    out = ax.root(e)
    c, parts = factors(ax, out, lambda r: r.expr.op in ("dot_general", "reduce_sum"))
    over = {float(f): r for f, r in parts}
    if c != 1.0 or len(parts) != 2 or set(over) != {1, -1} or over[1].expr.op != "dot_general":
        return None
    total = sum_of_exp(ax, over[-1])
    if total is None:
        return None
    exp, fresh = total
    left, right, contracted = ax.dot(over[1])
    for weights, values in ((left, right), (right, left)):
        weights = ax.strip(weights)
        if weights.expr is not exp.expr:
            continue
        here, there = ax.resolve(weights).dims, ax.resolve(exp).dims
        differ = [i for i, (a, b) in enumerate(zip(here, there, strict=True)) if a != b]
        if len(differ) == 1 and here[differ[0]] == ax.flat(contracted) and there[differ[0]] == ax.flat(fresh):
            scores, _ = unshifted(ax, args(weights)[0], contracted)
            if scores.dims == here:
                product = over[1].expr
                return _Weighted(ax, out, weights, _read(ax, values), scores.expr, differ[0], (exp.expr, product), product)
    return None


def _match(p: Program, found: _Weighted) -> Match:
    x, ax, out, scores = p.exprs, found.ax, found.out, found.scores
    prob, val = found.weights, found.values
    key = ax.flat(prob.dims[found.axis])
    acc, dot = read_scores(p, ax, Ref(scores, ax.resolve(prob).dims), frozenset(key), found.hides)
    if "int" in dot.expr.args[0].dtype or "int" in dot.expr.dtype:
        raise Refuse("integer queries and keys; cast them to a float dtype first")
    a, b, depth = ax.dot(dot)
    key = ax.flat(key)
    if set(key) & set(ax.of(a)) and set(key) & set(ax.of(b)):
        raise Refuse("softmax runs over a batch axis of q k^T")
    q, k = (a, b) if set(key) <= set(ax.of(b)) else (b, a)
    if not set(key) <= set(ax.of(k)):
        raise Refuse("softmax runs over another axis than the keys'")
    free = [ax.flat(d) for d in dot.dims]
    inside, q, k = _scales_inside(p, ax, q, k)
    scale = acc.scale * inside
    q, k, val = (_read(ax, r) for r in (q, k, val))
    depth, key = ax.flat(depth), ax.flat(key)
    qa, ka, va = (set(ax.of(r)) for r in (q, k, val))
    out_axes = ax.of(out)
    shared = [i for i in ax.of(q) if i in (ka | va) and i not in depth]
    only_q = [i for i in ax.of(q) if i not in ka | va and i not in depth]
    query = _query_axes(ax, only_q, free, key)
    groups = tuple(i for i in only_q if i not in query)
    if any(i not in out_axes for i in shared + only_q) or (ka - set(key) - set(depth)) - qa:
        raise Refuse("keys vary along an axis that queries lack")
    value_dim = tuple(i for i in ax.of(val) if i not in qa and i not in key)
    if set(value_dim) & ka or not set(value_dim) <= set(out_axes):
        raise Refuse("values and keys share an axis that queries lack")
    order = [i for i in ax.of(out) if i in shared] if len(q.dims) < 3 else shared
    batch = tuple(order[:1])
    kv_heads = tuple(order[1:])
    lay = Layout(batch, kv_heads + groups, query, key)

    # softmax(cap * tanh(y)): what stood above tanh is the cap, what stands below scales q k^T to y.
    params: dict = {"scale": scale * (1.0 if acc.cap is None else acc.cap), "logits_soft_cap": acc.cap}
    mask, arrays, may_be_empty = mask_of(p, ax, acc, dot.expr, lay, found.idle, zeroed=found.zeroed)
    # A cast that widens is the kernel's business; one that narrows is part of what the code reads.
    read = [_narrower(r.expr.dtype, used.args[0].dtype) for r, used in ((q, dot.expr), (k, dot.expr), (val, found.product))]
    if not all(d.startswith(("float", "bfloat")) for d in read):
        raise Refuse(f"{', '.join(dict.fromkeys(read))} operands; cast them to a float dtype first")
    dtype = _operand_dtype(p, found, read)
    for name, ref, rounded, target in (
        ("q", q, read[0], (batch, query, kv_heads + groups, depth)),
        ("k", k, read[1], (batch, key, kv_heads, depth)),
        ("v", val, read[2], (batch, key, kv_heads, value_dim)),
    ):
        arranged = ax.arrange(ref, target, x)
        if arranged is None:
            raise Refuse(f"{name} has an axis that attention does not have")
        arrays[name] = x.convert(x.convert(arranged, rounded), dtype)
    if acc.factors and dtype not in ("float32", "float64"):
        raise Refuse(f"the scores are multiplied by an array; {dtype} queries multiplied by it before would round otherwise")
    for op, factor in acc.factors:
        if depends_on(factor.expr, dot.expr):
            raise Refuse("the scores are multiplied by numbers that are made of the scores")
        each = ax.arrange(narrow(p, ax, factor), (batch, query, kv_heads + groups, ()), x, fill=False)
        if each is None:
            raise Refuse("the scores are multiplied by numbers that depend on an axis that queries lack")
        q_ = arrays["q"]
        arrays["q"] = x.apply(op, q_, x.broadcast(x.convert(each, dtype), q_.shape, (0, 1, 2, 3)))
    n = ax.extent(kv_heads + groups)
    shape = (ax.extent(batch), ax.extent(query), n, ax.extent(value_dim))

    def written(made: Expr, inner: tuple[Expr, ...]) -> Match:
        leaf = x.out(0, Spec(shape, made.dtype))
        if found.zeroed and may_be_empty:
            leaf = x.make("select", (_sees(x, mask, arrays, shape), leaf, x.full(0.0, shape, leaf.dtype)), (), shape, leaf.dtype)
        result = ax.arrange(Ref(leaf, (batch, query, kv_heads + groups, value_dim)), out.dims, x)
        if result is None:
            raise Refuse("the result has an axis that attention does not have")
        said = params | {"mask": mask, "out_dtype": made.dtype}
        return Match("attention", arrays, said, p.result(made, result), inner, p.source(found.inner[-1]))

    inner = (dot.expr, *found.inner)
    cast = p.rounded(out.expr)
    match = written(cast, (*inner, out.expr)) if cast is not None else None
    return match if match is not None and p.unsafe(match) is None else written(out.expr, inner)


def _sees(x: Exprs, mask: Mask, arrays: Mapping[str, Expr], shape: tuple[int, ...]) -> Expr:
    """Which queries see a key, [B,T,N,Hv]. The grid is elementwise and goes straight into a reduction: nothing writes it."""
    b, t, n, _ = shape
    s = arrays["k"].shape[1]
    grid = (b, n, t, s)
    i, j = (x.make("iota", (), (("dimension", d),), grid, "int32") for d in (2, 3))
    seen: list[Expr] = []

    def compare(op: str, a: Expr, c: Expr) -> None:
        seen.append(x.apply(op, a, c, dtype="bool"))

    def spread(name: str, dims: tuple[int, ...]) -> Expr:
        return x.broadcast(arrays[name], grid, dims)

    def shifted(offset: int) -> Expr:
        return x.apply("add", i, x.full(offset, grid, "int32"))

    for term in mask.terms:
        if isinstance(term, Causal):
            compare("le", j, shifted(term.offset))
        elif isinstance(term, Window):
            if term.left is not None:
                compare("ge", j, shifted(term.offset - term.left))
            if term.right is not None:
                compare("le", j, shifted(term.offset + term.right))
        elif isinstance(term, Segments):
            compare("eq", spread("q_segment_ids", (0, 2)), spread("kv_segment_ids", (0, 3)))
        elif isinstance(term, Lengths):
            compare("lt", x.convert(j, arrays["kv_lengths"].dtype), spread("kv_lengths", (0,)))
        elif isinstance(term, Explicit):
            seen.append(spread("keep", (0, 1, 2, 3)))
    total = functools.reduce(lambda a, c: x.apply("and", a, c), seen)
    some = x.make("reduce_or", (total,), (("axes", (3,)),), grid[:3], "bool")
    return x.broadcast(some, shape, (0, 2, 1))


def _operand_dtype(p: Program, found: _Weighted, read: list[str]) -> str:
    """The dtype that q, k and v go to the kernel in, wide enough for all three as they are read; wider where the code widens
    them and keeps the result wide.

    A kernel rounds its weights to the dtype of the values; where the code multiplied in float32 and goes on in
    float32, that rounding would be new.
    """
    dtype = functools.reduce(_common, read)
    wide = found.product.args[0].dtype
    if _common(wide, dtype) == dtype:
        return dtype
    ends: list[Expr] = []
    todo = [found.out.expr]
    while todo and len(ends) < 8:
        e = todo.pop()
        returned = any(v in p.graph.outputs for v in e.origins)
        for u in p.users(e):
            (todo if u.op in ("reshape", "transpose") else ends).append(u)
        if returned or not p.users(e):
            return wide
    return dtype if all(u.op == "convert" and u.dtype == dtype for u in ends) else wide


_BITS = {"bfloat16": 16, "float16": 16, "float32": 32, "float64": 64}


def _narrower(stored: str, used: str) -> str:
    return stored if _BITS.get(stored, 0) < _BITS.get(used, 0) else used


def _common(a: str, b: str) -> str:
    """The narrowest dtype that holds the numbers of both."""
    if a == b:
        return a
    return max(a, b, key=_BITS.__getitem__) if _BITS[a] != _BITS[b] else "float32"


def _scales_inside(p: Program, ax: Axes, q: Ref, k: Ref) -> tuple[float, Ref, Ref]:
    """(scale, q, k): a scalar folded into q or k taken out, where that does not round differently."""
    total = 1.0
    out = []
    for given in (q, k):
        before, r = total, ax.strip(given)
        while r.expr.op in ("mul", "div") and r.expr.dtype in ("float32", "float64"):
            b = scalar(ax.strip(Ref(r.expr.args[1], r.dims)))
            a = scalar(ax.strip(Ref(r.expr.args[0], r.dims)))
            if b is not None and (r.expr.op == "mul" or b != 0):
                total *= b if r.expr.op == "mul" else 1.0 / b
                r = ax.strip(Ref(r.expr.args[0], r.dims))
            elif a is not None and r.expr.op == "mul":
                total *= a
                r = ax.strip(Ref(r.expr.args[1], r.dims))
            else:
                break
        out.append(_read(ax, given) if total == before else r)
    return total, out[0], out[1]


def _read(ax: Axes, r: Ref) -> Ref:
    """What a product reads: without views, so that repeated heads do not reach the kernel, and without casts that widen.

    A cast that narrows is part of what is read, but for one that rounds repeated heads.
    """
    while (inner := ax.inside(r)) is not None:
        e = r.expr
        rounds = e.op == "convert" and e.origins and _narrower(e.dtype, e.args[0].dtype) != e.args[0].dtype
        if rounds and math.prod(ax.strip(r).expr.shape) == math.prod(e.shape):
            break
        r = inner
    return ax.resolve(r)


def _query_axes(ax: Axes, only_q: list[int], free: list[tuple[int, ...]], key: tuple[int, ...]) -> tuple[int, ...]:
    """Which of the axes that queries alone have are positions; the rest are head groups."""
    dims = [tuple(a for a in ax.flat(d) if a in only_q) for d in free]
    whole = [d for d in dims if d and all(a in only_q for a in d)]
    if not whole:
        return ()
    same = [d for d in whole if ax.extent(d) == ax.extent(key)]
    if same:
        return same[0]
    return max(whole, key=lambda d: ax.extent(d))
