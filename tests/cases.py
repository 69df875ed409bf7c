"""The shared table: for each op, how a random case of it is drawn. Every provider of every front end is held to it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from kpt.ops import Bias, Causal, Explicit, Lengths, Mask, Segments, Spec, Window
from kpt.ops.activations import ACTIVATIONS

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


def _size(rng: np.random.Generator, most: int = 130) -> int:
    return int(rng.choice([s for s in SIZES if s <= most]))


def _rows(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(_size(rng, 33) for _ in range(int(rng.integers(0, 3))))


def _maybe(rng: np.random.Generator, p: float = 0.5) -> bool:
    return bool(rng.random() < p)


def attention(rng: np.random.Generator) -> Case:
    dtype = str(rng.choice(DTYPES))
    b, kv, group = int(rng.integers(1, 3)), int(rng.integers(1, 3)), int(rng.integers(1, 4))
    n, h = kv * group, int(rng.choice([1, 3, 8, 16, 40]))
    t = _size(rng)
    s = t if _maybe(rng) else _size(rng)
    if _maybe(rng, 0.05):  # long enough for several blocks
        t = s = int(rng.choice([1025, 1300]))
        b = kv = n = 1
    terms: list[Any] = []
    specs = {"q": Spec((b, t, n, h), dtype), "k": Spec((b, s, kv, h), dtype)}
    specs["v"] = Spec((b, s, kv, h if _maybe(rng, 0.8) else int(rng.choice([1, 5, 24]))), dtype)
    if _maybe(rng):
        terms.append(Causal(int(rng.choice([0, s - t, -2, 3]))))
    if _maybe(rng, 0.3):
        terms.append(Window(int(rng.integers(0, 20)) if _maybe(rng, 0.8) else None, int(rng.integers(0, 9)) if _maybe(rng, 0.4) else None,
                            int(rng.choice([0, s - t]))))  # fmt: skip
    if _maybe(rng, 0.25):
        terms.append(Segments())
        specs |= {"q_segment_ids": Spec((b, t), "int32"), "kv_segment_ids": Spec((b, s), "int32")}
    if _maybe(rng, 0.25):
        terms.append(Lengths())
        specs["kv_lengths"] = Spec((b,), "int32")
    for term, name, kind in ((Explicit(), "keep", "bool"), (Bias(), "bias", "float32")):
        if _maybe(rng, 0.25):
            terms.append(term)
            # A bias that is the same for every key does nothing: its gradient is rounding alone.
            keys = s if name == "bias" or _maybe(rng) else 1
            specs[name] = Spec((*(d if _maybe(rng) else 1 for d in (b, n, t)), keys), kind)
    fill, additive = [(-math.inf, False), (-1e30, False), (float(np.finfo(np.float32).min), False), (-1e4, True)][rng.integers(4)]
    params = {"mask": Mask(tuple(terms), fill, additive), "scale": None if _maybe(rng) else float(rng.choice([1.0, 0.05])),
              "logits_soft_cap": float(rng.choice([2.0, 30.0])) if _maybe(rng, 0.3) else None}  # fmt: skip
    # A hidden key's NaN reaches a query or not as its block is visited or not; only what is visible is specified.
    return Case("attention", specs, params, ("q",) if terms else ("q", "k", "v"))


def rms_norm(rng: np.random.Generator) -> Case:
    dtype, d = str(rng.choice(DTYPES)), max(1, _size(rng))
    specs = {"x": Spec((*_rows(rng), d), dtype)}
    if _maybe(rng, 0.7):
        specs["weight"] = Spec((d,), dtype if _maybe(rng) else "float32")
    if _maybe(rng, 0.3):
        specs["residual"] = specs["x"]
    return Case("rms_norm", specs, {"eps": float(rng.choice([1e-6, 1e-5, 1e-2])), "weight_offset": float(rng.choice([0, 1]))}, ("x",))


def layer_norm(rng: np.random.Generator) -> Case:
    case = rms_norm(rng)
    specs = dict(case.specs)
    if _maybe(rng):
        specs["bias"] = Spec(specs["x"].shape[-1:], specs["x"].dtype)
    return Case("layer_norm", specs, {"eps": case.params["eps"]}, ("x",))


def linear_act(rng: np.random.Generator) -> Case:
    dtype, k, n = str(rng.choice(DTYPES)), _size(rng), _size(rng, 65)
    specs = {"x": Spec((*_rows(rng), k), dtype), "w": Spec((k, n), dtype)}
    if _maybe(rng):
        specs["b"] = Spec((n,), dtype)
    return Case("linear_act", specs, {"activation": str(rng.choice(list(ACTIVATIONS)))}, ("x",))


def glu(rng: np.random.Generator) -> Case:
    dtype, k, n = str(rng.choice(DTYPES)), _size(rng), _size(rng, 65)
    specs = {"x": Spec((*_rows(rng), k), dtype), "w_gate": Spec((k, n), dtype), "w_up": Spec((k, n), dtype)}
    for b in ("b_gate", "b_up"):
        if _maybe(rng, 0.4):
            specs[b] = Spec((n,), dtype)
    return Case("glu", specs, {"activation": str(rng.choice(["silu", "gelu", "gelu_tanh", "relu", "sigmoid"]))}, ("x",))


def rope(rng: np.random.Generator) -> Case:
    dtype, b, t, n = str(rng.choice(DTYPES)), int(rng.integers(1, 4)), _size(rng), int(rng.integers(1, 5))
    r = 2 * int(rng.choice([1, 2, 3, 8, 16]))
    h = r + (int(rng.choice([1, 4, 7])) if _maybe(rng, 0.3) else 0)
    table = Spec((b if _maybe(rng, 0.4) else 1, t, r), dtype if _maybe(rng) else "float32")
    specs = {"x": Spec((b, t, n, h), dtype), "cos": table, "sin": table}
    return Case("rope", specs, {"interleaved": _maybe(rng)}, ("x",))


def _loss_params(rng: np.random.Generator) -> dict[str, Any]:
    return {"label_smoothing": 0.1 if _maybe(rng, 0.3) else 0.0, "logits_soft_cap": 5.0 if _maybe(rng, 0.3) else None,
            "invalid": str(rng.choice(["nan", "zero", "clip"]))}  # fmt: skip


def cross_entropy(rng: np.random.Generator) -> Case:
    rows, v = _rows(rng), max(1, _size(rng))
    specs = {"logits": Spec((*rows, v), str(rng.choice(DTYPES))), "labels": Spec(rows, "int32")}
    return Case("cross_entropy", specs, _loss_params(rng), ("logits",))


def linear_cross_entropy(rng: np.random.Generator) -> Case:
    rows, k, v, dtype = _rows(rng), max(1, _size(rng)), max(1, _size(rng)), str(rng.choice(DTYPES))
    specs = {"x": Spec((*rows, k), dtype), "w": Spec((k, v), dtype), "labels": Spec(rows, "int32")}
    if _maybe(rng, 0.4):
        specs["b"] = Spec((v,), dtype)
    return Case("linear_cross_entropy", specs, _loss_params(rng), ("x",))


def matmul(rng: np.random.Generator) -> Case:
    m, k, n, dtype = _size(rng), _size(rng), _size(rng), str(rng.choice(DTYPES))
    return Case("matmul", {"a": Spec((m, k), dtype), "b": Spec((k, n), dtype)}, {}, ("a",))


def ragged_matmul(rng: np.random.Generator) -> Case:
    m, k, n, g, dtype = _size(rng), _size(rng, 65), _size(rng, 65), int(rng.integers(1, 6)), str(rng.choice(DTYPES))
    specs = {"x": Spec((m, k), dtype), "w": Spec((g, k, n), dtype), "group_sizes": Spec((g,), "int32")}
    return Case("ragged_matmul", specs, {}, ())


CASES: dict[str, Callable[[np.random.Generator], Case]] = {
    f.__name__: f
    for f in (attention, rms_norm, layer_norm, linear_act, glu, rope, cross_entropy, linear_cross_entropy, matmul, ragged_matmul)
}


def edge(case: Case, arrays: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Legal but unusual values: labels outside the vocabulary, logits of -inf, huge and tiny inputs."""
    out = {n: a.copy() for n, a in arrays.items()}
    if "labels" in out and out["labels"].size:
        out["labels"].reshape(-1)[rng.integers(0, out["labels"].size)] = int(rng.choice([-100, -1, 10_000]))
    if "logits" in out and out["logits"].size and case.params["label_smoothing"] == 0 and case.params["logits_soft_cap"] is None:
        hide = rng.random(out["logits"].shape) < 0.2
        vocab = out["logits"].shape[-1]
        hide &= np.arange(vocab) != np.clip(out["labels"], 0, vocab - 1)[..., None]
        out["logits"][hide] = -np.inf
    if "x" in out and out["x"].size and case.op.endswith("norm"):
        out["x"] = (out["x"].astype(np.float32) * float(rng.choice([1e-3, 30.0]))).astype(out["x"].dtype)
    return out


def poisoned(case: Case, arrays: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The arrays with a few NaN or infinities put in. Held to the reference forward only: what 0 * NaN does to
    the gradients of other rows is no property of a formula but of how it happens to be summed."""
    out = dict(arrays)
    for name in case.poison:
        a = out[name].copy()
        if a.size:
            at = rng.integers(0, a.size, int(rng.integers(1, 4)))
            a.reshape(-1)[at] = rng.choice([np.nan, np.inf, -np.inf], at.shape).astype(a.dtype)
        out[name] = a
    return out
