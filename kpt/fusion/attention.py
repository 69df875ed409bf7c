"""attention: softmax(mask(cap(scale * q k^T) + bias)) v, in any layout and spelling."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping

from kpt.fusion.formula import Softmax, args, factors, scalar, softmax, strip_shape, sum_of_exp, terms, unshifted, zeroed
from kpt.fusion.mask import Layout, Reading, finish, narrow, never_empty, read_mask, tightest
from kpt.fusion.program import Match, NearMiss, Program, Refuse
from kpt.fusion.view import TRANSPARENT, Axes, Ref
from kpt.graph.evaluate import evaluate
from kpt.graph.expr import ELEMENTWISE, Expr, Exprs
from kpt.graph.normalize import boolean_behind, simplify
from kpt.ops.base import Spec
from kpt.ops.mask import Bias, Causal, Explicit, Lengths, Mask, Segments, Window

_SCORE_STEPS = {"mul", "div", "add", "sub", "select", "tanh", "neg", "stop_gradient", "max", "min", "concatenate"}
_HIDDEN = -1e4  # a score this low has weight exp(-1e4) = 0 next to any that is not hidden


def find(p: Program) -> Iterator[Match | NearMiss]:
    for e in list(p.exprs_with("div", "mul", "exp")):
        soft = softmax(e, p.exprs)
        try:
            if soft is None:
                late = _normalised_late(e) if e.op != "exp" else None
                if late is not None and _reaches_dot(late.scores):
                    yield _match(p, late)
                elif e.op == "div" and _has_a_sink(e):
                    raise Refuse("the sum of the softmax has a term that is no key's (an attention sink); no kernel has one yet")
            elif _reaches_dot(soft.scores):
                yield _match(p, _in_order(p, _values_product(p, e), e, soft))
        except Refuse as why:
            yield NearMiss("attention", e.origins[0], str(why), p.source(e))


def _has_a_sink(e: Expr) -> bool:
    """exp(scores) / (sum(exp(scores)) + something)."""
    ax = Axes()
    num, den = (ax.strip(a) for a in args(ax.root(e)))
    if num.expr.op != "exp" or den.expr.op != "add" or not _reaches_dot(num.expr.args[0]):
        return False
    sums = [total for r in terms(ax, den)[1] if (total := sum_of_exp(ax, r[1])) is not None]
    return any(total[0].expr is num.expr for total in sums)


def _reaches_dot(e: Expr, depth: int = 0) -> bool:
    """Whether the scores come from a product of two tensors that both change with the program's input."""
    if e.op == "dot_general":
        return True
    if depth > 12 or e.op not in TRANSPARENT | _SCORE_STEPS:
        return False
    return any(_reaches_dot(a, depth + 1) for a in e.args if a.op != "full")


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
        what = ", ".join(sorted({_called(p, u) for u in users})) or "nothing"
        if len(users) > 1 and views:
            raise Refuse(f"the attention weights are used in more than one place ({what})")
        raise Refuse(
            f"between softmax and the values stands {what}; if that is dropout, turn it off (deterministic=True, rate 0) or drop "
            "out the output instead of the weights"
        )
    raise Refuse("no product with values follows the softmax")


def _called(p: Program, e: Expr) -> str:
    """The op that made `e`; a value that patterns do not look into has the front end's name for it."""
    node = next((p.node_of[v] for v in e.origins if v in p.node_of), None)
    return node.op.removeprefix("opaque:").removesuffix(".default") if e.op == "value" and node is not None else e.op


def _only_hides(p: Program, e: Expr, weights: Expr) -> bool:
    """Whether `e` is the weights, or 0 where a boolean says so that no random number has made."""
    ax = Axes()
    kept = zeroed(ax, ax.root(e), p.exprs) if e.op in ("select", "mul") else None
    return kept is not None and ax.strip(kept[1]).expr is strip_shape(weights)


@dataclasses.dataclass
class _Scores:
    """What lies between softmax and q k^T, gathered from the top down."""

    scale: float = 1.0
    cap: float | None = None
    masks: list[tuple[Ref, float, bool]] = dataclasses.field(default_factory=list)  # visible, fill, additive
    biases: list[tuple[float, Ref]] = dataclasses.field(default_factory=list)
    biased_fill: bool = False  # a bias is added to hidden scores too
    factors: list[tuple[str, Ref]] = dataclasses.field(default_factory=list)  # "mul" or "div", by numbers that no key changes


class _Blocked(Refuse):
    """No way leads to the scores through this; another one may."""


def _walk(p: Program, ax: Axes, ref: Ref, key: frozenset[int], acc: _Scores) -> Ref | None:
    """Down from the softmax to the dot product, filling `acc`. None where `ref` is not on that way."""
    ref = ax.strip(ref)
    e = ref.expr
    here = set(ax.of(ref))
    if not key <= here:
        return None
    if e.op == "dot_general":
        return ref
    operands = [Ref(a, ref.dims) for a in e.args]
    if e.op in ("mul", "div"):
        b = scalar(ax.strip(operands[1]))
        if b is not None and (e.op == "mul" or b != 0):
            acc.scale *= b if e.op == "mul" else 1.0 / b
            return _walk(p, ax, operands[0], key, acc)
        a = scalar(ax.strip(operands[0]))
        if a is not None and e.op == "mul":
            acc.scale *= a
            return _walk(p, ax, operands[1], key, acc)
        found = _masked_product(p, ax, operands, key, acc) if e.op == "mul" else None
        return found or _factor(p, ax, e, operands, key, acc)
    if e.op == "neg":
        acc.scale *= -1.0
        return _walk(p, ax, operands[0], key, acc)
    if e.op == "stop_gradient" and _reaches_dot(e):
        raise _Blocked("the scores pass through stop_gradient")
    if e.op in ("max", "min") and _reaches_dot(e):
        raise _Blocked(f"the scores are clamped ({e.op}), which halves gradients where both sides are the same; no kernel does so")
    if acc.factors and e.op in ("tanh", "add", "sub", "select"):
        return None
    if e.op == "tanh":
        if acc.cap is not None:
            return None
        acc.cap, acc.scale = acc.scale, 1.0
        found = _walk(p, ax, operands[0], key, acc)
        return found
    if e.op in ("add", "sub"):
        blocked = None
        for i, other in ((0, 1), (1, 0)):
            if e.op == "sub" and i == 1:
                continue
            trial = dataclasses.replace(acc, masks=list(acc.masks), biases=list(acc.biases))
            sign = -1.0 if e.op == "sub" else 1.0
            shift = ax.strip(operands[other])
            if acc.cap is None and not set(ax.flat(tuple(key))) & set(ax.of(shift)) and all(m[2] for m in acc.masks):
                pass  # the same for every key: softmax does not depend on it
            elif acc.cap is None:
                _bias(p, ax, operands[other], sign * acc.scale, trial)
            try:
                found = _walk(p, ax, operands[i], key, trial)
            except _Blocked as why:  # it may be the bias that is made so
                blocked = blocked or why
                continue
            if found is not None:
                if acc.cap is not None:
                    raise Refuse("a bias is added before the soft cap")
                acc.__dict__.update(trial.__dict__)
                return found
        if blocked is not None:
            raise blocked
        return None
    if e.op == "select":
        for i, other in ((1, 2), (2, 1)):
            fill = scalar(ax.strip(operands[other]))
            if fill is None:
                continue
            trial = dataclasses.replace(acc, masks=list(acc.masks), biases=list(acc.biases))
            scale = acc.scale if acc.cap is None else 1.0
            found = _walk(p, ax, operands[i], key, trial)
            if found is None:
                continue
            if acc.cap is not None:
                raise Refuse("a mask is applied before the soft cap")
            if not fill * scale <= _HIDDEN:
                raise Refuse(
                    f"hidden scores become {fill * scale:g}, which leaves them weight; a mask needs -inf or a value below {_HIDDEN:g}"
                )
            pred = operands[0] if i == 1 else _negated(p, operands[0])
            trial.masks.append((pred, fill * scale, False))
            trial.biased_fill |= bool(acc.biases)
            acc.__dict__.update(trial.__dict__)
            return found
        return None
    return None


def _factor(p: Program, ax: Axes, e: Expr, operands: list[Ref], key: frozenset[int], acc: _Scores) -> Ref | None:
    """scores * factor, one factor for all keys, as queries could be multiplied by before (cosine attention has one a head)."""
    if acc.cap is not None:
        return None
    for i in (0, 1) if e.op == "mul" else (0,):
        factor = ax.strip(operands[1 - i])
        if set(ax.flat(tuple(key))) & set(ax.of(factor)):
            continue
        trial = dataclasses.replace(acc, factors=[*acc.factors, (e.op, factor)])
        found = _walk(p, ax, operands[i], key, trial)
        if found is not None:
            if e.dtype not in ("float32", "float64"):
                raise Refuse(f"the scores are multiplied by an array in {e.dtype}; queries multiplied by it before would round otherwise")
            acc.__dict__.update(trial.__dict__)
            return found
    return None


def _negated(p: Program, r: Ref) -> Ref:
    return Ref(simplify(p.exprs.apply("not", r.expr), p.exprs), r.dims)


def _masked_product(p: Program, ax: Axes, operands: list[Ref], key: frozenset[int], acc: _Scores) -> Ref | None:
    """scores * keep, next to an added (1 - keep) * fill for the same keep: the score of a hidden pair is the fill."""
    for inner, other in (operands, operands[::-1]):
        seen = boolean_behind(other.expr, p.exprs)
        if seen is None:
            continue
        mine = ax.strip(Ref(seen, other.dims))
        for i, (pred, fill, additive) in enumerate(acc.masks):
            if additive and acc.cap is None and ax.same(ax.strip(pred), mine):
                acc.masks[i] = (pred, fill, False)
                return _walk(p, ax, inner, key, acc)
    return None


def _bias(p: Program, ax: Axes, ref: Ref, factor: float, acc: _Scores) -> None:
    """An added term: a mask where it is 0 or very negative by construction, else a bias."""
    r = ax.strip(ref)
    e = r.expr
    if e.op == "add":
        trial = dataclasses.replace(acc, masks=[], biases=[])
        for a in args(r):
            _bias(p, ax, a, factor, trial)
        if trial.masks:  # a mask and a bias that were added to each other before they met the scores
            acc.masks += trial.masks
            acc.biases += trial.biases
            return
    if e.op == "select":
        pred, a, b = (Ref(x, r.dims) for x in e.args)
        for visible, zero, low in ((pred, a, b), (_negated(p, pred), b, a)):
            fill = scalar(ax.strip(low))
            if fill is not None and fill * factor <= _HIDDEN and _zero_where(p, ax, visible, zero):
                acc.masks.append((visible, fill * factor, True))
                return
    if e.op in ("mul", "div"):  # (1 - keep) * -1e9
        c, parts = factors(ax, r, lambda q: q.expr.op in ("sub", "convert"))
        c *= factor
        if len(parts) == 1 and parts[0][0] == 1 and c <= _HIDDEN:
            hidden = boolean_behind(parts[0][1].expr, p.exprs)
            if hidden is not None:
                acc.masks.append((_negated(p, Ref(hidden, parts[0][1].dims)), c, True))
                return
    if e.op == "const" or (not e.origins or e.args):
        size = math.prod(e.shape)
        data = evaluate(e, p.exprs) if 0 < size <= 1 << 24 else None
        if data is not None:
            lowered = data * factor
            below = lowered <= _HIDDEN
            fills = set(lowered[below].tolist())
            if below.any() and len(fills) == 1 and not lowered[~below].any():
                key = -3 - len(p.exprs.consts)  # a constant of ours: no value of the program has its id
                p.exprs.consts[key] = ~below
                keep_e = p.exprs.make("const", (), (("key", key),), e.shape, "bool")
                acc.masks.append((Ref(keep_e, r.dims), fills.pop(), True))
                return
    acc.biases.append((factor, ref))


def _zero_where(p: Program, ax: Axes, visible: Ref, r: Ref) -> bool:
    """Whether `r` is 0 where `visible`: everywhere, or because `visible` is ~r.bool() and `r` has no gradient."""
    r = ax.strip(r)
    if (known := scalar(r)) is not None:
        return known == 0
    hidden = ax.strip(_negated(p, visible))
    seen = boolean_behind(r.expr, p.exprs)
    if seen is not None:
        return ax.same(ax.strip(Ref(seen, r.dims)), hidden)
    e = hidden.expr
    tested = e.op == "convert" or e.op == "ne" and scalar(ax.strip(Ref(e.args[1], hidden.dims))) == 0
    return tested and ax.same(ax.strip(Ref(e.args[0], hidden.dims)), r) and _counted(r.expr)


def _counted(e: Expr, depth: int = 0) -> bool:
    """Whether `e` is made of integers and booleans, which have no gradient."""
    if e.op == "full" or e.dtype.startswith(("int", "uint", "bool")):
        return True
    return bool(e.args) and e.op in TRANSPARENT | ELEMENTWISE and depth < 8 and all(_counted(a, depth + 1) for a in e.args)


# What leaves a very negative number one, or makes one of 0.
_CARRIES = {"add", "sub", "mul", "div", "select", "neg", "min", "max", "clamp", "log", "slice", "dynamic_slice", "concatenate"}


def _may_hide(p: Program, e: Expr, depth: int = 0) -> bool:
    """Whether an added term is numbers from outside of the program, which may be a mask. What an embedding looks up is
    learned, if its table is no constant.
    """
    while e.op in TRANSPARENT:
        e = e.args[0]
    if e.op in ("mul", "div"):
        constants = [a["value"] for a in map(strip_shape, e.args) if a.op == "full"]
        if not constants or any(abs(c) >= -_HIDDEN for c in constants if e.op == "mul"):
            return bool(constants)
    if e.op in _CARRIES:
        return depth < 8 and any(_may_hide(p, a, depth + 1) for a in e.args)
    if e.op != "value" or not e.dtype.startswith(("float", "bfloat")):
        return False
    node = next((p.node_of[v] for v in e.origins if v in p.node_of), None)
    return node is None or _called(p, e) != "embedding" or evaluate(p.env[node.inputs[0]], p.exprs) is not None


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
    acc = _Scores(masks=[(r, -math.inf, False) for r in found.hides])
    dot = _walk(p, ax, Ref(scores, ax.resolve(prob).dims), frozenset(key), acc)
    if dot is None:
        raise Refuse("what stands between q k^T and softmax is not a scale, a soft cap, a bias or a mask")
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
    reading = Reading()
    fills: set[tuple[float, bool]] = set()
    ambiguous = False
    for pred, fill, additive in acc.masks:
        before = len(reading.terms), len(reading.arrays)
        read_mask(p, ax, pred, lay, reading)
        new = reading.terms[before[0] :]
        if len(reading.arrays) > before[1] or not never_empty(new, ax.extent(query), ax.extent(key)):
            ambiguous = True
        fills.add((fill, additive and math.isfinite(fill)))  # to add -inf is to replace by it
    if reading.arrays and any(not set(ax.of(r)) <= set(sum(dataclasses.astuple(lay), ())) for r in reading.arrays):
        raise Refuse("the mask depends on an axis that the scores lack")
    if any(_depends_on(narrow(p, ax, r).expr, dot.expr) for r in reading.arrays):
        raise Refuse("the mask depends on the scores")
    if any(_depends_on(r.expr, dot.expr) for _, r in acc.biases):
        raise Refuse("the bias depends on the scores")
    finish(p, ax, lay, reading)
    reading.terms = tightest(reading.terms)
    may_be_empty = ambiguous or not never_empty(reading.terms, ax.extent(query), ax.extent(key))
    _same_mask(ax, found, acc, may_be_empty)
    beneath = [fill for _, fill, added in acc.masks if math.isfinite(fill) and (acc.biased_fill or added and not may_be_empty)]
    told = beneath and any(_may_hide(p, r.expr) for _, r in acc.biases)
    if (told or len(acc.masks) > 1 and may_be_empty) and _all_added(acc) and not (found.idle or found.zeroed):
        # How often a key is hidden can be told: what is added is one array, where the smallest float twice is -inf, as in the code.
        acc.biases += [(1.0, _in_numbers(p, ax, pred, fill, dot.expr.dtype)) for pred, fill, _ in acc.masks]
        reading, fills, may_be_empty = Reading(), set(), False
    elif told:
        raise Refuse(
            f"numbers that are made elsewhere, and may be a mask, are added to scores that another mask hides with {min(beneath):g}: a "
            "query to which they show no key would tell; join the masks, or hide with -inf"
        )
    if found.zeroed and may_be_empty:  # such a query gives 0: a fill that gives numbers, and they are put to 0 below
        mask = Mask(tuple(reading.terms), -1e30)
    else:
        mask = Mask(tuple(reading.terms), *_fill(p, fills, may_be_empty, acc.biased_fill, len(acc.masks)))
    arrays: dict[str, Expr] = dict(reading.operands)
    if acc.biases:
        arrays["bias"] = _joined_bias(p, ax, lay, acc.biases)
        mask = Mask((*mask.terms, Bias()), mask.fill, mask.additive)
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
        if _depends_on(factor.expr, dot.expr):
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


def _conjuncts(ax: Axes, r: Ref) -> list[Ref]:
    r = ax.strip(r)
    return [q for a in args(r) for q in _conjuncts(ax, a)] if r.expr.op == "and" else [r]


def _same_mask(ax: Axes, found: _Weighted, acc: _Scores, may_be_empty: bool) -> None:
    """Refuses unless what the sum and the weights are hidden by is what the scores are hidden by."""
    mine = [q for pred, _, _ in acc.masks for q in _conjuncts(ax, pred)]
    again = [q for pred in found.idle for q in _conjuncts(ax, pred)]
    if not all(any(ax.same(q, m) for m in mine) for q in again):
        raise Refuse(
            "the attention weights are masked or dropped out after softmax, by another mask than the scores, so that they do "
            "not sum to 1; if that is dropout, turn it off (deterministic=True, rate 0)"
        )
    if found.idle and may_be_empty and not (found.zeroed and all(any(ax.same(q, m) for q in again) for m in mine)):
        raise Refuse("the weights are masked by a part of the scores' mask only, and a query may see nothing")


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


def _all_added(acc: _Scores) -> bool:
    """Whether all masks are added, and scores drown in each: their order in the sum is nothing then."""
    return acc.cap is None and all(added and -math.inf < fill <= -1e30 for _, fill, added in acc.masks)


def _in_numbers(p: Program, ax: Axes, pred: Ref, fill: float, dtype: str) -> Ref:
    """A mask as it is added: 0 where a key is visible, else the fill."""
    x, r = p.exprs, narrow(p, ax, pred)
    dtype = dtype if dtype == "float64" else "float32"
    shape = r.expr.shape
    values = (x.broadcast(x.full(value, (), dtype), shape, ()) for value in (0.0, fill))
    return Ref(x.make("select", (r.expr, *values), (), shape, dtype), r.dims)


def _fill(p: Program, fills: set[tuple[float, bool]], may_be_empty: bool, biased: bool, masks: int) -> tuple[float, bool]:
    """Fill and additivity of the mask; which only a query that sees nothing can tell."""
    if not fills:
        return -math.inf, False
    if not may_be_empty:
        return next(iter(sorted(fills)))[0], False
    if len(fills) > 1:
        values = {f for f, _ in fills}
        if all(f < -1e30 for f in values) and all(math.isfinite(f) for f in values) and not any(
            a for _, a in fills
        ):
            return min(values), False
        if len(values) == 1:
            raise Refuse("one mask replaces scores and one is added to them, and a query may see nothing: it weighs keys by how many "
                         "masks hide them; join them first")  # fmt: skip
        raise Refuse("two masks hide with different values, and a query may see nothing; use one value for both")
    fill, additive = next(iter(fills))
    if additive and masks > 1 and math.isfinite(fill):
        raise Refuse("two masks are added, and a query may see nothing: it weighs keys by how many masks hide them; join them first")
    if biased and math.isfinite(fill) and fill > -1e30:
        raise Refuse("a bias is added to scores hidden with a moderate fill, and a query may see nothing; hide with -inf")
    return fill, additive


def _joined_bias(p: Program, ax: Axes, lay: Layout, biases: list[tuple[float, Ref]]) -> Expr:
    x = p.exprs
    target = (lay.batch, lay.heads, lay.query, lay.key)
    parts = []
    for factor, ref in biases:
        e = ax.arrange(narrow(p, ax, ref), target, x, fill=False)
        if e is None:
            raise Refuse("the bias depends on an axis that the scores lack")
        if factor != 1.0:
            e = x.apply("mul", e, x.full(factor, e.shape, e.dtype))
        parts.append(e)
    shape = tuple(max(s) for s in zip(*(e.shape for e in parts), strict=True))
    dtype = parts[0].dtype if len({e.dtype for e in parts}) == 1 else "float32"
    total: Expr | None = None
    for e in parts:
        full = x.convert(x.broadcast(e, shape, (0, 1, 2, 3)), dtype)
        total = full if total is None else x.apply("add", total, full)
    assert total is not None
    return total


def _depends_on(e: Expr, target: Expr) -> bool:
    todo = [e]
    seen: set[int] = set()
    while todo:
        a = todo.pop()
        if a is target:
            return True
        if id(a) not in seen and len(seen) < 10_000:
            seen.add(id(a))
            todo.extend(a.args)
    return False
