"""Axes followed through views, bands read off masks, activations known by their values: without a framework."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpt.errors import GraphError
from kpt.fusion.formula import activation
from kpt.fusion.mask import band_of, never_empty, tightest
from kpt.fusion.registry import FusionRegistry, default_fusion
from kpt.fusion.site import leaf_values
from kpt.fusion.view import Axes, Ref
from kpt.graph.evaluate import evaluate
from kpt.graph.expr import Exprs
from kpt.graph.graph import Graph, Node
from kpt.ops.base import Spec
from kpt.ops.mask import Causal, Lengths, Window

factorisations = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


@given(factorisations, st.data())
def test_regroup_keeps_order_and_sizes(sizes, data):
    """Axes dealt out to other dimensions have these sizes, and joined again they are the same axes, split or not."""
    ax = Axes()
    axes = tuple(a for n in sizes for a in ax.new(n))
    left, dims = math.prod(sizes), []
    while left > 1:
        dims.append(data.draw(st.sampled_from([d for d in range(2, left + 1) if left % d == 0])))
        left //= dims[-1]
    got = ax.regroup(axes, dims)
    if got is None:
        return  # 4 = 2 * 2 against 6 = 3 * 2: no common refinement
    assert [ax.extent(d) for d in got] == dims
    assert tuple(a for d in got for a in ax.flat(d)) == ax.flat(axes)


@given(st.lists(st.sampled_from([(0, 1, 2), (2, 0, 1), (1, 0, 2), "merge", "split"]), max_size=6))
def test_arrange_undoes_what_strip_followed(views):
    """Whatever the views, the source brought into the view's layout is the view."""
    x = Exprs()
    leaf = x.value(0, Spec((2, 3, 4), "float64"))
    data = np.arange(24.0).reshape(2, 3, 4)
    e = leaf
    for v in views:
        if v == "merge":
            e = x.reshape(e, (e.shape[0] * math.prod(e.shape[1:-1]), e.shape[-1]))
        elif v == "split":
            e = x.reshape(e, (2, e.shape[0] // 2, *e.shape[1:])) if e.shape[0] % 2 == 0 else e
        elif len(e.shape) == 3:
            e = x.transpose(e, v)
    ax = Axes()
    root = ax.root(e)
    inner = ax.strip(root)
    back = ax.arrange(inner, ax.resolve(root).dims, x)
    assert back is not None
    np.testing.assert_array_equal(evaluate(back, x, {id(leaf): data}), evaluate(e, x, {id(leaf): data}))


def test_strip_drops_the_axes_that_a_broadcast_adds():
    x = Exprs()
    leaf = x.value(0, Spec((3,), "float32"))
    ax = Axes()
    root = ax.root(x.broadcast(leaf, (2, 3, 4), (1,)))
    inner = ax.strip(root)
    assert inner == Ref(leaf, (root.dims[1],))


def test_arrange_refuses_an_axis_that_the_target_lacks():
    x, ax = Exprs(), Axes()
    r = ax.root(x.value(0, Spec((2, 3), "float32")))
    assert ax.arrange(r, (r.dims[0],), x) is None


@given(st.integers(1, 9), st.integers(1, 9), st.integers(-10, 10), st.integers(-10, 10))
def test_band_of_says_exactly_what_the_grid_says(t, s, lo, hi):
    span = np.arange(s)[None] - np.arange(t)[:, None]
    grid = (span >= lo) & (span <= hi)
    terms = band_of(grid)
    if terms is None:
        assert not grid.any()
        return
    again = np.ones((t, s), bool)
    for term in terms:
        again &= span <= term.offset if isinstance(term, Causal) else span >= -term.left
    np.testing.assert_array_equal(again, grid)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**36 - 1))
def test_band_of_refuses_every_other_grid(t, s, bits):
    grid = np.array([(bits >> i) & 1 for i in range(t * s)], bool).reshape(t, s)
    span = np.arange(s)[None] - np.arange(t)[:, None]
    bands = [(span >= lo) & (span <= hi) for lo in range(-t, s + 1) for hi in range(lo, s + 1)]
    assert (band_of(grid) is not None) == (grid.any() and any(np.array_equal(grid, b) for b in bands))


@given(st.integers(1, 7), st.integers(1, 7), st.integers(-8, 8), st.integers(-8, 8), st.integers(-3, 3))
def test_never_empty_is_exact_for_bands(t, s, offset, left, shift):
    span = np.arange(s)[None] - np.arange(t)[:, None]
    grid = (span <= offset) & (span >= shift - left)
    assert never_empty([Causal(offset), Window(left, None, shift)], t, s) == bool(grid.any(1).all())


def test_data_may_hide_every_key():
    assert not never_empty([Lengths()], 4, 4)


def build_activation(x, e, name):
    full = lambda c: x.full(c, e.shape, e.dtype)  # noqa: E731
    sigmoid = x.apply("logistic", e)
    match name:
        case "silu":
            return x.apply("mul", e, sigmoid)
        case "quick_gelu":
            return x.apply("mul", e, x.apply("logistic", x.apply("mul", e, full(1.702))))
        case "relu":
            return x.apply("max", e, full(0.0))
        case "relu2":
            return x.apply("square", x.apply("max", e, full(0.0)))
        case "gelu":
            inner = x.apply("erf", x.apply("mul", e, full(math.sqrt(0.5))))
            return x.apply("mul", x.apply("mul", e, full(0.5)), x.apply("add", inner, full(1.0)))
        case "tanh":
            return x.apply("tanh", e)
        case "leaky":
            return x.apply("max", e, x.apply("mul", e, full(0.01)))
        case "sine":
            return x.apply("sin", e)
    raise AssertionError(name)


@pytest.mark.parametrize(("name", "known"), [("silu", True), ("quick_gelu", True), ("relu", True), ("relu2", True), ("gelu", True),
                                             ("tanh", True), ("leaky", False), ("sine", False)])  # fmt: skip
def test_activations_are_known_by_their_values(name, known):
    x = Exprs()
    e = x.value(0, Spec((2, 3), "float32"))
    assert activation(e, build_activation(x, e, name), x) == (name if known else None)


def test_a_registered_name_is_taken():
    registry = default_fusion()
    with pytest.raises(GraphError, match="registered twice"):
        registry.register("norms", lambda p: iter(()))


def norm_graph(extra=()):
    """x * rsqrt(mean(x * x) + eps) on [4, 8], with further outputs by value id."""
    g = Graph("f")
    f = lambda *shape: g.new_value(Spec(shape, "float32"))  # noqa: E731
    x = f(4, 8)
    n, eps = f(), f()
    g.inputs, g.consts = (x,), {n: np.float32(8), eps: np.float32(1e-6)}
    sq, total, mean, plus, root, wide, out = f(4, 8), f(4), f(4), f(4), f(4), f(4, 8), f(4, 8)
    g.nodes = [
        Node("mul", (x, x), (sq,)), Node("reduce_sum", (sq,), (total,), {"axes": (1,)}), Node("div", (total, n), (mean,)),
        Node("add", (mean, eps), (plus,)), Node("rsqrt", (plus,), (root,)),
        Node("broadcast", (root,), (wide,), {"shape": (4, 8), "dims": (0,)}), Node("mul", (x, wide), (out,)),
    ]  # fmt: skip
    g.outputs = (out, *(dict(root=root, mean=mean, sq=sq)[e] for e in extra))
    return g


def test_a_norm_is_found_in_a_graph_of_any_front_end():
    _, taken, missed = default_fusion().find(norm_graph())
    assert [(m.op, m.params["out_dtype"]) for m in taken] == [("rms_norm", "float32")] and not missed


@pytest.mark.parametrize("inner", ["root"])
def test_an_inner_value_that_is_returned_keeps_the_code(inner):
    _, taken, missed = default_fusion().find(norm_graph((inner,)))
    assert not taken and ["returned" in m.reason for m in missed] == [True]


def test_what_is_read_and_its_transpose_elsewhere_are_one_leaf():
    """A product reads a weight as it lies; the array of the op is the transpose, which the program makes for something else."""
    g = Graph("f")
    f = lambda *shape: g.new_value(Spec(shape, "float32"))  # noqa: E731
    x, w, y, act, turned = f(4, 8), f(6, 8), f(4, 6), f(4, 6), f(8, 6)
    g.inputs, g.outputs = (x, w), (act, turned)
    contract = {"lhs_contract": (1,), "rhs_contract": (1,), "lhs_batch": (), "rhs_batch": (), "precision": ""}
    g.nodes = [Node("transpose", (w,), (turned,), {"perm": (1, 0)}), Node("dot_general", (x, w), (y,), contract), Node("tanh", (y,), (act,))]
    program, (match,), _ = default_fusion().find(g)
    assert match.op == "linear_act" and leaf_values(program, match) == (x, w)


def test_a_declined_match_leaves_the_reason():
    _, taken, missed = default_fusion().find(norm_graph(), lambda m: "no kernel here")
    assert not taken and [m.reason for m in missed] == ["no kernel here"]


def test_a_pattern_that_raises_costs_its_finds_only():
    """A bug in one pattern must not take the user's program down."""
    def broken(program):
        yield from ()
        raise IndexError("off by one")

    registry = FusionRegistry({"broken": broken, **default_fusion().patterns})
    _, taken, _ = registry.find(norm_graph())
    assert [m.op for m in taken] == ["rms_norm"]


def test_a_match_that_is_no_call_of_its_op_costs_itself_only():
    def wrong(program):
        for found in norms(program):
            yield dataclasses.replace(found, arrays=found.arrays | {"weight": program.exprs.full(1.0, (3,), "float32")})

    norms = default_fusion().patterns["norms"]
    _, taken, missed = FusionRegistry({"wrong": wrong}).find(norm_graph())
    assert not taken and "weight" in missed[0].reason


def test_an_implied_band_is_dropped():
    terms = [Causal(3), Window(5, None), Causal(0), Lengths(), Window(3, None), Window(2, 2)]
    assert tightest(terms) == [Causal(0), Lengths(), Window(3, None), Window(2, 2)]
