"""cross_entropy: logsumexp(z) - sum(target z), z = cap(logits), the target a smoothed one-hot of the label."""

from __future__ import annotations

from typing import Any

import numpy as np

from kpt.ops import shapes as sh
from kpt.ops.base import Cost, Op, Spec, Specs

NAME = "cross_entropy"
ARRAYS = ("logits", "labels")
INVALID = ("nan", "zero", "clip", "drop")


def loss_spec(dtype: str, shape: tuple[int, ...]) -> tuple[Spec, ...]:
    return (Spec(shape, "float64" if dtype == "float64" else "float32"),)


def infer(specs: Specs, label_smoothing: float = 0.0, logits_soft_cap: float | None = None, invalid: str = "nan") -> tuple[Spec, ...]:
    """`[...]`, float32 (float64 for float64).

    Raises:
      OpError: shapes, dtypes or parameters do not fit.
    """
    sh.named(NAME, specs, ARRAYS)
    loss_params(NAME, label_smoothing, logits_soft_cap, invalid)
    sh.at_least(NAME, specs, "logits", 1, "[..., V]")
    sh.floats(NAME, specs, "logits")
    sh.integers(NAME, specs, "labels")
    sh.shaped(NAME, specs, "labels", specs["logits"].shape[:-1])
    return loss_spec(specs["logits"].dtype, specs["labels"].shape)


def loss_params(name: str, label_smoothing: float, logits_soft_cap: float | None, invalid: str) -> None:
    sh.within(name, "label_smoothing", label_smoothing, 0 <= label_smoothing <= 1, "a share of the target, 0 to 1")
    sh.soft_cap(name, logits_soft_cap)
    sh.one_of(name, "invalid", invalid, INVALID)


def capped(logits: np.ndarray, cap: float | None) -> tuple[np.ndarray, np.ndarray | float]:
    """(z, dz/dlogits)."""
    if cap is None:
        return logits, 1.0
    t = np.tanh(logits / cap)
    return cap * t, 1 - t * t


def targets(labels: Any, vocab: int, smoothing: float, invalid: str) -> tuple[np.ndarray, np.ndarray]:
    """(target weights [..., V], labels that make the loss NaN). Outside the vocabulary the label term follows `invalid`."""
    y = np.asarray(labels).astype(np.int64)
    outside = (y < 0) | (y >= vocab)
    hot = np.arange(vocab) == np.clip(y, 0, max(vocab - 1, 0))[..., None]
    if invalid in ("zero", "drop"):
        hot = hot & ~outside[..., None]
    weights = (1 - smoothing) * hot + (smoothing / vocab if vocab else 0.0)
    return weights, outside if invalid == "nan" else np.zeros_like(outside)


def loss_and_gradient(logits: np.ndarray, labels: Any, smoothing: float, cap: float | None, invalid: str) -> tuple[np.ndarray, np.ndarray]:
    """Loss per row, and its gradient in the logits."""
    vocab = logits.shape[-1]
    with np.errstate(all="ignore"):
        z, slope = capped(logits, cap)
        w, bad = targets(labels, vocab, smoothing, invalid)
        if vocab == 0:
            return np.full(z.shape[:-1], -np.inf), np.zeros_like(z)
        top = z.max(-1, keepdims=True)
        top = np.where(np.isfinite(top), top, 0.0)
        e = np.exp(z - top)
        total = e.sum(-1, keepdims=True)
        lse = (np.log(total) + top)[..., 0]
        # a weight of 0 hides the logit, -inf included: only what the target names is read
        picked = np.where(w != 0, w * z, 0.0).sum(-1)
        # a dropped label leaves the smoothing alone as target, which then does not sum to 1
        total_w = w.sum(-1) if invalid == "drop" else np.ones(lse.shape)
        loss = np.where(bad, np.nan, np.where(total_w == 0, 0.0, total_w * lse) - picked)
        p = np.exp(z - lse[..., None]) * np.where(total_w == 0, 0.0, total_w)[..., None]
        # the label term of a NaN loss comes from outside the logits: no gradient passes through it
        grad = (p - np.where(bad[..., None], w - (1 - smoothing) * _hot(labels, vocab), w)) * slope
    return loss, grad


def _hot(labels: Any, vocab: int) -> np.ndarray:
    y = np.asarray(labels).astype(np.int64)
    return (np.arange(vocab) == np.clip(y, 0, max(vocab - 1, 0))[..., None]).astype(np.float64)


def reference(*, logits: Any, labels: Any, label_smoothing: float = 0.0, logits_soft_cap: float | None = None,
              invalid: str = "nan") -> tuple[np.ndarray, ...]:  # fmt: skip
    return (loss_and_gradient(sh.wide(logits), labels, label_smoothing, logits_soft_cap, invalid)[0],)


def reference_vjp(cotangents: tuple, *, logits: Any, labels: Any, label_smoothing: float = 0.0,
                  logits_soft_cap: float | None = None, invalid: str = "nan") -> dict[str, np.ndarray]:  # fmt: skip
    grad = loss_and_gradient(sh.wide(logits), labels, label_smoothing, logits_soft_cap, invalid)[1]
    with np.errstate(all="ignore"):
        return {"logits": grad * sh.wide(cotangents[0])[..., None]}


def sample(rng: np.random.Generator, specs: Specs, **params: Any) -> dict[str, np.ndarray]:
    vocab = max(specs["logits"].shape[-1], 1)
    labels = rng.integers(0, vocab, specs["labels"].shape).astype(specs["labels"].dtype)
    return {"logits": sh.normal(rng, specs["logits"], 2.0), "labels": labels}


def cost(specs: Specs, **params: Any) -> Cost:
    """4 operations a logit: maximum, shift, exponential, sum."""
    return Cost(4.0 * sh.size(specs["logits"]), sh.nbytes(*specs.values(), *infer(specs, **params)))


OP = Op(NAME, ARRAYS, (), {"label_smoothing": 0.0, "logits_soft_cap": None, "invalid": "nan"}, ("logits",),
        infer, reference, reference_vjp, sample, cost)  # fmt: skip
