"""Cross entropy for TPU: the logits are read once forward, and read and written once backward.

Forward: an online softmax over blocks of classes (Milakov and Gimelshein 2018, arXiv:1805.02867). Backward: an elementwise formula, left
to XLA, which runs it at the speed of a copy.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp

from kpt.ops.base import Specs
from pallas_kernels import tensorcore, tuned
from pallas_kernels.cross_entropy.xla import check, loss_of_row, row_grad
from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.tensorcore import LANES, cut, launch, once, padded_bytes, require_fit, require_multiples

_MOST = float(jnp.finfo(jnp.float32).max)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows and classes of a block, multiples of 128."""

    MULTIPLE: ClassVar[int] = LANES
    rows: int
    classes: int

    def __post_init__(self) -> None:
        require_multiples(self)


def default_blocks(specs: Specs, params: Mapping[str, Any]) -> Blocks:
    """A row's sums cost a step of the grid little where it has two thousand classes, or half of them in the 16 MiB of v4."""
    return Blocks(256, 1024 if tensorcore.generation().vmem < 32 << 20 else 2048)


def _cut(blocks: Blocks, rows: int, classes: int) -> tuple[int, int]:
    return cut(rows, blocks.rows), cut(classes, blocks.classes)


def _need(rows: int, classes: int) -> int:
    """Bytes of VMEM: logits in two buffers, and the values in between."""
    return 8 * padded_bytes((rows, classes), jnp.float32)


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why these arrays cannot be taken, or None."""
    return tensorcore.refusal(specs, params)


def cross_entropy(
    *,
    logits: jax.Array,
    labels: jax.Array,
    label_smoothing: float = 0.0,
    logits_soft_cap: float | None = None,
    invalid: str = "nan",
    blocks: Blocks | None = None,
) -> jax.Array:
    """`logsumexp(z) - (1 - eps) * z[label] - eps * mean(z)` with `z = cap(logits)`, `eps = label_smoothing`.

    Args:
      logits: `[..., V]` bfloat16 or float32.
      labels: `[...]` integers.
      label_smoothing: weight of the uniform distribution in the target.
      logits_soft_cap: `c` in `c * tanh(logits / c)`; none if None.
      invalid: what a label outside `[0, V)` does: "nan", "zero", "clip" or "drop", as in `cross_entropy.xla`.
      blocks: of the forward pass.

    Returns:
      Loss `[...]`, float32.

    Raises:
      OpError: shapes do not fit, or `invalid` is none of these.
      KernelError: the blocks do not fit VMEM.
    """
    labels = check(f"cross_entropy of logits{list(logits.shape)}", logits.shape[:-1], labels, invalid)
    rows, classes = labels.size, logits.shape[-1]
    blocks = blocks or tuned.blocks(
        "cross_entropy", Blocks, {}, lambda found: tensorcore.fits(_need(*_cut(found, rows, classes))), logits=logits, labels=labels
    )
    return _cross_entropy((label_smoothing, logits_soft_cap, invalid, blocks), *vary_alike(logits, labels))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(static, logits, labels):
    return _fwd(static, logits, labels)[0]


def _fwd(static, logits, labels):
    label_smoothing, cap, invalid, blocks = static
    classes = logits.shape[-1]
    flat = logits.reshape(-1, classes)
    rows = flat.shape[0]
    chosen = blocks or default_blocks({}, {})
    bm, bv = _cut(chosen, rows, classes)
    require_fit(chosen, _need(bm, bv))
    steps = pl.cdiv(classes, bv)

    def kernel(logits_ref: Any, label_ref: Any, *refs: Any) -> None:
        step = pl.program_id(1)
        online(refs[:4], refs[4:], step, steps, logits_ref[...].astype(jnp.float32), label_ref[...], cap, classes)

    given, out = (flat, column(clipped(labels, classes, invalid))), [((rows, 1), jnp.float32)] * 4
    found = launch(
        kernel,
        *given,
        out=out,
        in_specs=[pl.BlockSpec((bm, bv), lambda i, j: (i, j)), pl.BlockSpec((bm, 1), lambda i, j: (i, 0))],
        out_specs=[pl.BlockSpec((bm, 1), lambda i, j: (i, 0))] * 4,
        grid=(pl.cdiv(rows, bm), steps),
        semantics=("parallel", "arbitrary"),
        scratch=[pltpu.VMEM((bm, 1), jnp.float32)] * 4,
        cost=once(given, out, 6 * flat.size, (1 if cap is None else 2) * flat.size),
        name="cross_entropy",
    )
    m, total, picked, summed = (a.reshape(labels.shape) for a in found)
    loss = loss_of_row(m, total, picked, summed / classes, labels, classes, label_smoothing, invalid)
    return loss, (logits, labels, m, total)


def _bwd(static, residuals, g):
    logits, labels, m, total = residuals
    d = row_grad(logits.astype(jnp.float32), labels, m, 1 / total, g, *static[:3])
    return d.astype(logits.dtype), None


_cross_entropy.defvjp(_fwd, _bwd)


def clipped(labels: jax.Array, classes: int, invalid: str) -> jax.Array:
    """Labels as int32, those outside the classes -1 or, for "clip", the nearest."""
    near = jnp.clip(labels, 0, classes - 1)
    return (near if invalid == "clip" else jnp.where(labels == near, labels, -1)).astype(jnp.int32)


def column(a: jax.Array) -> jax.Array:
    return a.reshape(-1, 1)


def online(
    outs: Sequence[Any], held: Sequence[Any], step: Any, steps: int, z: jax.Array, labels: jax.Array, cap: float | None, classes: int
) -> None:
    """One block of classes of an online softmax.

    Writes, at the last step, of each row of `z = cap(logits)`: the maximum (0 where that is not finite), the sum of `exp(z - maximum)`,
    the label's `z` (0 without one), and the sum of `z`.

    Args:
      outs, held: four columns each, the results and scratch.
      z: the block, float32, before the cap.
      labels: `[rows, 1]`, -1 for none.
    """
    m_ref, total_ref, picked_ref, sum_ref = held

    @pl.when(step == 0)
    def _() -> None:
        m_ref[...] = jnp.full_like(m_ref, -_MOST)
        for ref in (total_ref, picked_ref, sum_ref):
            ref[...] = jnp.zeros_like(ref)

    if cap is not None:
        z = cap * jnp.tanh(z / cap)
    place = step * z.shape[1] + jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
    inside = place < classes
    seen = jnp.where(inside, z, -jnp.inf) if classes % z.shape[1] else z
    # Finite, so that -inf and inf do not make NaN in `m - m`.
    m = jnp.clip(jnp.maximum(m_ref[...], jnp.max(seen, 1, keepdims=True)), -_MOST, _MOST)
    total_ref[...] = total_ref[...] * jnp.exp(m_ref[...] - m) + jnp.sum(jnp.exp(seen - m), 1, keepdims=True)
    m_ref[...] = m
    picked_ref[...] += jnp.sum(jnp.where(place == labels, z, 0.0), 1, keepdims=True)
    sum_ref[...] += jnp.sum(jnp.where(inside, z, 0.0), 1, keepdims=True)

    @pl.when(step == steps - 1)
    def _() -> None:
        m = m_ref[...]
        for out, value in zip(outs, (jnp.where(jnp.abs(m) < _MOST, m, 0.0), total_ref[...], picked_ref[...], sum_ref[...]), strict=True):
            out[...] = value
