"""A whole training step of a Llama-class model: as written, with a peer's attention put in by hand, and through kpt.

    python -m kpt_jax.bench_step [--layers 16] [--only NAME] [--budget 60s] [--json out.json]

Flax NNX, width 2048, 16 heads, gated MLP of 5632, vocabulary 32000, batch 2, context 4096; bfloat16 compute, float32 parameters, AdamW,
the state donated. Each contender is compiled and makes its first steps from the same state; then all take turns on one state, each making
the next eight steps of the same training, in an order that turns around every round. Wall time of a step, medians over eight that nothing
waits between, as training runs: what the host takes to start one step overlaps what the device does for another. Memory is XLA's analysis
of the compiled step. The JSON is written anew after each contender: what a run that is ended has found so far is in it, with `alone` for
the steps that were not in turn.

`auto_optimize` is given the step and its state, which it neither donates nor changes: it holds the state twice, as what goes in and what
comes out, and three times while it finds how far rounding moves the results; where there is room, what came out of the step as written
stays on the device besides.
"""

from __future__ import annotations

import argparse
import collections
import functools
import gc
import importlib
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import kpt
import kpt_jax
from kpt.strategy import Plan

WIDTH, HEADS, HIDDEN, VOCABULARY, BATCH, CONTEXT = 2048, 16, 5632, 32000, 2, 4096
ROUNDS, UNAWAITED = 6, 8
Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

linear = functools.partial(nnx.Linear, use_bias=False, dtype=jnp.bfloat16)


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    scores = jnp.einsum("btnh,bsnh->bnts", q, k).astype(jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores).astype(v.dtype), v)


def cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def tokamax_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    made: jax.Array = importlib.import_module("tokamax").dot_product_attention(q, k, v, is_causal=True)
    return made


def norm(rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(WIDTH, dtype=jnp.bfloat16, rngs=rngs)


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


Row = dict[str, Any]
Step = Callable[..., Any]
State = tuple[Any, Any]
Make = Callable[[State, Any], tuple[Step, Row]]


def fresh(layers: int) -> State:
    """The parameters and the state of the optimizer before the first step."""
    params = nnx.state(Llama(layers, plain_attention, nnx.Rngs(0)))
    return params, optax.adamw(1e-4).init(params)


def by_hand(layers: int, attention: Attention) -> Step:
    return functools.partial(step, nnx.graphdef(nnx.eval_shape(lambda: Llama(layers, attention, nnx.Rngs(0)))))


def contenders(layers: int, budget: str) -> dict[str, Make]:
    """By name: the step, given a state and a batch as examples, and what there is to say of it.

    kpt's come first: what it times runs in another process, for which there has to be memory on the device, and a process does not give
    back what it took for the step as written. `optimize` is the first of them, for after `auto_optimize` it chooses by what was measured.
    """
    written = by_hand(layers, plain_attention)

    def optimized(state: State, batch: Any) -> tuple[Step, Row]:
        fast = kpt_jax.optimize(written)
        plan = fast.plan(*state, *batch)
        return fast, _told(plan) | {"plan": json.loads(plan.to_json())}

    def auto(state: State, batch: Any) -> tuple[Step, Row]:
        start = time.perf_counter()
        result = kpt.auto_optimize(written, *state, *batch, budget=budget)
        report = result.report
        return result.fn, _told(result.plan) | {"kept": report.kept, "measured_speedup": report.measured_speedup, "noise": report.noise,
                                                "tuning_seconds": time.perf_counter() - start}  # fmt: skip

    peers: dict[str, Step] = {"as written": written, "cuDNN by hand": by_hand(layers, cudnn_attention)}
    if importlib.util.find_spec("tokamax"):
        peers["tokamax by hand"] = by_hand(layers, tokamax_attention)
    ours: dict[str, Make] = {"through kpt": optimized, "auto_optimize": auto}
    return ours | {n: functools.partial(_given, f) for n, f in peers.items()}


def _given(program: Step, state: State, batch: Any) -> tuple[Step, Row]:
    return program, {}


def _told(plan: Plan) -> Row:
    kernels = collections.Counter(f"{s.op}: {s.kernel}" for s in plan.sites)
    left = collections.Counter(f"{s.op} left: {s.reason[:300]}" for s in plan.skipped)
    return {"kernels": kernels, "left": left, "notes": list(plan.notes)}


def measure(layers: int, budget: str = "60s", only: str = "", say: Callable[[str], None] = print) -> Iterator[dict[str, Any]]:
    """Compiles and times the contenders whose name holds `only`; yields what `--json` writes, after each of them and at the end."""
    ids = jax.random.randint(jax.random.key(1), (BATCH, CONTEXT), 0, VOCABULARY)
    batch = ids, jnp.roll(ids, -1, 1)
    rows: dict[str, Row] = {}
    compiled: dict[str, Any] = {}
    found = {"kind": "kpt.step", "jax": jax.__version__, "device": jax.devices()[0].device_kind, "layers": layers, "rows": rows}
    for name, make in contenders(layers, budget).items():
        if only not in name:
            continue
        try:
            rows[name], compiled[name] = _alone(make, fresh(layers), batch)
        except Exception as problem:  # a contender that fails is a row, not the end
            rows[name] = {"error": f"{type(problem).__name__}: {str(problem)[:500]}"}
        gc.collect()  # its state goes before there is another
        _say(name, rows[name], say)
        yield found
    if len(compiled) > 1:
        say("in turn:")
        taken, losses = _steps(compiled, fresh(layers), batch)
        for name in compiled:
            rows[name] |= {"seconds": taken[name], "losses_in_turn": losses[name], "median": statistics.median(taken[name][1:])}
            _say(name, rows[name], say)
        yield found


def _alone(make: Make, state: State, batch: Any) -> tuple[Row, Any]:
    """What there is to say of a contender, its first steps among it, and its compiled step."""
    program, row = make(state, batch)
    start = time.perf_counter()
    ready: Any = jax.jit(program, donate_argnums=(0, 1)).lower(*state, *batch).compile()
    compiling = time.perf_counter() - start
    taken, losses = _steps({"": ready}, state, batch)
    return row | {"alone": taken[""], "losses": losses[""], "median": statistics.median(taken[""][1:]), "compile_seconds": compiling,
                  "temporaries": ready.memory_analysis().temp_size_in_bytes}, ready  # fmt: skip


def _steps(programs: dict[str, Any], state: State, batch: Any) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds a step and losses of each program, in turn, the first of each to warm up. The state is consumed."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    losses: dict[str, list[float]] = {name: [] for name in programs}
    turns = list(programs.items())
    for _ in range(1 + ROUNDS):
        turns.reverse()
        for name, program in turns:
            start = time.perf_counter()
            values = []
            for _ in range(UNAWAITED):
                params, optimizer, value = program(*state, *batch)
                state = params, optimizer
                values.append(value)
            jax.block_until_ready(state)
            seconds[name].append((time.perf_counter() - start) / UNAWAITED)
            losses[name] += map(float, values)
    return seconds, losses


def _say(name: str, row: Row, say: Callable[[str], None]) -> None:
    if "error" in row:
        say(f"{name:16}{row['error'][:300]}")
        return
    say(f"{name:16}{row['median'] * 1e3:8.2f} ms  {row['temporaries'] / 2**30:6.2f} GiB of temporaries  losses "
        f"{', '.join(f'{x:.4f}' for x in row['losses'][:4])}")  # fmt: skip
    if "seconds" in row or "kernels" not in row:
        return
    if "kept" in row:
        kept = "kept" if row["kept"] else "the original is kept"
        say(f"  {kept}; {row['tuning_seconds']:.0f} s of tuning")
    for words in (row["kernels"], row["left"]):
        for what, count in sorted(words.items()):
            say(f"  {count} x {what}")
    for note in row["notes"]:
        say(f"  {note}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--only", default="", help="contenders whose name holds this")
    parser.add_argument("--budget", default="60s", help="of auto_optimize")
    parser.add_argument("--json", type=Path, help="write the figures and the plan to this file")
    options = parser.parse_args()
    # By default jax takes three quarters of a GPU at once: the step needs more of it, and what times kernels needs some at first.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    for found in measure(options.layers, options.budget, options.only, functools.partial(print, flush=True)):
        if options.json:
            part = options.json.with_suffix(".part")
            part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            part.replace(options.json)


if __name__ == "__main__":
    main()
