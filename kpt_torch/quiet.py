"""What torch says while Dynamo captures: a line of kpt's, or nothing for a program whose output is its own. Imports no torch."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from contextvars import ContextVar

LOGGERS = ("torch._dynamo.convert_frame", "torch._subclasses.fake_tensor")
_CAPTURING = ("torch._dynamo.convert_frame", "torch._guards")

log = logging.getLogger("kpt")
FRESH = "__kpt"
"""Before the number in the name of code that is compiled."""


def name_as_written(function: str) -> str:
    """The name that its author gave to code that is compiled, or to what Dynamo makes of the rest of it after a graph break."""
    rest = re.fullmatch(r"torch_dynamo_resume_in_(.+)_at_\d+", function)
    return re.sub(rf"{FRESH}\d+", "", rest[1] if rest else function)


def no_tracebacks() -> None:
    """Torch logs the traceback of what it cannot capture; the error that follows, or the plan, says it in a line."""
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_no_traceback)


def _no_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info and "Traceback" not in record.getMessage() and "failed while attempting" not in record.getMessage()


_MET: ContextVar[list[str] | None] = ContextVar("met", default=None)


@contextlib.contextmanager
def in_a_line(met: list[str]) -> Iterator[None]:
    """While Dynamo captures for kpt: what it leaves as it was written is a line of kpt's log and of `met`, its traceback is at debug."""
    for name in _CAPTURING:
        there = logging.getLogger(name).filters
        if _in_a_line not in there:
            there.insert(0, _in_a_line)  # before those that keep it from whoever reads
    token = _MET.set(met)
    try:
        yield
    finally:
        _MET.reset(token)


def _in_a_line(record: logging.LogRecord) -> bool:
    met = _MET.get()
    if met is None or record.levelno < logging.WARNING:
        return True
    left = re.search(r"WON'T CONVERT (\S+) (.+) line (\d+)", record.getMessage())
    if left is not None and record.exc_info and record.exc_info[1] is not None:
        error = record.exc_info[1]
        said = re.split(r"\n\s*(?:User stack|from user code|Set TORCHDYNAMO)", str(error))[0]
        where, why = f"{name_as_written(left[1])} ({left[2]}:{left[3]})", f"{type(error).__name__}: {' '.join(said.split())[:300]}"
        met.append(f"{where} runs as it was written: {why}")
        if _no_traceback not in logging.getLogger(record.name).filters:
            log.warning("Dynamo could not capture a function: %s", met[-1])
    elif record.name != "torch._guards":  # whose error comes again
        return True
    log.debug("%s", record.getMessage(), exc_info=record.exc_info)
    return False
