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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import kpt
from kpt.errors import KptError
from kpt.kernels.spec import refusal
from kpt_jax.bench import PLAIN, inputs, timed
from kpt_jax.bench_ops import BENCHES
from kpt_jax.devices import here

SHAPES = {
    "matmul": ((8192, 8192, 8192), (8192, 5632, 2048), (8192, 3072, 768), (4096, 2048, 5632), (2048, 4096, 4096), (2048, 14336, 4096),
               (1024, 2048, 5632), (1024, 5632, 2048), (1024, 4096, 4096), (512, 4096, 14336), (256, 4096, 14336)),
    "linear_act": ((8192, 768, 3072), (4096, 1024, 4096), (4096, 2048, 8192), (2048, 4096, 16384), (2048, 1280, 5120), (1024, 4096, 11008),
                   (1024, 2048, 8192), (512, 4096, 16384)),
    "glu": ((8192, 2048, 5632), (8192, 1024, 2816), (4096, 2048, 5632), (2048, 4096, 14336), (2048, 4096, 11008), (1024, 4096, 14336),
            (1024, 2048, 5632), (512, 4096, 14336), (128, 4096, 14336)),
}  # fmt: skip
"""M K N by op: layers of common widths, and batches of few to many tokens."""
FACTORS = {"matmul": 1, "linear_act": 1, "glu": 2}
"""Right factors that share x in one kernel, by op."""


def contenders(op: str) -> dict[str, Any]:
    """Plain code and the kernel under each tiling, by name."""
    from pallas_kernels.hopper_gemm import BED

    kernel = kpt.registry.load(f"{op}.pallas_gpu")
    takes = [t for t in BED if t.takes(FACTORS[op])]
    return {PLAIN: BENCHES[op].plain} | {str(t): functools.partial(kernel, **BENCHES[op].params, tiles=t) for t in takes}


def row(op: str, shape: tuple[int, ...], seconds: float) -> dict[str, Any]:
    """Milliseconds of each at one shape.

    Raises:
      KptError: the kernel refuses such a call here, or results under two tilings differ.
    """
    asked = f"{op} {'x'.join(map(str, shape))}"
    specs = BENCHES[op].specs("bfloat16", *shape)
    kernel = kpt.registry.get(f"{op}.pallas_gpu")
    if why := refusal(kernel, op, here(), "bfloat16", specs, BENCHES[op].params, "aggressive", "jax"):
        raise KptError(f"{asked} was to be timed under all tilings", f"{kernel.name} {why}", "Run it on an H100, at larger shapes")
    sets = inputs(BENCHES[op], specs)
    made: dict[str, Any] = {}
    for name, fn in contenders(op).items():
        made[name] = jax.jit(lambda arrays, _, fn=fn: fn(**arrays)).lower(*sets[0]).compile()
    first, *others = [name for name in made if name != PLAIN]
    want = made[first](*sets[0])
    for name in others:
        if not bool(jnp.array_equal(made[name](*sets[0]), want)):
            raise KptError(f"{asked} was made in tiles of {name}", f"It has other bits than in tiles of {first}", "Report this")
    taken = {name: 1e3 * statistics.median(kernel) for name, (kernel, _) in timed(made, sets, seconds).items()}
    return {"op": op, "shape": list(shape), "ms": taken}


def rule(op: str, shape: Sequence[int]) -> str:
    """The name of the tiling that the kernel takes."""
    from pallas_kernels.hopper_gemm import tiles_for

    return str(tiles_for(shape[0], shape[2], FACTORS[op]))


def line(found: dict[str, Any]) -> str:
    """A row for people."""
    ms = found["ms"]
    tiled = {name: t for name, t in ms.items() if name != PLAIN}
    best, chosen = min(tiled, key=lambda name: tiled[name]), rule(found["op"], found["shape"])
    told = "  ".join(f"{name} {t:.4f}" for name, t in ms.items())
    beside = f"{tiled[best] / tiled[chosen]:.2f} of the best tiling, {ms[PLAIN] / tiled[chosen]:.2f}x plain"
    return f"{found['op']} {'x'.join(map(str, found['shape']))}: {told}; rule {chosen}: {beside}"


def _shapes(text: str) -> list[tuple[int, ...]]:
    shapes = [tuple(int(size) for size in shape.split("x")) for shape in text.split(",")]
    if any(len(shape) != 3 for shape in shapes):
        raise ValueError(text)
    return shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="op", help="of " + ", ".join(SHAPES) + "; all of them by default")
    parser.add_argument("--shapes", type=_shapes, help="MxKxN,... instead of the table's")
    parser.add_argument("--seconds", type=float, default=0.1, help="for each contender, about")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if unknown := set(args.ops) - set(SHAPES):
        parser.error(f"no products are made by {', '.join(sorted(unknown))}; known are {', '.join(SHAPES)}")
    for op in args.ops or SHAPES:
        for shape in args.shapes or SHAPES[op]:
            rows.append(row(op, shape, args.seconds))
            print(line(rows[-1]), flush=True)
            if args.out:
                about = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "seconds": args.seconds}
                part = args.out.with_name(f"{args.out.name}.part")
                part.write_text(json.dumps({"kind": "kpt.tiles"} | about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
                part.replace(args.out)


if __name__ == "__main__":
    main()
