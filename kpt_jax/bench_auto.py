"""Never slower, as a fact: `kpt.auto_optimize` on every op of `kpt bench`, large and tiny, and what it kept measured again.

    python -m kpt_jax.bench_auto [--budget 10s] [--json docs/benchmarks/auto-h100.json]

Each case is a loss, so that gradients are measured with it. The second measurement is made after the first, in rounds of its own; a case is
slower if that says so by more than 2%, the noise of the ratio taken off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kpt.tuning.again import Case, run
from kpt.tuning.measurements import FORWARD
from kpt.tuning.trials import Trial
from kpt_jax.bench_ops import BENCHES
from kpt_jax.measure import loss_and_gradients, measure
from kpt_jax.trials import arrays_of


def cases() -> Iterator[Case]:
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


def again(original: Callable[..., Any], kept: Callable[..., Any], arrays: Sequence[Any]) -> tuple[Sequence[float], Sequence[float]]:
    programs = {n: loss_and_gradients(f, arrays) for n, f in (("original", original), ("kept", kept))}
    found = measure({n: f for n, f in programs.items() if f is not None}, arrays)
    return found["original"].seconds, found["kept"].seconds


if __name__ == "__main__":
    run(__doc__, "python -m kpt_jax.bench_auto", cases(), again, {"device": jax.devices()[0].device_kind, "jax": jax.__version__})
