"""The pipeline: what it leaves, that it goes on after it was killed at any step, and what its gate lets through."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import numpy as np
import pytest
from typer.testing import CliRunner

import kpt
from kpt import cli, console
from kpt.auto import Report
from kpt.errors import ConfigError, StoreError
from kpt.pipeline import STEPS
from kpt.strategy import Plan
from kpt.tracking import History

ROOT = Path(__file__).parents[2]
PROGRAM = "tests.core.pipeline_program"
FILES = {"plan.json", "report.json", "report.html", "environment.json", "tuning.json", "verdict.json"}


def program(store, dies_at=""):
    return subprocess.run([sys.executable, "-m", PROGRAM, str(store), dies_at], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_killed_at_every_step_it_goes_on_where_it_was(tmp_path):
    """One run, eight deaths: each process gets one step further, and what comes out is one run and one artifact."""
    for step in STEPS:
        died = program(tmp_path, step)
        assert died.returncode == -signal.SIGKILL, died.stderr
        assert not (tmp_path / "artifacts").exists()
    done = [set(p.name for p in f.parent.iterdir()) for f in tmp_path.glob("running/*/run.json")]
    assert done == [{"run.json", *(f"{s}.json" for s in STEPS[:-1])}]
    ended = program(tmp_path)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    artifact = Path(told["artifact"])
    assert {p.name for p in artifact.iterdir()} == FILES and told["verdict"] == "not enough data"
    assert not list(tmp_path.glob("running/*")) and not list(tmp_path.glob("**/*.part"))
    (run,) = History(tmp_path).runs()
    assert run.id == artifact.name and run.name == "loss"
    report = Report.from_json((artifact / "report.json").read_text())
    assert report.plan.hash == Plan.load(artifact / "plan.json").hash == run.plan
    assert sorted(run.seconds) == sorted(report.seconds_after if report.kept else report.seconds_before)
    assert json.loads(report.to_json()) == json.loads((artifact / "report.json").read_text())


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from tests.core.pipeline_program import batch, loss

    def make(**more):
        return kpt.ProductionPipeline(loss, batch(), store=tmp_path, budget=0, **more)

    return make


def measured(monkeypatch, pipe, seconds):
    """The clock of the test."""
    honest = pipe.session.measure

    def measure(*given):
        found = honest(*given)
        return dataclasses.replace(found, seconds_before=(seconds,) * 9, seconds_after=(seconds,) * 9)

    monkeypatch.setattr(pipe.session, "measure", measure)
    return pipe


def test_the_gate_fails_on_a_regression(monkeypatch, pipeline):
    for i in range(9):
        assert measured(monkeypatch, pipeline(), 1e-3 * (1 + 0.001 * (i % 3))).run().passed
    made = [measured(monkeypatch, pipeline(), 1.5e-3 * (1 + 0.001 * (i % 3))).run() for i in range(5)]
    assert made[-1].verdict == "severe" and not made[-1].passed
    verdict = json.loads((made[-1].folder / "verdict.json").read_text())
    assert verdict["fail_on"] == "moderate" and verdict["runs"] == 14 and verdict["because"]
    lenient = measured(monkeypatch, pipeline(fail_on="never"), 1.5e-3).run()
    assert lenient.passed and lenient.verdict == "severe"


def test_a_broken_step_is_done_again(tmp_path, pipeline):
    def stop(step):
        if step == "measure":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline().run(stop)
    (kept,) = tmp_path.glob("running/*/validate.json")
    kept.write_text("{")
    with pytest.warns(UserWarning, match="set aside"):
        assert pipeline().run().passed


def test_another_program_of_the_name_starts_over(tmp_path, pipeline):
    def stop(step):
        if step == "measure":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline().run(stop)
    first = json.loads(next(tmp_path.glob("running/*/run.json")).read_text())["id"]
    assert pipeline(level="conservative").run().folder.name != first


def test_code_between_the_sites_is_part_of_the_program(tmp_path, pipeline, monkeypatch):
    """What a run that was stopped had measured is not taken for the time of what was written meanwhile."""

    def stop(step):
        if step == "measure":
            raise KeyboardInterrupt

    def other(x, w):
        from tests.core.pipeline_program import loss

        return loss(x, w) + 1

    first = pipeline()
    with pytest.raises(KeyboardInterrupt):
        first.run(stop)
    kept = json.loads(next(tmp_path.glob("running/*/run.json")).read_text())["id"]
    assert first.code != kpt.ProductionPipeline(other, first.session.inputs, store=tmp_path, budget=0, name="loss").code
    assert first.code == pipeline().code
    (tmp_path / "users_constants.py").write_text("LAYERS = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("users_constants")
    again = pipeline()
    with pytest.raises(KeyboardInterrupt):
        again.run(stop)
    assert again.code != first.code and json.loads(next(tmp_path.glob("running/*/run.json")).read_text())["id"] != kept


@pytest.mark.parametrize("found", ["[]", "{}"])
def test_a_step_that_is_none_of_ours(tmp_path, pipeline, found):
    (tmp_path / "running" / "loss").mkdir(parents=True)
    (tmp_path / "running" / "loss" / "run.json").write_text(found)
    began = []

    def stop(step):
        began.append(step)
        if step == "tune":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline().run(stop)
    assert began == ["detect", "plan", "tune"]


def test_no_name_leads_out_of_the_store(tmp_path, pipeline):
    (tmp_path / "store" / "running").mkdir(parents=True)
    (tmp_path / "store" / "kept").touch()
    pipe = pipeline(name="..")
    pipe.store = tmp_path / "store"

    def stop(step):
        if step == "tune":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe.run(stop)
    assert (tmp_path / "store" / "kept").exists()


def test_two_at_once(tmp_path, pipeline):
    with filelock.FileLock(tmp_path / "loss.lock"), pytest.raises(StoreError, match="Another process"):
        pipeline().run()


def test_a_store_that_is_a_file(tmp_path, pipeline):
    pipe = pipeline()
    (tmp_path / "file").touch()
    for pipe.store in (tmp_path / "file", tmp_path / "file" / "within"):
        with pytest.raises(StoreError, match="cannot be made"):
            pipe.run()


def test_what_is_refused(pipeline, tmp_path):
    with pytest.raises(ConfigError, match="fail_on"):
        pipeline(fail_on="always")
    with pytest.raises(ConfigError, match="no parameters"):
        pipeline(checkpoint_dir=tmp_path)


def test_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = tmp_path / "kpt.toml"
    config.write_text(f'[pipeline]\nfunction = "{PROGRAM}:loss"\ninputs = "{PROGRAM}:batch"\nstore = "runs"\nbudget = 0\nname = "my loss"\n')
    run = CliRunner().invoke(cli.app, ["pipeline", "run", str(config), "--json"])
    assert run.exit_code == 0, run.output
    told = json.loads(run.stdout)
    assert told["passed"] and Path(told["artifact"]).parent == tmp_path / "runs" / "artifacts" / "my_loss"


@pytest.mark.parametrize("text, says", [
    ("", "no [pipeline]"), ("[pipeline", "Expected"), ("[pipeline]\nfunction = 'a:b'", "'store'"),
    ("[pipeline]\nfunction = 'a:b'\ninputs = 'a:c'\nstore = 's'\nspeed = 3", "'speed'"),
    ("[pipeline]\nfunction = 3\ninputs = 'a:c'\nstore = 's'", "function is 3"),
    ("[pipeline]\nfunction = 'no_such_module:b'\ninputs = 'a:c'\nstore = 's'", "no_such_module"),
])  # fmt: skip
def test_a_file_that_is_wrong(tmp_path, text, says):
    config = tmp_path / "kpt.toml"
    config.write_text(text)
    run = CliRunner().invoke(cli.app, ["pipeline", "run", str(config)])
    assert run.exit_code == console.REFUSED and says in run.output.replace("\n", " "), run.output


def test_the_page_of_the_docs(tmp_path):
    """Its program and its file, run by its command, in a folder of their own."""
    page = (ROOT / "docs/pipeline.md").read_text()
    blocks = dict(re.findall(r"^```(python|toml)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    (tmp_path / "train.py").write_text(blocks["python"])
    (tmp_path / "kpt.toml").write_text(blocks["toml"])
    (command,) = re.findall(r"- run: kpt (.*)", page)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    ran = subprocess.run([sys.executable, "-m", "kpt.cli", *command.split()], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["passed"] and "8/8 artifact" in ran.stderr


def test_an_nnx_module_is_saved_by_orbax(tmp_path):
    from flax import nnx
    from orbax import checkpoint

    module = nnx.Sequential(nnx.RMSNorm(32, rngs=nnx.Rngs(0)), nnx.Linear(32, 16, rngs=nnx.Rngs(0)))
    made = kpt.ProductionPipeline(module, (np.ones((4, 32), np.float32),), store=tmp_path, checkpoint_dir=tmp_path / "saved", budget=0).run()
    found = checkpoint.StandardCheckpointer().restore(made.checkpoint)
    expected = nnx.to_pure_dict(nnx.state(module))
    np.testing.assert_array_equal(found["layers"]["1"]["kernel"], expected["layers"][1]["kernel"])
    assert made.report.measured == "as called"


def test_a_torch_module_is_saved_by_safetensors(tmp_path):
    import torch
    from safetensors.torch import load_model as load

    module = torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.Linear(32, 16))
    made = kpt.ProductionPipeline(module, (torch.ones(4, 32),), store=tmp_path, checkpoint_dir=tmp_path / "saved", budget=0).run()
    other = torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.Linear(32, 16))
    load(other, str(made.checkpoint / "model.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), other.state_dict().values(), strict=True))
    assert History(tmp_path).runs()[0].name == "Sequential"
