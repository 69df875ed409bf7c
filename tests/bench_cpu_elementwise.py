"""Norms, projections, rotary embedding and products on the CPU: the plain-JAX providers beside the textbook code they replace.

    JAX_PLATFORMS=cpu python -m tests.bench_cpu_elementwise [--op rms_norm] [--dtype bfloat16] [--runs 15] [--json]

Forward and backward are one compiled program at a training-like size (4 x 1024 tokens, width 512, hidden 2048; rope 8 heads of 64,
a mixture of 8 experts). Calls alternate between the two spellings in an order that turns, so that a busy machine disturbs both
alike. `temp` is what XLA plans for temporaries, `kept` the bytes that the forward pass leaves for the backward beyond the op's own
inputs; both are deterministic. Times are wall times of one call.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.glu.xla import glu
from pallas_kernels.layer_norm.xla import layer_norm
from pallas_kernels.linear_act.xla import linear_act
from pallas_kernels.matmul.xla import matmul
from pallas_kernels.ragged_matmul.xla import ragged_matmul
from pallas_kernels.rms_norm.xla import rms_norm
from pallas_kernels.rope.xla import rope

BATCH, TOKENS, WIDTH, HIDDEN, HEADS, EXPERTS = 4, 1024, 512, 2048, 8, 8


def plain_rms_norm(x, weight, residual=None):
    h = x if residual is None else x + residual
    f = h.astype(jnp.float32)
    y = f * jax.lax.rsqrt(jnp.mean(jnp.square(f), -1, keepdims=True) + 1e-6)
    y = (y * weight.astype(jnp.float32)).astype(x.dtype)
    return y if residual is None else (y, h)


def plain_layer_norm(x, weight, bias, residual=None):
    h = x if residual is None else x + residual
    f = h.astype(jnp.float32)
    mean = jnp.mean(f, -1, keepdims=True)
    y = (f - mean) * jax.lax.rsqrt(jnp.mean(jnp.square(f - mean), -1, keepdims=True) + 1e-6)
    y = (y * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)
    return y if residual is None else (y, h)


def plain_linear_act(x, w, b, activation):
    return getattr(jax.nn, activation)(x @ w + b)


def plain_glu(x, w_gate, w_up):
    return jax.nn.silu(x @ w_gate) * (x @ w_up)


def plain_rope(x, cos, sin):
    a, b = jnp.split(x, 2, -1)
    turned = jnp.concatenate([-b, a], -1)
    return (x * cos[:, :, None] + turned * sin[:, :, None]).astype(x.dtype)


def plain_ragged_matmul(x, w, group_sizes):
    return jax.lax.ragged_dot(x, w, group_sizes)


def random(dtype: str, **shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    """Normal arrays; matrices scaled so that products keep the size of their inputs."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        n: (jax.random.normal(k, s) / (s[-2] ** 0.5 if n.startswith("w_") or n in ("w", "b_matrix") else 1)).astype(dtype)
        for (n, s), k in zip(shapes.items(), keys, strict=True)
    }


X = (BATCH, TOKENS, WIDTH)
NORM = {"x": X, "weight": (WIDTH,)}
LAYER = NORM | {"bias": (WIDTH,)}
LINEAR = {"x": X, "w": (WIDTH, HIDDEN), "b": (HIDDEN,)}
GLU = {"x": X, "w_gate": (WIDTH, HIDDEN), "w_up": (WIDTH, HIDDEN)}
ROPE = {"x": (BATCH, TOKENS, HEADS, WIDTH // HEADS), "cos": (1, TOKENS, WIDTH // HEADS), "sin": (1, TOKENS, WIDTH // HEADS)}
MATMUL = {"a": (BATCH * TOKENS, WIDTH), "b": (WIDTH, HIDDEN)}
RAGGED = {"x": (BATCH * TOKENS, WIDTH), "w": (EXPERTS, WIDTH, HIDDEN)}
SIZES = jnp.asarray([200, 0, 1200, 512, 700, 300, 684, 500], jnp.int32)  # 4096 rows in all, as routers leave them

# Name -> (shapes, arrays that take no gradient, textbook code, kernel).
CASES: dict[str, tuple[dict, tuple[str, ...], Callable, Callable]] = {
    "rms_norm": (NORM, (), plain_rms_norm, rms_norm),
    "rms_norm + residual": (NORM | {"residual": X}, (), plain_rms_norm, rms_norm),
    "layer_norm": (LAYER, (), plain_layer_norm, layer_norm),
    "layer_norm + residual": (LAYER | {"residual": X}, (), plain_layer_norm, layer_norm),
    "linear_act gelu_tanh": (LINEAR, (), functools.partial(plain_linear_act, activation="gelu"),
                             functools.partial(linear_act, activation="gelu_tanh")),
    "linear_act relu": (LINEAR, (), functools.partial(plain_linear_act, activation="relu"),
                        functools.partial(linear_act, activation="relu")),
    "glu silu": (GLU, (), plain_glu, glu),
    "rope": (ROPE, ("cos", "sin"), plain_rope, rope),
    "matmul": (MATMUL, (), lambda a, b: a @ b, matmul),
    "ragged_matmul": (RAGGED, (), functools.partial(plain_ragged_matmul, group_sizes=SIZES),
                      functools.partial(ragged_matmul, group_sizes=SIZES)),
}  # fmt: skip


def training_step(fn: Callable, fixed: tuple[str, ...]) -> Callable:
    """`step(arrays, cotangents) -> (outputs, gradients)`."""

    def step(arrays, cotangents):
        held = {n: arrays[n] for n in fixed}
        out, vjp = jax.vjp(lambda d: fn(**d, **held), {n: a for n, a in arrays.items() if n not in fixed})
        return out, vjp(cotangents)

    return step


def kept_bytes(fn: Callable, fixed: tuple[str, ...], arrays: dict[str, jax.Array]) -> int:
    """Bytes of the residuals that are not the op's inputs."""
    held = {n: arrays[n] for n in fixed}
    moving = {n: a for n, a in arrays.items() if n not in fixed}
    saved = jax.tree.leaves(jax.vjp(lambda d: fn(**d, **held), moving)[1])
    inputs = {a.unsafe_buffer_pointer() for a in arrays.values()}
    return sum(a.nbytes for a in saved if a.size > 1 and a.unsafe_buffer_pointer() not in inputs)


def measure(name: str, dtype: str, runs: int) -> list[dict]:
    """One row for each spelling: bytes; median and least wall time in ms."""
    shapes, fixed, *fns = CASES[name]
    arrays = random(dtype, **shapes)
    args = (arrays, jax.tree.map(jnp.ones_like, fns[0](**arrays)))
    spellings = dict(zip(("plain", "kernel"), fns, strict=True))
    compiled = {s: jax.jit(training_step(fn, fixed)).lower(*args).compile() for s, fn in spellings.items()}
    times: dict[str, list[float]] = {s: [] for s in spellings}
    order = list(spellings)
    for n in range(runs + 1):
        for s in order:
            start = time.perf_counter()
            jax.block_until_ready(compiled[s](*args))
            if n:  # the first call of each warms caches and pages
                times[s].append((time.perf_counter() - start) * 1e3)
        order.reverse()
    return [
        {
            "case": name,
            "dtype": dtype,
            "spelling": s,
            "temp_bytes": compiled[s].memory_analysis().temp_size_in_bytes,
            "kept_bytes": kept_bytes(fn, fixed, arrays),
            "median_ms": statistics.median(times[s]),
            "min_ms": min(times[s]),
        }
        for s, fn in spellings.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="cases whose name starts so; default: all")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 and float32")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="one JSON list a case instead of the table")
    options = parser.parse_args()
    if not options.json:
        print("| case | dtype | temp MiB, plain → kernel | kept MiB, plain → kernel | median ms (least), plain → kernel | time |")
        print("|---|---|---|---|---|---|")
    for name in (n for n in CASES if not options.op or n.startswith(tuple(options.op))):
        for dtype in options.dtype or ("bfloat16", "float32"):
            rows = plain, kernel = measure(name, dtype, options.runs)
            if options.json:
                print(json.dumps(rows), flush=True)
                continue
            mib = [" → ".join(f"{r[k] / 2**20:.1f}" for r in rows) for k in ("temp_bytes", "kept_bytes")]
            ms = " → ".join(f"{r['median_ms']:.1f} ({r['min_ms']:.1f})" for r in rows)
            print(f"| {name} | {dtype} | {mib[0]} | {mib[1]} | {ms} | ×{kernel['median_ms'] / plain['median_ms']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
