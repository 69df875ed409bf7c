"""`kpt tune`: the calls of `kpt bench` at its shapes, for JAX."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from kpt.strategy.tune import Call
from kpt_jax.auto import runner as runner
from kpt_jax.bench_ops import BENCHES
from kpt_jax.tpu_programs import cases


def calls(names: Sequence[str], dtype: str | None) -> list[Call]:
    """Of these benchmarks or ops, all where none is named, at every shape for what jax computes on.

    Args:
      dtype: bfloat16, or float32 on a CPU, unless given.

    Raises:
      KptError: no benchmark has such a name.
    """
    on_cpu = jax.default_backend() == "cpu"
    dtype = dtype or ("float32" if on_cpu else "bfloat16")
    chosen = dict.fromkeys(name for name, _ in cases(names))
    shapes = {n: BENCHES[n].cpu_shapes if on_cpu else BENCHES[n].shapes for n in chosen}
    return [Call(BENCHES[n].op, BENCHES[n].specs(dtype, *dims), BENCHES[n].params) for n in chosen for dims in shapes[n]]
