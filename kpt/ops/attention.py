"""attention: softmax(mask(cap(scale q k^T) + bias)) v, with grouped queries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kpt.errors import OpError
from kpt.ops import shapes as sh
from kpt.ops.base import Cost, Op, Spec, Specs
from kpt.ops.mask import Causal, Mask, Window, visible

NAME = "attention"
ARRAYS, OPTIONAL = ("q", "k", "v"), ("bias", "keep", "q_segment_ids", "kv_segment_ids", "kv_lengths")


def infer(specs: Specs, mask: Mask = Mask(), scale: float | None = None, logits_soft_cap: float | None = None,  # noqa: B008
          out_dtype: str | None = None) -> tuple[Spec, ...]:  # fmt: skip
    """`[B, T, N, Hv]`.

    Raises:
      OpError: layouts, sizes or dtypes do not fit, or the mask reads an operand that is not there.
    """
    sh.named(NAME, specs, ARRAYS, OPTIONAL)
    sh.out_dtype(NAME, out_dtype)
    sh.soft_cap(NAME, logits_soft_cap)
    if mask.additive and not math.isfinite(mask.fill):
        raise OpError(f"{NAME} was given a mask that adds {mask.fill}", "What is added to a hidden score is finite",
                      "Use additive=False to replace hidden scores")  # fmt: skip
    for name, layout in (("q", "[B, T, N, H]"), ("k", "[B, S, K, H]"), ("v", "[B, S, K, Hv]")):
        sh.rank(NAME, specs, name, 4, layout)
    sh.floats(NAME, specs, "q", "k", "v", "bias")
    sh.booleans(NAME, specs, "keep")
    b, t, n, h = specs["q"].shape
    s, kv = specs["k"].shape[1:3]
    sh.shaped(NAME, specs, "k", (b, s, kv, h))
    sh.shaped(NAME, specs, "v", (b, s, kv, specs["v"].shape[3]))
    if (kv == 0 and n) or (kv and n % kv):
        raise OpError(f"{NAME} was given {n} query heads and {kv} key heads", "Every key head serves as many query heads",
                      "Make the number of query heads a multiple of the key heads")  # fmt: skip
    for name in mask.operands:
        if name not in specs:
            raise OpError(f"{NAME} has a mask that reads {name}", "It was not given", f"Pass {name}=")
    for name in ("keep", "bias"):
        if name in specs:
            sh.rank(NAME, specs, name, 4, "[B or 1, N or 1, T or 1, S or 1]")
            if any(d not in (1, full) for d, full in zip(specs[name].shape, (b, n, t, s), strict=True)):
                raise OpError(f"{NAME} was given {name}{list(specs[name].shape)}", f"Each dim is 1 or that of {[b, n, t, s]}",
                              "Broadcast it")  # fmt: skip
    sh.integers(NAME, specs, "q_segment_ids", "kv_segment_ids", "kv_lengths")
    for name, want in (("q_segment_ids", (b, t)), ("kv_segment_ids", (b, s)), ("kv_lengths", (b,))):
        sh.shaped(NAME, specs, name, want)
    return (Spec((b, t, n, specs["v"].shape[3]), out_dtype or specs["q"].dtype),)


def _forward(arrays: dict[str, Any], mask: Mask, scale: float | None, cap: float | None) -> dict[str, Any]:
    q, k, v = (sh.wide(arrays[n]) for n in "qkv")
    (b, t, n, h), (s, kv) = q.shape, k.shape[1:3]
    group = n // kv if kv else 1
    kr, vr = np.repeat(k, group, 2), np.repeat(v, group, 2)
    scale = 1 / math.sqrt(max(h, 1)) if scale is None else scale
    with np.errstate(all="ignore"):
        raw = _scores(q, kr) * scale
        tanh = np.zeros_like(raw) if cap is None else np.tanh(raw / cap)
        score = raw if cap is None else cap * tanh
        if "bias" in mask.operands:
            score = score + sh.wide(arrays["bias"])
        see = visible(mask, b, n, t, s, arrays)
        score = np.where(see, score, score + mask.fill if mask.additive else mask.fill)
        if s == 0:
            p = np.zeros((b, n, t, 0))
        else:
            e = np.exp(score - score.max(-1, keepdims=True))
            p = e / e.sum(-1, keepdims=True)
        out = _weighted(p, vr)
    return {"q": q, "k": kr, "v": vr, "p": p, "out": out, "tanh": tanh, "see": see, "scale": scale, "kv": kv, "group": group}


def _scores(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """`[B, N, T, S]` of `[B, T, N, H]` and `[B, S, N, H]`."""
    return np.matmul(q.transpose(0, 2, 1, 3), k.transpose(0, 2, 3, 1))


def _weighted(p: np.ndarray, v: np.ndarray) -> np.ndarray:
    """`[B, T, N, H]` of `[B, N, T, S]` and `[B, S, N, H]`."""
    return np.matmul(p, v.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)


def reference(*, mask: Mask = Mask(), scale: float | None = None, logits_soft_cap: float | None = None,  # noqa: B008
              out_dtype: str | None = None, **arrays: Any) -> tuple[np.ndarray, ...]:  # fmt: skip
    return (_forward(arrays, mask, scale, logits_soft_cap)["out"],)


def reference_vjp(cotangents: tuple, *, mask: Mask = Mask(), scale: float | None = None,  # noqa: B008
                  logits_soft_cap: float | None = None, out_dtype: str | None = None, **arrays: Any) -> dict[str, np.ndarray]:  # fmt: skip
    f = _forward(arrays, mask, scale, logits_soft_cap)
    g, p = sh.wide(cotangents[0]), f["p"]
    with np.errstate(all="ignore"):
        dp = _scores(g, f["v"])
        ds = p * (dp - (p * dp).sum(-1, keepdims=True))
        if not mask.additive:  # a replaced score has no gradient
            ds = np.where(f["see"], ds, 0.0)
        out = {}
        if "bias" in mask.operands:
            out["bias"] = sh.unbroadcast(ds, np.shape(arrays["bias"]))
        if logits_soft_cap is not None:
            ds = ds * (1 - f["tanh"] ** 2)
        ds = ds * f["scale"]
        b, s, n, h = f["k"].shape

        def grouped(x: np.ndarray) -> np.ndarray:
            return x.reshape(b, s, f["kv"], f["group"], x.shape[-1]).sum(3)

        out["q"] = _weighted(ds, f["k"])
        out["k"] = grouped(_weighted(ds.swapaxes(2, 3), f["q"]))
        out["v"] = grouped(_weighted(p.swapaxes(2, 3), g))
    return out


def sample(rng: np.random.Generator, specs: Specs, **params: Any) -> dict[str, np.ndarray]:
    out = {}
    for name, spec in specs.items():
        if name == "keep":
            out[name] = rng.random(spec.shape) < 0.8
        elif name == "kv_lengths":
            out[name] = rng.integers(1, max(specs["k"].shape[1], 1) + 1, spec.shape).astype(spec.dtype)
        elif name.endswith("segment_ids"):
            out[name] = np.sort(rng.integers(0, 3, spec.shape), -1).astype(spec.dtype)
        else:
            out[name] = sh.normal(rng, spec)
    return out


def pairs(mask: Mask, queries: int, keys: int) -> float:
    """Query-key pairs that static terms leave visible."""
    i = np.arange(queries, dtype=np.int64)
    low, high = np.zeros_like(i), np.full_like(i, keys - 1)
    for t in mask.terms:
        if isinstance(t, Causal):
            high = np.minimum(high, i + t.offset)
        elif isinstance(t, Window):
            low = low if t.left is None else np.maximum(low, i + t.offset - t.left)
            high = high if t.right is None else np.minimum(high, i + t.offset + t.right)
    return float(np.maximum(high - low + 1, 0).sum())


def cost(specs: Specs, mask: Mask = Mask(), **params: Any) -> Cost:  # noqa: B008
    """Two products over the visible pairs, `2 pairs (H + Hv)` a head; every array crosses memory once."""
    b, t, n, h = specs["q"].shape
    out = infer(specs, mask=mask, **params)
    flops = 2.0 * b * n * pairs(mask, t, specs["k"].shape[1]) * (h + specs["v"].shape[3])
    return Cost(flops, sh.nbytes(*specs.values(), *out))


OP = Op(
    NAME, ARRAYS, OPTIONAL,
    {"mask": Mask(), "scale": None, "logits_soft_cap": None, "out_dtype": None},
    ("q", "k", "v", "bias"), infer, reference, reference_vjp, sample, cost,
)  # fmt: skip
