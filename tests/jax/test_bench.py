"""`kpt bench` on whatever is here: what is checked, what is timed, what is said."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ET

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

from kpt import ops
from kpt.cli import app
from kpt.errors import KptError
from kpt_jax import bench
from kpt_jax.bench_ops import BENCHES

TOP = bench.Ceilings(copy=1e10, matmul=1e11)


@pytest.fixture(scope="module", autouse=True)
def small_ceilings():
    before = bench.ceilings
    bench.ceilings = lambda seconds: TOP  # half a minute of memory traffic otherwise
    yield
    bench.ceilings = before


def measured(name, shape, backward=False):
    return bench.measure(name, shape, "float32", backward, TOP, peers=False, seconds=0)


def test_every_contender_is_a_row_with_figures_or_a_reason():
    rows = {r.contender: r for r in measured("rms_norm", (32, 1024), backward=True)}
    assert {"plain", *(f"rms_norm.{k}" for k in ("xla", "pallas_gpu", "pallas_gpu_wide", "pallas_tpu", "jax_triton", "jax_triton_turing"))} == set(rows)
    assert rows["rms_norm.pallas_gpu"].problem.startswith("refused: runs on cuda")
    assert rows["rms_norm.pallas_tpu"].problem.startswith("refused: runs on tpu")
    for r in (rows["plain"], rows["rms_norm.xla"]):
        assert r.problem is None and 0 < r.low <= r.time <= r.high and r.error < 1e-6
        assert r.unit == "B/s" and r.rate == pytest.approx((5 * 32 * 1024 + 1024) * 4 / r.time, rel=0.02)
        assert r.of_ceiling == pytest.approx(r.rate / TOP.copy)


def test_what_binds_a_product_is_arithmetic():
    (row,) = [r for r in measured("matmul", (256, 512, 256)) if r.contender == "plain"]
    assert row.unit == "FLOP/s" and row.rate == pytest.approx(2 * 256 * 512 * 256 / row.time)


@pytest.mark.parametrize(
    ("peer", "said"),
    [
        (lambda m: lambda x, weight: m.zeros_like(x), "against float64"),
        (lambda m: lambda x, weight: m.no_such_function(x), "AttributeError"),
    ],
)
def test_a_peer_that_is_wrong_or_fails_is_not_timed(monkeypatch, peer, said):
    changed = dataclasses.replace(BENCHES["rms_norm"], peers={"other": ("jax.numpy", peer)})
    monkeypatch.setitem(bench.BENCHES, "rms_norm", changed)
    rows = bench.measure("rms_norm", (32, 1024), "float32", False, TOP, peers=True, seconds=0)
    (other,) = [r for r in rows if r.contender == "other"]
    assert said in other.problem and other.time != other.time


def test_a_peer_that_is_not_installed_is_left_out(monkeypatch):
    peers = {"other": ("no_such_package", lambda m: m)}
    assert dataclasses.replace(BENCHES["rms_norm"], peers=peers).installed_peers() == {}


@pytest.mark.parametrize("name", BENCHES)
def test_plain_code_computes_the_op(name):
    b = BENCHES[name]
    shape = {"attention": (1, 64, 4, 2, 16), "rope": (1, 32, 2, 16), "ragged_matmul": (64, 32, 48, 4)}.get(b.op, (32, 128, 64)[: len(b.dims.split())])
    assert bench.certified(b, b.plain, *[b.specs("float32", *shape)] * 2)[1] is None
    assert len(shape) == len(b.shapes[0]) == len(b.cpu_shapes[0]) == len(b.dims.split())


def test_bytes_are_counted_once_a_pass():
    specs = BENCHES["layer_norm_residual"].specs("bfloat16", 1000, 4096)
    array = 1000 * 4096 * 2
    assert BENCHES["layer_norm_residual"].cost(specs, True)[1] == pytest.approx(8 * array, rel=1e-2)
    specs = BENCHES["cross_entropy"].specs("bfloat16", 100, 32000)
    assert BENCHES["cross_entropy"].cost(specs, True)[1] == pytest.approx(3 * 100 * 32000 * 2, rel=1e-2)


def test_inputs_rotate_past_the_cache():
    specs = BENCHES["rms_norm"].specs("float32", 64, 1024)
    sets = bench.inputs(BENCHES["rms_norm"], specs)
    assert len(sets) == bench.SETS
    assert not jnp.array_equal(sets[0][0]["x"], sets[1][0]["x"])
    assert {n: a.shape for n, a in sets[0][0].items()} == {n: s.shape for n, s in specs.items()}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["softmax"], "Known are"), (["rms_norm", "--shapes", "64"], "ROWSxWIDTH"), (["rms_norm", "--shapes", "axb"], "numbers"),
     (["glu", "--shapes", "0x128x512"], "Arrays without elements"), (["attention", "--shapes", "1x0x2x2x8"], "Arrays without elements"),
     (["glu", "--shapes", "64x32x64", "--dtype", "float64"], "JAX_ENABLE_X64=1"), (["glu", "--plot", "chart.gif"], "SVG, PNG or PDF")],
)
def test_a_request_that_is_not_understood(arguments, said):
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2 and said in result.output


def test_json_chart_and_table(tmp_path):
    out, chart = tmp_path / "out.json", tmp_path / "out.svg"
    call = ["bench", "rms_norm", "--shapes", "32x1024", "--seconds", "0", "--out", str(out), "--plot", str(chart), "--json"]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed == json.loads(out.read_text())
    assert printed["kind"] == "kpt.bench" and printed["device"] == jax.devices()[0].device_kind
    assert {r["passes"] for r in printed["rows"]} == {bench.FORWARD, bench.BOTH}
    assert "rms_norm 32x1024 float32 forward" in result.stderr and "ms [" in result.stderr
    assert ET.parse(chart).getroot().tag.endswith("svg")


def test_the_machine_that_is_there_is_measured_and_named_whatever_plans_are_for(monkeypatch):
    recorded = []
    monkeypatch.setenv("KPT_HARDWARE", "h100")
    monkeypatch.setattr(bench, "record_bench", lambda rows, hardware, *_: recorded.append((hardware, list(rows))))
    with pytest.warns(UserWarning, match="this machine, cpu"):
        bench.run(["rms_norm"], [(8, 128)], seconds=0)
    ((hardware, rows),) = recorded
    assert hardware == "cpu" and "rms_norm.xla" in {r.contender for r in rows if r.problem is None}


def test_where_no_contender_is_left_the_rows_say_why(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "certified", lambda *_: (0.0, "wrong"))
    rows = bench.run(["rms_norm"], [(8, 128)], seconds=0)["rows"]
    assert {r["contender"]: r["problem"] for r in rows}[bench.PLAIN] == "wrong"
    with pytest.raises(KptError, match="No contender could be measured"):
        bench.plot({"rows": rows}, tmp_path / "chart.svg")


def test_a_chart_is_what_its_name_says(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"bench": "glu", "shape": (8, 8, 8), "passes": bench.FORWARD, "contender": bench.PLAIN, "of_ceiling": 0.5}
    bench.plot({"rows": [row]}, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_every_op_is_measured():
    assert {b.op for b in BENCHES.values()} == set(ops.OPS)
    with pytest.raises(KptError, match="Known are"):
        bench.run(["no such op"])
    with pytest.raises(KptError, match="Did you mean 'cross_entropy'"):
        bench.run(["crossentropy"])
