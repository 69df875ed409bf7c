"""The row-wise and product providers under jax's transformations, and in mixed dtypes. Numbers over shapes: tests/fuzz.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kpt
from kpt.ops import Spec, op

F = "float32"
TABLE = [
    ("rms_norm", {"x": Spec((4, 6, 16), F), "weight": Spec((16,), F)}, {}),
    ("layer_norm", {"x": Spec((4, 6, 16), F), "weight": Spec((16,), F), "bias": Spec((16,), F)}, {}),
    ("linear_act", {"x": Spec((4, 6, 16), F), "w": Spec((16, 8), F), "b": Spec((8,), F)}, {"activation": "gelu"}),
    ("glu", {"x": Spec((4, 6, 16), F), "w_gate": Spec((16, 8), F), "w_up": Spec((16, 8), F)}, {"activation": "silu"}),
    ("rope", {"x": Spec((4, 6, 2, 8), F), "cos": Spec((1, 6, 8), F), "sin": Spec((1, 6, 8), F)}, {"interleaved": True}),
    ("cross_entropy", {"logits": Spec((4, 6, 16), F), "labels": Spec((4, 6), "int32")}, {}),
]
IDS = [name for name, _, _ in TABLE]


def made(name, specs, params):
    arrays = {n: jnp.asarray(a) for n, a in op(name).sample(np.random.default_rng(0), specs, **params).items()}
    kernel = kpt.registry.load(f"{name}.xla")
    first = op(name).arrays[0]
    rest = {n: a for n, a in arrays.items() if n != first}
    labels = rest.pop("labels", None)

    def fn(x, y=labels):
        return kernel(**{first: x}, **rest, **({} if y is None else {"labels": y}), **params)

    return fn, arrays[first], labels


@pytest.mark.parametrize(("name", "specs", "params"), TABLE, ids=IDS)
def test_vmap_is_a_batch_axis(name, specs, params):
    fn, x, labels = made(name, specs, params)
    if name == "rope":  # its own batch axis has to stay
        got = jax.vmap(lambda x: fn(x[None])[0])(x)
    else:
        got = jax.vmap(fn)(x) if labels is None else jax.vmap(fn)(x, labels)
    np.testing.assert_allclose(got, fn(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "specs", "params"), TABLE, ids=IDS)
def test_remat_and_jit_keep_gradients(name, specs, params):
    fn, x, _ = made(name, specs, params)
    plain = jax.grad(lambda x: jnp.sum(fn(x) ** 2))(x)
    again = jax.jit(jax.grad(lambda x: jnp.sum(jax.checkpoint(fn)(x) ** 2)))(x)
    np.testing.assert_allclose(again, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "specs", "params"), TABLE[:2], ids=IDS[:2])
def test_scan_over_layers(name, specs, params):
    fn, x, _ = made(name, specs, params)
    scanned = jax.grad(lambda x: jax.lax.scan(lambda h, _: (h + fn(h), None), x, length=3)[0].sum())(x)
    unrolled = jax.grad(lambda x: (lambda a: a + fn(a))((lambda a: a + fn(a))(x + fn(x))).sum())(x)
    np.testing.assert_allclose(scanned, unrolled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("x_dtype", "weight_dtype", "out_dtype"), [("bfloat16", "float32", None), ("bfloat16", "float32", "float32"),
                                                                    ("float16", "float16", None), ("float32", "bfloat16", "bfloat16")])  # fmt: skip
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_dtypes_of_results_and_gradients(name, x_dtype, weight_dtype, out_dtype):
    kernel = kpt.registry.load(f"{name}.xla")
    x, w = jnp.ones((3, 8), x_dtype) * jnp.arange(8, dtype=x_dtype), jnp.ones(8, weight_dtype)
    y, pull = jax.vjp(lambda x, w: kernel(x=x, weight=w, out_dtype=out_dtype), x, w)
    assert y.dtype == jnp.dtype(out_dtype or x_dtype)
    assert [g.dtype for g in pull(y)] == [x.dtype, w.dtype]


def test_the_residual_comes_back_summed():
    for name in ("rms_norm", "layer_norm"):
        kernel = kpt.registry.load(f"{name}.xla")
        x, r = jnp.arange(12.0).reshape(3, 4), jnp.ones((3, 4))
        y, h = kernel(x=x, residual=r)
        np.testing.assert_array_equal(h, x + r)
        np.testing.assert_allclose(y, kernel(x=x + r), rtol=1e-6)
