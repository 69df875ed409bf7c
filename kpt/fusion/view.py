"""Axes followed through views: what makes one pattern see every layout.

A `Ref` is an expression with a meaning for each of its dimensions: a tuple of axes, major to minor,
whose sizes multiply to the dimension's size (`()` for size 1). Going from a result to what it is made
of, a transpose permutes the tuples, a reshape regroups them, splitting an axis where it must, and a
broadcast drops the axes along which its source is constant. So after `strip`, patterns never see a
view; they see what depends on what. `arrange` goes the other way: the views that bring an expression
into the layout that a kernel wants.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from kpt.graph.expr import Expr, Exprs

Dims = tuple[tuple[int, ...], ...]
TRANSPARENT = frozenset({"reshape", "transpose", "broadcast", "convert"})


@dataclasses.dataclass(frozen=True, slots=True)
class Ref:
    """An expression, and the axes that each of its dimensions runs over."""

    expr: Expr
    dims: Dims


class Axes:
    """The axes of one match: sizes, and how an axis was split into others."""

    def __init__(self) -> None:
        self.size: list[int] = []
        self._split: dict[int, tuple[int, ...]] = {}

    def new(self, size: int) -> tuple[int, ...]:
        if size == 1:
            return ()
        self.size.append(size)
        return (len(self.size) - 1,)

    def root(self, e: Expr) -> Ref:
        """`e` with a fresh axis for each dimension."""
        return Ref(e, tuple(self.new(n) for n in e.shape))

    def flat(self, axes: Sequence[int]) -> tuple[int, ...]:
        """The axes, each replaced by what it was split into."""
        if not self._split:
            return tuple(axes)
        out: list[int] = []
        for a in axes:
            out.extend(self.flat(self._split[a]) if a in self._split else (a,))
        return tuple(out)

    def resolve(self, ref: Ref) -> Ref:
        if not self._split:
            return ref
        return Ref(ref.expr, tuple(self.flat(d) for d in ref.dims))

    def of(self, ref: Ref) -> tuple[int, ...]:
        """Every axis that `ref` runs over, in order."""
        return tuple(a for d in ref.dims for a in self.flat(d))

    def extent(self, axes: Sequence[int]) -> int:
        return math.prod(self.size[a] for a in self.flat(axes))

    def regroup(self, axes: Sequence[int], sizes: Sequence[int]) -> Dims | None:
        """`axes` dealt out in order to dimensions of these sizes, splitting an axis where it must."""
        pending = list(self.flat(axes))
        if 0 in sizes:
            return None
        out: list[tuple[int, ...]] = []
        for n in sizes:
            dim: list[int] = []
            left = n
            while left > 1:
                if not pending:
                    return None
                a = pending.pop(0)
                s = self.size[a]
                if left % s == 0:
                    dim.append(a)
                    left //= s
                elif s % left == 0:
                    major, minor = self.new(left), self.new(s // left)
                    self._split[a] = major + minor
                    dim.extend(major)
                    pending[:0] = minor
                    left = 1
                else:
                    return None
            out.append(tuple(dim))
        return None if pending else tuple(out)

    def inside(self, ref: Ref) -> Ref | None:
        """The source of one view, or None if `ref` is no view (or one that cannot be followed)."""
        e = ref.expr
        if e.op == "convert":
            a = e.args[0]
            same = _is_float(e.dtype) == _is_float(a.dtype) and "bool" not in (a.dtype, e.dtype) and not _wraps(a.dtype, e.dtype)
            return Ref(a, ref.dims) if same else None
        if e.op == "transpose":
            dims: list[tuple[int, ...]] = [()] * len(ref.dims)
            for i, p in enumerate(e["perm"]):
                dims[p] = ref.dims[i]
            return Ref(e.args[0], tuple(dims))
        if e.op == "broadcast":
            src = e.args[0]
            return Ref(src, tuple(ref.dims[d] if n == e.shape[d] else () for n, d in zip(src.shape, e["dims"], strict=True)))
        if e.op == "reshape":
            # Dropped axes are gone from ref.dims, so only a reshape of a full tensor can be regrouped.
            if any(self.extent(d) != n for d, n in zip(ref.dims, e.shape, strict=True)):
                return None
            dims_ = self.regroup([a for d in ref.dims for a in d], e.args[0].shape)
            return None if dims_ is None else Ref(e.args[0], dims_)
        return None

    def strip(self, ref: Ref, casts: bool = True) -> Ref:
        """`ref` without views (and, if `casts`, without float-to-float and int-to-int casts)."""
        while ref.expr.op in TRANSPARENT and (casts or ref.expr.op != "convert"):
            inner = self.inside(ref)
            if inner is None:
                break
            ref = inner
        return self.resolve(ref)

    def same(self, a: Ref, b: Ref) -> bool:
        return a.expr is b.expr and self.resolve(a).dims == self.resolve(b).dims

    def reduced(self, ref: Ref) -> tuple[Ref, Dims]:
        """The operand of a reduction, with fresh axes where it reduces, and those axes, one tuple a dimension."""
        e = ref.expr
        axes = e["axes"]
        dims, fresh = list(ref.dims), []
        for ax in sorted(axes):
            new = self.new(e.args[0].shape[ax])
            fresh.append(new)
            dims.insert(ax, new)
        return Ref(e.args[0], tuple(dims)), tuple(fresh)

    def dot(self, ref: Ref) -> tuple[Ref, Ref, tuple[int, ...]]:
        """Operands of a dot_general, and the fresh axes that it contracts."""
        e = ref.expr
        lhs, rhs = e.args
        lc, rc, lb, rb = e["lhs_contract"], e["rhs_contract"], e["lhs_batch"], e["rhs_batch"]
        contracted = [self.new(lhs.shape[d]) for d in lc]
        ld: dict[int, tuple[int, ...]] = dict(zip(lc, contracted, strict=True))
        rd: dict[int, tuple[int, ...]] = dict(zip(rc, contracted, strict=True))
        dims = list(ref.dims)
        for a, b in zip(lb, rb, strict=True):
            ld[a] = rd[b] = dims.pop(0)
        for i in range(len(lhs.shape)):
            if i not in ld:
                ld[i] = dims.pop(0)
        for i in range(len(rhs.shape)):
            if i not in rd:
                rd[i] = dims.pop(0)
        left = Ref(lhs, tuple(ld[i] for i in range(len(lhs.shape))))
        right = Ref(rhs, tuple(rd[i] for i in range(len(rhs.shape))))
        return left, right, tuple(a for c in contracted for a in c)

    def dot_result(self, e: Expr, lhs: Ref | None, rhs: Ref | None) -> tuple[Ref, Ref, Ref]:
        """Forward: a dot_general whose one operand has known axes. Returns (result, lhs, rhs)."""
        left = lhs or self.root(e.args[0])
        right = rhs or self.root(e.args[1])
        known, other = (left, right) if lhs else (right, left)
        other_dims = list(other.dims)
        pairs = list(zip(e["lhs_contract"], e["rhs_contract"], strict=True)) + list(
            zip(e["lhs_batch"], e["rhs_batch"], strict=True)
        )
        for a, b in pairs:
            if lhs:
                other_dims[b] = known.dims[a]
            else:
                other_dims[a] = known.dims[b]
        other = Ref(other.expr, tuple(other_dims))
        left, right = (known, other) if lhs else (other, known)
        out = [left.dims[a] for a in e["lhs_batch"]]
        out += [d for i, d in enumerate(left.dims) if i not in e["lhs_contract"] and i not in e["lhs_batch"]]
        out += [d for i, d in enumerate(right.dims) if i not in e["rhs_contract"] and i not in e["rhs_batch"]]
        return Ref(e, tuple(out)), left, right

    def arrange(self, ref: Ref, target: Sequence[Sequence[int]], x: Exprs, fill: bool = True) -> Expr | None:
        """The expression whose dimensions are `target`, each a tuple of axes.

        Axes that `ref` lacks are broadcast; with `fill=False` a dimension of which it has no axis stays 1.
        None if `ref` depends on an axis that `target` does not name.
        """
        ref = self.resolve(ref)
        groups = [self.flat(t) for t in target]
        have = self.of(ref)
        order = [a for g in groups for a in g if a in have]
        if sorted(order) != sorted(have):
            return None
        e = x.reshape(ref.expr, tuple(self.size[a] for a in have))
        e = x.transpose(e, tuple(have.index(a) for a in order))
        shape: list[int] = []
        dims: list[int] = []
        expanded = False
        for g in groups:
            keep = fill or any(a in have for a in g)
            for a in g:
                if a in have:
                    dims.append(len(shape))
                elif keep:
                    expanded = True
                if keep or a in have:
                    shape.append(self.size[a])
        if expanded:
            e = x.broadcast(e, tuple(shape), tuple(dims))
        final = tuple(math.prod(self.size[a] for a in g) if fill or any(a in have for a in g) else 1 for g in groups)
        return x.reshape(e, final)


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat"))


def _wraps(source: str, to: str) -> bool:
    """Whether a cast between integers may change numbers that occur as positions, labels or lengths."""
    if not source.startswith(("int", "uint")) or not to.startswith(("int", "uint")):
        return False
    return to not in ("int32", "int64", "uint32", "uint64") and to != source
