"""Random cases of every op against float64, forward and gradients.

    python -m tests.fuzz --op attention --cases 2000 --seed 7 --framework jax

Shapes, masks, dtypes and parameters are drawn anew for every twenty cases, because compiling is what costs; values are drawn
for each. The seed is printed; a failure prints the line that repeats it alone. Exit status 1 if there is any.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import multiprocessing
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any
from unittest import mock

import numpy as np

import kpt
from kpt.graph.expr import numpy_dtype
from kpt.kernels import KernelSpec
from kpt.kernels.spec import refusal
from kpt.kernels.validate import validate
from kpt.ops import Op, Spec
from tests.cases import CASES, Case, edge, marked, poisoned

Arrays = dict[str, np.ndarray]

# Kinds of values: how many of each a compiled case meets, what is done to the sample, and whether gradients are compared.
KINDS: dict[str, tuple[int, Callable[..., Arrays], bool]] = {
    "plain": (10, lambda case, arrays, rng: arrays, True),
    "edge": (5, edge, True),
    "poisoned": (5, poisoned, False),
}
MARKED: dict[str, tuple[int, Callable[..., Arrays], bool]] = {"marked": (5, marked, True)}
"""Kinds besides, where a bias can hold them."""
VALUES_PER_SHAPE = sum(n for n, _, _ in KINDS.values())
SHAPES_PER_TASK = 4
SHOWN = 20  # failures

# Constants that decide how a kernel cuts its arrays. Every third case runs with these in their place, so that small shapes have
# many blocks, ragged ones and hidden ones.
SMALL_BLOCKS: dict[tuple[str, str], tuple[str, str, Any]] = {
    ("jax", "attention"): ("pallas_kernels.attention.xla", "_block_sizes", lambda *_: {"block_q": 16, "block_kv": 24}),
    ("jax", "linear_cross_entropy"): ("pallas_kernels.linear_cross_entropy.xla", "CHUNK_BYTES", 2048),
    ("torch", "linear_cross_entropy"): ("kpt_torch.kernels.rows", "CHUNK_BYTES", 2048),
}
EVERYWHERE = {"jax": ("xla",), "torch": ("torch", "sdpa")}
# torch adds masks to scores: a NaN there shows, whoever may see it, and the kernel's docstring says so.
NO_POISON = frozenset({"attention.sdpa"})


def providers(op: str, framework: str = "jax") -> list[KernelSpec]:
    """The kernels of this op that run on every machine."""
    return [k for k in kpt.registry.kernels(op) if k.framework == framework and k.provider in EVERYWHERE[framework]]


@dataclasses.dataclass(frozen=True)
class Call:
    """One kernel with one set of parameters: `run(arrays)` and `run_vjp(arrays, cotangents)`, on NumPy arrays."""

    run: Callable[[Arrays], tuple[np.ndarray, ...]]
    run_vjp: Callable[[Arrays, tuple[np.ndarray, ...]], Arrays]


def jax_call(op: Op, specs: dict[str, Spec], params: dict[str, Any], fn: Callable[..., Any]) -> Call:
    """The JAX way: outputs and gradients in one program, which is compiled once."""
    import jax

    @jax.jit
    def both(arrays: dict[str, Any], cotangents: list[Any]) -> Any:
        rest = {n: a for n, a in arrays.items() if n not in op.differentiable}
        out, pull = jax.vjp(lambda d: fn(**d, **rest, **params), {n: a for n, a in arrays.items() if n not in rest})
        outs = out if isinstance(out, tuple) else (out,)
        g = tuple(c.astype(o.dtype) for c, o in zip(cotangents, outs, strict=True))
        return outs, pull(g if isinstance(out, tuple) else g[0])[0]

    zeros = [np.zeros(s.shape, numpy_dtype(s.dtype)) for s in op.infer(specs, **params)]
    return Call(lambda arrays: jax.device_get(both(arrays, zeros)[0]),
                lambda arrays, cotangents: jax.device_get(both(arrays, list(cotangents))[1]))  # fmt: skip


def torch_call(op: Op, specs: dict[str, Spec], params: dict[str, Any], fn: Callable[..., Any]) -> Call:
    """The PyTorch way: autograd through the kernel's own backward pass."""
    from kpt_torch.planner import calls

    run, run_vjp = calls(op.differentiable, "cpu")
    return Call(lambda arrays: run(fn, arrays, params), lambda arrays, cotangents: run_vjp(fn, arrays, params, cotangents))


FRAMEWORKS: dict[str, Callable[..., Call]] = {"jax": jax_call, "torch": torch_call}


def check(kernel: KernelSpec, case: Case, first_seed: int) -> Iterator[str]:
    """What is wrong, for each set of values on which anything is."""
    op = kpt.ops.op(case.op)
    fn = kpt.registry.load(kernel)
    call = FRAMEWORKS[kernel.framework](op, case.specs, case.params, fn)
    wanted = op.infer(case.specs, **case.params)

    def run(_: Any, arrays: Arrays, __: Any) -> tuple[np.ndarray, ...]:
        outs = call.run(arrays)
        found = tuple(Spec(o.shape, o.dtype.name) for o in outs)
        if found != wanted:
            raise TypeError(f"returned {found}, not {wanted}")
        return outs

    seed = first_seed
    in_numbers = case.op == "attention" and case.specs.get("bias", Spec((), "float16")).dtype != "float16"
    for kind, (count, change, gradients) in (KINDS | (MARKED if in_numbers else {})).items():
        if kind == "poisoned" and kernel.name in NO_POISON:
            continue

        def sample(rng: np.random.Generator, specs: Any, change: Any = change, **params: Any) -> Arrays:
            return change(case, op.sample(rng, specs, **params), rng)

        drawn = dataclasses.replace(op, sample=sample)
        run_vjp = (lambda _, arrays, __, cotangents: call.run_vjp(arrays, cotangents)) if gradients else None
        for _ in range(count):
            try:
                got = validate(fn, drawn, case.specs, case.params, run=run, run_vjp=run_vjp, seeds=[seed])
            except Exception as error:  # a kernel that raises has failed this case, and the others are still to be run
                yield f"{kind} values {seed}: raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            else:
                if not got.passed:
                    yield f"{kind} values {seed}: {got.summary()}"
            seed += 1


def fuzz_shapes(op: str, shapes: range, seed: int, framework: str = "jax") -> list[str]:
    """A line for each failure among these shapes of the seed's sequence."""
    failures = []
    for i in shapes:
        case = CASES[op](np.random.default_rng([seed, i]))
        small = (framework, op) in SMALL_BLOCKS and i % 3 == 2
        with _small_blocks(framework, op) if small else contextlib.nullcontext():
            for kernel in providers(op, framework):
                if refused(kernel, case):
                    continue
                for why in check(kernel, case, VALUES_PER_SHAPE * i):
                    failures.append(f"{kernel.name}: {case}{' in small blocks' if small else ''}\n  {why}\n"
                                    f"  python -m tests.fuzz --op {op} --seed {seed} --only {i} --framework {framework}")  # fmt: skip
    return failures


def refused(kernel: KernelSpec, case: Case) -> str | None:
    """Why a kernel is not given this case; a plan would not choose it either."""
    dtype = next(iter(case.specs.values())).dtype
    return refusal(kernel, case.op, kpt.hardware_profile("cpu"), dtype, case.specs, case.params, "aggressive", kernel.framework)


def _small_blocks(framework: str, op: str) -> contextlib.AbstractContextManager:
    module, name, value = SMALL_BLOCKS[framework, op]
    return mock.patch.object(importlib.import_module(module), name, value)


def fuzz(ops: list[str], cases: int, seed: int, *, framework: str = "jax", jobs: int = 1,
         on_done: Callable[[str, int, list[str]], None] = lambda op, cases, failures: None) -> list[str]:  # fmt: skip
    """Runs `cases` cases of each op on every provider, in `jobs` processes; returns a line for each failure."""
    count = -(-cases // VALUES_PER_SHAPE)
    tasks = [(op, range(i, min(i + SHAPES_PER_TASK, count)), seed, framework) for op in ops for i in range(0, count, SHAPES_PER_TASK)]
    failures: list[str] = []
    with contextlib.ExitStack() as stack:
        if jobs == 1:
            results = ((task, fuzz_shapes(*task)) for task in tasks)
        else:  # JAX starts threads, which a fork does not survive
            pool = stack.enter_context(ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")))
            running = {pool.submit(fuzz_shapes, *task): task for task in tasks}
            results = ((running[done], done.result()) for done in as_completed(running))
        for (op, shapes, _, _), found in results:
            on_done(op, len(shapes) * VALUES_PER_SHAPE, found)
            failures += found
    return failures


def main() -> int:
    from rich.progress import MofNCompleteColumn, Progress

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", choices=list(CASES), help="may be repeated; default: all")
    parser.add_argument("--cases", type=int, default=2000, help="per op (default 2000)")
    parser.add_argument("--seed", type=int, default=None, help="default: a random one")
    parser.add_argument("--only", type=int, default=None, help="number of the one shape to run")
    parser.add_argument("--framework", choices=list(FRAMEWORKS), default="jax")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    given = parser.parse_args()
    seed = secrets.randbelow(1 << 31) if given.seed is None else given.seed
    ops = given.op or list(CASES)
    print(f"seed {seed}", flush=True)
    done, wrong = dict.fromkeys(ops, 0), dict.fromkeys(ops, 0)

    if given.only is not None:
        failures = [f for op in ops for f in fuzz_shapes(op, range(given.only, given.only + 1), seed, given.framework)]
        print("\n".join(failures) or f"shape {given.only}: {VALUES_PER_SHAPE} cases, none wrong")
        return 1 if failures else 0

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), disable=not sys.stdout.isatty()) as bar:
        tasks = {op: bar.add_task(op, total=-(-given.cases // VALUES_PER_SHAPE) * VALUES_PER_SHAPE) for op in ops}

        def on_done(op: str, cases: int, found: list[str]) -> None:
            bar.update(tasks[op], advance=cases)
            done[op] += cases
            wrong[op] += len(found)
            for line in found[: max(0, SHOWN - sum(wrong.values()) + len(found))]:
                bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
            if done[op] >= given.cases:
                bar.console.print(f"{op}: {done[op]} cases, {wrong[op]} wrong", highlight=False)

        failures = fuzz(ops, given.cases, seed, framework=given.framework, jobs=given.jobs, on_done=on_done)
    if len(failures) > SHOWN:
        print(f"and {len(failures) - SHOWN} more")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
