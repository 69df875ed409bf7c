"""What a program has set that changes times or numbers of kernels: found where it runs, and set in the process that times them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of a framework.

    Attributes:
      get: its value now, JSON-ready.
      set: sets it; None for a variable of the environment, which another process inherits.
      default: its value where nobody has set it.
      counts: whether measurements under another value are kept apart.
      dtype: of the arrays whose calls it changes; "" for any.
      platforms: on which it changes them; empty for all.
    """

    name: str
    get: Callable[[], Any]
    set: Callable[[Any], object] | None
    default: Any = None
    counts: bool = True
    dtype: str = ""
    platforms: tuple[str, ...] = ()


def variable(name: str, ignored: Sequence[str] = (), **more: Any) -> Setting:
    """A variable of the environment that holds flags, of which those that begin with one of `ignored` do not matter."""

    def get() -> str:
        return " ".join(sorted(flag for flag in os.environ.get(name, "").split() if not flag.startswith(tuple(ignored))))

    return Setting(name, get, None, "", **more)


def found(settings: Iterable[Setting]) -> dict[str, Any]:
    """What is other than by default, by name."""
    values = {s.name: s.get() for s in settings}
    return {s.name: values[s.name] for s in settings if values[s.name] != s.default}


def put(settings: Iterable[Setting], values: Mapping[str, Any]) -> None:
    """Sets what `found` found in another process, and leaves what is so already: to set some is an error once a device is in use."""
    for s in settings:
        if s.set is not None and s.get() != (value := values.get(s.name, s.default)):
            s.set(value)


def counted(settings: Iterable[Setting], platform: str, values: Mapping[str, Any]) -> tuple[tuple[str, Any, str], ...]:
    """`(name, value, dtype)` of what keeps measurements on a platform apart."""
    return tuple((s.name, values[s.name], s.dtype) for s in settings
                 if s.counts and s.name in values and (not s.platforms or platform in s.platforms))  # fmt: skip


def instead(settings: Iterable[Setting], here: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of this process, with those values of what counts; None if one is a variable that is another here.

    Names that are not known are left out: a file may hold any.
    """
    made = dict(here)
    for s in settings:
        if not s.counts:
            continue
        value = values.get(s.name, s.default)
        if s.set is None and value != here.get(s.name, s.default):
            return None
        made.pop(s.name, None)
        if value != s.default:
            made[s.name] = value
    return made
