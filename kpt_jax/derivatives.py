"""Gradients taken inside a program are rewritten before they are taken.

A training step differentiates inside: what remains of attention afterwards is its forward and backward
parts, woven together. So while a program is traced, jax's entry to reverse mode hands its function to the
planner first. Every way there (`jax.grad`, `jax.value_and_grad`, `jax.vjp`, `nnx.grad`, under whatever name
they were imported, and functions that `jax.grad` returned long ago) passes through one function of jax.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

from kpt_jax import _compat
from kpt_jax.planner import active

_lock = threading.RLock()
_depth = 0
_originals: list[tuple[Any, str, Callable[..., Any]]] = []


@contextlib.contextmanager
def derivatives_seen(token: object) -> Iterator[None]:
    """Inside: functions differentiated by this thread are offered to `kpt_jax.planner.active`.

    Other threads find jax as it was: what is in its place asks for their planner, and they have none.

    Args:
      token: what tells this trace from others. jax keeps what it traces inside of an inner `jit` for the next
        call; the token is part of the key, or rewritten code would turn up where nobody asked for it.
    """
    global _depth
    with _lock:
        if _depth == 0:
            for module, name in _compat.reverse_mode_entries():
                _originals.append((module, name, getattr(module, name)))
                setattr(module, name, _through_planner(getattr(module, name)))
        _depth += 1
    try:
        with _compat.apart(token):
            yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                for module, name, function in _originals:
                    setattr(module, name, function)
                _originals.clear()


def _through_planner(derive: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(derive)
    def wrapper(fun: Any, *primals: Any, **options: Any) -> Any:
        if active.get() is None:
            return derive(fun, *primals, **options)
        from kpt_jax.optimize import nested

        return derive(_compat.like_function(fun, nested), *primals, **options)

    return wrapper
