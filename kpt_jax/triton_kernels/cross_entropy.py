"""cross_entropy in JAX, by the Triton kernels of `jitted/cross_entropy.py`."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import triton

from kpt.ops.base import Specs
from kpt_jax.triton_kernels.launch import Out, as_rows, launch, over_rows, zeros
from kpt_torch.triton_kernels.jitted import bounds
from kpt_torch.triton_kernels.jitted import cross_entropy as jitted
from pallas_kernels.manual_axes import unpartitioned, vary_alike


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why the kernels cannot take a call, in one clause, or None."""
    return unpartitioned() or jitted.refusal(specs, params)


def cross_entropy(
    *,
    logits: jax.Array,
    labels: jax.Array,
    label_smoothing: float = 0.0,
    logits_soft_cap: float | None = None,
    invalid: str = "nan",
) -> jax.Array:
    """`logsumexp(z) - (1 - eps) z[label] - eps mean(z)` with `z = cap(logits)`, `eps = label_smoothing`.

    Args:
      logits: `[..., V]` float16, bfloat16 or float32.
      labels: `[...]` integers.
      label_smoothing: weight of the uniform distribution in the target.
      logits_soft_cap: `c` in `c tanh(logits / c)`; none if None.
      invalid: what a label outside `[0, V)` does: "nan", "zero", "clip" or "drop", as in `cross_entropy.xla`.

    Returns:
      Loss `[...]`, float32.
    """
    static = (("label_smoothing", float(label_smoothing)), ("logits_soft_cap", logits_soft_cap), ("invalid", invalid))
    return _loss(static, *vary_alike(as_rows(logits), labels.reshape(-1))).reshape(labels.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(static, logits, labels):
    return _fwd(static, logits, labels)[0]


def _fwd(static, logits, labels):
    loss, lse = over_rows(functools.partial(_forward, dict(static)))(logits, labels)
    return loss, (logits, labels, lse)


def _bwd(static, residuals, g):
    return over_rows(functools.partial(_backward, dict(static)))(*residuals, g), None


_loss.defvjp(_fwd, _bwd)


def _forward(params: dict[str, Any], logits, labels):
    (rows, vocab), row = logits.shape, Out(labels.shape, jnp.float32)
    if not logits.size:
        return (zeros(row, logits) - math.inf,) * 2  # the loss of no vocabulary
    made = launch(
        jitted.forward_rows, (rows,), logits, labels, row, row, vocab, *jitted.scalars(params),
        **jitted.static(params), BLOCK=bounds.block(vocab, jitted.FORWARD_BLOCK), warps=jitted.FORWARD_WARPS,
    )  # fmt: skip
    return made["loss"], made["lse"]


def _backward(params: dict[str, Any], logits, labels, lse, g):
    rows, vocab = logits.shape
    if not logits.size:
        return zeros(Out(logits.shape, logits.dtype), logits)
    size = bounds.block(vocab, jitted.BACKWARD_BLOCK)
    return launch(
        jitted.backward_blocks, (rows * triton.cdiv(vocab, size),),
        logits, labels, lse, g, Out(logits.shape, logits.dtype), vocab, *jitted.scalars(params),
        **jitted.static(params), BLOCK=size, warps=jitted.BACKWARD_WARPS,
    )["dlogits"]  # fmt: skip
