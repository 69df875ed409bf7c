"""How often the regression test is wrong, on simulated histories: `python -m kpt.tracking.simulate [--json FILE]`.

Noise is drift-free. A run has a level of its own, log-normal, correlated with that of the run before it, and some whole runs are
outliers (something else ran). Within a run samples are log-normal around that level, correlated with their neighbours, and some are
far above it, with a heavy tail. The test knows none of these figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kpt.tracking.statistics import SEVERITIES, Thresholds, judge, judge_recent, mann_whitney

HISTORIES = 1000
SAMPLES = 20


@dataclasses.dataclass(frozen=True)
class Noise:
    """Relative figures.

    Attributes:
      between, between_correlation: of the levels of runs.
      outlier_runs: fraction of runs that are 5% to 50% slower as a whole.
      within, within_correlation: of the samples of a run.
      outliers: fraction of samples with an excess of 5% and more, Pareto-distributed with exponent 2 (no finite variance).
    """

    between: float
    between_correlation: float = 0.3
    outlier_runs: float = 0.02
    within: float = 0.03
    within_correlation: float = 0.3
    outliers: float = 0.05


NOISES = {
    "quiet": Noise(between=0.003, within=0.01),
    "typical": Noise(between=0.01),
    "noisy": Noise(between=0.02, within=0.06, outlier_runs=0.05, outliers=0.1),
}


def histories(noise: Noise, count: int, runs: int, slower: float, last: int, rng: np.random.Generator, samples: int = SAMPLES) -> Any:
    """Seconds `[count, runs, samples]` of histories whose `last` runs are slower by that fraction."""

    def correlated(shape: tuple[int, ...], sigma: float, r: float) -> Any:
        out = rng.normal(0, sigma, shape)
        for i in range(1, shape[-1]):
            out[..., i] = r * out[..., i - 1] + (1 - r * r) ** 0.5 * out[..., i]
        return out

    level = correlated((count, runs), noise.between, noise.between_correlation)
    level += (rng.random(level.shape) < noise.outlier_runs) * rng.uniform(np.log(1.05), np.log(1.5), level.shape)
    level[:, runs - last :] += np.log1p(slower)
    sample = level[..., None] + correlated((count, runs, samples), noise.within, noise.within_correlation)
    sample += (rng.random(sample.shape) < noise.outliers) * np.log1p(0.05 * (1 + rng.pareto(2, sample.shape)))
    return 1e-3 * np.exp(sample)


Gate = Callable[[Sequence[Any]], str]


def _sides(before: int, after: int) -> tuple[int, int, Gate]:
    return before + after, after, lambda runs: judge(runs[:before], runs[before:]).verdict


def _recent(length: int, recent: int) -> tuple[int, int, Gate]:
    limits = Thresholds(recent=recent)
    return length, recent, lambda runs: judge_recent(runs, limits)[0].verdict


def _pooled(runs: Sequence[Any]) -> str:
    """What is not done, for comparison: a rank test on the samples of two runs, significant and 2% slower."""
    slower = float(np.median(runs[1]) / np.median(runs[0])) > 1 + Thresholds().minor
    return "minor" if slower and mann_whitney(runs[0], runs[1]) < Thresholds().alpha else "unchanged"


# What is judged: name -> (runs of a history, how many of them are the recent ones, the verdict).
DESIGNS: dict[str, tuple[int, int, Gate]] = {
    "20 runs a side": _sides(20, 20),
    "kpt regress: last 5 of 60 runs": _recent(60, 5),
    "kpt regress: last 5 of 25 runs": _recent(25, 5),
    "last 3 of 25 runs": _recent(25, 3),
    "last 5 of 13 runs": _recent(13, 5),
    "one run a side, samples pooled (not done)": (2, 1, _pooled),
}


def rate(design: str, noise: Noise, slower: float, count: int = HISTORIES, seed: int = 0) -> float:
    """Fraction of histories in which a regression is found."""
    runs, last, gate = DESIGNS[design]
    made = histories(noise, count, runs, slower, last, np.random.default_rng(seed))
    return sum(gate(h.tolist()) in SEVERITIES for h in made) / count


def successive(noise: Noise, count: int, seed: int = 0, first: int = 25, runs: int = 60) -> dict[str, float]:
    """Fraction of unchanged histories in which any of the judgements after run `first`, ..., `runs` finds each severity or a worse."""
    worst = [
        max((SEVERITIES.index(v) + 1 for k in range(first, runs + 1) if (v := judge_recent(h[:k])[0].verdict) in SEVERITIES), default=0)
        for h in histories(noise, count, runs, 0.0, 0, np.random.default_rng(seed)).tolist()
    ]
    return {s: sum(w > i for w in worst) / count for i, s in enumerate(SEVERITIES)}


def simulate(count: int = HISTORIES, seed: int = 0) -> dict[str, Any]:
    """Every design at every noise, unchanged and slower."""
    rows = [
        {"design": d, "noise": n, "slower": slower, "found": rate(d, noise, slower, count, seed)}
        for d in DESIGNS
        for n, noise in NOISES.items()
        for slower in (0.0, 0.05, 0.1)
    ]
    return {
        "kind": "kpt.regression-simulation", "histories": count, "samples": SAMPLES, "seed": seed,
        "thresholds": dataclasses.asdict(Thresholds()), "noises": {n: dataclasses.asdict(v) for n, v in NOISES.items()}, "rows": rows,
        "successive": {n: successive(noise, count // 5, seed) for n, noise in NOISES.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kpt.tracking.simulate", description=__doc__.splitlines()[0])
    parser.add_argument("--histories", type=int, default=HISTORIES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the figures go, besides")
    given = parser.parse_args()
    result = simulate(given.histories, given.seed)
    found = {(r["design"], r["noise"], r["slower"]): r["found"] for r in result["rows"]}
    print(f"{given.histories} histories each, {SAMPLES} samples a run; regressions found of any severity")
    print(f"{'':44}{'noise':10}{'unchanged':>10}{'5% slower':>11}{'10% slower':>12}")
    for design in DESIGNS:
        for noise in NOISES:
            same, five, ten = (found[design, noise, s] for s in (0.0, 0.05, 0.1))
            print(f"{design:44}{noise:10}{same:>10.1%}{five:>11.1%}{ten:>12.1%}")
    print(f"any of 36 successive judgements of one unchanged history ({given.histories // 5} histories)")
    for noise, by in result["successive"].items():
        print(f"{'':44}{noise:10}{'  '.join(f'{severity} or worse {share:.1%}' for severity, share in by.items())}")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
