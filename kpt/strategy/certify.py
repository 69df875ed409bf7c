"""Proof of a swap: the kernel beside the code that it replaces, on random inputs and on the user's own.

A front end runs the two sides (`Sides`); what they are run on, what is compared, and how far apart they may be, is decided here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kpt import ops
from kpt.fusion.program import Match, Program
from kpt.fusion.site import cancelled_values, leaf_values
from kpt.graph.expr import numpy_dtype
from kpt.kernels.validate import cancelling_terms
from kpt.ops.base import Spec
from kpt.ops.mask import Mask
from kpt.strategy.arrays import NUMPY, Arrays
from kpt.validation import Certificate, compare, metrics
from kpt.validation.conditioning import COARSE, sensitivity

_FEW = 4096  # elements of a site below which it is looked at more than once

Leaves = Mapping[int, Any]
Side = Callable[[Leaves, Sequence[Any]], tuple[Sequence[Any], Sequence[Any]]]


@dataclasses.dataclass(frozen=True)
class Sides:
    """One site, run by a front end.

    Attributes:
      original, kernel: (values of the site's leaves, one cotangent per result) -> (results, gradients of `wrt`).
      of_op: values of the leaves -> the op's arrays, by name, as the kernel is given them.
      arrays: what these values are.
    """

    original: Side
    kernel: Side
    of_op: Callable[[Leaves], Mapping[str, Any]]
    arrays: Arrays = NUMPY


def moving_leaves(program: Program, match: Match) -> list[int]:
    """The leaves whose gradients are compared: floats that a result depends on."""
    moving = set(leaf_values(program, match)) - cancelled_values(program, match)  # what cancels has rounding errors for a gradient
    return [v for v in sorted(moving) if program.graph.specs[v].dtype.startswith(("float", "bfloat"))]


def certify_site(
    program: Program,
    match: Match,
    sides: Sides,
    seeds: Sequence[int] | None = None,
    example: Mapping[int, Any] | None = None,
) -> Certificate:
    """Compares the kernel with the code it replaces, results and gradients, within the one tolerance.

    Args:
      sides: whose gradients are those of `moving_leaves`, in that order.
      seeds: of random inputs; by default one, and up to four where the site's arrays have few elements.
      example: the user's own values of the site's leaves, if they are known.

    Raises:
      Whatever the kernel raises; the caller drops the site and says so.
    """
    floats, room = moving_leaves(program, match), sides.arrays
    names = {v: _name(program, match, v) for v in floats}
    elements = sum(math.prod(program.graph.specs[v].shape) for v in (*floats, *match.results))
    few = max(1, _FEW // max(elements, 1))  # what one draw shows of few numbers is little
    draws = [(f"seed {s}", sample(program, match, s, room)) for s in (range(min(4, few)) if seeds is None else seeds)]
    if example is not None:
        draws.append(("the example inputs", dict(example)))
    dtype = narrowest([e.dtype for e in match.arrays.values()] + [program.graph.specs[v].dtype for v in (*floats, *match.results)])
    certificate: Certificate | None = None

    def hold(actual: Any, original: Any, where: str, measure: Any, moved: Any = None, terms: Any = None) -> Certificate:
        gradients = [n for n in original if n.startswith("d")]
        lengths = {n: _reduction_length(match, math.prod(a.shape)) for n, a in original.items()}
        return compare(actual, original, dtype, lengths, gradients=gradients, sensitivity=moved, terms=terms, where=where, measure=measure)

    def on_host(arrays: Mapping[Any, Any]) -> dict[Any, np.ndarray]:
        return {n: room.get(a) for n, a in arrays.items()}

    for where, leaves in draws:
        rng = np.random.default_rng(len(where))
        cts = [_normal(rng, program.graph.specs[v], room) for v in match.results]

        def named(side: Side, leaves: Leaves, cts: list[Any] = cts) -> dict[str, Any]:
            outs, grads = side(leaves, cts)
            return {f"result{i}": o for i, o in enumerate(outs)} | {f"d{names[v]}": x for v, x in zip(floats, grads, strict=True)}

        actual, original = named(sides.kernel, leaves), named(sides.original, leaves)
        made = hold(actual, original, where, room.metrics)
        if not made.passed:  # for most sites nothing cancels, and the bounds need no more than that
            actual, original = on_host(actual), on_host(original)

            def nearby(leaves: Leaves, named: Any = named) -> dict[str, np.ndarray]:
                return on_host(named(sides.original, {v: room.put(a) for v, a in leaves.items()}))

            moved = sensitivity(nearby, on_host(leaves), rng, original, COARSE)
            made = hold(actual, original, where, metrics, moved)
            if not made.passed:
                terms = _cancelling(program, match, on_host(sides.of_op(leaves)), original, [room.get(c) for c in cts], names)
                made = hold(actual, original, where, metrics, moved, terms)
        certificate = made if certificate is None else certificate.merge(made)
    assert certificate is not None
    return certificate


def sample(program: Program, match: Match, seed: int, room: Arrays = NUMPY) -> dict[int, Any]:
    """Random values for the leaves of a site, each in the domain of the array that it is part of."""
    rng = np.random.default_rng(seed)
    specs = {name: e.spec for name, e in match.arrays.items()}
    role: dict[int, str] = {}
    for name, e in match.arrays.items():
        for v in program.leaves(e):
            role.setdefault(v, name)
    for v in leaf_values(program, match):
        role.setdefault(v, "")
    out = {}
    for v, name in sorted(role.items()):
        spec = program.graph.specs[v]
        out[v] = draw(rng, spec, name, specs, room)
    return out


def draw(rng: np.random.Generator, spec: Spec, name: str, specs: Mapping[str, Spec], room: Arrays = NUMPY) -> Any:
    """Random values of the array `name` of an op whose arrays are `specs`, in its domain."""
    if spec.dtype == "bool" or numpy_dtype(spec.dtype).kind in "iu":
        return room.put(_whole_numbers(rng, spec, name, specs))
    if name in ("w", "w_gate", "w_up", "b"):
        return _normal(rng, spec, room, 0.0, 1 / math.sqrt(max(specs["x"].shape[-1], 1)))
    return _normal(rng, spec, room, 1.0, 0.1) if name == "weight" else _normal(rng, spec, room)


def _whole_numbers(rng: np.random.Generator, spec: Spec, name: str, specs: Mapping[str, Spec]) -> np.ndarray:
    dtype = numpy_dtype(spec.dtype)
    if spec.dtype == "bool":
        return rng.random(spec.shape) < 0.85
    if name == "labels":
        high = specs["logits"].shape[-1] if "logits" in specs else specs["w"].shape[-1]
        return rng.integers(0, max(high, 1), spec.shape).astype(dtype)
    if name == "group_sizes":
        return np.full(spec.shape, specs["x"].shape[0] // max(1, spec.shape[0]), dtype)
    if name == "kv_lengths":
        return rng.integers(1, specs["k"].shape[1] + 1, spec.shape).astype(dtype)
    if name.endswith("segment_ids"):
        return np.sort(rng.integers(0, 3, spec.shape), axis=-1).astype(dtype)
    return (rng.random(spec.shape) < 0.85).astype(dtype)  # a 0/1 mask kept as numbers


def _normal(rng: np.random.Generator, spec: Spec, room: Arrays, mean: float = 0.0, deviation: float = 1.0) -> Any:
    return room.normal(int(rng.integers(2**32)), spec, mean, deviation)


def _cancelling(
    program: Program, match: Match, given: Mapping[str, np.ndarray], original: Mapping[str, np.ndarray], cotangents: Sequence[Any],
    names: Mapping[int, str],
) -> dict[str, Any]:  # fmt: skip
    """Size of the terms that cancel inside of a site, by result and gradient: `cancelling_terms` of its op.

    The op speaks of its own arrays and outputs, the site of what they are computed from and what is made of them. Where
    the two are the same they count element by element, else with their root mean square.
    """
    arrays = {}
    for name, e in match.arrays.items():
        a = np.asarray(given[name])
        arrays[name] = a.astype(np.float64) if e.dtype.startswith(("float", "bfloat")) else a
    results = tuple(f"result{i}" for i in range(len(match.results)))
    exact = {n: np.asarray(original[n], np.float64) for n in results}
    cts = tuple(np.asarray(c, np.float64) for c in cotangents)
    differentiable = [n for n in ops.op(match.op).differentiable if n in arrays]
    params = dict(match.params)
    mask = params.get("mask", Mask())
    if mask.additive and abs(mask.fill) * np.finfo(np.float32).eps > 8:  # no score is left of the sum: the weights are even, here as there
        params["mask"] = dataclasses.replace(mask, additive=False)
    with np.errstate(all="ignore"):  # the arrays may hold NaN and infinities
        found = cancelling_terms(match.op, arrays, params, results, exact, cts, differentiable)

    def size(t: Any, direct: bool) -> Any:
        return t if direct or not np.ndim(t) else _rms(t)

    outs = list(match.results.values())
    by_output = {id(e): found[n] for n, e in reversed(list(zip(results, outs, strict=True)))}  # one output may have two names
    terms = {n: size(by_output[id(e)], e.op == "out") for n, e in zip(results, outs, strict=True)}
    for v, name in names.items():
        owners = [(n, match.arrays[n]) for n in differentiable if v in program.leaves(match.arrays[n])]
        terms[f"d{name}"] = sum((size(found[n], bool(e.origins) and e.origins[0] == v) for n, e in owners), 0.0)
    return terms


def _rms(t: Any) -> float:
    finite = np.asarray(t)[np.isfinite(t)]
    return float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0


def _name(program: Program, match: Match, v: int) -> str:
    owners = [n for n, e in match.arrays.items() if v in program.leaves(e)]
    return ("+".join(owners) or f"factor{v}") + (f"#{v}" if sum(v2 != v for n in owners for v2 in program.leaves(match.arrays[n])) else "")


def _reduction_length(match: Match, elements: int) -> int:
    return reduction_length(match.op, {n: e.spec for n, e in match.arrays.items()}, match.params, elements)


def reduction_length(op: str, specs: Mapping[str, Spec], params: Mapping[str, Any], elements: int | None = None) -> int:
    """How many terms an op sums into each of `elements` (by default, those of its results): flops / (2 elements)."""
    if elements is None:
        elements = sum(math.prod(s.shape) for s in ops.op(op).infer(specs, **params))
    return max(1, math.ceil(ops.op(op).cost(specs, **params).flops / (2 * max(elements, 1))))


def narrowest(dtypes: Sequence[str]) -> str:
    floats = [d for d in dtypes if d.startswith(("float", "bfloat"))]
    return min(floats, key=lambda d: ("bfloat16", "float16", "float32", "float64").index(d)) if floats else "float32"


def rounds_on_the_way(program: Program, match: Match) -> str | None:
    """Why a site must not be taken on the word of the float64 reference: its code rounds to a narrower dtype than it stores."""
    stored = [e.dtype for e in match.arrays.values()] + [program.graph.specs[v].dtype for v in match.results]
    if not any(d.startswith(("float", "bfloat")) for d in stored):
        return None
    finest = numpy_dtype(narrowest(stored)).itemsize
    for n in program.consumed(match):
        made = program.graph.specs[n.outputs[0]].dtype
        if n.op == "convert" and made.startswith(("float", "bfloat")) and numpy_dtype(made).itemsize < finest:
            return f"it rounds to {made} on the way, which the kernel would not"
    return None


def digest(example: Mapping[int, Any], room: Arrays) -> str:
    """The user's own data is part of a proof that was made on it."""
    return " ".join(f"{v}{tuple(a.shape)}{room.digest(a)}" for v, a in example.items())
