"""What kpt itself costs: planning beside XLA's compilation, and a call beside a call of `jax.jit`.

    python -m kpt_jax.bench_cost [--layers 4,16,32,64] [--json] [--plot out.svg]

The model has the widths of Llama 3 8B; only shapes are needed, and no weights are made. Certificates are off: they run
kernels, and how long that takes is a matter of the kernels. Each depth is measured in three processes of its own, whose medians
are printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import kpt_jax
from kpt.report import Line, draw, drawable

WIDTH, HIDDEN, HEADS, KV_HEADS, TOKENS, VOCABULARY = 4096, 14336, 32, 8, 2048, 128256


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one depth, in seconds: tracing alone, kpt's planning (its own trace included), XLA's compilation."""

    layers: int
    sites: int
    trace: float
    plan: float
    compile_original: float
    compile_optimized: float


def parameters(layers: int) -> dict[str, Any]:
    def w(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    head = WIDTH // HEADS
    layer = [
        {"norm": w(WIDTH), "q": w(WIDTH, WIDTH), "k": w(WIDTH, KV_HEADS * head), "v": w(WIDTH, KV_HEADS * head),
         "o": w(WIDTH, WIDTH), "mlp_norm": w(WIDTH), "gate": w(WIDTH, HIDDEN), "up": w(WIDTH, HIDDEN),
         "down": w(HIDDEN, WIDTH)}
        for _ in range(layers)
    ]  # fmt: skip
    return {"embed": w(VOCABULARY, WIDTH), "layers": layer, "norm": w(WIDTH), "head": w(WIDTH, VOCABULARY)}


def loss(p: dict[str, Any], ids: jax.Array) -> jax.Array:
    """Next-token loss of a Llama-class model, its layers unrolled: RMSNorm, rotary GQA attention, SwiGLU."""
    inputs, labels = ids[:, :-1], ids[:, 1:]
    x = p["embed"][inputs]
    b, t, _ = x.shape
    head = WIDTH // HEADS
    angle = jnp.arange(t)[:, None] * 10000.0 ** (-jnp.arange(0, head, 2) / head)
    cos, sin = (jnp.concatenate([f(angle)] * 2, -1)[:, None, :] for f in (jnp.cos, jnp.sin))

    def norm(x: jax.Array, w: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * w

    def turned(x: jax.Array) -> jax.Array:
        return x * cos + jnp.concatenate([-x[..., head // 2 :], x[..., : head // 2]], -1) * sin

    for layer in p["layers"]:
        h = norm(x, layer["norm"])
        q, k, v = ((h @ layer[n]).reshape(b, t, -1, head) for n in "qkv")
        q, k = turned(q), turned(k)
        k, v = (jnp.repeat(a, HEADS // KV_HEADS, axis=2) for a in (k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) * head**-0.5
        scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -jnp.inf)
        y = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, -1), v)
        x = x + y.reshape(b, t, WIDTH) @ layer["o"]
        h = norm(x, layer["mlp_norm"])
        x = x + (jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"])) @ layer["down"]
    logits = norm(x, p["norm"]) @ p["head"]
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - picked)


def cost(layers: int) -> Cost:
    """Of one depth, forward and backward compiled, after what a process does once was done for one layer."""
    ids = jax.ShapeDtypeStruct((1, TOKENS + 1), jnp.int32)
    kpt_jax.optimize(loss).plan(parameters(1), ids)
    p = parameters(layers)

    def timed(f: Any) -> tuple[float, Any]:
        start = time.perf_counter()
        out = f()
        return time.perf_counter() - start, out

    trace, _ = timed(lambda: jax.make_jaxpr(lambda p, ids: loss(p, ids))(p, ids))
    fast = kpt_jax.optimize(loss)
    plan, made = timed(lambda: fast.plan(p, ids))
    seconds = []
    for f in (loss, fast):
        lowered = jax.jit(jax.value_and_grad(f)).lower(p, ids)
        seconds.append(timed(lowered.compile)[0])
    return Cost(layers, len(made.sites), trace, plan, seconds[0], seconds[1])


def calls(arrays: int, repeats: int = 2000, rounds: int = 9) -> tuple[float, float]:
    """Seconds a call of `jax.jit(f)` and of `optimize(f)`, on a list of so many small arrays; the medians of rounds."""

    def f(xs: list[jax.Array]) -> jax.Array:
        return xs[0] + 1

    xs = [jnp.ones(4) for _ in range(arrays)]
    programs = jax.jit(f), kpt_jax.optimize(f)
    taken: list[list[float]] = [[], []]
    for g in programs:
        g(xs)
    for _ in range(rounds):
        for g, out in zip(programs, taken, strict=True):
            start = time.perf_counter()
            for _ in range(repeats):
                last = g(xs)
            jax.block_until_ready(last)
            out.append((time.perf_counter() - start) / repeats)
    return statistics.median(taken[0]), statistics.median(taken[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--layers", default="4,16,32,64")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, help="write a chart to this file: SVG, PNG or PDF, by its name")
    options = parser.parse_args()
    if options.plot:
        drawable(options.plot)
    os.environ["KPT_CERTIFY"] = "off"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as fresh:
        runs = [[fresh.submit(cost, int(n)).result() for n in options.layers.split(",")] for _ in range(3)]
    costs = [Cost(**{f.name: statistics.median(getattr(c, f.name) for c in same) for f in dataclasses.fields(Cost)})
             for same in zip(*runs, strict=True)]  # fmt: skip
    dispatch = {n: calls(n) for n in (1, 200)}
    if options.json:
        print(json.dumps({
            "kind": "kpt.cost", "jax": jax.__version__, "device": jax.devices()[0].device_kind,
            "layers": [dataclasses.asdict(c) for c in costs],
            "call": [{"arrays": n, "jit": a, "optimized": b} for n, (a, b) in dispatch.items()],
        }, indent=1))  # fmt: skip
    else:
        print("layers  sites  trace s  plan s  XLA compile s (as written, through kpt)  plan / compile")
        for c in costs:
            print(f"{c.layers:6}  {c.sites:5}  {c.trace:7.2f}  {c.plan:6.2f}  {c.compile_original:13.2f}"
                  f"  {c.compile_optimized:25.2f}  {c.plan / c.compile_original:14.1%}")  # fmt: skip
        for n, (a, b) in dispatch.items():
            print(f"a call with {n} arrays: jax.jit {a * 1e6:.1f} us, optimized {b * 1e6:.1f} us")
    if options.plot:
        xs = [c.layers for c in costs]
        lines = [Line("XLA's compilation", xs, [c.compile_original for c in costs], "before"),
                 Line("kpt's planning", xs, [c.plan for c in costs], "after")]  # fmt: skip
        words = "; ".join(f"{c.layers} layers: planning {c.plan:.2f} s, compilation {c.compile_original:.2f} s" for c in costs)
        title = "Planning and compilation over the depth of a model"
        draw(lines, options.plot, title=title, description=words, x_label="layers", y_label="seconds")


if __name__ == "__main__":
    main()
