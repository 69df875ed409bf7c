"""Which blocks of the `[T, S]` score matrix a mask hides, leaves whole or cuts: known from shapes alone."""

from __future__ import annotations

import dataclasses

import numpy as np

from kpt.ops.mask import Bias, Causal, Mask, Window


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A tiling of the score matrix.

    Attributes:
      q_starts, q_sizes: first row and number of rows of each query block; only the last may be shorter.
      kv_starts, kv_sizes: the same for key blocks.
      hidden: `[query blocks, key blocks]` bool: no query of the block may see any key of it.
      whole: likewise: causality and windows hide nothing of it (terms that depend on data still may).
      every_row_sees: True if, by causality and windows alone, every query sees some key.
    """

    q_starts: np.ndarray
    q_sizes: np.ndarray
    kv_starts: np.ndarray
    kv_sizes: np.ndarray
    hidden: np.ndarray
    whole: np.ndarray
    every_row_sees: bool


def visible_range(mask: Mask, rows: np.ndarray, keys: int) -> tuple[np.ndarray, np.ndarray]:
    """First and one past the last key that the static terms let each query of `rows` see (`first >= last`: none)."""
    first, last = np.zeros(len(rows), np.int64), np.full(len(rows), keys, np.int64)
    for term in mask.terms:
        if isinstance(term, Causal):
            last = np.minimum(last, rows + term.offset + 1)
        elif isinstance(term, Window):
            if term.left is not None:
                first = np.maximum(first, rows + term.offset - term.left)
            if term.right is not None:
                last = np.minimum(last, rows + term.offset + term.right + 1)
    return first, last


def static_terms(mask: Mask) -> tuple[Causal | Window, ...]:
    """The terms that shapes alone decide."""
    return tuple(t for t in mask.terms if isinstance(t, Causal | Window))


def data_terms(mask: Mask) -> tuple:
    """The terms that hide keys and depend on an operand."""
    return tuple(t for t in mask.terms if not isinstance(t, Causal | Window | Bias))


def tile(mask: Mask, queries: int, keys: int, block_q: int, block_kv: int) -> Blocks:
    """Tiles a `[queries, keys]` score matrix with blocks of `block_q` by `block_kv`."""
    q_starts, kv_starts = np.arange(0, queries, block_q), np.arange(0, keys, block_kv)
    q_sizes, kv_sizes = np.minimum(block_q, queries - q_starts), np.minimum(block_kv, keys - kv_starts)
    first, last = visible_range(mask, np.arange(queries), keys)
    kv_ends = kv_starts + kv_sizes
    # Both bounds grow with the row, so a block's first and last row bound what its rows see.
    top, bottom = q_starts, q_starts + q_sizes - 1
    hidden = (kv_starts[None] >= last[bottom][:, None]) | (kv_ends[None] <= first[top][:, None])
    whole = (kv_starts[None] >= first[bottom][:, None]) & (kv_ends[None] <= last[top][:, None])
    return Blocks(q_starts, q_sizes, kv_starts, kv_sizes, hidden, whole & ~hidden, bool(np.all(first < last)))
