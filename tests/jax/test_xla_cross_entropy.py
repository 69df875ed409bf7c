"""The plain-JAX losses against the formula in float64: labels, smoothing, cap, bias, cotangents, transformations."""

from __future__ import annotations

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import kpt_jax
from kpt.errors import OpError
from pallas_kernels.cross_entropy.xla import cross_entropy
from pallas_kernels.linear_cross_entropy import xla as linear
from pallas_kernels.linear_cross_entropy.xla import linear_cross_entropy
from tests.jax.certified import EIGHT_DEVICES

EPS32 = float(np.finfo("float32").eps)


def formula(logits, labels, g, label_smoothing=0.0, logits_soft_cap=None, invalid="nan"):
    """Loss and its gradient with respect to the logits, in float64 NumPy."""
    x = np.asarray(logits, np.float64)
    classes = x.shape[-1]
    t = np.tanh(x / logits_soft_cap) if logits_soft_cap else None
    z = x if t is None else logits_soft_cap * t
    if invalid == "clip":
        labels = np.clip(labels, 0, classes - 1)
    onehot = (np.arange(classes) == np.asarray(labels)[..., None]).astype(np.float64)
    valid = onehot.any(-1)
    m = z.max(-1, keepdims=True)
    lse = np.log(np.exp(z - m).sum(-1, keepdims=True)) + m
    picked = np.where(onehot > 0, z, 0).sum(-1)
    share = np.where(valid, 1.0, label_smoothing if invalid == "drop" else 1.0)  # what the target sums to
    loss = share * lse[..., 0] - (1 - label_smoothing) * picked
    if label_smoothing:
        loss = loss - label_smoothing * z.mean(-1)
    if invalid == "nan":
        loss = np.where(valid, loss, np.nan)
    d = (share[..., None] * np.exp(z - lse) - (1 - label_smoothing) * onehot - label_smoothing / classes) * np.asarray(g, np.float64)[..., None]
    return loss, d if t is None else d * (1 - t * t)


def close(got, want, terms=1, eps=EPS32):
    got, want = np.asarray(got, np.float64), np.asarray(want)
    assert got.shape == want.shape
    scale = np.sqrt(np.nanmean(want**2)) if want.size and np.isfinite(want).any() else 1.0
    bound = 8 * eps * np.sqrt(terms)
    np.testing.assert_allclose(got, want, rtol=bound, atol=bound * scale)


CASES = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "capped": {"logits_soft_cap": 5.0},
    "all": {"label_smoothing": 0.2, "logits_soft_cap": 30.0},
    "invalid is NaN": {"bad": True},
    "invalid is zero": {"bad": True, "invalid": "zero"},
    "invalid is zero, smoothed": {"bad": True, "invalid": "zero", "label_smoothing": 0.1},
    "invalid is clipped": {"bad": True, "invalid": "clip"},
    "invalid is dropped": {"bad": True, "invalid": "drop"},
    "invalid is dropped, smoothed": {"bad": True, "invalid": "drop", "label_smoothing": 0.1},
}
SHAPES = {"matrix": (23,), "batch": (3, 14), "one row": (1,), "no leading dim": (), "no rows": (0,), "no batch": (0, 5)}


def labels_of(rng, rows, classes, bad):
    labels = rng.integers(0, classes, rows)
    if bad and np.ndim(labels) and labels.size > 1:
        labels.flat[0], labels.flat[-1] = -100, classes
    return np.asarray(labels, np.int32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_cross_entropy(case, shape):
    params = {k: v for k, v in CASES[case].items() if k != "bad"}
    rng, rows = np.random.default_rng(0), SHAPES[shape]
    logits = np.asarray(rng.normal(size=(*rows, 37)) * 3, np.float32)
    labels = labels_of(rng, rows, 37, CASES[case].get("bad"))
    g = np.asarray(rng.normal(size=rows), np.float32)
    loss, vjp = jax.vjp(lambda z: cross_entropy(logits=z, labels=jnp.asarray(labels), **params), jnp.asarray(logits))
    want_loss, want_grad = formula(logits, labels, g, **params)
    assert loss.dtype == jnp.float32
    close(loss, want_loss)
    close(vjp(jnp.asarray(g))[0], want_grad)


COTANGENTS = {
    "each its own": lambda rng, labels: rng.normal(size=labels.shape),
    "all alike": lambda rng, labels: np.full(labels.shape, -0.3),
    "labels in range alike": lambda rng, labels: np.where((labels >= 0) & (labels < 37), 0.3, 0.0),
    "some masked": lambda rng, labels: np.where(rng.random(labels.shape) < 0.5, 0.3, 0.0),
}


@pytest.mark.sampled(5)
@pytest.mark.parametrize(("shape", "chunks", "cotangents"), [
    *((shape, 1, "each its own") for shape in SHAPES),
    *(("batch", 4, name) for name in COTANGENTS),
    ("no rows", 4, "all alike"),
])  # fmt: skip
@pytest.mark.parametrize("case", CASES)
def test_linear_cross_entropy(case, shape, chunks, cotangents, monkeypatch):
    params = {k: v for k, v in CASES[case].items() if k != "bad"}
    rng, rows = np.random.default_rng(0), SHAPES[shape]
    x, w, b = (np.asarray(rng.normal(size=s), np.float32) for s in ((*rows, 16), (16, 37), (37,)))
    labels = labels_of(rng, rows, 37, CASES[case].get("bad"))
    g = np.asarray(COTANGENTS[cotangents](rng, labels), np.float32)
    monkeypatch.setattr(linear, "CHUNK_BYTES", max(1, int(np.prod(rows)) * 37 * 4 // chunks))

    @jax.jit
    def both(x, w, b, g):
        loss, vjp = jax.vjp(lambda x, w, b: linear_cross_entropy(x=x, w=w, b=b, labels=labels, **params), x, w, b)
        return loss, vjp(g)

    loss, (dx, dw, db) = both(x, w, b, g)
    plain = linear_cross_entropy(
        x=jnp.asarray(x), w=jnp.asarray(w), b=jnp.asarray(b), labels=jnp.asarray(labels), **params
    )
    x64, w64 = np.asarray(x, np.float64), np.asarray(w, np.float64)
    want_loss, dz = formula(x64 @ w64 + b, labels, g, **params)
    close(loss, want_loss, terms=16)
    close(plain, want_loss, terms=16)
    close(dx, dz @ w64.T, terms=37)
    close(dw, np.tensordot(x64, dz, (range(len(rows)),) * 2), terms=37)
    close(db, dz.sum(tuple(range(len(rows)))), terms=37)


def products(jaxpr):
    """Products of a program: those of a loop's body count once, those of the choices of a cond as in the shortest."""
    total = 0
    for eqn in jaxpr.eqns:
        bodies = [products(getattr(v, "jaxpr", v)) for p in eqn.params.values() for v in (p if isinstance(p, tuple) else (p,))
                  if hasattr(getattr(v, "jaxpr", v), "eqns")]  # fmt: skip
        total += eqn.primitive.name == "dot_general"
        total += min(bodies, default=0) if eqn.primitive.name == "cond" else sum(bodies)
    return total


MEANS = {
    "a mask": (lambda rng: rng.random((3, 14)) < 0.5, lambda loss, by: (loss * by).sum() / by.sum()),
    "weights of both signs": (lambda rng: rng.normal(size=(3, 14)), lambda loss, by: (loss * by).mean()),
    "a mask chosen by": (lambda rng: rng.random((3, 14)) < 0.5, lambda loss, by: jnp.where(by != 0, loss, 0).sum()),
    "each its own cotangent": (lambda rng: rng.normal(size=(3, 14)), lambda loss, by: jnp.square(loss).sum()),
}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("case", ["invalid is zero, smoothed", "invalid is dropped"])
def test_weights(case, mean, chunks, monkeypatch):
    """Weighted inside as weighted outside, derivatives by the weights too."""
    params = {k: v for k, v in CASES[case].items() if k != "bad"}
    rng = np.random.default_rng(0)
    x, w, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 14, 16), (16, 37), (37,)))
    draw, total = MEANS[mean]
    labels, by = jnp.asarray(labels_of(rng, (3, 14), 37, CASES[case].get("bad"))), jnp.asarray(draw(rng), jnp.float32)
    monkeypatch.setattr(linear, "CHUNK_BYTES", 3 * 14 * 37 * 4 // chunks)

    def inside(x, w, b, weights):
        return total(linear_cross_entropy(x=x, w=w, b=b, labels=labels, weights=weights, **params), by)

    def outside(x, w, b, weights):
        return total(linear_cross_entropy(x=x, w=w, b=b, labels=labels, **params) * weights, by)

    got, want = (jax.jit(jax.value_and_grad(f, (0, 1, 2, 3)))(x, w, b, by) for f in (inside, outside))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def test_a_mean_of_weighted_losses_takes_three_products(monkeypatch):
    monkeypatch.setattr(linear, "CHUNK_BYTES", 8 * 64 * 4)
    x, w, labels, mask = jnp.ones((64, 16)), jnp.ones((16, 64)), jnp.zeros(64, int), jnp.arange(64) % 3 == 0

    def loss(x, w):
        return linear_cross_entropy(x=x, w=w, labels=labels, weights=mask.astype(x.dtype)).sum() / mask.sum()

    made = jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, w)
    assert products(made.jaxpr) == 3
    want = jax.grad(lambda x, w: (mask * linear_cross_entropy(x=x, w=w, labels=labels)).sum() / mask.sum(), (0, 1))(x, w)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), jax.grad(loss, (0, 1))(x, w), want)


def test_large_logits_do_not_cancel():
    """At 1e6 a float32 log-sum-exp is 0.06 apart from the next; the loss is not."""
    logits = np.asarray([[1e6, 1e6 + 1, 1e6 - 2]], np.float32)
    labels = np.asarray([2], np.int32)
    loss, vjp = jax.vjp(lambda z: cross_entropy(logits=z, labels=labels), jnp.asarray(logits))
    want_loss, want_grad = formula(logits, labels, [1.0])
    close(loss, want_loss)
    close(vjp(jnp.ones(1))[0], want_grad)


@pytest.mark.parametrize(
    ("row", "label", "loss"),
    [
        ([0.0, -np.inf, 0.0], 0, np.log(2)),
        ([0.0, -np.inf, 0.0], 1, np.inf),
        ([0.0, np.inf, 0.0], 0, np.inf),
        ([0.0, np.inf, 0.0], 1, np.nan),
        ([0.0, np.nan, 0.0], 0, np.nan),
        ([-np.inf, -np.inf, -np.inf], 0, np.nan),
    ],
)
def test_nan_and_inf_follow_the_formula(row, label, loss):
    got = cross_entropy(logits=jnp.asarray([row]), labels=jnp.asarray([label]))
    np.testing.assert_allclose(got, [loss], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_floats(dtype):
    """Loss in float32, exact for the rounded logits; gradient in the dtype of the logits."""
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(9, 37)) * 3, dtype)
    labels = labels_of(rng, (9,), 37, False)
    loss, vjp = jax.vjp(lambda z: cross_entropy(logits=z, labels=jnp.asarray(labels)), logits)
    want_loss, want_grad = formula(np.asarray(logits, np.float64), labels, np.ones(9))
    grad = vjp(jnp.ones(9))[0]
    assert (loss.dtype, grad.dtype) == (jnp.float32, dtype)
    close(loss, want_loss)
    close(grad, want_grad, eps=float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("invalid", ["nan", "zero", "clip", "drop"])
def test_labels_of_a_byte_beside_more_classes_than_one_holds(invalid, dtype):
    rng = np.random.default_rng(4)
    x, w = (np.asarray(rng.normal(size=s), np.float32) for s in ((4, 16), (16, 300)))
    labels, z = np.asarray([0, 100, 44, 127]).astype(dtype), x @ w
    want_loss, want_grad = formula(z, labels, np.ones(4), invalid=invalid)
    for fn, given in ((cross_entropy, {"logits": z}), (linear_cross_entropy, {"x": z, "w": np.eye(300, dtype=np.float32)})):
        (name, z_), *more = given.items()
        loss, vjp = jax.vjp(lambda a, fn=fn, name=name, more=more: fn(**{name: a}, **dict(more), labels=labels, invalid=invalid), z_)
        close(loss, want_loss, terms=16)
        close(vjp(jnp.ones(4))[0], want_grad, terms=16)


@pytest.mark.parametrize("spec", [(None, "i"), ("i", None), ("i", "j")])
def test_explicit_meshes(spec):
    """Of classes that a mesh says it shares out none can be indexed."""
    mesh = jax.make_mesh((1, 1), ("i", "j"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    rng, (rows, classes) = np.random.default_rng(5), spec
    x, w, z = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 16), (16, 37), (6, 37)))
    labels = jnp.asarray(rng.integers(0, 37, 6))

    @jax.jit
    def step(x, w, z, labels):
        loss = jax.value_and_grad(lambda z: cross_entropy(logits=z, labels=labels).sum())(z)
        return loss, linear_cross_entropy(x=x, w=w, labels=labels)

    want = step(x, w, z, labels)
    with jax.set_mesh(mesh):
        specs = (rows, None), (None, classes), spec, (rows,)
        places = [jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*s)) for s in specs]
        got = step(*map(jax.device_put, (x, w, z, labels), places))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize("transform", ["vmap", "scan", "remat"])
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_transforms(op, transform, monkeypatch):
    monkeypatch.setattr(linear, "CHUNK_BYTES", 4 * 37 * 4)
    rng = np.random.default_rng(2)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 14, 16), (16, 37)))
    labels = jnp.asarray(rng.integers(0, 37, (3, 14)))

    def loss(x, w, labels):
        if op == "cross_entropy":
            return cross_entropy(logits=x @ w, labels=labels)
        return linear_cross_entropy(x=x, w=w, labels=labels)

    transformed = {
        "vmap": lambda x, w, labels: jax.vmap(loss, (0, None, 0))(x, w, labels),
        "scan": lambda x, w, labels: jax.lax.scan(lambda c, a: (c, loss(a[0], w, a[1])), 0, (x, labels))[1],
        "remat": jax.checkpoint(loss),
    }[transform]

    def run(fn):
        return jax.jit(jax.value_and_grad(lambda x, w: jnp.sum(fn(x, w, labels) ** 2), (0, 1)))(x, w)

    (got, got_grads), (want, want_grads) = run(transformed), run(loss)
    for a, b in zip((got, *got_grads), (want, *want_grads), strict=True):
        close(a, np.asarray(b, np.float64), terms=37)


def test_the_logits_never_exist():
    """4096 tokens, 512 wide, 50257 classes: a sixth of the plain code's temporaries, which are two arrays of logits."""
    shapes = ((4096, 512), "float32"), ((512, 50257), "float32"), ((4096,), "int32")
    specs = [jax.ShapeDtypeStruct(*s) for s in shapes]

    def plain(x, w, labels):
        return -jnp.take_along_axis(jax.nn.log_softmax(x @ w), labels[:, None], -1)

    def temp_bytes(fn):
        step = jax.value_and_grad(lambda x, w, labels: fn(x, w, labels).mean(), (0, 1))
        return jax.jit(step).lower(*specs).compile().memory_analysis().temp_size_in_bytes

    kernel = temp_bytes(lambda x, w, labels: linear_cross_entropy(x=x, w=w, labels=labels))
    assert kernel * 6 <= temp_bytes(plain)


@pytest.mark.parametrize(
    "wrong",
    [
        {"labels": jnp.zeros((4, 3), int)},
        {"labels": jnp.zeros(4)},
        {"invalid": "ignore"},
        {"w": jnp.zeros((15, 37))},
        {"b": jnp.zeros(36)},
    ],
    ids=lambda w: next(iter(w)),
)
def test_errors(wrong):
    right = {"x": jnp.zeros((4, 16)), "w": jnp.zeros((16, 37)), "labels": jnp.zeros(4, int)}
    with pytest.raises(OpError):
        linear_cross_entropy(**(right | wrong))


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from pallas_kernels.linear_cross_entropy import xla

xla.CHUNK_BYTES = 64 * 48 * 4
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
x, w = jax.random.normal(jax.random.key(0), (8, 32, 16)), jax.random.normal(jax.random.key(1), (16, 48))
labels = jax.random.randint(jax.random.key(2), (8, 32), 0, 48)

@jax.jit
def step(x, w, labels):
    return jax.value_and_grad(lambda x, w: xla.linear_cross_entropy(x=x, w=w, labels=labels).mean(), (0, 1))(x, w)

want = step(x, w, labels)
by_class = P(None, "model")
for tokens, classes in ((P("data"), P()), (P(("data", "model")), P()), (P(None, "data"), P()), (P("data"), by_class)):
    place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    args = place(x, tokens), place(w, classes), place(labels, tokens)
    text = step.lower(*args).compile().as_text()
    for name in ("all-gather", "all-to-all", "collective-permute"):  # dw and the mean, sums over all, are reduced
        assert name not in text, (tokens, classes, name)
    for a, b in zip(jax.tree.leaves(step(*args)), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, atol=1e-5)

def weighted(x, w, labels, weights):
    return (weights * xla.linear_cross_entropy(x=x, w=w, labels=labels)).sum()

def mapped(*args):  # each device has its own tokens and all of w
    return jax.lax.psum(weighted(*args), "data")

for weights in (jnp.ones((8, 32)), jax.random.normal(jax.random.key(3), (8, 32))):
    args = x, w, labels, weights
    for tokens in (64, 4096):  # several chunks on each device, and one
        xla.CHUNK_BYTES = tokens * 48 * 4
        each = P("data")
        outside = jax.grad(jax.shard_map(mapped, mesh=mesh, in_specs=(each, P(), each, each), out_specs=P()), (0, 1))
        inside = jax.shard_map(jax.grad(weighted, (0, 1)), mesh=mesh, in_specs=(each, P(), each, each), out_specs=(each, P()))
        for way in (outside, inside):
            for a, b in zip(jax.jit(way)(*args), jax.grad(weighted, (0, 1))(*args)):
                np.testing.assert_allclose(a, b, atol=2e-5)
print("ok")
"""


def test_sharded_tokens_and_classes_stay_where_they_are():
    """On 8 simulated devices: the same numbers, and neither tokens nor classes are gathered."""
    env = os.environ | {"XLA_FLAGS": EIGHT_DEVICES, "JAX_PLATFORMS": "cpu"}
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "ok", done.stderr[-2000:]


def test_a_proof_of_a_short_call_goes_the_way_of_the_long_one(monkeypatch):
    """Where the call is too large to be run beside its own code, the kernel is held to float64 at a reduced size: in as many chunks."""
    seen, cut = [], linear._cut
    monkeypatch.setattr(linear, "_cut", lambda *sizes: seen.append((*sizes, cut(*sizes)[1])) or cut(*sizes))
    monkeypatch.setenv("KPT_CERTIFY_BYTES", "1")

    def loss(x, w, labels):
        return optax.softmax_cross_entropy_with_integer_labels(x @ w, labels).mean()

    arrays = (jax.ShapeDtypeStruct(s, d) for s, d in (((4096, 256), "float32"), ((256, 20000), "float32"), ((4096,), "int32")))
    plan = kpt_jax.plan(loss, *arrays)
    assert [s.kernel for s in plan.sites] == ["linear_cross_entropy.xla"], plan
    (tokens,), classes, chunks = seen[0]
    least = -(-4 * 4096 * 20000 // linear.CHUNK_BYTES)
    assert tokens < 4096 and classes < 20000 and 1 < least <= chunks < 2 * least
