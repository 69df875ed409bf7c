"""How far to trust `kpt tpu schedule`: kernels that are scheduled here, beside times that were published for them.

    python -m kpt_jax.bench_tpu [--json out.json]

- v5e: the blocked matmul of the notebook "Matrix Multiplication" of jax's Pallas documentation (docs/pallas/tpu/matmul.ipynb, whose
  outputs were made on one). These are wall times of a call, the dispatch from Python in them. Its 1024 cubed XLA matmul, 11 microseconds of
  arithmetic, takes 119 microseconds there; that less 11 is what a call costs, and is taken off before the two are compared.
- v6e and v7x, matmul: XLA's rates in tpu-recipes (microbenchmarks, bfloat16; a v7x device is one TensorCore). Another kernel of the same
  product: kpt's is scheduled.
- v7x, attention: the shares of 1,150 TFLOP/s, half of the products counted, that tokamax publishes for its splash attention (causal, 32
  query heads, 8 of keys, head dim 128, splash_attention/microbenchmarks.pdf), its blocks searched there on the chip and here among
  `tpu_programs.PEERS`. Left out where tokamax is not installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kpt.tpu import generation
from kpt_jax.bench_tpu_peers import of_pass, short
from kpt_jax.tpu import Program, compile_programs, users_program
from kpt_jax.tpu_programs import installed_peers, program

CALL = 119.4e-6 - 2 * 1024**3 / 197e12
NOTEBOOK = {
    ("small", 1024): 297.7e-6, ("small", 4096): 11.772e-3, ("small", 8192): 91.836e-3,
    ("large", 1024): 127.1e-6, ("large", 4096): 889.1e-6, ("large", 8192): 6.0994e-3,
}  # fmt: skip
"""Seconds, by blocks and size."""
RATES = {("v6e", 8192): 827e12, ("v7x", 4096): 893e12, ("v7x", 16384): 950e12}
"""FLOP/s, by generation and size."""
SPLASH = {4096: (0.206, 0.25), 8192: (0.249, None), 32768: (0.309, None)}
"""Shares of the peak, forward and backward, by length."""


@dataclasses.dataclass(frozen=True)
class Published:
    """A time that somebody measured on a TPU.

    Attributes:
      what: ran.
      generation: of the TPU.
      programs: scheduled here; the fastest counts.
      part: "forward" or "backward".
      seconds: published, without the call.
    """

    what: str
    generation: str
    programs: tuple[Program, ...]
    part: str
    seconds: float


def published() -> Iterator[Published]:
    for (blocks, n), seconds in NOTEBOOK.items():
        its = users_program(f"kpt_jax.bench_tpu:{blocks}", f"kpt_jax.bench_tpu:n{n}")
        yield Published(f"matmul {n}, {blocks} blocks", "v5e", (its,), "forward", seconds - CALL)
    for (gen, n), rate in RATES.items():
        yield Published(f"matmul {n} by XLA", gen, (program("matmul", (n, n, n), passes="forward"),), "forward", 2 * n**3 / rate)
    if (peer := installed_peers("attention_causal").get(name := "tokamax splash")) is None:
        return
    for s, shares in SPLASH.items():
        tried = tuple(program("attention_causal", (1, s, 32, 8, 128), provider=name, blocks=b) for b in peer.settings())
        for part, share, products in zip(("forward", "backward"), shares, (2, 5), strict=True):
            if share is not None:
                yield Published(f"{name} {s} {part}", "v7x", tried, part, products * 2 * 32 * s * s * 128 * 0.5 / (share * 1.15e15))


def matmul(x: jax.Array, y: jax.Array, bm: int, bk: int, bn: int) -> jax.Array:
    """`x @ y` in blocks, summed in float32 in VMEM."""
    (m, k), n = x.shape, y.shape[1]

    def kernel(x_ref, y_ref, out_ref, sum_ref):
        step = pl.program_id(2)

        @pl.when(step == 0)
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        sum_ref[...] += jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

        @pl.when(step == k // bk - 1)
        def _():
            out_ref[...] = sum_ref[...].astype(out_ref.dtype)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        grid=(m // bm, n // bn, k // bk),
        in_specs=[pl.BlockSpec((bm, bk), lambda i, j, k: (i, k)), pl.BlockSpec((bk, bn), lambda i, j, k: (k, j))],
        out_specs=pl.BlockSpec((bm, bn), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    )(x, y)


def small(x: jax.Array, y: jax.Array) -> jax.Array:
    return matmul(x, y, 128, 128, 128)


def large(x: jax.Array, y: jax.Array) -> jax.Array:
    return matmul(x, y, 512, 1024, 1024)


def _square(n: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (jax.ShapeDtypeStruct((n, n), jnp.bfloat16),) * 2


def n1024() -> tuple[jax.ShapeDtypeStruct, ...]:
    return _square(1024)


def n4096() -> tuple[jax.ShapeDtypeStruct, ...]:
    return _square(4096)


def n8192() -> tuple[jax.ShapeDtypeStruct, ...]:
    return _square(8192)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    rows = []
    print(f"{'what':34}{'TPU':5}{'scheduled ms':>14}{'published ms':>14}{'error':>7}  bound")
    for row in published():
        made = compile_programs(row.programs, [generation(row.generation)])
        if not (works := [m for m in made if m.error is None]):
            print(f"{row.what:34}{row.generation:5}  {made[0].error}")
            rows.append(_told(row) | {"error": short(made[0].error)})
            continue
        best = min(works, key=lambda m: sum(s.seconds for s in of_pass(m, row.part)))
        found = of_pass(best, row.part)
        scheduled = sum(s.seconds for s in found)
        off = scheduled / row.seconds - 1
        schedules = [s.to_json() | {"stretches": []} for s in found]
        rows.append(_told(row) | {"scheduled": scheduled, "off": off, "blocks": best.program.given.get("blocks"), "schedules": schedules})
        bound = max(found, key=lambda s: s.seconds).bound
        print(f"{row.what:34}{row.generation:5}{scheduled * 1e3:14.3f}{row.seconds * 1e3:14.3f}{off:7.0%}  {bound}", flush=True)
    if options.json:
        versions = {n: metadata.version(n) for n in ("jax", "libtpu")}
        told = {"kind": "kpt.tpu_trust", "command": "python -m kpt_jax.bench_tpu", **versions, "rows": rows}
        options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _told(row: Published) -> dict[str, Any]:
    return {"what": row.what, "generation": row.generation, "published": row.seconds}


if __name__ == "__main__":
    main()
