"""matmul and ragged_matmul in plain JAX against float64: group sizes of every kind, on the path of each platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import kpt
from kpt.ops import op
from kpt.validation import tolerance
from pallas_kernels.ragged_matmul.xla import by_ragged_dot, ragged_matmul
from tests.jax.certified import certify, mesh_of_one, specs_of

PRODUCTS = {
    "square": dict(a=(16, 16), b=(16, 16)),
    "odd": dict(a=(7, 33), b=(33, 5)),
    "row by column": dict(a=(1, 130), b=(130, 1)),
    "no rows": dict(a=(0, 4), b=(4, 3)),
    "nothing to sum": dict(a=(3, 0), b=(0, 4)),
    "float32 second": dict(a=(7, 33), b=((33, 5), "float32")),
}
DTYPES = ["float32", "bfloat16", "float16"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PRODUCTS)
def test_matmul(case, dtype):
    certify("matmul", specs_of(dtype, **PRODUCTS[case]), {})


@pytest.mark.parametrize(("dtype", "out"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_matmul_into_another_dtype(dtype, out):
    certify("matmul", specs_of(dtype, **PRODUCTS["odd"]), {"out_dtype": out}, held_to="bfloat16")


@pytest.mark.parametrize("name", ["matmul", "ragged_matmul"])
def test_float64_stays_float64(name, x64):
    shapes = {"matmul": PRODUCTS["odd"], "ragged_matmul": dict(x=(40, 8), w=(3, 8, 4), group_sizes=((3,), "int32"))}
    certify(name, specs_of("float64", **shapes[name]), {})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_matmul_sums_in_float32(dtype):
    """4096 ones: 16-bit sums stop at 256 and 2048."""
    a, b = jnp.ones((2, 4096), dtype), jnp.ones((4096, 2), dtype)
    y, pull = jax.vjp(lambda a, b: kpt.registry.load("matmul.xla")(a=a, b=b), a, b)
    assert float(y[0, 0]) == 4096
    assert float(pull(y)[1][0, 0]) == 8192


# Rows, group sizes. Blocks are of 32 rows for these.
GROUPS = {
    "aligned": (64, [32, 32]),
    "within one block": (32, [5, 0, 20, 7]),
    "across blocks": (100, [3, 60, 1, 36]),
    "a group over several blocks": (200, [10, 150, 40]),
    "rows past the last": (100, [10, 0, 30]),
    "empty first and last": (70, [0, 70, 0]),
    "one group": (50, [50]),
    "all empty": (40, [0, 0, 0]),
    "fewer rows than a block": (9, [2, 3, 4]),
    "more groups than rows": (3, [0, 1, 0, 0, 1, 0, 1, 0]),
    "no rows": (0, [0, 0]),
}
# On this machine the public function goes by blocks; elsewhere by ragged_dot, whose numbers do not depend on the machine.
PATHS = {
    "public": lambda x, w, sizes: ragged_matmul(x=x, w=w, group_sizes=sizes),
    "ragged_dot": lambda x, w, sizes: by_ragged_dot(x, w, sizes, str(x.dtype)),
}


def close(got, want, dtype, terms):
    bound = tolerance(dtype, terms, gradient=True)
    assert got.shape == want.shape
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=bound.allowed_max(np.abs(want).max(initial=0)))


@pytest.mark.parametrize(
    ("case", "path", "dtype"),
    [(case, "public", "float32") for case in GROUPS]
    + [(case, "ragged_dot", "float32") for case in ("across blocks", "rows past the last", "all empty")]
    + [("rows past the last", "public", d) for d in ("bfloat16", "float16")],
)
def test_ragged(case, path, dtype):
    rows, sizes = GROUPS[case]
    rng, k, n = np.random.default_rng(0), 17, 9
    x, w, g = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((rows, k), (len(sizes), k, n), (rows, n)))
    group_sizes = jnp.asarray(sizes, jnp.int32)

    @jax.jit
    def both(x, w, g):
        y, pull = jax.vjp(lambda x, w: PATHS[path](x, w, group_sizes), x, w)
        return y, *pull(g)

    y, dx, dw = both(x, w, g)
    exact = {"x": np.asarray(x, np.float64), "w": np.asarray(w, np.float64), "group_sizes": sizes}
    want = op("ragged_matmul").reference_vjp((np.asarray(g, np.float64),), **exact)
    close(y, op("ragged_matmul").reference(**exact)[0], dtype, k)
    close(dx, want["x"], dtype, n)
    close(dw, want["w"], dtype, rows)
    past = sum(sizes)
    assert not np.asarray(y[past:]).any()
    assert not np.asarray(dx[past:]).any()


def test_a_neighbours_infinity_stays_with_it():
    x = jnp.ones((6, 4)).at[1].set(jnp.inf)
    y, pull = jax.vjp(lambda w: ragged_matmul(x=x, w=w, group_sizes=jnp.asarray([2, 4])), jnp.ones((2, 4, 3)))
    assert np.isfinite(y[2:]).all() and np.isinf(y[1]).all()
    assert np.isfinite(pull(jnp.ones_like(y))[0][1]).all()


def arrays():
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 40, 6), (2, 3, 6, 4)))
    return x, w, jnp.asarray([[10, 0, 25], [1, 38, 1]], jnp.int32)


TRANSFORMS = {
    "remat": lambda f: lambda *a: jnp.stack([jax.checkpoint(f)(*(v[i] for v in a)) for i in range(2)]),
    "vmap": jax.vmap,
    "scan": lambda f: lambda *a: jax.lax.scan(lambda _, one: (None, f(*one)), None, a)[1],
    "shard_map": lambda f: lambda *a: jnp.stack(
        [jax.shard_map(f, mesh=mesh_of_one(), in_specs=(P("data"), P(), P()), out_specs=P("data"))(*(v[i] for v in a)) for i in range(2)]
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_ragged_transformed(transform):
    x, w, sizes = arrays()

    def loss(x, w, outer):
        return jnp.sum(outer(lambda x, w, s: ragged_matmul(x=x, w=w, group_sizes=s))(x, w, sizes) ** 2)

    def one_by_one(f):
        return lambda *a: jnp.stack([f(*(v[i] for v in a)) for i in range(2)])

    gradients = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    got, want = gradients(x, w, TRANSFORMS[transform]), gradients(x, w, one_by_one)
    for g, e in zip(got, want, strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for(platform):
    x, w, sizes = (a[0] for a in arrays())

    def step(x, w):
        return jax.grad(lambda x, w: ragged_matmul(x=x, w=w, group_sizes=sizes).sum(), (0, 1))(x, w)

    assert jax.jit(step).trace(x, w).lower(lowering_platforms=(platform,)).as_text()
