"""Attention by torch's own `scaled_dot_product_attention`, which picks flash, memory-efficient, cuDNN or plain kernels by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from kpt import ops
from kpt.errors import KernelError
from kpt.ops.base import Specs
from kpt.ops.mask import Causal, Explicit, Lengths, Mask, Segments, Window
from kpt.ops.shapes import keywords
from kpt_torch.library import torch_dtype


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Empty dims are left to the code as written: the back ends do not agree on them."""
    if any(0 in s.shape for s in specs.values()):
        return "is not given empty arrays"
    return None


def _named(fn: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The function, which says what is wrong with the names that it was given."""

    @functools.wraps(fn)
    def attention(**given: Any) -> torch.Tensor:
        try:
            return fn(**given)
        except TypeError:
            keywords(ops.op("attention"), given)
            raise

    return attention


@_named
def attention(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
    q_segment_ids: torch.Tensor | None = None,
    kv_segment_ids: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
    mask: Mask = Mask(),  # noqa: B008  (frozen)
    scale: float | None = None,
    logits_soft_cap: None = None,
    out_dtype: str | None = None,
) -> torch.Tensor:
    """`softmax(fill(scale * q k^T + bias, mask)) v`; arrays and mask as `kpt.ops.attention` says, [B, T, N, H].

    Causality from the first key on is the flag `is_causal`, which costs no mask. Other masks become one boolean array of the smallest
    shape that says them. What a query that sees no key becomes is the fill's, not the back end's: its keys are all shown to it, and
    its row is put in afterwards.

    A hidden key whose scores are NaN shows, since masks are added: this is no kernel for padding that holds NaN.
    """
    causal = mask.terms == (Causal(0),)
    shown, may_be_empty = (None, False) if causal else seen(mask, q, k, keep, q_segment_ids, kv_segment_ids, kv_lengths)
    empty = None
    if shown is not None and may_be_empty:
        empty = ~shown.any(-1, keepdim=True)
        shown = shown | empty
    added, drowned, low = shown, None, None
    if empty is not None and mask.additive and _drowns(mask.fill, q.dtype):
        drowned = empty
    if bias is not None:
        added = bias.to(q.dtype)
        if shown is None:  # a mask that came as numbers, perhaps, which may hide all keys of a query
            least, most = added.detach().aminmax(dim=-1, keepdim=True)
            drowned = (least == most) & _drowns(most, q.dtype) & most.isfinite()
            low = torch.where(drowned, added - added.detach(), 0.0) if bias.requires_grad else None
            added = torch.where(drowned, 0.0, added)
        else:
            added = torch.where(shown, added, torch.full((), float("-inf"), dtype=q.dtype, device=q.device))
    given = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None if causal else added)
    out = F.scaled_dot_product_attention(
        *given[:3], attn_mask=given[3], is_causal=causal, scale=scale, enable_gqa=q.shape[2] != k.shape[2]
    )  # fmt: skip
    if out.requires_grad and not torch.compiler.is_compiling():
        out = _can_be_differentiated_again(out, given, scale, causal)
    if empty is not None and not mask.additive:
        out = torch.where(empty, _unseen(mask, v, out), out)
    if drowned is not None:
        even = _even(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, low).to(out.dtype)
        if even.requires_grad and not torch.compiler.is_compiling():
            even.register_hook(functools.partial(_once, drowned=drowned))
        out = torch.where(drowned, even, out)
    out = out.transpose(1, 2)
    return out if out_dtype is None else out.to(torch_dtype(out_dtype))


def _can_be_differentiated_again(
    out: torch.Tensor, given: Sequence[torch.Tensor | None], scale: float | None, causal: bool
) -> torch.Tensor:
    """Gives torch's back end a second derivative, where it has none."""
    if _is_checkpointed():
        return cast(torch.Tensor, _ByFormula.apply(out, *given, scale, causal))
    node: Any = out.grad_fn
    for _ in range(3):  # views stand before it where heads were padded
        if node is not None and "ScaledDotProduct" in node.name():
            node.register_hook(_twice)
            break
        node = node.next_functions[0][0] if node is not None and node.next_functions else None
    return out


def _is_checkpointed() -> bool:
    """Whether a checkpoint looks after what is saved here: it hands each tensor out once, which leaves none for a hook of the node."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # private
    hooks = None if top is None else top(True)
    return hooks is not None and hooks[0].__module__ == torch.utils.checkpoint.__name__


def _twice(gradients: Sequence[torch.Tensor | None], cotangents: Sequence[torch.Tensor | None]) -> Any:
    """In place of a back end's gradients, which have no derivative, those of the formula, where autograd keeps a graph of them."""
    g, node = cotangents[0], cast(Any, torch._C._current_autograd_node())
    if g is None or not torch.is_grad_enabled():
        return None
    bias = getattr(node, "_saved_attn_mask", getattr(node, "_saved_attn_bias", None))
    found = _of_formula(g, [node._saved_query, node._saved_key, node._saved_value, bias], node._saved_scale, node._saved_is_causal)
    return tuple(None if old is None else new for old, new in zip(gradients, found, strict=False))


def _of_formula(g: torch.Tensor, given: Sequence[torch.Tensor | None], scale: float | None, causal: bool) -> Sequence[torch.Tensor]:
    """Gradients of queries, keys, values and what was added to scores, if it is numbers: in torch's own order, [B, N, T, H]."""
    from kpt_torch.formulas import pulled_back, weighed

    q, k, v, added = given
    hides = added is not None and added.dtype == torch.bool

    def change(scores: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
        if added is not None:
            scores = torch.where(added, scores, float("-inf")) if hides else scores + added
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return scores.masked_fill(above, float("-inf")) if causal else scores

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None) -> Sequence[torch.Tensor]:
        return [weighed(q, k, v, scale, lambda s: change(s, added if hides else bias))]

    moving = [t for t in (q, k, v, None if hides else added) if t is not None]
    with torch.autocast(g.device.type, enabled=False):
        return [new.to(t.dtype) for t, new in zip(moving, pulled_back(attend, moving, [g]), strict=True)]


class _ByFormula(torch.autograd.Function):
    """A back end's result, whose gradients are the back end's, and where autograd keeps a graph of them the formula's."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, *given: Any) -> torch.Tensor:
        *arrays, ctx.scale, ctx.causal = given
        ctx.save_for_backward(*arrays)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        if not torch.is_grad_enabled():
            return (g, *[None] * 6)
        found = _of_formula(g, ctx.saved_tensors, ctx.scale, ctx.causal)
        return (None, *found, *[None] * (6 - len(found)))


class _Once(torch.autograd.Function):
    """What it is given; its gradient has none."""

    @staticmethod
    def forward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        raise KernelError("A gradient of a gradient was asked for through attention.sdpa", "A query sees no key there: its row has a first "
                          "derivative", "Differentiate the module as it was written: kpt_torch.optimize leaves it unchanged")  # fmt: skip


def _once(g: torch.Tensor, drowned: torch.Tensor) -> torch.Tensor:
    return _Once.apply(g) if torch.is_grad_enabled() and bool(drowned.any()) else g


def _unseen(mask: Mask, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The row of a query that sees nothing: NaN, or the mean of the values."""
    if mask.fill == float("-inf"):
        return torch.full((), float("nan"), dtype=out.dtype, device=out.device)
    mean = v.mean(1, keepdim=True, dtype=torch.float64 if v.dtype == torch.float64 else torch.float32).to(out.dtype)
    return mean.repeat_interleave(out.shape[1] // v.shape[2], 2).transpose(1, 2)


def _drowns(added: Any, dtype: torch.dtype) -> Any:
    """Whether scores round away in a number that is added to them (-1e9, say, and the smallest float); scores are float32, or float64."""
    return added * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps < -8


def _even(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, low: torch.Tensor | None) -> torch.Tensor:
    """The row of a query whose scores all drowned, [B, N, 1 or T, Hv]: the mean of the values, and every gradient that the code has.

    Back ends keep `max + log(sum)` of a row, in which log(sum) drowns as well: their gradients are off by the number of keys. The weights
    are 1/S, yet scores have gradients through them: the terms that are 0 here give these.

    Args:
      low: zeros, through which the bias has its gradient.
    """
    groups = q.shape[2] // v.shape[2]
    mean = v.mean(1, keepdim=True, dtype=torch.float64 if v.dtype == torch.float64 else torch.float32).to(v.dtype)
    row, off = mean.transpose(1, 2).repeat_interleave(groups, 1), (v - mean).detach() / v.shape[1]
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        slope = torch.einsum("bskh,bskd->bkhd", k, off) * scale
        scores = q.transpose(1, 2) @ slope.repeat_interleave(groups, 1)
        row = row + (scores - scores.detach())
    if low is not None:
        row = row + low.expand(*low.shape[:-1], v.shape[1]) @ off.transpose(1, 2).repeat_interleave(groups, 1)
    return row


def seen(
    mask: Mask, q: torch.Tensor, k: torch.Tensor, keep: Any, q_segment_ids: Any, kv_segment_ids: Any, kv_lengths: Any
) -> tuple[torch.Tensor | None, bool]:
    """(a boolean array that broadcasts to [B, N, T, S], or None for all; whether a query may see nothing)."""
    if not mask.terms:
        return None, False
    queries, keys = q.shape[1], k.shape[1]
    i = torch.arange(queries, device=q.device)[:, None]
    j = torch.arange(keys, device=q.device)[None, :]
    shown: torch.Tensor | None = None
    may_be_empty = False

    def also(term: torch.Tensor) -> None:
        nonlocal shown
        shown = term if shown is None else shown & term

    for t in mask.terms:
        if isinstance(t, Causal):
            also(j <= i + t.offset)
            may_be_empty |= t.offset < 0
        elif isinstance(t, Window):
            if t.left is not None:
                also(j >= i + t.offset - t.left)
            if t.right is not None:
                also(j <= i + t.offset + t.right)
            may_be_empty |= True
        elif isinstance(t, Segments):
            also((q_segment_ids[:, :, None] == kv_segment_ids[:, None, :])[:, None])
            may_be_empty = True
        elif isinstance(t, Lengths):
            also((j[None] < kv_lengths[:, None, None])[:, None])
            may_be_empty = True
        elif isinstance(t, Explicit):
            also(keep)
            may_be_empty = True
    if shown is not None and shown.dim() == 2:
        shown = shown[None, None]
    return shown, may_be_empty
