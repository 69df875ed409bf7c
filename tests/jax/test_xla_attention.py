"""The plain-JAX attention provider against the formula in float64, for every mask and every transformation."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kpt.ops.mask import Bias, Causal, Explicit, Lengths, Mask, Segments, Window
from pallas_kernels.attention import xla

NEG = -1e9


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
                arrays[name] = jnp.asarray(rng.integers(1, s + 1, b), jnp.int32)
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
        wide = {n: jnp.asarray(x, "float64" if jnp.issubdtype(x.dtype, jnp.floating) else None) for n, x in arrays.items()}
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
    "bias": (Mask((Bias(),)), {}),
    "bias, shared": (Mask((Bias(), Causal())), {"small": "b"}),
    "bias, per key": (Mask((Bias(), Causal())), {"small": "nt"}),
    "bias, per query": (Mask((Bias(), Causal()), fill=NEG), {"small": "bs"}),
    "bias, scalar": (Mask((Bias(),)), {"small": "bnts"}),
    "everything": (Mask((Causal(2), Window(20, None), Segments(), Lengths(), Explicit(), Bias()), fill=NEG), {"small": "n"}),
    "long keys": (CAUSAL, {"t": 13, "s": 61}),
    "long queries": (CAUSAL, {"t": 61, "s": 13}),
    "value dim": (CAUSAL, {"hv": 5, "h": 3}),
}


@pytest.mark.parametrize(("case", "block_q", "block_kv"), [(c, 16, 12) for c in CASES] + [("everything", 64, 64), ("causal", 8, 8)])
def test_masks(case, block_q, block_kv, monkeypatch):
    monkeypatch.setattr(xla, "_block_sizes", lambda *_: {"block_q": block_q, "block_kv": block_kv})
    mask, shapes = CASES[case]
    arrays = inputs(mask, **shapes)
    cap = 3.0 if case in ("everything", "causal", "bias") else None
    params = {"mask": mask, "scale": 0.3, "logits_soft_cap": cap}
    got = jax.jit(lambda arrays: value_and_grads(xla.attention, arrays, **params))(arrays)
    assert_close(got, reference(arrays, **params))
