"""A short call that stands for a long one, as a proof's does: a kernel that chooses its way by size takes that of the long one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

from kpt.ops.base import Spec

_ARRAYS: ContextVar[Mapping[str, Spec] | None] = ContextVar("the arrays of the call that is stood for", default=None)


@contextlib.contextmanager
def standing_for(specs: Mapping[str, Spec]) -> Iterator[None]:
    """Calls of kernels inside stand for one of these arrays."""
    token = _ARRAYS.set(specs)
    try:
        yield
    finally:
        _ARRAYS.reset(token)


def stood_for(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that the op's array `name`, of this shape here, has in the call that is stood for: by it a kernel chooses its way."""
    spec = (_ARRAYS.get() or {}).get(name)
    return shape if spec is None else spec.shape
