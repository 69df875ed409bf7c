"""The integers that Pallas kernels of a function read from scalar memory, as far as its code alone decides them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from kpt_jax._compat import scan_layout
from kpt_jax.pallas_calls import CALLS, bodies, call_name

MOST = 1 << 20
"""Elements of an array that is worth a computation."""
INTEGERS, NUMBERS = "iub", "iubf"
"""Kinds of dtypes. Arguments that are integers are known; what is computed of them may be floats on the way, as a histogram is."""


def prefetched(closed: Any, args: Sequence[Any]) -> list[tuple[str, list[np.ndarray | None]]]:
    """Name and operands of each Pallas call of a jaxpr, that of a function of `args`, in its order, those within loops included.

    An operand is known if integers make it that are in the code, or in arguments that are arrays. It is None where it depends on a
    `jax.ShapeDtypeStruct`, a random key or what a loop changes, and where it is no small array of integers.
    """
    found: list[tuple[str, list[np.ndarray | None]]] = []
    integers = [isinstance(a, np.ndarray | jax.Array) and getattr(a.dtype, "kind", "-") in INTEGERS for a in jax.tree.leaves(tuple(args))]
    known = [a if so else None for a, so in zip(jax.tree.leaves(tuple(args)), integers, strict=True)]
    _evaluate(closed.jaxpr, closed.consts, known, found)
    return found


def _evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], found: list[Any]) -> list[Any]:
    """Results of a jaxpr, None for those that are not known."""
    values: dict[Any, Any] = {}

    def keep(variables: Sequence[Any], those: Sequence[Any]) -> None:
        for v, a in zip(variables, those, strict=True):
            # Another shape is another array: a shard of it, say. A tracer is what the body of a kernel closes over, references of another.
            if a is not None and not isinstance(a, jax.core.Tracer) and _small(v.aval) and np.shape(a) == v.aval.shape:
                values[v] = np.asarray(a, v.aval.dtype)

    def read(v: Any) -> Any:
        if isinstance(v, jex.Literal):
            return np.asarray(v.val) if _small(v.aval) else None
        return values.get(v)

    keep([*jaxpr.constvars, *jaxpr.invars], [*consts, *args])
    for eqn in jaxpr.eqns:
        inputs = [read(v) for v in eqn.invars]
        if eqn.primitive.name in CALLS:
            integers = [i if i is not None and i.dtype.kind in INTEGERS else None for i in inputs]
            found.append((call_name(eqn.params), integers))
            continue
        inner = list(bodies(eqn))
        results = [_evaluate(body, body_consts, _inputs(eqn, body, inputs), found) for body, body_consts in inner]
        if len(inner) == 1 and eqn.primitive.name not in ("scan", "while", "cond") and len(results[0]) == len(eqn.outvars):
            keep(eqn.outvars, results[0])
        # A body may be less than the whole: that of a scatter adds two numbers.
        if any(v not in values for v in eqn.outvars) and all(i is not None for i in inputs) and _harmless(eqn):
            try:
                out = eqn.primitive.bind(*inputs, **eqn.params)
            except Exception:  # what only a mesh or a TPU can compute is not known here, and no reason to fail
                continue
            keep(eqn.outvars, out if eqn.primitive.multiple_results else [out])
    return [read(v) for v in jaxpr.outvars]


def _inputs(eqn: Any, body: Any, inputs: Sequence[Any]) -> list[Any]:
    """What a body within an equation gets: of a loop, what every turn of it gets."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        inputs = inputs[: scan_layout(eqn)[0]]
    elif name == "while":
        first, second = params["cond_nconsts"], params["body_nconsts"]
        inputs = inputs[:first] if body is params["cond_jaxpr"].jaxpr else inputs[first : first + second]
    elif name == "cond":
        inputs = inputs[1:]
    elif len(inputs) != len(body.invars):
        inputs = []
    return [*inputs, *[None] * (len(body.invars) - len(inputs))]


def _small(aval: Any) -> bool:
    """An array of numbers that is worth a computation. Keys are no numbers."""
    kind = getattr(getattr(aval, "dtype", None), "kind", "")
    return isinstance(getattr(aval, "dtype", None), np.dtype) and kind in NUMBERS and np.prod(aval.shape) <= MOST


def _harmless(eqn: Any) -> bool:
    """Whether an equation only computes small arrays from small arrays, also in all that is within it: no kernel, nothing of the user's
    own that Python or a library would be called for, and no work to speak of."""
    name = eqn.primitive.name
    opaque = "call" in name and name != "call_hi_primitive"  # jax 0.12's name for what it expands itself, a searchsorted
    if eqn.effects or opaque or not all(_small(v.aval) for v in (*eqn.invars, *eqn.outvars)):
        return False
    return all(_harmless(e) for body, _ in bodies(eqn) for e in body.eqns)
