"""Which framework a program is of, as far as it tells by itself; neither is imported to find out."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

from kpt.errors import KptError

_OF = {"jax": "jax", "jaxlib": "jax", "flax": "jax", "optax": "jax", "kpt_jax": "jax", "torch": "torch", "kpt_torch": "torch"}
_NAMES = {"jax": "JAX", "torch": "PyTorch"}


def framework_of(program: Any) -> str | None:
    """ "jax" or "torch"; None where nothing tells, or both are used.

    A model tells by its class. A function tells by what its code names: modules, models, and functions of its own package, which are read
    in their turn.
    """
    while isinstance(program, functools.partial):
        program = program.func
    found: set[str] = set()
    seen: dict[int, Any] = {}
    left = [program]
    while left:
        x = left.pop()
        if id(x) in seen:
            continue
        seen[id(x)] = x
        if told := set(_told(x)):
            found |= told
        elif isinstance(x, types.MethodType):
            left += [x.__self__, x.__func__]
        elif isinstance(x, types.FunctionType) and (x is program or _package(x) == _package(program)):
            left += _named(x, x.__code__)
    return found.pop() if len(found) == 1 else None


def refuse_other(program: Any, framework: str) -> None:
    """Tells who gave `kpt_<framework>.optimize` a program of the other framework where it belongs.

    Raises:
      KptError: it is of the other framework.
    """
    of = framework_of(program)
    if of is not None and of != framework:
        a_function = isinstance(program, types.FunctionType)
        what = f"the function {program.__qualname__}" if a_function else f"an object of type {type(program).__name__}"
        raise KptError(f"kpt_{framework}.optimize was given {what}", f"It is of {_NAMES[of]}, which kpt_{of} rewrites",
                       f"Call kpt_{of}.optimize with it")  # fmt: skip


def _told(x: Any) -> Iterator[str]:
    """The frameworks that an object is made of."""
    if isinstance(x, types.ModuleType):
        modules = [x.__name__]
    else:
        classes = x.__mro__ if isinstance(x, type) else type(x).__mro__
        modules = [c.__module__ for c in classes] + ([x.__module__] if isinstance(x, types.FunctionType) else [])
    for module in modules:
        if (of := _OF.get(str(module).partition(".")[0])) is not None:
            yield of


def _named(fn: types.FunctionType, code: types.CodeType) -> list[Any]:
    """What a function's code, and that of the functions inside of it, names of the world around."""
    found = [fn.__globals__[name] for name in code.co_names if name in fn.__globals__]
    for cell in fn.__closure__ or () if code is fn.__code__ else ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # of what is defined further down
            continue
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            found += _named(fn, inner)
    return found


def _package(x: Any) -> str:
    return str(getattr(x, "__module__", "")).partition(".")[0]
