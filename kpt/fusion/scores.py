"""What stands between q k^T and softmax: a scale, a soft cap, factors, and what is added to scores or hides them.

`read_scores` gathers it from the top down, `mask_of` makes of it a mask of the algebra and a bias. An added term is a mask where it is
0 or very negative by construction. One that comes from outside of the program may be a mask, too, which only a query that sees nothing
can tell.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from kpt.fusion.formula import args, factors, scalar, strip_shape
from kpt.fusion.mask import Layout, Reading, finish, narrow, never_empty, read_mask, tightest
from kpt.fusion.program import Program, Refuse
from kpt.fusion.view import TRANSPARENT, Axes, Ref
from kpt.graph.evaluate import evaluate
from kpt.graph.expr import ELEMENTWISE, Expr
from kpt.graph.normalize import boolean_behind, simplify
from kpt.ops.mask import Bias, Mask

_STEPS = {"mul", "div", "add", "sub", "select", "tanh", "neg", "stop_gradient", "max", "min", "concatenate"}
_HIDDEN = -1e4  # a score this low has weight exp(-1e4) = 0 next to any that is not hidden


def reaches_dot(e: Expr, depth: int = 0) -> bool:
    """Whether the scores come from a product of two tensors that both change with the program's input."""
    if e.op == "dot_general":
        return True
    if depth > 12 or e.op not in TRANSPARENT | _STEPS:
        return False
    return any(reaches_dot(a, depth + 1) for a in e.args if a.op != "full")


@dataclasses.dataclass
class Scores:
    """What lies between softmax and q k^T, gathered from the top down."""

    scale: float = 1.0
    cap: float | None = None
    masks: list[tuple[Ref, float, bool]] = dataclasses.field(default_factory=list)  # visible, fill, additive
    biases: list[tuple[float, Ref]] = dataclasses.field(default_factory=list)
    biased_fill: bool = False  # a bias is added to hidden scores too
    factors: list[tuple[str, Ref]] = dataclasses.field(default_factory=list)  # "mul" or "div", by numbers that no key changes


def read_scores(p: Program, ax: Axes, ref: Ref, key: frozenset[int], hides: Sequence[Ref]) -> tuple[Scores, Ref]:
    """What lies between the scores `ref`, with their axes, and q k^T; and q k^T.

    Args:
      key: the axes that softmax runs over.
      hides: booleans that put exponentials of scores to 0, as a score of -inf is.

    Raises:
      Refuse: no way leads there, or something stands on it that no kernel computes.
    """
    acc = Scores(masks=[(r, -math.inf, False) for r in hides])
    dot = _walk(p, ax, ref, key, acc)
    if dot is None:
        raise Refuse("what stands between q k^T and softmax is not a scale, a soft cap, a bias or a mask")
    return acc, dot


class _Blocked(Refuse):
    """No way leads to the scores through this; another one may."""


def _walk(p: Program, ax: Axes, ref: Ref, key: frozenset[int], acc: Scores) -> Ref | None:
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
    if e.op == "stop_gradient" and reaches_dot(e):
        raise _Blocked("the scores pass through stop_gradient")
    if e.op in ("max", "min") and reaches_dot(e):
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


def _factor(p: Program, ax: Axes, e: Expr, operands: list[Ref], key: frozenset[int], acc: Scores) -> Ref | None:
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


def _masked_product(p: Program, ax: Axes, operands: list[Ref], key: frozenset[int], acc: Scores) -> Ref | None:
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


def _bias(p: Program, ax: Axes, ref: Ref, factor: float, acc: Scores) -> None:
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
    return node is None or p.called(e) != "embedding" or evaluate(p.env[node.inputs[0]], p.exprs) is not None


def mask_of(
    p: Program, ax: Axes, acc: Scores, dot: Expr, lay: Layout, idle: Sequence[Ref], *, zeroed: bool
) -> tuple[Mask, dict[str, Expr], bool]:
    """The mask, the arrays that it and the bias are in, and whether a query may see nothing.

    Args:
      acc, dot: of `read_scores`.
      idle: booleans that the sum or the weights are put to 0 by once more; the scores' own mask must say the same.
      zeroed: whether the weights are, so that a query that sees nothing gives 0.

    Raises:
      Refuse: no mask says it, or a query that sees nothing could tell.
    """
    reading = Reading()
    fills: set[tuple[float, bool]] = set()
    ambiguous = False
    for pred, fill, additive in acc.masks:
        before = len(reading.terms), len(reading.arrays)
        read_mask(p, ax, pred, lay, reading)
        new = reading.terms[before[0] :]
        if len(reading.arrays) > before[1] or not never_empty(new, ax.extent(lay.query), ax.extent(lay.key)):
            ambiguous = True
        fills.add((fill, additive and math.isfinite(fill)))  # to add -inf is to replace by it
    if reading.arrays and any(not set(ax.of(r)) <= set(sum(dataclasses.astuple(lay), ())) for r in reading.arrays):
        raise Refuse("the mask depends on an axis that the scores lack")
    if any(depends_on(narrow(p, ax, r).expr, dot) for r in reading.arrays):
        raise Refuse("the mask depends on the scores")
    if any(depends_on(r.expr, dot) for _, r in acc.biases):
        raise Refuse("the bias depends on the scores")
    finish(p, ax, lay, reading)
    reading.terms = tightest(reading.terms)
    may_be_empty = ambiguous or not never_empty(reading.terms, ax.extent(lay.query), ax.extent(lay.key))
    _same_mask(ax, acc, idle, zeroed, may_be_empty)
    beneath = [fill for _, fill, added in acc.masks if math.isfinite(fill) and (acc.biased_fill or added and not may_be_empty)]
    told = beneath and any(_may_hide(p, r.expr) for _, r in acc.biases)
    if (told or len(acc.masks) > 1 and may_be_empty) and _all_added(acc) and not (idle or zeroed):
        # How often a key is hidden can be told: what is added is one array, where the smallest float twice is -inf, as in the code.
        acc.biases += [(1.0, _in_numbers(p, ax, pred, fill, dot.dtype)) for pred, fill, _ in acc.masks]
        reading, fills, may_be_empty = Reading(), set(), False
    elif told:
        raise Refuse(
            f"numbers that are made elsewhere, and may be a mask, are added to scores that another mask hides with {min(beneath):g}: a "
            "query to which they show no key would tell; join the masks, or hide with -inf"
        )
    if zeroed and may_be_empty:  # such a query gives 0: a fill that gives numbers, and they are put to 0 by the pattern
        mask = Mask(tuple(reading.terms), -1e30)
    else:
        mask = Mask(tuple(reading.terms), *_fill(fills, may_be_empty, acc.biased_fill, len(acc.masks)))
    arrays: dict[str, Expr] = dict(reading.operands)
    if acc.biases:
        arrays["bias"] = _joined_bias(p, ax, lay, acc.biases)
        mask = Mask((*mask.terms, Bias()), mask.fill, mask.additive)
    return mask, arrays, may_be_empty


def _conjuncts(ax: Axes, r: Ref) -> list[Ref]:
    r = ax.strip(r)
    return [q for a in args(r) for q in _conjuncts(ax, a)] if r.expr.op == "and" else [r]


def _same_mask(ax: Axes, acc: Scores, idle: Sequence[Ref], zeroed: bool, may_be_empty: bool) -> None:
    """Refuses unless what the sum and the weights are hidden by is what the scores are hidden by."""
    mine = [q for pred, _, _ in acc.masks for q in _conjuncts(ax, pred)]
    again = [q for pred in idle for q in _conjuncts(ax, pred)]
    if not all(any(ax.same(q, m) for m in mine) for q in again):
        raise Refuse(
            "the attention weights are masked or dropped out after softmax, by another mask than the scores, so that they do "
            "not sum to 1; if that is dropout, turn it off (deterministic=True, rate 0)"
        )
    if idle and may_be_empty and not (zeroed and all(any(ax.same(q, m) for q in again) for m in mine)):
        raise Refuse("the weights are masked by a part of the scores' mask only, and a query may see nothing")


def _all_added(acc: Scores) -> bool:
    """Whether all masks are added, and scores drown in each: their order in the sum is nothing then."""
    return acc.cap is None and all(added and -math.inf < fill <= -1e30 for _, fill, added in acc.masks)


def _in_numbers(p: Program, ax: Axes, pred: Ref, fill: float, dtype: str) -> Ref:
    """A mask as it is added: 0 where a key is visible, else the fill."""
    x, r = p.exprs, narrow(p, ax, pred)
    dtype = dtype if dtype == "float64" else "float32"
    shape = r.expr.shape
    values = (x.broadcast(x.full(value, (), dtype), shape, ()) for value in (0.0, fill))
    return Ref(x.make("select", (r.expr, *values), (), shape, dtype), r.dims)


def _fill(fills: set[tuple[float, bool]], may_be_empty: bool, biased: bool, masks: int) -> tuple[float, bool]:
    """Fill and additivity of the mask; which only a query that sees nothing can tell."""
    if not fills:
        return -math.inf, False
    if not may_be_empty:
        return next(iter(sorted(fills)))[0], False
    if len(fills) > 1:
        values = {f for f, _ in fills}
        if all(f < -1e30 for f in values) and all(math.isfinite(f) for f in values) and not any(a for _, a in fills):
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


def depends_on(e: Expr, target: Expr) -> bool:
    """Whether `target` is among what `e` is computed from."""
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
