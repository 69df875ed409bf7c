"""Bodies of the tests of Pallas kernels for TPU, on a machine without one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import kpt
from kpt.hardware import hardware_profile
from kpt.kernels.spec import refusal, unmet
from kpt.ops import op
from tests.jax.certified import certify, mesh_of_one

TOO_OLD = unmet("jax>=0.11.2")
needs_pallas_tpu = pytest.mark.skipif(TOO_OLD is not None, reason=TOO_OLD or "")


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels run as a TPU would: races are errors, reads out of bounds are errors, memory starts as NaN."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call
    from jax.experimental.pallas import tpu as pltpu

    jax.clear_caches()
    pltpu.reset_tpu_interpret_mode_state()
    params = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
    with pltpu.force_tpu_interpret_mode(params):
        yield
    found = interpret_pallas_call.races  # jax 0.11.2 prints races, and raises nothing
    assert found is not None and not found.races_found
    jax.clear_caches()


def kernel(name: str) -> Any:
    return kpt.registry.load(f"{name}.pallas_tpu")


def refused(name: str, specs: Any, params: Any, hardware: str = "tpu-v5e", level: str = "balanced") -> str | None:
    spec = kpt.registry.get(f"{name}.pallas_tpu")
    return refusal(spec, spec.op, hardware_profile(hardware), next(iter(specs.values())).dtype, specs, params, level, "jax")


def agrees(name: str, specs: Any, params: dict[str, Any], seeds: Sequence[int] = (0,)) -> None:
    """Fails unless results and gradients are the reference's."""
    own = {n: params[n] for n in params if n in ("blocks",)}
    params = {n: p for n, p in params.items() if n not in own}
    assert refused(name, specs, params) is None
    with interpreted():
        certify(name, specs, params, fn=lambda **call: kernel(name)(**call, **own), seeds=seeds)


def _step(name: str, params: dict[str, Any], fn: Any = None) -> Any:
    fn = fn or kernel(name)

    def step(arrays: dict[str, Any]) -> Any:
        moving = {n: a for n, a in arrays.items() if n in op(name).differentiable and "float" in str(a.dtype)}
        out, pull = jax.vjp(lambda d: fn(**arrays | d, **params), moving)
        return out, pull(jax.tree.map(jnp.ones_like, out))[0]

    return step


CHIPS = pytest.mark.parametrize("chip", ["TPU v4", "TPU v6 lite"])
"""The one with the least VMEM, and the one with the widest matrix unit and the most VMEM."""


def lowers(name: str, specs: Any, params: dict[str, Any], fn: Any = None, chip: str = "TPU v5 lite") -> int:
    """Kernels in both passes, lowered for that chip."""
    from pallas_kernels import tensorcore

    with mock.patch.object(tensorcore, "generation", lambda: tensorcore.DEVICE_KINDS[chip]):
        return _lowered(name, specs, params, fn)


def _lowered(name: str, specs: Any, params: dict[str, Any], fn: Any) -> int:
    arrays = {n: jax.ShapeDtypeStruct(s.shape, s.dtype) for n, s in specs.items()}
    lowered = jax.jit(_step(name, params, fn)).trace(arrays).lower(lowering_platforms=("tpu",)).as_text()
    kernels = lowered.count("tpu_custom_call")
    assert lowered.count("cost_estimate") == kernels, "XLA takes a kernel without an estimate for one that is free"
    return kernels


def under_transformations(name: str, specs: Any, params: dict[str, Any], shared: Sequence[str] = ()) -> None:
    """Fails unless results and gradients under vmap, scan with remat, and shard_map are those of one call after the other.

    Args:
      shared: arrays that all calls have in common.
    """
    from jax.experimental.pallas import tpu as pltpu

    rng = np.random.default_rng(0)
    each = [op(name).sample(rng, specs, **params) for _ in range(2)]
    common = {n: each[0][n] for n in shared}
    own = [{n: a for n, a in arrays.items() if n not in common} for arrays in each]
    stacked = jax.tree.map(lambda *a: np.stack(a), *own)
    step = _step(name, params)

    # jax 0.11.2 interprets no batched kernel whose grid says which of its dimensions are parallel.
    def without_semantics(dimension_semantics: Any, **more: Any) -> Any:
        return params_class(**more)

    params_class = pltpu.CompilerParams
    with interpreted():
        one = jax.jit(step)
        expected = jax.tree.map(lambda *a: np.stack(a), *[one(arrays | common) for arrays in own])
        with mock.patch.object(pltpu, "CompilerParams", without_semantics):
            mapped = jax.jit(jax.vmap(lambda a: step(a | common)))(stacked)
        scanned = jax.jit(lambda s: jax.lax.scan(lambda _, a: (None, jax.checkpoint(step)(a | common)), None, s)[1])(stacked)
        places = {n: P() if n in common else P("data") for n in specs}
        grads = {n: p for n, p in places.items() if n in op(name).differentiable}
        sharded = jax.shard_map(step, mesh=mesh_of_one(), in_specs=(places,), out_specs=(P("data"), grads))
        local = jax.jit(sharded)(own[0] | common)
    jax.tree.map(np.testing.assert_array_equal, scanned, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=2e-2, atol=2e-2), mapped, expected)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[0]), local, expected)
