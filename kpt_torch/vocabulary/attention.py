"""`scaled_dot_product_attention`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kpt_torch.vocabulary.elementwise import widened
from kpt_torch.vocabulary.products import same_floats
from kpt_torch.vocabulary.reductions import softmax_of
from kpt_torch.vocabulary.shapes import repeat_interleave
from kpt_torch.vocabulary.table import Unknown, rule


@rule("scaled_dot_product_attention", whole=True)
def _attention(
    b: Any, q: Any, k: Any, v: Any, mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, *, scale: Any = None,
    enable_gqa: bool = False,
) -> Any:  # fmt: skip
    if dropout_p:
        raise Unknown("dropout")
    same_floats(q, k, v)
    dtype, lead = q.dtype, q.ndim - 2
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if enable_gqa and k.shape[-3] != q.shape[-3]:
        k, v = (repeat_interleave(b, a, q.shape[-3] // a.shape[-3], -3) for a in (k, v))
    batch = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v = (b.broadcast(widened(b, a), (*batch, *a.shape[-2:])) for a in (q, k, v))
    s = b.dot(q, k, (q.ndim - 1, k.ndim - 1), len(batch))
    s = b.elementwise("mul", s, b.full(scale, s.dtype))
    keep = None
    if is_causal:
        i, j = (b.iota(s.shape, s.ndim - 2 + d, "int32") for d in (0, 1))
        keep = b.elementwise("le", j, i, dtype="bool")
    elif mask is not None and mask.dtype == "bool":
        keep = b.broadcast(mask, s.shape)
    elif mask is not None:
        s = b.elementwise("add", s, b.convert(mask, s.dtype))
    if keep is None:
        p = softmax_of(b, s, s.ndim - 1)
    else:
        s = b.op("select", keep, s, b.broadcast(b.full(-math.inf, s.dtype), s.shape), shape=s.shape, dtype=s.dtype)
        p = softmax_of(b, s, s.ndim - 1)
        if mask is not None:  # a query that sees nothing gives 0
            p = b.op("select", keep, p, b.broadcast(b.full(0.0, s.dtype), s.shape), shape=s.shape, dtype=s.dtype)
    assert lead >= 1
    return b.convert(b.dot(p, v, (p.ndim - 1, v.ndim - 2), len(batch)), dtype)
