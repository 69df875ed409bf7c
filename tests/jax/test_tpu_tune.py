"""Block sizes searched for: by any cost, by a clock, and what a machine without the compiler is told. Schedules: test_tpu_compile.py."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import jax
import pytest
from typer.testing import CliRunner

from kpt import cli, console
from kpt.commands.tpu import _generations
from kpt.errors import HardwareError, KptError
from kpt.hardware import hardware_profile
from kpt.install import install
from kpt.tpu import GENERATIONS, generation
from kpt_jax.bench_ops import BENCHES
from kpt_jax.bench_tpu_tables import written
from kpt_jax.tpu_programs import XLA, blocks_class, default_blocks, make, program
from kpt_jax.tpu_tune import Tuned, by_clock, clipped, extents, neighbours, row, search, tune, write
from pallas_kernels import tensorcore, tuned
from tests.jax.certified import specs_of
from tests.jax.tpu import lowers

ROOT = Path(__file__).parents[2]


def distance(best, rule=6):
    """A cost whose only minimum is at `best`, in doublings; sizes above 512 are refused; `rule` is that of the kernel's own choice."""

    def evaluate(candidates):
        return [
            rule if c is None else None if max(c.values()) > 512 else 1 + sum(abs(c[n].bit_length() - size.bit_length()) for n, size in best.items())
            for c in candidates
        ]

    return evaluate


def test_a_search_walks_to_the_best_blocks_and_counts_what_was_refused():
    best, cost, first, tried, failed, finished = search({"rows": 512, "columns": 64}, distance({"rows": 128, "columns": 512}))
    assert best == {"rows": 128, "columns": 512} and (cost, first) == (1, 6)
    assert finished and 0 < failed < tried


def test_a_search_starts_within_the_arrays():
    """Blocks that are longer than the array are all the same: nothing is tried there."""
    tried = []

    def evaluate(candidates):
        tried.extend(c for c in candidates if c is not None)
        return distance({"rows": 128, "columns": 512})(candidates)

    best, cost, *_ = search({"rows": 4096, "columns": 2048}, evaluate, extents={"rows": 300, "columns": 512})
    assert best == {"rows": 128, "columns": 512} and cost == 1
    assert max(c["rows"] for c in tried) == 512 and max(c["columns"] for c in tried) == 512
    assert len(tried) == len({tuple(c.values()) for c in tried})


def test_a_search_walks_through_what_costs_the_same():
    """A plain from 512 down to 64, and better blocks behind it; and one without an end."""

    def evaluate(candidates):
        return [5 if c is None or c["rows"] > 32 else 1 for c in candidates]

    best, cost, *_, finished = search({"rows": 512}, evaluate, extents={"rows": 4096})
    assert (best, cost, finished) == ({"rows": 32}, 1, True)
    best, cost, first, tried, _, finished = search({"rows": 512}, lambda cs: [5] * len(cs), extents={"rows": 4096})
    assert (best, cost, first, finished) == ({"rows": 512}, 5, 5, True) and tried <= 10


@pytest.mark.parametrize("bench", BENCHES)
def test_every_block_has_an_extent(bench):
    blocks = default_blocks(bench, BENCHES[bench].shapes[0], "bfloat16", generation("v5e"))
    assert extents(bench, BENCHES[bench].shapes[0]).keys() == blocks.keys()


@pytest.mark.parametrize("size, extent, start", [(2048, 1024, 1024), (2048, 1025, 2048), (768, 512, 768), (512, 8, 128), (512, 4096, 512)])
def test_blocks_are_clipped_to_what_covers_an_axis(size, extent, start):
    assert clipped({"m": size}, {"m": extent}) == {"m": start}


@pytest.mark.parametrize("bench, dims", [*((n, b.shapes[0]) for n, b in BENCHES.items()), ("ragged_matmul", (65536, 2048, 1408, 64)),
                                         ("attention", (1, 1408, 16, 16, 128))])  # fmt: skip
def test_every_candidate_is_one_that_the_kernel_may_take(bench, dims):
    """Half of 1408 is 704, no multiple of 128."""
    kind = blocks_class(BENCHES[bench].op)
    start = clipped(default_blocks(bench, dims, "bfloat16", generation("v5e")), extents(bench, dims), kind.MULTIPLE)
    new = neighbours(start, extents(bench, dims), kind.MULTIPLE)
    assert new and start not in new
    for sizes in new:
        kind(**sizes)


def test_a_size_that_halves_to_no_multiple():
    assert neighbours({"n": 704, "k": 128}, {}, 128) == [{"n": 1408, "k": 128}, {"n": 704, "k": 256}, {"n": 384, "k": 128}]
    assert clipped({"n": 704}, {"n": 300}, 128) == {"n": 384}


def glu(x="bfloat16", w="bfloat16"):
    return specs_of(w, x=((8192, 4096), x), w_gate=(4096, 14336), w_up=(4096, 14336))


def test_a_row_for_one_dtype_is_none_for_another():
    """The shipped row for v6e, whose blocks of float32 weights no VMEM holds."""
    assert any(op == "glu" and on == "tpu-v6e" for op, on, _ in tuned.rows())
    assert lowers("glu", glu(w="float32"), {}, chip="TPU v6 lite") == 3
    places = [tuned.place(glu(), {}), tuned.place(glu(w="float32"), {}), tuned.place(glu(), {"out_dtype": "float32"})]
    assert len(set(places)) == 3 and tuned.place(glu(), {"out_dtype": "bfloat16"}) == places[0]
    assert ("glu", "tpu-v6e", places[0]) in tuned.rows()


class Table(dict):
    """Has a row for every call."""

    def __init__(self, blocks):
        self.blocks, self.asked = blocks, 0

    def get(self, key):
        self.asked += 1
        return self.blocks


@pytest.mark.parametrize("bench", BENCHES)
def test_a_call_that_tuned_blocks_do_not_fit_goes_by_the_rule(bench, monkeypatch):
    """The largest call of a bucket has four times the width of the smallest."""
    dims = BENCHES[bench].shapes[0]
    table = Table(dict.fromkeys(default_blocks(bench, dims, "bfloat16", generation("v5e")), 1 << 15))
    monkeypatch.setattr(tuned, "rows", lambda: table)
    assert lowers(BENCHES[bench].op, BENCHES[bench].specs("bfloat16", *dims), BENCHES[bench].params) > 0
    assert table.asked == 1


def test_the_rule_is_searched_from_whatever_the_table_says(monkeypatch):
    monkeypatch.setattr(tuned, "rows", lambda: {})
    blocks = {"rule": {}, "table": None}

    def traced(which):
        fn, args = make(**program("rms_norm", (1024, 1024), passes="forward", blocks=blocks[which]).given)
        return str(jax.make_jaxpr(fn)(*args))

    rule = traced("rule")
    assert traced("table") == rule
    monkeypatch.setattr(tuned, "rows", lambda: Table({"rows": 16}))
    assert traced("rule") == rule != traced("table")


FOUND = Tuned("matmul", (512, 512, 512), "bfloat16", "v5e", "schedule", {"m": 512}, 9.0, {"m": 256}, 5.0, 3, 0, True)


def test_a_table_keeps_what_is_better_and_loses_what_the_rule_beats(tmp_path):
    table, on = tmp_path / "table.json", generation("v5e")
    same = dataclasses.replace(FOUND, best=FOUND.default, cost=9.0)
    other = dataclasses.replace(FOUND, dims=(1024, 512, 512))
    for result in (FOUND, other, dataclasses.replace(same, finished=False)):
        write(table, result, on, "kpt tpu tune")
    assert [r["dims"] for r in json.loads(table.read_text())["rows"]] == [[1024, 512, 512], [512, 512, 512]]
    write(table, same, on, "kpt tpu tune")
    assert [r["dims"] for r in json.loads(table.read_text())["rows"]] == [[1024, 512, 512]]


def test_a_row_says_how_it_was_found():
    assert (found := row(FOUND, generation("v5e")))["method"] == "schedule" and (found["cycles"], found["default_cycles"]) == (5, 9)
    measured = row(dataclasses.replace(FOUND, method="clock", cost=2e-4, default_cost=3e-4), generation("v5e"))
    assert measured["method"] == "clock" and (measured["seconds"], measured["default_seconds"]) == (2e-4, 3e-4) and "cycles" not in measured


def test_a_tpu_measures_no_other_generation(monkeypatch):
    monkeypatch.setattr("kpt_jax.tpu_tune.measures", lambda: True)
    monkeypatch.setitem(tensorcore.DEVICE_KINDS, jax.devices()[0].device_kind, tensorcore.V6E)
    with pytest.raises(HardwareError, match="for v5e were to be tuned.*--gen"):
        tune("rms_norm", (16, 128), generation("v5e"))
    with pytest.raises(ValueError, match="interpret mode"):  # it is measured
        tune("rms_norm", (16, 128), generation("v6e"))


@pytest.mark.parametrize("options, why", [
    (["--op", "matmul", "--shape", "512x512"], "Its shapes are MxKxN"),
    (["--op", "matmul", "--op", "rms_norm", "--shape", "512x512x512"], "rms_norm was asked for at 512x512x512"),
    (["--op", "matmul", "--shape", "0x512x512"], "positive numbers"),
    (["--op", "matmul", "--write", "/no/such/table.json"], "folder does not exist"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_searched(options, why, monkeypatch):
    monkeypatch.setattr("kpt_jax.tpu_tune.tune", lambda *_, **__: pytest.fail("searched"))
    run = CliRunner().invoke(cli.app, ["tpu", "tune", *options])
    assert run.exit_code == console.REFUSED and why in " ".join(run.output.split())


def test_one_op_that_cannot_be_searched_does_not_lose_the_others(tmp_path, monkeypatch):
    cannot = KptError("rope was asked for", "It cannot be", "Leave it")
    ends = {"rope": cannot, "rope_interleaved": cannot, "layer_norm": KeyboardInterrupt()}

    def searched(name, dims, on, *, dtype, **_):
        if name in ends:
            raise ends[name]
        return dataclasses.replace(FOUND, bench=name, dims=tuple(dims))

    monkeypatch.setattr("kpt_jax.tpu_tune.tune", searched)
    table = tmp_path / "table.json"
    run = CliRunner().invoke(cli.app, ["tpu", "tune", "--op", "rope", "--op", "matmul", "--dtype", "float32", "--write", str(table)])
    assert run.exit_code == console.NO and "rope on v5e: rope was asked for" in run.output and "5 cycles" in run.output
    (kept,) = json.loads(table.read_text())["rows"]
    assert kept["op"] == "matmul" and kept["origin"]["command"] == "kpt tpu tune --op rope --op matmul --dtype float32 --gen v5e"
    run = CliRunner().invoke(cli.app, ["tpu", "tune"])
    assert run.exit_code == 130 and f"All {len(BENCHES)} kernels are searched" in run.output
    assert f"1 of {len(BENCHES)}: attention 4x4096x16x16x128 on v5e" in run.output
    assert "5 cycles" in run.output and "are kept in" in run.output and "What a TPU measured" not in run.output


def test_a_dtype_that_no_kernel_takes():
    run = CliRunner().invoke(cli.app, ["tpu", "tune", "--op", "matmul", "--dtype", "float8"])
    assert run.exit_code == console.REFUSED and "bfloat16 and float32" in run.output


def test_who_stops_a_search_is_told_what_is_kept(monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("kpt_jax.tpu_tune.tune", stopped)
    run = CliRunner().invoke(cli.app, ["tpu", "tune", "--op", "matmul"])
    assert run.exit_code == 130 and "are kept in" in run.output and "the same command" in run.output


def test_generations_are_read_leniently():
    assert [g.name for g in _generations("V5E, tpu_v6e,v5e,")] == ["v5e", "v6e"]
    with pytest.raises(HardwareError, match="v4, v5e"):
        _generations(",")


def test_a_search_starts_from_what_fits():
    best, cost, first, *_ = search({"rows": 2048, "columns": 64}, distance({"rows": 128, "columns": 512}))
    assert best == {"rows": 128, "columns": 512} and (cost, first) == (1, 6)


def test_the_rule_stays_where_nothing_is_better():
    """It may choose for each of a kernel's products what no one size of blocks is."""
    start = {"rows": 512, "columns": 64}
    best, cost, first, *_ = search(start, distance({"rows": 128, "columns": 512}, rule=1))
    assert (best, cost, first) == (start, 1, 1)


@pytest.mark.parametrize("rule", [6, None])
def test_nothing_to_search(rule):
    with pytest.raises(KptError, match="cannot be had"):
        search({"rows": 64}, lambda candidates: [rule if c is None else None for c in candidates])


def test_a_budget_ends_a_search_with_the_best_so_far():
    turns = itertools.count()
    best, cost, first, *_, finished = search({"rows": 512}, distance({"rows": 8}, rule=7), more=lambda: next(turns) < 1)
    assert not finished and 1 < cost < first and best["rows"] < 512


def test_a_clock_measures_what_runs_here():
    """The median of five; what the kernel refuses is no candidate, and any other error is one."""
    taken = (1.0, 9.0, 3.0, 2.0, 5.0)
    times = iter([t for n, seconds in enumerate(taken) for t in (100.0 * n, 100.0 * n + seconds)])
    plain = program("rms_norm", (16, 128), dtype="float32", provider=XLA)
    too_large = program("rms_norm", (16, 128), dtype="float32", blocks={"rows": 1 << 20})
    assert by_clock([plain, too_large], clock=lambda: next(times)) == [3.0, None]
    with pytest.raises(ValueError, match="interpret mode"):
        by_clock([program("rms_norm", (16, 128), dtype="float32")])


def test_without_the_compiler_a_command_says_what_to_install(monkeypatch):
    installed = metadata.version

    def version(name):
        if name == "libtpu":
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata, "version", version)
    for command in (["compile", "--op", "rope"], ["schedule", "--op", "rope"], ["tune", "--op", "rope"]):
        run = CliRunner().invoke(cli.app, ["tpu", *command, "--gen", "v5e"])
        assert run.exit_code == console.MISSING, run.output
        assert install("tpu") in run.output and ("libtpu" in run.output or "jax>=0.11.2" in run.output)


def test_the_tables_of_the_docs_are_those_of_the_data():
    """And none is empty."""
    pages = written(ROOT / "docs/benchmarks")
    for page, text in pages.items():
        assert page.read_text(encoding="utf-8") == text, f"python -m kpt_jax.bench_tpu_tables docs/benchmarks renews {page.name}"
        assert not re.search(r"<!-- [\w ]+ -->\n<!-- end -->", text)
    assert len(pages) == 2


def test_the_notebook_says_of_its_times_what_the_table_says():
    page = json.loads((ROOT / "notebooks/tune_tpu_kernel_without_a_tpu.ipynb").read_text(encoding="utf-8"))
    said = " ".join("".join(page["cells"][0]["source"]).split())
    off = defaultdict(list)
    for timed in json.loads((ROOT / "docs/benchmarks/tpu-static.json").read_text(encoding="utf-8"))["rows"]:
        off[timed["generation"]].append(round(100 * timed["off"]))
    assert f"on v5e from {-min(off['v5e'])}% too fast to {max(off['v5e'])}% too slow" in said
    assert off["v6e"] == [-5] and "on v6e 5% too fast (one row)" in said
    assert max(off["v7x"]) == 0 and f"on v7x from {-min(off['v7x'])}% too fast to equal" in said
    assert off.keys() == {"v5e", "v6e", "v7x"}


@pytest.mark.parametrize("name", GENERATIONS)
def test_the_docs_have_the_bandwidth_that_a_core_gets(name):
    chip = hardware_profile(name)
    whole = chip.memory_bandwidth / chip.devices / 1e9
    (row,) = re.findall(rf"^\| {name} \|(.*)\|$", (ROOT / "docs/tpu.md").read_text(encoding="utf-8"), re.MULTILINE)
    cores, device, alone, split = (cell.strip() for cell in row.split("|"))
    assert int(cores) == chip.cores and device == ("one core" if chip.devices > 1 else "the chip")
    assert alone.startswith(f"{whole:,.0f} GB/s")
    assert split == ("" if chip.cores == chip.devices else f"{whole / (chip.cores // chip.devices):,.1f} GB/s".replace(".0 ", " "))
