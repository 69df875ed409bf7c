"""Settings, read from environment variables; docs/config.md is their table."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kpt.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Config:
    """Attributes:

    hardware: profile to plan for, or "auto" for what is found here.
    level: that `optimize` uses when none is given.
    certify: "full" (random and example inputs), "random", or "off".
    certify_bytes: memory that the user's own code may take while one site is certified; above it the kernel is held
      to the float64 reference at reduced size.
    cache_dir: where measurements are kept.
    log_level: of the logger "kpt".
    """

    hardware: str = "auto"
    level: str = "balanced"
    certify: str = "full"
    certify_bytes: int = 2 << 30
    cache_dir: Path | None = None
    log_level: str = "WARNING"

    @property
    def cache(self) -> Path:
        """`cache_dir`, or the platform's place for caches."""
        if self.cache_dir is not None:
            return self.cache_dir
        import platformdirs

        return Path(platformdirs.user_cache_dir("kpt"))


def _one_of(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"one of {', '.join(allowed)}")
        return text

    return parse


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _bytes(text: str) -> int:
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    try:
        size = int(float(number) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        size = -1
    if size < 0:
        raise ValueError("a number of bytes, such as 2000000000, 512M or 4G")
    return size


def _upper(*allowed: str) -> Callable[[str], str]:
    return lambda text: _one_of(*allowed)(text.upper())


_PARSE: dict[str, Callable[[str], Any]] = {
    "hardware": str,
    "level": _one_of("conservative", "balanced", "aggressive"),
    "certify": _one_of("full", "random", "off"),
    "certify_bytes": _bytes,
    "cache_dir": Path,
    "log_level": _upper("DEBUG", "INFO", "WARNING", "ERROR"),
}


def config(environ: Mapping[str, str] | None = None) -> Config:
    """The settings as the environment has them now. An empty variable counts as unset.

    Raises:
      ConfigError: a variable has a value that is not allowed.
    """
    env = os.environ if environ is None else environ
    given = {}
    for name, parse in _PARSE.items():
        text = env.get(f"KPT_{name.upper()}", "")
        if not text:
            continue
        try:
            given[name] = parse(text)
        except ValueError as wanted:
            raise ConfigError(f"KPT_{name.upper()}={text!r} was set", f"it takes {wanted}", "change or unset it") from None
    return Config(**given)
