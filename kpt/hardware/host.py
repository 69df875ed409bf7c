"""The files and variables that tell what hardware a host has, read so that nothing on it can stop the reading."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping

_LONGEST = 8 << 20  # /proc/cpuinfo of the largest servers is below 1 MB


@dataclasses.dataclass(frozen=True)
class Host:
    """A file system and an environment: those of this process, or made-up ones in a test.

    Attributes:
      root: the directory that has `dev`, `proc` and `sys`.
      environ: environment variables.
      logical_cpus: how many logical CPUs the process may run on; None to take all that /proc/cpuinfo lists.
      notes: what could not be read, in the order it was tried.
    """

    root: pathlib.Path
    environ: Mapping[str, str]
    logical_cpus: int | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    def read(self, path: str | pathlib.Path) -> str:
        """The text of a file below the root, without surrounding space; empty where it cannot be read."""
        try:
            with open(self.root / path, encoding="utf-8", errors="replace") as file:
                return file.read(_LONGEST).strip()
        except (OSError, ValueError):
            return ""

    def number(self, path: str | pathlib.Path) -> int | None:
        """The integer that a file consists of, in decimal or with 0x; None where it holds no such thing."""
        return integer(self.read(path))

    def glob(self, pattern: str) -> Iterator[pathlib.Path]:
        """Paths below the root that match, with numbers in their names in numerical order."""
        found = self.root.glob(pattern)
        return iter(sorted(found, key=lambda p: [(len(part), part) for part in p.parts]))

    def visible(self, *variables: str) -> list[str] | None:
        """What the first of these variables that is set lets programs see of a vendor's devices; None for all."""
        for variable in variables:
            if variable in self.environ:
                listed = [entry.strip() for entry in self.environ[variable].split(",") if entry.strip()]
                # A negative index hides it and all that follow: CUDA C++ Programming Guide, CUDA_VISIBLE_DEVICES.
                hidden = next((i for i, entry in enumerate(listed) if entry.startswith("-")), len(listed))
                return listed[:hidden]
        return None


def integer(text: str) -> int | None:
    """The integer that a text spells, in decimal or with 0x; None where it spells none."""
    try:
        return int(text, 16 if text.lower().startswith("0x") else 10)
    except ValueError:
        return None


def fields(text: str, separator: str | None = None) -> dict[str, str]:
    """Lines of "key value" (or "key: value", with the separator) as a mapping; the first of equal keys counts."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        parts = line.split(separator, 1)
        if len(parts) == 2:
            found.setdefault(parts[0].strip(), parts[1].strip())
    return found
