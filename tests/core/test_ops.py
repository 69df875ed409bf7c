"""Ops: hand-derived gradients against finite differences, shape rules with advice, costs by hand, the mask algebra."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpt.errors import OpError
from kpt.ops import OPS, Bias, Causal, Explicit, Lengths, Mask, Segments, Spec, Window, op
from kpt.ops.mask import visible
from tests.cases import CASES


def double(specs):
    return {n: dataclasses.replace(s, dtype="float64") if s.dtype.startswith(("float", "bfloat")) else s for n, s in specs.items()}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("seed", range(6))
def test_gradients_are_derivatives(name, seed):
    """Along a random direction, (f(x + hd) - f(x - hd)) / 2h is the gradient's component."""
    rng = np.random.default_rng([seed, len(name)])
    case = CASES[name](rng)
    while max(math.prod(s.shape) for s in case.specs.values()) > 20_000 or case.params.get("activation") == "relu":
        case = CASES[name](rng)
    o, specs = op(name), double(case.specs)
    arrays = o.sample(rng, specs, **case.params)
    out = o.reference(**arrays, **case.params)
    cts = tuple(rng.standard_normal(r.shape) for r in out)
    grads = o.reference_vjp(cts, **arrays, **case.params)
    assert set(grads) == {n for n in o.differentiable if n in arrays}

    def projected(changed):
        return sum(float((np.nan_to_num(c * r)).sum()) for c, r in zip(cts, o.reference(**{**arrays, **changed}, **case.params), strict=True))

    for n, g in grads.items():
        if not np.isfinite(g).all():
            continue  # a query that sees nothing under fill=-inf
        d, h = rng.standard_normal(arrays[n].shape), 1e-6
        slope = (projected({n: arrays[n] + h * d}) - projected({n: arrays[n] - h * d})) / (2 * h)
        want = float((g * d).sum())
        assert slope == pytest.approx(want, rel=2e-4, abs=2e-4), (str(case), n)


@pytest.mark.parametrize("name", OPS)
def test_references_have_the_shapes_that_infer_says(name):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        case = CASES[name](rng)
        arrays = op(name).sample(rng, case.specs, **case.params)
        out = op(name).reference(**arrays, **case.params)
        assert [r.shape for r in out] == [s.shape for s in op(name).infer(case.specs, **case.params)]


F = "float32"
BAD = [
    ("attention", {"q": (2, 4, 3, 8), "k": (2, 4, 2, 8), "v": (2, 4, 2, 8)}, {}, "multiple"),
    ("attention", {"q": (2, 4, 8), "k": (2, 4, 2, 8), "v": (2, 4, 2, 8)}, {}, "layout"),
    ("attention", {"q": (2, 4, 2, 8), "k": (2, 4, 2, 8), "v": (2, 4, 2, 8)}, {"mask": Mask((Bias(),))}, "bias"),
    ("rms_norm", {"x": (3, 8), "weight": (7,)}, {}, "weight"),
    ("layer_norm", {"x": (3, 8), "residual": (8,)}, {}, "residual"),
    ("linear_act", {"x": (3, 8), "w": (7, 4)}, {}, r"\[8, 4\]"),
    ("linear_act", {"x": (3, 8), "w": (8, 4)}, {"activation": "swish"}, "silu"),
    ("glu", {"x": (3, 8), "w_gate": (8, 4), "w_up": (8, 5)}, {}, "w_up"),
    ("rope", {"x": (1, 3, 2, 8), "cos": (1, 3, 7), "sin": (1, 3, 7)}, {}, "even"),
    ("cross_entropy", {"logits": (3, 8), "labels": (3,)}, {}, "integers"),
    ("matmul", {"a": (3, 8), "b": (7, 4)}, {}, r"b\[7, 4\]"),
    ("ragged_matmul", {"x": (3, 8), "w": (2, 8, 4), "group_sizes": (2,)}, {}, "integers"),
]


@pytest.mark.parametrize(("name", "shapes", "params", "says"), BAD)
def test_bad_calls_say_what_is_wrong(name, shapes, params, says):
    with pytest.raises(OpError, match=says):
        op(name).infer({n: Spec(s, F) for n, s in shapes.items()}, **params)


def test_unknown_ops_get_a_suggestion():
    with pytest.raises(OpError, match="'attention'"):
        op("atention")


COSTS = [
    ("matmul", {"a": (2, 3), "b": (3, 5)}, {}, 60, 4 * (6 + 15 + 10)),
    ("linear_act", {"x": (2, 3), "w": (3, 5)}, {}, 60, 4 * (6 + 15 + 10)),
    ("glu", {"x": (2, 3), "w_gate": (3, 5), "w_up": (3, 5)}, {}, 120, 4 * (6 + 30 + 10)),
    ("attention", {"q": (1, 4, 2, 8), "k": (1, 4, 2, 8), "v": (1, 4, 2, 8)}, {}, 2 * 2 * 16 * 16, 4 * 4 * 64),
    # 10 of 16 pairs are visible
    ("attention", {"q": (1, 4, 2, 8), "k": (1, 4, 2, 8), "v": (1, 4, 2, 8)}, {"mask": Mask((Causal(),))}, 2 * 2 * 10 * 16, 4 * 4 * 64),
    # a window of one key besides the diagonal: 1 + 2 + 2 + 2
    ("attention", {"q": (1, 4, 2, 8), "k": (1, 4, 2, 8), "v": (1, 4, 2, 8)}, {"mask": Mask((Causal(), Window(1, None)))}, 2 * 2 * 7 * 16, 1024),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shapes", "params", "flops", "size"), COSTS)
def test_costs_by_hand(name, shapes, params, flops, size):
    got = op(name).cost({n: Spec(s, F) for n, s in shapes.items()}, **params)
    assert (got.flops, got.bytes) == (flops, size)


def test_attention_is_its_definition():
    """Brute force, one query at a time."""
    rng = np.random.default_rng(0)
    specs = {"q": Spec((2, 3, 4, 5), "float64"), "k": Spec((2, 6, 2, 5), "float64"), "v": Spec((2, 6, 2, 3), "float64")}
    a = op("attention").sample(rng, specs)
    (got,) = op("attention").reference(**a, mask=Mask((Causal(3),)), scale=0.7, logits_soft_cap=2.0)
    for b in range(2):
        for n in range(4):
            for i in range(3):
                s = np.array([2.0 * math.tanh(0.7 * a["q"][b, i, n] @ a["k"][b, j, n // 2] / 2.0) for j in range(i + 4) if j < 6])
                w = np.exp(s) / np.exp(s).sum()
                np.testing.assert_allclose(got[b, i, n], w @ a["v"][b, : len(w), n // 2], rtol=1e-12)


def test_a_query_that_sees_nothing_can_tell_the_fill():
    rng = np.random.default_rng(0)
    specs = {"q": Spec((1, 2, 1, 4), "float64"), "k": Spec((1, 3, 1, 4), "float64"), "v": Spec((1, 3, 1, 4), "float64")}
    a = op("attention").sample(rng, specs)

    def first(**kw):
        return op("attention").reference(**a, mask=Mask((Causal(-1),), **kw))[0][0, 0, 0]

    assert np.isnan(first()).all()
    np.testing.assert_allclose(first(fill=-1e30), a["v"][0, :, 0].mean(0))
    (unmasked,) = op("attention").reference(**a)
    np.testing.assert_allclose(first(fill=-1e4, additive=True), unmasked[0, 0, 0], rtol=1e-6)


TERMS = st.one_of(
    st.builds(Causal, st.integers(-4, 4)),
    st.builds(Window, st.none() | st.integers(0, 4), st.none() | st.integers(0, 4), st.integers(-2, 2)),
    st.sampled_from([Segments(), Lengths(), Explicit(), Bias()]),
)
MASKS = st.builds(Mask, st.lists(TERMS, max_size=4).map(tuple), st.sampled_from([-math.inf, -1e9]), st.just(False))
OPERANDS = {
    "q_segment_ids": np.array([[0, 0, 1, 1, 2]]), "kv_segment_ids": np.array([[0, 1, 1, 2, 2, 2]]), "kv_lengths": np.array([4]),
    "keep": np.arange(30).reshape(1, 1, 5, 6) % 3 > 0,
}  # fmt: skip


@settings(deadline=None)
@given(MASKS, MASKS)
def test_masks_are_an_algebra(a, b):
    def see(m):
        return visible(m, 1, 2, 5, 6, OPERANDS)

    np.testing.assert_array_equal(see(a & b), see(a) & see(b))
    np.testing.assert_array_equal(see(a & b), see(b & a))
    assert a & a == a
    assert Mask.from_json(a.to_json()) == a
    assert (a & b).kinds == a.kinds | b.kinds
