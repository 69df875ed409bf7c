"""A whole training step of a Llama-class model: as written, with cuDNN's attention put in by hand, and through kpt.

    python -m kpt_jax.bench_step [--layers 16] [--json out.json]

Width 2048, 16 heads, gated MLP of 5632, vocabulary 32000, batch 2, context 4096; bfloat16 compute, float32 parameters, AdamW. Steps of
the three programs are timed in turn, wall time, medians; memory is XLA's analysis of the compiled step.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import kpt_jax

WIDTH, HEADS, HIDDEN, VOCABULARY, BATCH, CONTEXT = 2048, 16, 5632, 32000, 2, 4096
ROUNDS = 8


def parameters(layers: int) -> dict[str, Any]:
    keys = iter(jax.random.split(jax.random.key(0), 2 + 5 * layers))

    def w(*shape: int) -> jax.Array:
        return 0.02 * jax.random.normal(next(keys), shape)

    layer = [
        {"norm": jnp.ones(WIDTH), "mlp_norm": jnp.ones(WIDTH), "qkv": w(WIDTH, 3 * WIDTH), "o": w(WIDTH, WIDTH),
         "gate": w(WIDTH, HIDDEN), "up": w(WIDTH, HIDDEN), "down": w(HIDDEN, WIDTH)}
        for _ in range(layers)
    ]  # fmt: skip
    return {"embed": w(VOCABULARY, WIDTH), "layers": layer, "norm": jnp.ones(WIDTH), "head": w(WIDTH, VOCABULARY)}


def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return (x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * weight).astype(jnp.bfloat16)


def turned(x: jax.Array) -> jax.Array:
    width = x.shape[-1]
    angle = jnp.arange(x.shape[1])[:, None] * 10000.0 ** (-jnp.arange(0, width, 2) / width)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    scores = jnp.einsum("btnh,bsnh->bnts", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores).astype(v.dtype), v)


def loss(params: dict[str, Any], ids: jax.Array, labels: jax.Array, attention: Callable[..., jax.Array] = plain_attention) -> jax.Array:
    p = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    x = p["embed"][ids]
    for layer in p["layers"]:
        q, k, v = jnp.split((norm(x, layer["norm"]) @ layer["qkv"]).reshape(BATCH, CONTEXT, HEADS, -1), 3, -1)
        x = x + attention(turned(q), turned(k), v).reshape(x.shape) @ layer["o"]
        h = norm(x, layer["mlp_norm"])
        x = x + (jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"])) @ layer["down"]
    logits = (norm(x, p["norm"]) @ p["head"]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def step(loss: Callable[..., jax.Array], params: Any, state: Any, ids: jax.Array, labels: jax.Array) -> tuple[Any, Any, jax.Array]:
    value, grads = jax.value_and_grad(loss)(params, ids, labels)
    updates, state = optax.adamw(1e-4).update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


def measure(layers: int, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Compiles and times the three programs; returns what `--json` writes."""
    params = parameters(layers)
    ids = jax.random.randint(jax.random.key(1), (BATCH, CONTEXT), 0, VOCABULARY)
    args = params, optax.adamw(1e-4).init(params), ids, jnp.roll(ids, -1, 1)
    fast = kpt_jax.optimize(functools.partial(step, loss))
    say(fast.explain(*args))
    cudnn = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    by_hand = functools.partial(loss, attention=cudnn)
    programs = {"as written": functools.partial(step, loss), "cuDNN by hand": functools.partial(step, by_hand), "through kpt": fast}
    compiled = {name: jax.jit(f).lower(*args).compile() for name, f in programs.items()}
    rows: dict[str, dict[str, Any]] = {name: {"seconds": [], "loss": float(c(*args)[2])} for name, c in compiled.items()}
    for _ in range(ROUNDS):
        for name, c in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(c(*args))
            rows[name]["seconds"].append(time.perf_counter() - start)
    for name, row in rows.items():
        memory: Any = compiled[name].memory_analysis()
        row["median"], row["temporaries"] = statistics.median(row["seconds"]), memory.temp_size_in_bytes
        say(f"{name:14} {row['median'] * 1e3:8.2f} ms  {row['temporaries'] / 2**30:6.2f} GiB of temporaries  loss {row['loss']:.5f}")
    return {"kind": "kpt.step", "jax": jax.__version__, "device": jax.devices()[0].device_kind, "layers": layers, "rows": rows,
            "plan": json.loads(fast.plan(*args).to_json())}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the figures and the plan to this file")
    options = parser.parse_args()
    found = measure(options.layers)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
