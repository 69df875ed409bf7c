"""linear_act and glu in plain JAX against float64: every activation, every dtype; what they keep for the backward pass."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kpt.ops.activations import ACTIVATIONS as REFERENCE
from kpt.validation import tolerance
from pallas_kernels.activations import ACTIVATIONS, SLOPE_OF_OUTPUT
from pallas_kernels.glu.xla import glu
from pallas_kernels.linear_act.xla import linear_act
from tests.jax.certified import certify, kept, mesh_of_one, specs_of

K, N = 20, 12
F32 = "float32"
CASES = {
    "batch": (dict(x=(2, 3, K)), {}),
    "one row": (dict(x=(K,)), {}),
    "four batch dims": (dict(x=(2, 1, 3, 2, K)), {}),
    "no rows": (dict(x=(0, 3, K)), {}),
    "float32 result": (dict(x=(2, 3, K)), {"out_dtype": F32}),
}
WEIGHTS = {
    "linear_act": {"": dict(w=(K, N)), "bias": dict(w=(K, N), b=(N,)), "no columns": dict(w=(K, 0), b=(0,)),
                   "float32 weights": dict(w=((K, N), F32), b=((N,), F32))},
    "glu": {"": dict(w_gate=(K, N), w_up=(K, N)), "biases": dict(w_gate=(K, N), w_up=(K, N), b_gate=(N,), b_up=(N,)),
            "one bias": dict(w_gate=(K, N), w_up=(K, N), b_up=(N,)), "no columns": dict(w_gate=(K, 0), w_up=(K, 0)),
            "float32 weights": dict(w_gate=((K, N), F32), w_up=((K, N), F32))},
}  # fmt: skip
# Every weight with the plain batch, and the plain weight with every batch.
TABLE = [(n, w, "batch") for n, ws in WEIGHTS.items() for w in ws] + [(n, "", c) for n in WEIGHTS for c in list(CASES)[1:]]


def test_the_names_are_the_references():
    assert set(ACTIVATIONS) == set(REFERENCE)
    assert set(SLOPE_OF_OUTPUT) < set(ACTIVATIONS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_slopes(activation):
    """From far in one tail to far in the other, in float32."""
    x = np.linspace(-12, 12, 2001).astype(np.float32)
    bound = tolerance("float32", 1)
    for got, want in zip(ACTIVATIONS[activation], REFERENCE[activation], strict=True):
        exact = want(x.astype(np.float64))
        np.testing.assert_allclose(got(jnp.asarray(x)), exact, rtol=0, atol=bound.allowed_max(np.abs(exact).max()))
    if activation in SLOPE_OF_OUTPUT:
        slope = REFERENCE[activation][1](x.astype(np.float64))
        got = SLOPE_OF_OUTPUT[activation](ACTIVATIONS[activation][0](jnp.asarray(x)))
        np.testing.assert_allclose(got, slope, rtol=0, atol=bound.allowed_max(1))


@pytest.mark.parametrize(
    ("name", "weights", "case", "dtype"),
    [(*row, d) for row in TABLE for d in ("float32", "bfloat16")] + [(name, "", "batch", "float16") for name in WEIGHTS],
)
def test_numbers(name, weights, case, dtype):
    shapes, params = CASES[case]
    certify(name, specs_of(dtype, **shapes, **WEIGHTS[name][weights]), params)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_of_a_narrow_product(activation):
    certify("linear_act", specs_of("bfloat16", x=(9, K), w=(K, N)), {"activation": activation})


@pytest.mark.parametrize("name", WEIGHTS)
def test_float64_stays_float64(name, x64):
    certify(name, specs_of("float64", x=(2, 3, K), **WEIGHTS[name][""]), {})


@pytest.mark.parametrize("name", WEIGHTS)
def test_no_inputs_to_sum(name):
    shapes = {n: (0, N) if n.startswith("w") else (N,) for n in WEIGHTS[name]["bias" if name == "linear_act" else "biases"]}
    certify(name, specs_of("float32", x=(3, 0), **shapes), {})


# Activation, dtype of the result -> arrays of [rows, N] kept beside the inputs.
KEPT = {
    ("gelu_tanh", "bfloat16"): 1,
    ("silu", "bfloat16"): 1,
    ("relu", "bfloat16"): 1,  # the result itself
    ("identity", "bfloat16"): 0,
}


@pytest.mark.parametrize(("activation", "dtype"), KEPT)
def test_linear_act_keeps_one_array_in_the_compute_dtype(activation, dtype):
    x, w = jnp.ones((6, K), dtype), jnp.ones((K, N), dtype)
    assert kept(functools.partial(linear_act, activation=activation), x=x, w=w) == KEPT[activation, dtype] * 6 * N


def test_relu_keeps_the_result_that_comes_next_anyway():
    x, w = jnp.ones((6, K)), jnp.ones((K, N))
    y, pull = jax.vjp(lambda x, w: linear_act(x=x, w=w, activation="relu"), x, w)
    known = {a.unsafe_buffer_pointer() for a in (x, w, y)}
    assert {a.unsafe_buffer_pointer() for a in jax.tree.leaves(pull)} == known


def test_glu_keeps_gate_and_up():
    x, w = jnp.ones((6, K), jnp.bfloat16), jnp.ones((K, N), jnp.bfloat16)
    assert kept(glu, x=x, w_gate=w, w_up=w + w) == 2 * 6 * N


def test_the_activation_sees_the_sum_before_it_is_rounded():
    """256 + 1 is 256 in bfloat16, and a difference of such sums 0; in the accumulator it is 1."""
    x, w = jnp.asarray([[256.0, 1.0]], jnp.bfloat16), jnp.ones((2, 1), jnp.bfloat16)
    y = linear_act(x=x, w=w, b=jnp.asarray([-256.0], jnp.bfloat16), activation="relu")
    assert float(y[0, 0]) == 1


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_all_devices_hold_in_shard_map(name):
    kernel, mesh, x = {"linear_act": linear_act, "glu": glu}[name], mesh_of_one(), jnp.arange(12.0).reshape(4, 3) / 12
    weights = {n: jnp.arange(6.0).reshape(3, 2) / 6 for n in WEIGHTS[name][""]}

    def mapped(weights):
        fn = jax.shard_map(lambda x, w: kernel(x=x, **w), mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
        return jnp.sum(fn(x, weights) ** 2)

    got, want = jax.grad(mapped)(weights), jax.grad(lambda w: jnp.sum(kernel(x=x, **w) ** 2))(weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)
