"""ragged_matmul over groups as a router makes them, beside jax's megablox at each of its block sizes.

    python -m kpt_jax.bench_tpu_ragged [--gen v5e,v6e] [--json out.json]

The rows of `bench_tpu_peers` have groups of one size, which blocks of rows divide. Here sizes follow Zipf's law, the largest 5.4 times the
mean of 64, in random order, and no block divides them: a block at the border of two groups is multiplied with both.
"""

from __future__ import annotations

import argparse
import json
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import kpt
from kpt.tpu import generation
from kpt_jax.bench_tpu_peers import of_pass, short
from kpt_jax.tpu import Program, compile_programs
from kpt_jax.tpu_programs import MOE, OURS, PEERS, program

PEER = "jax megablox"


def sizes() -> np.ndarray:
    """Of the groups, int32."""
    rows, _, _, groups = MOE
    share = 1 / np.arange(4, groups + 4)
    found = np.floor(rows * share / share.sum()).astype(np.int32)
    found[0] += rows - found.sum()
    return np.random.default_rng(0).permutation(found)


def make(provider: str, blocks: dict[str, int] | None):
    """A function and its arguments, for `compile_programs`."""
    import importlib

    m, k, n, groups = MOE
    if provider == OURS:
        kernel = kpt.registry.load("ragged_matmul.pallas_tpu")
    else:
        peer = PEERS["ragged_matmul"][provider]
        kernel = peer.make(importlib.import_module(peer.module), {}, **(blocks or {}))

    def both(x, w, g, group_sizes):
        out, pull = jax.vjp(lambda x, w: kernel(x=x, w=w, group_sizes=group_sizes), x, w)
        return out, pull(g)

    shapes = ((m, k), (groups, k, n), (m, n))
    return both, (*(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes), sizes())


def programs() -> list[Program]:
    sources = program("ragged_matmul", MOE).sources + ("kpt_jax/bench_tpu_ragged.py",)
    tried = [(OURS, None), *((PEER, b) for b in PEERS["ragged_matmul"][PEER].settings())]
    return [Program(f"uneven groups by {p}", "kpt_jax.bench_tpu_ragged:make", {"provider": p, "blocks": b}, sources) for p, b in tried]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gen", default="v5e,v5p,v6e,v7x")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for on in map(generation, args.gen.split(",")):
        for made in compile_programs(programs(), [on]):
            row = {"generation": on.name, **made.program.given}
            if made.error is None:
                row |= {f"{p}_ms": 1e3 * sum(s.seconds for s in of_pass(made, p)) for p in ("forward", "backward")}
            rows.append(row | ({"error": short(made.error)} if made.error else {}))
            print(json.dumps(rows[-1]), flush=True)
    if args.json:
        versions = {n: metadata.version(n) for n in ("jax", "libtpu")}
        told = {"kind": "kpt.tpu_ragged", "command": "python -m kpt_jax.bench_tpu_ragged", **versions, "sizes": sizes().tolist()}
        args.json.write_text(json.dumps(told | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
