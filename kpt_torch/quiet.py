"""What torch says while Dynamo captures, for a program whose output is its own. Imports no torch."""

from __future__ import annotations

import logging

LOGGERS = ("torch._dynamo.convert_frame", "torch._subclasses.fake_tensor")


def no_tracebacks() -> None:
    """Torch logs the traceback of what it cannot capture; the error that follows, or the plan, says it in a line."""
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_no_traceback)


def _no_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info and "Traceback" not in record.getMessage() and "failed while attempting" not in record.getMessage()
