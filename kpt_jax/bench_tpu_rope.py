"""rope where models call it, on queries and keys between their projections and attention, by kpt's kernel and by plain code.

    python -m kpt_jax.bench_tpu_rope [--gen v5e,v6e] [--json out.json]

Alone, a kernel pays for another layout of its array on both sides, and plain code does not; between a product and another kernel the array
has that layout, or is copied either way. So the whole program is compiled three times, without rope as well, and what rope adds to it is
the difference of the bytes that XLA's own operations move, and the kernels' own time, as they are scheduled alone.
"""

from __future__ import annotations

import argparse
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import kpt
from kpt.ops.mask import Causal, Mask
from kpt.tpu import Generation, generation
from kpt_jax.bench_ops import plain_rope
from kpt_jax.bench_tpu_peers import short
from kpt_jax.tpu import Program, compile_programs
from kpt_jax.tpu_programs import OURS, PASSES, XLA, program

NONE = "none"
SHAPES = ((2, 4096, 16, 16, 128), (2, 4096, 32, 8, 128), (2, 4096, 32, 32, 64))
"""Batch, length, heads of queries, heads of keys and head dim."""


def make(provider: str, passes: str, dims: list[int]) -> tuple[Any, tuple[Any, ...]]:
    """A function and its arguments, for `compile_programs`."""
    b, t, n, kv, h = dims
    attention = kpt.registry.load("attention.pallas_tpu")
    kernel = kpt.registry.load("rope.pallas_tpu")
    turn = {OURS: lambda x, cos, sin: kernel(x=x, cos=cos, sin=sin), XLA: plain_rope, NONE: lambda x, cos, sin: x}[provider]

    def forward(moving: Any, cos: Any, sin: Any) -> Any:
        x, *weights = moving
        q, k, v = ((x @ w).reshape(b, t, -1, h) for w in weights)
        return attention(q=turn(q, cos, sin), k=turn(k, cos, sin), v=v, mask=Mask((Causal(),)))

    def both(moving: Any, cos: Any, sin: Any, g: Any) -> Any:
        out, pull = jax.vjp(lambda m: forward(m, cos, sin), moving)
        return out, pull(g)

    def like(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    table = like(1, t, h, dtype=jnp.float32)
    moving = (like(b, t, n * h), *(like(n * h, m * h) for m in (n, kv, kv)))
    return (forward, (moving, table, table)) if passes == "forward" else (both, (moving, table, table, like(b, t, n, h)))


def _program(provider: str, passes: str, dims: tuple[int, ...]) -> Program:
    sources = (*program("rope", (1, 1, 1, 1)).sources, "kpt_jax/bench_tpu_rope.py")
    given = {"provider": provider, "passes": passes, "dims": list(dims)}
    return Program(f"rope in a layer by {provider}", "kpt_jax.bench_tpu_rope:make", given, sources)


def compared(on: Generation, dims: tuple[int, ...], passes: str) -> list[dict[str, Any]]:
    """Bytes and least time of what rope adds to a program: its kernels as scheduled, XLA's operations at the HBM's bandwidth."""
    b, t, n, kv, h = dims
    without, *others = compile_programs([_program(p, passes, dims) for p in (NONE, OURS, XLA)], [on], schedules=False)
    kernels = compile_programs([program("rope", (b, t, heads, h), passes=passes) for heads in (n, kv)], [on])
    chip = kpt.hardware_profile(on.profile)
    assert chip.memory_bandwidth is not None
    rows = []
    for made in others:
        row = {"generation": on.name, **made.program.given}
        error = next((m.error for m in (made, without, *kernels) if m.error is not None), None)
        if error is not None or made.around is None or without.around is None:
            rows.append(row | {"error": short(error or "XLA loops in this program, and its bytes are not known")})
            continue
        around = made.around - without.around
        mine = kernels if made.program.given["provider"] == OURS else []
        seconds = sum(m.seconds for m in mine)
        rows.append(row | {
            "around_bytes": around, "kernel_bytes": sum(s.read + s.written for m in mine for s in m.schedules), "kernels_ms": 1e3 * seconds,
            "ms": 1e3 * (around / (chip.memory_bandwidth / chip.devices) + seconds), "temporaries": made.temporaries - without.temporaries,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gen", default="v5e,v5p,v6e,v7x")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for on in map(generation, args.gen.split(",")):
        for dims in SHAPES:
            for passes in PASSES:
                for row in compared(on, dims, passes):
                    rows.append(row)
                    print(json.dumps(row), flush=True)
    if args.json:
        versions = {n: metadata.version(n) for n in ("jax", "libtpu")}
        told = {"kind": "kpt.tpu_rope", "command": "python -m kpt_jax.bench_tpu_rope", **versions}
        args.json.write_text(json.dumps(told | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
