"""The plain-JAX providers beside the code they replace.

`python -m pallas_kernels.bench_cpu attention` or `linear_cross_entropy`.

Each case is compiled once in each spelling; runs alternate between the spellings, in an order that turns, so that a
busy machine disturbs all alike. Bytes are what XLA plans for temporaries (deterministic); times are wall times of one
call.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kpt.ops.mask import Causal, Mask
from pallas_kernels.attention.xla import attention
from pallas_kernels.linear_cross_entropy.xla import linear_cross_entropy

ATTENTION_SHAPES = ((1, 8, 8192, 64), (4, 4, 1024, 32), (4, 4, 1024, 64), (4, 4, 2048, 64))  # B, H, S, D
LINEAR_CROSS_ENTROPY_SHAPES = ((4096, 512, 50257),)  # tokens, K, V


def plain_attention(q, k, v):
    """Causal attention as people write it."""
    s = q.shape[1]
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(q.shape[-1])
    scores = jnp.where(jnp.tril(jnp.ones((s, s), bool)), scores, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, -1), v)


def plain_linear_cross_entropy(x, w, labels):
    """Logits, then the loss as `optax.softmax_cross_entropy_with_integer_labels` has it."""
    logits = x @ w
    logits = logits - jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
    picked = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    return jnp.log(jnp.sum(jnp.exp(logits), -1)) - picked


def attention_case(b: int, h: int, s: int, d: int) -> tuple[str, dict[str, Callable], tuple]:
    arrays = [jax.random.normal(key, (b, s, h, d), jnp.float32) for key in jax.random.split(jax.random.key(0), 4)]

    def training_step(fn):
        def step(q, k, v, g):
            out, vjp = jax.vjp(fn, q, k, v)
            return out, vjp(g)

        return step

    kernel = lambda q, k, v: attention(q=q, k=k, v=v, mask=Mask((Causal(),)))  # noqa: E731
    fns = {"plain": training_step(plain_attention), "kernel": training_step(kernel)}
    return f"attention causal f32 B{b} H{h} S{s} D{d}, forward+backward", fns, tuple(arrays)


def linear_cross_entropy_case(n: int, k: int, v: int) -> tuple[str, dict[str, Callable], tuple]:
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (n, k)), jax.random.normal(keys[1], (k, v)) / math.sqrt(k)
    labels = jax.random.randint(keys[2], (n,), 0, v)

    def training_step(fn):
        return lambda x, w, labels: jax.value_and_grad(lambda x, w: fn(x, w, labels).mean(), (0, 1))(x, w)

    kernel = lambda x, w, labels: linear_cross_entropy(x=x, w=w, labels=labels)  # noqa: E731
    fns = {"plain": training_step(plain_linear_cross_entropy), "kernel": training_step(kernel)}
    return f"linear_cross_entropy f32 {n} x {k} x {v}, value and gradients of the mean", fns, (x, w, labels)


def measure(name: str, fns: dict[str, Callable], args: tuple, runs: int) -> list[dict]:
    """One row for each spelling: temporary bytes; median, least and greatest wall time in ms."""
    compiled = {spelling: jax.jit(fn).lower(*args).compile() for spelling, fn in fns.items()}
    times: dict[str, list[float]] = {spelling: [] for spelling in fns}
    order = list(fns)
    for n in range(runs + 1):
        for spelling in order:
            start = time.perf_counter()
            jax.block_until_ready(compiled[spelling](*args))
            if n:  # the first call of each warms caches and pages
                times[spelling].append((time.perf_counter() - start) * 1e3)
        order.reverse()
    return [
        {
            "case": name,
            "spelling": spelling,
            "temp_bytes": getattr(compiled[spelling].memory_analysis(), "temp_size_in_bytes", None),
            "median_ms": statistics.median(times[spelling]),
            "min_ms": min(times[spelling]),
            "max_ms": max(times[spelling]),
        }
        for spelling in fns
    ]


def main() -> None:
    cases: dict[str, tuple[Callable[..., tuple[str, dict[str, Callable], tuple]], Any]] = {
        "attention": (attention_case, ATTENTION_SHAPES),
        "linear_cross_entropy": (linear_cross_entropy_case, LINEAR_CROSS_ENTROPY_SHAPES),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=cases)
    parser.add_argument("--shape", type=int, nargs="+", help="one shape instead of the table's")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    make, shapes = cases[options.op]
    for shape in (options.shape,) if options.shape else shapes:
        name, fns, args = make(*shape)
        rows = measure(name, fns, args, options.runs)
        if options.json:
            print(json.dumps(rows), flush=True)
            continue
        print(rows[0]["case"])
        for row in rows:
            print(
                f"  {row['spelling']:8} temp {row['temp_bytes'] / 2**20:8.1f} MiB"
                f"  median {row['median_ms']:9.1f} ms  [{row['min_ms']:.1f}, {row['max_ms']:.1f}]"
            )
        plain, kernel = rows
        memory, speed = plain["temp_bytes"] / kernel["temp_bytes"], plain["median_ms"] / kernel["median_ms"]
        print(f"  memory 1/{memory:.1f}, time 1/{speed:.2f}", flush=True)


if __name__ == "__main__":
    main()
