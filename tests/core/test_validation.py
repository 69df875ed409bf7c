"""The tolerance passes honest rounding and catches real bugs; both directions are simulated in NumPy.

The simulations store every array in the dtype, round what a kernel would round, and sum in float32 in the worst order
that a kernel could have: one running sum. A bug is a small change of the exact formula, rounded just as honestly.
"""

import json
import math
import sys

import ml_dtypes
import numpy as np
import pytest

from kpt.errors import ValidationError
from kpt.validation import Certificate, certify, compare, metrics, sensitivity, tolerance
from kpt.validation.rounding import cancelling, movements, with_last_bits

DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
LOW = ("float16", "bfloat16")


def running_dot(a, b, acc):
    """a[M,K] @ b[K,N], one rounding per product and per addition, in order of k."""
    total = np.zeros((a.shape[0], b.shape[1]), acc)
    for k in range(a.shape[1]):
        total = total + a[:, k : k + 1].astype(acc) * b[k : k + 1].astype(acc)
    return total


def softmax(s):
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def matmul(a, w, b, store, dot, bug=""):
    scale = 1.01 if bug == "scale 1% off" else 1.0
    bias = 0 if bug == "bias dropped" else b
    return (dot(a, w) * scale + bias).astype(store)


def attention(q, k, v, store, dot, bug=""):
    t = np.arange(len(q))
    keep = t[:, None] >= t
    if bug == "one mask entry wrong":
        keep[-1, -2] = False
    s = dot(q, k.T) / math.sqrt(q.shape[1]) * (1.01 if bug == "scale 1% off" else 1)
    p = softmax(np.where(keep, s, -np.inf).astype(s.dtype))
    return dot(p.astype(store), v).astype(store)  # kernels feed the matrix unit in the storage dtype


def layer_norm(x, w, b, store, dot, bug=""):
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True)
    if bug == "variance over n - 1":
        var = var * x.shape[-1] / (x.shape[-1] - 1)
    y = (x - mean) / np.sqrt(var + 1e-6) * w
    return (y + (0 if bug == "bias dropped" else b)).astype(store)


PROGRAMS = [
    # program, shapes of its arrays, reduction length
    (matmul, ((32, 64), (64, 48), (48,)), 64),
    (matmul, ((8, 8192), (8192, 8), (8,)), 8192),
    (matmul, ((1, 3), (3, 1), (1,)), 3),
    (attention, ((96, 32), (96, 32), (96, 32)), 96),
    (attention, ((512, 64), (512, 64), (512, 64)), 512),
    (attention, ((3, 2), (3, 2), (3, 1)), 3),
    (layer_norm, ((64, 768), (768,), (768,)), 768),
    (layer_norm, ((5, 3), (3,), (3,)), 3),
]
IDS = [f"{p.__name__}-{'x'.join(map(str, s[0]))}" for p, s, _ in PROGRAMS]


def arrays_for(shapes, dtype, seed):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s).astype(DTYPES[dtype]) for s in shapes]


def low(program, arrays, dtype, bug=""):
    """The program as a kernel in `dtype` runs it: stored in `dtype`, summed in float32 (float64 in float64)."""
    store, acc = DTYPES[dtype], np.float64 if dtype == "float64" else np.float32
    wide = [a.astype(acc) for a in arrays]
    return program(*wide, store, lambda a, b: running_dot(a, b, acc), bug)


def exact(program, arrays):
    wide = {str(i): a.astype(np.float64) for i, a in enumerate(arrays)}
    f = lambda named: {"y": program(*named.values(), np.float64, np.matmul)}  # noqa: E731
    out = f(wide)
    return out, sensitivity(f, wide, np.random.default_rng(0), out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("program", "shapes", "length"), PROGRAMS, ids=IDS)
def test_honest_rounding_passes(program, shapes, length, dtype):
    for seed in range(3 if max(shapes[0]) > 100 else 50):
        arrays = arrays_for(shapes, dtype, seed)
        reference, moved = exact(program, arrays)
        found = certify({"y": low(program, arrays, dtype)}, reference, dtype, length, sensitivity=moved)
        assert found.passed, f"seed {seed}: {found.summary()}"


BUGS = [
    (matmul, ((32, 64), (64, 48), (48,)), 64, "scale 1% off", ("float64", "float32", "float16")),
    (matmul, ((32, 64), (64, 48), (48,)), 64, "bias dropped", tuple(DTYPES)),
    (matmul, ((8, 8192), (8192, 8), (8,)), 8192, "scale 1% off", ("float64", "float32", "float16")),
    (matmul, ((8, 8192), (8192, 8), (8,)), 8192, "bias dropped", ("float64", "float32", "float16")),
    (attention, ((96, 32), (96, 32), (96, 32)), 96, "one mask entry wrong", ("float64", "float32")),
    (attention, ((96, 32), (96, 32), (96, 32)), 96, "scale 1% off", ("float64", "float32", "float16")),
    (attention, ((512, 64), (512, 64), (512, 64)), 512, "one mask entry wrong", ("float64", "float32")),
    (layer_norm, ((64, 768), (768,), (768,)), 768, "variance over n - 1", ("float64", "float32")),
    (layer_norm, ((64, 768), (768,), (768,)), 768, "bias dropped", tuple(DTYPES)),
]


@pytest.mark.parametrize(("program", "shapes", "length", "bug", "dtypes"), BUGS)
def test_a_bug_fails_where_the_dtype_can_show_it(program, shapes, length, bug, dtypes):
    for dtype in dtypes:
        arrays = arrays_for(shapes, dtype, 0)
        reference, moved = exact(program, arrays)
        for gradient in (False, True):
            actual = {"y": low(program, arrays, dtype, bug)}
            names = ["y"] if gradient else []
            found = certify(actual, reference, dtype, length, sensitivity=moved, gradients=names)
            assert not found.passed, f"{dtype}, gradient={gradient}: {found.summary()}"


def test_marks_of_a_mask_are_not_moved():
    """Weights of a query that sees nothing are even among the smallest floats; moved, one of them would have all, and any error be allowed."""
    low = np.finfo(np.float32).min
    bias, v = np.array([[low, low, -np.inf, low]]), np.random.default_rng(0).standard_normal((4, 5))

    def weigh(named):
        weights = np.exp(named["bias"] - named["bias"].max(-1, keepdims=True))
        return {"y": weights / weights.sum(-1, keepdims=True) @ named["v"]}

    moved = sensitivity(weigh, {"bias": bias, "v": v}, np.random.default_rng(0))
    assert 0 < moved["y"].max() < 4 * np.abs(v).max()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("program", "shapes", "length"), PROGRAMS, ids=IDS)
def test_two_roundings_of_one_program_compare(program, shapes, length, dtype):
    """A kernel that sums in order against code that uses the library's order."""
    arrays = arrays_for(shapes, dtype, 1)
    _, moved = exact(program, arrays)
    wide = [a.astype(np.float32) for a in arrays]
    original = {"y": program(*wide, DTYPES[dtype], np.matmul)}
    found = compare({"y": low(program, arrays, dtype)}, original, dtype, length, sensitivity=moved)
    assert found.passed, found.summary()
    exact_y = original["y"].astype(np.float64)
    off = {"y": (exact_y + 0.1 * np.maximum(np.abs(exact_y), moved["y"])).astype(DTYPES[dtype])}
    assert not compare(off, original, dtype, length, sensitivity=moved).passed


def test_compare_allows_twice_what_certify_does():
    y = np.ones(64)
    one, two = certify({"y": y}, {"y": y}, "bfloat16", 8), compare({"y": y}, {"y": y}, "bfloat16", 8)
    assert two.checks[0].allowed_l2 == pytest.approx(2 * one.checks[0].allowed_l2)
    assert two.checks[0].allowed_max == pytest.approx(2 * one.checks[0].allowed_max)


def deep(layers, inner, left_out=None):
    """A network with a residual stream, stored in bfloat16; its layers compute in `inner`."""
    rng, store = np.random.default_rng(0), DTYPES["bfloat16"]
    x = rng.standard_normal((64, 128)).astype(store)
    for layer in range(layers):
        w = (rng.standard_normal((128, 128)) * 128**-0.5).astype(store)
        if layer == left_out:
            continue
        h = x.astype(inner)
        scale = (1 / np.sqrt(np.mean(h.astype(np.float32) ** 2, -1, keepdims=True))).astype(inner)
        h = (h * scale).astype(inner)
        h = (h.astype(np.float32) @ w.astype(np.float32)).astype(inner)
        x = (x + np.tanh(h).astype(store)).astype(store)
    return {"y": x}


def test_roundings_of_computations_in_sequence_add_in_squares():
    layers = 96
    written, kernels = (deep(layers, DTYPES[d]) for d in ("bfloat16", "float32"))
    assert not compare(kernels, written, "bfloat16", 128).passed
    found = compare(kernels, written, "bfloat16", 128, chain=layers)
    assert found.passed, found.summary()
    assert not compare(deep(layers, DTYPES["float32"], left_out=40), written, "bfloat16", 128, chain=layers).passed


def test_a_chain_is_of_roundings_in_a_narrow_dtype():
    assert tolerance("bfloat16", 0, chain=16).rtol_l2 == pytest.approx(4 * tolerance("bfloat16", 0).rtol_l2, rel=1e-3)
    assert tolerance("float32", 100, chain=16) == tolerance("float32", 100)
    assert tolerance("bfloat16", 100, chain=0) == tolerance("bfloat16", 100)


def confident_loss(seed):
    """logsumexp - logit where the label's logit is near 30: 1e-11 left over, float32 keeps none of its digits."""
    logits = np.random.default_rng(seed).standard_normal((64, 100)).astype(np.float32)
    logits[:, 0] += 30

    def loss(z):
        top = z.max(-1)
        return np.log(np.exp(z - top[:, None]).sum(-1, dtype=z.dtype)) + top - z[:, 0]

    exact = {"y": loss(logits.astype(np.float64))}
    return {"y": loss(logits)}, exact, {"terms": {"y": float(np.abs(logits).max())}}


def cancelling_dot(seed):
    """Rows orthogonal to the columns but for rounding: the products cancel, and so do their digits."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((16, 256)), rng.standard_normal((256, 4))
    a = (a - a @ b @ np.linalg.pinv(b)).astype(np.float32)
    b = b.astype(np.float32)
    f = lambda named: {"y": named["a"] @ named["b"]}  # noqa: E731
    wide = {"a": a.astype(np.float64), "b": b.astype(np.float64)}
    return {"y": running_dot(a, b, np.float32)}, f(wide), {"sensitivity": sensitivity(f, wide, rng)}


@pytest.mark.parametrize("case", [confident_loss, cancelling_dot])
def test_cancellation_is_forgiven_by_what_cancels_and_no_more(case):
    actual, reference, cancels = case(0)
    assert not certify(actual, reference, "float32", 256).passed
    assert certify(actual, reference, "float32", 256, **cancels).passed
    (scale,) = cancels.values()
    wrong = {"y": actual["y"] + np.float32(1e-3) * np.max(scale["y"])}
    assert not certify(wrong, reference, "float32", 256, **cancels).passed


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
def test_a_gradient_that_is_rounding_alone_is_held_to_the_largest_and_a_small_one_to_itself(size, dtype):
    """Rounding alone, as of a key's bias: 0 in exact arithmetic, so that two programs agree in no digit of it."""
    rng = np.random.default_rng(0)
    noise = 2.0**-10 if dtype == "bfloat16" else 1e-7

    def normal(size):
        return (size * rng.standard_normal(64)).astype("float32")

    original = {"dlarge": normal(1.0), "dsmall": normal(size), "dbias": normal(noise), "dzero": np.zeros(64, "float32"), "dempty": normal(1.0)[:0]}

    def nearby():
        moved = {n: g * (1 + 10 * normal(tolerance(dtype, 0).rtol_l2)[: g.size]) for n, g in original.items()} | {"dbias": normal(noise)}
        return {n: metrics(g, original[n]) for n, g in moved.items()}

    terms = cancelling(nearby)
    assert terms == {"dbias": pytest.approx(np.sqrt(np.mean(original["dlarge"] ** 2)))} and cancelling(dict) == {}

    def passed(terms, **wrong):
        return compare(original | wrong, original, dtype, 64, gradients=list(original), terms=terms).passed

    assert not passed({}, dbias=normal(noise)) and passed(terms, dbias=normal(noise)), "it cancels"
    assert not passed(terms, dbias=original["dbias"] + np.float32(0.1)), "by more than the rounding of the largest"
    assert not passed(terms, dsmall=-original["dsmall"]), "it is small"
    assert not passed(terms, dzero=normal(noise)), "nothing cancels where all is 0"


def test_what_is_made_of_rounding_alone_may_move_as_with_the_last_bits_eightfold():
    """As Adam's first step by a random sign."""
    rng = np.random.default_rng(0)
    base, nearby, other = (1e-3 * rng.choice([-1.0, 1.0], 4096) for _ in range(3))
    bound = tolerance("float32", 64)
    moved = metrics(nearby, base)
    made = with_last_bits((0.0, 0.0), moved, bound)
    assert bound.allowed_l2(made[0], 1 << 60) == pytest.approx(8 * moved.abs_l2) and bound.allowed_max(made[1]) == pytest.approx(8 * moved.max_abs)
    assert with_last_bits((1e9, 1e9), moved, bound) == (1e9, 1e9)

    def passed(actual, sensitivity):
        return compare({"w": actual}, {"w": base}, "float32", 64, sensitivity=sensitivity).passed

    assert not passed(other, {}) and passed(other, {"w": made}) and not passed(50 * other, {"w": made})


TOLERANCES = [
    # dtype, reduction length, least and most that rtol_l2 may be
    ("float32", 1, 8 * 2**-23, 10 * 2**-23),
    ("float32", 4096, 64 * 2**-23, 80 * 2**-23),
    ("float64", 4096, 64 * 2**-52, 80 * 2**-52),
    ("tfloat32", 4096, 2**-10, 1.02 * 2**-10),
    ("float16", 4096, 2**-10, 1.02 * 2**-10),
    ("bfloat16", 4096, 2**-7, 1.01 * 2**-7),
]


@pytest.mark.parametrize(("dtype", "length", "least", "most"), TOLERANCES)
def test_tolerance_follows_the_formula(dtype, length, least, most):
    t = tolerance(dtype, length)
    assert least <= t.rtol_l2 <= most
    assert t.atol_max == 3 * t.rtol_l2
    assert tolerance(dtype, length, gradient=True).rtol_l2 == 2 * t.rtol_l2
    assert tolerance(dtype, 4 * length).rtol_l2 > t.rtol_l2


@pytest.mark.parametrize(("dtype", "length"), [("int32", 4), ("float8_e9", 4), ("float32", -1)])
def test_no_tolerance_for_what_has_none(dtype, length):
    with pytest.raises(ValidationError):
        tolerance(dtype, length)


nan, inf = math.nan, math.inf
METRICS = [
    # actual, reference, dtype of actual, expected fields
    ([1.0, 2.0], [1.0, 2.0], "float32", {"max_abs": 0, "max_rel": 0, "rel_l2": 0, "max_ulp": 0}),
    ([3.0, 4.5], [3.0, 4.0], "float32", {"max_abs": 0.5, "max_rel": 0.125, "rel_l2": 0.1, "reference_max": 4}),
    ([1 + 2**-23], [1.0], "float32", {"max_ulp": 1}),
    ([1 + 2**-7], [1.0], "bfloat16", {"max_ulp": 1}),
    ([1.5], [1.0], "float16", {"max_ulp": 512}),
    ([0.0], [2**-24], "float16", {"max_ulp": 1}),
    ([0.0], [0.0], "float64", {"max_ulp": 0, "rel_l2": 0}),
    ([1.0, 0.0], [0.0, 0.0], "float32", {"rel_l2": inf, "max_rel": 0}),
    ([nan, inf, -inf, 1.0], [nan, inf, -inf, 1.0], "float32", {"nonfinite_mismatch": 0, "max_abs": 0}),
    ([nan, 1.0], [1.0, nan], "float32", {"nonfinite_mismatch": 2}),
    ([inf], [-inf], "bfloat16", {"nonfinite_mismatch": 1}),
    ([nan], [inf], "float32", {"nonfinite_mismatch": 1}),
    ([1e9], [inf], "float32", {"nonfinite_mismatch": 1}),
    ([inf, 1.0], [1e5, 1.0], "float16", {"nonfinite_mismatch": 0}),
    ([-inf], [1e5], "float16", {"nonfinite_mismatch": 1}),
    ([inf], [1e5], "float32", {"nonfinite_mismatch": 1}),
    ([1, 2, 4], [1, 2, 3], "int32", {"max_abs": 1, "max_ulp": 1}),
    ([], [], "float32", {"size": 0, "max_abs": 0, "nonfinite_mismatch": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("actual", "reference", "dtype", "expected"), METRICS)
def test_metrics(actual, reference, dtype, expected):
    with np.errstate(over="ignore"):
        found = metrics(np.asarray(actual).astype(DTYPES.get(dtype, np.int32)), np.asarray(reference, np.float64))
    assert {k: getattr(found, k) for k in expected} == pytest.approx(expected)


def test_percentiles_are_of_the_absolute_error():
    found = metrics(np.arange(1001.0), np.zeros(1001))
    assert dict(found.percentiles) == pytest.approx({"50": 500, "90": 900, "99": 990, "99.9": 999})


def test_norms_neither_overflow_nor_underflow():
    assert metrics(np.full(4, 2e200), np.full(4, 1e200)).rel_l2 == pytest.approx(1)
    assert metrics(np.full(4, 2e-200), np.full(4, 1e-200)).rel_l2 == pytest.approx(1)


def test_figures_of_many_blocks_are_those_of_one(monkeypatch):
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((7, 13, 11)) * 10.0 ** rng.integers(-6, 6, (7, 13, 11))
    actual = (reference * (1 + 1e-3 * rng.standard_normal(reference.shape))).astype(np.float32)
    actual[0, 0, :3], reference[0, 0, 1:4] = (nan, inf, -inf), (inf, inf, nan)
    whole = metrics(actual, reference).to_json()
    monkeypatch.setattr(sys.modules[metrics.__module__], "_BLOCK", 50)  # 21 of them, on several threads
    parts = metrics(actual, reference).to_json()
    assert parts.pop("percentiles") == whole.pop("percentiles")
    assert parts == pytest.approx(whole, rel=1e-12) and whole["nonfinite_mismatch"] == 3


def test_only_equal_shapes_of_real_numbers_are_compared():
    with pytest.raises(ValidationError, match="shape"):
        metrics(np.zeros((2, 1)), np.zeros(2))
    with pytest.raises(ValidationError, match="complex"):
        metrics(np.zeros(2, complex), np.zeros(2))


FAILURES = [
    ({}, "not computed"),
    ({"y": np.ones(3, np.float32)}, "shape"),
    ({"y": np.array([1, nan, 1, 1], np.float32)}, "NaN"),
    ({"y": np.array([1, 1.001, 1, 1], np.float32)}, "L2"),
    ({"y": np.ones(4, np.float32), "z": np.ones(1)}, "no such array"),
]


@pytest.mark.parametrize(("actual", "problem"), FAILURES)
def test_a_failure_says_what_is_wrong(actual, problem):
    found = certify(actual, {"y": np.ones(4)}, "float32", 1)
    assert not found.passed
    assert problem in found.summary()


def test_a_single_wrong_element_of_many_fails_by_its_size():
    reference = np.random.default_rng(0).standard_normal(1_000_000)
    actual = reference.astype(ml_dtypes.bfloat16)
    actual[777] += ml_dtypes.bfloat16(0.5)
    assert "largest error" in certify({"y": actual}, {"y": reference}, "bfloat16", 64).summary()


def test_what_cancels_in_one_row_excuses_no_other():
    rng = np.random.default_rng(0)
    reference, terms = rng.standard_normal((64, 32)), np.zeros((64, 1))
    terms[5] = 1e9  # a row that sees no key, under an additive fill
    within, beyond = reference.copy(), reference.copy()
    within[5] += 100.0
    beyond[6] += 0.01
    assert certify({"y": within.astype(np.float32)}, {"y": reference}, "float32", 64, terms={"y": terms}).passed
    found = certify({"y": beyond.astype(np.float32)}, {"y": reference}, "float32", 64, terms={"y": terms})
    assert "largest error 1.00e-02" in found.summary()


def test_certificates_merge_and_travel_as_json():
    y = np.array([1.0, inf, 3.0])
    first = certify({"y": y, "dx": y}, {"y": y, "dx": np.zeros(3)}, "bfloat16", 8, gradients=["dx"], where="seed 0")
    second = certify({"y": y}, {"y": y}, "bfloat16", 8, where="seed 1")
    both = first.merge(second)
    text = json.dumps(both.to_json(), allow_nan=False)
    assert Certificate.from_json(json.loads(text)) == both
    assert [(c.name, c.gradient, c.where, c.passed) for c in both.checks] == [
        ("y", False, "seed 0", True),
        ("dx", True, "seed 0", False),
        ("y", False, "seed 1", True),
    ]
    with pytest.raises(ValidationError, match="merged"):
        both.merge(certify({"y": y}, {"y": y}, "float32", 8))
    with pytest.raises(ValidationError, match="not one"):
        Certificate.from_json({"checks": [{}]})


def test_nothing_compared_is_not_a_pass():
    assert not certify({}, {}, "float32", 1).passed


def test_what_only_the_narrowest_dtype_moves_is_rounding_alone_where_it_moves_as_far_as_it_is_large():
    """float32 weights that are read as bfloat16: moved by their own last bits, the program rounds as before."""
    rng = np.random.default_rng(0)
    original = {"noise": rng.normal(size=(40, 128)), "known": rng.normal(size=(40, 128))}

    def nearby(step):
        moved = {n: a * (1 + (step or 0) * rng.uniform(-1, 1, a.shape)) for n, a in original.items()}
        return moved | {"noise": rng.normal(size=(40, 128)) if step == 2.0**-8 else original["noise"]}

    def distances(got):
        return {n: metrics(a, original[n]) for n, a in got.items()}

    bound = tolerance("bfloat16", 1)
    far = movements(original, nearby, distances, np.asarray, lambda _: bound, 2.0**-8)
    size = np.linalg.norm(original["noise"])
    assert far["noise"][0] * bound.rtol_l2 > 8 * size
    assert far["known"][0] < 0.7 * size  # per unit of relative change, and no more
