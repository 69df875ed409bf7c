"""The plain-JAX losses against the formula in float64: labels in and out of range, smoothing, cap, bias, every transformation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cross_entropy.xla import cross_entropy
from pallas_kernels.linear_cross_entropy import xla as linear
from pallas_kernels.linear_cross_entropy.xla import linear_cross_entropy

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
    loss = lse[..., 0] - (1 - label_smoothing) * picked
    if label_smoothing:
        loss = loss - label_smoothing * z.mean(-1)
    if invalid == "nan":
        loss = np.where(valid, loss, np.nan)
    d = (np.exp(z - lse) - (1 - label_smoothing) * onehot - label_smoothing / classes) * np.asarray(g, np.float64)[..., None]
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


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_linear_cross_entropy(case, shape, chunks, monkeypatch):
    params = {k: v for k, v in CASES[case].items() if k != "bad"}
    rng, rows = np.random.default_rng(0), SHAPES[shape]
    x, w, b = (np.asarray(rng.normal(size=s), np.float32) for s in ((*rows, 16), (16, 37), (37,)))
    labels = labels_of(rng, rows, 37, CASES[case].get("bad"))
    g = np.asarray(rng.normal(size=rows), np.float32)
    monkeypatch.setattr(linear, "CHUNK_BYTES", max(1, int(np.prod(rows)) * 37 * 4 // chunks))

    def fn(x, w, b):
        return linear_cross_entropy(x=x, w=w, b=b, labels=jnp.asarray(labels), **params)

    loss, vjp = jax.vjp(jax.jit(fn), *(jnp.asarray(a) for a in (x, w, b)))
    dx, dw, db = vjp(jnp.asarray(g))
    x64, w64 = np.asarray(x, np.float64), np.asarray(w, np.float64)
    want_loss, dz = formula(x64 @ w64 + b, labels, g, **params)
    close(loss, want_loss, terms=16)
    close(dx, dz @ w64.T, terms=37)
    close(dw, np.tensordot(x64, dz, (range(len(rows)),) * 2), terms=37)
    close(db, dz.sum(tuple(range(len(rows)))), terms=37)
