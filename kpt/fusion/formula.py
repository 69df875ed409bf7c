"""Formulas read by meaning: sums as terms, products as factors, softmax, means, activations.

`terms` and `factors` flatten nested sums and products, so that the order, grouping and spelling of
an expression (division or multiplication by the inverse, rsqrt or 1/sqrt, x*x or x**2) do not matter.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from kpt.fusion.view import Axes, Ref
from kpt.graph.evaluate import evaluate
from kpt.graph.expr import ELEMENTWISE, Expr, Exprs
from kpt.graph.normalize import boolean_behind

_MAX = 64  # parts of one sum or product; no formula of ours has more than ten


def scalar(ref: Ref) -> float | None:
    """The real number that `ref` is everywhere, or None."""
    known = ref.expr.op == "full" and ref.expr.dtype != "bool" and not ref.expr.dtype.startswith("complex")
    return float(ref.expr["value"]) if known else None


def args(ref: Ref) -> list[Ref]:
    """Operands of an elementwise op, which run over the same axes."""
    return [Ref(a, ref.dims) for a in ref.expr.args]


def terms(ax: Axes, ref: Ref, stop: Callable[[Ref], bool] = lambda r: False) -> tuple[float, list[tuple[float, Ref]]]:
    """`ref` as constant + sum of coefficient * term. A term for which `stop` holds is not opened."""
    const = 0.0
    out: list[tuple[float, Ref]] = []
    todo = [(1.0, ref)]
    while todo:
        c, r = todo.pop()
        r = ax.strip(r)
        op = r.expr.op
        value = scalar(r)
        if value is not None:
            const += c * value
        elif stop(r) or len(out) + len(todo) > _MAX:
            out.append((c, r))
        elif op == "add":
            todo += [(c, a) for a in args(r)]
        elif op == "sub":
            a, b = args(r)
            todo += [(c, a), (-c, b)]
        elif op == "neg":
            todo.append((-c, args(r)[0]))
        elif op in ("mul", "div") and (split := _scaled(ax, r)) is not None:
            todo.append((c * split[0], split[1]))
        else:
            out.append((c, r))
    return const, out[::-1]


def _scaled(ax: Axes, r: Ref) -> tuple[float, Ref] | None:
    """A product with a known scalar: (scalar, rest)."""
    a, b = args(r)
    cb = scalar(ax.strip(b))
    if cb is not None and (r.expr.op == "mul" or cb != 0):
        return (cb if r.expr.op == "mul" else 1.0 / cb), a
    ca = scalar(ax.strip(a))
    return (ca, b) if ca is not None and r.expr.op == "mul" else None


def factors(
    ax: Axes, ref: Ref, stop: Callable[[Ref], bool] = lambda r: False
) -> tuple[float, list[tuple[Fraction, Ref]]]:
    """`ref` as constant * product of factor ** power."""
    const = 1.0
    out: list[tuple[Fraction, Ref]] = []
    todo = [(Fraction(1), ref)]
    while todo:
        p, r = todo.pop()
        r = ax.strip(r)
        op = r.expr.op
        value = scalar(r)
        if value is not None:
            with np.errstate(all="ignore"):
                const *= float(np.float64(value) ** float(p))
        elif stop(r) or len(out) + len(todo) > _MAX:
            out.append((p, r))
        elif op == "mul":
            todo += [(p, a) for a in args(r)]
        elif op == "div":
            a, b = args(r)
            todo += [(p, a), (-p, b)]
        elif op == "neg" and p.denominator == 1:
            const *= (-1.0) ** int(p)
            todo.append((p, args(r)[0]))
        elif op in ("sqrt", "rsqrt"):
            todo.append((p * Fraction(1 if op == "sqrt" else -1, 2), args(r)[0]))
        elif op == "square":
            todo.append((p * 2, args(r)[0]))
        elif op == "pow" and r.expr["y"] in (-1, -0.5, 0.5, -2, 3):
            todo.append((p * Fraction(r.expr["y"]), args(r)[0]))
        else:
            out.append((p, r))
    return const, out[::-1]


def mean(ax: Axes, ref: Ref) -> tuple[Ref, tuple[int, ...]] | None:
    """(operand, axes) where `ref` is the mean of operand over one dimension: reduce_sum / n or * (1/n)."""
    c, parts = factors(ax, ref, lambda r: r.expr.op == "reduce_sum")
    if len(parts) != 1 or parts[0][0] != 1 or parts[0][1].expr.op != "reduce_sum":
        return None
    inner, fresh = ax.reduced(parts[0][1])
    if len(fresh) != 1 or abs(c * ax.extent(fresh[0]) - 1.0) > 1e-6:
        return None
    return ax.strip(inner), fresh[0]


@dataclasses.dataclass(frozen=True)
class Softmax:
    """softmax(scores) over one axis.

    Attributes:
      inner: values on the way.
      hides: booleans of the scores' shape; where one is false, the exponential does not count, as if its score were -inf.
      summed: booleans that the sum alone heeds.
      zeroed: booleans that the weights alone heed.
    """

    scores: Expr
    axis: int
    inner: tuple[Expr, ...]
    hides: tuple[Expr, ...] = ()
    summed: tuple[Expr, ...] = ()
    zeroed: tuple[Expr, ...] = ()


def softmax(e: Expr, exprs: Exprs) -> Softmax | None:
    """`e` as a softmax over one axis, in any spelling.

    The shift before exp may be anything constant along the axis: softmax does not depend on it.
    """
    ax = Axes()
    root = ax.root(e)
    if e.op == "exp":
        found = _exp_of_log_softmax(ax, root)
        return None if found is None else Softmax(*found)
    if e.op in ("div", "mul"):
        num, den = args(root)
        for n, d in ((num, den), (den, num)) if e.op == "mul" else ((num, den),):
            n, d = ax.strip(n), ax.strip(d)
            if e.op == "mul":  # exp * (1 / sum)
                c, parts = factors(ax, d, lambda r: r.expr.op == "reduce_sum")
                if c != 1.0 or len(parts) != 1 or parts[0][0] != -1:
                    continue
                d = parts[0][1]
            if d.expr.op != "reduce_sum" or len(d.expr["axes"]) != 1:
                continue
            above, below = _masked_exp(ax, n, exprs), _masked_exp(ax, ax.reduced(d)[0], exprs)
            if above is None or below is None:
                continue
            exp = above[0].expr
            axis = _aligned(ax, above[0], below[0], exp)
            if axis is not None:
                both = tuple(m for m in above[1] if m in below[1])
                summed, zeroed = (tuple(m for m in ms if m not in both) for ms in (below[1], above[1]))
                return Softmax(_unshifted(ax, exp, axis), axis, (exp,), both, summed, zeroed)
    return None


def _masked_exp(ax: Axes, r: Ref, exprs: Exprs) -> tuple[Ref, list[Expr]] | None:
    """(exponential, booleans of its shape) where `r` is an exponential put to 0 where one of the booleans is false."""
    keeps: list[Ref] = []
    r = ax.strip(r)
    for _ in range(4):
        if r.expr.op == "exp":
            same = all(ax.resolve(k).dims == r.dims for k in keeps)
            return (r, [k.expr for k in keeps]) if same else None
        kept = zeroed(ax, r, exprs)
        if kept is None:
            return None
        keeps.append(kept[0])
        r = ax.strip(kept[1])
    return None


def zeroed(ax: Axes, r: Ref, exprs: Exprs) -> tuple[Ref, Ref] | None:
    """(boolean, value) where `r` is value, or 0 where the boolean is false."""
    if r.expr.op == "select" and scalar(ax.strip(args(r)[2])) == 0:
        return args(r)[0], args(r)[1]
    if r.expr.op == "mul":
        for a, b in (args(r), args(r)[::-1]):
            keep = boolean_behind(b.expr, exprs)
            if keep is not None:
                return Ref(keep, r.dims), a
    return None


def sum_of_exp(ax: Axes, r: Ref) -> tuple[Ref, tuple[int, ...]] | None:
    """(exp, the fresh axis summed over) where `r` sums an exponential over one dimension."""
    if r.expr.op != "reduce_sum" or len(r.expr["axes"]) != 1:
        return None
    inner, fresh = ax.reduced(r)
    inner = ax.strip(inner)
    return (inner, fresh[0]) if inner.expr.op == "exp" else None


def unshifted(ax: Axes, r: Ref, axis: tuple[int, ...]) -> tuple[Ref, list[tuple[float, Ref]]]:
    """`r` as base + sum of coefficient * shift, the shifts constant along `axis`."""
    shifts: list[tuple[float, Ref]] = []
    r = ax.strip(r)
    while r.expr.op in ("add", "sub"):
        a, b = args(r)
        over = set(ax.flat(axis))
        if not set(ax.of(ax.strip(b))) & over:
            keep, drop, sign = a, b, 1.0 if r.expr.op == "add" else -1.0
        elif r.expr.op == "add" and not set(ax.of(ax.strip(a))) & over:
            keep, drop, sign = b, a, 1.0
        else:
            break
        const, parts = terms(ax, drop)
        if const:
            break
        shifts += [(sign * c, p) for c, p in parts]
        r = ax.strip(keep)
    return r, shifts


def still(ax: Axes, r: Ref) -> Ref:
    """`r` without views, casts and stop_gradient."""
    r = ax.strip(r)
    while r.expr.op == "stop_gradient":
        r = ax.strip(args(r)[0])
    return r


def cancel(ax: Axes, parts: list[tuple[float, Ref]]) -> bool:
    """Whether a sum of shifts is zero, whatever the shifts are."""
    left = [(c, still(ax, r), _moves(ax, r)) for c, r in parts]
    while left:
        _, r, _ = left[0]
        same = [(k, moves) for k, q, moves in left if ax.same(q, r)]
        # The value, and apart from it the gradient: what stop_gradient holds back cancels nothing there.
        if abs(sum(k for k, _ in same)) > 1e-6 or abs(sum(k for k, moves in same if moves)) > 1e-6:
            return False
        left = [part for part in left if not ax.same(part[1], r)]
    return True


def _moves(ax: Axes, r: Ref) -> bool:
    """Whether a gradient passes through the views on the way to what `still` gives."""
    return ax.strip(r).expr.op != "stop_gradient"


def _exp_of_log_softmax(ax: Axes, root: Ref) -> tuple[Expr, int, tuple[Expr, ...]] | None:
    """exp(z - log(sum(exp(z)))), with any shift inside the sum that is added again outside."""
    z = ax.strip(args(root)[0])
    for i, d in enumerate(ax.resolve(z).dims):
        if not d:
            continue
        base, shifts = unshifted(ax, z, d)
        logs = [(c, r) for c, r in shifts if r.expr.op == "log"]
        if len(logs) != 1 or logs[0][0] != -1:
            continue
        total = sum_of_exp(ax, ax.strip(args(logs[0][1])[0]))
        if total is None:
            continue
        exp, over = total
        inner, inside = unshifted(ax, args(exp)[0], over)
        axis = _aligned(ax, base, inner, base.expr)
        rest = [(c, r) for c, r in shifts if r is not logs[0][1]]
        if axis is not None and base.dims[axis] == ax.resolve(z).dims[i] and cancel(ax, rest + [(-c, r) for c, r in inside]):
            return base.expr, axis, (exp.expr,)
    return None


def _aligned(ax: Axes, a: Ref, b: Ref, e: Expr) -> int | None:
    """The one dimension in which two readings of `e` differ: the reduced one."""
    if a.expr is not e or b.expr is not e:
        return None
    a, b = ax.resolve(a), ax.resolve(b)
    differ = [i for i, (x, y) in enumerate(zip(a.dims, b.dims, strict=True)) if x != y]
    return differ[0] if len(differ) == 1 else None


def _unshifted(ax: Axes, exp: Expr, axis: int) -> Expr:
    """scores of exp(scores - shift), where the shift is constant along the axis."""
    z = exp.args[0]
    while z.op == "convert":
        z = z.args[0]
    if z.op != "sub":
        return z
    own = Axes()
    root = own.root(z)
    shift = own.strip(Ref(z.args[1], root.dims))
    return z if set(own.flat(root.dims[axis])) & set(own.of(shift)) else z.args[0]


def strip_shape(e: Expr) -> Expr:
    """`e` without casts and stop_gradient."""
    while e.op in ("convert", "stop_gradient"):
        e = e.args[0]
    return e


# Activations are recognised by what they do, not by how they are written: a unary elementwise formula
# is evaluated in float64 on these points and compared with the table.
_POINTS = np.concatenate([np.linspace(-9, 9, 73), [-0.3, 1e-3, 0.7, 2.5]])
# Where a clip, a threshold or a test for NaN shows that no random input reaches.
_FAR = np.concatenate([s * np.logspace(1.1, 6, 30) for s in (-1.0, 1.0)] + [[-np.inf, np.inf, np.nan]])
_ALL = np.concatenate([_POINTS, _FAR])


@functools.cache
def _table() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    from kpt.ops.activations import ACTIVATIONS

    with np.errstate(all="ignore"):
        return {name: (np.asarray(fn(_POINTS)), np.asarray(fn(_FAR))) for name, (fn, _) in ACTIVATIONS.items()}


def activation(source: Expr, e: Expr, exprs: Exprs) -> str | None:
    """The name of the activation f where `e` = f(source) elementwise, or None."""
    if e is source or not _elementwise_in((source,), e, 40):
        return None
    probe, f = _abstracted((source,), e, exprs)
    if id(f) not in exprs.activations:
        exprs.activations[id(f)] = _named(evaluate(f, exprs, {id(probe[0]): _ALL}), probe, f)
    return exprs.activations[id(f)]


def gate(source: Expr, up: Expr, e: Expr, exprs: Exprs) -> str | None:
    """The name of the activation f where `e` = f(source) * up elementwise, or None."""
    if not _elementwise_in((source, up), e, 40):
        return None
    probes, f = _abstracted((source, up), e, exprs)
    if id(f) not in exprs.activations:
        one, *others = (evaluate(f, exprs, {id(probes[0]): _ALL, id(probes[1]): np.full_like(_ALL, u)}) for u in (1.0, -0.5, 3.0))
        near = slice(len(_POINTS))
        linear = one is not None and all(
            other is not None and np.allclose(other[near], u * one[near], 1e-9, 1e-9)
            for u, other in zip((-0.5, 3.0), others, strict=True)
        )
        exprs.activations[id(f)] = _named(one, probes, f) if linear else None
    return exprs.activations[id(f)]


def _named(values: np.ndarray | None, sources: tuple[Expr, ...], e: Expr) -> str | None:
    """The activation with these values at `_POINTS` and `_FAR`."""
    if values is None:
        return None
    got, far = np.split(values, [len(_POINTS)])
    if _replaces_nan(sources, e, far):
        return None
    # Constants in the code are rounded to float32 or bfloat16: 0.7978846 for sqrt(2/pi) is 3e-8 off, bfloat16's 4e-3.
    tol = 2e-6 if e.dtype in ("float32", "float64") else 2e-2
    best, error = None, tol
    for name, (want, want_far) in _table().items():
        worst = float(np.max(np.abs(got - want) / (1.0 + np.abs(want))))
        if worst < error and _same_far_out(far, want_far, tol):
            best, error = name, worst
    return best


def _same_far_out(got: np.ndarray, want: np.ndarray, tol: float) -> bool:
    """Whether two activations agree at `_FAR`. A formula may overflow there where the activation does not: log(1 + exp(x))."""
    with np.errstate(all="ignore"):
        near = np.abs(got - want) <= tol * (1.0 + np.abs(want))
    same = near | (got == want) | ~np.isfinite(got) | (np.isinf(_FAR) & np.isnan(want)) | np.isnan(_FAR)
    return bool(np.all(same))


def _replaces_nan(sources: tuple[Expr, ...], e: Expr, far: np.ndarray) -> bool:
    """Whether `e` asks for NaN and gives something else. where(x > 0, x, 0) gives 0 without asking, and is a relu."""
    if np.all(np.isnan(far[np.isnan(_FAR)])):
        return False
    todo, seen = [e], set(map(id, sources))
    while todo:
        x = todo.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if x.op in ("ne", "eq", "is_finite"):
            return True
        todo.extend(x.args)
    return False


def _elementwise_in(sources: tuple[Expr, ...], e: Expr, budget: int) -> bool:
    """Whether `e` is elementwise in all of `sources` and scalars alone, of one shape throughout."""
    todo, seen, found = [e], set(), 0
    while todo:
        x = todo.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if any(x is s for s in sources):
            found += 1
            continue
        if len(seen) > budget or x.shape != e.shape:
            return False
        if x.op == "full":
            continue
        if x.op not in ELEMENTWISE or x.op == "stop_gradient":
            return False
        todo.extend(x.args)
    return found == len(sources)


def _abstracted(sources: tuple[Expr, ...], e: Expr, exprs: Exprs) -> tuple[tuple[Expr, ...], Expr]:
    """`e` as a formula of probes in the place of the sources, at the points of `_ALL`: the same for equal code elsewhere."""
    shape = _ALL.shape
    probes = tuple(exprs.make("value", (), (("id", -11 - i),), shape, s.dtype) for i, s in enumerate(sources))
    memo: dict[int, Expr] = {id(s): probe for s, probe in zip(sources, probes, strict=True)}

    def at_points(x: Expr) -> Expr:
        if id(x) not in memo:
            if x.op == "full":
                memo[id(x)] = exprs.full(x["value"], shape, x.dtype)
            else:
                memo[id(x)] = exprs.make(x.op, tuple(at_points(a) for a in x.args), x.attrs, shape, x.dtype)
        return memo[id(x)]

    return probes, at_points(e)