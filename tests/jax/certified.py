"""One body for the tests of the plain-JAX providers: outputs, gradients and their dtypes, held to the op's float64 reference."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kpt
from kpt.kernels.validate import validate
from kpt.ops import Spec, op
from kpt.ops.shapes import FLOATS
from tests.fuzz import jax_runner


def specs_of(dtype: str, **arrays: Any) -> dict[str, Spec]:
    """Specs from shapes in `dtype`, or from (shape, dtype) where an array has its own."""
    return {n: Spec(a[0], a[1]) if a and isinstance(a[0], tuple) else Spec(a, dtype) for n, a in arrays.items()}


def certify(name: str, specs: dict[str, Spec], params: dict[str, Any], held_to: str | None = None) -> None:
    """Fails unless `<name>.xla` agrees with the reference, forward and in every gradient, and gives the dtypes promised.

    Args:
      held_to: the dtype of the tolerance; that of the first array by default.
    """
    fn = kpt.registry.load(f"{name}.xla")
    run, run_vjp = jax_runner(op(name), params, fn)
    certificate = validate(fn, op(name), specs, params, run=run, run_vjp=run_vjp, dtype=held_to)
    assert certificate.passed, certificate.summary()

    arrays = {n: jax.ShapeDtypeStruct(s.shape, s.dtype) for n, s in specs.items()}
    moving = {n: a for n, a in arrays.items() if specs[n].dtype in FLOATS}
    fixed = {n: jnp.zeros(a.shape, a.dtype) for n, a in arrays.items() if n not in moving}

    def both(moving: dict[str, Any]) -> Any:
        out, pull = jax.vjp(lambda d: fn(**d, **fixed, **params), moving)
        return out, pull(out)[0]

    out, gradients = jax.eval_shape(both, moving)
    outputs = out if isinstance(out, tuple) else (out,)
    assert [Spec(o.shape, o.dtype.name) for o in outputs] == list(op(name).infer(specs, **params))
    assert {n: (g.shape, g.dtype) for n, g in gradients.items()} == {n: (a.shape, a.dtype) for n, a in moving.items()}


def kept(fn: Any, **arrays: jax.Array) -> int:
    """Elements that the forward pass leaves for the backward, beside `arrays` themselves."""
    pull = jax.vjp(lambda d: fn(**d), arrays)[1]
    inputs = {a.unsafe_buffer_pointer() for a in arrays.values()}
    return sum(a.size for a in jax.tree.leaves(pull) if a.unsafe_buffer_pointer() not in inputs)


def mesh_of_one() -> jax.sharding.Mesh:
    """A mesh whose one axis is enough for jax to check over which axes gradients are summed."""
    return jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
