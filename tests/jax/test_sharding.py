"""Sharded arrays through optimized functions: same numbers, same shardings, no tensor gathered that need not be."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import kpt_jax
from kpt_jax.both_modes import both_modes
from tests.jax.certified import EIGHT_DEVICES
from tests.jax.explicit_program import ALL as EXPLICIT

PROGRAM = pathlib.Path(__file__).with_name("sharded_program.py")
CASES = {
    "attention over batch": "attention",
    "attention over batch and heads": "attention",
    "attention over sequence": "attention",
    "long attention over sequence": "attention",
    "attention in shard_map": "attention",
    "norm over batch and sequence": "rms_norm",
    "norm over features": "rms_norm",
    "mlp over batch": "linear_act",
    "mlp over columns and rows": "linear_act",
    "loss over batch and sequence": "cross_entropy",
}


IN_SHARD_MAP = [
    f"{name}, {where}, check_vma={checked}"
    for name in ("rms_norm", "attention", "linear with silu", "rule in a rule", "psum", "scan", "replicated", "cast")
    for where in ("inside", "outside")
    for checked in ((True,) if name == "cast" else (True, False))
]


def lines_of(program: str, certify: str) -> dict[str, dict]:
    root = PROGRAM.parents[2]
    env = os.environ | {
        "XLA_FLAGS": EIGHT_DEVICES,
        "JAX_PLATFORMS": "cpu",
        "KPT_CERTIFY": certify,
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(PROGRAM.with_name(program))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, f"after {[x['case'] for x in lines]}: {done.stderr[-3000:]}"
    return {x["case"]: x for x in lines}


@pytest.fixture(scope="module")
def outcomes():
    return lines_of("sharded_program.py", "off")


@pytest.fixture(scope="module")
def in_shard_map():
    return lines_of("shard_map_program.py", "random")


@pytest.fixture(scope="module")
def explicit():
    return lines_of("explicit_program.py", "random")


@pytest.mark.parametrize(("name", "mesh"), EXPLICIT)
def test_explicit_shardings(explicit, name, mesh):
    """Found and certified; the program has compared numbers and shardings, gradients taken outside and inside."""
    found = explicit[f"{name}, over {mesh}"]
    assert found["ops"] == [name.split(",")[0]] and found["certified"]


@pytest.mark.parametrize(("case", "op"), CASES.items(), ids=CASES)
def test_sharded(outcomes, case, op):
    """The program has compared the numbers."""
    found = outcomes[case]
    assert found["ops"] == [op]
    assert found["same sharding"]
    if found["no gather expected"]:
        plain, swapped, plain_backward, swapped_backward = found["gathered"]
        assert swapped <= plain and swapped_backward <= plain_backward, found


@pytest.mark.parametrize("case", IN_SHARD_MAP)
def test_in_shard_map(in_shard_map, case):
    """Found and certified, whichever way the two are nested; the program has compared the numbers."""
    found = in_shard_map[case]
    assert found["swapped"] == [found["op"]] and found["certified"], found["why"]


def test_a_site_in_shard_map_is_proved_where_a_mesh_is_set(monkeypatch):
    """Arrays that jax makes under it are of the mesh, and meet none that the site's own code made among manual axes."""
    monkeypatch.setenv("KPT_CERTIFY", "random")
    mesh, spec = Mesh(np.array(jax.devices()[:1]), ("i",)), PartitionSpec("i")

    def attention(x):
        return jnp.einsum("bts,bsd->btd", jax.nn.softmax(jnp.einsum("btd,bsd->bts", x, x) / 2, -1), x)

    with jax.set_mesh(mesh):
        (site,) = kpt_jax.plan(jax.shard_map(attention, mesh=mesh, in_specs=spec, out_specs=spec), jnp.ones((2, 6, 4))).sites
    assert site.path == "shard_map0/attention0" and site.certificate is not None


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f])
def test_a_site_in_shard_map_one_of_whose_results_is_not_used(jit):
    def original(x):
        return [jnp.sin(x), jnp.cos(x)]

    kernel = jax.custom_vjp(original)
    kernel.defvjp(lambda x: (original(x), x), lambda x, ct: (jnp.cos(x) * ct[0] - jnp.sin(x) * ct[1],))
    site = both_modes(kernel, original, [0])
    mesh, spec = Mesh(np.array(jax.devices()[:1]), ("i",)), PartitionSpec("i")

    def loss(x):
        return jnp.sum(jax.shard_map(lambda x: site(x)[0], mesh=mesh, in_specs=spec, out_specs=spec)(x))

    x = jnp.arange(4.0)
    np.testing.assert_array_equal(jit(jax.grad(loss))(x), jit(jnp.cos)(x))


def test_a_program_that_needs_explicit_shardings_is_traced_with_them():
    mesh = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Explicit,))
    rows, spec = jnp.arange(32.0).reshape(4, 8), PartitionSpec("i")

    def loss(w, x):
        return jnp.sum(x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w)

    def step(w, x):
        x = jax.shard_map(lambda x: 2 * x, in_specs=spec, out_specs=spec)(x)
        return w - jax.grad(loss)(w, x)

    with jax.set_mesh(mesh):
        x, w = jax.device_put(rows, NamedSharding(mesh, spec)), jnp.ones(8)
        fast = kpt_jax.optimize(step)
        assert [s.path for s in fast.plan(w, x).sites] == ["grad0/rms_norm0"]
        np.testing.assert_allclose(fast(w, x), step(w, x), rtol=1e-6)
