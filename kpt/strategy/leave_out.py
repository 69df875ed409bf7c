"""Kernels that a program is faster without: one kind of call after the other is left as it was written, and the whole program timed."""

from __future__ import annotations

import collections
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping

from kpt.strategy import wire
from kpt.strategy.plan import Site
from kpt.tuning.rounds import gain, rounds, sigmas

log = logging.getLogger("kpt")
Sample = Callable[[int], float]


def leave_out(sites: Iterable[Site], ready: Callable[[Mapping[str, str]], Sample], budget: float) -> tuple[dict[str, str], tuple[str, ...]]:
    """Finds the kernels that lose beside others that win, which the time of the whole program with all of them does not show.

    What XLA or a compiler fuses around a site is part of what its own code costs, so it is the program that is timed and not the site. A
    kind is left out if the program without it is faster by more than the noise; then the next one is tried without both. One kind alone
    is not tried, for the whole program beside the original decides on it.

    Args:
      sites: of the plan, proved.
      ready: compiles the program with these sites, by path, left as they were written; returns `sample(repeats)`, seconds a call.
      budget: seconds. A kind is not begun if the longest one so far would not fit into what is left.

    Returns:
      By path, why a site is to be left as it was written, and sentences for the plan.
    """
    end, longest = time.monotonic() + budget, 0.0
    kinds: dict[str, list[Site]] = collections.defaultdict(list)
    for site in sites:
        kinds[json.dumps([site.op, site.kernel, wire.encode(site.specs), wire.encode(site.params)])].append(site)
    if len(kinds) < 2:
        return {}, ()
    left: dict[str, str] = {}
    notes: list[str] = []
    whole: Sample | None = None
    # Where most memory is touched a kernel that loses costs most.
    for tried, kind in enumerate(sorted(kinds.values(), key=_elements, reverse=True)):
        start = time.monotonic()
        if start >= end or start + longest > end:
            notes.append(f"The budget ended before {len(kinds) - tried} of {len(kinds)} kinds of call: the program was not timed without "
                         "their kernels.")  # fmt: skip
            break
        try:
            whole = whole or ready(left)
            other = ready(left | dict.fromkeys((s.path for s in kind), "It is being left out."))
            taken = rounds({"with": whole, "without": other})
        except Exception as problem:  # the original may need more memory than there is; then the kernel is what is needed
            log.info("the program was not timed without %s: %s", kind[0], problem)
            continue
        finally:
            longest = max(longest, time.monotonic() - start)
        won, noise = gain(taken["with"], taken["without"])
        if won > sigmas(len(taken["with"])) * noise:
            faster = f"the program is {math.expm1(won):.1%} faster without {kind[0].kernel} (± {noise:.1%} standard error)"
            left |= dict.fromkeys((s.path for s in kind), f"Measured: {faster}.")
            notes.append(f"{kind[0].op} ({len(kind)} site{'s' if len(kind) > 1 else ''}): left as written, {faster}.")
            whole = other
    return left, tuple(notes)


def _elements(kind: list[Site]) -> int:
    return len(kind) * sum(math.prod(spec.shape) for spec in kind[0].specs.values())
