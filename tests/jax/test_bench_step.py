"""`python -m kpt_jax.bench_step`, small."""

from __future__ import annotations

import json

import pytest

from kpt_jax import bench_step


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setenv("KPT_CACHE_DIR", str(tmp_path))
    for name, value in {"WIDTH": 64, "HEADS": 2, "HIDDEN": 96, "VOCABULARY": 128, "BATCH": 1, "CONTEXT": 32, "ROUNDS": 2}.items():
        monkeypatch.setattr(bench_step, name, value)


@pytest.mark.slow
def test_each_contender_is_a_row_as_soon_as_it_is_there():
    said = []
    found = [json.loads(json.dumps(f)) for f in bench_step.measure(1, budget="0", say=said.append)]
    names = [list(f["rows"]) for f in found]
    assert names[0] == ["through kpt"] and names[1] == ["through kpt", "auto_optimize"] and names[-1] == names[-2]
    rows = found[-1]["rows"]
    assert "error" in rows["cuDNN by hand"], "there is none on a CPU, and what comes after it runs"
    done = {n: r for n, r in rows.items() if "error" not in r}
    assert {"through kpt", "auto_optimize", "as written"} <= set(done)
    first, *others = (r["losses"] for r in done.values())
    assert all(o == pytest.approx(first, rel=1e-3) for o in others), "from the same state; auto_optimize has not consumed or changed it"
    assert first[0] > first[-1] and all(len(r["seconds"]) == len(r["alone"]) == 3 for r in done.values())
    assert rows["auto_optimize"]["kept"] in (True, False) and rows["auto_optimize"]["tuning_seconds"] > 0
    assert sum(rows["through kpt"]["kernels"].values()) > 0 and any("auto_optimize" in s for s in said)


def test_only_one_of_them():
    *_, found = bench_step.measure(1, only="written", say=lambda _: None)
    assert list(found["rows"]) == ["as written"] and "seconds" not in found["rows"]["as written"]
