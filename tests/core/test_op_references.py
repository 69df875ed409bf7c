"""The float64 references, which everything else is held to: outputs against loops, gradients against central differences."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpt.ops import OPS, Bias, Causal, Lengths, Mask, Segments, Spec, Window
from kpt.ops.activations import ACTIVATIONS
from tests import cases
from tests.core import brute_force


def drawn(name: str, seed: int, most: int = 3) -> tuple[cases.Case, dict, dict]:
    """A tiny case, its arrays (floats as float64) and its parameters without out_dtype, which no reference depends on."""
    rng = np.random.default_rng(seed)
    case = cases.CASES[name](rng, most=most)
    arrays = OPS[name].sample(rng, case.specs, **case.params)
    if seed % 3 == 0 and case.params.get("invalid", "nan") != "nan":
        arrays = cases.edge(case, arrays, rng) | {n: a for n, a in arrays.items() if n == "logits"}
    wide = {n: a.astype(np.float64) if n in OPS[name].differentiable else a for n, a in arrays.items()}
    return case, wide, {n: v for n, v in case.params.items() if n != "out_dtype"}


SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=SEEDS)
def test_the_reference_is_the_loop(name, seed):
    case, arrays, params = drawn(name, seed, most=5)
    found, wanted = OPS[name].reference(**arrays, **params), brute_force.BRUTE_FORCE[name](**arrays, **params)
    specs = OPS[name].infer(case.specs, **case.params)
    assert [f.shape for f in found] == [s.shape for s in specs]
    assert all(f.dtype == np.float64 for f in found)
    for f, w in zip(found, wanted, strict=True):
        np.testing.assert_allclose(f, w, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=SEEDS)
def test_gradients_are_central_differences(name, seed):
    """Each element of each gradient is `(L(a + h) - L(a - h)) / 2h`, L the cotangents times the outputs that are numbers."""
    _, arrays, params = drawn(name, seed)
    op, rng, h = OPS[name], np.random.default_rng(seed), 1e-5
    outputs = op.reference(**arrays, **params)
    # A row that is NaN whatever the inputs are (a hidden query, a label of no class) has no differences to compare.
    number = [np.isfinite(o) for o in outputs]
    cotangents = tuple(rng.standard_normal(o.shape) for o in outputs)
    found = op.reference_vjp(cotangents, **arrays, **params)
    assert set(found) == {n for n in op.differentiable if n in arrays}

    def value(given):
        outs = op.reference(**given, **params)
        return sum(float((c * o)[ok].sum()) for c, o, ok in zip(cotangents, outs, number, strict=True))

    for array, gradient in found.items():
        assert gradient.shape == arrays[array].shape
        for at in np.ndindex(gradient.shape):
            step = np.zeros(gradient.shape)
            step[at] = h
            slope = (value(arrays | {array: arrays[array] + step}) - value(arrays | {array: arrays[array] - step})) / (2 * h)
            if np.isnan(gradient[at]) and not all(ok.all() for ok in number):
                continue
            assert gradient[at] == pytest.approx(slope, rel=2e-6, abs=2e-7), (array, at)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    function, derivative = ACTIVATIONS[name]
    x = np.linspace(-6, 6, 101) + 0.013  # off the kinks at 0
    np.testing.assert_allclose(function(x), [brute_force.ACTIVATIONS[name](float(a)) for a in x], rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(derivative(x), (function(x + 1e-6) - function(x - 1e-6)) / 2e-6, atol=1e-8)
    far = np.array([-800.0, -40.0, 40.0, 800.0])
    with np.errstate(over="raise", invalid="raise"):
        assert np.isfinite(function(far)).all() and np.isfinite(derivative(far)).all()
    assert np.isnan(function(np.array([np.nan]))).all()
    assert function(np.zeros((0, 3))).shape == derivative(np.zeros((0, 3))).shape == (0, 3)


# Queries that see no key: two queries, three keys, the first query hidden from all of them. ------------------------------

HIDES_FIRST = {"causal": (Causal(-1), {}), "window": (Window(0, 0, -1), {}), "lengths": (Lengths(), {"kv_lengths": np.array([0])}),
               "segments": (Segments(), {"q_segment_ids": np.array([[7, 1]]), "kv_segment_ids": np.array([[1, 1, 1]])})}  # fmt: skip


def _attend(kind, fill, additive=False):
    rng = np.random.default_rng(5)
    q, k, v = rng.standard_normal((1, 2, 1, 4)), rng.standard_normal((1, 3, 1, 4)), rng.standard_normal((1, 3, 1, 2))
    term, operands = HIDES_FIRST[kind]
    given = {"q": q, "k": k, "v": v, **operands, "mask": Mask((term,), fill, additive)}
    out = OPS["attention"].reference(**given)[0]
    return given, out, OPS["attention"].reference_vjp((np.ones_like(out),), **given)


@pytest.mark.parametrize("kind", HIDES_FIRST)
def test_a_query_that_sees_nothing_is_nan_with_an_infinite_fill(kind):
    _, out, grads = _attend(kind, -math.inf)
    assert np.isnan(out[0, 0]).all()
    assert np.isnan(grads["v"]).all(), "its weights are NaN, and every value has one"
    assert not grads["q"][0, 0].any(), "a score that was replaced passes nothing on"
    assert np.isfinite(grads["k"]).all()


@pytest.mark.parametrize("kind", HIDES_FIRST)
def test_a_query_that_sees_nothing_is_the_mean_with_a_finite_fill(kind):
    given, out, grads = _attend(kind, -1e9)
    np.testing.assert_allclose(out[0, 0, 0], given["v"][0, :, 0].mean(0))
    assert not grads["q"][0, 0].any()
    assert (grads["v"] > 1 / 3 - 1e-12).all(), "every value has a third of the hidden query"


@pytest.mark.parametrize("kind", HIDES_FIRST)
def test_a_query_that_sees_nothing_attends_as_unmasked_with_an_additive_fill(kind):
    given, out, grads = _attend(kind, -1e4, additive=True)
    free = OPS["attention"].reference(**given | {"mask": Mask()})[0]
    np.testing.assert_allclose(out[0, 0], free[0, 0], rtol=1e-10)
    assert grads["q"][0, 0].any()


# NaN and infinities --------------------------------------------------------------------------------------------------------


def test_nan_stays_in_its_row():
    rng = np.random.default_rng(0)
    for name, array, rows in (("rms_norm", "x", 1), ("layer_norm", "x", 1), ("cross_entropy", "logits", 1), ("linear_act", "x", 1),
                              ("matmul", "a", 1), ("rope", "x", 3)):  # fmt: skip
        specs = {"rms_norm": {"x": (3, 4)}, "layer_norm": {"x": (3, 4)}, "cross_entropy": {"logits": (3, 4), "labels": (3,)},
                 "linear_act": {"x": (3, 4), "w": (4, 2)}, "matmul": {"a": (3, 4), "b": (4, 2)},
                 "rope": {"x": (1, 3, 2, 4), "cos": (1, 3, 4), "sin": (1, 3, 4)}}[name]  # fmt: skip
        kinds = {n: Spec(s, "int32" if n == "labels" else "float64") for n, s in specs.items()}
        given = OPS[name].sample(rng, kinds)
        at = (0, 1) if name == "rope" else (1,)
        given[array][at] = np.nan
        out = OPS[name].reference(**given)[0]
        per_row = np.isnan(out.reshape(3, -1) if rows == 3 else out.reshape(3, -1))
        assert per_row[1].all() and not per_row[[0, 2]].any(), name


@pytest.mark.parametrize(
    "logits, loss",
    [
        ([0.0, -np.inf, 0.0], math.log(2)),
        ([np.inf, 0.0, 0.0], math.nan),  # the label's own: inf - inf
        ([0.0, np.inf, 0.0], math.inf),
        ([-np.inf, 0.0, -np.inf], math.inf),  # probability 0
        ([np.nan, 0.0, 0.0], math.nan),
        ([-np.inf, -np.inf, -np.inf], math.nan),
        ([1e300, -1e300, 0.0], 0.0),
    ],
)
def test_cross_entropy_of_extreme_logits(logits, loss):
    found = OPS["cross_entropy"].reference(logits=np.array(logits), labels=np.array(0))[0]
    np.testing.assert_allclose(found, loss)


@pytest.mark.parametrize("label", [-100, -1, 3, 10_000])
@pytest.mark.parametrize("invalid, loss", [("nan", math.nan), ("zero", math.log(3)), ("clip", math.log(3)), ("drop", 0.0)])
def test_a_label_outside_the_vocabulary(label, invalid, loss):
    given = {"logits": np.zeros(3), "labels": np.array(label), "invalid": invalid}
    np.testing.assert_allclose(OPS["cross_entropy"].reference(**given)[0], loss)
    gradient = OPS["cross_entropy"].reference_vjp((np.array(1.0),), **given)["logits"]
    target = np.zeros(3) if invalid != "clip" else np.eye(3)[0 if label < 0 else 2]
    np.testing.assert_allclose(gradient, 0 if invalid == "drop" else 1 / 3 - target)


def test_bias_gradient_sums_over_what_it_was_broadcast_to():
    rng = np.random.default_rng(1)
    full = {n: Spec((2, 3, 2, 4), "float64") for n in "qkv"} | {"bias": Spec((2, 2, 3, 3), "float64")}
    given = OPS["attention"].sample(rng, full)
    g = (rng.standard_normal((2, 3, 2, 4)),)
    for shape in ((1, 2, 3, 3), (2, 1, 3, 3), (2, 2, 1, 3), (1, 1, 1, 3)):
        small = rng.standard_normal(shape)
        spread = np.broadcast_to(small, (2, 2, 3, 3))
        whole = OPS["attention"].reference_vjp(g, **given | {"bias": spread}, mask=Mask((Bias(),)))["bias"]
        found = OPS["attention"].reference_vjp(g, **given | {"bias": small}, mask=Mask((Bias(),)))["bias"]
        axes = tuple(i for i, d in enumerate(shape) if d == 1)
        np.testing.assert_allclose(found, whole.sum(axes, keepdims=True))


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=SEEDS)
def test_samples_are_in_the_domain(name, seed):
    rng = np.random.default_rng(seed)
    case = cases.CASES[name](rng, most=33)
    arrays, again = (OPS[name].sample(np.random.default_rng(seed), case.specs, **case.params) for _ in range(2))
    assert {n: Spec(a.shape, a.dtype.name) for n, a in arrays.items()} == case.specs
    for n, a in arrays.items():
        np.testing.assert_array_equal(a, again[n], err_msg="a seed draws the same values again")
    if "labels" in arrays:
        vocab = case.specs["logits" if "logits" in case.specs else "w"].shape[-1]
        assert ((arrays["labels"] >= 0) & (arrays["labels"] < vocab)).all()
    if "kv_lengths" in arrays:
        assert ((arrays["kv_lengths"] >= 1) & (arrays["kv_lengths"] <= max(1, case.specs["k"].shape[1]))).all()
    if "group_sizes" in arrays:
        assert (arrays["group_sizes"] >= 0).all() and arrays["group_sizes"].sum() <= case.specs["x"].shape[0]
    if "keep" in arrays and arrays["keep"].size > 20:
        assert arrays["keep"].any()


def test_residual_adds_its_own_cotangent():
    """dx of (y, h) is dx of y alone plus the cotangent of h."""
    rng = np.random.default_rng(2)
    for name in ("rms_norm", "layer_norm"):
        x, residual, gy, gh = rng.standard_normal((4, 3, 5))
        both = OPS[name].reference_vjp((gy, gh), x=x, residual=residual)
        y_only = OPS[name].reference_vjp((gy,), x=x + residual)
        np.testing.assert_allclose(both["x"], y_only["x"] + gh)
        np.testing.assert_allclose(both["residual"], both["x"])


def test_references_do_not_write_to_their_arrays():
    for name in OPS:
        _, arrays, params = drawn(name, 11, most=5)
        before = {n: a.copy() for n, a in arrays.items()}
        for a in arrays.values():
            a.flags.writeable = False
        outs = OPS[name].reference(**arrays, **params)
        OPS[name].reference_vjp(tuple(np.ones_like(o) for o in outs), **arrays, **params)
        assert all(np.array_equal(a, before[n], equal_nan=True) for n, a in arrays.items())


def test_every_op_declares_the_parameters_it_takes():
    import inspect

    for op in OPS.values():
        assert dataclasses.is_dataclass(op) and set(op.differentiable) <= {*op.arrays, *op.optional}
        for function in (op.infer, op.reference, op.reference_vjp):
            taken = {n: p.default for n, p in inspect.signature(function).parameters.items() if n in op.params}
            assert taken == dict(op.params), (op.name, function)
