"""The shared table: for each op, how a random case of it is drawn. Every provider of every front end is held to it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from kpt.ops import Bias, Causal, Explicit, Lengths, Mask, Segments, Spec, Window
from kpt.ops.activations import ACTIVATIONS
from kpt.ops.mask import visible

# Odd, tiny, empty, around powers of two, and one that no block size divides.
SIZES = (0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 64, 65, 100, 127, 130)
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Case:
    """Arrays' specs and parameters of one call, and the arrays that NaN and infinities may be put into."""

    op: str
    specs: dict[str, Spec]
    params: dict[str, Any]
    poison: tuple[str, ...] = ()

    def __str__(self) -> str:
        arrays = " ".join(f"{n}:{s.dtype}{list(s.shape)}" for n, s in self.specs.items())
        return f"{self.op} {arrays} {self.params}"


def _size(rng: np.random.Generator, most: int) -> int:
    return int(rng.choice([s for s in SIZES if s <= most]))


def _rows(rng: np.random.Generator, most: int) -> tuple[int, ...]:
    return tuple(_size(rng, min(most, 33)) for _ in range(int(rng.integers(0, 3))))


def _maybe(rng: np.random.Generator, p: float = 0.5) -> bool:
    return bool(rng.random() < p)


def _dtype(rng: np.random.Generator) -> str:
    return str(rng.choice(DTYPES))


def _out_dtype(rng: np.random.Generator) -> dict[str, Any]:
    return {"out_dtype": _dtype(rng)} if _maybe(rng, 0.2) else {}


def attention(rng: np.random.Generator, most: int = 130) -> Case:
    dtype = _dtype(rng)
    b, kv, group = int(rng.choice([0, 1, 2], p=[0.03, 0.57, 0.4])), int(rng.integers(1, 3)), int(rng.integers(1, 4))
    n, h = kv * group, int(rng.choice([w for w in (1, 3, 8, 16, 40) if w <= most]))
    t = _size(rng, most)
    s = t if _maybe(rng) else _size(rng, most)
    if most >= 130 and _maybe(rng, 0.05):  # several blocks of a kernel's own size
        t = s = int(rng.choice([1025, 1300]))
        b = kv = n = 1
    terms: list[Any] = []
    specs = {"q": Spec((b, t, n, h), dtype), "k": Spec((b, s, kv, h), dtype)}
    specs["v"] = Spec((b, s, kv, h if _maybe(rng, 0.8) else int(rng.choice([w for w in (1, 2, 5, 24) if w <= most]))), dtype)
    if _maybe(rng):
        terms.append(Causal(int(rng.choice([0, s - t, -2, 3]))))
    if _maybe(rng, 0.3):
        left = int(rng.integers(0, max(2, most // 6))) if _maybe(rng, 0.8) else None
        right = int(rng.integers(0, 9)) if _maybe(rng, 0.4) else None
        terms.append(Window(left, right, int(rng.choice([0, s - t]))))
    if _maybe(rng, 0.25):
        terms.append(Segments())
        specs |= {"q_segment_ids": Spec((b, t), "int32"), "kv_segment_ids": Spec((b, s), "int32")}
    if _maybe(rng, 0.25):
        terms.append(Lengths())
        specs["kv_lengths"] = Spec((b,), "int32")
    for term, name, kind in ((Explicit(), "keep", "bool"), (Bias(), "bias", "float32" if _maybe(rng) else dtype)):
        if _maybe(rng, 0.25):
            terms.append(term)
            # A bias that is the same for every key does nothing: its gradient is rounding alone.
            keys = s if name == "bias" or _maybe(rng) else 1
            specs[name] = Spec((*(d if _maybe(rng) else 1 for d in (b, n, t)), keys), kind)
    fill, additive = [(-math.inf, False), (-1e30, False), (float(np.finfo(np.float32).min), False), (-1e4, True)][rng.integers(4)]
    params = {"mask": Mask(tuple(terms), fill, additive), "scale": None if _maybe(rng) else float(rng.choice([1.0, 0.05])),
              "logits_soft_cap": float(rng.choice([2.0, 30.0])) if _maybe(rng, 0.3) else None}  # fmt: skip
    # A hidden key's NaN in v reaches a query or not as its block is visited or not; only what is visible is specified.
    return Case("attention", specs, params | _out_dtype(rng), ("q",) if terms else ("q", "k", "v"))


def rms_norm(rng: np.random.Generator, most: int = 130) -> Case:
    dtype = _dtype(rng)
    specs = {"x": Spec((*_rows(rng, most), max(1, _size(rng, most))), dtype)}
    if _maybe(rng, 0.7):
        specs["weight"] = Spec(specs["x"].shape[-1:], dtype if _maybe(rng) else "float32")
    if _maybe(rng, 0.3):
        specs["residual"] = Spec(specs["x"].shape, dtype if _maybe(rng, 0.7) else "float32")
    params = {"eps": float(rng.choice([1e-6, 1e-5, 1e-2])), "weight_offset": float(rng.choice([0, 1]))}
    return Case("rms_norm", specs, params | _out_dtype(rng), ("x",))


def layer_norm(rng: np.random.Generator, most: int = 130) -> Case:
    case = rms_norm(rng, most)
    specs, params = dict(case.specs), {n: v for n, v in case.params.items() if n != "weight_offset"}
    if _maybe(rng):
        specs["bias"] = Spec(specs["x"].shape[-1:], specs["x"].dtype)
    return Case("layer_norm", specs, params, ("x",))


def linear_act(rng: np.random.Generator, most: int = 130) -> Case:
    dtype, k, n = _dtype(rng), _size(rng, most), _size(rng, min(most, 65))
    specs = {"x": Spec((*_rows(rng, most), k), dtype), "w": Spec((k, n), dtype)}
    if _maybe(rng):
        specs["b"] = Spec((n,), dtype if _maybe(rng) else "float32")
    return Case("linear_act", specs, {"activation": str(rng.choice(list(ACTIVATIONS)))} | _out_dtype(rng), ("x",))


def glu(rng: np.random.Generator, most: int = 130) -> Case:
    dtype, k, n = _dtype(rng), _size(rng, most), _size(rng, min(most, 65))
    specs = {"x": Spec((*_rows(rng, most), k), dtype), "w_gate": Spec((k, n), dtype), "w_up": Spec((k, n), dtype)}
    for b in ("b_gate", "b_up"):
        if _maybe(rng, 0.4):
            specs[b] = Spec((n,), dtype)
    return Case("glu", specs, {"activation": str(rng.choice(list(ACTIVATIONS)))} | _out_dtype(rng), ("x",))


def rope(rng: np.random.Generator, most: int = 130) -> Case:
    dtype, b, t, n = _dtype(rng), int(rng.integers(0, 4)), _size(rng, most), int(rng.integers(1, 5))
    r = 2 * int(rng.choice([w for w in (0, 1, 2, 3, 8, 16) if w <= most]))
    h = r + (int(rng.choice([1, 4, 7])) if r == 0 or _maybe(rng, 0.3) else 0)
    table = Spec((b if _maybe(rng, 0.4) else 1, t, r), dtype if _maybe(rng) else "float32")
    specs = {"x": Spec((b, t, n, h), dtype), "cos": table, "sin": table}
    return Case("rope", specs, {"interleaved": _maybe(rng)} | _out_dtype(rng), ("x",))


def _loss_params(rng: np.random.Generator) -> dict[str, Any]:
    return {"label_smoothing": 0.1 if _maybe(rng, 0.3) else 0.0, "logits_soft_cap": 5.0 if _maybe(rng, 0.3) else None,
            "invalid": str(rng.choice(["nan", "zero", "clip", "drop"]))}  # fmt: skip


def cross_entropy(rng: np.random.Generator, most: int = 130) -> Case:
    rows, v = _rows(rng, most), max(1, _size(rng, most))
    if _maybe(rng, 0.05) and most >= 130:
        rows, v = (3,), 50257
    specs = {"logits": Spec((*rows, v), _dtype(rng)), "labels": Spec(rows, "int32")}
    return Case("cross_entropy", specs, _loss_params(rng), ("logits",))


def linear_cross_entropy(rng: np.random.Generator, most: int = 130) -> Case:
    rows, k, v, dtype = _rows(rng, most), max(1, _size(rng, most)), max(1, _size(rng, most)), _dtype(rng)
    specs = {"x": Spec((*rows, k), dtype), "w": Spec((k, v), dtype), "labels": Spec(rows, "int32")}
    if _maybe(rng, 0.4):
        specs["b"] = Spec((v,), dtype)
    if _maybe(rng, 0.3):
        specs["weights"] = Spec(rows, str(rng.choice(["float32", dtype])))
    return Case("linear_cross_entropy", specs, _loss_params(rng), ("x",))


def matmul(rng: np.random.Generator, most: int = 130) -> Case:
    m, k, n, dtype = _size(rng, most), _size(rng, most), _size(rng, most), _dtype(rng)
    if _maybe(rng, 0.05) and most >= 130:
        m, k, n = 257, 1025, 130
    return Case("matmul", {"a": Spec((m, k), dtype), "b": Spec((k, n), dtype)}, _out_dtype(rng), ("a",))


def ragged_matmul(rng: np.random.Generator, most: int = 130) -> Case:
    m, k, n, g, dtype = _size(rng, most), _size(rng, min(most, 65)), _size(rng, min(most, 65)), int(rng.integers(0, 6)), _dtype(rng)
    specs = {"x": Spec((m, k), dtype), "w": Spec((g, k, n), dtype), "group_sizes": Spec((g,), "int32")}
    return Case("ragged_matmul", specs, _out_dtype(rng), ("x",))


def masks_in_numbers() -> Iterator[Case]:
    """Cases of attention for `marked`: alone, and beside masks in words of every fill."""
    causal, low = Causal(0), float(np.finfo(np.float32).min)
    for i, (mask, dtype, kind) in enumerate([
        (Mask(), "float32", "float32"), (Mask(), "bfloat16", "bfloat16"), (Mask(), "bfloat16", "float32"), (Mask(), "float16", "float32"),
        (Mask((causal,)), "float32", "float32"), (Mask((causal,), low), "float32", "float32"), (Mask((Explicit(),), low), "bfloat16", "float32"),
        (Mask((Explicit(),), -1e30), "float32", "float32"), (Mask((causal, Lengths()), -1e4, True), "float32", "float32"),
    ]):  # fmt: skip
        b, t, s, kv, n = 2, 9, 13 - 4 * (i % 2), 2, 4
        specs = {"q": Spec((b, t, n, 8), dtype), "k": Spec((b, s, kv, 8), dtype), "v": Spec((b, s, kv, 5 + 3 * (i % 2)), dtype)}
        specs["bias"] = Spec((b, n if i % 3 == 0 else 1, t, s), kind)
        if Explicit() in mask.terms:
            specs["keep"] = Spec((b, 1, t, s), "bool")
        if Lengths() in mask.terms:
            specs["kv_lengths"] = Spec((b,), "int32")
        yield Case("attention", specs, {"mask": mask & Mask((Bias(),))})


CASES: dict[str, Callable[..., Case]] = {
    f.__name__: f
    for f in (attention, rms_norm, layer_norm, linear_act, glu, rope, cross_entropy, linear_cross_entropy, matmul, ragged_matmul)
}
"""Op -> `draw(rng, most)`: a random case with no dim above `most`. Small ones suit a reference written as loops."""


def edge(case: Case, arrays: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Legal but unusual values: labels outside the vocabulary, logits of -inf, no key at all, large and small inputs."""
    out = {n: a.copy() for n, a in arrays.items()}
    if "labels" in out and out["labels"].size:
        out["labels"].reshape(-1)[rng.integers(0, out["labels"].size)] = int(rng.choice([-100, -1, 10_000]))
    if "logits" in out and out["logits"].size and case.params["label_smoothing"] == 0 and case.params["logits_soft_cap"] is None:
        hide = rng.random(out["logits"].shape) < 0.2
        vocab = out["logits"].shape[-1]
        hide &= np.arange(vocab) != np.clip(out["labels"], 0, vocab - 1)[..., None]
        out["logits"][hide] = -np.inf
    if "kv_lengths" in out and out["kv_lengths"].size:  # padding alone
        out["kv_lengths"][rng.integers(0, out["kv_lengths"].size)] = 0
    if "x" in out and out["x"].size and case.op.endswith("norm"):
        out["x"] = (out["x"].astype(np.float32) * float(rng.choice([1e-3, 30.0]))).astype(out["x"].dtype)
    return out


def marked(case: Case, arrays: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The arrays with a bias that is a mask in numbers: rows of -inf, of the smallest float and of both.

    Some rows show keys beside; of others nothing is left but the smallest float, in which scores drown, or -inf alone, or one key. float16
    has no number in which they drown.
    """
    bias = arrays["bias"].copy()
    low = ml_dtypes.finfo(bias.dtype).min
    for row in bias.reshape(bias.size and -1, bias.shape[-1]):
        drawn = rng.choice([low, -np.inf], row.shape).astype(row.dtype)
        kind = rng.integers(8)
        if kind < 2:  # as a mask: some keys are seen
            row[:] = np.where(rng.random(row.shape) < 0.5, row, drawn)
        elif kind == 2 and row.size:
            row[:] = -np.inf
            row[rng.integers(row.size)] = low
        elif kind == 3:
            row[:] = np.where(np.arange(row.size) < row.size // 2, low, -np.inf)
        elif kind == 4 and rng.random() < 0.1:  # NaN in gradients of a whole head: seldom
            row[:] = -np.inf
        elif kind == 5:
            row[:] = drawn
            row[:1] = low
        elif kind == 6:  # above what hides, and far below any score
            row[:] = np.where(rng.random(row.shape) < 0.5, 0.875 * float(low), drawn)
        else:
            row[:] = low
    mask = case.params["mask"]
    if mask.fill == -math.inf and len(mask.terms) > 1:  # to which keys the NaN of a query comes is not specified, where words hide some
        (b, t, n, _), s = arrays["q"].shape, arrays["k"].shape[1]
        none = visible(mask, b, n, t, s, arrays) & (bias != -np.inf)
        none = ~none.any(-1, keepdims=True)
        axes = tuple(a for a in range(3) if bias.shape[a] == 1)
        bias = np.where(none.any(axes, keepdims=True) & (bias == -np.inf), np.asarray(low, bias.dtype), bias)
    return {**arrays, "bias": bias}


def poisoned(case: Case, arrays: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The arrays with a few NaN or infinities put in, and NaN in every key that no query sees.

    Held to the reference forward only: what 0 * NaN does to the gradients of other rows is no property of a formula but of how
    it happens to be summed. A hidden key must not show, since its score is replaced and not multiplied by 0; a hidden value
    may, as 0 * NaN is NaN, or may not, where its block is never visited.
    """
    out = dict(arrays)
    for name in case.poison:
        a = out[name].copy()
        if a.size:
            at = rng.integers(0, a.size, int(rng.integers(1, 4)))
            a.reshape(-1)[at] = rng.choice([np.nan, np.inf, -np.inf], at.shape).astype(a.dtype)
        out[name] = a
    if case.op == "attention" and not case.params["mask"].additive and out["q"].shape[2]:
        (b, t, n, _), (s, heads) = out["q"].shape, out["k"].shape[1:3]
        unseen = ~visible(case.params["mask"], b, n, t, s, arrays).reshape(b, heads, n // heads, t, s).any((2, 3))
        out["k"] = np.where(unseen.swapaxes(1, 2)[..., None], np.nan, out["k"]).astype(out["k"].dtype)
    return out
