"""From a program to an artifact that a release can rest on: planned, tuned, proved, measured, recorded and judged, step by step.

A step that is done is a file; a run that was interrupted goes on after the last of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import tomllib
import types
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kpt._version import __version__
from kpt.aside import set_aside
from kpt.auto import Report, Session, session
from kpt.errors import ConfigError, StoreError
from kpt.strategy import Plan
from kpt.tracking import History, Run, fingerprint, regressions
from kpt.tracking.history import Comparison
from kpt.tracking.run import commit
from kpt.tracking.statistics import SEVERITIES
from kpt.tuning.trials import seconds_of

STEPS = ("detect", "plan", "tune", "validate", "measure", "record", "gate", "artifact")
NEVER = "never"
_OURS = ("kpt", "kpt_jax", "kpt_torch", "pallas_kernels")
_FIELDS = ("function", "inputs", "level", "hardware", "budget", "store", "checkpoint_dir", "fail_on", "name")


@dataclasses.dataclass(frozen=True)
class Artifact:
    """What a run leaves.

    Attributes:
      folder: `plan.json`, `report.json`, `report.html`, `environment.json`, `tuning.json`, `verdict.json`; certificates are in the plan.
      report: as measured; `report.plan` is in force.
      verdict: of the gate: "unchanged", "not enough data", "faster", "minor", "moderate" or "severe".
      passed: whether the gate lets the run through.
      checkpoint: folder of the model's parameters; None without a `checkpoint_dir`.
    """

    folder: Path
    report: Report
    verdict: str
    passed: bool
    checkpoint: Path | None


class ProductionPipeline:
    """Detect, plan, tune, validate, measure, record, judge, and write the artifact.

    Args:
      fn_or_model, example_inputs: as `kpt.auto_optimize` takes them; a loss is measured with its backward pass, for training.
      level: "conservative", "balanced" or "aggressive".
      store: folder of the runs: their history, their artifacts, and the steps of a run under way.
      checkpoint_dir: where a model's parameters go, by orbax (`nnx.Module`) or safetensors (`torch.nn.Module`).
      hardware: as `kpt.auto_optimize` takes it.
      budget: for timing kernels: seconds, or "30s", "10m".
      fail_on: the least severity of a regression that fails the gate: "minor", "moderate", "severe" or "never".
      name: of the series of runs; the function's or the class's by default.

    Raises:
      ConfigError: `budget` or `fail_on` is none, or a function was given a `checkpoint_dir`.
      KptError: as `kpt.auto_optimize`.
    """

    def __init__(
        self,
        fn_or_model: Any,
        example_inputs: tuple,
        level: str | None = None,
        *,
        store: str | os.PathLike[str],
        checkpoint_dir: str | os.PathLike[str] | None = None,
        hardware: Any = "auto",
        budget: str | float = "30s",
        fail_on: str = "moderate",
        name: str | None = None,
    ):
        if fail_on not in (*SEVERITIES, NEVER):
            raise ConfigError(f"fail_on={fail_on!r} was given", f"It is {', '.join(SEVERITIES)} or {NEVER}", "Give one of them")
        self.name: str = name or str(getattr(fn_or_model, "__name__", type(fn_or_model).__name__))
        self.fail_on, self.budget = fail_on, seconds_of(budget)
        self.code = _code(fn_or_model)
        self.session: Session = session(fn_or_model, example_inputs, {}, level, hardware)
        if checkpoint_dir is not None and not self.session.saves:
            raise ConfigError(f"A checkpoint of {self.name} was asked for", "A function has no parameters of its own", "Give the model")
        self.store = Path(store)
        self.checkpoint_dir = None if checkpoint_dir is None else Path(checkpoint_dir)

    def run(self, began: Callable[[str], None] = lambda step: None) -> Artifact:
        """All steps, from where an interrupted run of this program stopped.

        Args:
          began: called with each step's name before it is done.

        Raises:
          StoreError: another process runs this pipeline now, or `store` cannot be made.
        """
        import filelock

        asked = f"The pipeline of {self.name} was started"
        try:
            self.store.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise StoreError(asked, f"{self.store} cannot be made: {problem.strerror}", "Name another store") from None
        try:
            with filelock.FileLock(self.store / f"{_filename(self.name)}.lock", timeout=0):
                return self._run(began)
        except filelock.Timeout:
            raise StoreError(asked, f"Another process runs it in {self.store}", "Wait for it, or name another store") from None

    def _run(self, began: Callable[[str], None]) -> Artifact:
        work = _Work(self.store / "running" / _filename(self.name))
        began("detect")
        plan = self.session.plan()
        at = commit()
        environment = {
            "kpt": __version__, "python": platform.python_version(), "machine": platform.node(), "system": platform.platform(),
            "hardware": self.session.hardware.name, "device": self.session.device, "versions": dict(plan.versions), "commit": at,
        }  # fmt: skip
        # What was done for another program, or elsewhere, is no part of this run.
        about = {"model": fingerprint(plan), "code": self.code, "level": plan.level, "environment": environment, "budget": self.budget}
        work.begin(hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest())
        work.step("detect", lambda: environment)
        began("plan")
        work.step("plan", lambda: json.loads(plan.to_json()))
        began("tune")
        tuned = work.step("tune", self._tuned)
        self.session.follow(tuned["dropped"])
        self.session.leave(tuned["left_out"])
        began("validate")
        proved = work.step("validate", lambda: _proved(*self.session.validate()))
        validated = Plan.from_json(json.dumps(proved["plan"]))
        self.session.follow({}, validated)
        began("measure")
        told = work.step("measure", lambda: json.loads(self.session.measure(validated, proved["error"], tuple(tuned["notes"])).to_json()))
        report = Report.from_json(json.dumps(told))
        began("record")
        history = History(self.store)
        recorded = work.step("record", lambda: self._recorded(history, report, plan, work.id, at))
        began("gate")
        judged = work.step("gate", lambda: self._judged(history, Run.from_json(recorded)))
        began("artifact")
        folder = self.store / "artifacts" / _filename(self.name) / work.id
        checkpoint = None if self.checkpoint_dir is None else self.checkpoint_dir / _filename(self.name) / work.id
        if not folder.exists():
            if checkpoint is not None:
                _whole(checkpoint, self.session.save)
            files = {"environment": environment, "tuning": tuned, "verdict": judged, "report": told}
            _whole(folder, lambda part: _write(part, files, report))
        work.end()
        return Artifact(folder, report, judged["verdict"], judged["passed"], checkpoint)

    def _tuned(self) -> dict[str, Any]:
        found = self.session.tune(self.budget)
        left_out, notes = self.session.leave_out(self.budget - found.seconds)
        return dataclasses.asdict(found) | {"left_out": dict(left_out), "notes": [*found.notes(), *notes]}

    def _recorded(self, history: History, report: Report, plan: Plan, id: str, at: str | None) -> dict[str, Any]:
        in_force = report.plan
        run = Run(
            self.name, report.seconds_after if report.kept else report.seconds_before, fingerprint(plan), report.measured, in_force.hash,
            memory=report.peak_memory[1], error=report.max_error, hardware=report.hardware, device=report.device,
            versions={"kpt": __version__, **in_force.versions}, commit=at, id=id,
        )  # fmt: skip
        history.put(run)  # which a run that was interrupted right here has done
        return run.to_json()

    def _judged(self, history: History, run: Run) -> dict[str, Any]:
        series = [r for r in history.runs(self.name) if r.series == run.series]
        found: Comparison | None = next(iter(regressions(series)), None)
        verdict = found.worst.verdict if found is not None else "not enough data"
        failing = SEVERITIES[SEVERITIES.index(self.fail_on) :] if self.fail_on != NEVER else ()
        reason = found.worst.reason if found is not None else "There are no earlier runs."
        return {"verdict": verdict, "passed": verdict not in failing, "fail_on": self.fail_on, "because": reason, "runs": len(series)}


class _Work:
    """The steps of a run under way: a folder, and a file for each that is done."""

    def __init__(self, folder: Path):
        self.folder, self.id = folder, ""

    def begin(self, key: str) -> None:
        """Goes on with what is there if it is of the same key; starts over otherwise."""
        found = self._load("run")
        if not isinstance(found, dict) or found.get("key") != key or "id" not in found:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            found = {"key": key, "id": uuid.uuid4().hex[:12]}
            self._store("run", found)
        self.id = found["id"]

    def step(self, name: str, do: Callable[[], Any]) -> Any:
        """What a step made, now or before."""
        found = self._load(name)
        if found is None:
            found = do()
            self._store(name, found)
        return found

    def end(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _load(self, name: str) -> Any:
        path = self.folder / f"{name}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as problem:
            set_aside(path, problem)
            return None

    def _store(self, name: str, value: Any) -> None:
        with tempfile.NamedTemporaryFile("w", dir=self.folder, suffix=".part", delete=False, encoding="utf-8") as part:
            json.dump(value, part, indent=1)
            part.flush()
            os.fsync(part.fileno())
        os.replace(part.name, self.folder / f"{name}.json")


def _whole(folder: Path, make: Callable[[Path], Any]) -> None:
    """Makes a folder, at once or not at all."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    make(part)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def _write(folder: Path, files: Mapping[str, Any], report: Report) -> None:
    folder.mkdir()
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    report.plan.save(folder / "plan.json")
    report.to_html(folder / "report.html")


def _proved(plan: Plan, error: float | None) -> dict[str, Any]:
    return {"plan": json.loads(plan.to_json()), "error": error}


def _filename(name: str) -> str:
    text = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
    return text if text.strip(".") else "_" * len(text)  # ".." is a folder, and not one of ours


def _code(program: Any) -> str:
    """Digest of what the program may be made of: its own text, and that of every module from outside of Python's own folders.

    The sites of a plan are not enough: what is slow may lie between them.
    """
    digest = hashlib.sha256()
    with contextlib.suppress(OSError, TypeError):  # typed into an interpreter
        digest.update(inspect.getsource(inspect.unwrap(program) if hasattr(program, "__qualname__") else type(program)).encode())
    installed = tuple({sysconfig.get_path(p) for p in ("stdlib", "platstdlib", "purelib", "platlib")})
    for name, module in sorted(sys.modules.items()):
        file = vars(module).get("__file__") if isinstance(module, types.ModuleType) else None
        # What we import meanwhile is no change; our version and the commit are in the environment.
        if isinstance(file, str) and not file.startswith(installed) and name.partition(".")[0] not in _OURS:
            with contextlib.suppress(OSError):
                digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def configured(path: Path, named: Callable[[str, str | None], tuple[Any, tuple]]) -> ProductionPipeline:
    """The pipeline that a TOML file describes; its relative paths are beside it.

        [pipeline]
        function = "train:loss"      # MODULE:FUNCTION, or a model
        inputs = "train:batch"       # MODULE:FUNCTION that returns the tuple of its arguments; none if `function` returns (program, inputs)
        store = "kpt-runs"

    Further keys are the other arguments of `ProductionPipeline`.

    Args:
      named: `named(function, inputs)` finds the two; inputs are None where the file names none.

    Raises:
      ConfigError: the file is missing, is no TOML, or its [pipeline] lacks a key or has one that is not known.
    """
    asked = f"The pipeline of {path} was asked for"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))["pipeline"]
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        advice = "Name a TOML file" if isinstance(problem, OSError) else "Mend what is no TOML"
        raise ConfigError(asked, getattr(problem, "strerror", None) or str(problem), f"{advice}; docs/pipeline.md has an example") from None
    except KeyError:
        raise ConfigError(asked, "It has no [pipeline]", "docs/pipeline.md has an example") from None
    if wrong := [k for k in table if k not in _FIELDS]:
        raise ConfigError(asked, f"[pipeline] has {wrong[0]!r}; it may have {', '.join(_FIELDS)}", "Correct the key")
    if missing := [k for k in ("function", "store") if k not in table]:
        raise ConfigError(asked, f"[pipeline] has no {missing[0]!r}", "docs/pipeline.md has an example")
    if wrong := [k for k, v in table.items() if not isinstance(v, str) and not (k == "budget" and type(v) in (int, float))]:
        raise ConfigError(asked, f"{wrong[0]} is {table[wrong[0]]!r}", "Give a text")
    target, inputs = named(table["function"], table.get("inputs"))
    folders = {k: path.parent / table[k] for k in ("store", "checkpoint_dir") if k in table}
    more = {k: v for k, v in table.items() if k not in ("function", "inputs", *folders)}
    return ProductionPipeline(target, inputs, **more, **folders)
