"""The command line: what it prints, in words and in JSON, and with which exit code."""

import functools
import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from kpt import __version__
from kpt.cli import app
from kpt.console import CRASHED, MISSING, NO, OK, REFUSED
from kpt.install import install


def call(*arguments):
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of a user into an empty current directory; returns how to name it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write


COMMANDS = [
    (),
    ("demo",),
    ("plan",),
    ("doctor",),
    ("hardware",),
    ("hardware", "list"),
    ("hardware", "show"),
    ("hardware", "detect"),
    ("kernels",),
    ("kernels", "list"),
    ("kernels", "show"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(command):
    result = call(*command, "--help")
    assert result.exit_code == OK
    assert "Usage:" in result.stdout


def test_help_tells_the_exit_codes():
    text = " ".join(call("--help").stdout.split())
    for code in (OK, NO, REFUSED, MISSING, CRASHED):
        assert f"{code} " in text[text.index("Exit codes") :]


def test_help_loads_no_framework_and_no_arrays():
    probe = (
        "import sys; from typer.testing import CliRunner; from kpt.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print([m for m in ('jax', 'torch', 'flax', 'numpy', 'jinja2') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_shell_can_complete():
    asked = dict(os.environ, _KPT_COMPLETE="complete_bash", COMP_WORDS="kpt his", COMP_CWORD="1")
    code = "import sys; sys.argv = ['kpt']; from kpt.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=asked, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["history"]
    assert "--install-completion" in call("--help").stdout


def test_version():
    assert call("--version").stdout.strip() == __version__


# (command, what the words must contain, what must be true of the JSON)
ANSWERS = [
    (
        ("hardware", "list"),
        ["h100-sxm", "tpu-v5e", "989.", "GB/s"],
        lambda d: len({p["name"] for p in d}) == len(d) > 20,
    ),
    (("hardware", "show", "tpu-v5e"), ["197 TFLOP/s", "http"], lambda d: d["peak_flops"]["bfloat16"] == 197e12),
    (("hardware", "show", "h100"), ["NVIDIA H100 SXM", "sm90"], lambda d: d["name"] == "h100-sxm"),
    (("hardware", "detect"), ["platform", "cores"], lambda d: d["cores"] >= 1),
    (("kernels", "list"), ["attention.xla", "float32"], lambda d: "attention.xla" in {k["name"] for k in d}),
    (("kernels", "list", "rope"), ["rope.xla"], lambda d: {k["op"] for k in d} == {"rope"}),
    (
        ("kernels", "show", "attention.xla"),
        ["causal", "loader"],
        lambda d: "causal" in d["masks"] and d["version"] >= 1,
    ),
    (
        ("doctor",),
        ["python", "attention.xla"],
        lambda d: d["versions"]["kpt"] == __version__ and "platform" in d["hardware"],
    ),
]


@pytest.mark.parametrize(("command", "words", "holds"), ANSWERS, ids=[" ".join(a[0]) for a in ANSWERS])
def test_answers_in_words_and_in_json(command, words, holds):
    said = call(*command)
    assert said.exit_code == OK, said.output
    for word in words:
        assert word in said.stdout
    data = call(*command, "--json")
    assert data.exit_code == OK
    assert holds(json.loads(data.stdout))


# (arguments, exit code, what the message must contain)
ERRORS = [
    (("hardware", "show", "h10x"), REFUSED, ["h10x", "h100-sxm", "kpt hardware list"]),
    (("kernels", "show", "nonsense"), REFUSED, ["nonsense", "kpt kernels list"]),
    (("kernels", "list", "atention"), REFUSED, ["Did you mean 'attention'?"]),
    (("plan", "nocolon"), REFUSED, ["MODULE:FUNCTION"]),
    (("plan", "no_such_module:f"), REFUSED, ["no_such_module"]),
    (("plan", "users:nothing"), REFUSED, ["nothing", "double"]),
    (("plan", "users:double"), REFUSED, ["x", "--args-from"]),
    (("plan", "users:double", "--args-from", "users:pair"), REFUSED, ["users:pair", "2 positional arguments", "one tuple"]),
    (("plan", "users:double", "--args-from", "users:listed"), REFUSED, ["users:listed", "2 positional arguments", "one tuple"]),
    (("plan", "many:stepp"), REFUSED, ["has no 'stepp'. It may be step."]),
    (("tune", "--program", "users:double", "--op", "rope"), REFUSED, ["--program", "--op"]),
    (("tune", "--op", "rope", "--args-from", "users:pair"), REFUSED, ["--args-from", "--program"]),
    (("plan", "users.py:double"), REFUSED, ["without .py: users:double"]),
    (("plan", "users:double", "--args-from", "users:double"), REFUSED, ["users:double", "called without arguments, and takes x"]),
    (("plan", "users:double", "--args-from", "users:number"), REFUSED, ["users:number", "of type int, and is not called"]),
    (("plan", "users:double", "--args-from", "users:fails"), CRASHED, ["ZeroDivisionError", "--debug"]),
    (("plan", "users:Model"), REFUSED, ["It is a class", "return Model(...), inputs"]),
    (("plan", "users:half_a_factory"), REFUSED, ["what users:half_a_factory returned", "2 positional arguments", "one tuple"]),
    (("plan", "users:number"), REFUSED, ["A plan of users:number was asked for", "of type int", "Name a function or a model"]),
    (("plan", "users:number", "--args-from", "users:pair"), REFUSED, ["A plan of users:number was asked for", "of type int"]),
    (("tune", "--program", "users:number"), REFUSED, ["Tuning of users:number was asked for", "of type int"]),
    (("plan", "broken:f"), CRASHED, ["absent_dependency"]),
]
USERS = """
def double(x):
    return 2 * x


class Model:
    pass


def half_a_factory():
    return double, (1.0, 2.0)


number = 3


def pair():
    return 1, 2


def listed():
    return [1, 2]


def fails():
    1 / 0
"""
MANY = "def step(x):\n    return x\n\n\n" + "".join(f"def g{i}():\n    pass\n\n\n" for i in range(20))


@pytest.mark.parametrize(("arguments", "code", "words"), ERRORS, ids=[" ".join(e[0]) for e in ERRORS])
def test_an_error_is_a_sentence_and_an_exit_code(module, arguments, code, words):
    module("users", USERS)
    module("many", MANY)
    module("broken", "import absent_dependency\n")
    result = call(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr

    data = call(*arguments, "--json")
    assert data.exit_code == code
    told = json.loads(data.stdout)
    assert told["error"] and told["message"].split("\n")[0] in result.stderr


FACTORY = """
import {framework}


def double(x):
    return 2 * x


def linear():
    import torch

    return torch.nn.Linear(2, 3), torch.ones(1, 2)


def linen():
    from flax import linen

    model, x = linen.LayerNorm(), jax.numpy.ones((1, 2))
    return model, (model.init(jax.random.key(0), x), x)


def function():
    return double, [jax.numpy.ones(2)]


def alone():
    return double(3), 2
"""


@pytest.mark.parametrize(
    ("framework", "name", "planned"),
    [("jax", "function", "double"), ("jax", "linen", "LayerNorm"), ("torch", "linear", "Linear"), ("jax", "alone", "alone")],
)
def test_a_factory_gives_the_program_and_its_arguments(module, framework, name, planned):
    """One without such a result is the program itself, which has no arguments."""
    pytest.importorskip(framework)
    module("factories", FACTORY.format(framework=framework))
    made = call("plan", f"factories:{name}", "--json")
    assert made.exit_code == OK, made.output
    assert json.loads(made.stdout)["function"] == planned
    sys.modules.pop("factories", None)


ALONE = """
import jax


def branches(x):
    return x if x.sum() > 0 else -x


def array():
    return jax.numpy.ones(2)


def double(x):
    return 2 * x
"""


def test_the_only_argument_may_come_as_it_is(module):
    pytest.importorskip("jax")
    module("alone", ALONE)
    assert call("plan", "alone:double", "--args-from", "alone:array").exit_code == OK
    assert "or the only one itself" in " ".join(call("plan", "--help").stdout.split())


def test_a_branch_on_a_traced_value_cannot_be_planned(module):
    pytest.importorskip("jax")
    module("alone", ALONE)
    for command in (("plan", "alone:branches"), ("tune", "--program", "alone:branches")):
        result = call(*command, "--args-from", "alone:array")
        assert result.exit_code == REFUSED, result.output
        for words in ("boolean conversion of traced array", "alone.py:6, in branches", "jax.lax.cond or jax.numpy.where", "static_argnames"):
            assert words in result.stderr


@pytest.mark.parametrize(
    "arguments", [("hardware", "show"), ("demo", "--steps", "0"), ("nonsense",), ("plan", "a:b", "--no")]
)
def test_wrong_usage_exits_with_2(arguments):
    assert call(*arguments).exit_code == REFUSED


@pytest.mark.parametrize(("arguments", "code", "error"), [(("plan", "users:double", "--args-from", "users:fails"), CRASHED, "ZeroDivisionError"),
                                                          (("plan", "users:double"), REFUSED, "KptError")])  # fmt: skip
def test_debug_shows_the_traceback_and_keeps_the_exit_code(module, arguments, code, error):
    """Python's own exit code for an error, 1, would be that of a regression."""
    module("users", USERS)
    result = call("--debug", *arguments)
    assert result.exit_code == code and "Traceback" in result.stderr and error in result.stderr
    data = call("--debug", *arguments, "--json")
    assert data.exit_code == code and json.loads(data.stdout)["error"] == error


@pytest.mark.parametrize("absent", ["jax", "flax", "optax"])
def test_a_missing_framework_is_told_with_the_install_line(monkeypatch, absent):
    def refuse(name):
        raise ModuleNotFoundError(f"No module named {absent!r}", name=absent)

    monkeypatch.setattr("kpt.console.importlib.import_module", refuse)
    result = call("demo")
    assert result.exit_code == MISSING
    assert absent in result.stderr and install("jax") in result.stderr


UNFIT = """
import torch


class Unfit(torch.nn.Module):
    def forward(self, x):
        return x @ torch.ones(7, 7)


def model():
    return Unfit(), (torch.ones(2, 4),)
"""


def test_what_torch_logs_of_a_failure_is_left_to_debug(module):
    """The error says it in a line."""
    pytest.importorskip("torch")
    module("unfit", UNFIT)
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=False)
    short, long = (run([sys.executable, "-m", "kpt.cli", *debug, "plan", "unfit:model"]) for debug in ((), ("--debug",)))
    assert short.returncode == long.returncode == CRASHED
    assert short.stderr.startswith("RuntimeError: mat1 and mat2 shapes cannot be multiplied")
    assert "failed while attempting" in long.stderr and "Traceback" in long.stderr and "Traceback" not in short.stderr


def test_doctor_says_no_where_nothing_can_run(monkeypatch):
    monkeypatch.setattr("kpt.cli._refused_here", lambda kernel, hardware: f"{kernel.name} needs another machine")
    result = call("doctor")
    assert result.exit_code == NO
    assert "attention.xla needs another machine" in result.stdout


def test_doctor_has_a_line_for_what_kernels_need(monkeypatch):
    monkeypatch.setattr("kpt.cli._refused_here", lambda kernel, hardware: "runs on tpu" if "tpu" in kernel.name else None)
    lines = [line.split() for line in call("doctor").stdout.splitlines()]
    data = json.loads(call("doctor", "--json").stdout)["kernels"]
    names = [name for name, found in data.items() if found["why_not"] == "runs on tpu"]
    (needing,) = [line for line in lines if line[1:4] == ["runs", "on", "tpu"]]
    assert names and needing[0] == str(len(names)) and needing[4] == f"{names[0]},"
    (running,) = [line for line in lines if line[1:3] == ["can", "run"]]
    assert running[0] == str(len(data) - len(names))


@pytest.mark.parametrize(("coincide", "code"), [(True, OK), (False, NO)])
def test_demo_exits_with_1_when_the_curves_part(monkeypatch, tmp_path, coincide, code):
    monkeypatch.setattr(
        "kpt.cli._front_end", lambda *_: lambda steps, out, console: {"steps": steps, "coincide": coincide}
    )
    result = call("demo", "--steps", "3", "--out", str(tmp_path / "r.html"), "--json")
    assert result.exit_code == code
    assert json.loads(result.stdout) == {"steps": 3, "coincide": coincide}


@pytest.mark.parametrize("named", [False, True])
def test_the_folder_of_a_report_has_to_be_there_and_that_of_the_demo_is_made(module, tmp_path, monkeypatch, named):
    """It is asked for before anything is trained."""
    demo_report = pytest.importorskip("kpt_jax.demo_report")
    monkeypatch.setattr(demo_report, "prepare", lambda *_, **__: 1 // 0)
    result = call("demo", *(("--out", "absent/x.html") if named else ()))
    assert ("There is no folder" in result.stderr, result.exit_code) == ((True, REFUSED) if named else (False, CRASHED)), result.output
    assert [p.name for p in tmp_path.iterdir()] == ([] if named else ["kpt-report"])


@pytest.mark.parametrize("command", [("bench", "--out"), ("bench", "--plot"), ("twin", "tests.models.gpt:TWIN", "--plot")], ids=" ".join)
@pytest.mark.parametrize("name, says", [("absent/x.svg", "There is no folder"), (".", "is a folder")])
def test_where_results_go_is_asked_before_anything_is_measured(tmp_path, monkeypatch, command, name, says):
    monkeypatch.setattr("kpt.cli._front_end", lambda *_: lambda *_: 1 // 0)
    result = call(*command, str(tmp_path / name))
    assert result.exit_code == REFUSED and says in result.stderr, result.output


PLANNED = """
import jax
import jax.numpy as jnp


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def program():
    return norm, jnp.ones((16384, 4096), jnp.bfloat16)
"""


def test_a_plan_for_another_chip_is_the_same_by_option_and_by_variable(module, monkeypatch):
    """Neither certified nor run here: what is here is what is detected, whatever plans are for."""
    devices = pytest.importorskip("kpt_jax.devices")
    module("planned", PLANNED)
    by_option = json.loads(call("plan", "planned:program", "--hardware", "h100", "--json").stdout)
    devices._detected.cache_clear()
    monkeypatch.setenv("KPT_HARDWARE", "h100")
    assert json.loads(call("plan", "planned:program", "--json").stdout) == by_option
    (site,) = by_option["sites"]
    assert by_option["hardware"] == "h100-sxm" and site["kernel"].startswith("rms_norm.pallas_gpu")
    assert "Not certified and not run on this machine (cpu)" in site["reason"]


def test_which_kernels_run_here_is_asked_of_what_is_here(monkeypatch):
    told = {}
    for chip in ("auto", "h100"):
        monkeypatch.setenv("KPT_HARDWARE", chip)
        told[chip] = json.loads(call("doctor", "--json").stdout)
    assert told["h100"]["kernels"] == told["auto"]["kernels"] and told["h100"]["settings"]["hardware"] == "h100-sxm"
    assert told["h100"]["hardware"]["name"] == told["auto"]["hardware"]["name"]


def test_doctor_shows_the_settings_and_refuses_wrong_ones(monkeypatch):
    monkeypatch.setenv("KPT_LEVEL", "conservative")
    assert json.loads(call("doctor", "--json").stdout)["settings"]["level"] == "conservative"
    monkeypatch.setenv("KPT_LEVEL", "reckless")
    refused = call("doctor")
    assert refused.exit_code == REFUSED and "KPT_LEVEL" in refused.output
