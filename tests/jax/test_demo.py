"""The demo: its data, its verdict, and one small run from end to end."""

import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from kpt.errors import KptError
from kpt.strategy import Plan
from kpt_jax import demo_model, demo_report
from kpt_jax.demo import TOLERANCE, Demo, Variant, batches, prepare, standard_library_source, train
from kpt_jax.demo_model import Config

SMALL = Config(context=64, width=16, heads=2, hidden=32, layers=2)


def test_the_model_knows_nothing_of_kpt():
    source = Path(demo_model.__file__).read_text(encoding="utf-8")
    assert not re.search(r"\bkpt\b", source.partition('"""')[2].partition('"""')[2])


def test_the_text_is_the_same_every_time_and_is_python():
    text = standard_library_source(1 << 19)
    assert text == standard_library_source(1 << 19) and len(text) == 1 << 19
    assert text.count(b"\ndef ") > 50


def test_a_python_without_sources_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(KptError, match="standard library as files"):
        standard_library_source(1 << 19)


def test_batches_are_windows_of_the_text_and_the_same_every_time():
    text = bytes(range(256)) * 4
    first, again = list(batches(text, 32, 5)), list(batches(text, 32, 5))
    assert len(first) == 5 and all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    for tokens in first:
        assert tokens.shape == (1, 33) and tokens.dtype == np.int32
        assert np.all(np.diff(tokens) % 256 == 1)


# (losses as written, losses through kpt, whether they coincide)
CURVES = [
    ([3.0, 2.0], [3.0, 2.0], True),
    ([3.0, 2.0], [3.0 + TOLERANCE / 2, 2.0], True),
    ([3.0, 2.0], [3.0, 2.0 + 2 * TOLERANCE], False),
    ([3.0, 2.0], [3.0 - 2 * TOLERANCE, 2.0], False),
    ([3.0, 2.0], [3.0, math.nan], False),
    ([math.nan, math.nan], [math.nan, math.nan], False),
]


@pytest.mark.parametrize(("before", "after", "coincide"), CURVES)
def test_curves_coincide_within_the_tolerance_at_every_step(before, after, coincide):
    def variant(losses):
        return Variant("", lambda: None, (None, None), 100, 1.0, losses, [0.2] * len(losses))

    made = Demo(SMALL, 1, 2, Plan("loss", "balanced", "cpu", "jax"), 0.0, variant(before), variant(after), b"")
    assert made.coincide is coincide
    assert ("do not coincide" in demo_report.verdict(made)) is not coincide


@pytest.mark.parametrize(
    ("seconds", "word"), [((0.2, 0.1), "2.00× faster"), ((0.1, 0.2), "2.00× slower"), ((0.1, 0.1), "1.00× faster")]
)
def test_a_slower_step_is_called_slower(seconds, word):
    before, after = (Variant("", lambda: None, (None, None), 100, 1.0, [3.0], [s]) for s in seconds)
    made = Demo(SMALL, 1, 1, Plan("loss", "balanced", "cpu", "jax"), 0.0, before, after, b"")
    (row,) = (r for r in demo_report.summary(made) if r[0] == "step time, median")
    assert row[3] == word


def test_a_small_run_shows_the_plan_the_numbers_and_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_report, "prepare", lambda steps, announce: prepare(steps, SMALL, announce))
    printed = io.StringIO()
    figures = demo_report.run(25, tmp_path / "demo.html", Console(file=printed, width=120))
    told = printed.getvalue()

    assert figures["coincide"] and figures["max_loss_difference"] <= TOLERANCE
    assert figures["as_written"]["loss"][-1] < figures["as_written"]["loss"][0] - 0.5
    assert len(figures["through_kpt"]["step_seconds"]) == figures["steps"] == 25
    assert {s["op"] for s in figures["plan"]["sites"]} >= {"attention"}
    assert all(s["reason"] for s in figures["plan"]["sites"] + figures["plan"]["skipped"])
    for words in ("Hardware", "With a kernel", "Certificates", "temporary memory", "step time", "coincide"):
        assert words in told
    assert "attention" in (tmp_path / "demo.html").read_text(encoding="utf-8")
    json.dumps(figures, allow_nan=False)


def test_both_trainings_see_the_same_batches_and_the_plan_is_used():
    demo = prepare(4, SMALL)
    assert list(train(demo)) == [1, 2, 3, 4]
    assert demo.plan.sites
    assert demo.before.losses[0] == pytest.approx(demo.after.losses[0], abs=TOLERANCE)
    assert demo.after.temporary_bytes != demo.before.temporary_bytes


@pytest.mark.slow
def test_the_demo_at_full_size_needs_a_third_of_the_memory():
    demo = prepare(3)
    assert list(train(demo)) == [1, 2, 3]
    assert demo.coincide
    assert demo.memory_ratio >= 3
