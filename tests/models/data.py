"""What the twin models learn from: a text of which a small model learns something in a hundred steps."""

from __future__ import annotations

import functools
import inspect
import textwrap

import numpy as np

VOCABULARY, CONTEXT, BATCH = 128, 32, 4


@functools.cache
def _text() -> np.ndarray:
    return np.frombuffer(inspect.getsource(textwrap).encode("ascii", "replace"), np.uint8)


def batch(step: int) -> dict[str, np.ndarray]:
    """`tokens` and `labels`, int32 [BATCH, CONTEXT]: bytes of Python's own textwrap module, and those that follow."""
    text = _text()
    starts = np.random.default_rng(step).integers(0, len(text) - CONTEXT - 1, BATCH)
    rows = np.stack([text[s : s + CONTEXT + 1] for s in starts]).astype(np.int32)
    return {"tokens": rows[:, :-1], "labels": rows[:, 1:]}


def normal(rng: np.random.Generator, *shape: int, scale: float = 0.05) -> np.ndarray:
    return (scale * rng.standard_normal(shape)).astype(np.float32)
