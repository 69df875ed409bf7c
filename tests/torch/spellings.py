"""Ops as people write them in PyTorch: a function, by the names of its arguments, and the sites that it must give."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from kpt.ops.mask import Bias, Causal, Explicit, Window

B, T, S, N, K, H, D, V = 2, 12, 10, 4, 2, 8, 16, 24
_generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=_generator)


INPUTS: dict[str, torch.Tensor] = {
    "q": normal(B, N, T, H), "k": normal(B, N, T, H), "v": normal(B, N, T, H), "k2": normal(B, K, T, H), "v2": normal(B, K, T, H),
    "kx": normal(B, N, S, H), "vx": normal(B, N, S, H), "pad": torch.arange(T)[None] < torch.tensor([[T], [7]]), "bias": normal(1, N, T, T),
    "x": normal(B, T, D), "h": normal(B, T, D), "g": normal(D), "b": normal(D), "qb": normal(B, T, N, H), "wq": normal(3 * D, D) / 4,
    "w1": normal(32, D) / 4, "b1": normal(32), "w2": normal(32, D) / 4, "head": normal(V, D) / 4, "logits": normal(B, T, V),
    "labels": torch.randint(0, V, (B, T), generator=_generator), "cos": normal(1, T, H), "sin": normal(1, T, H),
}  # fmt: skip
INPUTS["cis"] = torch.polar(torch.ones(T, H // 2), normal(T, H // 2))
INPUTS["ignored"] = INPUTS["labels"].masked_fill(~INPUTS["pad"], -100)


@dataclasses.dataclass(frozen=True)
class Spelling:
    fn: Callable[..., Any]
    sites: tuple[tuple[str, dict[str, Any]], ...]

    def args(self, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        given = [INPUTS[n].clone() for n in inspect.signature(self.fn).parameters]
        return [a.to(dtype).requires_grad_() if a.is_floating_point() else a for a in given]


TABLE: list[Spelling] = []


def spelled(*sites: tuple[str, dict[str, Any]]) -> Callable[[Callable], Callable]:
    def register(fn: Callable) -> Callable:
        TABLE.append(Spelling(fn, sites))
        return fn

    return register


def site(op: str, **expect: Any) -> tuple[str, dict[str, Any]]:
    return op, expect


# -- attention -----------------------------------------------------------------------------------------------------------------


def weighed(q, k, v, hide=lambda s: s, scale=None):
    s = q @ k.transpose(-2, -1) * (scale or 1 / math.sqrt(q.shape[-1]))
    return torch.softmax(hide(s), -1) @ v


def lower(s):
    return torch.ones(s.shape[-2:], dtype=torch.bool).tril()


@spelled(site("attention", terms=(Explicit(),)))
def adding_infinity(q, k, v, pad):
    """As nn.TransformerEncoder does with a padding mask."""
    return weighed(q, k, v, lambda s: s + torch.zeros(pad.shape).masked_fill(~pad, float("-inf"))[:, None, None])


@spelled(site("attention", terms=(Bias(),)))
def a_mask_that_is_made_here_and_promoted(q, k, v):
    """As Swin's is under autocast."""
    mask = torch.zeros(T, T)
    mask[: T // 2] = -1.0
    return weighed(q, k, v, lambda s: s + mask.bfloat16())


@spelled(site("attention", terms=(Bias(),), scale=1.0))
def cosines(q, k, v, g, bias):
    """As in Swin V2: each head has a scale of its own."""
    s = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * torch.clamp(g[:N, None, None], max=1.5).exp()
    return torch.softmax(s + 16 * torch.sigmoid(bias), -1) @ v


@spelled(site("attention", terms=(Bias(),), scale=1.0))
def a_bias_that_is_a_clamped_product_comes_first(q, k, v, bias):
    return torch.softmax(F.relu(bias @ bias.mT) + q @ k.mT, -1) @ v


@spelled(site("attention", terms=(Causal(0), Bias()), scale=1.0))
def distances_that_are_looked_up_and_a_finite_triangle(q, k, v, head):
    """As in T5's decoder."""
    far = (torch.arange(T)[:, None] - torch.arange(T)).clamp(0, V - 1)
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    return torch.softmax(q @ k.mT + F.embedding(far, head[:, :N]).permute(2, 0, 1) + torch.where(seen, 0.0, -1e9), -1) @ v


@spelled(site("attention", terms=()))
def plain(q, k, v):
    return weighed(q, k, v)


@spelled(site("attention", terms=(), scale=0.5))
def einsum(q, k, v):
    s = torch.einsum("bnth,bnsh->bnts", q, k) * 0.5
    return torch.einsum("bnts,bnsh->bnth", s.softmax(-1), v)


@spelled(site("attention", terms=(Causal(0),)))
def masked_fill(q, k, v):
    return weighed(q, k, v, lambda s: s.masked_fill(~lower(s), float("-inf")))


@spelled(site("attention", terms=(Causal(0),)))
def masked_fill_in_place(q, k, v):
    s = q @ k.mT
    s = s.mul_(0.3)
    s.masked_fill_(torch.triu(torch.ones(T, T, dtype=torch.bool), diagonal=1), float("-inf"))
    return F.softmax(s, dim=-1) @ v


@spelled(site("attention", terms=(Causal(0),)))
def where(q, k, v):
    return weighed(q, k, v, lambda s: torch.where(lower(s), s, torch.finfo(s.dtype).min))


@spelled(site("attention", terms=(Causal(0),)))
def added(q, k, v):
    return weighed(q, k, v, lambda s: s + torch.full((T, T), float("-inf")).triu(1))


@spelled(site("attention", terms=(Causal(0), Window(3, None, 0))))
def window(q, k, v):
    i, j = torch.arange(T)[:, None], torch.arange(T)[None]
    return weighed(q, k, v, lambda s: s.masked_fill((j > i) | (j < i - 3), float("-inf")))


@spelled(site("attention", terms=(Explicit(),)))
def padding(q, k, v, pad):
    return weighed(q, k, v, lambda s: s.masked_fill(~pad[:, None, None, :], -1e9))


@spelled(site("attention", terms=(Explicit(),)))
def padding_by_integers(q, k, v, labels):
    """Numbers of which 0 hides, as DebertaV2 casts its mask."""
    return weighed(q, k, v, lambda s: s.masked_fill(~labels[:, None, None].bool(), -1e9))


@spelled(site("attention", terms=(Bias(),)))
def additive_bias(q, k, v, bias):
    return weighed(q, k, v, lambda s: s + bias)


@spelled(site("attention", k=(B, S, N, H), terms=()))
def cross(q, kx, vx):
    return weighed(q, kx, vx)


@spelled(site("attention", k=(B, T, K, H), terms=()))
def grouped_by_repeat_interleave(q, k2, v2):
    return weighed(q, k2.repeat_interleave(N // K, 1), v2.repeat_interleave(N // K, 1))


@spelled(site("attention", k=(B, T, K, H), terms=()))
def grouped_by_expand(q, k2, v2):
    k, v = (a[:, :, None].expand(B, K, N // K, T, H).reshape(B, N, T, H) for a in (k2, v2))
    return weighed(q, k, v)


@spelled(site("attention", terms=(Causal(0),), q=(B, T, N, 4)))
def from_one_projection(x, wq):
    q, k, v = (a.view(B, T, N, 4).transpose(1, 2) for a in F.linear(x, wq).split(D, dim=-1))
    return weighed(q, k, v, lambda s: s.masked_fill(~lower(s), float("-inf"))).transpose(1, 2).reshape(B, T, D)


@spelled(site("attention", terms=(Causal(0),)))
def dropout_that_is_off(q, k, v):
    s = (q @ k.mT).masked_fill(~torch.ones(T, T).tril().bool(), float("-inf"))
    return F.dropout(s.softmax(-1), 0.1, training=False) @ v


# -- norms ---------------------------------------------------------------------------------------------------------------------


@spelled(site("rms_norm", eps=1e-6))
def rms_as_in_llama(x, g):
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return g * h.to(x.dtype)


@spelled(site("rms_norm", eps=1e-5, weight_offset=1.0))
def rms_as_in_gemma(x, g):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * (1.0 + g)


@spelled(site("rms_norm", eps=1e-6))
def rms_by_division(x, g):
    return x / torch.sqrt(torch.mean(x**2, dim=-1, keepdim=True) + 1e-6) * g


@spelled(site("rms_norm", eps=1e-5))
def rms_as_one_call(x, g):
    return F.rms_norm(x, (D,), g, 1e-5)


@spelled(site("rms_norm", residual=(B, T, D)))
def rms_after_a_sum(x, h, g):
    h = x + h
    return h + h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * g


@spelled(site("layer_norm", eps=1e-5))
def layer_norm_by_hand(x, g, b):
    off = x - x.mean(-1, keepdim=True)
    return off / torch.sqrt(off.pow(2).mean(-1, keepdim=True) + 1e-5) * g + b


@spelled(site("layer_norm", eps=1e-5))
def layer_norm_by_var(x, g, b):
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5) * g + b


@spelled(site("rms_norm", eps=1e-6, x=(B, T, 2, D // 2)))
def rms_of_the_heads_of_a_projection(x, g):
    h = x.view(B, T, 2, -1)
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * g[: D // 2]).transpose(1, 2)


@spelled(site("rms_norm", eps=1e-6, x=(B, T, D)))
def rms_of_pairs(x):
    """As of rotated queries in Llama 4: what is normalised is a view of pairs."""
    h = torch.stack([x[..., 1::2], x[..., ::2]], -1).flatten(2)
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


@spelled(site("layer_norm", eps=1e-5, x=(B, T, 2, D // 2)))
def layer_norm_of_the_heads_of_a_projection(x, g):
    h = x.view(B, T, 2, -1)
    off = h - h.mean(-1, keepdim=True)
    return (off * torch.rsqrt(off.pow(2).mean(-1, keepdim=True) + 1e-5) * g[: D // 2]).transpose(1, 2)


# -- rope ------------------------------------------------------------------------------------------------------------------------


@spelled(site("rope", interleaved=False))
def rope_by_halves(qb, cos, sin):
    a, b = qb[..., : H // 2], qb[..., H // 2 :]
    return qb * cos.unsqueeze(2) + torch.cat((-b, a), dim=-1) * sin.unsqueeze(2)


@spelled(site("rope", interleaved=True))
def rope_by_complex_numbers(qb, cos):
    """As in Llama 4."""
    angle = cos[..., ::2]
    turn = torch.polar(torch.ones_like(angle), angle)
    pairs = torch.view_as_complex(qb.float().reshape(B, T, N, -1, 2))
    return torch.view_as_real(pairs * turn[:, :, None]).flatten(3).type_as(qb)


@spelled(site("rope", interleaved=True))
def rope_by_complex_numbers_without_a_gradient(qb, cos):
    cis = torch.polar(torch.ones(T, H // 2), cos[0, :, : H // 2]).detach()
    turned = torch.view_as_real(torch.view_as_complex(qb.reshape(B, T, N, -1, 2)) * cis[None, :, None]).flatten(3)
    return turned * cos.mean()


@spelled(site("rope", interleaved=True))
def rope_by_a_table_of_complex_numbers(qb, cis):
    """As in the code that came with Llama: the table is a buffer."""
    return torch.view_as_real(torch.view_as_complex(qb.reshape(B, T, N, -1, 2)) * cis[None, :, None]).flatten(3)


@spelled(site("rope", interleaved=False), site("rms_norm", x=(B, T, N, H)))
def rope_and_then_a_norm(qb, cos, sin):
    """As in HunYuan. The sum is read once, by the norm's cast, so that it is no residual."""
    a, b = qb[..., : H // 2], qb[..., H // 2 :]
    h = (qb * cos.unsqueeze(2) + torch.cat((-b, a), dim=-1) * sin.unsqueeze(2)).to(torch.float32)
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


# -- losses ------------------------------------------------------------------------------------------------------------------------


@spelled(site("linear_cross_entropy"))
def head_and_loss(x, head, labels):
    return F.cross_entropy(F.linear(x, head).view(-1, V), labels.view(-1))


@spelled(site("linear_cross_entropy"))
def shifted_with_ignored_labels(x, head, ignored):
    logits = (x @ head.T).float()
    return F.cross_entropy(logits[:, :-1].reshape(-1, V), ignored[:, 1:].reshape(-1), ignore_index=-100)


@spelled(site("linear_cross_entropy"))
def summed(x, head, ignored):
    return F.cross_entropy(F.linear(x, head).transpose(1, 2), ignored, reduction="sum")


@spelled(site("linear_cross_entropy", label_smoothing=0.1))
def smoothed(x, head, labels):
    return F.cross_entropy(F.linear(x, head).view(-1, V), labels.view(-1), label_smoothing=0.1, reduction="none")


@spelled(site("cross_entropy"))
def by_log_softmax(logits, labels):
    logp = F.log_softmax(logits, -1)
    return -logp.gather(-1, labels[..., None]).squeeze(-1).mean()


@spelled(site("cross_entropy"))
def by_nll(logits, ignored):
    return F.nll_loss(torch.log_softmax(logits.view(-1, V), 1), ignored.view(-1))


# -- what a site reads, in other words elsewhere -----------------------------------------------------------------------------------


@spelled(site("attention"))
def its_queries_are_turned_elsewhere(q, k, v):
    return weighed(q, k, v) * q.transpose(1, 2).mean()


@spelled(site("attention", terms=(Explicit(),)))
def its_mask_is_negated_elsewhere(q, k, v, pad):
    return weighed(q, k, v, lambda s: torch.where(pad[:, None, None], -1e9, s)) * (~pad).sum()


@spelled(site("linear_cross_entropy"))
def its_head_is_turned_elsewhere(x, head, labels):
    return F.cross_entropy(F.linear(x, head).view(-1, V), labels.view(-1)) * head.t().square().mean()


# -- calls that are kernels already: found, and left alone where the provider would be the same call -------------------------------

ONE_CALL: list[Spelling] = []


def one_call(op: str) -> Callable[[Callable], Callable]:
    def register(fn: Callable) -> Callable:
        ONE_CALL.append(Spelling(fn, ((op, {}),)))
        return fn

    return register


@one_call("attention")
def sdpa_causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@one_call("attention")
def sdpa_grouped(q, k2, v2):
    return F.scaled_dot_product_attention(q, k2, v2, enable_gqa=True, scale=0.25)


@one_call("attention")
def sdpa_masked(q, k, v, pad):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=pad[:, None, None, :])


@one_call("layer_norm")
def nn_layer_norm(x, g, b):
    return F.layer_norm(x, (D,), g, b)


@one_call("cross_entropy")
def loss_alone(logits, labels):
    return F.cross_entropy(logits.view(-1, V), labels.view(-1))
