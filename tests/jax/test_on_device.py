"""What proofs do with arrays on a GPU is what `kpt.validation` does with NumPy arrays. The CPU is the GPU here."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kpt.errors import ValidationError
from kpt.ops.base import Spec
from kpt.validation import metrics
from kpt_jax import _compat, on_device
from kpt_jax.on_device import ROOM

FLOATS = ["bfloat16", "float16", "float32", "float64"]
WHOLE = ["int8", "uint8", "int32", "int64", "uint64", "bool"]


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """And small blocks."""
    monkeypatch.setattr(on_device, "_PLATFORMS", ("cpu",))
    monkeypatch.setattr(on_device, "_FEW", 0)
    monkeypatch.setattr(on_device, "_BLOCK", 300)


def array(x: np.ndarray) -> jax.Array:
    with _compat.with_64_bits():
        return jnp.asarray(x)


def pair(dtype: str, size: int, seed: int, special: bool) -> tuple[np.ndarray, np.ndarray]:
    rng, kind = np.random.default_rng(seed), jnp.dtype(dtype)
    if dtype in WHOLE:
        return rng.integers(0, 2, size).astype(kind), rng.integers(0, 2, size).astype(kind)
    with np.errstate(all="ignore"):
        r = rng.standard_normal(size) * np.exp(rng.standard_normal(size) * (1 if dtype == "float16" else 15))
        a = (r * (1 + 0.01 * rng.standard_normal(size))).astype(kind)
        r = r.astype(kind) if seed % 2 else r
        if special:
            for value in (0.0, -0.0, math.nan, math.inf, -math.inf, 65504.0, 65519.0, 65520.0, 3.4e38, -1e39, 1e-7):
                for t in (a, r):
                    t[rng.integers(0, size, max(1, size // 40))] = value
    return a, r


def close(found, exact) -> None:
    for field in dataclasses.fields(exact):
        x, y = getattr(found, field.name), getattr(exact, field.name)
        if field.name == "percentiles":
            assert x.keys() == y.keys() and all(math.isclose(x[n], y[n], rel_tol=1e-12) for n in y), (x, y)
        else:
            assert x == y or math.isclose(x, y, rel_tol=1e-12), (field.name, x, y)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("dtype", [*FLOATS, *WHOLE])
def test_figures_are_those_of_numpy(dtype, special):
    for size in (1, 300, 301, 1000) if dtype in FLOATS else (1, 301):  # each is compiled
        for seed in range(6):
            a, r = pair(dtype, size, seed, special)
            with np.errstate(all="ignore"):
                close(on_device.figures(array(a.reshape(-1, 1)), array(r.reshape(-1, 1))), metrics(a, r))


def test_nothing_finite_and_nothing_at_all_and_no_dimensions():
    nan, inf = np.full(3, np.nan, np.float32), np.full(3, np.inf, np.float32)
    for a, r in ((nan, inf), (nan, nan), (np.ones(0), np.ones(0)), (np.zeros(4), np.zeros(4)), (np.float32(2), np.float32(3)),
                 (np.array(True), np.array(False)), (np.ones((0, 3), "int32"), np.ones((0, 3), "int32"))):  # fmt: skip
        close(ROOM.metrics(array(a), array(r)), metrics(a, r))


def test_dtypes_may_differ():
    a, r = np.float32([1, 2, 3]), np.int32([1, 2, 4])
    close(ROOM.metrics(array(a), array(r)), metrics(a, r))
    close(ROOM.metrics(array(r), array(a)), metrics(r, a))


@pytest.mark.parametrize("dtype", ["complex64", "float8_e4m3fn", "int4"])
def test_what_is_rare_goes_numpys_way(dtype):
    kind = jnp.dtype(dtype)
    a, r = np.ones(3).astype(kind), np.array([1, 2, 0]).astype(kind)

    def outcome(measure, *pair):
        try:
            return measure(*pair)
        except Exception as error:
            return type(error)

    assert outcome(ROOM.metrics, array(a), array(r)) == outcome(metrics, a, r)
    assert ROOM.digest(array(a)) == ROOM.digest(a) != ROOM.digest(r)


def test_shapes_that_differ_are_an_error():
    for other in (jnp.ones(4), jnp.ones((3, 1)), jnp.ones(())):
        with pytest.raises(ValidationError, match="shape"):
            ROOM.metrics(jnp.ones(3), other)


def test_keys_are_the_numbers_that_they_are():
    one, other = jax.random.key(1), jax.random.key(2)
    assert ROOM.digest(one) == ROOM.digest(jax.random.key_data(one)) != ROOM.digest(other)
    np.testing.assert_array_equal(ROOM.get(one), jax.random.key_data(one))
    close(ROOM.metrics(one, other), metrics(*(np.asarray(jax.random.key_data(k)) for k in (one, other))))


def test_percentiles_of_many_elements(monkeypatch):
    monkeypatch.setattr(on_device, "KEPT", 1000)
    monkeypatch.setattr(on_device, "_BLOCK", 7001)
    found = on_device.figures(jnp.linspace(0, 1, 50_000), jnp.zeros(50_000)).percentiles
    assert found == pytest.approx({"50": 0.5, "90": 0.9, "99": 0.99, "99.9": 0.999}, abs=2e-3)


@pytest.mark.parametrize("dtype", [*FLOATS, *WHOLE])
def test_a_digest_is_of_values_and_their_places(dtype, monkeypatch):
    monkeypatch.setattr(on_device, "_BLOCK", 30)
    x = (np.arange(80) % 7 % 2).astype(jnp.dtype(dtype)).reshape(8, 10)
    digest = ROOM.digest(array(x))
    assert digest == ROOM.digest(array(x.copy())) and len(digest) == 32
    seen = {digest}
    for i in range(x.size):
        other = x.copy()
        other.flat[i] = 1 - int(other.flat[i])
        seen.add(ROOM.digest(array(other)))
    assert len(seen) == x.size + 1
    assert ROOM.digest(array(x[:0])) == 32 * "0" and ROOM.digest(array(x[0, 0])) != ROOM.digest(array(x[0, 1]))


@pytest.mark.parametrize("values", [(0.0, 1.0), (0.0, -math.inf), (2.0, 4.0)])
def test_masks_of_wide_numbers_have_digests_of_their_own(values):
    picks = np.random.default_rng(0).integers(0, 2, (500, 16))
    assert len({ROOM.digest(array(np.float64(values)[p])) for p in picks}) == len({tuple(p) for p in picks})


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_draw_is_of_its_seed_mean_and_deviation(dtype):
    spec = Spec((64, 500), dtype)
    x, again, other = (ROOM.normal(seed, spec, 1.0, 0.25) for seed in (2**32 - 7, 2**32 - 7, 8))
    assert isinstance(x, jax.Array) and x.dtype == jnp.dtype(dtype) and x.shape == spec.shape
    x, again, other = map(ROOM.get, (x, again, other))
    assert (x == again).all() and not (x == other).all()
    assert x.astype(float).mean() == pytest.approx(1, abs=0.01) and x.astype(float).std() == pytest.approx(0.25, rel=0.02)


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_nudged_moves_by_no_more_than_the_step(dtype):
    x = pair(dtype, 1000, 1, False)[0]
    moved = ROOM.get(ROOM.nudged(array(x), 3, 2.0**-2)).astype(float) / x.astype(float) - 1
    assert 0.2 < np.abs(moved).max() <= 0.26 and abs(np.median(moved)) < 0.05


@pytest.mark.parametrize("platforms", [("cpu",), ("gpu",)], ids=["on the device", "by NumPy"])
def test_marks_of_a_mask_are_not_nudged(platforms, monkeypatch):
    monkeypatch.setattr(on_device, "_PLATFORMS", platforms)
    marks = np.array([-np.inf, np.finfo(np.float32).min, 0, np.inf], np.float32)
    assert (ROOM.get(ROOM.nudged(array(marks), 3, 2.0**-2)) == marks).all()


def test_put_and_get_are_inverse():
    x = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    assert isinstance(ROOM.put(x), jax.Array)
    assert ROOM.get(ROOM.put(x)).dtype == x.dtype and (ROOM.get(ROOM.put(x)) == x).all()


def test_few_numbers_are_numpys(monkeypatch):
    monkeypatch.setattr(on_device, "_FEW", 10)
    monkeypatch.setattr(on_device, "figures", None)
    few = jnp.arange(9.0)
    close(ROOM.metrics(few, 2 * few), metrics(np.asarray(few), np.asarray(2 * few)))
    assert isinstance(ROOM.normal(0, Spec((9,), "float32"), 0.0, 1.0), jax.Array)
    assert len(ROOM.digest(few)) == 64 and len(ROOM.digest(jnp.arange(10.0))) == 32


def test_explicit_shardings_are_numpys():
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Explicit,))
    x = jax.device_put(jnp.ones((4, 4)), jax.NamedSharding(mesh, jax.P(None, "i")))
    assert not on_device.on_gpu(x) and on_device.on_gpu(jnp.ones(3))
    close(ROOM.metrics(x, jnp.zeros((4, 4))), metrics(np.asarray(x), np.zeros((4, 4), "float32")))


def test_elsewhere_it_is_numpy(monkeypatch):
    monkeypatch.setattr(on_device, "_PLATFORMS", ("gpu",))
    spec, x = Spec((3, 4), "float32"), np.ones(3)
    assert isinstance(ROOM.normal(0, spec, 0.0, 1.0), np.ndarray) and ROOM.put(x) is x
    assert all(isinstance(v, np.ndarray) for v in ROOM.fetched({"a": jnp.ones(3), "b": jnp.ones(())}).values())


def test_a_users_settings_do_not_matter():
    a, r = pair("bfloat16", 1000, 3, True)
    x, y = array(a), array(r)
    with np.errstate(all="ignore"):
        exact = metrics(a, r)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"), jax.debug_nans(True), jax.default_prng_impl("rbg"):
        close(ROOM.metrics(x, y), exact)
        assert len(ROOM.digest(x)) == 32
        first = ROOM.get(ROOM.nudged(ROOM.normal(1, Spec((9,), "bfloat16"), 0.0, 1.0), 3, 0.1))
    assert (first == ROOM.get(ROOM.nudged(ROOM.normal(1, Spec((9,), "bfloat16"), 0.0, 1.0), 3, 0.1))).all()
