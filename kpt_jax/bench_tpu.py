"""How far to trust `kpt tpu schedule`: a blocked matmul on a v5e, scheduled here, beside times that were published for it.

    python -m kpt_jax.bench_tpu [--json out.json]

The times are of the notebook "Matrix Multiplication" of jax's Pallas documentation (docs/pallas/tpu/matmul.ipynb, whose outputs were
made on a v5e): wall times of a call, the dispatch from Python in them. Its 1024 cubed XLA matmul, 11 microseconds of arithmetic, takes
119 microseconds there; that less 11 is what a call costs, and is taken off before the two are compared.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kpt.tpu import generation
from kpt_jax.tpu import compiled_schedules

CALL = 119.4e-6 - 2 * 1024**3 / 197e12
# (function here, size) -> published seconds
PUBLISHED = {
    ("small", 1024): 297.7e-6, ("small", 4096): 11.772e-3, ("small", 8192): 91.836e-3,
    ("large", 1024): 127.1e-6, ("large", 4096): 889.1e-6, ("large", 8192): 6.0994e-3,
}  # fmt: skip


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
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    rows = []
    print("blocks   size  scheduled ms  published ms  without the call  error  bound")
    for (blocks, n), published in PUBLISHED.items():
        (found,) = compiled_schedules(f"kpt_jax.bench_tpu:{blocks}", f"kpt_jax.bench_tpu:n{n}", generation("v5e"))
        error = found.seconds / (published - CALL) - 1
        rows.append({"blocks": blocks, "size": n, "scheduled": found.seconds, "published": published, "call": CALL, "error": error,
                     "schedule": found.to_json() | {"stretches": []}})  # fmt: skip
        print(
            f"{blocks:7}{n:6}{found.seconds * 1e3:14.3f}{published * 1e3:14.3f}{(published - CALL) * 1e3:18.3f}{error:7.0%}  {found.bound}"
        )
    if options.json:
        options.json.write_text(
            json.dumps({"kind": "kpt.tpu_trust", "jax": jax.__version__, "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
