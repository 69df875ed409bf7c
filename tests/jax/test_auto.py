"""`kpt.auto_optimize`: measured side by side, and the original where nothing wins."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from typer.testing import CliRunner

import kpt
import kpt_jax
from kpt import cli, console
from kpt.auto import front_end
from kpt.errors import GraphError, InputError, KptError
from kpt.kernels import KernelSpec, registry
from kpt.ops.base import Spec
from kpt.tuning import gain, sigmas
from kpt.tuning.measurements import FORWARD
from kpt.tuning.trials import Trial
from kpt_jax import auto, trials
from kpt_jax.measure import Timing, sample


def normalised(x, w):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * w


def loss(x, w):
    return jnp.mean(normalised(x, w) ** 3)


def arrays():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal((64, 32)), jnp.float32), jnp.ones(32)


@pytest.fixture(autouse=True)
def without_example(monkeypatch):
    monkeypatch.setenv("KPT_CERTIFY", "random")


def timed(monkeypatch, **seconds):
    """The clock of the test: seconds by program; "rewrite" for that."""
    seen = {}

    def measure(programs, inputs):
        seen.update(programs)
        rng = np.random.default_rng(0)
        draw = {n: seconds["before"] if n == "original" else seconds["after"] for n in programs}
        return {n: Timing(tuple(s * rng.uniform(0.95, 1.05, 21)), 1000) for n, s in draw.items()}

    monkeypatch.setattr(auto, "measure", measure)
    return seen


def test_what_is_here_is_optimized_and_named_whatever_plans_are_for(monkeypatch):
    timed(monkeypatch, before=2.0, after=1.0)
    monkeypatch.setenv("KPT_HARDWARE", "h100")
    with pytest.warns(UserWarning, match="KPT_HARDWARE is h100-sxm; what is measured is this machine, cpu"):
        result = kpt.auto_optimize(loss, *arrays(), budget=0)
    assert result.report.hardware == result.plan.hardware == result.fn.plan(*arrays()).hardware == "cpu" and result.report.kept
    asked = kpt.auto_optimize(loss, *arrays(), budget=0, hardware="h100")
    assert (asked.report.hardware, asked.plan.hardware) == ("cpu", "h100-sxm")


def test_what_wins_is_kept(monkeypatch, tmp_path):
    timed(monkeypatch, before=2.0, after=1.0)
    result = kpt.auto_optimize(loss, *arrays())
    assert result.fn is not loss and result.model is result.fn
    assert [s.op for s in result.plan.sites] == ["rms_norm"] and result.report.kept
    assert 1.8 < result.report.speedup < 2.2 and 0 <= result.report.max_error < 1e-5
    worth = r"[12]\.\d\dx.* ± \d\.\d% standard error; kept if faster by more than \d+\.\d%"
    assert re.search(worth.replace("x.*", "x faster with a kernel at 1 site,"), result.plan.notes[-1]) and re.search(worth, repr(result))
    np.testing.assert_allclose(result.fn(*arrays()), loss(*arrays()), rtol=1e-5)
    data = json.loads(result.report.to_json())
    assert data["kept"] and data["plan"]["sites"] and len(data["seconds_before"]) == 21
    assert data["measured"] == "forward and backward"
    page = result.report.to_html(tmp_path / "report.html").read_text()
    assert re.search(r"<td>[12]\.\d\d ± \d\.\d% standard error; kept if faster", page) and ">through kpt</text>" in page
    assert ">1 site with a kernel, 0 left as written" in page and "<dt>site with a kernel</dt><dd>1</dd>" in page
    assert "rms_norm" in page and "as written" in page and "http" not in page.replace("http://www.w3.org", "")


def test_a_training_step_is_measured_with_the_gradients_that_it_takes(monkeypatch, tmp_path):
    timed(monkeypatch, before=2.0, after=1.0)
    result = kpt.auto_optimize(lambda x, w: jax.value_and_grad(loss, 1)(x, w), *arrays(), budget=0)
    assert result.report.measured == "as called" and "Measured as called, median" in result.plan.notes[-1]
    page = result.report.to_html(tmp_path / "report.html").read_text()
    assert "<td>as called, with the gradients that it takes itself</td>" in page


def test_one_program_is_told_by_its_plan(monkeypatch):
    """Two programs may take the same time. A report of an older version tells by its figures alone."""
    monkeypatch.setattr(auto, "measure", lambda programs, inputs: {n: Timing((1.0,) * 21, 1000) for n in programs})
    report = kpt.auto_optimize(loss, *arrays(), budget=0).report
    assert not report.one_program and not kpt.auto.Report.from_json(report.to_json()).one_program
    assert kpt.auto_optimize(jnp.sin, arrays()[0], budget=0).report.one_program
    older = json.loads(report.to_json())
    del older["one_program"]
    assert kpt.auto.Report.from_json(json.dumps(older)).one_program


@pytest.mark.parametrize("before, after", [(1.0, 1.0), (1.0, 1.5), (1.0, 0.999)])
def test_what_does_not_win_is_not_kept(monkeypatch, tmp_path, before, after):
    timed(monkeypatch, before=before, after=after)
    result = kpt.auto_optimize(loss, *arrays())
    assert result.fn is loss and not result.report.kept and result.report.speedup == 1.0
    assert not result.plan.sites and [s.op for s in result.plan.skipped] == ["rms_norm"]
    page = result.report.to_html(tmp_path / "report.html").read_text()
    assert "Passed" not in page and "0 sites with a kernel, 1 left as written" in page  # of what is not in it nothing is said
    assert re.search(r"The original is kept: nothing won by more than the noise .* standard error; kept if faster", result.plan.notes[-1])


@pytest.mark.parametrize("program", [loss, lambda x, w: jax.value_and_grad(loss, (0, 1))(x, w)])
def test_the_proof_runs_what_is_timed(program, monkeypatch):
    seen = timed(monkeypatch, before=2.0, after=1.0)
    assert kpt.auto_optimize(program, *arrays(), budget=0).report.kept
    assert seen.keys() == {"original", "rewrite"} and all(f._cache_size() == 1 for f in seen.values())


def test_a_result_goes_before_the_next_is_made():
    made, alive = [], []

    class State:
        pass

    def step():
        alive.append(sum(state() is not None for state in made))
        state = State()
        made.append(weakref.ref(state))
        return state

    assert sample(step, (), 3) > 0 and alive == [0, 0, 0]


def test_nothing_to_swap(tmp_path):
    """One program is measured, and shown."""
    plain = lambda x: jnp.sin(x)  # noqa: E731
    result = kpt.auto_optimize(plain, jnp.ones((4, 4)))
    assert repr(result.report).endswith(": as called; no site has a kernel")
    page = result.report.to_html(tmp_path / "report.html").read_text()
    assert page.count('<rect class="bar') == 2 and "through kpt" not in page and "standard error" not in page  # its time and its memory
    assert "no site has a kernel" in page and "Passed" not in page
    assert result.fn is plain and result.plan.notes == ("The original is kept: no site has a kernel.",)
    assert result.report.measured == "as called" and result.report.max_error is None


def test_the_real_clock_sees_a_kernel_that_is_slow(monkeypatch):
    """Two hundred matrix products beside one norm: no noise hides that."""
    import sys

    def slow(x, weight=None, eps=1e-6, weight_offset=0.0, out_dtype=None):
        y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps) * weight
        m = jnp.eye(256) * 0.999 + x[0, 0] * 1e-6
        for _ in range(200):
            m = m @ m
        return y + 0 * jnp.minimum(jnp.sum(m), 1.0)

    monkeypatch.setattr(registry, "_kernels", {k: s for k, s in registry._kernels.items() if s.op != "rms_norm"})
    module = type(sys)("slow_kernels")
    module.slow = slow
    monkeypatch.setitem(sys.modules, "slow_kernels", module)
    registry.register(KernelSpec("rms_norm.slow", "rms_norm", 1, "test", "jax", ("cpu",), "slow_kernels:slow", ("float32",)))
    result = kpt.auto_optimize(loss, *arrays())
    assert not result.report.kept and result.report.measured_speedup < 0.8
    assert result.report.memory_before > 0 and len(result.report.seconds_before) >= 9


class Net(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(32, rngs=rngs)

    def __call__(self, x):
        return self.norm(jnp.tanh(x))


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.RMSNorm()(jnp.tanh(x))


def test_models(monkeypatch):
    timed(monkeypatch, before=2.0, after=1.0)
    x = arrays()[0]
    net = Net(nnx.Rngs(0))
    result = kpt.auto_optimize(net, x)
    assert isinstance(result.model, Net) and [s.op for s in result.plan.sites] == ["rms_norm"]
    np.testing.assert_allclose(result.model(x), net(x), rtol=1e-5)
    model = Linen()
    variables = model.init(jax.random.key(0), x)
    result = kpt.auto_optimize(model, variables, x)
    assert isinstance(result.model, Linen) and [s.op for s in result.plan.sites] == ["rms_norm"]
    np.testing.assert_allclose(result.model.apply(variables, x), model.apply(variables, x), rtol=1e-5)


def test_a_number_without_a_derivative_is_measured_as_called(monkeypatch):
    def doubled(x, w):
        return jax.lax.while_loop(lambda c: c[1] < 3, lambda c: (c[0] * 2, c[1] + 1), (normalised(x, w).sum(), 0))[0]

    asked = timed(monkeypatch, before=1.0, after=2.0)
    assert kpt.auto_optimize(doubled, *arrays(), budget=0).report.measured == "as called" and asked


def test_results_that_are_no_arrays(monkeypatch):
    timed(monkeypatch, before=2.0, after=1.0)
    result = kpt.auto_optimize(lambda x, w: (normalised(x, w), None, "name"), *arrays(), budget=0)
    assert result.report.kept and result.fn(*arrays())[2] == "name"


def test_a_number_that_has_to_stay_a_number(monkeypatch):
    @functools.partial(jax.jit, static_argnames="times")
    def repeated(x, w, times):
        for _ in range(times):
            x = normalised(x, w)
        return x

    timed(monkeypatch, before=1.0, after=2.0)
    report = kpt.auto_optimize(repeated, *arrays(), times=2, budget=0).report
    assert len([s for s in (*report.plan.sites, *report.plan.skipped) if s.op == "rms_norm"]) == 2


def only_one(x):
    return jnp.mean(x)


def branches(x):
    return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("program", "inputs", "keywords", "words"),
    [(loss, (), {}, "missing 2 required positional arguments: 'x' and 'w'.*x, w"), (loss, (arrays(),), {}, "Unpack"),
     (only_one, ((jnp.ones(2),),), {}, "got <class 'tuple'>.*Unpack"), (loss, arrays(), {"bugdet": "10s"}, "bugdet may be budget"),
     (nnx.Linear(2, 2, rngs=nnx.Rngs(0)), (), {}, "inputs"), (linen.Dense(2), (), {}, "its_variables, inputs")],
)  # fmt: skip
def test_inputs_that_do_not_fit_say_what_to_do(program, inputs, keywords, words):
    with pytest.raises(InputError, match=f"(?s){words}") as raised:
        kpt.auto_optimize(program, *inputs, **keywords)
    assert str(raised.value.__cause__) in str(raised.value)
    if not keywords:
        with pytest.raises(InputError, match=f"(?s){words}"):
            kpt_jax.plan(program, *inputs)


def test_tensors_are_refused_where_the_program_is_of_jax():
    torch = pytest.importorskip("torch")
    for program, inputs in ((loss, (torch.ones(2, 2), torch.ones(2))), (linen.Dense(2), ({}, torch.ones(2)))):
        with pytest.raises(InputError, match="Pass arrays of JAX"):
            kpt.auto_optimize(program, *inputs)


def test_an_error_of_the_function_stays_its_own():
    def refuses(x):
        raise TypeError("vocabulary sizes differ")

    for run in (kpt.auto_optimize, kpt_jax.plan, lambda f, x: kpt_jax.optimize(f)(x)):
        with pytest.raises(TypeError, match="^vocabulary sizes differ") as raised:
            run(refuses, jnp.ones(2))
        assert not isinstance(raised.value, KptError)


@pytest.mark.parametrize("run", [kpt.auto_optimize, kpt_jax.plan])
def test_a_branch_on_a_traced_value_says_what_to_do(run):
    with pytest.raises(GraphError, match=r"(?s)boolean conversion of traced array.*jax\.lax\.cond or jax\.numpy\.where") as raised:
        run(branches, jnp.ones(3))
    assert isinstance(raised.value.__cause__, jax.errors.TracerBoolConversionError)


def test_front_ends():
    assert front_end(loss, ()) == "kpt_jax"
    with pytest.raises(KptError, match="int"):
        kpt.auto_optimize(3)


def test_the_gain_and_its_error():
    rng = np.random.default_rng(1)
    ratios = [gain(2 * rng.lognormal(0, 0.1, 101), rng.lognormal(0, 0.1, 101)) for _ in range(200)]
    middles = np.array([m for m, _ in ratios])
    errors = np.array([e for _, e in ratios])
    assert abs(middles.mean() - np.log(2)) < 0.01
    assert 0.8 < errors.mean() / middles.std() < 1.25


@pytest.mark.parametrize("rounds", [9, 20, 101])
def test_chance_wins_seldom_however_few_the_rounds(rounds):
    logs = np.random.default_rng(0).normal(0, 0.05, (4000, 2, rounds))
    won = [gain(*np.exp(pair)) for pair in logs]
    assert np.mean([w > sigmas(rounds) * noise for w, noise in won]) <= 1 / 250  # 1/700, and what 4000 draws may differ from it


def test_importing_kpt_auto_imports_no_framework():
    import subprocess
    import sys

    code = "import kpt, sys; kpt.auto_optimize; assert not {'jax', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def rms_norm_kernel(name, function, efficiency):
    return KernelSpec(f"rms_norm.{name}", "rms_norm", 1, "test", "jax", ("cpu",), f"tests.slow_kernels:{function}", ("float32",),
                      arrays=frozenset({"x", "weight"}), efficiency=efficiency)  # fmt: skip


@pytest.mark.slow
def test_a_kernel_that_loses_beside_one_that_wins_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setenv("KPT_CACHE_DIR", str(tmp_path))
    # It loses tenfold at the least; what a busy machine does to a median is less than threefold.
    monkeypatch.setattr("kpt.strategy.leave_out.gain", lambda before, after: (gain(before, after)[0], math.log(3)))
    monkeypatch.setattr("kpt.strategy.leave_out.sigmas", lambda count: 1.0)
    monkeypatch.setattr(registry, "_kernels", {k: s for k, s in registry._kernels.items() if s.op != "rms_norm"})
    registry.register(rms_norm_kernel("late_at_32", "rms_norm_late_at_32", 1.0))
    timed(monkeypatch, before=2.0, after=1.0)

    def both(x, w, wide, v):
        return loss(x, w) + loss(wide, v)

    given = *arrays(), jnp.linspace(-1, 2, 64 * 48).reshape(64, 48), jnp.ones(48)
    result = kpt.auto_optimize(both, *given, budget="200s")
    (site,), (left,) = result.plan.sites, result.plan.skipped
    assert site.specs["x"].shape == (64, 48) and site.certificate is not None and result.report.kept
    assert left.specs["x"].shape == (64, 32) and re.search("Measured: the program is .*% faster without rms_norm.late_at_32", left.reason)
    assert any(n.startswith("rms_norm (1 site): left as written, the program is") for n in result.plan.notes)
    assert any(n.startswith("The whole function on example inputs") for n in result.plan.notes)
    np.testing.assert_allclose(result.fn(*given), both(*given), rtol=1e-5)
    assert len(kpt.auto_optimize(both, *given, budget=0).plan.sites) == 2, "nothing is left out where there is no time to find out"


@pytest.fixture
def with_slow(monkeypatch, tmp_path):
    """A kernel that is said to be the best and is not, one that hangs, and where measurements go."""
    monkeypatch.setenv("KPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(registry, "_kernels", dict(registry._kernels))
    monkeypatch.setattr("kpt.tuning.trials.PATIENCE", 20.0)
    registry.register(rms_norm_kernel("slow", "rms_norm", 1.0))


def test_candidates_are_timed_and_the_faster_one_is_taken(with_slow):
    before = kpt_jax.plan(loss, *arrays())
    assert [s.kernel for s in before.sites] == ["rms_norm.slow"] and "not measured" in before.sites[0].reason
    result = kpt.auto_optimize(loss, *arrays())
    after = kpt_jax.plan(loss, *arrays())
    assert [s.kernel for s in after.sites] == ["rms_norm.xla"] and after.sites[0].reason.startswith("Measured ")
    assert "measured" in after.sites[0].alternatives["rms_norm.slow"]
    assert any("Kernels of 1 kind of call were timed" in n for n in result.plan.notes)
    again = kpt.auto_optimize(loss, *arrays())
    assert not any("were timed" in n for n in again.plan.notes)


@pytest.mark.slow
def test_a_kernel_that_hangs_is_dropped_and_named(with_slow):
    registry.register(rms_norm_kernel("hanging", "hanging", 1.0))
    result = kpt.auto_optimize(loss, *arrays(), budget="100s")
    assert any(n.startswith("rms_norm.hanging is not used: it was not ready after 20 s") for n in result.plan.notes)
    assert all(s.kernel != "rms_norm.hanging" for s in result.plan.sites)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_trial_is_of_the_dtype_that_it_says(dtype):
    specs = {"x": Spec((8, 16), dtype), "weight": Spec((16,), dtype)}
    trial = Trial("rms_norm", specs, {"eps": 1e-6}, {"rms_norm.xla": registry.get("rms_norm.xla").loader}, FORWARD, "cpu")
    ready = trials.ready(trial, "rms_norm.xla")
    (given,) = ready.args[1]
    assert {a.dtype.name for a in given.values()} == {dtype} and ready(1) > 0


def test_without_a_budget_nothing_is_timed(with_slow, tmp_path):
    result = kpt.auto_optimize(loss, *arrays(), budget=0)
    assert any("chosen by estimate" in n for n in result.plan.notes) and not (tmp_path / "tuning.sqlite").exists()
    with pytest.raises(KptError, match="30s"):
        kpt.auto_optimize(loss, *arrays(), budget="soon")


def test_the_next_kernel_takes_the_place_of_a_wrong_one(with_slow):
    registry.register(rms_norm_kernel("wrong", "wrong", 1.0))
    del registry._kernels["rms_norm.slow"]
    (site,) = kpt_jax.plan(loss, *arrays()).sites
    assert site.kernel == "rms_norm.xla" and "disagrees with the original" in site.alternatives["rms_norm.wrong"]


def test_one_that_cannot_be_imported_costs_no_run(with_slow, tmp_path, monkeypatch):
    (tmp_path / "without_its_driver.py").write_text("raise RuntimeError('no driver')")
    monkeypatch.syspath_prepend(tmp_path)
    registry.register(rms_norm_kernel("wrong", "wrong", 1.0))
    registry.register(dataclasses.replace(rms_norm_kernel("driver", "", 0.99), loader="without_its_driver:rms_norm"))
    del registry._kernels["rms_norm.slow"]
    (site,) = kpt_jax.plan(loss, *arrays()).sites
    assert site.kernel == "rms_norm.xla" and "cannot be loaded: no driver" in site.alternatives["rms_norm.driver"]


class Counting:
    """A kernel that is an object: equal to every other, and not hashable."""

    def __init__(self, times: float):
        self.times, self.traced = times, 0

    def __eq__(self, other):
        return isinstance(other, Counting)

    def __call__(self, *, x, weight, eps, **_):
        self.traced += 1
        return (self.times * x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * weight,)


def test_a_kernel_is_traced_once_for_sites_alike_and_taken_for_no_other(monkeypatch):
    """Under other settings of jax they are not alike."""
    monkeypatch.setenv("KPT_CERTIFY", "off")
    normed = lambda x, w: sum(loss(y, w) for y in (x, x + 1, x + 2))  # noqa: E731
    for times in (1.0, 2.0):
        kernel = Counting(times)
        monkeypatch.setattr(registry, "load", lambda spec, kernel=kernel: kernel)
        np.testing.assert_allclose(kpt_jax.optimize(normed)(*arrays()), times**3 * normed(*arrays()), rtol=1e-5)
        assert kernel.traced == 1
        with jax.default_matmul_precision("highest"):
            kpt_jax.optimize(normed)(*arrays())
        assert kernel.traced == 2


@pytest.mark.slow
def test_kpt_tune_goes_on_where_it_was_and_is_believed_elsewhere(with_slow, tmp_path, monkeypatch):
    command = ["tune", "--op", "rms_norm", "--budget", "60s", "--json"]
    first, again = (json.loads(CliRunner().invoke(cli.app, command).stdout) for _ in range(2))
    assert first["measured"] == 2 and first["known"] == first["left"] == 0 and not first["dropped"]  # two passes
    assert again["measured"] == 0 and again["known"] == 2
    moved = CliRunner().invoke(cli.app, ["tune", "export", str(tmp_path / "here.json")])
    monkeypatch.setenv("KPT_CACHE_DIR", str(tmp_path / "elsewhere"))
    moved = CliRunner().invoke(cli.app, ["tune", "import", str(tmp_path / "here.json")])
    assert moved.exit_code == 0 and "used; 2 of 2 calls were measured again here, with the same winner." in moved.output
    assert json.loads(CliRunner().invoke(cli.app, command).stdout)["known"] == 2
    shown = CliRunner().invoke(cli.app, ["tune", "--op", "layer_norm"])
    assert shown.exit_code == 0 and "nothing to compare" in shown.output
    assert CliRunner().invoke(cli.app, ["tune", "--op", "abacus"]).exit_code == console.REFUSED
