"""What each op accepts, what it makes of it, and what that costs; the references are in test_op_references."""

import math

import numpy as np
import pytest

from kpt.errors import OpError
from kpt.ops import OPS, Bias, Causal, Cost, Explicit, Lengths, Mask, Segments, Spec, Window, op

F, H, I, B = "float32", "bfloat16", "int32", "bool"  # noqa: E741

# A call of each op that is right, as (arrays, parameters, outputs).
RIGHT = {
    "attention": ({"q": ((2, 5, 6, 8), H), "k": ((2, 7, 3, 8), H), "v": ((2, 7, 3, 4), H)}, {}, [((2, 5, 6, 4), H)]),
    "rms_norm": ({"x": ((3, 4, 8), H), "weight": ((8,), F)}, {}, [((3, 4, 8), H)]),
    "layer_norm": ({"x": ((3, 8), H), "bias": ((8,), H), "residual": ((3, 8), H)}, {}, [((3, 8), H), ((3, 8), H)]),
    "linear_act": ({"x": ((2, 3, 4), H), "w": ((4, 5), H), "b": ((5,), H)}, {}, [((2, 3, 5), H)]),
    "glu": ({"x": ((4,), H), "w_gate": ((4, 5), H), "w_up": ((4, 5), H)}, {"out_dtype": F}, [((5,), F)]),
    "rope": ({"x": ((2, 5, 3, 8), H), "cos": ((1, 5, 6), F), "sin": ((1, 5, 6), F)}, {}, [((2, 5, 3, 8), H)]),
    "cross_entropy": ({"logits": ((2, 3, 9), H), "labels": ((2, 3), I)}, {}, [((2, 3), F)]),
    "linear_cross_entropy": ({"x": ((6, 4), H), "w": ((4, 9), H), "labels": ((6,), I)}, {}, [((6,), F)]),
    "matmul": ({"a": ((3, 4), H), "b": ((4, 5), H)}, {"out_dtype": F}, [((3, 5), F)]),
    "ragged_matmul": ({"x": ((6, 4), H), "w": ((3, 4, 5), H), "group_sizes": ((3,), I)}, {}, [((6, 5), H)]),
}


def specs(arrays):
    return {n: Spec(*s) for n, s in arrays.items()}


@pytest.mark.parametrize("name", OPS)
def test_outputs(name):
    arrays, params, wanted = RIGHT[name]
    assert OPS[name].infer(specs(arrays), **params) == tuple(Spec(*w) for w in wanted)


@pytest.mark.parametrize("name", OPS)
def test_float64_stays_float64(name):
    arrays, params, _ = RIGHT[name]
    wide = {n: Spec(s, "float64" if d in (F, H) else d) for n, (s, d) in arrays.items()}
    kept = {n: v for n, v in params.items() if n != "out_dtype"}
    assert {s.dtype for s in OPS[name].infer(wide, **kept)} == {"float64"}


# (op, arrays replaced or, as None, left out, parameters, words of the message)
KEEP, LENGTHS, SEGMENTS = Mask((Explicit(),)), Mask((Lengths(),)), Mask((Segments(),))
WRONG = [
    ("attention", {"q": None}, {}, "without q"),
    ("attention", {"query": ((2,), F)}, {}, "array query; It takes q, k, v"),
    ("attention", {"q": ((5, 6, 8), H)}, {}, "q[5, 6, 8]; [B, T, N, H]"),
    ("attention", {"k": ((2, 7, 3, 9), H)}, {}, "k[2, 7, 3, 9]; [2, 7, 3, 8]"),
    ("attention", {"k": ((1, 7, 3, 8), H)}, {}, "k[1, 7, 3, 8]; [2, 7, 3, 8]"),
    ("attention", {"v": ((2, 6, 3, 4), H)}, {}, "v[2, 6, 3, 4]; [2, 7, 3, 4]"),
    ("attention", {"q": ((2, 5, 4, 8), H)}, {}, "4 query heads; 3 key heads; multiple"),
    ("attention", {"q": ((2, 5, 6, 8), I)}, {}, "q of int32; float32"),
    ("attention", {}, {"mask": KEEP}, "reads keep; Pass keep="),
    ("attention", {"keep": ((2, 6, 5), B)}, {"mask": KEEP}, "keep[2, 6, 5]; [B or 1, N or 1, T or 1, S or 1]"),
    ("attention", {"keep": ((2, 3, 5, 7), B)}, {"mask": KEEP}, "keep[2, 3, 5, 7]; [2, 6, 5, 7]"),
    ("attention", {"keep": ((2, 6, 5, 7), F)}, {"mask": KEEP}, "keep of float32; bool"),
    ("attention", {"bias": ((1, 1, 5, 7), I)}, {"mask": Mask((Bias(),))}, "bias of int32"),
    ("attention", {"kv_lengths": ((3,), I)}, {"mask": LENGTHS}, "kv_lengths[3]; [2]"),
    ("attention", {"kv_lengths": ((2,), F)}, {"mask": LENGTHS}, "kv_lengths of float32; integers"),
    ("attention", {"q_segment_ids": ((2, 5), I)}, {"mask": SEGMENTS}, "reads kv_segment_ids"),
    ("attention", {"q_segment_ids": ((2, 7), I), "kv_segment_ids": ((2, 7), I)}, {"mask": SEGMENTS}, "q_segment_ids[2, 7]; [2, 5]"),
    ("attention", {}, {"logits_soft_cap": 0.0}, "logits_soft_cap=0.0; above 0"),
    ("attention", {}, {"mask": Mask((Causal(),), -math.inf, True)}, "adds -inf; finite"),
    ("attention", {}, {"out_dtype": "int8"}, "out_dtype='int8'; 'float32'"),
    ("rms_norm", {"x": ((), F)}, {}, "x[]; [..., D]"),
    ("rms_norm", {"weight": ((7,), F)}, {}, "weight[7]; [8]"),
    ("rms_norm", {"bias": ((8,), F)}, {}, "array bias; It takes x, weight, residual"),
    ("rms_norm", {"x": ((3, 4, 8), I)}, {}, "x of int32"),
    ("rms_norm", {}, {"eps": -1e-6}, "eps=-1e-06"),
    ("rms_norm", {}, {"eps": math.nan}, "eps=nan"),
    ("layer_norm", {"residual": ((8,), H)}, {}, "residual[8]; [3, 8]"),
    ("layer_norm", {"bias": ((3, 8), H)}, {}, "bias[3, 8]; [8]"),
    ("linear_act", {"w": ((5, 4), H)}, {}, "w[5, 4]; [4, 4]"),
    ("linear_act", {"w": ((4, 5, 1), H)}, {}, "w[4, 5, 1]; [K, N]"),
    ("linear_act", {"b": ((4,), H)}, {}, "b[4]; [5]"),
    ("linear_act", {}, {"activation": "gelo"}, "activation='gelo'; 'gelu_tanh'"),
    ("glu", {"w_up": None}, {}, "without w_up"),
    ("glu", {"w_up": ((4, 6), H)}, {}, "w_up[4, 6]; [4, 5]"),
    ("glu", {"b_gate": ((6,), H)}, {}, "b_gate[6]; [5]"),
    ("rope", {"cos": ((1, 5, 5), F)}, {}, "cos[1, 5, 5]; R even"),
    ("rope", {"cos": ((1, 5, 10), F)}, {}, "cos[1, 5, 10]; head dim"),
    ("rope", {"cos": ((3, 5, 6), F)}, {}, "cos[3, 5, 6]; B or 1"),
    ("rope", {"sin": ((2, 5, 6), F)}, {}, "sin[2, 5, 6]; [1, 5, 6]"),
    ("cross_entropy", {"labels": ((2, 3, 9), I)}, {}, "labels[2, 3, 9]; [2, 3]"),
    ("cross_entropy", {"labels": ((2, 3), F)}, {}, "labels of float32; integers"),
    ("cross_entropy", {}, {"invalid": "ignore"}, "invalid='ignore'; 'nan', 'zero', 'clip'"),
    ("cross_entropy", {}, {"label_smoothing": 1.5}, "label_smoothing=1.5; 0 to 1"),
    ("cross_entropy", {}, {"logits_soft_cap": math.inf}, "logits_soft_cap=inf"),
    ("linear_cross_entropy", {"w": ((9, 4), H)}, {}, "w[9, 4]; [4, 4]"),
    ("linear_cross_entropy", {"b": ((4,), H)}, {}, "b[4]; [9]"),
    ("linear_cross_entropy", {"labels": ((4,), I)}, {}, "labels[4]; [6]"),
    ("linear_cross_entropy", {}, {"label_smoothing": -0.1}, "label_smoothing=-0.1"),
    ("matmul", {"b": ((5, 4), H)}, {}, "b[5, 4]; [4, 4]"),
    ("matmul", {"a": ((2, 3, 4), H)}, {}, "a[2, 3, 4]; [M, K]"),
    ("ragged_matmul", {"w": ((3, 5, 4), H)}, {}, "w[3, 5, 4]; [3, 4, 4]"),
    ("ragged_matmul", {"group_sizes": ((2,), I)}, {}, "group_sizes[2]; [3]"),
    ("ragged_matmul", {"group_sizes": ((3,), F)}, {}, "group_sizes of float32; integers"),
]  # fmt: skip


@pytest.mark.parametrize("name, arrays, params, words", WRONG, ids=[f"{w[0]}: {w[3]}" for w in WRONG])
def test_refusals_name_the_array_and_what_was_expected(name, arrays, params, words):
    right, also, _ = RIGHT[name]
    given = specs({n: s for n, s in (right | arrays).items() if s is not None})
    with pytest.raises(OpError) as refusal:
        OPS[name].infer(given, **also | params)
    message = str(refusal.value)
    assert name in message
    for part in words.split("; "):
        assert part in message


@pytest.mark.parametrize("asked, near", [("atention", "attention"), ("rmsnorm", "rms_norm"), ("cross-entropy", "cross_entropy")])
def test_an_unknown_op_is_answered_with_near_names(asked, near):
    with pytest.raises(OpError, match=near) as refusal:
        op(asked)
    assert near in refusal.value.advice


# Costs, worked by hand. ---------------------------------------------------------------------------------------------------


def _qkv(t, s, n=2, k=1, h=4, hv=4, dtype=F, **more):
    return {"q": ((1, t, n, h), dtype), "k": ((1, s, k, h), dtype), "v": ((1, s, k, hv), dtype), **more}


QKV_BYTES = 4 * (2 * 4 * 2 * 4 + 2 * 4 * 4)  # q and out: 4 by 2 heads by 4; k and v: 4 by 4

COSTS = [
    # every pair: 2 heads * 16 pairs * 2 (H + Hv)
    ("attention", _qkv(4, 4), {}, Cost(2 * 16 * 2 * 8, QKV_BYTES)),
    # 1 + 2 + 3 + 4 pairs
    ("attention", _qkv(4, 4), {"mask": Mask((Causal(),))}, Cost(2 * 10 * 2 * 8, QKV_BYTES)),
    # a row sees itself and one before: 1 + 2 + 2 + 2
    ("attention", _qkv(4, 4), {"mask": Mask((Window(1, 0),))}, Cost(2 * 7 * 2 * 8, QKV_BYTES)),
    ("attention", _qkv(4, 4), {"mask": Mask((Causal(), Window(1, None)))}, Cost(2 * 7 * 2 * 8, QKV_BYTES)),
    # two queries at the end of five keys see 4 and 5
    ("attention", _qkv(2, 5), {"mask": Mask((Causal(3),))}, Cost(2 * 9 * 2 * 8, 4 * (2 * 2 * 2 * 4 + 2 * 5 * 4))),
    # queries before the first key see nothing
    ("attention", _qkv(4, 4), {"mask": Mask((Causal(-4),))}, Cost(0, QKV_BYTES)),
    # what data hides is not known from shapes; the operand is read: 16 bytes of bool
    ("attention", _qkv(4, 4, keep=((1, 1, 4, 4), B)), {"mask": KEEP}, Cost(2 * 16 * 2 * 8, QKV_BYTES + 16)),
    ("attention", _qkv(4, 4, h=8, hv=2, dtype=H), {}, Cost(2 * 16 * 2 * 10, 2 * (4 * 2 * 8 + 4 * 8 + 4 * 2 + 4 * 2 * 2))),
    ("attention", _qkv(4, 0), {}, Cost(0, 4 * 64)),
    ("rms_norm", {"x": ((3, 8), F), "weight": ((8,), F)}, {}, Cost(4 * 24, 4 * (24 + 8 + 24))),
    ("rms_norm", {"x": ((3, 8), H), "residual": ((3, 8), H)}, {"out_dtype": F}, Cost(4 * 24, 2 * 24 * 3 + 4 * 24)),
    ("layer_norm", {"x": ((3, 8), F), "weight": ((8,), F), "bias": ((8,), F)}, {}, Cost(7 * 24, 4 * (24 + 16 + 24))),
    ("linear_act", {"x": ((2, 3, 4), H), "w": ((4, 5), H), "b": ((5,), H)}, {}, Cost(2 * 6 * 4 * 5, 2 * (24 + 20 + 5 + 30))),
    ("glu", {"x": ((6, 4), F), "w_gate": ((4, 5), F), "w_up": ((4, 5), F)}, {}, Cost(4 * 6 * 4 * 5, 4 * (24 + 40 + 30))),
    # 6 of the 8 head dims turn
    ("rope", {"x": ((2, 5, 3, 8), H), "cos": ((1, 5, 6), F), "sin": ((1, 5, 6), F)}, {}, Cost(3 * 2 * 5 * 3 * 6, 2 * 2 * 240 + 2 * 4 * 30)),
    ("cross_entropy", {"logits": ((6, 9), H), "labels": ((6,), I)}, {}, Cost(4 * 54, 2 * 54 + 4 * 6 + 4 * 6)),
    # the logits are in neither term
    ("linear_cross_entropy", {"x": ((6, 4), F), "w": ((4, 9), F), "labels": ((6,), "int64")}, {},
     Cost(2 * 6 * 4 * 9, 4 * (24 + 36) + 8 * 6 + 4 * 6)),
    ("matmul", {"a": ((3, 4), H), "b": ((4, 5), H)}, {"out_dtype": F}, Cost(2 * 3 * 4 * 5, 2 * (12 + 20) + 4 * 15)),
    ("matmul", {"a": ((0, 4), F), "b": ((4, 5), F)}, {}, Cost(0, 80)),
    ("ragged_matmul", {"x": ((6, 4), F), "w": ((3, 4, 5), F), "group_sizes": ((3,), I)}, {}, Cost(2 * 6 * 4 * 5, 4 * (24 + 60 + 3 + 30))),
]  # fmt: skip


@pytest.mark.parametrize("name, arrays, params, wanted", COSTS, ids=[f"{c[0]}-{i}" for i, c in enumerate(COSTS)])
def test_cost(name, arrays, params, wanted):
    assert OPS[name].cost(specs(arrays), **params) == wanted


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_samples_for_relu_have_sums_that_float32_holds(dtype):
    shapes = {"x": ((96, 640), dtype), "w": ((640, 192), dtype), "b": ((192,), dtype)}
    x, w, b = op("linear_act").sample(np.random.default_rng(0), specs(shapes), activation="relu").values()
    assert {a.dtype.name for a in (x, w, b)} == {dtype}
    x, w, b = (a.astype(np.float64) for a in (x, w, b))
    assert 0.9 < x.std() < 1.1 and 0.9 < w.std() * math.sqrt(640) < 1.1
    unit = 2.0**-11  # of a product: 1/8 times 1/8 times the power of 2 below 1 / sqrt(640)
    assert np.all(np.rint((x @ w + b) / unit) * unit == x @ w + b) and (np.abs(x) @ np.abs(w)).max() / unit < 2**24
