"""Candidates for a call, compiled and timed here: the process that `kpt.tuning.trials` starts."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kpt import ops
from kpt.kernels.spec import resolve
from kpt.strategy.certify import draw
from kpt.tuning.measurements import BOTH
from kpt.tuning.trials import Sample, Trial, serve
from kpt_jax import _compat
from kpt_jax.devices import device_named
from kpt_jax.measure import sample
from kpt_jax.settings import SETTINGS


def ready(trial: Trial, kernel: str) -> Sample:
    """One candidate on random arrays, compiled."""
    # Without it, a float64 call of an import would be timed, and kept, with float32 arrays.
    wide = any(s.dtype.endswith("64") for s in trial.specs.values())
    with jax.default_device(device_named(trial.device)), _compat.with_64_bits() if wide else contextlib.nullcontext():
        return _ready(trial, kernel)


def _ready(trial: Trial, kernel: str) -> Sample:
    fn = functools.partial(resolve(trial.kernels[kernel]), **trial.params)
    arrays = arrays_of(trial)
    moving = {n: a for n, a in arrays.items() if n in ops.op(trial.op).learned and jnp.issubdtype(a.dtype, jnp.floating)}
    if trial.passes != BOTH or not moving:
        return functools.partial(sample, jax.jit(lambda arrays: fn(**arrays)).lower(arrays).compile(), (arrays,))
    still = {n: a for n, a in arrays.items() if n not in moving}

    def both(moving: Any, still: Any, cotangents: Any) -> Any:
        out, pull = jax.vjp(lambda moving: fn(**moving, **still), moving)
        return out, pull(cotangents)[0]

    cotangents = jax.tree.map(lambda s: _normal("", s, 1), jax.eval_shape(lambda arrays: fn(**arrays), arrays))
    args = (moving, still, cotangents)
    return functools.partial(sample, jax.jit(both).lower(*args).compile(), args)


_held: list[tuple[Trial, dict[str, jax.Array]]] = []
"""The arrays of the trial under way, which its candidates share."""


def arrays_of(trial: Trial) -> dict[str, jax.Array]:
    """Random arrays for a call, in the domain of each; the same as long as it is the same trial."""
    if not _held or _held[0][0] is not trial:
        _held.clear()
        rng = np.random.default_rng(0)
        made = {n: _normal(n, s, i) if "float" in s.dtype else jnp.asarray(draw(rng, s, n, trial.specs))
                for i, (n, s) in enumerate(trial.specs.items())}  # fmt: skip
        _held.append((trial, made))
    return _held[0][1]


def _normal(name: str, like: Any, seed: int) -> jax.Array:
    """Random, made on the device; a matrix of weights is scaled so that products stay near one."""
    scale = like.shape[-2] ** -0.5 if name in ("w", "w_gate", "w_up") else 1.0
    make = jax.jit(lambda key: (scale * jax.random.normal(key, like.shape, "float32")).astype(like.dtype))
    return jax.block_until_ready(make(jax.random.key(seed)))


if __name__ == "__main__":
    serve(ready, SETTINGS)
