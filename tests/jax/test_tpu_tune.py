"""Block sizes searched for: by any cost, by a clock, and what a machine without the compiler is told. Schedules: test_tpu_compile.py."""

from __future__ import annotations

import itertools
import re
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kpt import cli, console
from kpt.errors import KptError
from kpt_jax.bench_tpu_tables import written
from kpt_jax.tpu_programs import XLA, program
from kpt_jax.tpu_tune import by_clock, search


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


def test_the_tables_of_the_docs_are_those_of_the_data():
    """And none is empty."""
    pages = written(Path(__file__).parents[2] / "docs/benchmarks")
    for page, text in pages.items():
        assert page.read_text(encoding="utf-8") == text, f"python -m kpt_jax.bench_tpu_tables docs/benchmarks renews {page.name}"
        assert not re.search(r"<!-- [\w ]+ -->\n<!-- end -->", text)
    assert len(pages) == 2
