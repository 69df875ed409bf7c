"""Run history: the statistics against exact counts and simulations, what is recorded, and what the history says."""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kpt
from kpt.auto import Report
from kpt.errors import ConfigError, StoreError
from kpt.ops.base import Spec
from kpt.ops.mask import Causal, Mask
from kpt.strategy import Plan, Site
from kpt.tracking import History, Run, Thresholds, change_point, compare, fingerprint, judge, mann_whitney, record, regressions
from kpt.tracking.hooks import record_bench, record_report
from kpt.tracking.run import commit
from kpt.tracking.simulate import NOISES, Noise, histories, rate
from kpt.tracking.statistics import _t_quantile, signed

ROOT = Path(kpt.__path__[0]).parent


# Statistics


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 2), (2, 5), (4, 4)])
def test_the_rank_test_counts_the_orders(n, m):
    """P(U >= u) over all orders of n + m, each as likely as any other."""

    def u(chosen):
        return sum(a < b for b in chosen for a in range(n + m) if a not in chosen)

    orders = [u(chosen) for chosen in itertools.combinations(range(n + m), m)]
    for chosen in itertools.combinations(range(n + m), m):
        x = [a for a in range(n + m) if a not in chosen]
        assert mann_whitney(x, chosen) == pytest.approx(sum(o >= u(chosen) for o in orders) / len(orders))


@pytest.mark.parametrize(("n", "m", "ties"), [(20, 5, False), (20, 20, False), (50, 50, False), (80, 30, False), (30, 30, True)])
def test_the_rank_test_agrees_with_scipy(n, m, ties):
    scipy = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=n), rng.normal(0.4, size=m)
    if ties:
        x, y = x.round(), y.round()
    method = "exact" if max(n, m) <= 50 and not ties else "asymptotic"
    assert mann_whitney(x, y) == pytest.approx(scipy.mannwhitneyu(y, x, alternative="greater", method=method).pvalue, rel=1e-9)


def test_the_rank_test_of_nothing_or_of_equals_finds_nothing():
    assert mann_whitney([], [1.0]) == mann_whitney([1.0], []) == mann_whitney([2.0] * 9, [2.0] * 9) == 1.0


# Student's t at 97.5% and 99.5% (tables).
@pytest.mark.parametrize(("p", "degrees", "value"), [(0.975, 5, 2.571), (0.975, 20, 2.086), (0.995, 5, 4.032), (0.995, 30, 2.750)])
def test_the_quantile_of_t(p, degrees, value):
    assert _t_quantile(p, degrees) == pytest.approx(value, rel=0.01)


def runs(count, slower=0.0, last=0, noise=NOISES["typical"], seed=0, samples=20):
    return histories(noise, 1, count, slower, last, np.random.default_rng(seed), samples)[0].tolist()


@pytest.mark.parametrize(
    ("slower", "verdict"),
    [(0.0, "unchanged"), (0.01, "unchanged"), (0.035, "minor"), (0.09, "moderate"), (0.3, "severe"), (-0.1, "faster")],
)
def test_the_verdict_goes_by_the_size_of_a_significant_change(slower, verdict):
    made = runs(40, slower, 20, Noise(between=0.004))
    found = judge(made[:20], made[20:])
    assert found.verdict == verdict, found.reason
    assert found.low < slower < found.high and found.low < found.effect < found.high
    assert 0.003 < found.noise < 0.02 and (found.baseline, found.recent) == (20, 20)


def test_thresholds_are_configurable():
    made = runs(40, 0.09, 20, NOISES["quiet"])
    assert judge(made[:20], made[20:], Thresholds(minor=0.01, moderate=0.02, severe=0.05)).verdict == "severe"
    assert judge(made[:20], made[20:], Thresholds(minor=0.2, moderate=0.3, severe=0.5)).verdict == "unchanged"


@pytest.mark.parametrize("bad", [{"minor": 0.2}, {"minor": 0}, {"alpha": 0.6}, {"confidence": 1.0}, {"least_recent": 1}])
def test_thresholds_that_make_no_sense_are_refused(bad):
    with pytest.raises(ConfigError):
        Thresholds(**bad)


@pytest.mark.parametrize(("before", "after", "interval"), [(1, 1, False), (7, 3, False), (20, 1, True), (20, 2, True), (7, 20, True)])
def test_few_runs_are_not_enough_data_however_large_the_change(before, after, interval):
    made = runs(before + after, 1.0, after)
    found = judge(made[:before], made[before:])
    assert found.verdict == "not enough data" and "needed" in found.reason
    assert (found.low is not None) == interval


def test_nothing_to_compare_with_is_not_enough_data():
    found = judge([], runs(3))
    assert (found.verdict, found.effect, found.recent) == ("not enough data", None, 3)


def test_two_single_runs_get_an_interval_from_the_machines_noise_and_no_verdict():
    found = judge(*([r] for r in runs(2, 0.05, 1, Noise(between=0.01, outlier_runs=0))), machine=runs(30, seed=1))
    assert found.verdict == "not enough data"
    assert found.low < 0.05 < found.high and found.high - found.low > 0.03


def test_samples_of_one_run_do_not_stand_for_runs():
    """Between two runs that differ by this machine's noise, thousands of samples prove nothing."""
    made = runs(2, samples=5000, noise=Noise(between=0.03, outlier_runs=0, outliers=0), seed=3)
    assert abs(np.median(made[1]) / np.median(made[0]) - 1) > 0.02  # by chance
    assert mann_whitney(made[0], made[1]) < 1e-9 or mann_whitney(made[1], made[0]) < 1e-9
    assert judge(made[:1], made[1:]).verdict == "not enough data"


def test_the_spread_within_runs_bounds_the_noise_from_below():
    """Medians that agree by chance, of runs that scatter by far more than that."""
    wide = [[1.0, 1.2, 0.8, 1.1, 0.9, 1.3, 0.7]] * 10
    found = judge(wide, [[s * 1.05 for s in r] for r in wide])
    assert found.noise > 0.08 and found.verdict == "unchanged"


def test_a_memory_that_does_not_vary_and_rises_is_found():
    found = judge([(100.0,)] * 20, [(107.0,)] * 5)
    assert found.verdict == "moderate" and "+7.0% [+7.0%, +7.0%]" in found.reason
    assert judge([(100.0,)] * 20, [(100.0,)] * 5).verdict == "unchanged"


@pytest.mark.parametrize("place", [12, 30, 48])
def test_a_change_of_level_is_found_where_it_is(place):
    assert abs(change_point(runs(60, 0.05, 60 - place)) - place) <= 3
    assert change_point(runs(8)) is None


def test_unchanged_histories_have_a_change_point_in_one_of_a_hundred_at_most():
    made = histories(NOISES["typical"], 300, 60, 0.0, 0, np.random.default_rng(0))
    assert sum(change_point(h.tolist()) is not None for h in made) <= 3


# 1,000 histories each, fixed seed; the whole table is in docs/benchmarks/regression-simulation.json.
@pytest.mark.parametrize("design", ["20 runs a side", "kpt regress: last 5 of 60 runs"])
def test_false_alarms_are_at_most_1_percent_and_5_percent_slower_is_found_in_95(design):
    assert rate(design, NOISES["typical"], 0.0) <= 0.01
    assert rate(design, NOISES["typical"], 0.05, count=300) >= 0.95


def test_the_simulations_page_is_what_the_simulation_gives():
    told = json.loads((ROOT / "docs/benchmarks/regression-simulation.json").read_text())
    assert told["thresholds"] == dataclasses.asdict(Thresholds())
    assert told["noises"] == {n: dataclasses.asdict(v) for n, v in NOISES.items()}
    row = next(r for r in told["rows"] if r["design"] == "20 runs a side" and r["noise"] == "noisy" and r["slower"] == 0.05)
    assert rate(row["design"], NOISES["noisy"], 0.05, told["histories"], told["seed"]) == row["found"]


def test_simulated_noise_is_what_it_says():
    noise = Noise(between=0.02, between_correlation=0.5, outlier_runs=0, within=0.05, outliers=0)
    made = np.log(histories(noise, 400, 50, 0.0, 0, np.random.default_rng(0), samples=200))
    level = made.mean(axis=-1)
    assert level.std() == pytest.approx(0.0206, rel=0.05)  # with what 200 samples of 0.05 leave
    centred = level - level.mean()
    assert (centred[:, 1:] * centred[:, :-1]).mean() / (centred**2).mean() == pytest.approx(0.5, abs=0.05)
    assert (made - level[..., None]).std() == pytest.approx(0.05, rel=0.05)


# Runs and their history


def site(**changes):
    fields = {"op": "attention", "kernel": "attention.xla", "version": 2, "path": "layers.0", "source": "m.py:4", "reason": "Faster.",
              "params": {"mask": Mask((Causal(),)), "scale": 0.125}, "specs": {"q": Spec((1, 8, 2, 4), "float32")}, "fingerprint": "ab12"}  # fmt: skip
    return Site(**fields | changes)


def plan(*sites, **changes):
    made = Plan("loss", "balanced", "cpu", "jax", {"jax": "0.11.2"}, tuple(s for s in sites if s.version), tuple(s for s in sites if not s.version))
    return dataclasses.replace(made, **changes)


ORIGINAL = {"kernel": "original", "version": None}


@pytest.mark.parametrize(
    "same",
    [plan(site(version=3)), plan(site(**ORIGINAL)), plan(site(source="m.py:90", reason="Other.", error=1.0)),
     plan(site(), hardware="tpu-v5e", level="aggressive", versions={}, notes=("a",))],
)  # fmt: skip
def test_a_fingerprint_is_of_the_model_whatever_runs_it(same):
    assert fingerprint(same) == fingerprint(plan(site()))


@pytest.mark.parametrize(
    "other",
    [plan(), plan(site(), site(path="layers.1")), plan(site(fingerprint="cd")), plan(site(specs={"q": Spec((2, 8, 2, 4), "float32")})),
     plan(site(specs={"q": Spec((1, 8, 2, 4), "bfloat16")})), plan(site(params={})), plan(site(), function="other"), plan(site(), framework="torch")],
)  # fmt: skip
def test_another_model_has_another_fingerprint(other):
    assert fingerprint(other) != fingerprint(plan(site()))


def test_further_parameters_count_in_any_order():
    a, b = ("w", Spec((4,), "float32")), ("b", Spec((2,), "float32"))
    assert fingerprint(plan(), dict([a, b])) == fingerprint(plan(), dict([b, a])) != fingerprint(plan())


def test_a_fingerprint_is_the_same_in_every_process():
    code = f"from tests.core.test_tracking import *; print(fingerprint(plan(site(), site(path='x', **ORIGINAL)), {{'w': {Spec((4,), 'float32')!r}}}))"
    env = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env, cwd=ROOT).stdout.strip()
    assert found == fingerprint(plan(site(), site(path="x", **ORIGINAL)), {"w": Spec((4,), "float32")})


def run(name="loss", seconds=(1e-3, 2e-3, 3e-3), **fields):
    return Run(name, tuple(seconds), **{"machine": "here", "commit": "0123456789ab"} | fields)


@pytest.fixture
def kept(tmp_path):
    return History(tmp_path)


def test_what_is_recorded_comes_back_in_order(kept):
    made = [run(memory=5, error=1e-6, label="a"), run("other", versions={"jax": "1"}, commit=None), run(throughput=3.0, unit="FLOP/s")]
    record(*made[:2], history=kept)
    record(made[2], history=kept)
    assert History(kept.store.path.parent).runs() == made
    assert (made[0].median, made[0].series) == (2e-3, ("loss", "", "forward", "", "here"))


def test_a_run_is_added_once(kept):
    first, second = run(), run("other")
    kept.put(first)
    kept.put(first, second)
    assert kept.runs() == [first, second]


def test_runs_are_found_by_part_of_the_name_label_date_and_number(kept):
    made = [run("step attention", label="v1", recorded="2026-01-01T00:00:00+00:00"), run("step 100%"), run("attention", label="v1")]
    kept.put(*made)
    assert kept.runs(name="attention") == [made[0], made[2]]
    assert kept.runs(name="%") == [made[1]]
    assert kept.runs(label="v1", since="2026-02-01") == [made[2]]
    assert kept.runs(last=2) == made[1:]


def test_runs_are_selected_by_label_id_or_commit(kept):
    made = [run(label="v1"), run(label="v1", commit="fedcba987654+"), run()]
    kept.put(*made)
    assert kept.select("v1") == made[:2]
    assert kept.select("fedc") == made[1:2]
    assert kept.select(made[2].id[:6])[-1] == made[2]
    for nothing in ("v", "012", "zzzz"):
        with pytest.raises(StoreError, match="kpt history"):
            kept.select(nothing)


def test_a_later_versions_fields_are_left_out():
    assert Run.from_json(run(id="a", recorded="x").to_json() | {"energy": 3}) == run(id="a", recorded="x")


@pytest.mark.parametrize("samples", [(), (0.0,), (1.0, -1.0), (math.inf,), (math.nan,)])
def test_samples_that_cannot_be_are_refused(samples):
    with pytest.raises(StoreError):
        run(seconds=samples)


def test_the_commit_is_that_of_the_current_directory_marked_when_files_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() is None
    (tmp_path / "f").write_text("1")
    for command in ("init -q", "add f", "-c user.name=a -c user.email=a@b commit -q -m a"):
        subprocess.run(["git", *command.split()], check=True)
    clean = commit()
    assert len(clean) == 12
    (tmp_path / "f").write_text("2")
    assert commit() == clean + "+"


def series(count, slower=0.0, last=0, name="loss", seed=0, **fields):
    return [run(name, r, **fields) for r in runs(count, slower, last, seed=seed)]


def test_regressions_are_judged_for_each_series_apart():
    made = series(30, 0.1, 5, "slow") + series(30, name="same", seed=1) + series(6, 0.5, 3, "new", seed=2) + series(30, name="slow", machine="there", seed=3)
    found = {(c.name, c.after[0].machine): c.time.verdict for c in regressions(made)}
    assert found == {("slow", "here"): "moderate", ("same", "here"): "unchanged", ("new", "here"): "not enough data", ("slow", "there"): "unchanged"}


def test_a_change_that_was_accepted_is_the_new_baseline_and_is_told():
    made = series(60, 0.2, 30)
    (found,) = regressions(made)
    assert found.time.verdict == "unchanged"
    assert abs(made.index(found.changed) - 30) <= 2
    assert all(r in made[28:] for r in found.before[-20:]) and found.time.baseline <= 27


def test_more_memory_is_a_regression_too():
    made = [dataclasses.replace(r, memory=100 if i < 20 else 120) for i, r in enumerate(series(25))]
    (found,) = regressions(made)
    assert (found.time.verdict, found.memory.verdict, found.worst.verdict) == ("unchanged", "severe", "severe")
    (unknown,) = regressions([dataclasses.replace(made[0], memory=None), *made[1:]])
    assert unknown.memory is None


def test_a_model_that_changed_starts_a_history_and_the_report_says_so():
    found = regressions(series(30, fingerprint="a") + series(4, 0.5, 4, fingerprint="b"))
    assert [c.time.verdict for c in found] == ["unchanged", "not enough data"]
    assert all("2 model fingerprints" in c.note for c in found)


def test_comparisons_are_of_the_series_that_both_have():
    a, b = series(20) + series(20, name="gone"), series(10, 0.1, 10, seed=1) + series(3, name="new")
    (found,) = compare(a, b)
    assert (found.name, found.time.verdict) == ("loss", "moderate")
    (single,) = compare(a[:1], b[:1], history=a)
    assert single.time.verdict == "not enough data" and single.time.low is not None
    assert json.loads(json.dumps(single.to_json()))["before"] == [a[0].id]


@pytest.mark.parametrize(("change", "said"), [(-3e-4, "0.0%"), (3e-4, "0.0%"), (0.0, "0.0%"), (-6e-4, "-0.1%"), (0.123, "+12.3%")])
def test_what_is_rounded_to_nothing_has_no_sign(change, said):
    assert signed(change) == said


def test_what_is_measured_as_called_goes_on_with_the_series_that_was_called_forward():
    assert Run("step", (1.0,), measured="as called").series == Run("step", (1.0,), measured="forward").series
    assert Run("step", (1.0,), measured="forward and backward").series != Run("step", (1.0,)).series


# What records


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("KPT_RECORD", "on")
    return tmp_path


def report(kept):
    return Report("loss", "cpu", "cpu0", "forward", (2.0, 3.0), (1.0, 1.5), 200, 100, 1e-7, kept, 0.01, plan(site()))


@pytest.mark.parametrize(("won", "seconds", "memory"), [(True, (1.0, 1.5), 100), (False, (2.0, 3.0), 200)])
def test_auto_optimize_records_what_is_in_force(cache, won, seconds, memory):
    record_report(report(won))
    (found,) = History().runs()
    assert (found.name, found.seconds, found.memory, found.error) == ("loss", seconds, memory, 1e-7)
    assert (found.plan, found.fingerprint) == (plan(site()).hash, fingerprint(plan(site())))
    assert found.versions["jax"] == "0.11.2" and found.versions["kpt"] == kpt.__version__


@dataclasses.dataclass
class Row:
    """As `kpt_jax.bench.Row`, which needs jax."""

    contender: str
    problem: str | None = None
    bench: str = "rms_norm"
    shape: tuple = (8, 16)
    dtype: str = "float32"
    passes: str = "forward+backward"
    rate: float = 1e9
    unit: str = "B/s"
    memory: int | None = 7
    error: float | None = 1e-7
    seconds: tuple = (1.0, 2.0)


def test_bench_records_the_contenders_that_were_measured(cache):
    record_bench([Row("plain"), Row("rms_norm.xla"), Row("other", problem="refused")], "cpu", "cpu0", {"jax": "1"})
    assert [r.name for r in History().runs()] == ["rms_norm 8x16 float32: plain", "rms_norm 8x16 float32: rms_norm.xla"]
    assert {(r.measured, r.throughput, r.unit) for r in History().runs()} == {("forward and backward", 1e9, "B/s")}


def test_recording_can_be_turned_off(cache, monkeypatch):
    monkeypatch.setenv("KPT_RECORD", "off")
    record_report(report(True))
    assert list(cache.iterdir()) == []


def test_a_record_that_fails_is_a_warning(cache, monkeypatch):
    monkeypatch.setattr("kpt.tracking.hooks.record", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="not recorded"):
        record_report(report(True))
