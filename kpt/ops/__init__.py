"""What each op means: signature, shape rule, float64 reference forward and backward, samples, cost."""

from __future__ import annotations

import difflib

from kpt.errors import OpError
from kpt.ops import (
    attention,
    cross_entropy,
    glu,
    layer_norm,
    linear_act,
    linear_cross_entropy,
    matmul,
    ragged_matmul,
    rms_norm,
    rope,
)
from kpt.ops.base import REQUIRED, Cost, Op, Spec, Specs
from kpt.ops.mask import Bias, Causal, Explicit, Lengths, Mask, Segments, Window

OPS: dict[str, Op] = {
    m.OP.name: m.OP
    for m in (attention, rms_norm, layer_norm, linear_act, glu, rope, cross_entropy, linear_cross_entropy, matmul, ragged_matmul)
}
"""Every op, by name."""


def op(name: str) -> Op:
    """The op of this name.

    Raises:
      OpError: there is none; the advice names what is near.
    """
    if name not in OPS:
        near = difflib.get_close_matches(name, OPS, n=3)
        raise OpError(f"Op {name!r} was asked for", f"The ops are {', '.join(OPS)}", f"Did you mean {near[0]!r}?" if near else "")
    return OPS[name]


__all__ = ["OPS", "REQUIRED", "Bias", "Causal", "Cost", "Explicit", "Lengths", "Mask", "Op", "OpError", "Segments", "Spec",
           "Specs", "Window", "op"]  # fmt: skip
