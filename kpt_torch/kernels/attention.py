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
from kpt_torch.library import nobody_watches, torch_dtype


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

    Back ends keep `max + log(sum)` of a row, in which log(sum) drowns as scores do where all that a query may see is far below 0 (a mask
    that came as numbers): their gradients are off by the number of keys. So what is added is shifted to end at 0, and scores that drown
    are taken out beforehand; what gradients they have is made here (`_drowned_gradients`).

    A hidden key whose scores are NaN shows, since masks are added: this is no kernel for padding that holds NaN. A query to which -inf in
    the bias hides all that the mask shows is NaN, and so are the gradients of all of its keys, hidden ones too.
    """
    causal = mask.terms == (Causal(0),)
    shown, may_be_empty = (None, False) if causal else seen(mask, q, k, keep, q_segment_ids, kv_segment_ids, kv_lengths)
    added, empty, drowned = shown, None, None
    if shown is not None and may_be_empty:
        empty = ~shown.any(-1, keepdim=True)
        added = shown | empty
    if empty is not None and mask.additive and _drowns(mask.fill, q.dtype):
        drowned = even = empty
    scored = None  # which scores are not replaced by a fill
    if bias is not None:
        added, scored = _joined(bias, shown, empty, mask)
        least, most = added.detach().aminmax(dim=-1, keepdim=True)
        drowned = _drowns(most, q.dtype) & most.isfinite()
        if scored is not None and empty is not None:
            drowned = drowned & ~empty
        even = drowned & (least == most)
        if scored is not None:
            even = even & scored.all(-1, keepdim=True)
        # Far from 0, narrow dtypes end and log(sum) loses digits. Where nothing is finite the difference is NaN, as softmax is.
        added = (added - torch.where(most.abs() > _FAR, most, 0.0)).to(q.dtype)
    qh, kh, vh = (t.transpose(1, 2) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    given = (qh if drowned is None else torch.where(drowned, 0.0, qh), kh, vh, None if causal else added)
    out = F.scaled_dot_product_attention(
        *given[:3], attn_mask=given[3], is_causal=causal, scale=scale, enable_gqa=q.shape[2] != k.shape[2]
    )  # fmt: skip
    if out.requires_grad and not torch.compiler.is_compiling():
        out = _can_be_differentiated_again(out, given, scale, causal)
    if drowned is not None and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        out = cast(torch.Tensor, _Drowned.apply(out, qh, kh, vh, added, scored, drowned, even, scale))
    if empty is not None and not mask.additive:
        out = torch.where(empty, _unseen(mask, v, out, empty), out)
    out = out.transpose(1, 2)
    return out if out_dtype is None else out.to(torch_dtype(out_dtype))


_FAR = 1024.0
"""From which size on the largest number of a row is taken away from it."""


def _joined(
    bias: torch.Tensor, shown: torch.Tensor | None, empty: torch.Tensor | None, mask: Mask
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(what is added to scores, bias and mask in one; where the scores stand that it is added to, None if everywhere)."""
    if shown is None:
        return bias, None
    wide = bias if bias.dtype == torch.float64 else bias.float()
    if mask.additive:
        return torch.where(shown, wide, wide + mask.fill), None
    fill = mask.fill if mask.fill == float("-inf") else max(mask.fill, torch.finfo(wide.dtype).min)
    hidden = torch.full((), fill, dtype=wide.dtype, device=wide.device)
    # A query that sees nothing has a row of its own later: what stands here is as good as any, but for NaN.
    return torch.where(shown, wide, hidden if empty is None else torch.where(empty, 0.0, hidden)), shown


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


class _Drowned(torch.autograd.Function):
    """A back end's result of queries without those whose scores drowned; these have their gradients here."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, *given: Any) -> torch.Tensor:
        *arrays, ctx.scale = given
        ctx.save_for_backward(*arrays)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        given = (g, *ctx.saved_tensors, ctx.scale)
        if not nobody_watches(given[:-1]):
            made = _definition(*given)
        elif _may_look(g) and not bool(given[6].any()):  # nearly always
            made = (None, None)
        else:
            made = _Once.apply(*given) if torch.is_grad_enabled() else _drowned_gradients(*given)
        return (g, *made, *[None] * 6)


class _Once(torch.autograd.Function):
    """`_drowned_gradients`, which have no derivative."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[torch.Tensor, ...]:
        return tuple(_drowned_gradients(*given))

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise KernelError("A gradient of a gradient was asked for through attention.sdpa", "A query sees no key there: its row has a first "
                          "derivative", "Differentiate the module as it was written: kpt_torch.optimize leaves it unchanged")  # fmt: skip


def _unseen(mask: Mask, v: torch.Tensor, out: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    """The row of a query that sees nothing: NaN, as is the values' gradient, or the mean of the values."""
    mean = v.mean(1, keepdim=True, dtype=torch.float64 if v.dtype == torch.float64 else torch.float32).to(out.dtype)
    row = mean.repeat_interleave(out.shape[1] // v.shape[2], 2).transpose(1, 2)
    return row * torch.where(empty, float("nan"), 1.0).to(out.dtype) if mask.fill == float("-inf") else row


def _drowns(added: Any, dtype: torch.dtype) -> Any:
    """Whether scores round away in a number that is added to them (-1e9, say, and the smallest float); scores are float32, or float64."""
    return abs(added) * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps > 8


def _drowned_gradients(
    g: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, added: torch.Tensor | None, scored: torch.Tensor | None,
    drowned: torch.Tensor, even: torch.Tensor, scale: float,
) -> list[torch.Tensor]:  # fmt: skip
    """Gradients of queries and keys through scores that drowned, [B, N, T, H]: they moved nothing, and yet the code's have derivatives.

    Rows that weigh all keys alike are two small products. Others are computed as written, row by row.

    Args:
      added: of which weights are the softmax.
      scored: where a score is what was computed and no fill; None: everywhere.
      drowned: rows, [B or 1, N or 1, T or 1, 1].
      even: those of them that weigh all keys alike.
    """
    if _may_look(g) and not bool(drowned.any()):
        return [torch.zeros(t.shape, dtype=q.dtype, device=q.device) for t in (q, k)]
    (batch, heads, queries, _), (shared, keys) = q.shape, k.shape[1:3]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    g, qw, k, v = (t.to(wide) for t in (g, q, k, v))

    def grouped(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(1, (shared, heads // shared)).sum(2)

    off = (v - v.mean(2, keepdim=True)) * (scale / keys)
    each = torch.where(even, g, 0.0)
    dq = each @ (off.mT @ k).repeat_interleave(heads // shared, 1)
    dk = off @ grouped(each.mT @ qw)
    rows = (drowned & ~even).expand(batch, -1, queries, 1)
    everywhere = None if _may_look(g) else torch.arange(queries, device=g.device)
    for b in rows.flatten(1).any(1).nonzero()[:, 0].tolist() if everywhere is None else range(batch if added is not None else 0):
        found = rows[b, :, :, 0].any(0).nonzero()[:, 0] if everywhere is None else everywhere
        for at in found.split(max(1, (1 << 22) // (heads * keys))):
            kb, vb = (t[b].repeat_interleave(heads // shared, 0) for t in (k, v))

            def of(t: torch.Tensor, b: int = b, at: torch.Tensor = at) -> torch.Tensor:
                t = t[b if t.shape[0] > 1 else 0]
                return t[:, at] if t.shape[1] > 1 else t

            assert added is not None  # else all keys weigh alike
            p, gb = torch.softmax(of(added).to(wide), -1), of(g)
            dp = gb @ vb.mT
            ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
            ds = torch.where(of(rows) if scored is None else of(rows) & of(scored), ds, 0.0)
            dq[b, :, at] += ds @ kb
            dk[b] += grouped((ds.mT @ of(qw))[None])[0]
    return [dq.to(q.dtype), dk.to(q.dtype)]


def _may_look(t: torch.Tensor) -> bool:
    """Whether the values of a tensor may be asked for: while a CUDA graph is captured there are none."""
    return not (t.is_cuda and torch.cuda.is_current_stream_capturing())


_definition = torch.library.custom_op(
    "kpt::attention_drowned", _drowned_gradients, mutates_args=(),
    schema="(Tensor g, Tensor q, Tensor k, Tensor v, Tensor? added, Tensor? scored, Tensor drowned, Tensor even, float scale) -> Tensor[]",
)  # fmt: skip
_definition.register_fake(lambda g, q, k, *_: [torch.empty(t.shape, dtype=q.dtype, device=q.device) for t in (q, k)])


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
