"""Cross entropy in plain JAX: no one-hot array, and no second copy of the logits kept for the backward."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kpt.errors import OpError
from kpt.ops.cross_entropy import INVALID
from pallas_kernels.manual_axes import spread, vary_alike


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
      logits: `[..., V]` float.
      labels: `[...]` integers.
      label_smoothing: weight of the uniform distribution in the target.
      logits_soft_cap: `c` in `c * tanh(logits / c)`; none if None.
      invalid: what a label outside `[0, V)` does: "nan" makes the loss NaN, "zero" makes the term of the label 0, "clip"
        takes the nearest class, "drop" leaves of the loss the share of the smoothing, as an all-zero one-hot does.

    Returns:
      Loss `[...]`, float32 (float64 for float64 logits).

    Raises:
      OpError: shapes do not fit, or `invalid` is none of these.
    """
    labels = check(f"cross_entropy of logits{list(logits.shape)}", logits.shape[:-1], labels, invalid)
    return _cross_entropy((label_smoothing, logits_soft_cap, invalid), *vary_alike(logits, labels))


def check(asked: str, rows: tuple[int, ...], labels: jax.Array, invalid: str) -> jax.Array:
    """The labels, in 32 bits at least: beside a byte the number of classes would be one, too, and 300 be 44.

    Raises:
      OpError: the labels are no integers shaped like `rows`, or `invalid` is not known.
    """
    if labels.shape != rows or not jnp.issubdtype(labels.dtype, jnp.integer):
        got = f"{asked} with labels {labels.dtype}{list(labels.shape)}"
        raise OpError(got, f"labels are integers {list(rows)}", "Check the axes")
    if invalid not in INVALID:
        raise OpError(f"{asked} with invalid={invalid!r}", f"invalid is one of {INVALID}", "Choose one")
    return labels.astype(jnp.int32) if labels.dtype.itemsize < 4 else labels


def row_loss(logits, labels, label_smoothing: float, cap: float | None, invalid: str):
    """Loss, row maximum (0 where that is not finite) and row sum of `exp(z - maximum)`, each `[...]`."""
    z = logits if cap is None else cap * jnp.tanh(logits / cap)
    classes = z.shape[-1]
    m = jnp.max(z, -1, initial=-jnp.inf)
    m = jnp.where(jnp.isfinite(m), m, 0)
    total = jnp.sum(jnp.exp(z - m[..., None]), -1)
    if classes == 0:
        return jnp.full_like(m, -jnp.inf), m, total
    compared = functools.partial(_compared, invalid)
    picked = compared(z, labels) if spread(z) else lax.platform_dependent(z, labels, cpu=_gathered, default=compared)
    mean = jnp.mean(z, -1) if label_smoothing else None
    return loss_of_row(m, total, picked, mean, labels, classes, label_smoothing, invalid), m, total


def _compared(invalid: str, z, labels):
    """The label's `z`: one fused pass over what is read anyway, which stays local where classes are sharded. 0 where there is none."""
    return jnp.sum(jnp.where(_is_label(labels, z.shape[-1], invalid), z, 0), -1)


def _gathered(z, labels):
    """The same on a CPU, where XLA would write that comparison out. A label outside gets the nearest class, which `loss_of_row` drops."""
    at = jnp.clip(labels, 0, z.shape[-1] - 1)
    return jnp.take_along_axis(z, at[..., None], -1)[..., 0]


def loss_of_row(m, total, picked, mean, labels, classes: int, label_smoothing: float, invalid: str):
    """Loss from a row's maximum, its sum of `exp(z - maximum)`, the label's `z`, and with smoothing the mean of `z`."""
    # Relative to the maximum, so that large logits do not cancel.
    valid = _is_valid(labels, classes, invalid)
    loss = jnp.log(total) - (1 - label_smoothing) * jnp.where(valid, picked - m, -m)
    if label_smoothing:
        loss = loss - label_smoothing * (mean - m)
    if invalid == "drop":
        uniform = label_smoothing * (jnp.log(total) - (mean - m)) if label_smoothing else 0
        loss = jnp.where(valid, loss, uniform)
    return jnp.where(valid, loss, jnp.nan) if invalid == "nan" else loss


def row_grad(logits, labels, m, scale, g, label_smoothing: float, cap: float | None, invalid: str):
    """Gradient with respect to the logits: `g * (exp(z - m) * scale - target)`, with `scale = 1 / row sum`."""
    t = None if cap is None else jnp.tanh(logits / cap)
    z = logits if t is None or cap is None else cap * t
    classes = z.shape[-1]
    share = jnp.where(_is_valid(labels, classes, invalid), scale, scale * label_smoothing) if invalid == "drop" else scale
    d = jnp.exp(z - m[..., None]) * (share * g)[..., None]
    d = d - jnp.where(_is_label(labels, classes, invalid), ((1 - label_smoothing) * g)[..., None], 0)
    if label_smoothing:
        d = d - (label_smoothing / classes) * g[..., None]
    return d if t is None else d * (1 - t * t)


def _is_valid(labels, classes: int, invalid: str):
    return jnp.full(labels.shape, True) if invalid == "clip" else (labels >= 0) & (labels < classes)


def _is_label(labels, classes: int, invalid: str):
    if invalid == "clip":
        labels = jnp.clip(labels, 0, max(classes - 1, 0))
    return lax.broadcasted_iota(labels.dtype, (*labels.shape, classes), labels.ndim) == labels[..., None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(static, logits, labels):
    return _fwd(static, logits, labels)[0]


def _fwd(static, logits, labels):
    loss, m, total = row_loss(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), labels, *static)
    return loss, (logits, labels, m, total)


def _bwd(static, residuals, g):
    logits, labels, m, total = residuals
    d = row_grad(logits.astype(m.dtype), labels, m, 1 / total, g, *static)
    return d.astype(logits.dtype), None


_cross_entropy.defvjp(_fwd, _bwd)
