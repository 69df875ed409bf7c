"""An exception of somebody's code, told in a line: its type, its message, and the line of theirs that it comes from."""

from __future__ import annotations

import os
import sysconfig
import traceback
from pathlib import Path

# Whoever asks for a schedule or a plan wrote neither kpt, nor what is installed, nor Python.
_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = "kpt", "kpt_jax", "kpt_torch", "pallas_kernels"
_OTHERS = (*(str(_ROOT / name) + os.sep for name in _PACKAGES), sysconfig.get_path("stdlib") + os.sep)
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")


def told(error: BaseException) -> str:
    """"KeyError: 'scale' (train.py:12, in step)"; without a place where no frame is the user's."""
    words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    where = place(error)
    return words if where is None else f"{words} ({where})"


def place(error: BaseException) -> str | None:
    """File, line and function of the innermost frame in the user's own code; None where there is none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        name = os.path.abspath(frame.filename)
        if not (frame.filename.startswith("<") or name.startswith(_OTHERS) or any(part in name for part in _INSTALLED)):
            shown = os.path.relpath(name) if name.startswith(os.getcwd() + os.sep) else name
            return f"{shown}:{frame.lineno}, in {frame.name}"
    return None
