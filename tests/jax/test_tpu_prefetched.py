"""What is known of the integers that a kernel reads, from a function's code and its arguments alone: nothing of the user's is run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kpt_jax.prefetched import prefetched
from kpt_jax.tpu import _scalars

X = jax.ShapeDtypeStruct((256, 128), jnp.float32)
N = np.array([3, 5], np.int32)


def kernel(n, x):
    def body(n_ref, x_ref, out_ref):
        out_ref[...] = x_ref[...] * n_ref[0]

    block = pl.BlockSpec((256, 128), lambda i, n: (0, 0))
    grid = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=(1,), in_specs=[block], out_specs=block)
    return pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), grid_spec=grid, name="scaled")(n, x)


def known(fn, *args):
    """The first operand of every call."""
    return [operands[0] if operands[0] is None else operands[0].tolist() for _, operands in prefetched(jax.make_jaxpr(fn)(*args), args)]


@pytest.mark.parametrize("fn, n, expected", [
    (kernel, N, [[3, 5]]),
    (kernel, jnp.asarray(N), [[3, 5]]),
    (kernel, N.astype(np.int64), [[3, 5]]),
    (kernel, jax.ShapeDtypeStruct((2,), jnp.int32), [None]),
    (lambda n, x: kernel(jnp.cumsum(n), x), N, [[3, 8]]),
    (lambda n, x: kernel(jnp.where(n > 4, n, 0), x), N, [[0, 5]]),
    (lambda n, x: kernel(jnp.searchsorted(n, jnp.arange(2) + 4).astype(jnp.int32), x), N, [[1, 1]]),  # a scan of integers
    (lambda n, x: kernel(n + x.sum().astype(jnp.int32), x), N, [None]),
    (lambda n, x: kernel(jnp.histogram(n, 2, (0, 6))[0].astype(jnp.int32), x), N, [[0, 2]]),  # counted in floats
    (jax.jit(kernel), N, [[3, 5]]),
    (lambda n, x: jax.lax.scan(lambda c, _: (kernel(n, c), None), x, None, length=3)[0], N, [[3, 5]]),
    (lambda n, x: jax.lax.scan(lambda c, m: (kernel(m, c), None), x, jnp.stack([n, n]))[0], N, [None]),
    (lambda n, x: jax.lax.scan(lambda c, _: ((c[0] + 1, kernel(c[0], c[1])), None), (n, x), None, length=3)[0][1], N, [None]),
    (lambda n, x: jax.lax.fori_loop(0, n[0], lambda _, c: kernel(n, c), x), N, [[3, 5]]),
    (lambda n, x: jax.lax.cond(n[0] > 2, lambda c: kernel(n, c), lambda c: kernel(n + 1, c), x), N, [[4, 6], [3, 5]]),
])  # fmt: skip
def test_what_is_known(fn, n, expected):
    assert known(fn, n, X) == expected


def test_a_kernel_whose_body_closes_over_its_references():
    """That of `pl.kernel` on a mesh of cores: a body is traced with references that are no arrays, and nothing is known of them."""
    if not hasattr(pltpu, "TensorCoreMesh"):
        pytest.skip("this jax has no pltpu.TensorCoreMesh")

    def meshed(n, x):
        @pl.kernel(out_type=x, mesh=pltpu.TensorCoreMesh(axis_name="core"), scratch_types=(pltpu.SMEM((2,), jnp.int32),))
        def doubled(n_ref, x_ref, out_ref, ids_ref):
            pltpu.sync_copy(n_ref, ids_ref)
            pltpu.sync_copy(x_ref, out_ref)

        return kernel(n, doubled(n, x))

    about = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=about)):
        assert known(meshed, N, X) == [[3, 5], [3, 5]]


def test_a_kernel_within_a_loop_that_gets_other_integers_is_another():
    """One name, twice: 3 turns outside, and in the loop what nobody knows. Neither is credited with the other's."""

    def both(n, x):
        return jax.lax.scan(lambda c, m: (kernel(m, c), None), kernel(n, x), jnp.stack([n + 9, n + 8]))[0]

    found = prefetched(jax.make_jaxpr(both)(N, X), (N, X))
    assert [name for name, _ in found] == ["scaled", "scaled"] and _scalars("scaled.1", found) == []


@pytest.mark.parametrize("fn, first", [
    (lambda k, x: kernel(N, x + jax.random.uniform(k, x.shape)), jax.random.key(0)),
    (lambda _, x: kernel(N, x + jax.random.uniform(jax.random.key(0), x.shape)), N),
    (lambda _, x: kernel(N, x + jax.random.normal(jax.random.PRNGKey(7), x.shape)), N),
])  # fmt: skip
def test_random_keys(fn, first):
    assert known(fn, first, X) == [[3, 5]]


def test_kernels_and_callbacks_of_known_integers_are_not_run():
    ran = []

    def add_one(x_ref, out_ref):
        out_ref[...] = x_ref[...] + 1

    def inner(c):
        return pl.pallas_call(add_one, out_shape=jax.ShapeDtypeStruct(c.shape, c.dtype), name="inner")(c)

    def asked(n):
        ran.append("pure")
        return n

    def fn(n, x):
        jax.debug.callback(lambda n: ran.append("debug"), n)
        looped = jax.lax.scan(lambda c, _: (inner(c), None), jnp.zeros((8, 128), jnp.int32), None, length=2)[0]
        until = jax.lax.while_loop(lambda c: c[0, 0] < 3, inner, looped)
        asked_for = jax.pure_callback(asked, jax.ShapeDtypeStruct((2,), jnp.int32), n)
        looped_call = jax.lax.scan(lambda c, _: (jax.pure_callback(asked, jax.ShapeDtypeStruct((2,), jnp.int32), c), None), n, None, length=2)[0]
        return kernel(asked_for + looped_call + until[0, :2], x)

    assert known(fn, N, X)[-1] is None and ran == []


def test_what_only_a_mesh_can_compute_is_not_known():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()

    def fn(n, x):
        return jax.shard_map(lambda n, x: kernel(n + jax.lax.axis_index("x"), x), mesh=mesh, in_specs=(spec, spec), out_specs=spec,
                             check_vma=False)(n, x)  # fmt: skip

    assert known(fn, N, X) == [None]
