"""What a proof does with arrays of jax, on the GPU that they are on: see `kpt.strategy.arrays.Arrays`.

By NumPy on a CPU, where its blocks stay in the caches, on a TPU, which has no float64, and of what is rare or small.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kpt.graph.expr import numpy_dtype
from kpt.ops.base import Spec
from kpt.strategy.arrays import NUMPY
from kpt.validation import MARK, ErrorMetrics
from kpt.validation.conditioning import nudged
from kpt.validation.metrics import KEPT, PERCENTILES
from kpt_jax import _compat
from kpt_jax.devices import device_of

_PLATFORMS = ("gpu", "cuda", "rocm")
_FLOATS = ("bfloat16", "float16", "float32", "float64")
_NUMBERS = (*_FLOATS, "bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
_BLOCK = 1 << 22
"""Elements that are compared at a time, in float64: 32 MiB for each array on the way."""
_FEW = 1 << 20  # elements of an array below which NumPy is done before a program for its shape is compiled
_HASHED = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio, odd


class OnDevice:
    """Arrays of one GPU stay there; all others are NumPy's."""

    def fetched(self, tree: Any) -> Any:
        """What a program made: as it is on a GPU, else on the host."""
        return tree if all(map(on_gpu, jax.tree.leaves(tree))) else jax.device_get(tree)

    def put(self, array: np.ndarray) -> Any:
        return jnp.asarray(array) if device_of().platform in _PLATFORMS else array

    def get(self, array: Any) -> np.ndarray:
        return np.asarray(_plain(array))

    def normal(self, seed: int, spec: Spec, mean: float, deviation: float) -> Any:
        if device_of().platform not in _PLATFORMS or math.prod(spec.shape) < _FEW or spec.dtype not in _NUMBERS:
            return self.put(NUMPY.normal(seed, spec, mean, deviation))
        with _compat.with_64_bits():
            return _normal(_key(seed), mean, deviation, spec.shape, spec.dtype)

    def nudged(self, array: Any, seed: int, step: float) -> Any:
        """As `kpt.validation.conditioning.nudged`."""
        if _worth_it(array):
            with _compat.with_64_bits():
                return _nudged(array, _key(seed), step)
        return nudged(self.get(array), np.random.default_rng(seed), step)

    def metrics(self, actual: Any, reference: Any) -> ErrorMetrics:
        if _worth_it(actual) and isinstance(reference, np.ndarray) and reference.dtype.name in _NUMBERS:
            with _compat.with_64_bits():
                reference = jax.device_put(reference, next(iter(actual.devices())))
        if _worth_it(actual) and _worth_it(reference) and actual.shape == reference.shape and actual.size:
            return figures(actual, reference)
        return NUMPY.metrics(self.get(actual), self.get(reference))

    def digest(self, array: Any) -> str:
        """Of all elements' bits a mixed one, times an odd number of its place's own, mixed again, and their sum modulo 2**64; twice."""
        array = _plain(array)
        if not _worth_it(array):
            return NUMPY.digest(np.asarray(array))
        with _compat.with_64_bits():
            return "".join(f"{int(n):016x}" for n in jax.device_get(_digest(array, _BLOCK)))


ROOM = OnDevice()


def on_gpu(array: Any) -> bool:
    """Whether it is an array on one GPU, of no explicit sharding."""
    if not isinstance(array, jax.Array) or _compat.is_tracer(array):
        return False
    devices = array.devices()
    return len(devices) == 1 and next(iter(devices)).platform in _PLATFORMS and _compat.placement(jax.typeof(array))[0] is None


def _worth_it(array: Any) -> bool:
    return on_gpu(array) and array.size >= _FEW and array.dtype.name in _NUMBERS


def _plain(array: Any) -> Any:
    """Of random keys the numbers that they are."""
    keys = isinstance(array, jax.Array) and jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(array) if keys else array


def _key(seed: int) -> jax.Array:
    return jax.random.key(seed, impl="threefry2x32")  # whatever the user's own are: a draw is of its seed


@functools.partial(jax.jit, static_argnums=(3, 4))
def _normal(key: jax.Array, mean: float, deviation: float, shape: tuple[int, ...], dtype: str) -> jax.Array:
    wide = jnp.dtype("float64" if dtype == "float64" else "float32")
    drawn = jax.random.normal(key, shape, wide)
    return (drawn * jnp.asarray(deviation, wide) + jnp.asarray(mean, wide)).astype(numpy_dtype(dtype))


@jax.jit
def _nudged(x: jax.Array, key: jax.Array, step: float) -> jax.Array:
    wide = jnp.dtype("float64" if x.dtype == "float64" else "float32")
    moved = 1 + jnp.asarray(step, wide) * jax.random.uniform(key, x.shape, wide, -1, 1)
    y = x.astype(wide)
    return jnp.where(jnp.abs(y) < jnp.asarray(MARK, wide), y * moved, y).astype(x.dtype)


def figures(actual: jax.Array, reference: jax.Array) -> ErrorMetrics:
    """Those of `kpt.validation.metrics`, computed where the arrays are; percentiles of a large array are of other elements."""
    with _compat.with_64_bits():
        told, errors = jax.device_get(_figures(actual, reference, _BLOCK, math.ceil(actual.size / KEPT)))
    errors = errors[errors >= 0]
    mismatch = int(told[:, 6].sum())
    if not told[:, 7].any():
        nothing = dict.fromkeys(PERCENTILES, 0.0)
        return ErrorMetrics(actual.size, 0.0, 0.0, 0.0, 0.0, nothing, 0.0, 0.0, 0.0, mismatch)
    max_abs, max_rel, max_ulp, largest = map(float, told[:, :4].max(0))
    abs_l2, reference_l2 = (math.hypot(*map(float, told[:, i])) for i in (4, 5))
    percentiles = np.percentile(errors, [float(p) for p in PERCENTILES]) if errors.size else [max_abs] * len(PERCENTILES)
    return ErrorMetrics(
        size=actual.size,
        max_abs=max_abs,
        max_rel=max_rel,
        rel_l2=abs_l2 / reference_l2 if reference_l2 else (math.inf if abs_l2 else 0.0),
        max_ulp=max_ulp,
        percentiles=dict(zip(PERCENTILES, map(float, percentiles), strict=True)),
        abs_l2=abs_l2,
        reference_l2=reference_l2,
        reference_max=largest,
        nonfinite_mismatch=mismatch,
    )


@functools.partial(jax.jit, static_argnums=(2, 3))
def _figures(actual: jax.Array, reference: jax.Array, block: int, every: int) -> tuple[jax.Array, jax.Array]:
    """Of each block: largest |a - r|, relative, in ulps, and |r|; the norms of the error and of r; mismatches; whether any is finite. And
    one error in so many, -1 where there is none."""
    a, r = actual.reshape(-1), reference.reshape(-1)
    dtype = a.dtype

    def part(i: jax.Array) -> jax.Array:
        (a_, r_), new = _block((a, r), i, block)
        a_, r_ = a_.astype("float64"), r_.astype("float64")
        finite = jnp.isfinite(a_) & jnp.isfinite(r_)
        overflowed = (jnp.abs(r_) >= _limit(dtype)) & jnp.isinf(a_) & ((a_ < 0) == (r_ < 0)) & ~jnp.isnan(r_)
        matched = (jnp.isnan(a_) & jnp.isnan(r_)) | (jnp.isinf(a_) & (a_ == r_)) | overflowed
        mismatch = new & ~finite & ~matched
        told = new & finite
        error, size = (jnp.where(told, x, 0.0) for x in (jnp.abs(a_ - r_), jnp.abs(r_)))
        relative = jnp.where(size > 0, error / size, 0.0)
        norms = _norm(error), _norm(size)
        maxima = [jnp.max(x) for x in (error, relative, _ulps(error, size, dtype), size)]
        return jnp.stack([*maxima, *norms, jnp.sum(mismatch, dtype="float64"), jnp.any(told).astype("float64")])

    a_, r_ = (x[::every].astype("float64") for x in (a, r))
    errors = jnp.where(jnp.isfinite(a_) & jnp.isfinite(r_), jnp.abs(a_ - r_), -1.0)
    return lax.map(part, jnp.arange(math.ceil(a.size / block))), errors


def _block(flat: tuple[jax.Array, ...], i: jax.Array, block: int) -> tuple[list[jax.Array], jax.Array]:
    """Block `i` of arrays, and which of its elements no earlier one had: the last reaches back over its neighbour."""
    size = flat[0].size
    count = min(block, size)
    start = jnp.minimum(i * count, size - count)
    return [lax.dynamic_slice(x, (start,), (count,)) for x in flat], start + jnp.arange(count) >= i * count


def _norm(x: jax.Array) -> jax.Array:
    """Euclidean norm that neither overflows nor underflows."""
    scale = jnp.max(x)
    return jnp.where(scale > 0, scale * jnp.sqrt(jnp.sum(jnp.square(x / scale))), 0.0)


def _limit(dtype: Any) -> float:
    """From which size on a number rounds to an infinity of this dtype; integers have none."""
    if dtype.name not in _FLOATS:
        return math.inf
    info = jnp.finfo(dtype)
    return float(info.max) + 2.0 ** (info.maxexp - 2 - info.nmant) if info.bits < 64 else math.inf


def _ulps(error: jax.Array, size: jax.Array, dtype: Any) -> jax.Array:
    """`error` in units of the distance between neighbouring numbers of a dtype at `size`; of 1 for integers."""
    if dtype.name not in _FLOATS:
        return error
    info = jnp.finfo(dtype)
    exponent = (lax.bitcast_convert_type(size, jnp.int64) >> 52) - 1022  # size = f * 2**exponent, f in [0.5, 1)
    exponent = jnp.where(size > 0, exponent, 0)  # as NumPy's frexp has it
    power = 1 + info.nmant - jnp.maximum(exponent, info.minexp + 1)
    half = power >> 1  # 2**power may be beyond float64
    return error * _power_of_2(half) * _power_of_2(power - half)


def _power_of_2(n: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type((n + 1023) << 52, jnp.float64)


@functools.partial(jax.jit, static_argnums=1)
def _digest(array: jax.Array, block: int) -> jax.Array:
    flat = array.reshape(-1)
    unsigned = jnp.dtype(f"uint{8 * flat.dtype.itemsize}")
    bits = flat.astype(unsigned) if flat.dtype == "bool" else lax.bitcast_convert_type(flat, unsigned)
    hashed = jnp.uint64(_HASHED)

    def add(i: jax.Array, found: jax.Array) -> jax.Array:
        (part,), new = _block((bits,), i, block)
        start = jnp.minimum(i * part.size, bits.size - part.size)
        place = (start + jnp.arange(part.size)).astype("uint64") * hashed
        sums = []
        for _ in range(2):
            place = _mixed(place) * hashed | jnp.uint64(1)
            sums.append(jnp.sum(jnp.where(new, _mixed(_mixed(part.astype("uint64")) * place) * hashed, jnp.uint64(0))))
        return found + jnp.stack(sums)

    nothing = jnp.zeros(2, "uint64")
    return lax.fori_loop(0, math.ceil(bits.size / block), add, nothing) if bits.size else nothing


def _mixed(bits: jax.Array) -> jax.Array:
    """The upper half of 64 bits in the lower one, too: products carry upwards alone."""
    return bits ^ (bits >> jnp.uint64(32))


__all__ = ["ROOM", "OnDevice", "figures", "on_gpu"]
