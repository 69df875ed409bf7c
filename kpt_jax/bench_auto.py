"""Never slower, as a fact: `kpt.auto_optimize` on every op of `kpt bench`, large and tiny, and what it kept measured again.

    python -m kpt_jax.bench_auto [--budget 10s] [--json docs/benchmarks/auto-h100.json]

Each case is a loss, so that gradients are measured with it. The second measurement is made after the first, by its own clock rounds; a
case is slower if that says so by more than 2%, the noise of the ratio taken off.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import kpt
from kpt.tuning import gain
from kpt.tuning.measurements import FORWARD
from kpt.tuning.trials import Trial
from kpt_jax.bench_ops import BENCHES
from kpt_jax.measure import loss_and_gradients, measure
from kpt_jax.trials import arrays_of

SLOWER = 0.02


def cases() -> Iterator[tuple[str, Any, list[Any]]]:
    """A name, a loss, and its arguments."""
    on_cpu = jax.default_backend() == "cpu"
    for name, bench in BENCHES.items():
        large = (bench.cpu_shapes if on_cpu else bench.shapes)[0]
        for size, dims in (("large", large), ("tiny", bench.small(*large))):
            specs = bench.specs("float32" if on_cpu else "bfloat16", *dims)
            arrays = arrays_of(Trial(bench.op, specs, bench.params, {}, FORWARD, jax.default_backend()))

            def loss(*given: Any, bench: Any = bench, names: tuple[str, ...] = tuple(arrays)) -> Any:
                out = bench.plain(**dict(zip(names, given, strict=True)))
                return sum(jnp.mean(jnp.square(o.astype(jnp.float32))) for o in jax.tree.leaves(out))

            loss.__name__ = name
            yield f"{name} {size} {'x'.join(map(str, dims))}", loss, list(arrays.values())


def row(name: str, loss: Any, arrays: list[Any], budget: str) -> dict[str, Any]:
    start = time.perf_counter()
    result = kpt.auto_optimize(loss, *arrays, budget=budget)
    taken = time.perf_counter() - start
    programs = {n: loss_and_gradients(f, arrays) for n, f in (("original", loss), ("kept", result.fn))}
    again = measure({n: f for n, f in programs.items() if f is not None}, arrays)
    log, noise = gain(again["original"].seconds, again["kept"].seconds)
    kernels = sorted({s.kernel for s in result.plan.sites})
    return {
        "case": name, "kept": result.report.kept, "kernels": kernels, "speedup": result.report.measured_speedup,
        "again": math.exp(log), "noise": noise, "slower": log + 2 * noise < math.log(1 - SLOWER), "seconds": taken,
        "milliseconds": 1e3 * sorted(again["original"].seconds)[len(again["original"].seconds) // 2], "notes": list(result.plan.notes),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="10s", help="for timing the kernels of a case")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{'case':52}{'original ms':>12}{'measured':>10}{'again':>8}{'noise':>7}{'tuning s':>9}  kept")
    for name, loss, arrays in cases():
        if args.only not in name:
            continue
        try:
            rows.append(row(name, loss, arrays, args.budget))
        except Exception as problem:  # one case that cannot be had is a row, and not the end
            rows.append({"case": name, "error": f"{type(problem).__name__}: {str(problem)[:300]}"})
            print(f"{name:52}{rows[-1]['error'][:80]}", flush=True)
            continue
        r = rows[-1]
        print(f"{name:52}{r['milliseconds']:12.3f}{r['speedup']:9.2f}x{r['again']:7.2f}x{r['noise']:7.1%}{r['seconds']:9.1f}  "
              f"{', '.join(r['kernels']) if r['kept'] else 'the original'}{'  SLOWER' if r['slower'] else ''}", flush=True)  # fmt: skip
    print(f"{sum(r.get('slower', False) for r in rows)} of {len(rows)} slower than the original by more than {SLOWER:.0%}")
    if args.json:
        command = f"python -m kpt_jax.bench_auto --budget {args.budget}"
        about = {"kind": "kpt.auto", "command": command, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
        args.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
