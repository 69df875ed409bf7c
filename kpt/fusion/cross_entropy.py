"""cross_entropy: logsumexp(logits) - logits[label].  linear_cross_entropy: the same on logits = x w + b."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator

from kpt.fusion.formula import args, cancel, scalar, terms, unshifted
from kpt.fusion.linear import projection
from kpt.fusion.mask import narrow
from kpt.fusion.program import Match, NearMiss, Program, Refuse
from kpt.fusion.view import TRANSPARENT, Axes, Ref
from kpt.graph.expr import Expr
from kpt.ops.base import Spec


def find(p: Program) -> Iterator[Match | NearMiss]:
    done: set[int] = set()
    for log in list(p.exprs_with("log")):
        e = log.args[0]
        while e.op in TRANSPARENT:
            e = e.args[0]
        if e.op != "reduce_sum" or len(e["axes"]) != 1:
            continue
        inner = e.args[0]
        while inner.op in TRANSPARENT:
            inner = inner.args[0]
        if inner.op == "select" and any(a.op == "exp" for a in inner.args) and _candidates(p, log):
            masked = "the sum over the vocabulary is masked (where=), which no kernel does; mask the loss of each token instead"
            yield NearMiss("cross_entropy", log.origins[0], masked, p.source(log))
        if inner.op != "exp" or id(log) in done:
            continue
        done.add(id(log))
        why, first = None, None
        candidates = _candidates(p, log)
        for i, root in enumerate(candidates):
            try:
                matches = _match(p, root, log)
            except Refuse as refusal:
                why = str(refusal)
                continue
            if matches is not None and any(p.unsafe(m) is None for m in matches):
                yield from _weighted(p, candidates[i + 1 :], log)
                yield from matches
                break
            first = first or matches
        else:
            if first:
                yield from first
            elif why:
                yield NearMiss("cross_entropy", log.origins[0], why, p.source(log))


def _candidates(p: Program, log: Expr) -> list[Expr]:
    """Sums made from `log`, through the choice of a label, nearest first."""
    out: list[Expr] = []
    at, depth = [log], {id(log): 0}
    while at and len(out) < 40:
        e = at.pop(0)
        for u in p.users(e):
            if id(u) in depth or depth[id(e)] > 12:
                continue
            if u.op in TRANSPARENT | {"add", "sub", "neg", "mul", "gather", "reduce_sum", "select", "dot_general"}:
                depth[id(u)] = depth[id(e)] + 1
                at.append(u)
                if u.op in ("sub", "add", "gather", "reduce_sum", "reshape", "neg", "mul", "dot_general", "select"):
                    out.append(u)
    return out


def _weighted(p: Program, larger: list[Expr], log: Expr) -> list[Match]:
    """The loss of a head with the weights of the tokens taken in: a kernel that knows them makes all gradients in its forward."""
    for root in larger:
        if root.op not in ("mul", "select"):
            continue
        ax = Axes()
        out = ax.root(root)
        *pred, a, b = (ax.strip(r) for r in args(out))
        sides = [(a, b), (b, a)] if not pred else [(a, pred[0])] if scalar(b) == 0 else []
        for loss, by in sides:
            if scalar(by) is not None or set(ax.of(loss)) != set(ax.of(out)):
                continue
            with contextlib.suppress(Refuse):
                matches = _read(p, ax, out, loss, log, by) or []
                if any(p.unsafe(m) is None for m in matches):
                    return matches
    return []


def _match(p: Program, root: Expr, log: Expr) -> list[Match] | None:
    ax = Axes()
    out = ax.root(root)
    return _read(p, ax, out, out, log)


def _read(p: Program, ax: Axes, out: Ref, loss: Ref, log: Expr, by: Ref | None = None) -> list[Match] | None:
    """Matches where `loss` is a cross entropy, and `out` that loss, times `by` if it is given (chosen by it if it is boolean)."""
    acc = _Sum(p, ax)
    if not acc.read(1.0, loss):
        return None
    if acc.log is None or acc.pick is None or acc.const or acc.log[1].expr is not log:
        return None
    c_log, log_ref = acc.log
    c_pick, picked, chosen = acc.pick
    c_flat = acc.flat[0] * ax.extent(chosen.vocab) if acc.flat else 0.0
    if abs(abs(c_log) - 1) > 1e-6 or abs(c_log + c_pick + c_flat) > 1e-6:
        return None
    smoothing = -c_flat / c_log
    if not 0 <= smoothing <= 1:
        return None
    summed = ax.strip(Ref(log_ref.expr.args[0], log_ref.dims))
    inner, fresh = ax.reduced(summed)
    exp = ax.strip(inner)
    if exp.expr.op != "exp":
        return None
    z, shifts = unshifted(ax, args(exp)[0], fresh[0])
    own = ax.flat(fresh[0])
    # What the exponents were shifted by must come back next to the log.
    if not cancel(ax, acc.rest + [(c_log * c, r) for c, r in shifts]):
        return None
    right = ax.resolve(z)
    for part, vocab in [(picked, chosen.vocab)] + ([acc.flat[1:]] if acc.flat else []):
        left, to = ax.resolve(part), {ax.flat(vocab): own}
        if left.expr is not right.expr or tuple(to.get(d, d) for d in left.dims) != right.dims:
            return None
    kind = chosen.kind
    if kind != "clip" and not acc.logs_outside:
        # Chosen from log_softmax: a label outside the vocabulary takes its share of the sum of exponentials, and its gradient, along.
        kind = "drop"
    elif kind == "zero" and acc.logs_inside:
        return None
    return _build(p, ax, out, z, own, chosen, kind, math.copysign(1.0, c_log), smoothing, log, exp.expr, by)


@dataclasses.dataclass(frozen=True)
class Choice:
    """share * source[label] + uniform * sum of source over the vocabulary; times `weights` and summed over `summed`, if any.

    `kind`: "nan", "clip" (by a gather, and what it does outside the vocabulary) or "zero" (by one-hot).
    """

    source: Ref
    label: Ref
    kind: str
    vocab: tuple[int, ...]
    share: float = 1.0
    uniform: float = 0.0
    summed: tuple[int, ...] = ()
    weights: tuple[Ref, ...] = ()


class _Sum:
    """A sum over tokens, opened through the choice of a label: log sum exp, the chosen logit, all logits, and the rest."""

    def __init__(self, p: Program, ax: Axes):
        self.p, self.ax = p, ax
        self.const = 0.0
        self.log: tuple[float, Ref] | None = None
        self.pick: tuple[float, Ref, Choice] | None = None
        self.flat: tuple[float, Ref, tuple[int, ...]] | None = None
        self.rest: list[tuple[float, Ref]] = []
        self.logs_inside = self.logs_outside = False

    def read(self, coef: float, ref: Ref) -> bool:
        ax = self.ax
        const, parts = terms(ax, ref, lambda r: False)
        self.const += coef * const
        for c, r in parts:
            c *= coef
            if r.expr.op == "log":
                self.logs_outside = True
                if not self._log(c, r):
                    return False
                continue
            got = choice(self.p, ax, r)
            if got is not None:
                if self.pick is not None or (got.summed or got.weights) and len(parts) > 1 or not self._open(c, got):
                    return False
            elif r.expr.op == "reduce_sum" and len(r.expr["axes"]) == 1 and self.flat is None:
                inner, fresh = ax.reduced(r)
                base = self._shifted(c * ax.extent(fresh[0]), inner, ax.flat(fresh[0]))
                if base is None:
                    return False
                self.flat = c, base, ax.flat(fresh[0])
            else:
                self.rest.append((c, r))
        return len(self.rest) <= 4

    def _open(self, coef: float, got: Choice) -> bool:
        """choose(a - m - log ...) = choose(a) - m - log ..., as the rest is constant over the vocabulary."""
        total = got.share + got.uniform * self.ax.extent(got.vocab)
        base = self._shifted(coef * total, got.source, got.vocab)
        if base is None or got.uniform and self.flat is not None:
            return False
        self.pick = coef * got.share, base, got
        if got.uniform:
            self.flat = coef * got.uniform, base, got.vocab
        return True

    def _shifted(self, coef: float, source: Ref, vocab: tuple[int, ...]) -> Ref | None:
        """The logits of `source`; what they are shifted by counts `coef` times."""
        base, shifts = unshifted(self.ax, source, vocab)
        for c, r in shifts:
            if r.expr.op == "log":
                self.logs_inside = True
                if not self._log(coef * c, r):
                    return None
            else:
                self.rest.append((coef * c, r))
        return base

    def _log(self, c: float, r: Ref) -> bool:
        if self.log is not None:
            if not self.ax.same(self.log[1], r):
                return False
            c += self.log[0]
        self.log = c, r
        return True


def choice(p: Program, ax: Axes, r: Ref) -> Choice | None:
    """`r` read as the choice of a label."""
    e = r.expr
    if e.op == "gather":
        return _gathered(p, ax, r)
    if e.op == "reduce_sum":
        inner, fresh = ax.reduced(r)
        return _hot_sum(p, ax, ax.strip(inner), [ax.flat(f) for f in fresh if f])
    if e.op == "dot_general":
        left, right, contracted = ax.dot(r)
        left, right = ax.strip(left), ax.strip(right)
        over = ax.flat(contracted)
        for hot, src in ((left, right), (right, left)):
            if set(ax.of(src)) != set(ax.of(r)) | set(ax.flat(over)):
                continue
            whole = [ax.flat(over)] if len(e["lhs_contract"]) == 1 else []
            for vocab in (*whole, *((a,) for a in ax.flat(over))):
                target = _target(p, ax, hot, vocab)
                if target is not None:
                    summed = tuple(a for a in ax.flat(over) if a not in ax.flat(vocab))
                    return Choice(src, target[0], "zero", ax.flat(vocab), *target[1:], summed)
    return None


def _hot_sum(p: Program, ax: Axes, inner: Ref, over: list[tuple[int, ...]]) -> Choice | None:
    """sum(target * source), `over` the vocabulary and perhaps tokens, perhaps weighted by token."""
    if inner.expr.op == "select":
        pred, a, b = args(inner)
        for vocab in over:
            label = _label_equality(p, ax, pred, vocab) if scalar(ax.strip(b)) == 0 else None
            if label is not None:
                return Choice(ax.strip(a), label, "zero", vocab, summed=_others(ax, over, vocab))
        return None
    sign, parts = _product(ax, inner)
    for vocab in over:
        for hot in parts:
            target = _target(p, ax, hot, vocab) if len(parts) > 1 else None
            if target is None:
                continue
            rest = [q for q in parts if q is not hot]
            source = [q for q in rest if set(ax.of(q)) & set(vocab)]
            weights = tuple(q for q in rest if q not in source)
            if len(source) == 1:
                label, share, uniform = target
                return Choice(source[0], label, "zero", vocab, sign * share, sign * uniform, _others(ax, over, vocab), weights)
    return None


def _others(ax: Axes, over: list[tuple[int, ...]], vocab: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a for o in over if o != vocab for a in ax.flat(o))


def _product(ax: Axes, r: Ref) -> tuple[float, list[Ref]]:
    """(sign, factors)."""
    r = ax.strip(r)
    if r.expr.op not in ("mul", "neg"):
        return 1.0, [r]
    parts = [_product(ax, a) for a in args(r)]
    return math.prod(s for s, _ in parts) * (-1.0 if r.expr.op == "neg" else 1.0), [q for _, qs in parts for q in qs]


def _target(p: Program, ax: Axes, r: Ref, vocab: tuple[int, ...]) -> tuple[Ref, float, float] | None:
    """(labels, share, uniform) where `r` is share * one_hot(labels) + uniform."""
    label = _one_hot(p, ax, r, vocab)
    if label is not None:
        return label, 1.0, 0.0
    r = ax.strip(r)
    if r.expr.op == "select":
        pred, a, b = args(r)
        high, low = scalar(ax.strip(a)), scalar(ax.strip(b))
        label = _label_equality(p, ax, pred, vocab)
        return None if label is None or high is None or low is None else (label, high - low, low)
    const, parts = terms(ax, r, lambda q: q.expr.op not in ("add", "sub", "mul", "div", "neg"))
    if len(parts) != 1 or not const and parts[0][0] == 1:
        return None
    label = _one_hot(p, ax, parts[0][1], vocab)
    return None if label is None else (label, parts[0][0], const)


def _one_hot(p: Program, ax: Axes, r: Ref, vocab: tuple[int, ...]) -> Ref | None:
    r = ax.strip(r)
    if r.expr.op == "convert" and r.expr.args[0].dtype == "bool":
        return _label_equality(p, ax, Ref(r.expr.args[0], r.dims), vocab)
    if r.expr.op == "select":
        pred, a, b = (Ref(x, r.dims) for x in r.expr.args)
        if scalar(ax.strip(a)) == 1 and scalar(ax.strip(b)) == 0:
            return _label_equality(p, ax, pred, vocab)
    return None


def _label_equality(p: Program, ax: Axes, r: Ref, vocab: tuple[int, ...]) -> Ref | None:
    """labels where `r` is labels[..., None] == arange(vocabulary)."""
    r = ax.strip(r)
    if r.expr.op != "eq":
        return None
    sides = [ax.strip(a) for a in args(r)]
    for label, pos in (sides, sides[::-1]):
        if set(ax.of(label)) & set(ax.flat(vocab)):
            continue
        counts = pos.expr.op == "iota" and ax.flat(pos.dims[pos.expr["dimension"]]) == ax.flat(vocab)
        if counts or (_known_arange(p, pos) and ax.of(pos) == ax.flat(vocab)):
            return label
    return None


def _known_arange(p: Program, r: Ref) -> bool:
    if r.expr.op != "const" or len(r.expr.shape) != 1:
        return False
    import numpy as np

    return bool(np.array_equal(np.asarray(p.exprs.consts[r.expr["key"]]), np.arange(r.expr.shape[0])))


def _gathered(p: Program, ax: Axes, r: Ref) -> Choice | None:
    """take_along_axis over one axis, or x[arange, labels]; any layout that picks one element a row."""
    e = r.expr
    src, idx = e.args
    if any(s != 1 for s in e["sizes"]):
        return None
    # The index array without its last dimension has the result's dimensions, less the window's (all of size 1).
    index_dims = [d for i, d in enumerate(r.dims) if i not in e["offset_dims"]]
    if len(idx.shape) != len(index_dims) + 1:
        return None
    dims: list[tuple[int, ...] | None] = [None] * len(src.shape)
    for a, b in zip(e["operand_batch"], e["index_batch"], strict=True):
        dims[a] = index_dims[b]
    parts = _columns(p, ax, Ref(idx, (*index_dims, ax.new(idx.shape[-1]))))
    if parts is None or len(parts) != len(e["index_map"]):
        return None
    label, vocab_dim = None, None
    for part, d in zip(parts, e["index_map"], strict=True):
        part = _without_wrap(p, ax, part)
        if part.expr.op == "iota":
            at = part.dims[part.expr["dimension"]]
            if ax.extent(at) == src.shape[d]:
                dims[d] = at
                continue
        if _known_arange(p, part) and part.expr.shape[0] == src.shape[d] and src.shape[d] > 1 and label is not None:
            dims[d] = part.dims[0]
            continue
        if src.shape[d] == 1:
            dims[d] = ()
            continue
        if label is not None:
            return None
        label, vocab_dim = part, d
    if label is None or vocab_dim is None:
        return None
    vocab = ax.new(src.shape[vocab_dim])
    dims[vocab_dim] = vocab
    dims = [() if d is None and n == 1 else d for d, n in zip(dims, src.shape, strict=True)]
    if any(d is None for d in dims):
        return None
    kind = "nan" if "fill" in e["mode"] else "clip"
    return Choice(ax.strip(Ref(src, tuple(d for d in dims if d is not None))), label, kind, vocab)


def _columns(p: Program, ax: Axes, r: Ref) -> list[Ref] | None:
    """The columns of an index array [..., n]: itself for n = 1, the parts of a concatenation otherwise."""
    e = r.expr
    if e.shape[-1] == 1:
        return [ax.strip(Ref(e, r.dims))]
    if e.op != "concatenate" or e["axis"] != len(e.shape) - 1 or any(a.shape[-1] != 1 for a in e.args):
        return None
    return [ax.strip(Ref(a, (*r.dims[:-1], ()))) for a in e.args]


def _without_wrap(p: Program, ax: Axes, r: Ref) -> Ref:
    """An arange with its (idle) wrapping of negative indices taken off."""
    if r.expr.op == "select" and r.expr.args[0].op == "lt":
        base = ax.strip(Ref(r.expr.args[2], r.dims))
        if base.expr.op == "iota":
            return base
    return r


def _build(
    p: Program, ax: Axes, out: Ref, z: Ref, vocab: tuple[int, ...], chosen: Choice, kind: str,
    sign: float, smoothing: float, log: Expr, exp: Expr, by: Ref | None,
) -> list[Match] | None:  # fmt: skip
    x, root = p.exprs, out.expr
    mine = tuple(d for d in ax.resolve(out).dims if d)
    rows = (*mine, *((a,) for a in ax.flat(chosen.summed)))
    labels = ax.arrange(narrow(p, ax, chosen.label), rows, x)
    if labels is None or not labels.dtype.startswith(("int", "uint")):
        return None
    shape = tuple(ax.extent(d) for d in rows)
    spec = Spec(shape, "float32" if root.dtype != "float64" else "float64")
    weights = []
    for r in (*chosen.weights, *([] if by is None else [by])):
        weight = ax.arrange(narrow(p, ax, r), rows, x)
        if weight is None or not p.grounded(weight):
            return None
        weights.append(weight)

    def results(weighted: bool) -> dict[int, Expr] | None:
        """The program's values made of the kernel's losses, and whether these have the weights in them."""
        leaf: Expr = x.out(0, spec)
        if kind == "drop" and chosen.kind == "nan":
            ok = x.apply("and", x.apply("ge", labels, x.full(0, shape, labels.dtype), dtype="bool"),
                         x.apply("lt", labels, x.full(ax.extent(vocab), shape, labels.dtype), dtype="bool"), dtype="bool")  # fmt: skip
            nan = x.make("select", (ok, *(x.full(c, shape, leaf.dtype) for c in (0.0, math.nan))), (), shape, leaf.dtype)
            leaf = x.apply("add", leaf, nan)  # what smoothing adds keeps its gradient
        for w in weights:
            if w.dtype == "bool":
                leaf = x.make("select", (w, leaf, x.full(0.0, shape, leaf.dtype)), (), shape, leaf.dtype)
            elif not weighted:
                leaf = x.apply("mul", leaf, x.convert(w, leaf.dtype))
        if len(rows) > len(mine):
            leaf = x.make("reduce_sum", (leaf,), (("axes", tuple(range(len(mine), len(rows)))),), shape[: len(mine)], leaf.dtype)
        if sign < 0:
            leaf = x.apply("neg", leaf)
        result = ax.arrange(Ref(x.convert(leaf, root.dtype), mine), ax.resolve(out).dims, x)
        return None if result is None else p.result(root, result)

    logits, cap = _soft_cap(ax, z)
    params = {"logits_soft_cap": cap, "invalid": kind} | ({"label_smoothing": smoothing} if smoothing > 1e-9 else {})
    source = p.source(log) or p.source(root)
    matches = []

    def add(op: str, made: dict[str, Expr | None], inner: Expr) -> None:
        arrays = {n: a for n, a in made.items() if a is not None}
        found = results("weights" in made)
        if found is not None and len(arrays) == len(made):
            matches.append(Match(op, arrays, params, found, (inner,), source))

    pr = projection(p, ax, logits)
    if pr is not None and set(pr.columns) == set(ax.flat(vocab)):
        made = {"x": ax.arrange(pr.x, (*rows, pr.contracted), x), "w": ax.arrange(pr.w, (pr.contracted, vocab), x), "labels": labels}
        if pr.b is not None:
            made["b"] = ax.arrange(pr.b, (vocab,), x)
        if weights:
            floats = [w if w.dtype.startswith(("float", "bfloat")) else x.convert(w, spec.dtype) for w in weights]
            product = functools.reduce(lambda v, w: x.apply("mul", x.convert(v, spec.dtype), x.convert(w, spec.dtype)), floats)
            add("linear_cross_entropy", made | {"weights": product}, pr.dot)
        if by is None:
            add("linear_cross_entropy", made, pr.dot)
    if by is None:
        add("cross_entropy", {"logits": ax.arrange(ax.resolve(logits), (*rows, ax.flat(vocab)), x), "labels": labels}, exp)
    return matches or None


def _soft_cap(ax: Axes, z: Ref) -> tuple[Ref, float | None]:
    """(inner, cap) where z = cap * tanh(inner / cap)."""
    r = ax.strip(z)
    if r.expr.op != "mul":
        return z, None
    for a, b in (args(r), args(r)[::-1]):
        cap = scalar(ax.strip(b))
        t = ax.strip(a)
        if cap is None or t.expr.op != "tanh":
            continue
        inner = ax.strip(Ref(t.expr.args[0], t.dims))
        if inner.expr.op in ("mul", "div"):
            u, v = args(inner)
            s = scalar(ax.strip(v))
            if s is not None and abs((s if inner.expr.op == "div" else 1 / s) / cap - 1) < 1e-5:
                return ax.strip(u), cap
    return z, None


__all__ = ["find"]
