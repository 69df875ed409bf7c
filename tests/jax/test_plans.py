"""Plans are followed to the letter, and what is wrong is taken out, named, and nothing else."""

from __future__ import annotations

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import kpt_jax
from kpt.errors import ConfigError, GraphError, HardwareError, KptError, PlanError, ValidationError
from kpt.kernels import KernelSpec, registry
from kpt.strategy import Plan
from kpt.strategy.tune import to_time
from kpt_jax.planner import FRONT

D = 8


def normalised(x, w):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * w


def attend(q, k, v):
    return jax.nn.softmax(q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5, axis=-1) @ v


def fn(x, w):
    """Three norms with an attention after the second."""
    x = normalised(x, w[0])
    x = jnp.cos(normalised(jnp.tanh(x), w[1]))
    x = attend(x, x, jnp.sin(x))
    return jnp.sum(normalised(x, w[2]) ** 2)


def arrays(special=False):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, D)).astype(np.float32)
    if special:
        x[0, 0, 0] = SPECIAL
    return jnp.asarray(x), jnp.asarray(1 + 0.1 * rng.standard_normal((3, D)), jnp.float32)


SPECIAL = 77.0


def right(x, weight=None, eps=1e-6, weight_offset=0.0, out_dtype=None):
    y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps)
    return y if weight is None else y * (weight_offset + weight)


def wrong(x, **rest):
    return right(x, **rest) + 1e-2


def wrong_gradient(x, **rest):
    return right(x + 0.1 * (x - jax.lax.stop_gradient(x)), **rest)


def raising(x, **rest):
    raise RuntimeError("no such instruction")


def of_another_shape(x, **rest):
    return right(x, **rest)[..., :1]


def wrong_at_a_special_value(x, **rest):
    """Right on whatever a certificate draws."""
    return right(x, **rest) * jnp.where(jnp.any(x == SPECIAL), 1.1, 1.0)


@pytest.fixture
def kernel(monkeypatch):
    """Registers a function of this file as the only kernel for rms_norm; gives it a fresh name for each test."""
    monkeypatch.setattr(registry, "_kernels", {k: s for k, s in registry._kernels.items() if s.op != "rms_norm"})

    def register(function, version=1):
        monkeypatch.setitem(sys.modules, "kernels_of_this_test", sys.modules[__name__])
        spec = KernelSpec(f"rms_norm.{function.__name__}", "rms_norm", version, "test", "jax", ("cpu",),
                          f"kernels_of_this_test:{function.__name__}", ("float32",))  # fmt: skip
        registry.register(spec)
        return spec.name

    return register


def values_agree(fast, *args):
    got, want = jax.value_and_grad(fast, (0, 1))(*args), jax.value_and_grad(fn, (0, 1))(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max())), got, want)


@pytest.mark.parametrize("function, says", [
    (wrong, "disagrees with the original: .*result0"),
    (wrong_gradient, "disagrees with the original: .*gradient of dx"),
    (raising, "failed while it was certified: RuntimeError: no such instruction"),
    (of_another_shape, "failed while it was certified"),
])  # fmt: skip
def test_a_kernel_that_is_wrong_is_taken_out_and_named(kernel, function, says, caplog):
    name = kernel(function)
    fast = kpt_jax.optimize(fn)
    plan = fast.plan(*arrays())
    assert [s.op for s in plan.sites] == ["attention"]
    refused = [s for s in plan.skipped if s.op == "rms_norm"]
    assert len(refused) == 3
    for site in refused:
        assert name in site.reason
    import re

    assert re.search(says, refused[0].reason), refused[0].reason
    assert name in caplog.text
    values_agree(fast, *arrays())


def test_a_plan_made_elsewhere_swaps_exactly_what_it_names(kernel):
    kernel(right)
    plan = kpt_jax.plan(fn, *arrays())
    assert [s.op for s in plan.sites] == ["rms_norm", "rms_norm", "attention", "rms_norm"]
    for chosen in ([0], [1, 3], [2], [], [0, 1, 2, 3]):
        given = dataclasses.replace(plan, sites=tuple(plan.sites[i] for i in chosen))
        read = Plan.from_json(given.to_json())
        assert read == given
        fast = kpt_jax.optimize(fn, plan=read)
        got = fast.plan(*arrays())
        assert [s.path for s in got.sites] == [plan.sites[i].path for i in chosen]
        assert got.hash == given.hash
        left = {s.path: s.reason for s in got.skipped}
        assert all("has no such site here" in left[s.path] for i, s in enumerate(plan.sites) if i not in chosen)
        values_agree(fast, *arrays())


def test_a_plan_for_another_kernel_version_or_program_says_so(kernel):
    kernel(right)
    plan = kpt_jax.plan(fn, *arrays())
    other = tuple(dataclasses.replace(s, kernel="rms_norm.elsewhere") if s.op == "rms_norm" else s for s in plan.sites)
    got = kpt_jax.plan(fn, *arrays(), plan=dataclasses.replace(plan, sites=other))
    assert [s.op for s in got.sites] == ["attention"]
    assert all("rms_norm.elsewhere, which cannot be had here" in s.reason for s in got.skipped if s.op == "rms_norm")
    older = tuple(dataclasses.replace(s, version=9) for s in plan.sites)
    got = kpt_jax.plan(fn, *arrays(), plan=dataclasses.replace(plan, sites=older))
    assert len(got.sites) == len(plan.sites) and any("version 9" in n for n in got.notes)
    with pytest.raises(PlanError, match="torch"):
        kpt_jax.plan(fn, *arrays(), plan=dataclasses.replace(plan, framework="torch", sites=()))


@pytest.mark.parametrize(("given", "error", "says"), [
    ({"plan": "{}"}, PlanError, "Plan.from_json"),
    ({"plan": {"sites": []}}, PlanError, "Plan.load"),
    ({"plan": Plan("f", "balanced", "cpu", "torch")}, PlanError, "torch"),
    ({"hardware": "gtx"}, HardwareError, "gtx"),
    ({"hardware": None}, HardwareError, "NoneType"),
    ({"level": "reckless"}, ConfigError, "conservative"),
])  # fmt: skip
def test_what_cannot_be_followed_is_refused_at_once(given, error, says):
    with pytest.raises(error, match=says):
        kpt_jax.optimize(fn, **given)


def test_the_whole_finds_the_site_that_certificates_could_not(kernel, monkeypatch):
    monkeypatch.setenv("KPT_CERTIFY", "random")
    kernel(wrong_at_a_special_value)
    fast = kpt_jax.optimize(fn)
    before = fast.plan(*arrays(special=True))
    assert len(before.sites) == 4
    after = fast.certify(*arrays(special=True))
    assert [s.path for s in after.sites] == [s.path for s in before.sites[1:]]
    banned = next(s for s in after.skipped if s.path == before.sites[0].path)
    assert "a bisection found it" in banned.reason
    assert any(n.startswith("The whole function on example inputs: float32") for n in after.notes)
    values_agree(fast, *arrays(special=True))
    assert fast.plan(*arrays(special=True)).hash == after.hash


def test_the_whole_passes_what_is_right(kernel, monkeypatch):
    monkeypatch.setenv("KPT_CERTIFY", "random")
    kernel(right)
    fast = kpt_jax.optimize(fn)
    plan = fast.certify(*arrays())
    assert len(plan.sites) == 4 and "within tolerance" in plan.notes[-1]
    step = kpt_jax.optimize(lambda x, w: jax.grad(fn, 1)(x, w))
    assert len(step.certify(*arrays()).sites) == 4


def test_what_was_proved_on_an_example_is_proved_where_there_is_none(kernel, monkeypatch):
    name, proofs = kernel(right, version=77), []
    certify = type(FRONT).certify
    monkeypatch.setattr(type(FRONT), "certify", lambda self, *args, **rest: proofs.append(args) or certify(self, *args, **rest))
    fast = kpt_jax.optimize(fn)
    sites = fast.plan(*arrays()).sites
    made = len(proofs)
    assert made and name in {s.kernel for s in sites}
    jax.make_jaxpr(fast.without({sites[0].path: "It is left out."}))(*arrays())
    assert len(proofs) == made


def test_the_whole_of_a_function_that_is_not_deterministic_is_refused(monkeypatch):
    monkeypatch.setenv("KPT_CERTIFY", "random")
    count = iter(range(1, 1000))
    fast = kpt_jax.optimize(lambda x, w: fn(x, w) * next(count))
    with pytest.raises(ValidationError, match="with no kernel in place.*deterministic"):
        fast.certify(*arrays())


def headed(q, k, v):
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / jnp.sqrt(q.shape[-1])
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), v)


def test_kernels_are_not_planned_again():
    args = jax.random.normal(jax.random.key(0), (3, 2, 8, 2, 4))
    once = kpt_jax.optimize(headed)
    for fn in (once, lambda q, k, v: once(q, k, v) * 2, jax.grad(lambda q, k, v: once(q, k, v).sum())):
        (site,) = kpt_jax.plan(fn, *args).sites  # the user's own attention, and nothing of its kernel
        assert site.op == "attention" and site.source.startswith("test_plans.py")


def test_a_plan_for_another_function_says_what_it_misses():
    args = jax.random.normal(jax.random.key(0), (3, 2, 8, 2, 4))
    plan = kpt_jax.plan(headed, *args)
    other = kpt_jax.plan(lambda q, k, v: q + k + v, *args, plan=plan)
    assert any("names attention at attention0" in note and "does not have" in note for note in other.notes)
    assert "does not have" in other.explain()


def test_a_plan_for_other_hardware_names_its_kernels_and_runs_as_written_here(monkeypatch):
    monkeypatch.setattr("kpt.kernels.spec._installed", lambda package: "0.11.2")  # on every jax: the kernel is never loaded

    def normalised(x, w):
        mean = x.mean(-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-6) * w

    x, w = jnp.asarray(np.random.default_rng(0).normal(size=(4, 1024)), jnp.bfloat16), jnp.ones(1024, jnp.bfloat16)
    fast = kpt_jax.optimize(normalised, hardware="h100-sxm")
    (site,) = fast.plan(x, w).sites
    assert site.kernel == "layer_norm.pallas_gpu" and site.certificate is None
    assert "not run on this machine" in site.reason and "cuda" in site.reason
    np.testing.assert_array_equal(fast(x, w), jax.jit(normalised)(x, w))


def test_what_an_estimate_left_can_be_timed():
    """XLA makes one kernel of a rotation, and no estimate has one that is faster."""

    def program(x):
        angle = jnp.arange(x.shape[1])[:, None] * 10000.0 ** (-jnp.arange(0, 128, 2) / 128)
        cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
        a, b = jnp.split(x.astype(jnp.float32), 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)

    plan = kpt_jax.optimize(program, hardware="h100-sxm").plan(jnp.zeros((2, 256, 4, 128), "bfloat16"))
    left = [s for s in plan.skipped if "no kernel is estimated to be faster" in s.reason]
    assert [s.op for s in left] == ["rope"] and not plan.sites
    assert left[0].specs["x"].shape == (2, 256, 4, 128) and to_time(plan) == left


@pytest.mark.parametrize("of", [nnx.Linear, linen.Dense], ids=lambda c: c.__module__)
def test_a_class_is_no_model(of):
    with pytest.raises(KptError, match=rf"the class {of.__name__}\. .*Pass a model: {of.__name__}\(\.\.\.\)"):
        kpt_jax.optimize(of)


def test_a_branch_in_python_raises_as_under_jit_and_is_explained_where_a_plan_is_asked_for():
    """docs/troubleshooting.md, GraphError."""

    def branches(x):
        return x if x.sum() > 0 else -x

    fast, x = kpt_jax.optimize(branches), jnp.ones(3)
    for call in (fast, fast.plan, fast.explain):
        with pytest.raises(jax.errors.TracerBoolConversionError):
            call(x)
    with pytest.raises(GraphError, match="jax.lax.cond"):
        kpt_jax.plan(branches, x)


def test_a_plan_of_another_program_is_named_in_the_notes():
    """docs/troubleshooting.md, PlanError."""
    given = kpt_jax.plan(lambda x: normalised(x, 2.0), jnp.ones((4, D)))
    fast, x = kpt_jax.optimize(lambda x: jnp.tanh(x), plan=given), jnp.ones((4, D))
    np.testing.assert_allclose(fast(x), jnp.tanh(x))
    assert any("names rms_norm at rms_norm0" in note and "does not have" in note for note in fast.plan(x).notes)
