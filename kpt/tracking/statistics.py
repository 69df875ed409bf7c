"""Whether runs have become slower: a rank test on whole runs, a shift with its confidence interval, and three severities.

The unit is the run, not the sample. Samples of one process share its memory layout, its clocks and its neighbours, so two runs of
unchanged code differ by more than the spread within either: a test over pooled samples finds a difference in nearly all pairs of runs.
A run is therefore one number, the logarithm of its median, and the noise is the spread of such numbers on this machine, which has
the between-run part and the sampling error of a median in it. It is never taken as less than that sampling error.

Neighbouring runs resemble each other (a warm room, a busy afternoon). With lag-one correlation r, n runs say as much as
n (1 - r) / (1 + r) independent ones; the test and the interval are widened by that.

The rank test is written here: SciPy would be a dependency of 35 MB for one distribution, which is a short recurrence.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

USUAL_CORRELATION, USUAL_WEIGHT = 0.2, 30
"""Of neighbouring runs, assumed as if so many runs had shown it."""
Verdict = Literal["not enough data", "unchanged", "faster", "minor", "moderate", "severe"]
SEVERITIES: tuple[Verdict, ...] = ("minor", "moderate", "severe")
_NORMAL = statistics.NormalDist()
MAD = 1.4826
"""Standard deviation over median absolute deviation of a normal distribution; also that over half the interquartile range."""
MEDIAN = 1.2533
"""Standard error of a median over that of a mean."""


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """What counts as a regression.

    Attributes:
      minor, moderate, severe: relative increases from which a significant change has that severity.
      alpha: level of the rank test, one-sided.
      confidence: of the interval of the shift; its lower end must be above zero too.
      baseline: runs before the recent ones that they are compared with, at most.
      recent: runs that are judged; a single one cannot be told from an outlier.
      least_baseline, least_recent: with fewer there is no verdict.
      change_alpha: level of the change point.
    """

    minor: float = 0.02
    moderate: float = 0.05
    severe: float = 0.15
    alpha: float = 0.01
    confidence: float = 0.98
    baseline: int = 30
    recent: int = 5
    least_baseline: int = 8
    least_recent: int = 3
    change_alpha: float = 0.01

    def __post_init__(self) -> None:
        from kpt.errors import ConfigError

        asked = "Thresholds for regressions were given"
        if not self.minor > 0:
            raise ConfigError(asked, f"minor is {_percent(self.minor)}", "Give one above 0%")
        for low, high in itertools.pairwise(SEVERITIES):
            a, b = getattr(self, low), getattr(self, high)
            if not a <= b:
                raise ConfigError(asked, f"{low} {_percent(a)} is above {high} {_percent(b)}", "Let minor <= moderate <= severe")
        for name, most in (("alpha", 0.5), ("confidence", 1.0), ("change_alpha", 1.0)):
            if not 0 < getattr(self, name) < most:
                raise ConfigError(asked, f"{name} is {getattr(self, name):g}", f"Give one between 0 and {most:g}")
        if self.recent < self.least_recent:
            raise ConfigError(f"The last {self.recent} runs were to be judged", f"Fewer than {self.least_recent} are never enough for a "
                              "verdict, so that nothing could fail", f"Judge {self.least_recent} or more")  # fmt: skip
        if not (self.least_recent >= 2 and self.least_baseline >= 2):
            least = f"least_recent is {self.least_recent}, least_baseline {self.least_baseline}"
            raise ConfigError(asked, f"{least}, and one run has no spread", "Give 2 or more")


@dataclasses.dataclass(frozen=True)
class Finding:
    """Attributes:
    verdict: "not enough data", "unchanged", "faster", or a severity.
    effect: relative change: 0.05 is 5% more. None where there is nothing to compare.
    low, high: its confidence interval; None where the noise is unknown.
    p: of the one-sided rank test in the direction of the effect, widened for correlation; None without one.
    noise: relative standard deviation from run to run.
    correlation: of neighbouring runs.
    baseline, recent: runs compared.
    reason: in one sentence.
    """

    verdict: Verdict
    effect: float | None
    low: float | None
    high: float | None
    p: float | None
    noise: float | None
    correlation: float
    baseline: int
    recent: int
    reason: str

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


Runs = Sequence[Sequence[float]]


def judge(before: Runs, after: Runs, thresholds: Thresholds | None = None, machine: Runs = ()) -> Finding:
    """Whether `after` costs more than `before`.

    Args:
      before, after: runs in the order in which they were made, each the samples of one run, positive.
      thresholds: the default ones unless given.
      machine: earlier runs of unchanged code on this machine, whose noise stands in where the two sides are too few to show it. It
        gives an interval then, and still no verdict: one run can be an outlier.
    """
    limits = thresholds or Thresholds()
    x, y = _levels(before), _levels(after)
    if not len(x) or not len(y):
        return Finding("not enough data", None, None, None, None, None, 0.0, len(x), len(y), "There is nothing to compare with.")
    shift = float(np.median(y[:, None] - x[None, :]))  # Hodges and Lehmann's: half of a side may be outliers
    enough = len(x) >= limits.least_baseline and len(y) >= limits.least_recent
    # With no more than a few runs on each side, their spread is no estimate of anything.
    known = len(x) >= limits.least_baseline or len(x) + len(y) >= limits.least_baseline + limits.least_recent
    if known:
        noise, correlation = _noise(x, y, [*before, *after])
    elif len(machine) >= limits.least_baseline:
        noise, correlation = _noise(_levels(machine), np.empty(0), machine)
    else:
        reason = f"{len(x)} and {len(y)} runs; {limits.least_baseline} and {limits.least_recent} are needed."
        return Finding("not enough data", math.expm1(shift), None, None, None, None, 0.0, len(x), len(y), reason)
    inflation = (1 + correlation) / (1 - correlation)
    error = noise * math.sqrt(inflation * (1 / len(x) + 1 / len(y)))
    # A median absolute deviation knows as much as a standard deviation from 0.37 times as many (its asymptotic efficiency).
    degrees = max(3, round(0.37 * (len(x) + len(y) - 2)))
    reach = _t_quantile(0.5 + limits.confidence / 2, degrees) * error
    effect, low, high = math.expm1(shift), math.expm1(shift - reach), math.expm1(shift + reach)
    p = mann_whitney(x, y) if shift >= 0 else mann_whitney(y, x)
    p = 1 - _NORMAL.cdf(_NORMAL.inv_cdf(1 - p) / math.sqrt(inflation)) if 1e-15 < p < 0.5 else p
    found = functools.partial(Finding, effect=effect, low=low, high=high, p=p, noise=noise, correlation=correlation, baseline=len(x),
                              recent=len(y))  # fmt: skip
    least = 1 / math.comb(len(x) + len(y), len(y))
    if not enough or least > limits.alpha:
        needed = f"{limits.least_baseline} and {limits.least_recent} are needed" if not enough else "so few cannot differ significantly"
        return found("not enough data", reason=f"{len(x)} and {len(y)} runs; {needed}.")
    interval = f"{signed(effect)} [{signed(low)}, {signed(high)}], p = {p:.1g}, run-to-run noise {noise:.1%}"
    if p > limits.alpha or (low <= 0 if shift >= 0 else high >= 0):
        return found("unchanged", reason=f"No more than the noise: {interval}.")
    if shift < 0:
        verdict: Verdict = "faster" if -shift >= limits.minor else "unchanged"
        return found(verdict, reason=f"Less, by {'more than the noise' if verdict == 'faster' else 'hardly anything'}: {interval}.")
    size = next((s for s in reversed(SEVERITIES) if effect >= getattr(limits, s)), None)
    if size is None:
        return found("unchanged", reason=f"Below the threshold of {limits.minor:.0%}: {interval}.")
    return found(size, reason=f"More than the noise: {interval}.")


def signed(change: float) -> str:
    """A relative change in percent; what is rounded to nothing has no sign."""
    text = f"{change:+z.1%}"
    return "0.0%" if text == "+0.0%" else text


def _percent(fraction: float) -> str:
    return f"{100 * fraction:g}%"


def _levels(runs: Runs) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Logarithms of the runs' medians."""
    return np.log([statistics.median(r) for r in runs]) if len(runs) else np.empty(0)


def _noise(x: Any, y: Any, runs: Runs) -> tuple[float, float]:
    """Run-to-run standard deviation, robust, and the correlation of neighbours."""
    sides = [s - np.median(s) for s in (x, y) if len(s) >= 3] or [x - np.median(x)]
    left = np.concatenate(sides)
    # A side of n loses about one run to its median.
    spread = MAD * float(np.median(np.abs(left))) * math.sqrt(len(left) / max(1, len(left) - len(sides)))
    within = [MEDIAN * _spread(r) / math.sqrt(len(r)) for r in runs if len(r) >= 4]
    noise = max(spread, statistics.median(within) if within else 0.0)
    clipped = [np.clip(s, -2.5 * noise, 2.5 * noise) for s in sides]
    top, bottom = sum(float(s[1:] @ s[:-1]) for s in clipped), sum(float(s @ s) for s in clipped)
    n = len(left)
    # A correlation about an estimated centre comes out too low by about (1 + 4 r) / n (Kendall 1954), and from a few runs comes out
    # as anything: it is drawn towards what machines show.
    raw = (top / bottom + 1 / n) / (1 - 4 / n) if n > 8 and bottom > 0 else 0.0
    return noise, min(0.7, max(0.0, (n * raw + USUAL_WEIGHT * USUAL_CORRELATION) / (n + USUAL_WEIGHT)))


def _spread(samples: Sequence[float]) -> float:
    """Relative standard deviation of the samples of a run, robust: from the quartiles of their logarithms."""
    low, _, high = statistics.quantiles(samples, n=4)
    return MAD * math.log(high / low) / 2


def mann_whitney(x: Sequence[float] | Any, y: Sequence[float] | Any) -> float:
    """One-sided p-value of Mann and Whitney's test for `y` being larger than `x`.

    Exact for up to 50 on each side without ties (Mann and Whitney 1947: counts of orders by a recurrence), else by the normal
    approximation with corrections for ties and continuity.
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    n, m = len(a), len(b)
    if not n or not m:
        return 1.0
    above = b[:, None] - a[None, :]
    u = float((above > 0).sum() + 0.5 * (above == 0).sum())
    _, counts = np.unique(np.concatenate([a, b]), return_counts=True)
    if counts.max() == 1 and max(n, m) <= 50:
        orders = _orders(n, m)
        return float(orders[: int(n * m - u) + 1].sum() / orders.sum())
    ties = float((counts**3 - counts).sum()) / ((n + m) * (n + m - 1))
    variance = n * m / 12 * (n + m + 1 - ties)
    if variance <= 0:
        return 1.0
    return 1 - _NORMAL.cdf((u - n * m / 2 - 0.5) / math.sqrt(variance))


@functools.cache
def _orders(n: int, m: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """How many orders of n and m have U = 0, 1, ..., n m: the coefficients of the Gaussian binomial.

    The product over i <= m of (1 - q^(n + i)) / (1 - q^i), one factor at a time; every partial product is a polynomial of
    whole numbers, held exactly as Python integers.
    """
    c = np.zeros(n * m + 1, dtype=object)
    c[0] = 1
    for i in range(1, m + 1):
        c[n + i :] = c[n + i :] - c[: max(0, len(c) - n - i)]
        for j in range(i, len(c)):
            c[j] += c[j - i]
    # As fractions of all, so that large counts fit a float.
    total = math.comb(n + m, m)
    return np.array([int(v) / total for v in c])


def judge_recent(runs: Runs, thresholds: Thresholds | None = None) -> tuple[Finding, int | None]:
    """The latest runs of a history against those before, back to the last change of level.

    Returns:
      The finding, and the index in `runs` of the first run of the present level, if the history has a change point.
    """
    limits = thresholds or Thresholds()
    earlier, recent = runs[: -limits.recent], runs[-limits.recent :]
    start = change_point(earlier, limits)
    baseline = earlier[-limits.baseline :]
    if start is not None and len(earlier) - start >= limits.least_baseline:
        baseline = earlier[start:][-limits.baseline :]
    return judge(baseline, recent, limits), start if start is not None else change_point(runs, limits)


def change_point(runs: Runs, thresholds: Thresholds | None = None) -> int | None:
    """Index of the first run of a new level in a longer history, or None.

    Pettitt's test (1979): K is the largest sum of ranks over all splits, with p about 2 exp(-6 K^2 / (n^3 + n^2)), widened for the
    correlation of neighbours on each side of the split.
    """
    limits = thresholds or Thresholds()
    n = len(runs)
    if n < limits.least_baseline + limits.least_recent:
        return None
    levels = _levels(runs)
    signs = np.sign(levels[None, :] - levels[:, None])
    k = np.array([signs[:t, t:].sum() for t in range(1, n)])
    # K itself decides whether there is one. Where, its standard score tells: K is small near the ends for want of pairs.
    lengths = np.arange(1, n)
    strongest = float(np.abs(k).max())
    split = int((np.abs(k) / np.sqrt(lengths * (n - lengths))).argmax()) + 1
    _, correlation = _noise(levels[:split], levels[split:], runs)
    inflation = (1 + correlation) / (1 - correlation)
    p = 2 * math.exp(-6 * strongest**2 / (n**3 + n**2) / inflation)
    shift = abs(float(np.median(levels[split:]) - np.median(levels[:split])))
    return split if p < limits.change_alpha and shift >= limits.minor else None


def _t_quantile(p: float, degrees: int) -> float:
    """Quantile of Student's t, by Cornish and Fisher's expansion (Abramowitz and Stegun 26.7.5): to 1% from 4 degrees on."""
    z, v = _NORMAL.inv_cdf(p), degrees
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / v + g2 / v**2 + g3 / v**3
