"""rope in plain JAX against float64: both layouts, partial rotation, tables shared by the batch or not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.rope.xla import rope
from tests.jax.certified import certify, kept, mesh_of_one, specs_of

B, T, N, H = 2, 5, 3, 8
CASES = {
    "shared tables": dict(x=(B, T, N, H), cos=(1, T, H), sin=(1, T, H)),
    "tables of each example": dict(x=(B, T, N, H), cos=(B, T, H), sin=(B, T, H)),
    "batch of one": dict(x=(1, T, N, H), cos=(1, T, H), sin=(1, T, H)),
    "a part of the head": dict(x=(B, T, N, H + 3), cos=(1, T, H), sin=(1, T, H)),
    "one pair": dict(x=(B, T, N, 2), cos=(1, T, 2), sin=(1, T, 2)),
    "nothing turns": dict(x=(B, T, N, H), cos=(1, T, 0), sin=(1, T, 0)),
    "no tokens": dict(x=(B, 0, N, H), cos=(1, 0, H), sin=(1, 0, H)),
    "no batch": dict(x=(0, T, N, H), cos=(1, T, H), sin=(1, T, H)),
    "float32 tables": dict(x=(B, T, N, H), cos=((1, T, H), "float32"), sin=((1, T, H), "float32")),
}


@pytest.mark.parametrize(("interleaved", "dtype"), [(False, "float32"), (True, "bfloat16"), (False, "float16")])
@pytest.mark.parametrize("case", CASES)
def test_numbers(case, interleaved, dtype):
    certify("rope", specs_of(dtype, **CASES[case]), {"interleaved": interleaved})


def test_float64_stays_float64(x64):
    certify("rope", specs_of("float64", **CASES["a part of the head"]), {})


def test_result_in_another_dtype():
    certify("rope", specs_of("bfloat16", **CASES["a part of the head"]), {"out_dtype": "float32"})


def arrays(dtype=jnp.float32):
    angle = jnp.arange(T)[None, :, None] * 0.3 ** jnp.arange(H // 2)
    angle = jnp.concatenate([angle, angle], -1)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, N, H)), dtype)
    return x, jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def test_the_backward_pass_turns_back():
    x, cos, sin = arrays()
    y, pull = jax.vjp(lambda x: rope(x=x, cos=cos, sin=sin), x)
    np.testing.assert_allclose(pull(y)[0], x, rtol=1e-5, atol=1e-6)


def test_keeps_the_tables_alone_where_they_are_constants():
    x, cos, sin = arrays()
    pull = jax.vjp(lambda x: rope(x=x * 2, cos=cos, sin=sin), x)[1]
    assert sum(a.size for a in jax.tree.leaves(pull)) < x.size
    assert kept(rope, x=x, cos=cos, sin=sin) == 0


def test_one_table_with_a_gradient():
    """The gradient of cos is the same whether or not sin has one."""
    x, cos, sin = arrays()
    both = jax.grad(lambda c, s: jnp.sum(rope(x=x, cos=c, sin=s) ** 2), (0, 1))(cos, sin)
    for i in (0, 1):
        alone = jax.grad(lambda *t: jnp.sum(rope(x=x, cos=t[0], sin=t[1]) ** 2), i)(cos, sin)
        np.testing.assert_array_equal(alone, both[i])


TRANSFORMS = {
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "vmap": lambda f: lambda x: jax.vmap(f)(x[:, None])[:, 0],
    "scan": lambda f: lambda x: jax.lax.scan(lambda _, one: (None, f(one)), None, x[:, None])[1][:, 0],
    "shard_map": lambda f: jax.shard_map(f, mesh=mesh_of_one(), in_specs=P("data"), out_specs=P("data")),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transformed(transform):
    x, cos, sin = arrays()

    def loss(x, cos, outer):
        return jnp.sum(outer(lambda x: rope(x=x, cos=cos, sin=sin))(x) ** 3)

    # cos is a constant of the transformed function, and has a gradient all the same.
    got = jax.grad(loss, (0, 1))(x, cos, TRANSFORMS[transform])
    want = jax.grad(loss, (0, 1))(x, cos, lambda f: f)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)
