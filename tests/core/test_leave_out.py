"""Which kernels a program is faster without, on a clock of the test's own."""

from __future__ import annotations

import re

import numpy as np
import pytest

from kpt.ops.base import Spec
from kpt.strategy import leave_out as module
from kpt.strategy.leave_out import leave_out
from kpt.strategy.plan import Site

# What each kernel costs the program in seconds beyond the code that it replaces.
COST = {"good": -3.0, "bad": 1.0, "worse": 2.0, "equal": 0.0}


def site(kernel, number=0, width=8):
    return Site("rms_norm", kernel, 1, f"{kernel}{number}", "", "Estimated.", specs={"x": Spec((width, 8), "float32")})


class Clock:
    """Programs whose rounds take what their kernels cost, and the time that passes meanwhile."""

    def __init__(self, sites, monkeypatch, compiling=10.0, failing=()):
        self.sites, self.compiling, self.failing, self.now, self.made = sites, compiling, failing, 0.0, []
        self.rng = np.random.default_rng(0)
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)

    def ready(self, left):
        self.now += self.compiling
        self.made.append({s.kernel for s in self.sites if s.path not in left})
        if self.made[-1] & set(self.failing) != set(self.failing):
            raise MemoryError
        seconds = 10 + sum(COST[s.kernel] for s in self.sites if s.path not in left)

        def sample(repeats):
            return seconds * self.rng.uniform(0.99, 1.01)

        return sample


def run(names, monkeypatch, budget=1e6, **more):
    sites = [s for i, n in enumerate(names) for s in (site(n, 0, 64 - i), site(n, 1, 64 - i))]
    clock = Clock(sites, monkeypatch, **more)
    return *leave_out(sites, clock.ready, budget), clock


def test_what_loses_is_left_out_and_what_wins_or_is_equal_stays(monkeypatch):
    left, notes, clock = run(["bad", "good", "equal", "worse"], monkeypatch)
    assert set(left) == {"bad0", "bad1", "worse0", "worse1"}
    for note, faster, kernel in zip(notes, ("2[3-7]", "(9|10)[0-9]"), ("bad", "worse"), strict=True):
        assert re.fullmatch(rf"rms_norm \(2 sites\): left as written, the program is {faster}\.\d% faster without {kernel} \(± \d\.\d% standard error\)\.", note)
    assert "faster without worse (" in left["worse1"]
    # Each is tried in a program without what was left out before it.
    assert clock.made == [{"bad", "good", "equal", "worse"}, {"good", "equal", "worse"}, {"equal", "worse"}, {"good", "worse"}, {"good", "equal"}]


def test_one_kind_is_for_the_whole_program_to_decide(monkeypatch):
    assert run(["bad"], monkeypatch)[:2] == ({}, ())


@pytest.mark.parametrize("budget, tried", [(0, 0), (-5, 0), (15, 1), (29, 1), (45, 2)])
def test_the_budget_is_kept(monkeypatch, budget, tried):
    """The first kind takes two compilations of 10 s, and one that would not end in time by that measure is not begun."""
    left, notes, clock = run(["bad", "worse", "good"], monkeypatch, budget)
    assert len(left) == 2 * tried and len(clock.made) == (1 + tried if tried else 0)
    assert clock.now <= max(20, budget) and f"The budget ended before {3 - tried} of 3 kinds of call" in notes[-1]


def test_a_program_that_cannot_be_had_without_a_kernel_keeps_it(monkeypatch):
    left, notes, _ = run(["bad", "worse"], monkeypatch, failing=("bad",))
    assert set(left) == {"worse0", "worse1"} and len(notes) == 1
