"""Cross entropy for NVIDIA Hopper: the logits are read once forward, and read and written once backward.

Forward: an online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867). Each thread keeps the maximum and the sum of what it has
seen, and brings the sum to a new maximum once in several loads, so that there is little more than one exponential a logit; threads
meet at the end of a row. Backward: an elementwise formula, left to XLA, which reads and writes at the speed of a copy and may write
in place of the logits.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kpt.ops.base import Specs
from pallas_kernels.cross_entropy.xla import check, loss_of_row, row_grad
from pallas_kernels.manual_axes import unpartitioned, vary_alike
from pallas_kernels.rows import BLOCK, Cut, cut, kernel

LOADS = 4
"""Of 16 bytes a thread that share one maximum; so many are in flight together."""
_MOST = float(jnp.finfo(jnp.float32).max)


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why these arrays cannot be taken, or None."""
    logits = specs["logits"]
    if (why := unpartitioned()) is not None:
        return why
    if 0 in logits.shape:
        return "has no empty arrays"
    if logits.shape[-1] < 1024:
        return f"gives a warpgroup to each row, and {logits.shape[-1]} classes are too few for one; XLA fuses short rows"
    return None


def cross_entropy(
    *,
    logits: jax.Array,
    labels: jax.Array,
    label_smoothing: float = 0.0,
    logits_soft_cap: float | None = None,
    invalid: str = "nan",
) -> jax.Array:
    """`logsumexp(z) - (1 - eps) * z[label] - eps * mean(z)` with `z = cap(logits)`, `eps = label_smoothing`.

    Args:
      logits: `[..., V]` float16, bfloat16 or float32.
      labels: `[...]` integers.
      label_smoothing: weight of the uniform distribution in the target.
      logits_soft_cap: `c` in `c * tanh(logits / c)`; none if None.
      invalid: what a label outside `[0, V)` does: "nan", "zero", "clip" or "drop", as in `cross_entropy.xla`.

    Returns:
      Loss `[...]`, float32.

    Raises:
      OpError: shapes do not fit, or `invalid` is none of these.
    """
    labels = check(f"cross_entropy of logits{list(logits.shape)}", logits.shape[:-1], labels, invalid)
    return _cross_entropy((label_smoothing, logits_soft_cap, invalid), *vary_alike(logits, labels))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(static, logits, labels):
    return _fwd(static, logits, labels)[0]


def row_statistics(logits, labels, label_smoothing: float, cap: float | None, invalid: str):
    """Loss, row maximum (0 where that is not finite) and row sum of `exp(z - maximum)`, each `[...]`, from one pass."""
    classes = logits.shape[-1]
    found = _statistics(logits.reshape(-1, classes), cap, bool(label_smoothing))
    m, total, mean = (None if a is None else a.reshape(labels.shape) for a in found)
    inside = (labels >= 0) & (labels < classes)
    picked = jnp.take_along_axis(logits, jnp.clip(labels, 0, classes - 1)[..., None], -1)[..., 0].astype(jnp.float32)
    picked = picked if cap is None else cap * jnp.tanh(picked / cap)
    picked = picked if invalid == "clip" else jnp.where(inside, picked, 0)
    return loss_of_row(m, total, picked, mean, labels, classes, label_smoothing, invalid), m, total


def _fwd(static, logits, labels):
    loss, m, total = row_statistics(logits, labels, *static)
    return loss, (logits, labels, m, total)


def _bwd(static, residuals, g):
    logits, labels, m, total = residuals
    d = row_grad(logits.astype(jnp.float32), labels, m, 1 / total, g, *static)
    return d.astype(logits.dtype), None


_cross_entropy.defvjp(_fwd, _bwd)


def _statistics(logits: jax.Array, cap: float | None, with_mean: bool) -> Any:
    """Of each row of `z`: the maximum (0 where that is not finite), the sum of `exp(z - maximum)`, and with_mean the mean."""
    rows, classes = logits.shape
    held = cut(classes, (logits.dtype,), classes)
    loops, rest = divmod(held.pieces, LOADS)
    loops, rest = (loops, rest) if rest else (loops - 1, LOADS)

    def body(logits_ref: Any, m_ref: Any, total_ref: Any, *refs: Any) -> None:
        *mean_ref, _ = refs
        row = lax.axis_index(BLOCK)

        def load(start: Any) -> jax.Array:
            z = plgpu.load(logits_ref.at[row, pl.ds(start, held.piece)], layout=held.layout).astype(jnp.float32)
            # tanh by way of exp, whose fast version on the GPU is the more exact.
            return z if cap is None else cap * (1 - 2 / (jnp.exp(z * (2 / cap)) + 1))

        def seen(carry: Any, pieces: list[jax.Array]) -> Any:
            m, total = carry
            # Finite, so that -inf and inf do not make NaN in `m - m`.
            top = jnp.clip(functools.reduce(jnp.maximum, pieces, m), -_MOST, _MOST)
            return top, functools.reduce(jnp.add, [jnp.exp(z - top) for z in pieces], total * jnp.exp(m - top))

        def step(i: Any, carry: Any) -> Any:
            pieces = [load((i * LOADS + j) * held.piece) for j in range(LOADS)]
            carry, sums = carry
            return seen(carry, pieces), [functools.reduce(jnp.add, pieces, s) for s in sums]

        zero = held.zero()
        carry, sums = lax.fori_loop(0, loops, step, ((zero - _MOST, zero), [zero] * with_mean))
        places = held.places()[-rest:]
        pieces = [load(start) for start, _ in places]
        m, total = seen(carry, [_but_first(held, z, n, -jnp.inf) for z, (_, n) in zip(pieces, places, strict=True)])
        top = jnp.max(m)
        total_ref[row] = jnp.sum(total * jnp.exp(m - top))
        m_ref[row] = jnp.where(jnp.abs(top) < _MOST, top, 0.0)
        for ref, s in zip(mean_ref, sums, strict=True):
            s = functools.reduce(jnp.add, [_but_first(held, z, n, 0) for z, (_, n) in zip(pieces, places, strict=True)], s)
            ref[row] = jnp.sum(s) / classes

    found = kernel(body, [jax.ShapeDtypeStruct((rows,), jnp.float32)] * (2 + with_mean), rows, held)(logits)
    return found if with_mean else (*found, None)


def _but_first(held: Cut, z: jax.Array, foreign: int, fill: float) -> jax.Array:
    """`z` with `fill` in the elements that an earlier piece has."""
    if foreign == 0:
        return z
    place = plgpu.broadcasted_iota(jnp.int32, (held.piece,), 0, layout=held.layout)
    return jnp.where(place >= foreign, z, jnp.full_like(z, fill))
