"""Complex numbers and their parts, as rotations are written with them."""

from __future__ import annotations

from typing import Any

from kpt_torch.vocabulary.elementwise import _mul
from kpt_torch.vocabulary.shapes import _pick, _stack
from kpt_torch.vocabulary.table import Unknown, rule

_PARTS = {"complex64": "float32", "complex128": "float64"}
_WHOLE = {part: whole for whole, part in _PARTS.items()}


@rule("complex")
def _complex(b: Any, x: Any, y: Any) -> Any:
    if x.dtype not in _WHOLE or x.shape != y.shape:
        raise Unknown("half complex numbers, or parts that are spread")
    return b.op("complex", x, y, shape=x.shape, dtype=_WHOLE[x.dtype])


@rule("view_as_complex")
def _of_pairs(b: Any, x: Any) -> Any:
    return _complex(b, _pick(b, x, -1, 0), _pick(b, x, -1, 1))


@rule("polar")
def _polar(b: Any, size: Any, angle: Any) -> Any:
    turned = (b.op(f, angle, shape=angle.shape, dtype=angle.dtype) for f in ("cos", "sin"))
    return _complex(b, *(_mul(b, size, t) for t in turned))


def _part(b: Any, z: Any, op: str) -> Any:
    if z.dtype not in _PARTS:
        raise Unknown(z.dtype)
    return b.op(op, z, shape=z.shape, dtype=_PARTS[z.dtype])


@rule("real")
def _real(b: Any, z: Any) -> Any:
    return _part(b, z, "real")


@rule("imag")
def _imag(b: Any, z: Any) -> Any:
    return _part(b, z, "imag")


@rule("view_as_real")
def _pairs(b: Any, z: Any) -> Any:
    return _stack(b, [_part(b, z, "real"), _part(b, z, "imag")], -1)
