"""Schedules that were made once, kept in the user's cache: one JSON file each, named by a hash of all that decides it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from kpt.aside import set_aside, unwritable
from kpt.config import config

VERSION = 1


def folder() -> Path:
    return config().cache_dir / "tpu"


def key(**decides: Any) -> str:
    return hashlib.sha256(json.dumps([VERSION, decides], sort_keys=True).encode()).hexdigest()


def load(name: str) -> Any:
    """What was stored under this key, or None. A file that cannot be read is set aside."""
    path = folder() / f"{name}.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["version"] == VERSION:
            return found["value"]
        raise ValueError("another version")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as problem:
        set_aside(path, problem)
        return None


def store(name: str, value: Any) -> None:
    """Puts a value under a key, at once or not at all. Writers of one key write the same; a full disk costs only the repetition."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder(), suffix=".part", delete=False, encoding="utf-8") as part:
            try:
                json.dump({"version": VERSION, "value": value}, part)
                part.close()
                os.replace(part.name, folder() / f"{name}.json")
            except BaseException:
                Path(part.name).unlink(missing_ok=True)
                raise
    except OSError as problem:
        unwritable(folder(), problem)
