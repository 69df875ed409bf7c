"""The plain-JAX attention provider against the formula in float64, for every mask and every transformation."""

from __future__ import annotations

import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kpt.ops.mask import Bias, Causal, Explicit, Lengths, Mask, Segments, Window
from pallas_kernels.attention import xla
from tests.jax.certified import EIGHT_DEVICES

NEG = -1e9
ROOT = pathlib.Path(__file__).parents[2]


def formula(q, k, v, bias=None, keep=None, q_segment_ids=None, kv_segment_ids=None, kv_lengths=None, *, mask=Mask(),  # noqa: B008
            scale=None, logits_soft_cap=None):  # fmt: skip
    """The docstring of the op, written out: the whole score matrix, in the dtype of its arguments."""
    (b, t, n, h), (_, s, kv_heads, _) = q.shape, k.shape
    k, v = (jnp.repeat(x, n // kv_heads, 2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * (scale if scale is not None else 1 / math.sqrt(h))
    if logits_soft_cap is not None:
        scores = logits_soft_cap * jnp.tanh(scores / logits_soft_cap)
    visible = jnp.ones((b, n, t, s), bool)
    i, j = jnp.arange(t)[:, None], jnp.arange(s)[None]
    for term in mask.terms:
        match term:
            case Causal(offset):
                visible &= j <= i + offset
            case Window(left, right, offset):
                visible &= j >= i + offset - (s + t if left is None else left)
                visible &= j <= i + offset + (s + t if right is None else right)
            case Segments():
                visible &= (q_segment_ids[:, :, None] == kv_segment_ids[:, None])[:, None]
            case Lengths():
                visible &= (j < kv_lengths[:, None, None])[:, None]
            case Explicit():
                visible &= keep
            case Bias():
                scores = scores + bias
    scores = jnp.where(visible, scores, scores + mask.fill if mask.additive else mask.fill)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, -1), v)


def inputs(mask, b=2, t=40, s=40, n=4, kv_heads=2, h=8, hv=8, dtype="float32", small=(), seed=0):
    """Random arrays; `small` names the dims of bias and keep that are 1."""
    rng = np.random.default_rng(seed)
    arrays = {
        "q": rng.normal(size=(b, t, n, h)),
        "k": rng.normal(size=(b, s, kv_heads, h)),
        "v": rng.normal(size=(b, s, kv_heads, hv)),
    }
    rank4 = tuple(1 if name in small else d for name, d in zip("bnts", (b, n, t, s), strict=True))
    arrays = {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
    for name in mask.operands:
        match name:
            case "bias":
                arrays[name] = jnp.asarray(rng.normal(size=rank4), dtype)
            case "keep":
                arrays[name] = jnp.asarray(rng.random(rank4) < 0.7)
            case "kv_lengths":
                arrays[name] = jnp.asarray(rng.integers(min(1, s), s + 1, b), jnp.int32)
            case "q_segment_ids":
                arrays[name] = jnp.asarray(np.sort(rng.integers(0, 3, (b, t))), jnp.int32)
            case "kv_segment_ids":
                arrays[name] = jnp.asarray(np.sort(rng.integers(0, 3, (b, s))), jnp.int32)
    return arrays


def value_and_grads(fn, arrays, **params):
    """Output and the gradients of a random linear function of it, in every float array."""
    floats = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    rest = {name: x for name, x in arrays.items() if name not in floats}
    out, vjp = jax.vjp(lambda floats: fn(**floats, **rest, **params), floats)
    g = np.random.default_rng(7).normal(size=out.shape)
    return {"out": out, **{f"d{name}": x for name, x in vjp(jnp.asarray(g, out.dtype))[0].items()}}


def reference(arrays, **params):
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        wide = {
            n: jnp.asarray(x, "float64" if jnp.issubdtype(x.dtype, jnp.floating) else None) for n, x in arrays.items()
        }
        return jax.device_get(jax.jit(lambda arrays: value_and_grads(formula, arrays, **params))(wide))


def assert_close(got, want, dtype="float32"):
    eps = float(jnp.finfo(dtype).eps)
    for name, x in want.items():
        y = np.asarray(got[name], np.float64)
        assert y.shape == x.shape, name
        assert np.array_equal(np.isnan(y), np.isnan(x)), f"{name}: NaN elsewhere"
        # Absolute: the inputs are of order 1, and gradients are sums of such numbers, whatever is left of them.
        terms = max(1, want["out"].size / max(x.size, 1))
        np.testing.assert_allclose(y, x, rtol=16 * eps, atol=16 * eps * np.sqrt(terms), err_msg=name)


CAUSAL = Mask((Causal(),))
CASES = {
    "nothing hidden": (Mask(), {}),
    "causal": (CAUSAL, {}),
    "causal, one group": (CAUSAL, {"kv_heads": 1}),
    "causal, no groups": (CAUSAL, {"kv_heads": 4}),
    "causal, cache": (Mask((Causal(23),)), {"t": 17}),
    "causal, single query": (Mask((Causal(39),)), {"t": 1}),
    "causal, first queries see nothing": (Mask((Causal(-19),), fill=NEG), {}),
    "causal, first queries see nothing, NaN": (Mask((Causal(-19),)), {}),
    "window": (Mask((Window(9, 3),)), {}),
    "window, open left": (Mask((Window(None, 5),)), {}),
    "window, open right": (Mask((Window(5, None),)), {}),
    "causal window": (Mask((Causal(), Window(11, None))), {}),
    "window off the end": (Mask((Window(3, 0, 10),), fill=NEG), {}),
    "causal, window, offset": (Mask((Causal(-5), Window(7, None, -5)), fill=-1e5), {"t": 33, "s": 26}),
    "segments": (Mask((Segments(),), fill=NEG), {}),
    "causal segments": (Mask((Causal(), Segments()), fill=NEG), {}),
    "causal segments, NaN": (Mask((Causal(), Segments())), {"seed": 3}),
    "lengths": (Mask((Lengths(),)), {}),
    "causal lengths": (Mask((Causal(), Lengths()), fill=float(np.finfo("float32").min)), {}),
    "explicit": (Mask((Explicit(),), fill=NEG), {}),
    "explicit, padding": (Mask((Causal(), Explicit()), fill=NEG), {"small": "nt"}),
    "explicit, per query": (Mask((Explicit(),), fill=NEG), {"small": "s"}),
    "explicit, shared": (Mask((Explicit(), Causal()), fill=NEG), {"small": "bn"}),
    "additive": (Mask((Causal(), Explicit()), fill=-30.0, additive=True), {"small": "nt"}),
    "additive causal": (Mask((Causal(),), fill=-1e9, additive=True), {}),
    "additive causal, first see nothing": (Mask((Causal(-7),), fill=-32.0, additive=True), {}),
    "finite and not far": (Mask((Explicit(),), fill=-2.0), {}),
    "finite and not far, skipped": (Mask((Causal(-3),), fill=-2.0), {}),
    "finite and not far, causal": (Mask((Causal(),), fill=-2.0), {}),
    "one block of keys, which many do not see": (
        Mask((Causal(), Window(6, None), Explicit()), fill=float(np.finfo("float32").min)),
        {"t": 127, "s": 16, "small": "bnt"},
    ),
    "bias": (Mask((Bias(),)), {}),
    "bias, shared": (Mask((Bias(), Causal())), {"small": "b"}),
    "bias, per key": (Mask((Bias(), Causal())), {"small": "nt"}),
    "bias, per query": (Mask((Bias(), Causal()), fill=NEG), {"small": "bs"}),
    "bias, scalar": (Mask((Bias(),)), {"small": "bnts"}),
    "everything": (
        Mask((Causal(2), Window(20, None), Segments(), Lengths(), Explicit(), Bias()), fill=NEG),
        {"small": "n"},
    ),
    "long keys": (CAUSAL, {"t": 13, "s": 61}),
    "long queries": (CAUSAL, {"t": 61, "s": 13}),
    "value dim": (CAUSAL, {"hv": 5, "h": 3}),
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("case", "block_q", "block_kv"),
    [(c, 16, 12) for c in CASES] + [("everything", 64, 64), ("causal", 8, 8), ("one block of keys, which many do not see", 16, 24)],
)
def test_masks(case, block_q, block_kv, monkeypatch):
    monkeypatch.setattr(xla, "_block_sizes", lambda *_: {"block_q": block_q, "block_kv": block_kv})
    mask, shapes = CASES[case]
    arrays = inputs(mask, **shapes)
    cap = 3.0 if case in ("everything", "causal", "bias") else None
    params = {"mask": mask, "scale": 0.3, "logits_soft_cap": cap}
    got = jax.jit(lambda arrays: value_and_grads(xla.attention, arrays, **params))(arrays)
    assert_close(got, reference(arrays, **params))


def test_visible_scores_below_the_fill(monkeypatch):
    """A query whose visible scores are all -inf weighs the hidden keys, those in skipped blocks too."""
    monkeypatch.setattr(xla, "_block_sizes", lambda *_: {"block_q": 16, "block_kv": 16})
    mask = Mask((Causal(),), fill=NEG)
    arrays = inputs(mask)
    q, k = (np.abs(arrays[n]) for n in "qk")
    q[:, 0] = -np.inf
    arrays |= {"q": q, "k": k}
    got, want = jax.jit(lambda a: xla.attention(**a, mask=mask))(arrays), jax.jit(lambda a: formula(**a, mask=mask))(arrays)
    assert_close({"out": got}, {"out": np.asarray(want)})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_floats_accumulate_in_float32(dtype, monkeypatch):
    monkeypatch.setattr(xla, "_block_sizes", lambda *_: {"block_q": 16, "block_kv": 16})
    arrays = inputs(CAUSAL, dtype=dtype)
    got = jax.jit(lambda arrays: value_and_grads(xla.attention, arrays, mask=CAUSAL))(arrays)
    assert all(x.dtype == dtype for x in got.values())
    assert_close(got, reference(arrays, mask=CAUSAL), dtype)


def test_float64_stays_float64(monkeypatch):
    monkeypatch.setattr(xla, "_block_sizes", lambda *_: {"block_q": 16, "block_kv": 16})
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        arrays = inputs(CAUSAL, dtype="float64")
        got = jax.device_get(jax.jit(lambda arrays: value_and_grads(xla.attention, arrays, mask=CAUSAL))(arrays))
    assert_close(got, reference(arrays, mask=CAUSAL), "float64")


@pytest.mark.parametrize("dims", [{"b": 0}, {"t": 0}, {"s": 0}, {"t": 0, "s": 0}, {"hv": 0}, {"h": 0}], ids=str)
def test_zero_length_dims(dims):
    mask = Mask((Causal(), Lengths(), Bias()), fill=NEG)
    arrays = inputs(mask, **{"t": 6, "s": 6, **dims})
    got = value_and_grads(xla.attention, arrays, mask=mask)
    assert got["out"].shape == (*arrays["q"].shape[:3], arrays["v"].shape[3])
    assert {n: g.shape for n, g in got.items() if n != "out"} == {
        f"d{n}": arrays[n].shape for n in ("q", "k", "v", "bias")
    }
    assert all(np.isfinite(x).all() for x in got.values())


def _vmap(fn):
    return lambda q, k, v, keep: jax.vmap(lambda *a: fn(*(x[None] for x in a))[0])(q, k, v, keep)


def _scan(fn):
    return lambda q, k, v, keep: jax.lax.scan(lambda c, x: (c, fn(*(a[None] for a in x))[0]), 0, (q, k, v, keep))[1]


TRANSFORMS = {
    "jit": jax.jit,
    "vmap": _vmap,
    "vmap of jit": lambda fn: _vmap(jax.jit(fn)),
    "scan": _scan,
    "remat": jax.checkpoint,
    "remat in scan": lambda fn: _scan(jax.checkpoint(fn)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name, monkeypatch):
    """A transformed call has the values and gradients of the plain call."""
    monkeypatch.setattr(xla, "_block_sizes", lambda *_: {"block_q": 16, "block_kv": 16})
    mask = Mask((Causal(), Explicit()), fill=NEG)
    arrays = inputs(mask, t=32, s=32)

    def fn(q, k, v, keep):
        return xla.attention(q=q, k=k, v=v, keep=keep, mask=mask)

    def run(fn):
        return jax.jit(lambda arrays: value_and_grads(lambda q, k, v, keep: fn(q, k, v, keep), arrays))(arrays)

    assert_close(run(TRANSFORMS[name](fn)), jax.device_get(run(fn)))


def test_vmap_over_operands_apart():
    """Only some operands may be mapped: one set of keys for many sets of queries."""
    arrays = inputs(CAUSAL, b=1)
    q = jnp.stack([arrays["q"], arrays["q"] * 2])
    got = jax.vmap(lambda q: xla.attention(q=q, k=arrays["k"], v=arrays["v"], mask=CAUSAL))(q)
    assert_close({"out": got[1]}, {"out": np.asarray(xla.attention(q=q[1], k=arrays["k"], v=arrays["v"], mask=CAUSAL))})


def training_step(fn):
    def step(q, k, v, g):
        out, vjp = jax.vjp(fn, q, k, v)
        return out, vjp(g)

    return step


def temp_bytes(fn, *shape):
    specs = [jax.ShapeDtypeStruct(shape, jnp.float32)] * 4
    return jax.jit(training_step(fn)).lower(*specs).compile().memory_analysis().temp_size_in_bytes


def test_memory_is_linear():
    """Forward and backward, causal, 8 heads of 64: an eighth of the plain code's temporaries at 8192, and linear
    growth."""

    def kernel(q, k, v):
        return xla.attention(q=q, k=k, v=v, mask=CAUSAL)

    def plain(q, k, v):
        return formula(q, k, v, mask=CAUSAL)

    longest = temp_bytes(kernel, 1, 8192, 8, 64)
    assert longest * 8 <= temp_bytes(plain, 1, 8192, 8, 64)
    assert longest <= 2.1 * temp_bytes(kernel, 1, 4096, 8, 64)


@pytest.mark.parametrize(("mask", "share"), [(CAUSAL, 0.66), (Mask((Window(255, 0),)), 0.5)])
def test_hidden_blocks_are_not_visited(mask, share):
    blocks = xla._tiles(xla._Static(mask, 1.0, None, "float32", 256, 256), 1024, 1024)
    assert (~blocks.hidden).mean() < share


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from kpt.ops.mask import Causal, Mask
from pallas_kernels.attention.xla import attention

mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
arrays = [jax.random.normal(key, (8, 512, heads, 16)) for key, heads in zip(jax.random.split(jax.random.key(0), 4), (4,
2, 2, 4))]

@jax.jit
def step(q, k, v, g):
    out, vjp = jax.vjp(lambda q, k, v: attention(q=q, k=k, v=v, mask=Mask((Causal(),))), q, k, v)
    return out, *vjp(g)

want = step(*arrays)
for spec in (P("data"), P(None, None, "model"), P("data", None, "model")):
    placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a in arrays]
    compiled = step.lower(*placed).compile()
    for name in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert name not in compiled.as_text(), (spec, name)
    for a, b in zip(step(*placed), want):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert a.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4), (spec, a.sharding)

# Each device has its own queries, and all keys and values.
q, k, v, g = arrays
queries = P(None, "data")

def loss(q, k, v, g):
    return (g * attention(q=q, k=k, v=v)).sum()

spec = (queries, P(), P(), queries)
mapped = jax.shard_map(jax.grad(loss, (0, 1, 2)), mesh=mesh, in_specs=spec, out_specs=spec[:3])
for a, b in zip(jax.jit(mapped)(q, k, v, g), jax.grad(loss, (0, 1, 2))(q, k, v, g)):
    np.testing.assert_allclose(a, b, atol=2e-5)
print("ok")
"""


def test_sharded_batch_and_heads_stay_where_they_are():
    """On 8 simulated devices: the same numbers, nothing communicated, results sharded as the arguments."""
    env = os.environ | {"XLA_FLAGS": EIGHT_DEVICES, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "ok", done.stderr[-2000:]
