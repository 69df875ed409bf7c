"""Matching never raises, whatever the program, and takes time in proportion to its size."""



from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kpt.fusion.registry import FusionRegistry, default_fusion
from kpt_jax.capture import capture
from tests.jax.plain_kernels import rewritten
from tests.jax.spellings.structure import block

UNARY = [jnp.exp, jnp.tanh, jnp.negative, jnp.square, jnp.abs, jax.nn.relu, jax.nn.softmax, jax.nn.log_softmax, jax.lax.stop_gradient,
         jax.lax.rsqrt, jnp.sqrt, lambda x: x.astype(jnp.bfloat16), lambda x: x.astype(jnp.int32).astype(jnp.float32),
         lambda x: x.swapaxes(-1, -2), lambda x: x.reshape(x.shape[-1], -1).T.reshape(x.shape), lambda x: x.mean(-1, keepdims=True) + 0 * x,
         lambda x: x - x.max(-1, keepdims=True), lambda x: x / x.sum(-1, keepdims=True), lambda x: x * 0.5, lambda x: jnp.where(x > 0, x, -1e9),
         lambda x: x + jnp.where(jnp.tril(jnp.ones(x.shape[-2:], bool)), 0, -jnp.inf), lambda x: x[..., ::-1], lambda x: jnp.sort(x, -1),
         lambda x: jnp.concatenate([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1), lambda x: jnp.cumsum(x, -1),
         lambda x: jnp.take_along_axis(x, jnp.argmax(x, -1)[..., None], -1) + x, jax.jit(jnp.sin), jax.checkpoint(jnp.cos)]  # fmt: skip
BINARY = [jnp.add, jnp.subtract, jnp.multiply, lambda a, b: a / (1 + b * b), lambda a, b: a @ b.swapaxes(-1, -2) @ b, jnp.maximum,
          lambda a, b: jnp.einsum("bij,bkj->bik", a, b) @ b if a.shape[-1] == b.shape[-1] else a]  # fmt: skip


def random_program(rng):
    """A program of a few random ops on arrays [2, n, n], with any of its values returned."""
    steps = [(rng.random() < 0.4, int(rng.integers(len(UNARY))), int(rng.integers(len(BINARY))), rng.random(2)) for _ in range(12)]
    returned = rng.random(14) < 0.2

    def fn(x, y):
        values = [x, y]
        for two, one, other, (a, b) in steps:
            v, w = values[int(a * len(values))], values[int(b * len(values))]
            values.append((BINARY[other](v.astype(jnp.float32), w.astype(jnp.float32)) if two else UNARY[one](v)).astype(jnp.float32))
        return values[-1], *[v for v, r in zip(values, returned, strict=True) if r]

    return fn


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("block_of_seeds", range(5))
def test_random_programs_match_without_a_fault_and_run_the_same(size, block_of_seeds, caplog):
    for seed in range(block_of_seeds * 20, block_of_seeds * 20 + 20):
        rng = np.random.default_rng(seed)
        fn = random_program(rng)
        args = [jnp.asarray(rng.normal(size=(2, size, size)), jnp.float32) for _ in range(2)]
        found, fast = rewritten(fn, *args)
        assert not caplog.records, (seed, caplog.text)
        if not found.sites:
            continue
        for a, b in zip(fast(*args), fn(*args), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.max(jnp.abs(b), initial=1, where=jnp.isfinite(b))), err_msg=str(seed))


ODD = {
    "nothing": lambda x: (),
    "the input back": lambda x: x,
    "a constant": lambda x: jnp.float32(3),
    "no elements": lambda x: jax.nn.softmax(x[:0] @ x.T) @ x,
    "no keys": lambda x: jax.nn.softmax(x @ x[:0].T) @ x[:0],
    "a scalar": lambda x: jax.nn.softmax(x.sum() * jnp.ones(())[None]),
    "complex": lambda x: jnp.abs(jnp.fft.fft(x) * (1 + 2j)),
    "integers": lambda x: (x.astype(jnp.int32) @ x.astype(jnp.int32).T) // 3,
    "random bits": lambda x: x + jax.random.normal(jax.random.key(0), x.shape),
    "many powers": lambda x: sum(x**i for i in range(12)),
    "deep": lambda x: jax.lax.fori_loop(0, 3, lambda i, y: jax.lax.cond(y.sum() > 0, jnp.sin, lambda z: jax.jit(jnp.cos)(z), y), x),
    "long sum": lambda x: sum([x * float(i) for i in range(100)]),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_programs(name, caplog):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32)
    _, fast = rewritten(ODD[name], x)
    assert not caplog.records, caplog.text
    for a, b in zip(jax.tree.leaves(fast(x)), jax.tree.leaves(ODD[name](x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_faulty_pattern_is_logged_and_costs_nothing_else(caplog):
    def broken(program):
        yield from ()
        raise IndexError("off by one")

    closed = jax.make_jaxpr(jax.nn.standardize)(jnp.ones((3, 8)))
    _, taken, _ = FusionRegistry({"broken": broken, **default_fusion().patterns}).find(capture(closed, "fn"))
    assert [m.op for m in taken] == ["layer_norm"] and "broken" in caplog.text


def test_time_is_linear_in_the_size_of_the_program():
    """Sixteen times the layers take at most three times sixteen times as long (a quadratic matcher takes 256)."""
    def seconds(layers):
        def fn(x, g):
            for _ in range(layers):
                x = block(x, g)
            return x

        graph = capture(jax.make_jaxpr(fn)(jnp.ones((2, 12, 16)), jnp.ones(16)), "fn")
        times = []
        for _ in range(3):
            start = time.process_time()
            _, taken, _ = default_fusion().find(graph)
            times.append(time.process_time() - start)
        assert len(taken) == 2 * layers
        return min(times)

    assert seconds(64) < 3 * 16 * seconds(4)
