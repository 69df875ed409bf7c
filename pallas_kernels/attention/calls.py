"""Which calls cuDNN and the kernels for NVIDIA Hopper take, and what these know of a call before it is traced.

Known from specs, without jax: PyTorch asks too, and would wait two seconds for an answer from modules that import it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from kpt.ops.base import Specs
from kpt.ops.mask import Causal, Lengths, Mask, Window
from pallas_kernels.attention.blocks import data_terms, visible_range

ROWS = 64
"""Of a warpgroup's block of scores: those of the tensor cores' instruction."""
HEADS = (64, 96, 128, 256)
"""Head dims that there are kernels for; others are padded with zeros."""
LONGEST_TILE = 128
"""Queries or keys of one: shorter arrays are padded to it."""


@dataclasses.dataclass(frozen=True)
class Static:
    """What is known before tracing. Scores are `scale q k^T` or `cap tanh(scale / cap q k^T)`; `scale` is positive."""

    mask: Mask
    scale: float
    cap: float | None
    queries: int
    keys: int

    @property
    def unit(self) -> float:
        """What a product, or its tanh, is multiplied with before an exponential to base 2."""
        return (self.scale if self.cap is None else self.cap) * math.log2(math.e)

    @functools.cached_property
    def diagonals(self) -> tuple[int | None, int | None]:
        """`low, high`: causality and windows let query `i` see no key before `i + low`, and none from `i + high` on."""
        far = 2**40
        first, last = visible_range(self.mask, np.array([far]), 2 * far)
        return (int(first[0]) - far if first[0] else None), (int(last[0]) - far if last[0] != 2 * far else None)

    @property
    def by_data(self) -> bool:
        return bool(data_terms(self.mask))

    @functools.cached_property
    def may_be_blind(self) -> bool:
        """Whether there may be a query that sees no key."""
        first, last = visible_range(self.mask, np.arange(self.queries), self.keys)
        return self.by_data or bool(np.any(first >= last))

    def masks(self, keys: int) -> bool:
        """Whether something may be hidden in tiles of so many keys."""
        return self.mask.terms != () or self.keys % keys != 0


def refused_on_one_hopper(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why the kernels for Hopper cannot take these arrays, or None, where nothing partitions the program."""
    q, k, v = (specs[n] for n in "qkv")
    mask: Mask = params.get("mask") or Mask()
    if len({a.dtype for a in (q, k, v)}) > 1:
        return f"takes q, k and v of one dtype, and these are {q.dtype}, {k.dtype} and {v.dtype}"
    if 0 in (*q.shape, *k.shape, *v.shape):
        return "takes no empty arrays"
    head, head_v = q.shape[3], v.shape[3]
    if max(head, head_v) > HEADS[-1]:
        return f"keeps sums of head dims up to {HEADS[-1]} in registers, and these are {head} and {head_v}"
    if (params.get("out_dtype") or q.dtype) not in (q.dtype, "float16", "bfloat16"):
        return f"rounds its output to {q.dtype}, and {params['out_dtype']} was asked for"
    if math.isfinite(mask.fill) and mask.fill > -1e9:
        return f"gives hidden keys no weight, and a score of {mask.fill} may have some"
    if q.shape[1] < ROWS:
        return f"multiplies {ROWS} queries at a time, and these are {q.shape[1]}"
    by_cudnn = mask.kinds <= {"causal", "window", "lengths"} and params.get("logits_soft_cap") is None
    if by_cudnn and refused_by_cudnn(specs, params) is None:
        if head not in HEADS:
            return f"pads head dims to {' or '.join(map(str, HEADS))}, and cuDNN takes {head} as it is"
        if not mask.terms:
            return "multiplies seven times in both passes, and cuDNN is faster where nothing is hidden"
    return None


def refused_by_cudnn(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why cuDNN cannot compute this call on any GPU, or None."""
    q, k, v = (specs[n] for n in "qkv")
    (_, t, _, head), s = q.shape, k.shape[1]
    mask: Mask = params.get("mask") or Mask()
    if len({a.dtype for a in (q, k, v)}) > 1:
        return f"takes q, k and v of one dtype, and these are {q.dtype}, {k.dtype} and {v.dtype}"
    if 0 in (*q.shape, *k.shape):
        return "takes no empty arrays"
    if v.shape[3] != head:
        return f"takes v with the head dim of q, and these are {v.shape[3]} and {head}"
    if t % 2 or s % 2:
        return f"differentiates attention over even numbers of queries and keys, and these are {t} and {s}"
    if head % 8:
        return f"takes head dims that 8 divides, and this is {head}"
    if (params.get("out_dtype") or q.dtype) not in (q.dtype, "float16", "bfloat16"):
        return f"rounds its output to {q.dtype}, and {params['out_dtype']} was asked for"
    offsets = {term.offset for term in mask.terms if isinstance(term, Causal | Window)}
    if offsets and offsets != {0}:
        return f"aligns queries and keys at their first position, and this mask aligns them at {max(offsets, key=abs)}"
    windows = [term for term in mask.terms if isinstance(term, Window)]
    if any(term.left is None or term.left < 0 for term in windows) or len(windows) > 1:
        return "takes one window, that is bounded on the left and holds the query's own position"
    if windows and not (is_causal(mask) or windows[0].right == 0):
        return "takes windows under causality alone"
    if Lengths() in mask.terms and windows:
        return "gives 0 to queries whose window is past the length, where this mask has another fill"
    if Lengths() in mask.terms and mask.fill == float("-inf"):
        return "cannot make the NaN that an infinite fill gives a sequence of length 0"
    return None


def refused_to_128(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """As `refused_by_cudnn`, for every GPU that has cuDNN's attention."""
    return _refused(specs, params, 0, 128, "on every GPU")


def refused_to_256(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """As `refused_by_cudnn`, for the head dims that Hopper and later GPUs take besides."""
    return _refused(specs, params, 128, 256, "from Hopper on, and attention.cudnn takes those below")


def _refused(specs: Specs, params: Mapping[str, Any], above: int, to: int, where: str) -> str | None:
    head = specs["q"].shape[3]
    if not above < head <= to:
        return f"takes head dims of {above + 8} to {to} {where}, and this is {head}"
    return refused_by_cudnn(specs, params)


def is_causal(mask: Mask) -> bool:
    return any(isinstance(term, Causal) for term in mask.terms)
