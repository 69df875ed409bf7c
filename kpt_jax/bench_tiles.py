"""The tilings of Hopper's products beside each other and beside plain code, at shapes where rounds of tiles come out differently.

    python -m kpt_jax.bench_tiles [op ...] [--shapes 1024x2048x5632,...] [--out tiles.json]

`pallas_kernels.hopper_gemm.tiles_for` chooses one by a rule. Here all that `BED` has are timed, forward, in one process and in turn, as
`kpt bench` does it; results must have equal bits under all of them, since none changes the order of a sum.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import kpt
from kpt.errors import KptError
from kpt_jax.bench import PLAIN, inputs, timed
from kpt_jax.bench_ops import BENCHES

SHAPES = {
    "matmul": ((8192, 8192, 8192), (8192, 5632, 2048), (8192, 3072, 768), (4096, 2048, 5632), (2048, 4096, 4096), (2048, 14336, 4096),
               (1024, 2048, 5632), (1024, 5632, 2048), (1024, 4096, 4096), (512, 4096, 14336), (256, 4096, 14336), (128, 4096, 14336)),
    "linear_act": ((8192, 768, 3072), (4096, 1024, 4096), (4096, 2048, 8192), (2048, 4096, 16384), (2048, 1280, 5120), (1024, 4096, 11008),
                   (1024, 2048, 8192), (512, 4096, 16384)),
    "glu": ((8192, 2048, 5632), (8192, 1024, 2816), (4096, 2048, 5632), (2048, 4096, 14336), (2048, 4096, 11008), (1024, 4096, 14336),
            (1024, 2048, 5632), (512, 4096, 14336), (128, 4096, 14336)),
}  # fmt: skip
"""M K N by op: layers of common widths, and batches of few to many tokens."""


def contenders(op: str) -> dict[str, Any]:
    """Plain code and the kernel under each tiling, by name."""
    from pallas_kernels.hopper_gemm import BED

    kernel = kpt.registry.load(f"{op}.pallas_gpu")
    takes = [t for t in BED if t.takes(2 if op == "glu" else 1)]
    return {PLAIN: BENCHES[op].plain} | {str(t): functools.partial(kernel, **BENCHES[op].params, tiles=t) for t in takes}


def row(op: str, shape: tuple[int, ...], seconds: float) -> dict[str, Any]:
    """Milliseconds of each at one shape, and which the rule takes.

    Raises:
      KptError: results under two tilings differ.
    """
    from pallas_kernels.hopper_gemm import tiles_for

    m, k, n = shape
    sets = inputs(BENCHES[op], BENCHES[op].specs("bfloat16", m, k, n))
    made: dict[str, Any] = {}
    for name, fn in contenders(op).items():
        made[name] = jax.jit(lambda arrays, _, fn=fn: fn(**arrays)).lower(*sets[0]).compile()
    first, *others = [name for name in made if name != PLAIN]
    want = made[first](*sets[0])
    for name in others:
        if not bool(jnp.array_equal(made[name](*sets[0]), want)):
            raise KptError(f"{op} {m}x{k}x{n} was made in tiles of {name}", f"It has other bits than in tiles of {first}", "Report this")
    taken = {name: 1e3 * statistics.median(kernel) for name, (kernel, _) in timed(made, sets, seconds).items()}
    return {"op": op, "shape": [m, k, n], "rule": str(tiles_for(m, n, 2 if op == "glu" else 1)), "ms": taken}


def line(found: dict[str, Any]) -> str:
    """A row for people."""
    ms = found["ms"]
    tiled = {name: t for name, t in ms.items() if name != PLAIN}
    best = min(tiled, key=lambda name: tiled[name])
    told = "  ".join(f"{name} {t:.4f}" for name, t in ms.items())
    beside = f"{tiled[best] / tiled[found['rule']]:.2f} of the best tiling, {ms[PLAIN] / tiled[found['rule']]:.2f}x plain"
    return f"{found['op']} {'x'.join(map(str, found['shape']))}: {told}; rule {found['rule']}: {beside}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", default=list(SHAPES), metavar="op", help="of " + ", ".join(SHAPES))
    parser.add_argument("--shapes", help="MxKxN,... instead of the table's")
    parser.add_argument("--seconds", type=float, default=0.1, help="for each contender, about")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    given = [tuple(int(size) for size in shape.split("x")) for shape in args.shapes.split(",")] if args.shapes else None
    rows: list[dict[str, Any]] = []
    for op in args.ops:
        for shape in given or SHAPES[op]:
            rows.append(row(op, shape, args.seconds))
            print(line(rows[-1]), flush=True)
            if args.out:
                about = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
                told = {"kind": "kpt.tiles", "command": "python -m kpt_jax.bench_tiles", **about}
                args.out.write_text(json.dumps(told | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
