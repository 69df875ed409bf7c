"""From a graph to normalised expressions: rewriting as data, run by one engine.

A rule is a function from an expression to an equal, simpler one (same shape, same dtype), or None.
`RULES` lists them by the op they look at. Arguments are already normal when a rule sees their user,
so one pass in program order reaches the normal form; a result is looked at again until no rule fires.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kpt.graph.evaluate import evaluate
from kpt.graph.expr import ELEMENTWISE, Expr, Exprs, is_full
from kpt.graph.graph import Graph

Rule = Callable[[Expr, Exprs], Expr | None]
RULES: dict[str, list[Rule]] = {}


def rule(*ops: str) -> Callable[[Rule], Rule]:
    def register(fn: Rule) -> Rule:
        for op in ops:
            RULES.setdefault(op, []).append(fn)
        return fn

    return register


def simplify(e: Expr, exprs: Exprs) -> Expr:
    """`e` after every rule that applies to it."""
    for _ in range(32):  # a bound on rule ping-pong; no chain of ours is longer than three
        for fn in RULES.get(e.op, ()):
            new = fn(e, exprs)
            if new is not None and new is not e:
                e = new
                break
        else:
            return e
    return e


def _split(x: Exprs, args: tuple[Expr, ...], attrs: Mapping[str, Any]) -> list[Expr]:
    """Consecutive pieces along one axis."""
    (a,) = args
    out, start = [], 0
    for size in attrs["sizes"]:
        begin, end = [0] * len(a.shape), list(a.shape)
        begin[attrs["axis"]], end[attrs["axis"]] = start, start + size
        out.append(x.slice(a, tuple(begin), tuple(end), (1,) * len(begin)))
        start += size
    return out


def _unstack(x: Exprs, args: tuple[Expr, ...], attrs: Mapping[str, Any]) -> list[Expr]:
    (a,) = args
    axis = attrs["axis"]
    shape = a.shape[:axis] + a.shape[axis + 1 :]
    return [x.reshape(e, shape) for e in _split(x, args, {"axis": axis, "sizes": (1,) * a.shape[axis]})]


def _stack(x: Exprs, args: tuple[Expr, ...], attrs: Mapping[str, Any]) -> list[Expr]:
    axis = attrs["axis"]
    parts = tuple(x.reshape(a, (*a.shape[:axis], 1, *a.shape[axis:])) for a in args)
    shape = (*args[0].shape[:axis], len(args), *args[0].shape[axis:])
    return [x.make("concatenate", parts, (("axis", axis),), shape, args[0].dtype)]


def _tile(x: Exprs, args: tuple[Expr, ...], attrs: Mapping[str, Any]) -> list[Expr]:
    (a,) = args
    wide = tuple(n for pair in zip(attrs["reps"], a.shape, strict=True) for n in pair)
    e = x.broadcast(a, wide, tuple(range(1, len(wide), 2)))
    return [x.reshape(e, tuple(r * n for r, n in zip(attrs["reps"], a.shape, strict=True)))]


# Ops that are compositions of others.
_COMPOSED: dict[str, Callable[[Exprs, tuple[Expr, ...], Mapping[str, Any]], list[Expr]]] = {
    "split": _split, "stack": _stack, "unstack": _unstack, "tile": _tile,
}  # fmt: skip


def normalize(graph: Graph) -> tuple[Exprs, dict[int, Expr]]:
    """Expressions of every value of `graph`: the table, and value id -> normal form."""
    exprs = Exprs()
    env: dict[int, Expr] = {}
    for v in graph.inputs:
        env[v] = exprs.value(v, graph.specs[v])
    for v, data in graph.consts.items():
        spec = graph.specs[v]
        if spec.shape == () and np.ndim(data) == 0 and spec.dtype != "key":
            env[v] = exprs.full(np.asarray(data).item(), (), spec.dtype)
        else:
            env[v] = simplify(exprs.const(v, spec, data), exprs)
            env[v].origins.append(v)
    for n in graph.nodes:
        args = tuple(env[v] for v in n.inputs)
        if n.op in _COMPOSED:
            for v, e in zip(n.outputs, _COMPOSED[n.op](exprs, args, n.attrs), strict=True):
                env[v] = simplify(e, exprs)
                if env[v].op != "full":
                    env[v].origins.append(v)
            continue
        if len(n.outputs) != 1 or n.op.startswith("opaque:") or n.bodies or n.effect:
            for v in n.outputs:
                env[v] = exprs.value(v, graph.specs[v])
            continue
        (v,) = n.outputs
        spec = graph.specs[v]
        if n.op in ELEMENTWISE:  # operands of size 1 (and scalars) spread over the result: say so
            args = tuple(a if a.shape == spec.shape else _spread(exprs, a, spec.shape) for a in args)
        e = exprs.make(n.op, args, tuple(sorted(n.attrs.items())), spec.shape, spec.dtype)
        e = simplify(e, exprs)
        if e.op != "full":
            e.origins.append(v)
        env[v] = e
    return exprs, env


def _spread(exprs: Exprs, a: Expr, shape: tuple[int, ...]) -> Expr:
    dims = tuple(range(len(shape))) if len(a.shape) == len(shape) else ()
    return exprs.broadcast(a, shape, dims)


@rule(*ELEMENTWISE)
def fold_scalars(e: Expr, x: Exprs) -> Expr | None:
    """f(c, ...) of scalars known everywhere is a scalar."""
    if not all(a.op == "full" for a in e.args):
        return None
    got = evaluate(x.make(e.op, tuple(x.full(a["value"], (), a.dtype) for a in e.args), e.attrs, (), e.dtype), x, floats=None)
    return None if got is None else x.full(np.asarray(got).item(), e.shape, e.dtype)


@rule("identity")
def drop_copy(e: Expr, x: Exprs) -> Expr | None:
    return e.args[0]


@rule("convert", "transpose", "broadcast", "reshape")
def drop_identity(e: Expr, x: Exprs) -> Expr | None:
    """A view or cast that changes nothing."""
    (a,) = e.args
    if a.op == "full":
        return x.full(_cast(a["value"], e.dtype), e.shape, e.dtype) if e.op != "convert" else None
    if e.op == "transpose" and e["perm"] != tuple(range(len(e.shape))):
        return None
    return a if a.shape == e.shape and a.dtype == e.dtype else None


def _cast(value: float, dtype: str) -> float | int | bool:
    return bool(value) if dtype == "bool" else value


@rule("reshape")
def merge_reshapes(e: Expr, x: Exprs) -> Expr | None:
    """reshape(reshape(a)) = reshape(a)."""
    (a,) = e.args
    return x.reshape(a.args[0], e.shape) if a.op == "reshape" else None


@rule("transpose")
def merge_transposes(e: Expr, x: Exprs) -> Expr | None:
    (a,) = e.args
    return x.transpose(a.args[0], tuple(a["perm"][p] for p in e["perm"])) if a.op == "transpose" else None


@rule("slice")
def drop_full_slice(e: Expr, x: Exprs) -> Expr | None:
    (a,) = e.args
    if a.op == "full":
        return x.full(a["value"], e.shape, e.dtype)
    return a if a.shape == e.shape and all(s == 1 for s in e["stride"]) else None


@rule("dynamic_slice")
def static_slice(e: Expr, x: Exprs) -> Expr | None:
    """dynamic_slice at known starts is a slice, clamped as XLA clamps."""
    if not all(a.op == "full" for a in e.args[1:]):
        return None
    src = e.args[0]
    start = tuple(
        min(max(int(a["value"]), 0), n - m) for a, n, m in zip(e.args[1:], src.shape, e.shape, strict=True)
    )
    limit = tuple(s + m for s, m in zip(start, e.shape, strict=True))
    return simplify(x.slice(src, start, limit, (1,) * len(start)), x)


@rule("mul")
def mul_one(e: Expr, x: Exprs) -> Expr | None:
    a, b = e.args
    if a is b:
        return x.make("square", (a,), (), e.shape, e.dtype)
    if is_full(b, 1) and a.shape == e.shape:
        return a
    return b if is_full(a, 1) and b.shape == e.shape else None


@rule("add")
def add_zero(e: Expr, x: Exprs) -> Expr | None:
    a, b = e.args
    if is_full(b, 0) and a.shape == e.shape:
        return a
    return b if is_full(a, 0) and b.shape == e.shape else None


@rule("sub", "div", "power")
def right_identity(e: Expr, x: Exprs) -> Expr | None:
    a, b = e.args
    if e.op == "power" and b.op == "full":
        return simplify(x.make("pow", (a,), (("y", b["value"]),), e.shape, e.dtype), x)
    return a if is_full(b, 0 if e.op == "sub" else 1) else None


@rule("pow")
def square(e: Expr, x: Exprs) -> Expr | None:
    if e["y"] == 1:
        return e.args[0]
    return x.make("square", e.args, (), e.shape, e.dtype) if e["y"] == 2 else None


@rule("max", "min")
def bound_at_infinity(e: Expr, x: Exprs) -> Expr | None:
    """max(x, -inf) = x, min(x, inf) = x."""
    a, b = e.args
    limit = -np.inf if e.op == "max" else np.inf
    if is_full(a, limit):
        return b
    return a if is_full(b, limit) else None


@rule("and", "or")
def boolean_identity(e: Expr, x: Exprs) -> Expr | None:
    if e.dtype != "bool":
        return None
    neutral = e.op == "and"
    for a, b in (e.args, e.args[::-1]):
        if a.op == "full":
            return b if bool(a["value"]) == neutral else x.full(not neutral, e.shape, "bool")
    return e.args[0] if e.args[0] is e.args[1] else None


@rule("not")
def double_negation(e: Expr, x: Exprs) -> Expr | None:
    """not(not p) = p, and a negated integer comparison is the opposite comparison."""
    (a,) = e.args
    if a.op == "not":
        return a.args[0]
    flip = {"ge": "lt", "lt": "ge", "gt": "le", "le": "gt", "eq": "ne", "ne": "eq"}.get(a.op)
    if flip and not a.args[0].dtype.startswith(("float", "bfloat")):
        return simplify(x.make(flip, a.args, (), e.shape, e.dtype), x)
    return None


@rule("select")
def known_select(e: Expr, x: Exprs) -> Expr | None:
    """select(true, a, b) = a; select(not p, a, b) = select(p, b, a); a select of booleans is and/or."""
    p, a, b = e.args
    if p.op == "full" and a.shape == e.shape:
        return a if p["value"] else b
    if p.op == "not":
        return simplify(x.make("select", (p.args[0], b, a), (), e.shape, e.dtype), x)
    if a is b:
        return a
    if e.dtype == "bool" and p.shape == e.shape:
        if is_full(b, False):
            return simplify(x.make("and", (p, a), (), e.shape, "bool"), x)
        if is_full(a, True):
            return simplify(x.make("or", (p, b), (), e.shape, "bool"), x)
        if is_full(a, False) and is_full(b, True):
            return simplify(x.make("not", (p,), (), e.shape, "bool"), x)
    return None


@rule("ne", "gt", "eq", "ge", "lt")
def boolean_as_number(e: Expr, x: Exprs) -> Expr | None:
    """A boolean written as a number and read back: (p as 0/1) != 0, > 0, >= 1, == 1 is p; == 0, < 1 is not p."""
    a, b = e.args
    if b.op != "full":
        return None
    p = _boolean_behind(a, x)
    if p is None:
        return None
    c = b["value"]
    if (e.op, c) in (("ne", 0), ("gt", 0), ("eq", 1), ("ge", 1), ("gt", 0.5)):
        return p
    if (e.op, c) in (("eq", 0), ("ne", 1), ("lt", 1), ("lt", 0.5)):
        return simplify(x.make("not", (p,), (), e.shape, "bool"), x)
    return None


def _boolean_behind(a: Expr, x: Exprs) -> Expr | None:
    """The boolean whose 0/1 number `a` is, through casts, products of such, and views."""
    if a.dtype == "bool":
        return a
    if a.op == "convert":
        return _boolean_behind(a.args[0], x)
    if a.op in ("mul", "min"):
        p, q = (_boolean_behind(b, x) for b in a.args)
        return None if p is None or q is None else simplify(x.make("and", (p, q), (), a.shape, "bool"), x)
    if a.op in ("broadcast", "reshape", "transpose", "slice"):
        p = _boolean_behind(a.args[0], x)
        return None if p is None else x.make(a.op, (p,), a.attrs, a.shape, "bool")
    if a.op == "full" and a["value"] in (0, 1):
        return x.full(bool(a["value"]), a.shape, "bool")
    if a.op == "select":
        p, q = (_boolean_behind(b, x) for b in a.args[1:])
        return None if p is None or q is None else simplify(x.make("select", (a.args[0], p, q), (), a.shape, "bool"), x)
    if a.op == "sub" and is_full(a.args[0], 1):
        p = _boolean_behind(a.args[1], x)
        return None if p is None else simplify(x.make("not", (p,), (), a.shape, "bool"), x)
    return None


boolean_behind = _boolean_behind


@rule("convert")
def number_to_boolean(e: Expr, x: Exprs) -> Expr | None:
    """A boolean that went through numbers and came back."""
    if e.dtype != "bool" or e.args[0].dtype == "bool":
        return None
    return _boolean_behind(e.args[0], x)


@rule("dot_general")
def sum_of_squares(e: Expr, x: Exprs) -> Expr | None:
    """A product of x with itself along every dimension that stays: sum(x * x)."""
    a, b = e.args
    contract = e["lhs_contract"]
    batch = e["lhs_batch"]
    same = a is b and contract == e["rhs_contract"] and batch == e["rhs_batch"]
    if not same or len(batch) + len(contract) != len(a.shape) or not contract or e.dtype != a.dtype:
        return None
    total = x.make("reduce_sum", (x.make("square", (a,), (), a.shape, a.dtype),), (("axes", tuple(sorted(contract))),),
                   tuple(n for d, n in enumerate(a.shape) if d not in contract), e.dtype)  # fmt: skip
    order = sorted(batch)
    return x.transpose(total, tuple(order.index(d) for d in batch))


_SMALL = 4096  # elements of a factor that is evaluated to see whether it is 1 everywhere


@rule("dot_general")
def product_with_ones(e: Expr, x: Exprs) -> Expr | None:
    """A product that sums nothing, with ones (a head mask that masks no head), is the other operand spread out."""
    if e["lhs_contract"]:
        return None
    for ones, other, mine, theirs, first in ((e.args[0], e.args[1], "lhs_batch", "rhs_batch", False),
                                             (e.args[1], e.args[0], "rhs_batch", "lhs_batch", True)):  # fmt: skip
        if other.dtype != e.dtype or int(np.prod(ones.shape)) > _SMALL:
            continue
        value = evaluate(ones, x)
        if value is None or not np.all(value == 1):
            continue
        batch = e[theirs]
        free = [d for d in range(len(other.shape)) if d not in batch]
        start = len(batch) + (0 if first else len(ones.shape) - len(e[mine]))
        place = {d: i for i, d in enumerate(batch)} | {d: start + i for i, d in enumerate(free)}
        order = tuple(sorted(place, key=lambda d: place[d]))
        turned = simplify(x.transpose(other, order), x)
        return simplify(x.broadcast(turned, e.shape, tuple(place[d] for d in order)), x)
    return None


def _never_negative(e: Expr) -> bool:
    if e.dtype.startswith("complex"):
        return False
    if e.op in ("exp", "square", "abs", "logistic"):
        return True
    if e.op == "select":
        return all(is_full(a, 0) or _never_negative(a) for a in e.args[1:])
    if e.op in ("div", "mul") and e.args[1].op == "full" and e.args[1]["value"] > 0:
        return _never_negative(e.args[0])
    return e.op in ("reduce_sum", "reduce_max", "broadcast", "reshape", "transpose", "convert") and _never_negative(e.args[0])


@rule("real", "imag")
def part_of_complex(e: Expr, x: Exprs) -> Expr | None:
    """Real and imaginary part of a sum, a product, an exponential, a view: formulas of the parts, without complex numbers."""
    (a,) = e.args
    real = e.op == "real"
    if a.op == "complex":
        return a.args[0 if real else 1]
    if a.op == "full":
        value = complex(a["value"])
        return x.full(value.real if real else value.imag, e.shape, e.dtype)

    def part(op: str, b: Expr) -> Expr:
        return simplify(x.make(op, (b,), (), b.shape, e.dtype), x)

    def apply(op: str, *args: Expr) -> Expr:
        return simplify(x.make(op, args, (), e.shape, e.dtype), x)

    def product(b: Expr, c: Expr) -> Expr:
        return x.full(0.0, e.shape, e.dtype) if is_full(b, 0) or is_full(c, 0) else apply("mul", b, c)

    if a.op == "convert":
        b = a.args[0]
        if b.dtype.startswith("complex"):
            return None if b.dtype != a.dtype else part(e.op, b)
        return x.convert(b, e.dtype) if real else x.full(0.0, e.shape, e.dtype)
    if a.op in ("broadcast", "reshape", "transpose", "slice"):
        return simplify(x.make(a.op, (part(e.op, a.args[0]),), a.attrs, e.shape, e.dtype), x)
    if a.op in ("add", "sub"):
        return apply(a.op, *(part(e.op, b) for b in a.args))
    if a.op in ("neg", "stop_gradient"):
        return apply(a.op, part(e.op, a.args[0]))
    if a.op == "mul":
        (p, q), (r, s) = ((part("real", b), part("imag", b)) for b in a.args)
        return apply("sub", product(p, r), product(q, s)) if real else apply("add", product(p, s), product(q, r))
    if a.op == "exp":
        size, turn = part("real", a.args[0]), part("imag", a.args[0])
        turned = apply("cos" if real else "sin", turn)
        return turned if is_full(size, 0) else product(apply("exp", size), turned)
    return None


@rule("square")
def square_of_root(e: Expr, x: Exprs) -> Expr | None:
    """A standard deviation squared is the variance again."""
    (a,) = e.args
    return a.args[0] if a.op == "sqrt" and _never_negative(a.args[0]) else None


@rule("abs")
def abs_of_positive(e: Expr, x: Exprs) -> Expr | None:
    """jax's logsumexp takes the absolute value of a sum of exponentials."""
    return e.args[0] if _never_negative(e.args[0]) else None


_INDICES = 1 << 16  # elements of an index array that is evaluated to see whether it counts evenly


@rule("gather")
def gather_is_slice(e: Expr, x: Exprs) -> Expr | None:
    """x[..., 0], x[:, 2:5] or x[..., ::2] written as a gather at known places is a slice."""
    src, idx = e.args
    if e["operand_batch"] or not idx.shape or int(np.prod(idx.shape)) > _INDICES:
        return None
    known = evaluate(idx, x)
    if known is None or known.size == 0:
        return None
    sizes, n = e["sizes"], int(np.prod(idx.shape[:-1]))
    start, limit, stride = [0] * len(sizes), list(sizes), [1] * len(sizes)
    walked = None  # the dimension along which the indices count: start, start + stride, ...
    for d, column in zip(e["index_map"], np.asarray(known).astype(np.int64).reshape(n, -1).T, strict=True):
        step = int(column[1] - column[0]) if n > 1 else 0
        if step < 0 or (step and (walked is not None or d not in e["collapsed"])) or np.any(np.diff(column) != step):
            return None
        if column[0] < 0 or column[-1] + sizes[d] > src.shape[d]:
            return None
        start[d], limit[d], stride[d] = int(column[0]), int(column[-1]) + sizes[d], step or 1
        walked = d if step else walked
    if n > 1 and walked is None:
        return None
    cut = simplify(x.slice(src, tuple(start), tuple(limit), tuple(stride)), x)
    kept = [d for d in range(len(sizes)) if d not in e["collapsed"]]
    if walked is None:
        return simplify(x.reshape(cut, e.shape), x)
    if len(e.shape) != len(kept) + 1:
        return None
    # The walked dimension goes where the result has its one dimension that is no offset.
    (place,) = set(range(len(e.shape))) - set(e["offset_dims"])
    order = [*kept[:place], walked, *kept[place:]]
    both = sorted(order)
    flat = simplify(x.reshape(cut, tuple(cut.shape[d] for d in both)), x)
    return simplify(x.transpose(flat, tuple(both.index(d) for d in order)), x)


@rule("const")
def counting_constant(e: Expr, x: Exprs) -> Expr | None:
    """The constant array [c, c + 1, ...] is positions: jnp.array(range(n)), np.arange(n)."""
    if len(e.shape) != 1 or e.dtype not in ("int32", "int64") or not 1 < e.shape[0] <= _INDICES:
        return None
    data = np.asarray(x.consts[e["key"]]).astype(np.int64)
    if np.any(np.diff(data) != 1):
        return None
    count = x.make("iota", (), (("dimension", 0),), e.shape, e.dtype)
    return count if data[0] == 0 else x.apply("add", count, x.full(int(data[0]), e.shape, e.dtype))
