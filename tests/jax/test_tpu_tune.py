"""Block sizes searched for: by any cost, by a clock, and what a machine without the compiler is told. Schedules: test_tpu_compile.py."""

from __future__ import annotations

import itertools
import json
import re
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kpt import cli, console
from kpt.commands.tpu import _generations
from kpt.errors import HardwareError, KptError
from kpt.hardware import hardware_profile
from kpt.tpu import GENERATIONS, generation
from kpt_jax.bench_ops import BENCHES
from kpt_jax.bench_tpu_tables import written
from kpt_jax.tpu_programs import XLA, default_blocks, program
from kpt_jax.tpu_tune import by_clock, clipped, extents, search

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
    with pytest.raises(KptError, match="cannot be compiled"):
        search({"rows": 64}, lambda candidates: [rule if c is None else None for c in candidates])


def test_a_budget_ends_a_search_with_the_best_so_far():
    turns = itertools.count()
    best, cost, first, *_, finished = search({"rows": 512}, distance({"rows": 8}, rule=7), more=lambda: next(turns) < 1)
    assert not finished and 1 < cost < first and best["rows"] < 512


def test_a_clock_measures_what_runs_here():
    """The median of five; what fails, as a TPU's kernel does on a CPU, is no candidate."""
    taken = (1.0, 9.0, 3.0, 2.0, 5.0)
    times = iter([t for n, seconds in enumerate(taken) for t in (100.0 * n, 100.0 * n + seconds)])
    plain = program("rms_norm", (16, 128), dtype="float32", provider=XLA)
    kernel = program("rms_norm", (16, 128), dtype="float32")
    assert by_clock([plain, kernel], clock=lambda: next(times)) == [3.0, None]


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
        assert "pip install 'kpt-kernels[tpu]'" in run.output and ("libtpu" in run.output or "jax>=0.11.2" in run.output)
        assert ".venv/bin/pip install -e '.[tpu]'" in run.output


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
    for row in json.loads((ROOT / "docs/benchmarks/tpu-static.json").read_text(encoding="utf-8"))["rows"]:
        off[row["generation"]].append(round(100 * row["off"]))
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
