"""Which pairs a boolean expression lets through, as terms of the mask algebra.

Comparisons of positions become Causal and Window, comparisons of per-token numbers Segments, a
position against a per-row number Lengths. A constant array is looked at; what is none of these stays
an array (Explicit), in the smallest shape that says it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from kpt.fusion.program import Program
from kpt.fusion.view import Axes, Ref
from kpt.graph.evaluate import evaluate
from kpt.graph.expr import ELEMENTWISE, Expr
from kpt.graph.normalize import simplify
from kpt.ops.mask import Causal, Explicit, Lengths, Segments, Term, Window

_LOOK_AT = 1 << 26  # largest constant mask (elements) that is evaluated to see what it says


@dataclasses.dataclass(frozen=True)
class Layout:
    """The roles of a match's axes: batch, kv heads then query-head groups, query and key positions."""

    batch: tuple[int, ...]
    heads: tuple[int, ...]
    query: tuple[int, ...]
    key: tuple[int, ...]


@dataclasses.dataclass
class Reading:
    """Terms read so far, their operands, and the arrays still to be joined into one Explicit term."""

    terms: list[Term] = dataclasses.field(default_factory=list)
    operands: dict[str, Expr] = dataclasses.field(default_factory=dict)
    arrays: list[Ref] = dataclasses.field(default_factory=list)


def read_mask(p: Program, ax: Axes, ref: Ref, lay: Layout, reading: Reading) -> None:
    """Adds to `reading` what the boolean `ref` (True = visible) says."""
    ref = ax.strip(ref)
    e = ref.expr
    if e.op == "full":
        if not e["value"]:
            reading.arrays.append(ref)
        return
    if e.op == "and":
        for a in e.args:
            read_mask(p, ax, Ref(a, ref.dims), lay, reading)
        return
    if e.op == "not":
        opened = _negation(p, ax, ref)
        if opened is not None:
            for r in opened:
                read_mask(p, ax, r, lay, reading)
            return
    for attempt in (_positions, _segments, _lengths):
        if e.op in ("ge", "gt", "le", "lt", "eq") and attempt(ax, ref, lay, reading, p):
            return
    if _constant(p, ax, ref, lay, reading):
        return
    reading.arrays.append(ref)


def _negation(p: Program, ax: Axes, ref: Ref) -> list[Ref] | None:
    """Refs whose conjunction `ref` = not(...) is: the opposite comparison, or De Morgan's law over an or."""
    inner = ax.strip(Ref(ref.expr.args[0], ref.dims))
    parts = inner.expr.args if inner.expr.op == "or" else (inner.expr,)
    out = [Ref(simplify(p.exprs.apply("not", a), p.exprs), inner.dims) for a in parts]
    return out if len(out) > 1 or out[0].expr.op != "not" or out[0].expr is not ref.expr else None


def finish(p: Program, ax: Axes, lay: Layout, reading: Reading) -> None:
    """Joins what stayed an array into the `keep` operand."""
    if not reading.arrays:
        return
    target = (lay.batch, lay.heads, lay.query, lay.key)
    parts = []
    for ref in reading.arrays:
        small = narrow(p, ax, ref)
        arranged = ax.arrange(small, target, p.exprs, fill=False)
        if arranged is None:
            raise ValueError("mask depends on an axis that attention does not have")
        parts.append(arranged)
    shape = tuple(max(s) for s in zip(*(e.shape for e in parts), strict=True))
    keep = None
    for e in parts:
        full = p.exprs.broadcast(e, shape, (0, 1, 2, 3)) if e.shape != shape else e
        keep = full if keep is None else p.exprs.apply("and", keep, full)
    assert keep is not None
    reading.operands["keep"] = keep
    reading.terms.append(Explicit())


def narrow(p: Program, ax: Axes, ref: Ref, depth: int = 0) -> Ref:
    """The same values without the dimensions along which they are constant: f(broadcast(a)) as f(a)."""
    ref = ax.strip(ref, casts=False)
    e = ref.expr
    if e.op == "full":
        return Ref(p.exprs.full(e["value"], (), e.dtype), ())
    if depth > 12 or e.op not in ELEMENTWISE or e.op in ("stop_gradient",) or not e.args:
        return ref
    parts = [narrow(p, ax, Ref(a, ref.dims), depth + 1) for a in e.args]
    parts = [ax.resolve(q) for q in parts]
    needed = [a for a in ax.of(ref) if any(a in ax.of(q) for q in parts)]
    if len(needed) == len(ax.of(ref)):
        return ref
    target = tuple((a,) for a in needed)
    arranged = []
    for q in parts:
        shaped = ax.arrange(q, target, p.exprs)
        if shaped is None or not p.grounded(shaped):
            return ref
        arranged.append(shaped)
    made = p.exprs.make(e.op, tuple(arranged), e.attrs, tuple(ax.size[a] for a in needed), e.dtype)
    return Ref(made, target) if p.grounded(made) else ref


def _affine(ax: Axes, ref: Ref, depth: int = 0) -> tuple[dict[tuple[int, ...], int], int] | None:
    """`ref` as constant + sum of coefficient * position along an axis, or None."""
    ref = ax.strip(ref)
    e = ref.expr
    if depth > 16 or e.dtype not in ("int32", "int64", "float32", "float64"):  # narrower and unsigned ones wrap or round
        return None
    if e.op == "full":
        v = e["value"]
        return ({}, int(v)) if float(v).is_integer() else None
    if e.op == "iota":
        dim = ref.dims[e["dimension"]]
        return ({dim: 1}, 0) if dim else ({}, 0)
    if e.op in ("add", "sub"):
        a, b = (_affine(ax, Ref(x, ref.dims), depth + 1) for x in e.args)
        if a is None or b is None:
            return None
        sign = 1 if e.op == "add" else -1
        out = dict(a[0])
        for k, c in b[0].items():
            out[k] = out.get(k, 0) + sign * c
        return {k: c for k, c in out.items() if c}, a[1] + sign * b[1]
    return None


def _positions(ax: Axes, ref: Ref, lay: Layout, reading: Reading, p: Program) -> bool:
    """key <= query + c is Causal; key >= query - c is a Window open on the right."""
    op = ref.expr.op
    if op == "eq":
        return False
    a, b = (_affine(ax, Ref(x, ref.dims)) for x in ref.expr.args)
    if a is None or b is None:
        return False
    if op in ("le", "lt"):
        a, b = b, a
    coef = dict(a[0])
    for k, c in b[0].items():
        coef[k] = coef.get(k, 0) - c
    coef = {ax.flat(k): c for k, c in coef.items() if c}
    const = a[1] - b[1] - (1 if op in ("gt", "lt") else 0)  # now: sum(coef * position) + const >= 0
    query, key = ax.flat(lay.query), ax.flat(lay.key)
    if coef == {query: 1, key: -1}:
        reading.terms.append(Causal(const))
    elif coef == {query: -1, key: 1}:
        reading.terms.append(Window(const, None))
    elif not query and coef == {key: -1}:
        reading.terms.append(Causal(const))
    else:
        return False
    return True


def _segments(ax: Axes, ref: Ref, lay: Layout, reading: Reading, p: Program) -> bool:
    if ref.expr.op != "eq" or "q_segment_ids" in reading.operands:
        return False
    batch, query, key = set(ax.flat(lay.batch)), set(ax.flat(lay.query)), set(ax.flat(lay.key))
    sides = [narrow(p, ax, Ref(x, ref.dims)) for x in ref.expr.args]
    if not all(s.expr.dtype.startswith(("int", "uint")) for s in sides):
        return False
    over = [set(ax.of(s)) for s in sides]
    if not (over[0] & query and not over[0] & key):
        sides, over = sides[::-1], over[::-1]
    if not (over[0] & query and over[0] <= batch | query and over[1] & key and over[1] <= batch | key):
        return False
    q = ax.arrange(sides[0], (lay.batch, lay.query), p.exprs)
    k = ax.arrange(sides[1], (lay.batch, lay.key), p.exprs)
    if q is None or k is None:
        return False
    reading.operands.update(q_segment_ids=q, kv_segment_ids=k)
    reading.terms.append(Segments())
    return True


def _lengths(ax: Axes, ref: Ref, lay: Layout, reading: Reading, p: Program) -> bool:
    """key < length[b], in any direction, strict or not."""
    op = ref.expr.op
    if op == "eq" or "kv_lengths" in reading.operands:
        return False
    a, b = (Ref(x, ref.dims) for x in ref.expr.args)
    if op in ("gt", "ge"):
        a, b = b, a
    pos = _affine(ax, a)
    if pos is None or {ax.flat(k): c for k, c in pos[0].items()} != {ax.flat(lay.key): 1}:
        return False
    length = narrow(p, ax, b)
    if not set(ax.of(length)) <= set(ax.flat(lay.batch)) or not length.expr.dtype.startswith(("int", "uint")):
        return False
    shift = (1 if op in ("le", "ge") else 0) - pos[1]  # position + pos[1] < length (+ 1 where equality counts)
    arr = ax.arrange(length, (lay.batch,), p.exprs)
    if arr is None:
        return False
    if shift:
        arr = _shifted(p, arr, shift, ax.extent(lay.key))
    reading.operands["kv_lengths"] = arr
    reading.terms.append(Lengths())
    return True


def _shifted(p: Program, length: Expr, shift: int, keys: int) -> Expr:
    """`length + shift` as far as a comparison with `keys` positions can tell, without wrapping around (2**31 - 1: no limit)."""
    x = p.exprs
    most = keys + abs(shift)
    if most <= np.iinfo(length.dtype).max:
        length = x.apply("min", length, x.full(most, length.shape, length.dtype))
    length = x.convert(length, "int32")
    length = x.apply("max", length, x.full(-abs(shift), length.shape, "int32"))
    return x.apply("add", length, x.full(shift, length.shape, "int32"))


def _constant(p: Program, ax: Axes, ref: Ref, lay: Layout, reading: Reading) -> bool:
    """A mask known now, that depends on positions alone: see whether it is a band."""
    ref = narrow(p, ax, ref)
    over = set(ax.of(ref))
    if not over or not over <= set(ax.flat(lay.query)) | set(ax.flat(lay.key)):
        return False
    if int(np.prod(ref.expr.shape)) > _LOOK_AT:
        return False
    data = evaluate(ref.expr, p.exprs)
    if data is None:
        return False
    t, s = ax.extent(lay.query), ax.extent(lay.key)
    const = p.exprs.make("value", (), (("id", -2),), ref.expr.shape, "bool")
    arranged = ax.arrange(Ref(const, ref.dims), (lay.query, lay.key), p.exprs)
    if arranged is None:
        return False
    grid = evaluate(arranged, p.exprs, {id(const): np.asarray(data, bool)})
    band = None if grid is None else band_of(np.broadcast_to(grid, (t, s)))
    if band is None:
        return False
    reading.terms.extend(band)
    return True


def band_of(grid: np.ndarray) -> list[Term] | None:
    """Causal and Window terms that say `grid` exactly, or None."""
    t, s = grid.shape
    if grid.all():
        return []
    rows, cols = np.nonzero(grid)
    if rows.size == 0:
        return None
    diff = cols - rows
    hi, lo = int(diff.max()), int(diff.min())
    span = np.arange(s)[None, :] - np.arange(t)[:, None]
    if not np.array_equal(grid, (span <= hi) & (span >= lo)):
        return None
    out: list[Term] = []
    if hi < s - 1:
        out.append(Causal(hi))
    if lo > -(t - 1):
        out.append(Window(-lo, None))
    return out


def tightest(terms: list[Term]) -> list[Term]:
    """The terms without those that another one implies: of several Causal the strictest, of several Windows too."""
    causal = [t.offset for t in terms if isinstance(t, Causal)]
    left = [t.left for t in terms if isinstance(t, Window) and t.left is not None and t.right is None and t.offset == 0]

    def implied(t: Term) -> bool:
        if isinstance(t, Causal):
            return t.offset > min(causal)
        return isinstance(t, Window) and t.left in left and t.right is None and t.offset == 0 and t.left != min(left)

    return [t for t in terms if not implied(t)]


def never_empty(terms: list[Term], t: int, s: int) -> bool:
    """Whether these terms are sure to leave every query a key."""
    i = np.arange(t)
    low, high = np.zeros(t, np.int64), np.full(t, s - 1)
    for term in terms:
        if isinstance(term, Causal):
            high = np.minimum(high, i + term.offset)
        elif isinstance(term, Window):
            if term.left is not None:
                low = np.maximum(low, i + term.offset - term.left)
            if term.right is not None:
                high = np.minimum(high, i + term.offset + term.right)
        else:
            return False
    return bool(np.all(low <= high)) and s > 0
