"""Random cases of every op against float64, forward and gradients.

    python -m tests.fuzz --op attention --cases 2000 --seed 7

Shapes, masks and parameters are drawn anew for every few cases, values for each, and every third case carries NaN, infinities
or labels outside the vocabulary. The seed is printed; a failure prints the line that repeats it alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import secrets
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import kpt
from kpt.graph.expr import numpy_dtype
from kpt.kernels import KernelSpec
from kpt.kernels.validate import validate
from kpt.ops import op as op_named
from tests.cases import CASES, Case, edge, poisoned


def providers(op: str) -> list[KernelSpec]:
    """The JAX kernels of this op that run on this machine."""
    return [k for k in kpt.registry.kernels(op) if k.framework == "jax" and k.provider == "xla"]


def jax_runner(op: Any, params: dict[str, Any], fn: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(run, run_vjp) of `kpt.kernels.validate`, compiled once for this case."""
    import jax

    def split(arrays: dict[str, Any]) -> tuple[dict, dict]:
        diff = {n: a for n, a in arrays.items() if n in op.differentiable}
        return diff, {n: a for n, a in arrays.items() if n not in diff}

    @jax.jit
    def both(arrays: dict[str, Any], cotangents: list[Any]) -> Any:
        diff, rest = split(arrays)
        out, pull = jax.vjp(lambda d: fn(**d, **rest, **params), diff)
        return out, pull(tuple(cotangents) if isinstance(out, tuple) else cotangents[0])[0]

    def run(_: Any, arrays: dict[str, Any], __: Any) -> Any:
        specs = op.infer({n: kpt.ops.Spec(a.shape, a.dtype.name) for n, a in arrays.items()}, **params)
        zeros = [np.zeros(s.shape, numpy_dtype(s.dtype)) for s in specs]
        return jax.device_get(both(arrays, zeros)[0])

    def run_vjp(_: Any, arrays: dict[str, Any], __: Any, cotangents: Any) -> Any:
        return jax.device_get(both(arrays, list(cotangents))[1])

    return run, run_vjp


# Kinds of values, and how many of each a compiled case meets: plain ones, legal edges, NaN and infinities.
KINDS: dict[str, tuple[int, Callable[..., dict[str, np.ndarray]]]] = {
    "plain": (20, lambda case, arrays, rng: arrays),
    "edge": (10, edge),
    "poisoned": (10, poisoned),
}
VALUES_PER_SHAPE = sum(n for n, _ in KINDS.values())  # compiling is what costs


def check(kernel: KernelSpec, case: Case, seeds: list[int], kind: str) -> Iterator[tuple[int, str]]:
    """(seed, what is wrong) of every seed whose certificate fails."""
    op = op_named(case.op)
    fn = kpt.registry.load(kernel)
    run, run_vjp = jax_runner(op, case.params, fn)

    def sample(rng: np.random.Generator, specs: Any, **params: Any) -> dict[str, np.ndarray]:
        arrays = op.sample(rng, specs, **params)
        return KINDS[kind][1](case, arrays, rng)

    drawn = dataclasses.replace(op, sample=sample)
    for seed in seeds:
        try:
            got = validate(fn, drawn, case.specs, case.params, run=run, run_vjp=None if kind == "poisoned" else run_vjp,
                           seeds=[seed])  # fmt: skip
        except Exception as error:  # a kernel that raises has failed the case, and the others are to be run
            yield seed, f"raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            continue
        if not got.passed:
            yield seed, got.summary()


def fuzz(op: str, cases: int, seed: int, on_case: Callable[[int], None] = lambda n: None, only: int | None = None) -> list[str]:
    """Runs `cases` cases of one op on every provider; returns a line for each failure."""
    failures = []
    shapes = -(-cases // VALUES_PER_SHAPE)
    for i in range(shapes) if only is None else [only]:
        case = CASES[op](np.random.default_rng([seed, i]))
        for kernel in providers(op):
            for k, (kind, (count, _)) in enumerate(KINDS.items()):
                for bad, why in check(kernel, case, [1000 * i + 100 * k + j for j in range(count)], kind):
                    failures.append(f"{kernel.name}: {case}\n  {kind} values {bad}: {why}\n"
                                    f"  python -m tests.fuzz --op {op} --seed {seed} --only {i}")  # fmt: skip
        on_case(VALUES_PER_SHAPE)
    return failures


def main() -> int:
    from rich.progress import Progress

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", choices=list(CASES), help="default: all")
    parser.add_argument("--cases", type=int, default=2000, help="per op (default 2000)")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--only", type=int, default=None, help="number of the one shape to run")
    given = parser.parse_args()
    seed = secrets.randbelow(1 << 31) if given.seed is None else given.seed
    print(f"seed {seed}")
    failed = 0
    with Progress(disable=not sys.stdout.isatty()) as bar:
        for op in given.op or list(CASES):
            task = bar.add_task(op, total=given.cases)
            found = fuzz(op, given.cases, seed, lambda n, t=task: bar.update(t, advance=n), given.only)
            print(f"{op}: {-(-given.cases // VALUES_PER_SHAPE) * VALUES_PER_SHAPE} cases, {len(found)} wrong", flush=True)
            for line in found[:5]:
                print(line)
            failed += len(found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
