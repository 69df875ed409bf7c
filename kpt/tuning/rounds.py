"""Programs run in turn in one process, and what the figures are worth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

SECONDS = 1.5
"""Time to spend on running each program."""
SAMPLE = 2e-3
"""Shortest sample, in seconds: shorter calls are repeated within one, for clocks and wake-ups cost microseconds."""
SIGMAS = 3.0
"""Standard errors that chance reaches once in seven hundred times, where they are known."""


def sigmas(count: int) -> float:
    """Standard errors by which a rewrite has to win so that one in seven hundred does by chance, where they are from so many rounds.

    The median absolute deviation of a few figures is often much too small: of 9 rounds, one comparison in forty exceeds 3 of its errors.
    The factor is fitted to simulated normal noise.
    """
    return SIGMAS * (1 + 5 / count + 60 / count**2)


def rounds(samples: Mapping[str, Callable[[int], float]], seconds: float = SECONDS) -> dict[str, tuple[float, ...]]:
    """Seconds per call, one figure a round, of programs that are ready to run.

    In each round every program runs once, in an order that rotates, so that whatever else the machine does meets all.

    Args:
      samples: by name, `sample(repeats)`: seconds a call, over as many calls.
    """
    slowest = 0.0
    for sample in samples.values():
        sample(1)  # first touch of memory
        slowest = max(slowest, sample(1))
    repeats = max(1, math.ceil(SAMPLE / max(slowest, 1e-9)))
    fit = seconds / max(repeats * slowest, 1e-9)
    # Few rounds know little of their own noise (`sigmas`), so that more are worth ten times the time, and 9 whatever they take.
    count = min(101, max(9, math.ceil(fit), min(15, math.ceil(10 * fit))))
    taken: dict[str, list[float]] = {n: [] for n in samples}
    names = list(samples)
    for i in range(count):
        first = i % len(names)
        for n in names[first:] + names[:first]:
            taken[n].append(samples[n](repeats))
    return {n: tuple(t) for n, t in taken.items()}


def gain(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """`(log of the speedup, its standard error)` over rounds that ran side by side.

    The median of the ratios' logarithms, for a busy machine leaves outliers, and for it the error of a median,
    1.2533 sigma / sqrt(n), with sigma from the median absolute deviation, 1.4826 MAD.
    """
    logs = [math.log(b / a) for b, a in zip(before, after, strict=True)]
    middle = statistics.median(logs)
    mad = statistics.median(abs(x - middle) for x in logs)
    return middle, 1.2533 * 1.4826 * mad / math.sqrt(len(logs))


def certain(noise: float, count: int) -> str:
    """What a speedup of so many rounds, with this standard error of its logarithm, is worth; "kept" is decided by the same."""
    return f"± {noise:.1%} standard error; kept if faster by more than {math.expm1(sigmas(count) * noise):.1%}"


def ratio(log: float) -> str:
    """A logarithm of a speedup in words."""
    return f"{math.exp(log):.2f}x faster" if log >= 0 else f"{math.exp(-log):.2f}x slower"
