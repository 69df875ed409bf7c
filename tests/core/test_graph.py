"""The neutral graph and its normaliser, without a framework."""



from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpt.graph.evaluate import evaluate
from kpt.graph.expr import Exprs
from kpt.graph.graph import Graph, Node, pretty
from kpt.graph.normalize import normalize, simplify
from kpt.ops.base import Spec


def program(*nodes, inputs=(((4, 6), "float32"),), consts=()):
    """A graph of (op, inputs, shape, dtype, attributes); values are numbered inputs, constants, then results."""
    g = Graph("f")
    g.inputs = tuple(g.new_value(Spec(*spec)) for spec in inputs)
    for data in consts:
        data = np.asarray(data)
        g.consts[g.new_value(Spec(data.shape, data.dtype.name))] = data
    for op, ins, shape, dtype, attrs in nodes:
        outs = (g.new_value(Spec(shape, dtype)),) if not isinstance(shape, list) else tuple(g.new_value(Spec(s, dtype)) for s in shape)
        g.nodes.append(Node(op, ins, outs, attrs, source="model.py:3 (f)"))
    g.outputs = g.nodes[-1].outputs
    return g


F, I, P = "float32", "int32", "bool"  # noqa: E741
A = (4, 6)
ONE, ZERO, INF = np.float32(1), np.float32(0), np.float32(-np.inf)

# name: (nodes, further arguments of program, what value the last one becomes, by id)
SAME = {
    "x * 1": ([("mul", (0, 1), A, F, {})], {"consts": [ONE]}, 0),
    "1 * x": ([("mul", (1, 0), A, F, {})], {"consts": [ONE]}, 0),
    "x + 0": ([("add", (0, 1), A, F, {})], {"consts": [ZERO]}, 0),
    "x - 0": ([("sub", (0, 1), A, F, {})], {"consts": [ZERO]}, 0),
    "x / 1": ([("div", (0, 1), A, F, {})], {"consts": [ONE]}, 0),
    "x ** 1": ([("pow", (0,), A, F, {"y": 1})], {}, 0),
    "max(x, -inf)": ([("max", (1, 0), A, F, {})], {"consts": [INF]}, 0),
    "a cast to the same dtype": ([("convert", (0,), A, F, {"dtype": F})], {}, 0),
    "a copy": ([("identity", (0,), A, F, {})], {}, 0),
    "reshape there and back": ([("reshape", (0,), (24,), F, {"shape": (24,)}), ("reshape", (1,), A, F, {"shape": A})], {}, 0),
    "transpose there and back": (
        [("transpose", (0,), (6, 4), F, {"perm": (1, 0)}), ("transpose", (1,), A, F, {"perm": (1, 0)})], {}, 0),
    "a slice of everything": ([("slice", (0,), A, F, {"start": (0, 0), "limit": A, "stride": (1, 1)})], {}, 0),
    "select(true, x, 0)": ([("select", (1, 0, 2), A, F, {})], {"consts": [np.array(True), ZERO]}, 0),
    "abs of exp": ([("exp", (0,), A, F, {}), ("abs", (1,), A, F, {})], {}, 1),
    "not not p": ([("not", (0,), A, P, {}), ("not", (1,), A, P, {})], {"inputs": ((A, P),)}, 0),
    "p as 0/1, != 0": ([("convert", (0,), A, F, {"dtype": F}), ("ne", (2, 1), A, P, {})], {"inputs": ((A, P),), "consts": [ZERO]}, 0),
    "p as 0/1, read back": ([("convert", (0,), A, I, {"dtype": I}), ("convert", (1,), A, P, {"dtype": P})], {"inputs": ((A, P),)}, 0),
    "p and p": ([("and", (0, 0), A, P, {})], {"inputs": ((A, P),)}, 0),
    "p and true": ([("and", (0, 1), A, P, {})], {"inputs": ((A, P),), "consts": [np.array(True)]}, 0),
    "a stack, unstacked": (
        [("stack", (0, 0), (4, 2, 6), F, {"axis": 1}), ("reshape", (1,), (4, 12), F, {"shape": (4, 12)}), ("identity", (2,), (4, 12), F, {})], {}, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_rules_that_leave_a_value(name):
    nodes, more, same = SAME[name]
    g = program(*nodes, **more)
    _, env = normalize(g)
    assert env[g.outputs[0]] is env[same]


# Two spellings that must become one expression.
EQUAL = {
    "x * x is x ** 2": [("mul", (0, 0), A, F, {})], "x ** 2": [("pow", (0,), A, F, {"y": 2})],
    "x ** 2.0": [("power", (0, 1), A, F, {})], "square": [("square", (0,), A, F, {})],
}  # fmt: skip


def test_every_spelling_of_a_square_is_one():
    exprs = []
    for nodes in EQUAL.values():
        g = program(*nodes, consts=[np.float32(2)])
        exprs.append(repr(normalize(g)[1][g.outputs[0]]))
    assert len(set(exprs)) == 1 and exprs[0].startswith("square(")


COMPARISONS = {"ge": "lt", "gt": "le", "le": "gt", "lt": "ge", "eq": "ne", "ne": "eq"}


@pytest.mark.parametrize("op", COMPARISONS)
@pytest.mark.parametrize("dtype", [I, F])
def test_a_negated_comparison_turns_around_for_integers_only(op, dtype):
    """not (a < b) is a >= b, unless one of them is NaN."""
    g = program((op, (0, 1), A, P, {}), ("not", (2,), A, P, {}), inputs=((A, dtype), (A, dtype)))
    got = normalize(g)[1][g.outputs[0]].op
    assert got == (COMPARISONS[op] if dtype == I else "not")


def test_equal_computations_are_one_object_and_remember_their_values():
    g = program(("exp", (0,), A, F, {}), ("exp", (0,), A, F, {}))
    _, env = normalize(g)
    assert env[1] is env[2] and env[1].origins == [1, 2]


def test_effects_and_unknown_ops_are_values_of_their_own():
    g = program(("opaque:sort", (0,), A, F, {}), ("opaque:sort", (0,), A, F, {}))
    _, env = normalize(g)
    assert env[1].op == env[2].op == "value" and env[1] is not env[2]


PIECES = {
    "split": (("split", (0,), [(4, 2), (4, 4)], F, {"axis": 1, "sizes": (2, 4)}), lambda a: [a[:, :2], a[:, 2:]]),
    "unstack": (("unstack", (0,), [(6,)] * 4, F, {"axis": 0}), lambda a: list(a)),
    "stack": (("stack", (0, 0), (4, 6, 2), F, {"axis": 2}), lambda a: [np.stack([a, a], 2)]),
    "tile": (("tile", (0,), (8, 18), F, {"reps": (2, 3)}), lambda a: [np.tile(a, (2, 3))]),
    "x with itself": (("dot_general", (0, 0), (4,), F, {"lhs_contract": (1,), "rhs_contract": (1,), "lhs_batch": (0,),
                       "rhs_batch": (0,), "precision": ""}), lambda a: [(a * a).sum(1)]),
}  # fmt: skip


@pytest.mark.parametrize("name", PIECES)
def test_composed_ops_mean_what_they_say(name):
    node, want = PIECES[name]
    g = program(node)
    exprs, env = normalize(g)
    x = np.arange(24.0).reshape(A)
    for v, expected in zip(g.outputs, want(x), strict=True):
        np.testing.assert_array_equal(evaluate(env[v], exprs, {id(env[0]): x}), expected)


# name: (sizes, index_map, collapsed, offset_dims, indices, result in NumPy or None where it stays a gather), x being [4, 6]
GATHERS = {
    "x[1:3, 2:5]": ((2, 3), (0, 1), (), (0, 1), [1, 2], lambda x: x[1:3, 2:5]),
    "x[1, 2:5]": ((1, 3), (0, 1), (0,), (0,), [1, 2], lambda x: x[1, 2:5]),
    "x[2]": ((1, 6), (0,), (0,), (0,), [2], lambda x: x[2]),
    "x[:, ::2]": ((4, 1), (1,), (1,), (0,), [[0], [2], [4]], lambda x: x[:, ::2]),
    "x[:, 1::2].T": ((4, 1), (1,), (1,), (1,), [[1], [3], [5]], lambda x: x[:, 1::2].T),
    "x[1:4]": ((1, 6), (0,), (0,), (1,), [[1], [2], [3]], lambda x: x[1:4]),
    "x[:, [3]]": ((4, 1), (1,), (1,), (0,), [[3]], lambda x: x[:, [3]]),
    "x[::3, 2]": ((1, 1), (0, 1), (0, 1), (), [[0, 2], [3, 2]], lambda x: x[::3, 2]),
    "backwards": ((4, 1), (1,), (1,), (0,), [[4], [2], [0]], None),
    "uneven": ((4, 1), (1,), (1,), (0,), [[0], [2], [5]], None),
    "one place twice": ((4, 1), (1,), (1,), (0,), [[2], [2]], None),
    "the diagonal": ((1, 1), (0, 1), (0, 1), (), [[0, 0], [1, 1]], None),
    "overlapping windows": ((4, 2), (1,), (), (1, 2), [[0], [1]], None),
    "past the end": ((4, 1), (1,), (1,), (0,), [[4], [6]], None),
    "before the start": ((4, 3), (1,), (), (0, 1), [-1], None),
}


@pytest.mark.parametrize("name", GATHERS)
def test_a_gather_at_known_places_is_a_slice(name):
    sizes, index_map, collapsed, offset, indices, want = GATHERS[name]
    x = np.arange(24.0).reshape(A)
    kept = [s for d, s in enumerate(sizes) if d not in collapsed]
    rows = list(np.shape(indices)[:-1])
    shape = tuple(kept.pop(0) if i in offset else rows.pop(0) for i in range(len(offset) + len(rows)))
    attrs = {"sizes": sizes, "index_map": index_map, "collapsed": collapsed, "offset_dims": offset, "operand_batch": (),
             "index_batch": (), "mode": "clip"}  # fmt: skip
    g = program(("gather", (0, 1), shape, F, attrs), consts=[np.asarray(indices, np.int32)])
    exprs, env = normalize(g)
    got = evaluate(env[2], exprs, {id(env[0]): x})
    if want is None:
        assert env[2].op == "gather"
    else:
        np.testing.assert_array_equal(got, want(x))


def test_an_array_that_counts_is_positions():
    exprs, env = normalize(program(("add", (0, 0), A, F, {}), consts=[np.arange(5, dtype=np.int32), np.arange(3, 9), np.array([1, 2, 4])]))
    assert [env[v].op for v in (1, 2, 3)] == ["iota", "add", "const"]
    np.testing.assert_array_equal(evaluate(env[2], exprs), np.arange(3, 9))


def test_a_value_at_the_end_of_a_deep_program_is_not_known():
    deep = [("sin" if i % 2 else "cos", (i,), A, F, {}) for i in range(3000)]
    index = [("convert", (3000,), A, I, {"dtype": I}), ("gather", (0, 3001), A, F, {"operand_batch": ()})]
    exprs, env = normalize(program(*deep, *index))
    assert env[3002].op == "gather" and evaluate(env[3000], exprs) is None


@pytest.mark.parametrize("lhs_ones", [True, False])
def test_an_outer_product_with_ones_is_a_view(lhs_ones):
    ones = np.ones((3, 6), np.float32)
    ins = (1, 0) if lhs_ones else (0, 1)
    shape = (6, 3, 4) if lhs_ones else (6, 4, 3)
    dims = {"lhs_batch": (1,), "rhs_batch": (1,), "lhs_contract": (), "rhs_contract": (), "precision": ""}
    g = program(("dot_general", ins, shape, F, dims), consts=[ones])
    exprs, env = normalize(g)
    x = np.arange(24.0).reshape(A)
    got = evaluate(env[g.outputs[0]], exprs, {id(env[0]): x})
    want = np.einsum("jb,ib->bji", ones, x) if lhs_ones else np.einsum("ib,jb->bij", x, ones)
    np.testing.assert_array_equal(got, want)


@given(st.lists(st.sampled_from(["neg", "exp", "square", "abs", "add0", "mul1", "selfmul", "half", "turn"]), max_size=8))
def test_normalising_keeps_the_value(ops):
    """Any chain of elementwise ops and transposes is worth the same before and after."""
    x = Exprs()
    leaf = x.value(0, Spec((2, 3), "float64"))
    data = np.linspace(-1, 1, 6).reshape(2, 3)
    e, want = leaf, data
    for op in ops:
        const = {"add0": 0.0, "mul1": 1.0, "half": 0.5}.get(op)
        if const is not None:
            name = "add" if op == "add0" else "mul"
            e = simplify(x.apply(name, e, x.full(const, e.shape, e.dtype)), x)
            want = want + const if name == "add" else want * const
        elif op == "selfmul":
            e, want = simplify(x.apply("mul", e, e), x), want * want
        elif op == "turn":
            e, want = simplify(x.make("transpose", (e,), (("perm", (1, 0)),), e.shape[::-1], e.dtype), x), want.T
        else:
            fn = {"neg": np.negative, "exp": np.exp, "square": np.square, "abs": np.abs}[op]
            with np.errstate(over="ignore"):
                e, want = simplify(x.apply(op, e), x), fn(want)
    got = evaluate(e, x, {id(leaf): data})
    np.testing.assert_array_equal(got, want)
    assert e.shape == want.shape


def nested():
    inner = program(("tanh", (0,), A, F, {}))
    g = program(("scan", (0,), A, F, {"length": 3}), ("add", (1, 0), A, F, {}), consts=())
    g.nodes[0].bodies = (inner,)
    return g


def test_json_round_trip():
    g = nested()
    text = json.dumps(g.to_json())
    again = Graph.from_json(json.loads(text))
    assert again.to_json() == g.to_json()
    assert again.specs == g.specs and again.nodes[0].bodies[0].nodes[0].op == "tanh"


def test_pretty_shows_every_node_with_types_and_source():
    assert pretty(nested()).split("\n") == [
        "f(%0 float32[4,6]):",
        "  %1 float32[4,6] = scan %0 [length=3]    # model.py:3 (f)",
        "    f(%0 float32[4,6]):",
        "      %1 float32[4,6] = tanh %0    # model.py:3 (f)",
        "      return %1",
        "  %2 float32[4,6] = add %1 %0    # model.py:3 (f)",
        "  return %2",
    ]


def test_dead_nodes_go_and_effects_stay():
    g = program(("exp", (0,), A, F, {}), ("opaque:print", (0,), A, F, {}), ("neg", (0,), A, F, {}))
    g.nodes[1].effect = True
    assert [n.op for n in g.without_dead_nodes().nodes] == ["opaque:print", "neg"]


def test_walk_names_bodies_by_op_and_number():
    assert [path for path, _ in nested().walk()] == ["", "scan0"]
