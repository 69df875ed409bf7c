"""Choosing by index, and the losses that do."""

from __future__ import annotations

from typing import Any

from kpt_torch.vocabulary.elementwise import widened
from kpt_torch.vocabulary.reductions import log_softmax_of
from kpt_torch.vocabulary.shapes import dim_of
from kpt_torch.vocabulary.table import Unknown, is_float, rule


@rule("gather")
def _gather(b: Any, x: Any, dim: int, index: Any, *, sparse_grad: bool = False) -> Any:
    d = dim_of(x, dim)
    if any(i != d and index.shape[i] != x.shape[i] for i in range(x.ndim)):
        raise Unknown("a gather of fewer rows")
    return take_along(b, x, index, d, "clip")


def take_along(b: Any, x: Any, index: Any, d: int, mode: str) -> Any:
    """x[..., index, ...] along one axis, the other dims walking together; an index outside of it follows `mode`."""
    others = tuple(i for i in range(x.ndim) if i != d)
    idx = b.reshape(index, (*index.shape, 1))
    return b.op("gather", x, idx, shape=index.shape, dtype=x.dtype, offset_dims=(), collapsed=(d,), index_map=(d,), operand_batch=others,
                index_batch=others, sizes=(1,) * x.ndim, mode=mode)  # fmt: skip


@rule("nll_loss_nd", "nll_loss")
def _nll_loss(b: Any, logp: Any, labels: Any, weight: Any = None, reduction: int = 1, ignore_index: int = -100) -> Any:
    return _nll(b, logp, labels, weight, reduction, ignore_index, 0.0)


@rule("cross_entropy_loss")
def _cross_entropy(
    b: Any, x: Any, labels: Any, weight: Any = None, reduction: int = 1, ignore_index: int = -100, label_smoothing: float = 0.0
) -> Any:
    if is_float(labels.dtype) or x.ndim < 1:
        raise Unknown("targets that are probabilities")
    axis = 1 if x.ndim > 1 else 0
    logp = b.convert(log_softmax_of(b, widened(b, x), axis), x.dtype)
    return _nll(b, logp, labels, weight, reduction, ignore_index, label_smoothing)


def _nll(b: Any, logp: Any, labels: Any, weight: Any, reduction: int, ignore_index: int, smoothing: float) -> Any:
    """Losses per row, those of `ignore_index` 0, and their mean over the others."""
    if weight is not None:
        raise Unknown("class weights")
    axis = 1 if logp.ndim > 1 else 0
    perm = [*(d for d in range(logp.ndim) if d != axis), axis]
    rows = b.transpose(logp, perm)  # classes last
    kept = b.elementwise("ne", labels, b.full(ignore_index, labels.dtype), dtype="bool")
    zero = b.full(0, labels.dtype)
    safe = b.op("select", kept, labels, b.broadcast(zero, labels.shape), shape=labels.shape, dtype=labels.dtype)
    picked = take_along(b, rows, b.reshape(safe, (*safe.shape, 1)), rows.ndim - 1, "clip")
    loss = b.op("neg", b.reshape(picked, safe.shape), shape=safe.shape, dtype=rows.dtype)
    if smoothing:
        n = rows.shape[-1]
        flat = b.op("neg", b.reduce("sum", rows, [rows.ndim - 1], False), shape=safe.shape, dtype=rows.dtype)
        loss = b.elementwise("add", b.elementwise("mul", loss, b.full(1 - smoothing, rows.dtype)),
                             b.elementwise("mul", flat, b.full(smoothing / n, rows.dtype)))  # fmt: skip
    none = b.broadcast(b.full(0.0, loss.dtype), loss.shape)
    loss = b.op("select", kept, loss, none, shape=loss.shape, dtype=loss.dtype)
    if reduction == 0:
        return loss
    axes = list(range(loss.ndim))
    wide = widened(b, loss)
    total = b.reduce("sum", wide, axes, False)
    if reduction == 1:
        # Counted in integers: as floats they would be the weights of the tokens, and an array of the site made outside of it.
        count = b.reduce("sum", b.convert(kept, "int64"), axes, False)
        total = b.elementwise("div", total, b.convert(count, wide.dtype))
    out = b.convert(total, loss.dtype)
    return b.identity(out)
