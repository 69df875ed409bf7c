"""Block sizes searched for: by any cost, by a clock, and what a machine without the compiler is told. Schedules: test_tpu_compile.py."""

from __future__ import annotations

import itertools
from importlib import metadata

from typer.testing import CliRunner

from kpt import cli, console
from kpt_jax.tpu_programs import XLA, program
from kpt_jax.tpu_tune import by_clock, search


def distance(best):
    """A cost whose only minimum is at `best`, in doublings; sizes above 512 are refused."""

    def evaluate(candidates):
        return [
            None if max(c.values()) > 512 else 1 + sum(abs(c[n].bit_length() - size.bit_length()) for n, size in best.items())
            for c in candidates
        ]

    return evaluate


def test_a_search_walks_to_the_best_blocks_and_counts_what_was_refused():
    best, cost, first, tried, failed, finished = search({"rows": 512, "columns": 64}, distance({"rows": 128, "columns": 512}))
    assert best == {"rows": 128, "columns": 512} and (cost, first) == (1, 6)
    assert finished and 0 < failed < tried


def test_a_budget_ends_a_search_with_the_best_so_far():
    turns = itertools.count()
    best, cost, first, *_, finished = search({"rows": 512}, distance({"rows": 8}), more=lambda: next(turns) < 1)
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
