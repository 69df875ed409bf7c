"""A whole training step of a Llama-class model: as written, with cuDNN's attention put in by hand, and through kpt.

    python -m kpt_jax.bench_step [--layers 16] [--json out.json]

Flax NNX, width 2048, 16 heads, gated MLP of 5632, vocabulary 32000, batch 2, context 4096; bfloat16 compute, float32 parameters, AdamW,
the state donated. The three programs take turns on one state, each making the next step of the same training; wall time, medians;
memory is XLA's analysis of the compiled step.
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
from flax import nnx

import kpt_jax

WIDTH, HEADS, HIDDEN, VOCABULARY, BATCH, CONTEXT = 2048, 16, 5632, 32000, 2, 4096
ROUNDS = 12
Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

linear = functools.partial(nnx.Linear, use_bias=False, dtype=jnp.bfloat16)
norm = functools.partial(nnx.RMSNorm, WIDTH, dtype=jnp.bfloat16)


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    scores = jnp.einsum("btnh,bsnh->bnts", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores).astype(v.dtype), v)


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def turned(x: jax.Array) -> jax.Array:
    width = x.shape[-1]
    angle = jnp.arange(x.shape[1])[:, None] * 10000.0 ** (-jnp.arange(0, width, 2) / width)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class Block(nnx.Module):
    def __init__(self, attention: Attention, rngs: nnx.Rngs):
        self.attention = attention
        self.norm, self.mlp_norm = norm(rngs=rngs), norm(rngs=rngs)
        self.q, self.k, self.v, self.o = (linear(WIDTH, WIDTH, rngs=rngs) for _ in range(4))
        self.gate, self.up = linear(WIDTH, HIDDEN, rngs=rngs), linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.norm(x)
        q, k, v = (project(h).reshape(*x.shape[:2], HEADS, -1) for project in (self.q, self.k, self.v))
        x = x + self.o(self.attention(turned(q), turned(k), v).reshape(x.shape))
        h = self.mlp_norm(x)
        return x + self.down(jax.nn.silu(self.gate(h)) * self.up(h))


class Llama(nnx.Module):
    def __init__(self, layers: int, attention: Attention, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, dtype=jnp.bfloat16, rngs=rngs)
        self.blocks = nnx.List([Block(attention, rngs) for _ in range(layers)])
        self.norm = norm(rngs=rngs)
        self.head = linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss(model: Llama, ids: jax.Array, labels: jax.Array) -> jax.Array:
    logits = model(ids).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def step(model: Any, params: Any, state: Any, ids: jax.Array, labels: jax.Array) -> tuple[Any, Any, jax.Array]:
    """The next parameters, the next state of the optimizer, the loss. `model` is the structure that `nnx.split` gives."""
    value, grads = jax.value_and_grad(lambda p: loss(nnx.merge(model, p), ids, labels))(params)
    updates, state = optax.adamw(1e-4).update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


def measure(layers: int, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Compiles and times the three programs; returns what `--json` writes."""
    model, params = nnx.split(Llama(layers, plain_attention, nnx.Rngs(0)))
    by_hand = nnx.graphdef(nnx.eval_shape(lambda: Llama(layers, cudnn_attention, nnx.Rngs(0))))
    ids = jax.random.randint(jax.random.key(1), (BATCH, CONTEXT), 0, VOCABULARY)
    labels, state = jnp.roll(ids, -1, 1), optax.adamw(1e-4).init(params)
    fast = kpt_jax.optimize(functools.partial(step, model))
    plan = fast.plan(params, state, ids, labels)
    say(plan.explain())
    programs = {"as written": functools.partial(step, model), "cuDNN by hand": functools.partial(step, by_hand), "through kpt": fast}
    compiled = {n: jax.jit(f, donate_argnums=(0, 1)).lower(params, state, ids, labels).compile() for n, f in programs.items()}
    rows: dict[str, dict[str, Any]] = {name: {"seconds": [], "losses": []} for name in compiled}
    for _ in range(1 + ROUNDS):
        for name, program in compiled.items():
            start = time.perf_counter()
            params, state, value = jax.block_until_ready(program(params, state, ids, labels))
            rows[name]["seconds"].append(time.perf_counter() - start)
            rows[name]["losses"].append(float(value))
    for name, row in rows.items():
        memory: Any = compiled[name].memory_analysis()
        row["median"], row["temporaries"] = statistics.median(row["seconds"][1:]), memory.temp_size_in_bytes
        say(f"{name:14} {row['median'] * 1e3:8.2f} ms  {row['temporaries'] / 2**30:6.2f} GiB of temporaries")
    return {"kind": "kpt.step", "jax": jax.__version__, "device": jax.devices()[0].device_kind, "layers": layers, "rows": rows,
            "plan": json.loads(plan.to_json())}  # fmt: skip


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
