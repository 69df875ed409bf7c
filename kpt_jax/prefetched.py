"""The integers that Pallas kernels of a function read from scalar memory, as far as its code alone decides them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from kpt_jax.pallas_calls import call_name

MOST = 1 << 20
"""Elements of an array that is worth a computation."""


def prefetched(closed: Any, args: Sequence[Any]) -> list[tuple[str, list[np.ndarray | None]]]:
    """Name and scalar operands of each Pallas call of a jaxpr, that of a function of `args`, in its order.

    An operand is None where it depends on arguments that are `jax.ShapeDtypeStruct`s; integers of arguments that are arrays are known.
    """
    found: list[tuple[str, list[np.ndarray | None]]] = []
    known = [_small(a, "iub") if isinstance(a, np.ndarray | jax.Array) else None for a in jax.tree.leaves(tuple(args))]
    _evaluate(closed.jaxpr, [_small(c) for c in closed.consts], known, found)
    return found


def _small(a: Any, kinds: str = "iubf") -> np.ndarray | None:
    return np.asarray(a) if np.size(a) <= MOST and np.dtype(a.dtype).kind in kinds else None


def _evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], found: list[Any]) -> list[Any]:
    """Results of a jaxpr, None for those that are not known."""
    values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

    def read(v: Any) -> Any:
        return np.asarray(v.val) if isinstance(v, jex.Literal) else values.get(v)

    for eqn in jaxpr.eqns:
        inputs = [read(v) for v in eqn.invars]
        if eqn.primitive.name == "pallas_call":
            mapping = eqn.params["grid_mapping"]
            found.append((call_name(eqn.params), inputs[: mapping.num_dynamic_grid_bounds + mapping.num_index_operands]))
            continue
        inner = [p for p in eqn.params.values() if isinstance(p, jex.Jaxpr | jex.ClosedJaxpr)]
        if inner and eqn.primitive.name not in ("scan", "while", "cond"):
            body = inner[0]
            opened, held = (body.jaxpr, [_small(c) for c in body.consts]) if isinstance(body, jex.ClosedJaxpr) else (body, [])
            if len(opened.invars) == len(inputs):
                values.update(zip(eqn.outvars, _evaluate(opened, held, inputs, found), strict=True))
                continue
        if all(i is not None for i in inputs) and all(np.prod(v.aval.shape) <= MOST for v in eqn.outvars):
            out = eqn.primitive.bind(*inputs, **eqn.params)
            values.update(zip(eqn.outvars, [np.asarray(o) for o in (out if eqn.primitive.multiple_results else [out])], strict=True))
    return [read(v) for v in jaxpr.outvars]
