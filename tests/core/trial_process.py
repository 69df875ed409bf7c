"""The other process of `test_trials.py`: candidates that are what they are named, on no framework."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from kpt.kernels.spec import resolve
from kpt.tuning.trials import Trial, serve

# As importing a framework does.
time.sleep(float(os.environ.get("START_SECONDS", 0)) if __name__ == "__main__" else 0)


def fast() -> None:
    time.sleep(0.002)


def slow() -> None:
    time.sleep(0.006)


def broken() -> None:
    raise ValueError("a block does not fit")


def hanging() -> None:
    time.sleep(1000)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hungry() -> None:
    raise MemoryError("out of memory")


def leaving() -> None:
    print("what a compiler says last", file=__import__("sys").stderr)
    os._exit(3)


def late() -> None:
    """Works once, and ends its process while it is timed."""
    late.calls = getattr(late, "calls", 0) + 1  # type: ignore[attr-defined]
    if late.calls > 3:  # type: ignore[attr-defined]
        os._exit(4)


def tired() -> None:
    """Works once."""
    tired.calls = getattr(tired, "calls", 0) + 1  # type: ignore[attr-defined]
    if tired.calls > 3:  # type: ignore[attr-defined]
        raise MemoryError("no memory beside the others")


def ready(trial: Trial, kernel: str) -> Callable[[int], float]:
    call = resolve(trial.kernels[kernel])

    def sample(repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    return sample


if __name__ == "__main__":
    serve(ready)
