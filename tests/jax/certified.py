"""One body for the tests of the plain-JAX providers: outputs, gradients and their dtypes, held to the op's float64 reference."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import pytest

import kpt
from kpt.kernels.validate import validate
from kpt.ops import Op, Spec, op

EIGHT_DEVICES = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
"""XLA_FLAGS of a process with eight devices. What is tested there is where arrays lie, not what LLVM makes of eight times the code."""


def rest_slow(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """Cases of a test, of which all but some are among the slow tests."""
    found = list(cases)
    assert set(quick) <= set(found), set(quick) - set(found)
    return [case if case in quick else pytest.param(*(case if isinstance(case, tuple) else [case]), marks=pytest.mark.slow) for case in found]


def specs_of(dtype: str, **arrays: Any) -> dict[str, Spec]:
    """Specs from shapes in `dtype`, or from (shape, dtype) where an array has its own."""
    return {n: Spec(a[0], a[1]) if a and isinstance(a[0], tuple) else Spec(a, dtype) for n, a in arrays.items()}


def certify(
    name: str | Op, specs: dict[str, Spec], params: dict[str, Any], held_to: str | None = None, fn: Any = None, seeds: Any = (0, 1)
) -> None:
    """Fails unless a kernel of op `name` agrees with the reference, forward and in every gradient, and gives the dtypes promised.

    Args:
      name: or the op itself.
      held_to: the dtype of the tolerance; that of the first array by default.
      fn: the kernel; `<name>.xla` by default.
      seeds: of the samples, one each.
    """
    meaning = op(name) if isinstance(name, str) else name
    fn = fn or kpt.registry.load(f"{name}.xla")
    moving = [n for n in meaning.differentiable if n in specs and "float" in specs[n].dtype]

    @jax.jit
    def both(arrays: dict[str, Any], cotangents: list[Any]) -> Any:
        fixed = {n: a for n, a in arrays.items() if n not in moving}
        out, pull = jax.vjp(lambda d: fn(**d, **fixed, **params), {n: arrays[n] for n in moving})
        gradients = pull(tuple(cotangents) if isinstance(out, tuple) else cotangents[0])[0]
        return out if isinstance(out, tuple) else (out,), gradients

    outputs = meaning.infer(specs, **params)

    @jax.jit
    def forward(arrays: dict[str, Any]) -> Any:
        out = fn(**arrays, **params)
        return out if isinstance(out, tuple) else (out,)

    def run(_: Any, arrays: dict[str, Any], __: Any) -> Any:
        got = forward(arrays)
        assert tuple(Spec(o.shape, o.dtype.name) for o in got) == outputs
        return got

    def run_vjp(_: Any, arrays: dict[str, Any], __: Any, cotangents: Any) -> Any:
        _, gradients = both(arrays, list(cotangents))
        assert {n: Spec(g.shape, g.dtype.name) for n, g in gradients.items()} == {n: specs[n] for n in moving}
        return gradients

    certificate = validate(fn, meaning, specs, params, run=run, run_vjp=run_vjp, dtype=held_to, seeds=seeds)
    assert certificate.passed, certificate.summary()


def kept(fn: Any, **arrays: jax.Array) -> int:
    """Elements that the forward pass leaves for the backward, beside `arrays` themselves."""
    pull = jax.vjp(lambda d: fn(**d), arrays)[1]
    inputs = {a.unsafe_buffer_pointer() for a in arrays.values()}
    return sum(a.size for a in jax.tree.leaves(pull) if a.unsafe_buffer_pointer() not in inputs)


def mesh_of_one() -> jax.sharding.Mesh:
    """A mesh whose one axis is enough for jax to check over which axes gradients are summed."""
    return jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
