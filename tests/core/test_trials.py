"""Candidates timed in other processes: what fails, hangs or dies there costs itself alone."""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import threading
import time
import types

import pytest

import kpt
from kpt import ops
from kpt.errors import ConfigError
from kpt.kernels import KernelRegistry, KernelSpec
from kpt.kernels.estimate import estimate
from kpt.kernels.spec import ORIGINAL, original
from kpt.ops.base import Spec
from kpt.ops.mask import Causal, Mask
from kpt.strategy import planner
from kpt.strategy.plan import Plan, Site, differentiated
from kpt.strategy.tune import Runner, ahead, measured_again, to_time, tune
from kpt.tuning import Measurement, Measurements, export_json, import_json, settings, trials
from kpt.tuning.measurements import BOTH, FORWARD
from kpt.tuning.settings import Setting, variable
from kpt.tuning.trials import Outcome, Trial, run, seconds_of

PROCESS = "tests.core.trial_process"
X = {"x": Spec((64, 32), "float32"), "weight": Spec((32,), "float32")}
CPU = kpt.hardware_profile("cpu")
RUNNER = Runner("jax", CPU, ("jax", "jaxlib"), "cpu", PROCESS)


def trial(*kernels: str, rows: int = 64) -> Trial:
    specs = {**X, "x": Spec((rows, 32), "float32")}
    return Trial("rms_norm", specs, {"eps": 1e-6}, {k: f"{PROCESS}:{k}" for k in kernels}, FORWARD, "cpu")


@pytest.mark.parametrize("budget, seconds", [(3, 3), ("30s", 30), ("0.5 m", 30), ("500ms", 0.5), ("1h", 3600), ("7", 7), ("2min", 120)])
def test_budgets(budget, seconds):
    assert seconds_of(budget) == seconds


@pytest.mark.parametrize("budget", ["", "soon", "-1", "3 days", "nan", "inf", None])
def test_no_budgets(budget):
    with pytest.raises(ConfigError, match="30s"):
        seconds_of(budget)


def test_a_trial_travels():
    made = Trial("attention", {"q": Spec((1, 2, 3, 4), "bfloat16")}, {"mask": Mask((Causal(),)), "scale": None}, {"a": "b:c"}, BOTH, "cpu")
    made = dataclasses.replace(made, settings={"precision": "tf32"})
    assert Trial.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_the_faster_one_is_found():
    (found,) = run([trial("slow", "fast")], PROCESS, 60)
    times = {n: statistics.median(s) for n, s in found.seconds.items()}
    assert not found.dropped and 0.002 <= times["fast"] < times["slow"]


def test_what_fails_is_named_and_the_rest_goes_on():
    seen = []
    given = [trial("broken", "fast", "killed", "slow", "leaving", "hungry"), trial("fast", rows=128)]
    first, second = run(given, PROCESS, 120, done=lambda t, o: seen.append(t.specs["x"].shape[0]))
    assert set(first.seconds) == {"fast", "slow"} and set(second.seconds) == {"fast"} and seen == [64, 128]
    assert first.dropped["broken"] == "failed: ValueError: a block does not fit"
    assert "signal 9" in first.dropped["killed"]
    assert "exit code 3" in first.dropped["leaving"] and "what a compiler says last" in first.dropped["leaving"]
    assert "out of memory" in first.dropped["hungry"]


def test_what_hangs_is_stopped():
    start = time.monotonic()
    (found,) = run([trial("hanging", "fast")], PROCESS, 60, patience=2)
    assert found.dropped == {"hanging": "was not ready after 2 s"} and set(found.seconds) == {"fast"}
    assert time.monotonic() - start < 30


def test_one_that_dies_while_it_is_timed_ends_its_trial_and_no_other(caplog):
    first, second = run([trial("late", "fast"), trial("slow", rows=128)], PROCESS, 60)
    assert not first.seconds and not first.dropped and set(second.seconds) == {"slow"}
    assert "exit code 4" in caplog.text and "rms_norm" in caplog.text


def test_one_that_raises_while_it_is_timed_is_named():
    (found,) = run([trial("tired", "fast")], PROCESS, 60)
    assert set(found.seconds) == {"fast"} and "no memory beside the others" in found.dropped["tired"]


@pytest.mark.parametrize("foreign", [True, False])
def test_the_budget_ends_it(monkeypatch, foreign):
    """Another package's kernel that was under way may be one that hangs; ours would have needed longer. What had failed is named."""
    if not foreign:
        monkeypatch.setattr(trials, "foreign", lambda loader: False)
    start = time.monotonic()
    first, second = run([trial("broken", "hanging"), trial("fast")], PROCESS, 8.0)
    hangs = {"hanging": "was not ready when the budget of 8 s ended"} if foreign else {}
    assert first == Outcome({}, {"broken": "failed: ValueError: a block does not fit"} | hangs) and second is None
    assert 8 <= time.monotonic() - start < 20
    assert run([trial("fast")], PROCESS, 0) == [None]


def test_the_budget_is_for_trials_and_not_for_the_start_of_their_process(registry, folder, monkeypatch):
    """Importing a framework may take longer than the budget; so it may in the process after one that died."""
    monkeypatch.setenv("START_SECONDS", "3")
    registry.register(spec("killed"))
    del registry._kernels["rms_norm.hungry"]
    start = time.monotonic()
    found = tuned(a_plan(64), budget=3.0)
    assert (found.measured, found.left) == (1, 0) and set(found.dropped) == {"rms_norm.killed"}
    assert found.seconds < 3.5 and time.monotonic() - start > 6 + 0.9 * found.seconds


def test_the_second_pass_has_what_the_first_one_left(registry, folder, monkeypatch):
    """By the clock that the first one was timed by."""
    monkeypatch.setenv("START_SECONDS", "3")
    del registry._kernels["rms_norm.hungry"]
    found = ahead(a_plan(64).sites, RUNNER, "balanced", 3.0)
    assert (found.measured, found.left) == (2, 0) and found.seconds < 3.5


def test_a_process_whose_start_hangs_is_not_waited_for_again(monkeypatch, caplog):
    monkeypatch.setenv("START_SECONDS", "1000")
    monkeypatch.setattr(trials, "PATIENCE", 2.0)
    start = time.monotonic()
    assert run([trial("fast"), trial("fast", rows=128)], PROCESS, 1.0) == [Outcome({}, {}), None]
    assert "was not ready after 2 s" in caplog.text and 2 <= time.monotonic() - start < 10


def test_what_hangs_ends_with_who_asked():
    """`kill -9` of the program leaves no process behind that holds the device."""
    child = subprocess.Popen([sys.executable, "-m", PROCESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    late = threading.Timer(60, child.kill)
    late.start()
    with child:
        child.stdin.write(json.dumps([trial("hanging").to_json()]) + "\n")
        child.stdin.flush()
        assert "up" in child.stdout.readline() and "hanging" in child.stdout.readline()  # under way
        child.stdin.close()  # as the system does for a process that is killed
        assert child.wait() == 1
    late.cancel()


def test_a_process_that_does_not_start(registry, folder, caplog):
    (found,) = run([trial("fast")], "tests.core.no_such_module", 30)
    assert not found.seconds and not found.dropped and "No module named" in caplog.text
    made = tuned(a_plan(64), module="tests.core.no_such_module")
    assert (made.measured, made.failed, made.left) == (0, 1, 0) and "None of 1 kind of call could be timed" in made.notes()[0]


def spec(name: str, **more) -> KernelSpec:
    return KernelSpec(f"rms_norm.{name}", "rms_norm", 1, "test", "jax", ("cpu",), f"{PROCESS}:{name}", ("float32",), **more)


@pytest.fixture
def registry(monkeypatch):
    """`slow` looks better on paper."""
    made = KernelRegistry([spec("slow", efficiency=0.9), spec("fast", efficiency=0.8), spec("hungry", efficiency=0.7)])
    for module in (kpt.strategy.tune.kernel_room, planner.kernel_room):
        monkeypatch.setattr(module, "registry", made)
    monkeypatch.setattr("kpt.strategy.levels.process_registry", made)
    return made


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KPT_CACHE_DIR", str(tmp_path))
    return tmp_path


def a_plan(*rows: int) -> Plan:
    sites = tuple(Site("rms_norm", "rms_norm.slow", 1, f"rms_norm{i}", "model.py:1", "fast", params={"eps": 1e-6}, specs=trial(rows=n).specs)
                  for i, n in enumerate(rows))  # fmt: skip
    return Plan("f", "balanced", CPU.name, "jax", {}, sites)


def tuned(plan: Plan, **more):
    given = {"hardware": CPU, "trained": False, "budget": 60.0} | {n: v for n, v in more.items() if n not in ("module", "ready")}
    runner = dataclasses.replace(RUNNER, **{n: v for n, v in more.items() if n in ("module", "ready")})
    return tune(plan.sites, runner=runner, level="balanced", **given)


def test_tuning_a_plan_changes_later_choices(registry, folder):
    choose = planner.choose
    place = planner.place_of(CPU, ("jax", "jaxlib"))
    call = dict(hardware=CPU, level="balanced", framework="jax")
    before, why, _ = choose("rms_norm", X, {}, **call)
    assert before.name == "rms_norm.slow" and "not measured" in why
    found = tuned(a_plan(64, 64, 64, 4096))
    assert (found.measured, found.known, found.left) == (2, 0, 0) and set(found.dropped) == {"rms_norm.hungry"}
    assert [n.split(" in ")[0] for n in found.notes()][0] == "Kernels of 2 kinds of call were timed against each other,"
    assert "rms_norm.hungry is not used: it failed: MemoryError: out of memory." in found.notes()
    known = trials.known(Measurements(), place, registry.kernels(), X, {})
    assert set(known) == {"rms_norm.slow", "rms_norm.fast"}
    after, why, others = choose("rms_norm", X, {}, measurements=known, dropped=found.dropped, **call)
    assert after.name == "rms_norm.fast" and why.startswith("Measured ") and "rms_norm.slow" in why
    assert others["rms_norm.slow"].startswith("measured") and "out of memory" in others["rms_norm.hungry"]
    # Another driver or version of the compiler is another place.
    assert trials.known(Measurements(), dataclasses.replace(place, driver="1"), registry.kernels(), X, {}) == {}


def test_what_is_known_is_not_timed_again(registry, folder):
    del registry._kernels["rms_norm.hungry"]
    assert tuned(a_plan(64)).measured == 1
    again = tuned(a_plan(64), module="tests.core.no_such_module")
    assert (again.measured, again.known, again.dropped, again.notes()) == (0, 1, {}, ())


def test_without_a_budget_nothing_is_timed(registry, folder):
    found = tuned(a_plan(64, 4096), budget=0.0)
    assert (found.measured, found.left) == (0, 2) and not found.dropped
    assert "2 kinds of call, whose kernels are chosen by estimate" in found.notes()[0]
    assert not (folder / "tuning.sqlite").exists()


def test_kernels_that_another_process_cannot_find_are_not_dropped(registry, folder):
    for name in ("fast", "slow"):
        registry._kernels[f"rms_norm.{name}"] = dataclasses.replace(spec(name), loader=f"__main__:{name}")
    registry._kernels["rms_norm.hungry"] = dataclasses.replace(spec("hungry"), loader="made_in_a_notebook:hungry")
    found = tuned(a_plan(64))
    assert (found.measured, found.left, found.dropped) == (0, 0, {})


def test_one_kernel_needs_a_trial_where_another_package_brings_it(registry, folder):
    del registry._kernels["rms_norm.hungry"], registry._kernels["rms_norm.fast"]
    assert tuned(a_plan(64)).measured == 1
    again = tuned(a_plan(64), module="tests.core.no_such_module")
    assert (again.measured, again.known) == (0, 1)
    registry._kernels["rms_norm.slow"] = dataclasses.replace(spec("slow"), loader="pallas_kernels.rms_norm.xla:rms_norm")
    ours = tuned(a_plan(128), module="tests.core.no_such_module")
    assert (ours.measured, ours.known, ours.failed, ours.left) == (0, 0, 0, 0)


def test_one_kernel_that_hangs_is_dropped_and_named(registry, folder, monkeypatch):
    monkeypatch.setattr(trials, "PATIENCE", 2.0)
    for name in ("slow", "fast", "hungry"):
        del registry._kernels[f"rms_norm.{name}"]
    registry.register(spec("hanging"))
    found = tuned(a_plan(64))
    assert found.dropped == {"rms_norm.hanging": "was not ready after 2 s"} and found.failed == 1
    assert "rms_norm.hanging is not used: it was not ready after 2 s." in found.notes()


def test_measurements_count_only_for_what_was_estimated_best(registry):
    """A kernel that was never measured, and looks better, is not beaten by the absence of its measurement."""
    call = dict(hardware=CPU, level="balanced", framework="jax")
    found, why, _ = planner.choose("rms_norm", X, {}, measurements={"rms_norm.fast": 1.0, "rms_norm.hungry": 2.0}, **call)
    assert found.name == "rms_norm.slow" and "not measured" in why


def test_in_what_a_program_differentiates_backward_passes_are_timed_and_nothing_else_counts(registry, folder):
    """A training step returns no scalar loss, and its sites are trained all the same."""
    plan = a_plan(64)
    inside = dataclasses.replace(plan.sites[0], path="grad0/scan0/rms_norm0")
    met = []
    tuned(plan, done=lambda trial, outcome: met.append(trial.passes))
    place, kernels = planner.place_of(CPU, ("jax", "jaxlib")), registry.kernels()
    assert met == [FORWARD] and trials.known(Measurements(), place, kernels, X, {}) and not trials.known(Measurements(), place, kernels, X, {}, (BOTH,))
    both = dataclasses.replace(plan, sites=(*plan.sites, inside))
    tuned(both, done=lambda trial, outcome: met.append(trial.passes))
    assert met == [FORWARD, BOTH], "what is inside and outside is timed once"
    assert trials.known(Measurements(), place, kernels, X, {}, (BOTH,))


def test_a_name_is_no_gradient():
    assert differentiated("grad0/attention0") and differentiated("call0/grad12/scan0/attention0")
    assert not any(map(differentiated, ("", "attention0", "grad_norm0", "gradient_of/attention0", "layers.grad.0/attention0")))


def test_what_an_estimate_left_is_timed_last_and_taken_where_it_is_below_the_roofline_of_the_original(registry, folder):
    """An estimate is as good as the figures of its kernels: 5% of the peak for what was never timed."""
    for name in ("slow", "fast", "hungry"):
        registry._kernels[f"rms_norm.{name}"] = spec(name, efficiency=0.05)
    call = dict(hardware=CPU, level="balanced", framework="jax")
    before, why, others = planner.choose("rms_norm", X, {}, **call)
    assert before is None and "no kernel is estimated to be faster" in why and set(others) == set(registry._kernels)
    left = Site("rms_norm", ORIGINAL, None, "", "model.py:1", why, params={"eps": 1e-6}, specs=trial(rows=64).specs)
    plan = dataclasses.replace(a_plan(8), skipped=(left, dataclasses.replace(left, fingerprint="its proof failed"), dataclasses.replace(left, specs={})))
    assert to_time(plan) == [*plan.sites, left]
    order = []
    found = tune(to_time(plan), CPU, RUNNER, level="balanced", trained=False, budget=60.0, done=lambda trial, outcome: order.append(trial.specs["x"].shape[0]))
    assert (found.measured, order) == (2, [8, 64])  # the larger call is the one without a kernel
    own = estimate(original("rms_norm", "jax"), ops.op("rms_norm").cost, X, {}, CPU, "float32")
    for factor, name in ((0.9, "rms_norm.fast"), (1.1, None)):
        times = {"rms_norm.fast": factor * own, "rms_norm.slow": 2 * own}
        chosen, why, _ = planner.choose("rms_norm", X, {}, measurements=times, **call)
        assert (chosen and chosen.name) == name and ("the original is estimated at" in why) == (name is not None)


def test_a_verified_import_counts_and_an_unverified_one_does_not(registry, folder):
    place, table = planner.place_of(CPU, ("jax", "jaxlib")), Measurements()
    rows = [Measurement.of(place.key(k, X, {}, FORWARD), [1.0, 1.0]) for k in registry.kernels()]
    table.put(*(dataclasses.replace(m, origin="elsewhere", verified=False) for m in rows))
    assert trials.known(table, place, registry.kernels(), X, {}) == {}
    table.put(*rows)
    assert len(trials.known(table, place, registry.kernels(), X, {})) == 3


def clocks(**seconds: float):
    """A runner whose kernels take what they are said to take; no clock runs. One that is not named fails."""

    def ready(trial: Trial, kernel: str):
        taken = seconds[kernel.rpartition(".")[2]]
        return lambda repeats: taken

    return dataclasses.replace(RUNNER, ready=ready)


@pytest.fixture
def dial(monkeypatch):
    """Two settings of a framework and a variable, as the settings of a runner."""
    now = {"precision": "ieee", "threads": 4}

    def setting(name, **more):
        return Setting(name, lambda: now[name], lambda value: now.update({name: value}), now[name], **more)

    monkeypatch.setenv("FLAGS", "--dump=x")
    return now, (setting("precision", dtype="float32"), setting("threads", counts=False), variable("FLAGS", ("--dump",)))


def set_now(runner: Runner, known) -> Runner:
    return dataclasses.replace(runner, known=known, settings=settings.found(known))


def test_settings_of_the_program_are_set_in_the_process_that_times(dial):
    now, known = dial
    assert settings.found(known) == {}
    now |= {"precision": "tf32", "threads": 1}
    sent = settings.found(known)
    now |= {"precision": "ieee", "threads": 4}
    settings.put(known, sent)
    assert now == {"precision": "tf32", "threads": 1} and settings.found(known) == sent
    settings.put(known, {})  # the next trial may have none
    assert now == {"precision": "ieee", "threads": 4}


@pytest.mark.parametrize(
    ("dtype", "value", "flags", "apart"),
    [("float32", "tf32", "", ", precision=tf32"), ("bfloat16", "tf32", "", ""), ("float32", "ieee", "", ""),
     ("bfloat16", "tf32", "--b --dump=y --a", ", FLAGS=--a --b")],
)  # fmt: skip
def test_other_work_has_another_key(dial, monkeypatch, dtype, value, flags, apart):
    now, known = dial
    now |= {"precision": value, "threads": 1}
    monkeypatch.setenv("FLAGS", flags)
    plain, place = planner.place_of(CPU, ("jax",)), planner.place_of(CPU, ("jax",), known)
    specs = {"x": Spec((64, 32), dtype)}
    assert place.key(spec("fast"), specs, {}, FORWARD).framework == plain.framework + apart


def test_a_plan_chooses_by_what_was_measured_under_its_settings(registry, folder, dial):
    now, known = dial
    front = types.SimpleNamespace(framework="jax", compilers=("jax", "jaxlib"), settings=known)
    asking = planner.Planner(front, "balanced", CPU)
    now["precision"] = "tf32"
    tune(a_plan(64).sites, CPU, set_now(clocks(fast=1e-3, slow=5e-3, hungry=4e-3), known), level="balanced", trained=False, budget=60.0)
    assert len(asking._known("rms_norm", X, {})) == 3
    now["precision"] = "ieee"
    assert asking._known("rms_norm", X, {}) == {}


@pytest.mark.parametrize("in_this_process", [True, False])
def test_an_import_is_measured_again_under_its_own_settings(registry, folder, dial, monkeypatch, in_this_process):
    now, known = dial
    now |= {"precision": "tf32", "threads": 2}
    text = measured_there(set_now(clocks(fast=1e-3, slow=5e-3, hungry=4e-3), known), 64)
    now |= {"precision": "ieee", "threads": 1}
    asked = []

    def run(trials_, module, budget, done, up):
        asked.extend(trials_)
        return [Outcome({"rms_norm.fast": (1e-3,) * 9, "rms_norm.slow": (5e-3,) * 9}, {}) for _ in trials_]

    monkeypatch.setattr(trials, "run", run)
    ready = clocks(fast=1e-3, slow=5e-3, hungry=4e-3).ready if in_this_process else None
    runner = dataclasses.replace(set_now(RUNNER, known), ready=ready)
    told = import_json(Measurements(), text, functools.partial(measured_again, runner))
    if in_this_process:  # what is set here is its user's
        assert told.verified == 0 and "0 could be" in told.notes[0]
    else:
        assert told.verified == 3 and [t.settings for t in asked] == [{"precision": "tf32", "threads": 1}]


def test_an_import_under_other_flags_of_the_environment_is_not_measured(registry, folder, dial, monkeypatch):
    _, known = dial
    monkeypatch.setenv("FLAGS", "--fast-math")
    text = measured_there(set_now(clocks(fast=1e-3, slow=5e-3, hungry=4e-3), known), 64)
    monkeypatch.setenv("FLAGS", "")
    told = import_json(Measurements(), text, functools.partial(measured_again, set_now(RUNNER, known)))
    assert told.verified == 0 and "0 could be" in told.notes[0]


def measured_there(runner: Runner, *rows: int) -> str:
    """What another machine of the kind exports, on which kernels take as long as that runner says."""
    tune(a_plan(*rows).sites, CPU, runner, level="balanced", trained=False, budget=60.0)
    text = export_json(Measurements())
    Measurements().store.path.unlink()
    return text


@pytest.mark.parametrize(
    ("here", "used", "words"),
    [
        (clocks(fast=2e-3, slow=6e-3, hungry=3e-3), True, "5 of 7 calls were measured again here, with the same winner"),
        (clocks(fast=9e-3, slow=6e-3, hungry=3e-3), False, "rms_norm.fast won there, and rms_norm.hungry is 3.00x faster here"),
        (clocks(fast=2e-3, slow=6e-3), True, "with the same winner"),  # the third fails here
        (clocks(fast=2e-3), False, "5 of 7 calls were to be measured again, and 0 could be"),
    ],
)
def test_an_import_is_used_where_the_same_kernels_win_here(registry, folder, here, used, words):
    text = measured_there(clocks(fast=1e-3, slow=5e-3, hungry=4e-3), *(2**i for i in range(7)))
    told = import_json(Measurements(), text, functools.partial(measured_again, here))
    assert words in told.notes[0] and told.verified == (21 if used else 0)
    known = trials.known(Measurements(), here.place, registry.kernels(), {**X, "x": Spec((64, 32), "float32")}, {})
    assert bool(known) == used


def test_an_import_of_another_place_is_kept_and_not_used(registry, folder):
    text = measured_there(clocks(fast=1e-3, slow=5e-3, hungry=4e-3), 64)
    elsewhere = dataclasses.replace(clocks(fast=1e-3, slow=5e-3), hardware=kpt.hardware_profile("h100"))
    told = import_json(Measurements(), text, functools.partial(measured_again, elsewhere))
    assert told.notes[0].startswith("3 measurements of cpu") and "kept, not verified and not used; this machine is h100" in told.notes[0]
    assert told.verified == 0 and len(Measurements().all()) == 3


@pytest.mark.parametrize("call", [{}, {"op": "abacus", "specs": {}, "params": {}}, {"op": "rms_norm", "specs": {"x": 3}, "params": []},
                                  {"op": "rms_norm", "specs": {"x": {"$spec": [[8, 32], "float32"]}}, "params": {}}])  # fmt: skip
def test_a_call_that_is_not_that_of_its_row_is_not_measured(registry, folder, call):
    data = json.loads(measured_there(clocks(fast=1e-3, slow=5e-3, hungry=4e-3), 64))
    data["rows"] = [r | {"call": call} for r in data["rows"]]
    told = import_json(Measurements(), json.dumps(data), functools.partial(measured_again, clocks(fast=1e-3, slow=5e-3)))
    assert told.verified == 0 and "1 of 1 call was to be measured again, and 0 could be" in told.notes[0]


def test_in_this_process(registry, folder):
    from tests.core.trial_process import ready

    found = tuned(a_plan(64), ready=ready, module="tests.core.no_such_module")
    assert found.measured == 1 and set(found.dropped) == {"rms_norm.hungry"}


def test_what_runs_here_says_nothing_of_another_chip(registry, folder):
    found = tuned(a_plan(64), hardware=kpt.hardware_profile("tpu-v6e"))
    assert (found.measured, found.left, found.dropped, found.notes()) == (0, 0, {}, ()) and not (folder / "tuning.sqlite").exists()
