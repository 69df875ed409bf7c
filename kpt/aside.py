"""What happens to a file of the cache that cannot be read or written: it is set aside or done without, with a word, and work goes on."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger("kpt")
_TOLD: set[Path] = set()


def unwritable(folder: Path, problem: object) -> None:
    """Tells, once a process for each folder, that what is made is not kept."""
    if folder not in _TOLD:
        _TOLD.add(folder)
        why = getattr(problem, "strerror", None) or problem
        log.warning("%s cannot be written (%s): what this process measures ends with it. KPT_CACHE_DIR names another place.", folder, why)


def set_aside(path: Path, problem: object, companions: Sequence[str] = (), stacklevel: int = 2) -> Path:
    """Renames a file, so that a new one can take its place and nobody's data is deleted.

    Args:
      path: the file.
      problem: why, for the warning.
      companions: endings of files that belong to it, which go with it ("-wal").
      stacklevel: of the warning, as `warnings.warn` has it.

    Returns:
      Its new path, `<name>.bad`, or with a number where an earlier one has that name.
    """
    target = path.with_name(f"{path.name}.bad")
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.bad{number}")
    warnings.warn(f"{path} is set aside as {target.name}: {problem}", stacklevel=stacklevel + 1)
    # The file itself last: one who is stopped in between leaves it to be set aside again, and no companion beside a new file.
    for ending in (*companions, ""):
        with contextlib.suppress(OSError):
            path.with_name(path.name + ending).replace(target.with_name(target.name + ending))
    return target
