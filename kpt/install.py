"""The line that installs a part of kpt. No package index has it: it is installed from a clone."""

from __future__ import annotations

import sys
from pathlib import Path

_CLONE = Path(__file__).resolve().parent.parent


def install(extra: str) -> str:
    """What to run for an extra of pyproject.toml, by the pip of the environment that runs."""
    pip = ".venv/bin/pip" if Path(sys.prefix) == _CLONE / ".venv" else "pip"  # that of `make`, which nobody has to activate
    return f"{pip} install -e '.[{extra}]' in a clone of kpt"
