"""What random inputs do not show: code that agrees with an op on them, and is another function elsewhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import kpt_jax

_rng = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(_rng.standard_normal(shape), jnp.float32)


X, W, G = normal(16, 32), normal(32, 64) / 6, normal(64)
B, T, N, H = 2, 16, 2, 8
Q, K, V = normal(B, T, N, H), normal(B, T, N, H), normal(B, T, N, H)
CAUSAL = jnp.tril(jnp.ones((T, T), bool))
PAD = jnp.ones((B, T), bool)
BYTES = jnp.asarray([3, 7], "uint8")
LOGITS, LABELS = normal(12, 32), jnp.arange(12)


def attention(q, k, v, masked=lambda s: s, softmax=jax.nn.softmax):
    scores = masked(jnp.einsum("btnh,bsnh->bnts", q, k) * H**-0.5)
    return jnp.einsum("bnts,bsnh->btnh", softmax(scores, axis=-1), v)


def floored_variance(x, g):
    mean = x.mean(-1, keepdims=True)
    var = jnp.maximum(0.2, (x * x).mean(-1, keepdims=True) - mean * mean)
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * g


def two_added_masks(q, k, v, pad):
    return attention(q, k, v, lambda s: s + jnp.where(CAUSAL, 0, -1e9) + jnp.where(pad[:, None, None], 0, -1e9))


def lowest_added(q, k, v, pad):
    keep = CAUSAL & pad[:, None, None]
    return attention(q, k, v, lambda s: s + jnp.where(keep, 0, jnp.finfo("float32").min))


def up_to_a_length(q, k, v, length):
    return attention(q, k, v, lambda s: jnp.where((jnp.arange(T) <= length[:, None])[:, None, None], s, -1e9))


def bytes_that_wrap(q, k, v, length):
    at = jnp.arange(T, dtype="uint8") - jnp.uint8(2)
    return attention(q, k, v, lambda s: jnp.where((at < length[:, None])[:, None, None], s, -1e9))


def shift_without_gradient(x, w, labels):
    z = x @ w
    top = z.max(-1, keepdims=True)
    total = jnp.log(jnp.exp(z - jax.lax.stop_gradient(top)).sum(-1)) + top[:, 0]
    return total - jnp.take_along_axis(z, labels[:, None], -1)[:, 0]


def chosen_from_log_softmax(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], -1)[:, 0]


def in_8_bits(q, k, v):
    small = jnp.float8_e4m3fn
    return attention(*(x.astype(small).astype("float32") for x in (q, k, v)))


@jax.custom_jvp
def steep(x):
    return x * 1.0


steep.defjvp(lambda p, t: (steep(*p), t[0] * 5))

# name -> (function, what it is planned on, what it is called with), the floats of which are differentiated
CASES = {
    "a clip that random inputs do not reach": (lambda x, w: jnp.minimum(jax.nn.relu(x @ w), 20.0), (X, W), (X * 100, W)),
    "a clip before the activation": (lambda x, w: jax.nn.silu(jnp.clip(x @ w, -30, 30)), (X, W), (X * 100, W)),
    "NaN made 0": (lambda x, w: jnp.nan_to_num(jax.nn.relu(x @ w)), (X, W), (X.at[0].set(jnp.nan), W)),
    "NaN tested for": (lambda x, w: jnp.where(jnp.isnan(x @ w), 0.0, jax.nn.gelu(x @ w)), (X, W), (X.at[0].set(jnp.nan), W)),
    "a floor under the variance": (floored_variance, (normal(16, 64), G), (normal(16, 64) / 10, G)),
    "two masks added, rows without a key": (two_added_masks, (Q, K, V, PAD), (Q, K, V, PAD.at[:, :5].set(False))),
    "gradients of rows without a key": (lowest_added, (Q, K, V, PAD), (Q, K, V, PAD.at[:, :5].set(False))),
    "the largest length": (up_to_a_length, (Q, K, V, jnp.asarray([3, 7])), (Q, K, V, jnp.asarray([3, 2**31 - 1]))),
    "positions that wrap": (bytes_that_wrap, (Q, K, V, BYTES), (Q, K, V, BYTES)),
    "a shift held from the gradient once": (shift_without_gradient, (X, W, jnp.arange(16)), (X, W, jnp.arange(16))),
    "a label outside the vocabulary": (chosen_from_log_softmax, (LOGITS, LABELS), (LOGITS, LABELS.at[3].set(-100))),
    "rounding to 8 bits": (in_8_bits, (Q, K, V), (Q, K, V)),
    "a derivative rule on the scores": (lambda q, k, v: attention(q, k, v, steep), (Q, K, V), (Q, K, V)),
}


@pytest.mark.parametrize("certify_bytes", [2 << 30, 1], ids=["compared with the code", "too large to be compared"])
@pytest.mark.parametrize("name", CASES)
def test_same_function(name, certify_bytes, monkeypatch):
    monkeypatch.setenv("KPT_CERTIFY_BYTES", str(certify_bytes))
    fn, planned, called = CASES[name]
    fast = kpt_jax.optimize(fn)
    fast.plan(*planned)
    moving = tuple(i for i, a in enumerate(called) if jnp.issubdtype(a.dtype, jnp.floating))

    def projected(f):
        def loss(*args):
            out = f(*args)
            return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

        return jax.jit(jax.grad(loss, moving, has_aux=True))(*called)

    grads, out = projected(fast)
    want_grads, want = projected(fn)
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
    for got, expected in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3 * float(jnp.nanmax(jnp.abs(expected))))


def test_equal_code_with_another_derivative_rule_is_proved_anew():
    def ramp(slope):
        @jax.custom_jvp
        def rule(x):
            return jnp.maximum(x, 0)

        rule.defjvp(lambda p, t: (jnp.maximum(p[0], 0), jnp.where(p[0] > 0, slope * t[0], 0)))
        return rule

    for slope in (1.0, 3.0):
        act = ramp(slope)

        def fn(x, w, act=act):
            return act(x @ w).sum()

        fast = kpt_jax.optimize(fn)
        assert len(fast.plan(X, W).sites) == (slope == 1.0)
        np.testing.assert_allclose(jax.grad(fast)(X, W), jax.grad(fn)(X, W), rtol=1e-4, atol=1e-5)


def test_an_example_is_part_of_a_proof():
    """Equal code is proved once on random inputs; what one user's data shows says nothing of another's."""
    def fn(x, w):
        return jax.nn.gelu(x @ w)

    first, second = kpt_jax.optimize(fn).plan(X, W), kpt_jax.optimize(fn).plan(X * 2, W)
    errors = [[c["metrics"]["reference_max"] for c in p.sites[0].certificate["checks"] if c["where"] == "the example inputs"]
              for p in (first, second)]  # fmt: skip
    assert errors[0] and errors[0] != errors[1]


def test_symbolic_sizes_run_as_written():
    fast = kpt_jax.optimize(lambda x, w: jax.nn.gelu(x @ w))
    rows = export.symbolic_shape("b, 32")
    exported = export.export(jax.jit(fast))(jax.ShapeDtypeStruct(rows, jnp.float32), jax.ShapeDtypeStruct(W.shape, W.dtype))
    np.testing.assert_allclose(exported.call(X, W), jax.nn.gelu(X @ W), rtol=1e-5, atol=1e-6)
