"""rms_norm and layer_norm in plain JAX against float64, in every dtype; what they keep for the backward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.layer_norm.xla import layer_norm
from pallas_kernels.rms_norm.xla import rms_norm
from tests.jax.certified import certify, kept, mesh_of_one, specs_of

D = 24
CASES = {
    "bare": (dict(x=(3, 5, D)), {}),
    "weight": (dict(x=(3, 5, D), weight=(D,)), {}),
    "one row": (dict(x=(D,), weight=(D,)), {"eps": 1e-2}),
    "four batch dims": (dict(x=(2, 1, 3, 2, D), weight=(D,)), {}),
    "width 1": (dict(x=(7, 1), weight=(1,)), {}),
    "residual": (dict(x=(3, 5, D), weight=(D,), residual=(3, 5, D)), {}),
    "residual, no weight": (dict(x=(3, 5, D), residual=(3, 5, D)), {}),
    "no rows": (dict(x=(0, 5, D), weight=(D,)), {}),
    "no width": (dict(x=(3, 0), weight=(0,)), {}),
    "float32 weight": (dict(x=(3, 5, D), weight=((D,), "float32")), {}),
    "float32 weight, float32 result": (dict(x=(3, 5, D), weight=((D,), "float32")), {"out_dtype": "float32"}),
}
OWN = {
    "rms_norm": {"offset": (dict(x=(3, 5, D), weight=(D,)), {"weight_offset": 1.0})},
    "layer_norm": {"bias": (dict(x=(3, 5, D), bias=(D,)), {}), "weight and bias": (dict(x=(3, 5, D), weight=(D,), bias=(D,)), {})},
}
TABLE = [(name, case) for name, own in OWN.items() for case in CASES | own]
KERNELS = {"rms_norm": rms_norm, "layer_norm": layer_norm}


@pytest.mark.parametrize(
    ("name", "case", "dtype"),
    [(*row, d) for row in TABLE for d in ("float32", "bfloat16")] + [(name, "residual", "float16") for name in KERNELS],
)
def test_numbers(name, case, dtype):
    shapes, params = (CASES | OWN[name])[case]
    certify(name, specs_of(dtype, **shapes), params)


@pytest.mark.parametrize("name", KERNELS)
def test_float64_stays_float64(name, x64):
    certify(name, specs_of("float64", x=(3, 5, D), weight=(D,), residual=(3, 5, D)), {})


def test_the_variance_of_a_shifted_row_does_not_cancel():
    x = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    shifted = (x + np.float32(4096)).astype(np.float64)  # what is left of x after rounding, exactly
    want = (shifted - shifted.mean(-1, keepdims=True)) / np.sqrt(shifted.var(-1, keepdims=True) + 1e-6)
    got = layer_norm(x=jnp.asarray(shifted, jnp.float32))
    # E[x^2] - E[x]^2 would be wrong by eps * 4096^2 = 2; the float32 mean itself is off by eps * 4096, which is seen and subtracted.
    np.testing.assert_allclose(got, want, atol=16 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "a_row"), [("rms_norm", 1), ("layer_norm", 3)])
def test_keeps_its_input_and_few_numbers_a_row(name, a_row, dtype):
    x, w = jnp.ones((6, 128), dtype), jnp.ones(128, dtype)
    assert kept(KERNELS[name], x=x, weight=w) == 6 * a_row
    assert kept(KERNELS[name], x=x, weight=w, residual=x + x) == 6 * a_row + x.size  # the sum, which is a result as well


@pytest.mark.parametrize("name", KERNELS)
def test_the_weight_gradient_is_summed_in_float32(name):
    """4096 rows whose terms are 1 and one that is small: a bfloat16 sum would stop at 256."""
    x = jnp.tile(jnp.asarray([[1.0, -1.0]], jnp.bfloat16), (4096, 1))
    dw = jax.grad(lambda w: KERNELS[name](x=x, weight=w, out_dtype="float32")[:, 0].sum())(jnp.ones(2, jnp.bfloat16))
    assert float(dw[0]) == 4096


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", KERNELS)
def test_nan_and_inf_stay_in_their_row(name, value):
    x = jnp.arange(12.0).reshape(3, 4).at[1, 2].set(value)
    y = np.asarray(KERNELS[name](x=x, weight=jnp.ones(4)))
    assert np.isfinite(y[[0, 2]]).all()
    assert np.isnan(y[1, 2])


@pytest.mark.parametrize("name", KERNELS)
def test_a_weight_that_all_devices_hold_in_shard_map(name):
    mesh, x, w = mesh_of_one(), jnp.arange(24.0).reshape(4, 6), jnp.arange(1.0, 7.0)

    def loss(w):
        return jnp.sum(KERNELS[name](x=x, weight=w) ** 2)

    def mapped(w):
        fn = jax.shard_map(lambda x, w: KERNELS[name](x=x, weight=w), mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
        return jnp.sum(fn(x, w) ** 2)

    np.testing.assert_allclose(jax.grad(mapped)(w), jax.grad(loss)(w), rtol=1e-6)
