"""Float32 parameters and bfloat16 arithmetic: a kernel gets its arrays as the code read them, after its last rounding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpt_jax

HALF = jnp.bfloat16
_rng = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(_rng.standard_normal(shape), jnp.float32)


def rounded(f):
    """`f` on its float arguments in bfloat16."""

    def g(*args):
        return f(*(a.astype(HALF) if a.dtype == jnp.float32 else a for a in args))

    return g


def attend(q, k, v):
    scores = jnp.einsum("btnh,bsnh->bnts", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores).astype(v.dtype), v)


def rms_norm(x, w):
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype) * w


def layer_norm(x, w, b):
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype) * w + b


def cross_entropy(logits, labels):
    logits = logits.astype(jnp.float32)
    return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]


def rope(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + jnp.concatenate([-x[..., half:], x[..., :half]], -1) * sin


TABLE = normal(48, 1, 32)
CASES = {
    "attention": (attend, [normal(2, 48, 2, 32)] * 3),
    "rms_norm": (rms_norm, [normal(48, 256), normal(256)]),
    "layer_norm": (layer_norm, [normal(48, 256), normal(256), normal(256)]),
    "linear_act": (lambda x, w, b: jax.nn.gelu(x @ w + b), [normal(48, 256), normal(256, 512) / 16, normal(512)]),
    "glu": (lambda x, g, u: jax.nn.silu(x @ g) * (x @ u), [normal(2, 48, 256), normal(256, 512) / 16, normal(256, 512) / 16]),
    "cross_entropy": (cross_entropy, [normal(48, 500), jnp.arange(48)]),
    "linear_cross_entropy": (lambda x, w, y: cross_entropy(x @ w, y), [normal(48, 256), normal(256, 500) / 16, jnp.arange(48)]),
    "rope": (rope, [normal(2, 48, 2, 32), TABLE, TABLE]),
}


@pytest.mark.parametrize("op", CASES)
def test_arrays_are_read_as_the_code_reads_them(op):
    f, args = CASES[op]
    fast = kpt_jax.optimize(rounded(f), level="aggressive")
    (site,) = fast.plan(*args).sites
    assert site.op == op
    floats = {name: spec.dtype for name, spec in site.specs.items() if not spec.dtype.startswith("int")}
    assert set(floats.values()) == {"bfloat16"}, floats


def test_only_some_are_rounded():
    """What the code reads in float32 anywhere stays float32."""

    def f(x, w):
        return rms_norm(x.astype(HALF), w.astype(HALF)) + jnp.square(w).astype(HALF)

    def g(x, w):  # the statistic of x as it is, of its rounding the product
        return x.astype(HALF) * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6).astype(HALF) * w.astype(HALF)

    x, w = normal(48, 256), normal(256)
    (site,) = kpt_jax.optimize(f).plan(x, w).sites
    assert site.specs["weight"].dtype == "bfloat16"
    for site in kpt_jax.optimize(g).plan(x, w).sites:
        assert site.specs["x"].dtype == "float32"


def test_a_training_step_with_a_bfloat16_head():
    """The logits are rounded before the loss reads them in float32, and the parameters before every product."""

    def loss(params, ids, labels):
        p = jax.tree.map(lambda a: a.astype(HALF), params)
        h = rms_norm(p["embed"][ids], p["norm"])
        return cross_entropy(h @ p["head"], labels).mean()

    params = {"embed": normal(64, 128), "norm": normal(128), "head": normal(128, 999) / 11}
    ids, labels = jnp.asarray(_rng.integers(0, 64, 96)), jnp.asarray(_rng.integers(0, 999, 96))
    fast = kpt_jax.optimize(jax.value_and_grad(loss))
    plan = fast.plan(params, ids, labels)
    head = next(s for s in plan.sites if s.op == "linear_cross_entropy")
    assert (head.specs["x"].dtype, head.specs["w"].dtype) == ("bfloat16", "bfloat16")
    got, want = fast(params, ids, labels), jax.jit(jax.value_and_grad(loss))(params, ids, labels)
    np.testing.assert_allclose(got[0], want[0], rtol=2e-3)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        assert a.dtype == b.dtype == jnp.float32
        assert np.linalg.norm(a - b) <= 2e-2 * np.linalg.norm(b)


def q_k_v(*dtypes):
    return [a.astype(d) for a, d in zip((normal(2, 48, 2, 32), normal(2, 48, 2, 32), normal(2, 48, 2, 32)), dtypes, strict=True)]


def weights_rounded(q, k, v):
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores).astype(HALF), v.astype(HALF))


@pytest.mark.parametrize("f, args, dtype", [
    (attend, q_k_v(HALF, HALF, HALF), "bfloat16"),
    (lambda q, k, v: attend(q.astype(HALF), k.astype(HALF), v), q_k_v("float32", "float32", "float32"), "float32"),
    (attend, q_k_v(HALF, HALF, "float32"), "float32"),
    (attend, q_k_v("float16", "float16", "float32"), "float32"),
    (weights_rounded, q_k_v("float32", "float32", "float32"), "float32"),
    (weights_rounded, q_k_v("float32", HALF, HALF), "float32"),
])  # fmt: skip
def test_attention_is_as_wide_as_its_widest_array(f, args, dtype):
    """Three arrays of one dtype: what the code reads in float32 is not rounded, what it rounds is."""
    args = [args[0] * 4, *args[1:]]  # sharp weights
    fast = kpt_jax.optimize(f)
    (site,) = fast.plan(*args).sites
    if dtype == "float32":
        args[2] = args[2] * 1e5  # more than float16 holds
    assert {site.specs[n].dtype for n in "qkv"} == {dtype}
    got, want = (np.asarray(g(*args), np.float32) for g in (fast, jax.jit(f)))
    assert np.isfinite(got).all() and np.linalg.norm(got - want) <= 1e-2 * np.linalg.norm(want)  # the code rounds its scores


def test_a_norm_that_rounds_is_widened_after_it():
    def f(x, w, b):
        return layer_norm(x, w, b).astype(HALF).astype(jnp.float32)

    args = normal(48, 256), normal(256), normal(256)
    fast = kpt_jax.optimize(f)
    (site,) = fast.plan(*args).sites
    assert site.params["out_dtype"] == "bfloat16"
    np.testing.assert_allclose(fast(*args), jax.jit(f)(*args), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", ["float32", HALF])
def test_a_number_added_to_all_logits_cancels(dtype):
    def f(x, w, shift):
        return cross_entropy((x.astype(dtype) @ w.astype(dtype)).astype(jnp.float32) + shift, jnp.arange(48)).mean()

    args = normal(48, 64), normal(64, 96) / 8, jnp.float32(0.3)
    fast = kpt_jax.optimize(f)
    assert [s.op for s in fast.plan(*args).sites] == ["linear_cross_entropy"]
    got, want = (jax.value_and_grad(g, (0, 1, 2))(*args) for g in (fast, f))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-3)
    assert abs(got[1][2]) < 1e-5
    for a, b in zip(got[1][:2], want[1][:2], strict=True):
        assert np.linalg.norm(a - b) <= 2e-2 * np.linalg.norm(b)
    moved, expected = (jax.jvp(lambda x, g=g: g(x, *args[1:]), args[:1], args[:1])[1] for g in (fast, f))
    np.testing.assert_allclose(moved, expected, rtol=1e-2)


def test_a_rematerialised_block_has_the_sites_of_the_block():
    """Its derivative traces the kernels again; what they are made of is nobody's site."""

    def block(x, w, a, b):
        return x + jax.nn.gelu(rms_norm(x, w.astype(HALF)) @ a.astype(HALF)) @ b.astype(HALF)

    args = normal(64, 32).astype(HALF), normal(32), normal(32, 64) / 6, normal(64, 32) / 8
    plans = []
    for made in (block, jax.checkpoint(block)):

        def step(x, *rest, made=made):
            return jax.value_and_grad(lambda *r: (made(x, *r).astype(jnp.float32) ** 2).mean(), (0, 1, 2))(*rest)

        plans.append(kpt_jax.optimize(step).plan(*args))
    assert [s.op for s in plans[0].sites] == [s.op for s in plans[1].sites] == ["rms_norm", "linear_act"]
    assert not plans[1].skipped


_SMALL = jnp.arange(48)[:, None, None] * 1e-5 * jnp.ones((1, 1, 32))
FEW, WEIGHTS = (jnp.cos(_SMALL), jnp.sin(_SMALL)), normal(2, 48, 2, 32)


def _halves(x, cos, sin):
    (a, b), half = jnp.split(x, 2, -1), x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _neighbours(x, cos, sin):
    (a, b), half = (x[..., ::2], x[..., 1::2]), x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)


@pytest.mark.parametrize("f", [rope, _halves, _neighbours])
def test_what_is_widened_to_be_turned_is_read_as_it_is(f):
    """The kernel computes in float32 anyway: a copy of float32, and a gradient of it, would be read and written for nothing."""

    def turned(x, cos, sin):
        return f(x.astype(jnp.float32), cos, sin).astype(x.dtype)

    fast = kpt_jax.optimize(turned)
    x = normal(2, 48, 2, 32).astype(HALF)
    (site,) = fast.plan(x, TABLE, TABLE + 1).sites
    assert (site.specs["x"].dtype, site.params["out_dtype"]) == ("bfloat16", "bfloat16")
    np.testing.assert_allclose(*(np.asarray(g(x, TABLE, TABLE + 1), np.float32) for g in (fast, turned)), rtol=1e-2, atol=1e-2)

    def loss(g):
        return lambda x: jnp.square(g(x, TABLE, TABLE + 1).astype(jnp.float32)).sum()

    got, want = (np.asarray(jax.grad(loss(g))(x), np.float32) for g in (fast, turned))
    assert np.linalg.norm(got - want) <= 1e-2 * np.linalg.norm(want)


VIEWED = {
    "flattened": lambda x: _neighbours(x, TABLE, TABLE + 1).reshape(2, 48, -1).astype(HALF),
    "transposed and flattened": lambda x: _halves(x, TABLE, TABLE + 1).transpose(0, 2, 1, 3).reshape(4, 48, 32).astype(HALF),
    "flattened and transposed": lambda x: _neighbours(x, TABLE, TABLE + 1).transpose(0, 2, 3, 1).astype(HALF),
}


@pytest.mark.parametrize("name", VIEWED)
def test_what_is_rounded_behind_a_view_is_rounded_by_the_kernel(name):
    x = normal(2, 48, 2, 32).astype(HALF)
    f = VIEWED[name]
    fast = kpt_jax.optimize(lambda x: f(x.astype(jnp.float32)))
    (site,) = fast.plan(x).sites
    assert site.params["out_dtype"] == "bfloat16"
    got, want = (np.asarray(y, np.float32) for y in (fast(x), f(x.astype(jnp.float32))))
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rounded_last", [False, True])
def test_views_there_and_back_have_an_end(rounded_last):
    def f(x):
        y = _neighbours(x, TABLE, TABLE + 1).reshape(2, 48, -1).reshape(2, 48, 2, 32).reshape(2, 48, -1)
        return y.astype(HALF) if rounded_last else y

    x = normal(2, 48, 2, 32)
    fast = kpt_jax.optimize(f)
    assert [s.op for s in fast.plan(x).sites] == ["rope"]
    np.testing.assert_allclose(*(np.asarray(g(x), np.float32) for g in (fast, f)), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("returned", ["before the view", "behind the view"])
def test_what_is_also_returned_unrounded_is_not_rounded(returned):
    def f(x):
        y = _neighbours(x.astype(jnp.float32), TABLE, TABLE + 1)
        flat = y.reshape(2, 48, -1)
        return (y if returned == "before the view" else flat), flat.astype(HALF)

    x = normal(2, 48, 2, 32).astype(HALF)
    fast = kpt_jax.optimize(f)
    assert all(s.params["out_dtype"] == "float32" for s in fast.plan(x).sites)
    for got, want in zip(fast(x), f(x), strict=True):
        assert got.dtype == want.dtype
        bound = 1e-5 if got.dtype == jnp.float32 else 1e-2
        np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=bound, atol=bound)


@pytest.mark.parametrize("f", [lambda u: rope(u, *FEW), lambda u: _halves(u, *FEW), lambda u: _neighbours(u, *FEW), lambda u: rms_norm(u, 1.0)])
def test_what_is_widened_and_read_elsewhere_is_left(f):
    """Two roundings are no rounding of a sum: of what nearly cancels they leave nothing."""

    def loss(x):
        u = x.astype(jnp.float32)
        return ((f(u) - u) * WEIGHTS).sum()

    x = normal(2, 48, 2, 32).astype(HALF)
    fast = kpt_jax.optimize(loss, level="aggressive")
    plan = fast.plan(x)
    assert not plan.sites and any("widened to float32" in s.reason for s in plan.skipped), plan.explain()
    np.testing.assert_array_equal(jax.grad(fast)(x), jax.grad(loss)(x))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtypes", [("float8_e4m3fn", "float32"), ("float16", "bfloat16", "float32")], ids=str)
@pytest.mark.parametrize("f", [rope, _halves, _neighbours, rms_norm])
def test_what_kernels_cannot_round_to_is_left(f, dtypes):
    def program(x):
        for dtype in dtypes:
            x = x.astype(dtype)
        return (f(x, TABLE, TABLE + 1) if f is not rms_norm else rms_norm(x, 1.0)).astype(HALF)

    x = normal(2, 48, 2, 32)
    fast = kpt_jax.optimize(program, level="aggressive")
    plan = fast.plan(x)
    assert not plan.sites and any("which no kernel does" in s.reason for s in plan.skipped), plan.explain()
    np.testing.assert_array_equal(fast(x), jax.jit(program)(x))


def test_what_is_rounded_on_the_way_is_rounded_by_kernels():
    """Float32 rotations that are rounded, and products in float32 of what is rounded."""
    shape = (2, 48, 2, 32)
    arrays = [*(normal(*shape).astype(HALF) for _ in range(3)), TABLE, TABLE + 1]

    def layer(q, k, v, cos, sin):
        q, k = (rope(x.astype(jnp.float32), cos, sin).astype(HALF) for x in (q, k))
        scores = jnp.einsum("btnh,bsnh->bnts", q.astype(jnp.float32), k.astype(jnp.float32)) * 0.125
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v.astype(jnp.float32)).astype(HALF)

    fast = kpt_jax.optimize(layer)
    sites = {s.op: s for s in fast.plan(*arrays).sites}
    assert set(sites) == {"rope", "attention"}, fast.plan(*arrays).explain()
    assert sites["rope"].params["out_dtype"] == "bfloat16"
    assert {sites["attention"].specs[n].dtype for n in "qkv"} == {"bfloat16"}
    want, got = (np.asarray(f(*arrays), np.float32) for f in (layer, fast))
    np.testing.assert_allclose(got, want, atol=2e-2)
