"""Attention masks as an algebra: a mask is a conjunction of terms, never just a tensor.

A term says which keys a query may see. Static facts (causality, a window) live in the term; data
(segment ids, lengths, arrays) lives in operands of the attention op under the names given below.
A kernel says which term kinds it honours, and selection compares sets.

Query `i` and key `j` are row and column of the `[T, S]` score matrix. `offset` aligns them when the
lengths differ: query `i` stands at key position `i + offset`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True, order=True)
class Causal:
    """Key `j` is visible to query `i` iff `j <= i + offset`."""

    offset: int = 0


@dataclasses.dataclass(frozen=True, order=True)
class Window:
    """Key `j` is visible iff `i + offset - left <= j <= i + offset + right`; `None` leaves a side open."""

    left: int | None
    right: int | None
    offset: int = 0


@dataclasses.dataclass(frozen=True, order=True)
class Segments:
    """Visible iff `q_segment_ids[b, i] == kv_segment_ids[b, j]`. Operands `[B, T]` and `[B, S]`, integer."""


@dataclasses.dataclass(frozen=True, order=True)
class Lengths:
    """Visible iff `j < kv_lengths[b]`. Operand `kv_lengths` `[B]`, integer."""


@dataclasses.dataclass(frozen=True, order=True)
class Explicit:
    """Visible iff `keep[b, n, i, j]`. Operand `keep`, bool, rank 4, each dim 1 or that of `[B, N, T, S]`."""


@dataclasses.dataclass(frozen=True, order=True)
class Bias:
    """Not a restriction: `bias` is added to the scores. Operand `bias`, float, rank 4, broadcastable like `keep`."""


Term = Causal | Window | Segments | Lengths | Explicit | Bias
_ORDER = (Causal, Window, Segments, Lengths, Explicit, Bias)


@dataclasses.dataclass(frozen=True)
class Mask:
    """The conjunction of `terms`, and what a hidden score becomes.

    Scores of hidden pairs are replaced by `fill`. The value matters only for a query that sees no key
    at all: with `fill=-inf` its output is NaN, with a finite fill it is the mean of all values, as
    softmax over equal scores is. With `additive=True` the hidden scores are `score + fill` instead
    (`fill` finite), so that such a query attends as if nothing were hidden.

    `Mask()` hides nothing. Masks combine with `&`; a term alone is written `Mask((Causal(),))`.
    """

    terms: tuple[Term, ...] = ()
    fill: float = -math.inf
    additive: bool = False

    def __post_init__(self) -> None:
        unique = sorted(set(self.terms), key=lambda t: (_ORDER.index(type(t)), repr(t)))
        object.__setattr__(self, "terms", tuple(unique))

    def __and__(self, other: Mask) -> Mask:
        """Keys visible under both. The fill of the left side holds, unless it hides nothing."""
        lead = self if any(not isinstance(t, Bias) for t in self.terms) else other
        return Mask(self.terms + other.terms, lead.fill, lead.additive)

    @property
    def kinds(self) -> frozenset[str]:
        """Lower-case names of the term classes present: {"causal", "window", ...}."""
        return frozenset(type(t).__name__.lower() for t in self.terms)

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the arrays that the terms need."""
        names = {"segments": ("q_segment_ids", "kv_segment_ids"), "lengths": ("kv_lengths",),
                 "explicit": ("keep",), "bias": ("bias",)}  # fmt: skip
        return tuple(n for t in self.terms for n in names.get(type(t).__name__.lower(), ()))

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict; `from_json` is the inverse."""
        terms = [{"kind": type(t).__name__.lower(), **dataclasses.asdict(t)} for t in self.terms]
        return {"terms": terms, "fill": repr(self.fill), "additive": self.additive}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Mask:
        by_name = {c.__name__.lower(): c for c in _ORDER}
        terms = [by_name[t["kind"]](**{k: v for k, v in t.items() if k != "kind"}) for t in data["terms"]]
        return Mask(tuple(terms), float(data["fill"]), data["additive"])


def visible(mask: Mask, batch: int, heads: int, queries: int, keys: int, operands: Any) -> Any:
    """The mask as a bool array `[B, N, T, S]` (True = visible), for references and tests.

    Args:
      operands: the arrays of the terms, by name.
    """
    import numpy as np

    i, j = np.arange(queries)[:, None], np.arange(keys)[None, :]
    see = np.ones((batch, heads, queries, keys), bool)
    for t in mask.terms:
        if isinstance(t, Causal):
            see &= j <= i + t.offset
        elif isinstance(t, Window):
            if t.left is not None:
                see &= j >= i + t.offset - t.left
            if t.right is not None:
                see &= j <= i + t.offset + t.right
        elif isinstance(t, Segments):
            q, k = np.asarray(operands["q_segment_ids"]), np.asarray(operands["kv_segment_ids"])
            see &= (q[:, :, None] == k[:, None, :])[:, None]
        elif isinstance(t, Lengths):
            see &= j < np.asarray(operands["kv_lengths"])[:, None, None, None]
        elif isinstance(t, Explicit):
            see &= np.asarray(operands["keep"], bool)
    return see
