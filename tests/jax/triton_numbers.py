"""Holds the Triton kernels as JAX launches them to float64: `TRITON_INTERPRET=1 python -m tests.jax.triton_numbers OP CASES SEED`.

jax-triton launches on GPUs alone. A stand-in for its one function runs the same launch, argument by argument, in Triton's interpreter.
Every other case runs in small blocks, so that small shapes have many. Prints what fails; exit status 1 if anything does.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from triton.runtime import interpreter

import kpt
from kpt.kernels.spec import refusal
from kpt_torch.planner import from_numpy, to_numpy
from tests import fuzz
from tests.cases import CASES, Case
from tests.jax.certified import mesh_of_one


def interpreted(*operands: Any, kernel: Any, grid: tuple[int, ...], out_type: list[Any], num_warps: int, num_stages: int | None, **named: Any) -> Any:
    """`jax_triton.triton_call`: arguments of the kernel that are not given are what it writes, one after the other."""
    assert not operands
    arrays = {n: a for n, a in named.items() if isinstance(a, jax.Array)}
    written = [n for n in kernel.arg_names if n not in named]
    assert len(written) == len(out_type) and set(named) <= set(kernel.arg_names), (written, list(named))

    def run(*given: Any) -> Any:
        tensors = {n: from_numpy(np.asarray(a), "cpu") for n, a in zip(arrays, given, strict=True)}
        # What a kernel is to write holds anything beforehand.
        made = {n: from_numpy(np.full(s.shape, 77, s.dtype), "cpu") for n, s in zip(written, out_type, strict=True)}
        kernel[grid](**{n: (tensors | made).get(n, named.get(n)) for n in kernel.arg_names})
        return [to_numpy(made[n]).reshape(s.shape) for n, s in zip(written, out_type, strict=True)]

    return jax.pure_callback(run, [jax.ShapeDtypeStruct(s.shape, s.dtype) for s in out_type], *arrays.values())


sys.modules.setdefault("jax_triton", types.ModuleType("jax_triton")).triton_call = interpreted  # type: ignore[attr-defined]

from kpt_torch.triton_kernels.jitted import attention, cross_entropy, glu, norms, product, rope  # noqa: E402
from tests.torch.triton_numbers import FAR, SMALL, multiplied, not_a_number, patched  # noqa: E402

SMALL_HERE = [case for case in SMALL if case[0] in (attention, cross_entropy, glu, norms, product, rope)]


def drawn_cases(op: str, cases: int, seed: int, most: int) -> list[Case]:
    """Of the shared table, those that the kernel takes."""
    kernel, found, i = dataclasses.replace(kpt.registry.get(f"{op}.jax_triton"), requires=()), [], 0
    while len(found) < cases:
        case = CASES[op](np.random.default_rng([seed, i]), most)
        dtype = next(iter(case.specs.values())).dtype
        if refusal(kernel, op, kpt.hardware_profile("a100"), dtype, case.specs, case.params, "aggressive", "jax") is None:
            found.append(case)
        i += 1
    return found


def mapped(case: Case, seed: int) -> str:
    """What is wrong with a call under vmap, over the first array and whatever has a batch, or over everything, or ""."""
    op, fn = kpt.ops.op(case.op), kpt.registry.load(f"{case.op}.jax_triton")
    rng = np.random.default_rng(seed)
    samples = [op.sample(rng, case.specs, **case.params) for _ in range(2)]
    shared = {"weight", "bias", "w", "b", "w_gate", "w_up", "b_gate", "b_up", "cos", "sin"} if seed % 2 else set()
    arrays = {n: jnp.asarray(a) if n in shared else jnp.stack([jnp.asarray(s[n]) for s in samples]) for n, a in samples[0].items()}
    moving = [n for n in op.differentiable if n in arrays]

    def both(given: dict[str, Any]) -> Any:
        rest = {n: a for n, a in given.items() if n not in moving}
        out, pull = jax.vjp(lambda d: fn(**d, **rest, **case.params), {n: given[n] for n in moving})
        return out, pull(jax.tree.map(lambda o: jnp.ones(o.shape, o.dtype), out))[0]

    got = jax.vmap(both, in_axes=({n: None if n in shared else 0 for n in arrays},))(arrays)
    each = [both({n: a if n in shared else a[i] for n, a in arrays.items()}) for i in range(2)]
    wanted = jax.tree.map(lambda *a: jnp.stack(a), *each)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        if not np.allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2e-2, atol=2e-2, equal_nan=True):
            return f"under vmap, {jax.tree_util.keystr(path)} is another"
    return ""


def sharded(case: Case, seed: int) -> str:
    """What is wrong with gradients inside of a `shard_map` that checks over which devices they are summed, or ""."""
    op, fn = kpt.ops.op(case.op), kpt.registry.load(f"{case.op}.jax_triton")
    shared = {"weight", "bias", "w", "b", "w_gate", "w_up", "b_gate", "b_up"} | ({"cos", "sin"} if "cos" in case.specs and case.specs["cos"].shape[0] == 1 else set())
    if any(not s.shape for n, s in case.specs.items() if n not in shared):
        return ""  # nothing to shard
    arrays = {n: jnp.asarray(a) for n, a in op.sample(np.random.default_rng(seed), case.specs, **case.params).items()}
    places = {n: P() if n in shared else P("data") for n in arrays}
    moving = [n for n in op.differentiable if n in arrays]

    def gradients(given: dict[str, Any]) -> Any:
        return jax.grad(lambda d: sum(jnp.sum(a.astype(jnp.float32)) for a in jax.tree.leaves(fn(**given | d, **case.params))))({n: given[n] for n in moving})

    inside = jax.shard_map(gradients, mesh=mesh_of_one(), in_specs=(places,), out_specs={n: places[n] for n in moving})
    for n, (a, b) in {n: (g, gradients(arrays)[n]) for n, g in jax.jit(inside)(arrays).items()}.items():
        if not np.allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2e-2, atol=2e-2, equal_nan=True):
            return f"inside of a shard_map, the gradient of {n} is another"
    return ""


def main(op: str, cases: int, seed: int) -> int:
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    fuzz.KINDS = {kind: (1, change, gradients) for kind, (_, change, gradients) in fuzz.KINDS.items()}
    if op == "attention":
        fuzz.KINDS["poisoned"] = (1, not_a_number, False)
    interpreter._patch_lang_tensor = patched
    interpreter.InterpreterBuilder.create_dot = multiplied
    drawn = drawn_cases(op, cases, seed, {"attention": 33}.get(op, 17)) + [case for case in FAR[:2] if case.op == op]
    kernel, failures = kpt.registry.get(f"{op}.jax_triton"), 0
    large = [(module, name, getattr(module, name)) for module, name, _ in SMALL_HERE]
    for i, case in enumerate(drawn):
        small = i % 2 == 1 and i < cases
        for module, name, value in SMALL_HERE if small else large:
            setattr(module, name, value)
        jax.clear_caches()  # what was traced had other blocks
        for why in filter(None, [*fuzz.check(kernel, case, fuzz.VALUES_PER_SHAPE * i), mapped(case, i), sharded(case, i)]):
            failures += 1
            print(f"{case}{' in small blocks' if small else ''}, case {i} of seed {seed}\n  {why}")
    print(f"{op}: {len(drawn)} cases, {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1, which triton reads as it is imported"
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
