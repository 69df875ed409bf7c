"""The proof of a whole program on a GPU, as which the CPU counts here: as by NumPy, and with no more results alive than it needs."""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpt_jax
from kpt_jax import on_device
from kpt_jax.on_device import ROOM
from kpt_jax.whole import Reference, certify_whole
from tests.jax.test_on_device import close


def normalised(x, w):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * w


def step(weights, state, x):
    """New weights, new state, a loss: as much as goes in."""
    def loss(weights):
        for w in weights:
            x_ = normalised(x, w)
        return jnp.mean(x_**3)

    value, grads = jax.value_and_grad(loss)(weights)
    return [w - 0.1 * g for w, g in zip(weights, grads, strict=True)], [s + 1 for s in state], value


def mixed(x, w):
    """A result of each kind."""
    y = normalised(x, w)
    special = jnp.where(y > 1, jnp.inf, jnp.where(y < -1, jnp.nan, y))
    return y, y.astype("bfloat16"), y.astype("float16"), special, y > 0, y.argmax(-1), y[:0], y.sum(), jax.random.key(3)


def arrays(shape=(16, 32)):
    return jax.random.normal(jax.random.key(0), shape), jnp.linspace(0.5, 2, shape[-1])


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setenv("KPT_CERTIFY", "random")
    monkeypatch.setattr(on_device, "_PLATFORMS", ("cpu",))
    monkeypatch.setattr(on_device, "_FEW", 0)


def reference(fn, *args) -> tuple[Reference, kpt_jax.optimize.Optimized]:
    fast = kpt_jax.optimize(fn)
    return Reference(fast, args, {}, fast.plan(*args)), fast


@pytest.mark.parametrize("fn", [normalised, mixed])
def test_certificates_are_those_of_numpy(fn, monkeypatch):
    certificates = []
    for platforms in (("cpu",), ("gpu",)):
        monkeypatch.setattr(on_device, "_PLATFORMS", platforms)
        made, fast = reference(fn, *arrays())
        assert all(isinstance(x, jax.Array if platforms == ("cpu",) else np.ndarray) for x in made.want.values())
        certificates.append(made.compare(fast))
    for one, other in zip(certificates[0].checks, certificates[1].checks, strict=True):
        assert one.passed and other.passed and one.name == other.name
        close(one.metrics, other.metrics)


@pytest.mark.parametrize("shape", [(4, 8), (200, 64)])
def test_what_cancels_is_allowed_for(shape):
    half = np.random.default_rng(0).standard_normal(shape).astype("float32")
    x = jnp.concatenate([half, np.float32(1 + 1e-6) * -half])

    def left(x, w):
        return (x[: shape[0]] + x[shape[0] :]) * w

    made, _ = reference(left, x, jnp.ones(shape[-1]))
    assert made.compare(lambda x, w: left(x, w) + 1e-7).passed
    assert not made.compare(lambda x, w: left(x, w) + 1e-3).passed


@pytest.mark.parametrize("shape", [(4, 8), (200, 64)])
def test_what_moves_moves_as_far_as_by_numpy(shape, monkeypatch):
    sizes = []
    for platforms in (("cpu",), ("gpu",)):
        monkeypatch.setattr(on_device, "_PLATFORMS", platforms)
        moved = reference(normalised, *arrays(shape))[0].sensitivity
        sizes.append({n: m if isinstance(m, tuple) else (np.linalg.norm(m), m.max()) for n, m in moved.items()})
    assert sizes[0].keys() == sizes[1].keys() == {"result0", "d0", "d1"}
    for n, found in sizes[0].items():
        assert all(1 / 3 < x / y < 3 for x, y in zip(found, sizes[1][n], strict=True)), n  # of other draws


def test_what_was_compared_goes_and_nothing_comes_to_the_host(monkeypatch):
    weights, size = [jnp.full(4096, 1.0 + i) for i in range(8)], 4 * 4096
    args = weights, [jnp.zeros(4096) for _ in range(8)], jax.random.normal(jax.random.key(0), (2, 4096))
    made, fast = reference(step, *args)
    fetched, alive = [], []
    get, metrics = jax.device_get, ROOM.metrics

    def counted(*arrays):
        found = metrics(*arrays)
        gc.collect()
        alive.append(sum(x.nbytes for x in jax.live_arrays() if x.size == 4096) / size)
        return found

    monkeypatch.setattr(on_device.jax, "device_get", lambda tree: fetched.extend((x.size, x.dtype) for x in jax.tree.leaves(tree)) or get(tree))
    monkeypatch.setattr(type(ROOM), "metrics", lambda self, *arrays: counted(*arrays))
    gc.collect()
    gc.freeze()  # what other tests left is not looked through again each time
    try:
        passed, before = made.compare(fast).passed, len(alive)
        moved = made.sensitivity
    finally:
        gc.unfreeze()
    assert passed
    assert [a - alive[before - 1] for a in alive[:16]] == pytest.approx([16 - i for i in range(16)]), "one result less each time"
    assert moved and len(alive) > before
    assert fetched and all(dtype == "float64" for _, dtype in fetched), "figures alone"


def test_where_three_copies_have_no_room_the_originals_results_wait_on_the_host(monkeypatch):
    made, fast = reference(normalised, *arrays())
    compiled, tried = Reference._compiled, []

    def cramped(self, fn):
        run = compiled(self, fn)

        def tight(inputs):
            tried.append(fn)
            if any(isinstance(x, jax.Array) for x in self.want.values()):
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 11 GiB.")
            return run(inputs)

        return tight

    monkeypatch.setattr(Reference, "_compiled", cramped)
    assert made.compare(fast).passed and len(tried) == 2
    assert all(isinstance(x, np.ndarray) for x in made.want.values()) and made.sensitivity


@pytest.mark.parametrize("problem", ["RESOURCE_EXHAUSTED: Out of memory", "INTERNAL: illegal address"])
def test_what_does_not_run_does_not_agree(problem, monkeypatch):
    made, fast = reference(normalised, *arrays())

    def run(inputs):
        raise jax.errors.JaxRuntimeError(problem)

    made.run = None  # type: ignore[assignment]  # nor is the original run again for it
    monkeypatch.setattr(Reference, "_compiled", lambda self, fn: run)
    found = made.compare(fast)
    assert not found.passed and "was not computed" in found.checks[0].problem


def test_a_whole_step_is_proved():
    args = [jnp.ones(32)] * 3, [jnp.zeros(32)] * 3, arrays()[0]
    plan, worst = certify_whole(kpt_jax.optimize(step), args, {})
    assert plan.sites and worst < 1e-5 and "within tolerance" in plan.notes[-1]


def attending(weights, x):
    """Its gradient of the key's bias is 0 but for rounding: softmax does not see what is added to all scores of a query."""
    q, k, v = (x @ weights[n] + weights[f"{n}_bias"] for n in "qkv")
    return jnp.mean((jax.nn.softmax(q @ k.mT / 32**0.5) @ normalised(v, jnp.ones(32))) ** 2)


def adam(weights, x):
    """The first step: a gradient by its own size, of the key's bias a random one."""
    value, grads = jax.value_and_grad(attending)(weights, x)
    squares = jax.tree.map(lambda g: 0.001 * g * g, grads)
    return jax.tree.map(lambda w, g, s: w - 1e-3 * g / (jnp.sqrt(s / 0.001) + 1e-12), weights, grads, squares), squares, value


@pytest.mark.parametrize("fn", [attending, adam])
def test_what_is_rounding_alone_is_not_held_to_itself(fn):
    """Nor is it what the certificate tells: it would say that the gradient is off by as much as there is of it."""
    keys = iter(jax.random.split(jax.random.key(0), 4))
    weights = {n: jax.random.normal(next(keys), (32, 32)) / 6 for n in "qkv"} | {f"{n}_bias": jnp.zeros(32) for n in "qkv"}
    plan, worst = certify_whole(kpt_jax.optimize(fn), (weights, jax.random.normal(next(keys), (4, 64, 32))), {})
    assert plan.sites and not any("bisection" in s.reason for s in plan.skipped) and worst < 1e-3
    wrong = kpt_jax.optimize(fn)
    reference = Reference(wrong, (weights, x := jax.random.normal(jax.random.key(5), (4, 64, 32))), {}, wrong.plan(weights, x))
    found = reference.compare(lambda w, x: jax.tree.map(lambda a: a * (1 + 1e-3) if a.ndim > 1 or not a.ndim else a, fn(w, x)))
    assert not found.passed


def test_complex_results_are_refused_as_before():
    made, _ = reference(lambda x, w: jax.lax.complex(normalised(x, w), x), *arrays())
    told = made._beside({"result0": made.want["result0"]})
    assert told["result0"].__traceback__ is None, "whose frames would keep the array"
    assert "complex" in made._held(told).checks[0].problem
