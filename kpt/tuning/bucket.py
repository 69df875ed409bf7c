"""Which calls share a measurement: those of one dtype, with sizes of the same powers of two and masks of the same kinds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kpt.ops.base import Spec
from kpt.ops.mask import Mask


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Attributes:
    dtype: of the op's first array.
    shape: sizes rounded up to powers of two: "a[4096,4096] b[4096,4096]".
    mask: kinds of its terms: "causal segments"; "" without a mask.
    """

    dtype: str
    shape: str
    mask: str

    def __str__(self) -> str:
        return " ".join(filter(None, (self.dtype, self.shape, self.mask)))


def bucket(specs: Mapping[str, Spec], params: Mapping[str, Any]) -> Bucket:
    """The bucket of a call.

    Args:
      specs: the op's arrays by name, the one that gives the dtype first.
      params: of the op; only its mask counts.
    """
    dtype = next(iter(specs.values())).dtype
    sizes = [f"{n}[{','.join(str(1 << max(0, size - 1).bit_length()) for size in s.shape)}]" for n, s in sorted(specs.items())]
    mask = params.get("mask", Mask())
    return Bucket(dtype, " ".join(sizes), " ".join(type(term).__name__.lower() for term in mask.terms))
