"""`kpt history`, `compare`, `regress` and `tune`: words, JSON, pages and exit codes, on a history with a known answer."""

import dataclasses
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kpt import cli
from kpt.cli import app
from kpt.console import NO, OK, REFUSED
from kpt.tracking import History, Run
from kpt.tracking.simulate import NOISES, histories
from kpt.tuning import Key, Measurement, Measurements
from tests.core.test_report import Page

DOCS = Path(__file__).parents[2] / "docs" / "history.md"


def call(*arguments):
    return CliRunner().invoke(app, arguments)


def add(name, slower, seed, **fields):
    """25 runs, the last 5 slower, with labels v1 and v2."""
    import numpy as np

    made = histories(NOISES["quiet"], 1, 25, slower, 5, np.random.default_rng(seed))[0].tolist()
    runs = [
        Run(name, tuple(r), memory=2**20, machine="here", commit=f"{i:012x}", label="v1" if i < 20 else "v2", hardware="cpu", **fields)
        for i, r in enumerate(made)
    ]
    History().put(*runs)
    return runs


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def slower(cache):
    """One series that is 9% slower, a moderate regression, and one that is not."""
    return add("loss <1>", 0.09, 0) + add("rms_norm 8x16 float32: plain", 0.0, 1)


@pytest.mark.parametrize("command", [("history",), ("compare",), ("regress",), ("tune",), ("tune", "export"), ("tune", "import")], ids=" ".join)
def test_every_command_explains_itself_with_an_example(command):
    told = call(*command, "--help")
    assert told.exit_code == OK and "Usage:" in told.stdout
    assert command == ("tune",) or "Example" in told.stdout


def test_the_help_of_regress_tells_its_exit_codes_and_thresholds():
    text = " ".join(call("regress", "--help").stdout.split())
    assert "0 no regression of that severity; 1 there is one; 2 the request cannot be met" in text
    for words in ("3 or more", "x>=3", "minor from 2%", "moderate from 5%", "severe from 15%", "fewer than 8 runs before or 3 recent ones"):
        assert words in text


def test_history_lists_the_runs(slower):
    said = call("history", "--last", "3", "--name", "loss")
    assert said.exit_code == OK
    assert [line.split()[0] for line in said.stdout.splitlines()[1:]] == [r.id for r in slower[22:25]]
    assert "loss <1>" in said.stdout and "1 MiB" in said.stdout and "v2" in said.stdout and " ms" in said.stdout
    told = json.loads(call("history", "--label", "v1", "--json").stdout)
    assert {r["label"] for r in told} == {"v1"} and len(told) == 40


def test_history_since_a_time_of_another_zone(cache):
    early, late = (Run("loss", (1.0,), recorded=f"2026-05-01T{hour}:30:00+00:00") for hour in (10, 12))
    History().put(early, late)
    for since, found in (("2026-05-01", [early, late]), ("2026-05-01T13:00+02:00", [late]), ("2026-05-01T11:00-02:00", [])):
        assert [r["id"] for r in json.loads(call("history", "--since", since, "--json").stdout)] == [r.id for r in found]


@pytest.mark.parametrize("command", [("history",), ("regress",)], ids=" ".join)
def test_an_empty_history_says_how_runs_come_into_it(cache, command):
    said = call(*command)
    assert said.exit_code == OK and "kpt bench record what they measure" in said.stdout


def test_compare_judges_each_series(slower):
    said = call("compare", "v1", "v2")
    assert said.exit_code == OK
    told = json.loads(call("compare", "v1", "v2", "--json").stdout)
    assert {s["name"]: s["time"]["verdict"] for s in told["series"]} == {"loss <1>": "moderate", "rms_norm 8x16 float32: plain": "unchanged"}
    assert re.search(r"loss <1> +forward +time +moderate +\+\d\.\d% \[\+\d\.\d%, \+\d+\.\d%\] +20 / 5", said.stdout), said.stdout


@pytest.mark.parametrize("command", [("compare", "v1", "v2"), ("regress", "--fail-on", "never")], ids=" ".join)
def test_memory_has_a_row_where_it_is_known(slower, command):
    """Though it is unchanged; a series without has none."""
    History().put(*(Run("unknown", (1.0,), label=label) for label in ["v1"] * 8 + ["v2"] * 5))
    said = call(*command)
    rows = re.findall(r"^(.+?)  +forward +(time|memory) +(.+?)  ", said.stdout, re.MULTILINE)
    assert sorted(r for r in rows if r[1] == "memory") == [("loss <1>", "memory", "unchanged"), ("rms_norm 8x16 float32: plain", "memory", "unchanged")]
    assert len([r for r in rows if r[1] == "time"]) == 3, said.stdout


def test_compare_of_two_runs_gives_an_interval_and_no_verdict(slower):
    told = json.loads(call("compare", slower[3].id, slower[24].id, "--json").stdout)
    (series,) = told["series"]
    assert series["time"]["verdict"] == "not enough data" and series["time"]["low"] > 0.02


@pytest.mark.parametrize(
    ("arguments", "code"),
    [((), NO), (("--fail-on", "minor"), NO), (("--fail-on", "moderate"), NO), (("--fail-on", "severe"), OK), (("--fail-on", "never"), OK),
     (("--name", "rms_norm"), OK), (("--moderate", "0.12"), OK), (("--severe", "0.07", "--fail-on", "severe"), NO)],
)  # fmt: skip
def test_regress_is_a_gate(slower, arguments, code):
    said = call("regress", *arguments)
    assert said.exit_code == code, said.output
    data = call("regress", *arguments, "--json")
    assert data.exit_code == code and json.loads(data.stdout)["failed"] == (code == NO)


def test_regress_tells_where_the_level_changed(cache):
    import numpy as np

    made = histories(NOISES["quiet"], 1, 50, 0.2, 20, np.random.default_rng(0))[0].tolist()
    History().put(*(Run("loss", tuple(r), commit=f"{i:012x}") for i, r in enumerate(made)))
    said = call("regress")
    assert said.exit_code == OK and re.search(r"loss: the level changed at run \w{12} \(.*commit 0000000000(1d|1e|1f)\)", said.stdout), said.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("regress", "--fail-on", "catastrophic"), "minor, moderate, severe or never"), (("compare", "v1", "v9"), "kpt history lists them"),
     (("regress", "--minor", "0.5", "--moderate", "0.1"), "minor 50% is above moderate 10%"),
     (("regress", "--moderate", "0.2"), "moderate 20% is above severe 15%"), (("regress", "--minor", "0"), "minor is 0%"),
     (("tune", "import", "absent.json"), "kpt tune export"),
     (("tune", "export", "absent/x.json"), "can be written"), (("history", "--since", "yesterday"), "2026-05-01"),
     (("regress", "--recent", "2"), "Invalid value for '--recent'"), (("history", "--html", "absent/x.html"), "There is no folder"), (("regress", "--name", "los "), "kpt history")],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else None,
)  # fmt: skip
def test_what_cannot_be_met_exits_with_2_and_a_sentence(slower, arguments, words):
    told = call(*arguments)
    assert told.exit_code == REFUSED and words in told.stderr and "Traceback" not in told.stderr


BROKEN = {
    "no JSON": b"{",
    "no text": b"\xff\xfe",
    "something else": b'{"kind": "kpt.plan"}',
    "newer": b'{"kind": "kpt.tuning", "format": 99, "rows": []}',
    "a broken row": b'{"kind": "kpt.tuning", "format": 1, "rows": [{}], "exported": "", "kpt": "", "machine": ""}',
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named(cache, text):
    (cache / "broken.json").write_bytes(text)
    told = call("tune", "import", "broken.json")
    assert told.exit_code == REFUSED and told.stderr.startswith("broken.json was to be imported. ")


@pytest.mark.parametrize(
    ("arguments", "dtype", "kinds"),
    [((), "int3", "float32, bfloat16, float16, float64"), (("--op", "rms_norm"), "int8", "float32, bfloat16, float16, float64"),
     (("--framework", "torch"), "int3", "float32, bfloat16, float16, float64"), ((), "", "float32")],
)  # fmt: skip
def test_a_dtype_of_no_kernel_is_refused_with_those_that_are_possible(cache, monkeypatch, arguments, dtype, kinds):
    pytest.importorskip(arguments[1] if arguments[:1] == ("--framework",) else "jax")
    monkeypatch.setattr("kpt.strategy.tune.ahead", None)  # nothing is timed
    told = call("tune", *arguments, "--dtype", dtype)
    assert told.exit_code == REFUSED and f"{dtype!r}" in told.stderr and kinds in told.stderr


def test_runs_without_a_common_series_cannot_be_compared(cache):
    History().put(Run("a", (1.0,), label="x"), Run("b", (1.0,), label="y"))
    told = call("compare", "x", "y")
    assert told.exit_code == REFUSED and "no series in common" in told.stderr


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [(("history",), OK, ["50 runs in 2 series", "loss &lt;1&gt;"]),
     (("compare", "v1", "v2"), OK, ["1 of 2 series", "Moderate:", "Memory unchanged: ", "<td class=\"number\">1 MiB</td>"]),
     (("regress",), NO, ["Failed.", "Moderate:", "minor from 2%"])],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else None,
)  # fmt: skip
def test_a_page_has_a_plot_of_every_series_and_loads_nothing(slower, cache, command, code, words):
    (cache / "out").mkdir()
    said = call(*command, "--html", "out/page.html", "--json")
    assert said.exit_code == code
    json.loads(said.stdout)
    assert str(cache / "out/page.html") in said.stderr
    text = (cache / "out/page.html").read_text()
    page = Page(text)
    assert page.loads == [] and [t for t, _ in page.tags].count("svg") == 2
    for word in words:
        assert word in text
    # Each series once in words, and all its runs as a table.
    assert text.count("<title>Time of") == 2 and all(r.id in text for r in slower)


def test_pages_of_nothing_are_pages(cache):
    for command in ("history", "regress"):
        assert call(command, "--html", "page.html").exit_code == OK
        Page((cache / "page.html").read_text())


def test_a_name_of_no_run_is_told_from_an_empty_history(slower):
    assert "kpt history lists all of them" in call("history", "--name", "nosuch").output


def test_the_console_script_says_a_warning_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(cli, "app", lambda: warnings.warn("a file is set aside", stacklevel=1))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        cli.main()
    assert capsys.readouterr().err == "Warning: a file is set aside\n"


def test_a_page_of_one_run_is_a_page(cache):
    """What there is after the first `kpt bench`."""
    History().put(Run("loss", (1e-3, 1.1e-3, 1e-3), machine="here", hardware="cpu"))
    for command in ("history", "regress"):
        assert call(command, "--html", "page.html").exit_code == OK
        Page((cache / "page.html").read_text())


@pytest.mark.parametrize(("framework", "why"), [("jax 1", "this machine is cpu"), ("abacus 3", "Kernels of 'abacus' were asked for")])
def test_measurements_move_between_machines(cache, monkeypatch, framework, why):
    key = Key("a.fast", 1, "h100-sxm", "1", framework, "float32", "x[8]")
    Measurements().put(Measurement.of(key, [1.0, 2.0, 3.0], {"block": 8}), Measurement.of(dataclasses.replace(key, kernel="a.slow"), [4.0]))
    said = call("tune", "export", "m.json")
    assert said.exit_code == OK and "2 measurements in m.json" in said.stdout
    monkeypatch.setenv("KPT_CACHE_DIR", str(cache / "elsewhere"))
    said = call("tune", "import", "m.json")
    assert said.exit_code == OK and "2 measurements, 2 of them new: " in said.stdout
    assert f"of h100-sxm, 1, {framework}: kept, not verified and not used; {why}" in said.stdout
    assert json.loads(call("tune", "import", "m.json", "--json").stdout)["added"] == 0
    row, _ = Measurements().all()
    assert (row.seconds, row.config, row.verified) == (2.0, {"block": 8}, False)


def test_the_commands_of_the_page_are_as_it_says(slower, cache):
    """Every `kpt ...` line of docs/history.md runs; its comment tells the exit code where it is not 0."""
    lines = re.findall(r"^(kpt (?:history|compare|regress|tune)[^#\n]*?) *(?:#(.*))?$", DOCS.read_text(), re.MULTILINE)
    assert len(lines) >= 6
    for line, comment in lines:
        said = call(*line.split()[1:])
        assert said.exit_code == (NO if "exit code 1" in comment else OK), (line, said.output)


def test_the_figures_of_the_page_are_those_of_the_simulation():
    made = json.loads((DOCS.parent / "benchmarks/regression-simulation.json").read_text())
    told, again = made["rows"], made["successive"]
    rows = re.findall(r"^\| (.+?) \| (\w+) \| ([\d.]+)% \| ([\d.]+)% \| ([\d.]+)% \|$", DOCS.read_text(), re.MULTILINE)
    shown = {(design, noise): figures for design, noise, *figures in rows}
    expected = {}
    for r in told:
        expected.setdefault((r["design"], r["noise"]), []).append(f"{r['found']:.1%}"[:-1])
    assert shown == expected
    minor, moderate = ([f"{again[n][severity]:.1%}" for n in ("typical", "quiet", "noisy")] for severity in ("minor", "moderate"))
    text = " ".join(DOCS.read_text().split())
    assert "{} met a minor false alarm at typical noise ({} at quiet, {} at noisy)".format(*minor) in text
    assert "{} a moderate one ({}, {})".format(*moderate) in text


def test_help_of_the_commands_loads_no_arrays():
    probe = (
        "import sys; from typer.testing import CliRunner; from kpt.cli import app\n"
        "assert CliRunner().invoke(app, ['regress', '--help']).exit_code == 0\n"
        "print([m for m in ('numpy', 'sqlite3', 'jinja2') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
