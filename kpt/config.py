"""Settings: one frozen dataclass, read from environment variables that start with `KPT_`; docs/config.md lists them."""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from kpt.errors import ConfigError, HardwareError

PREFIX = "KPT_"
CERTIFY = ("full", "random", "off")
RECORD = ("on", "off")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
_UNITS = {"": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def _cache_dir() -> pathlib.Path:
    try:
        import platformdirs
    except ImportError:  # the XDG rule, which platformdirs follows on Linux
        return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "kpt"
    return pathlib.Path(platformdirs.user_cache_dir("kpt", appauthor=False))


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of this process.

    Attributes:
      hardware: "auto" (detect it), or the name of a profile to plan for.
      level: how much a rewrite may change: "conservative", "balanced" or "aggressive".
      certify: on which inputs a swap is compared with the original before it is used: "full" (random ones and the
        caller's examples), "random", or "off".
      certify_bytes: the most memory that the certificate of one site may take; None for 2 GiB on a CPU, and elsewhere
        an eighth of the device's memory.
      cache_dir: where measurements and histories are kept.
      record: whether what `auto_optimize` and `kpt bench` measure is added to the history.
      log_level: of the logger "kpt".
    """

    hardware: str = "auto"
    level: str = "balanced"
    certify: str = "full"
    certify_bytes: int | None = None
    cache_dir: pathlib.Path = dataclasses.field(default_factory=_cache_dir)
    record: str = "on"
    log_level: str = "warning"


def _bad(name: str, text: str, allowed: str) -> ConfigError:
    return ConfigError(f"{PREFIX}{name.upper()} is {text!r}", f"Allowed are {allowed}", "Correct it, or unset it")


def _one_of(name: str, text: str, allowed: tuple[str, ...]) -> str:
    if text.lower() not in allowed:
        raise _bad(name, text, ", ".join(allowed))
    return text.lower()


def _hardware(name: str, text: str) -> str:
    from kpt.hardware.profiles import hardware_profile

    if text.lower() == "auto":
        return "auto"
    try:
        return hardware_profile(text).name
    except HardwareError as e:
        raise ConfigError(f"{PREFIX}{name.upper()} is {text!r}", e.possible, "Correct it, or unset it") from None


def _level(name: str, text: str) -> str:
    from kpt.kernels.spec import LEVELS

    return _one_of(name, text, LEVELS)


def _bytes(name: str, text: str) -> int | None:
    if text.lower() == "auto":
        return None
    match = re.fullmatch(r"(\d{1,18})\s*([a-z]*)", text.lower(), re.ASCII)
    if not match or match[2] not in _UNITS:
        raise _bad(name, text, "a number of bytes, alone or followed by KiB, MiB, GiB or TiB")
    return int(match[1]) * _UNITS[match[2]]


def _directory(name: str, text: str) -> pathlib.Path:
    try:
        path = pathlib.Path(text).expanduser()
    except RuntimeError:
        raise _bad(name, text, "directories whose home can be found") from None
    if path.exists() and not path.is_dir():
        raise _bad(name, text, "directories, existing or not; this is a file")
    return path.absolute()


_READ: Mapping[str, Callable[[str, str], Any]] = {
    "hardware": _hardware,
    "level": _level,
    "certify": lambda name, text: _one_of(name, text, CERTIFY),
    "certify_bytes": _bytes,
    "cache_dir": _directory,
    "record": lambda name, text: _one_of(name, text, RECORD),
    "log_level": lambda name, text: _one_of(name, text, LOG_LEVELS),
}


def config(environ: Mapping[str, str] | None = None) -> Config:
    """The settings as the environment has them now; a variable that is unset or empty has its default.

    Args:
      environ: read instead of `os.environ`.

    Raises:
      ConfigError: a variable has a value that is not allowed.
    """
    given = os.environ if environ is None else environ
    return Config(**{name: setting(name, given) for name in _READ if _text(name, given)})


def setting(name: str, environ: Mapping[str, str]) -> Any:
    """One setting as the environment has it, whatever the other variables hold.

    Raises:
      ConfigError: its variable has a value that is not allowed.
    """
    text = _text(name, environ)
    return _READ[name](name, text) if text else getattr(Config(), name)


def _text(name: str, environ: Mapping[str, str]) -> str:
    return environ.get(PREFIX + name.upper(), "").strip()


def start_logging(environ: Mapping[str, str] | None = None) -> None:
    """Where `KPT_LOG_LEVEL` is set: gives the logger "kpt" that level, and shows its records unless the program set up logging.

    Where it is not, the logger is the program's own affair.
    """
    given = os.environ if environ is None else environ
    if not _text("log_level", given):
        return
    log = logging.getLogger("kpt")
    log.setLevel(setting("log_level", given).upper())
    if not log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        log.addHandler(handler)
