"""Proof of a swap: the kernel beside the code that it replaces, on random inputs and on the user's own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kpt import ops
from kpt.fusion.program import Match, Program
from kpt.graph.expr import numpy_dtype
from kpt.graph.graph import Graph, Node
from kpt.ops.base import Spec
from kpt.validation import Certificate, compare
from kpt_jax import _compat
from kpt_jax.apply import Rewrite, run

_STEP = 2.0**-7  # relative size of the perturbation that shows how much a result may cancel


def leaf_values(program: Program, match: Match) -> tuple[int, ...]:
    """The program values that a match's arrays, and its results from the kernel's, are computed from."""
    return tuple(sorted(set().union(*(program.leaves(a) for a in (*match.arrays.values(), *match.results.values())))))


def isolated(program: Program, match: Match) -> Graph:
    """The code of one site alone: from its leaves to its results."""
    g = program.graph
    leaves = leaf_values(program, match)
    consts = {v: c for v, c in g.consts.items() if v not in leaves}
    nodes = program.consumed(match)
    made = {v for n in nodes for v in n.outputs}
    # A leaf may go by several names (a copy, a call's argument); the code may read it under any of them.
    names = {v: leaf for leaf in leaves for v in program.env[leaf].origins if v not in made and v != leaf}
    copies = [Node("identity", (leaf,), (v,)) for v, leaf in names.items()]
    return Graph(g.name, leaves, tuple(match.results), g.specs, consts, copies + nodes)


def original_bytes(program: Program, match: Match) -> int:
    """Memory that the site's own code may take, forward and backward: an upper estimate, in bytes."""
    specs = [program.graph.specs[v] for n in program.consumed(match) for v in n.outputs]
    size = sum(math.prod(s.shape) * numpy_dtype(s.dtype).itemsize for s in specs if s.dtype not in ("key", "token"))
    return 2 * size


def sample(program: Program, match: Match, seed: int) -> dict[int, np.ndarray]:
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
        out[v] = _draw(rng, spec, name, specs)
    return out


def _draw(rng: np.random.Generator, spec: Spec, name: str, specs: Mapping[str, Spec]) -> np.ndarray:
    dtype = numpy_dtype(spec.dtype)
    if spec.dtype == "bool":
        return rng.random(spec.shape) < 0.85
    if dtype.kind in "iu":
        if name == "labels":
            high = specs["logits"].shape[-1] if "logits" in specs else specs["w"].shape[-1]
        elif name == "kv_lengths":
            return rng.integers(1, specs["k"].shape[1] + 1, spec.shape).astype(dtype)
        elif name.endswith("segment_ids"):
            return np.sort(rng.integers(0, 3, spec.shape), axis=-1).astype(dtype)
        else:  # a 0/1 mask kept as numbers
            return (rng.random(spec.shape) < 0.85).astype(dtype)
        return rng.integers(0, max(high, 1), spec.shape).astype(dtype)
    x = rng.standard_normal(spec.shape)
    if name in ("w", "w_gate", "w_up", "b"):
        x = x / math.sqrt(max(specs["x"].shape[-1], 1))
    if name == "weight":
        x = 1.0 + 0.1 * x
    return np.asarray(x).astype(dtype)


@dataclasses.dataclass(frozen=True)
class _Sides:
    """Original and kernel of one site, compiled: (leaves, cotangents) -> (results, gradients)."""

    original: Callable[..., Any]
    kernel: Callable[..., Any]


def _sides(program: Program, match: Match, kernel: Callable[..., Any], wrt: Sequence[int]) -> _Sides:
    g = isolated(program, match)
    base, fast = Rewrite(g), Rewrite(g, program, [(match, kernel)])

    def with_gradients(rw: Rewrite) -> Callable[..., Any]:
        def both(leaves: dict[int, Any], cotangents: list[Any]) -> Any:
            def forward(diff: list[Any]) -> list[Any]:
                given = {**leaves, **dict(zip(wrt, diff, strict=True))}
                return run(rw, [given[v] for v in g.inputs])

            outs, vjp = jax.vjp(forward, [leaves[v] for v in wrt])
            return outs, vjp(list(cotangents))[0]

        return jax.jit(both)

    return _Sides(with_gradients(base), with_gradients(fast))


def certify_site(
    program: Program,
    match: Match,
    kernel: Callable[..., Any],
    seeds: Sequence[int] = (0,),
    example: Mapping[int, Any] | None = None,
) -> Certificate:
    """Compares the kernel with the code it replaces, results and gradients, within the one tolerance.

    Args:
      seeds: of random inputs.
      example: the user's own values of the site's leaves, if they are known.

    Raises:
      Whatever the kernel raises; the caller drops the site and says so.
    """
    floats = [v for v in leaf_values(program, match) if program.graph.specs[v].dtype.startswith(("float", "bfloat"))]
    names = {v: _name(program, match, v) for v in floats}
    draws = [(f"seed {s}", sample(program, match, s)) for s in seeds]
    if example is not None:
        draws.append(("the example inputs", {v: np.asarray(a) for v, a in example.items()}))
    dtype = narrowest([program.graph.specs[v].dtype for v in (*floats, *match.results)])
    certificate: Certificate | None = None
    with _compat.concrete():
        sides = _sides(program, match, kernel, floats)
        for where, leaves in draws:
            rng = np.random.default_rng(len(where))
            cts = [
                jnp.asarray(rng.standard_normal(program.graph.specs[v].shape).astype(numpy_dtype(program.graph.specs[v].dtype)))
                for v in match.results
            ]
            want, want_grads = jax.device_get(sides.original(leaves, cts))
            got, got_grads = jax.device_get(sides.kernel(leaves, cts))
            moved = {
                v: (a * (1 + _STEP * rng.uniform(-1, 1, a.shape)).astype(a.dtype) if v in names else a)
                for v, a in leaves.items()
            }
            near, near_grads = jax.device_get(sides.original(moved, cts))

            def named(outs: Any, grads: Any) -> dict[str, np.ndarray]:
                return {f"result{i}": np.asarray(o) for i, o in enumerate(outs)} | {
                    f"d{names[v]}": np.asarray(x) for v, x in zip(floats, grads, strict=True)
                }

            actual, original, shifted = named(got, got_grads), named(want, want_grads), named(near, near_grads)
            with np.errstate(all="ignore"):
                sensitivity = {
                    n: np.abs(np.asarray(shifted[n], np.float64) - np.asarray(original[n], np.float64)) / _STEP
                    for n in original
                }
            lengths = {n: _reduction_length(match, a.size) for n, a in original.items()}
            made = compare(actual, original, dtype, lengths, gradients=[n for n in original if n.startswith("d")],
                           sensitivity=sensitivity, where=where)  # fmt: skip
            certificate = made if certificate is None else certificate.merge(made)
    assert certificate is not None
    return certificate


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


def reduced_specs(match: Match, largest: int = 96) -> dict[str, Spec]:
    """The site's arrays with long dimensions cut short, equal sizes staying equal."""
    sizes = sorted({n for e in match.arrays.values() for n in e.shape if n > largest})
    to = {n: largest + i for i, n in enumerate(sizes)}
    return {name: Spec(tuple(to.get(n, n) for n in e.shape), e.dtype) for name, e in match.arrays.items()}
