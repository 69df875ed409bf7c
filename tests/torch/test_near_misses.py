"""Code that looks like an op and is another function, or does more: it stays as it was written, and gives its own numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import kpt_torch
from tests.torch.spellings import INPUTS, H, T, weighed


def given(*names):
    return [INPUTS[n].clone().requires_grad_(INPUTS[n].is_floating_point()) for n in names]


def causal(s):
    return s.masked_fill(~torch.ones(s.shape[-2:], dtype=torch.bool).tril(), float("-inf"))


def weights_returned(q, k, v):
    p = (q @ k.mT / 3).softmax(-1)
    return p @ v, p


def dropout_on(q, k, v):
    torch.manual_seed(3)
    return F.dropout((q @ k.mT / 3).softmax(-1), 0.5, training=True) @ v


def sdpa_dropout(q, k, v):
    torch.manual_seed(3)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)


def softmax_over_queries(q, k, v):
    return (q @ k.mT).softmax(-2) @ v


def weak_mask(q, k, v):
    return weighed(q, k, v, lambda s: s.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -10.0))


def a_scale_outside_of_a_cap(q, k, v, g):
    return (torch.tanh(q @ k.mT) * g[: q.shape[1], None, None]).softmax(-1) @ v


def a_scale_of_sums(q, k, v, g):
    return ((q @ k.mT + g[:T]) * g[: q.shape[1], None, None]).softmax(-1) @ v


def a_scale_of_heads(q, k, v, g):
    return (q @ k.mT * g[: q.shape[1], None, None]).softmax(-1) @ v


def a_scale_made_of_scores(q, k, v):
    s = q @ k.mT
    return (s / s.amax(-1, keepdim=True)).softmax(-1) @ v


def detached_scores(q, k, v):
    return (q @ k.mT).detach().softmax(-1) @ v


def written_into(q, k, v):
    s = q @ k.mT
    s[..., 0] = 0.0
    return s.softmax(-1) @ v


def a_view_written_into(q, k, v):
    p = (q @ k.mT).softmax(-1).clone()
    p[:, 0].mul_(2.0)
    return p @ v


def eps_outside(x, g):
    return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6) * g


def unbiased(x, g, b):
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5) * g + b


def statistic_without_gradient(x, g):
    with torch.no_grad():
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x * r * g


def class_weights(logits, labels):
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1), weight=torch.linspace(1, 2, logits.shape[-1]))


def logits_returned(x, head, labels):
    z = x @ head.T
    return F.cross_entropy(z.view(-1, z.shape[-1]), labels.view(-1)), z


def straight_through(q, k, v):
    class Hard(torch.autograd.Function):
        @staticmethod
        def forward(ctx, s):
            return s.softmax(-1)

        @staticmethod
        def backward(ctx, g):
            return g

    return Hard.apply(q @ k.mT / math.sqrt(H)) @ v


CASES = [
    (weights_returned, "q k v"), (dropout_on, "q k v"), (sdpa_dropout, "q k v"), (softmax_over_queries, "q k v"), (weak_mask, "q k v"),
    (a_scale_outside_of_a_cap, "q k v g"), (a_scale_of_sums, "q k v g"), (a_scale_made_of_scores, "q k v"),
    (detached_scores, "q k v"), (written_into, "q k v"), (a_view_written_into, "q k v"), (eps_outside, "x g"), (unbiased, "x g b"),
    (statistic_without_gradient, "x g"), (class_weights, "logits labels"), (logits_returned, "x head labels"), (straight_through, "q k v"),
]  # fmt: skip


@pytest.mark.parametrize(("fn", "names"), CASES, ids=lambda c: getattr(c, "__name__", ""))
def test_stays_as_written(fn, names):
    args = given(*names.split())
    fast = kpt_torch.optimize(fn)
    plan = fast.plan(*args)
    assert plan.sites == (), plan.explain()

    def numbers(f):
        outs = f(*args)
        outs = outs if isinstance(outs, tuple) else (outs,)
        moving = [a for a in args if a.requires_grad]
        return [*outs, *torch.autograd.grad([o.sum() for o in outs], moving, allow_unused=True, materialize_grads=True)]

    for got, want in zip(numbers(fast), numbers(fn), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def two_masks_added(q, k, v, seen):
    """As in CLIP's text model: a key that both hide has no weight beside one that one of them hides, if a query sees none."""
    hidden, low = 1.0 - seen.expand(-1, 1, T, T).to(q.dtype), torch.finfo(q.dtype).min
    triangle = torch.full((T, T), low).triu(1)
    return weighed(q, k, v, lambda s: s + (hidden.masked_fill(hidden.to(torch.bool), low) + triangle))


def a_mask_made_elsewhere(q, k, v, added):
    """As in GPT-Neo: what is added may hide all that the window shows."""
    near = torch.ones(T, T, dtype=torch.bool).tril().triu(-3)
    return weighed(q, k, v, lambda s: torch.where(near, s, torch.finfo(s.dtype).min) + added)


def a_mask_made_elsewhere_behind_a_prefix(q, k, v, added):
    return a_mask_made_elsewhere(q, k, v, torch.cat([torch.zeros_like(added[..., :2]), added[..., 2:]], -1))


def half_a_mask_made_elsewhere(q, k, v, added):
    return a_mask_made_elsewhere(q, k, v, 0.5 * added)


def a_mask_that_is_looked_up(q, k, v, seen):
    near, low = torch.ones(T, T, dtype=torch.bool).tril().triu(-3), torch.finfo(q.dtype).min
    return weighed(q, k, v, lambda s: torch.where(near, s, low) + F.embedding(seen.long(), torch.tensor([[low], [0.0]]))[..., 0])


def two_masks_made_apart(q, k, v, added):
    triangle = torch.full((T, T), torch.finfo(q.dtype).min).triu(1)
    return weighed(q, k, v, lambda s: s + triangle + added)


def a_mask_added_to_masked_scores(q, k, v, seen):
    """As in GPT-2."""
    triangle, low = torch.ones(T, T, dtype=torch.bool).tril(), torch.finfo(q.dtype).min
    return weighed(q, k, v, lambda s: torch.where(triangle, s, low) + torch.where(seen & triangle, 0.0, low))


@pytest.mark.parametrize(("fn", "why"), [(two_masks_added, None), (a_mask_added_to_masked_scores, "one mask replaces scores"),
                                         (a_mask_made_elsewhere, "may be a mask"),
                                         (a_mask_made_elsewhere_behind_a_prefix, "may be a mask"), (a_mask_that_is_looked_up, "may be a mask"),
                                         (half_a_mask_made_elsewhere, "may be a mask"), (two_masks_made_apart, None)])  # fmt: skip
def test_masks_that_meet_in_a_sum(fn, why):
    """Proved where they hide nothing, read where they leave a query no key. Masks that are all added are one array."""
    q, k, v = (a.requires_grad_() for a in given("q", "k", "v"))
    seen = INPUTS["pad"].flip(-1)[:, None, None] if fn is not a_mask_made_elsewhere else INPUTS["pad"][:, None, None]
    fast = kpt_torch.optimize(fn)
    everything, some = seen | True, seen
    if "elsewhere" in fn.__name__ or "apart" in fn.__name__:
        everything, some = (torch.zeros(m.shape).masked_fill(~m, torch.finfo(torch.float32).min) for m in (everything, some))
    plan = fast.plan(q, k, v, everything)
    assert why in plan.skipped[0].reason if why else [s.kernel for s in plan.sites] == ["attention.sdpa"]
    outs = fast(q, k, v, some), fn(q, k, v, some)
    cotangent = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(0))
    for got, want in zip(*((out, *torch.autograd.grad(out, [q, k, v], cotangent)) for out in outs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_what_is_left_alone_says_why():
    plan = kpt_torch.plan(weights_returned, *given("q", "k", "v"))
    assert "also returned" in plan.skipped[0].reason
    assert "test_near_misses.py" in plan.skipped[0].source
    halves = [a.bfloat16() for a in given("q", "k", "v", "g")]
    assert "multiplied by an array in bfloat16" in kpt_torch.plan(a_scale_of_heads, *halves).skipped[0].reason
    assert "stands dropout; if" in kpt_torch.plan(dropout_on, *given("q", "k", "v")).skipped[0].reason


def _attended(q, k, v):
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


def read_before_and_after_a_write(q, k, v, cache):
    before = _attended(q, cache, v)
    cache[:, :, 2:6] = k[:, :, 2:6]
    return before + _attended(q, cache, v)


def read_before_a_write(q, k, v, cache):
    before = _attended(q, cache, v)
    cache[:, :, 2:6] = k[:, :, 2:6]
    return before


def read_through_a_view_made_before_the_write(q, k, v, cache):
    seen = cache[:, :, :6]
    cache[:, :, 2:6] = k[:, :, 2:6]
    return _attended(q, seen, v[:, :, :6])


@pytest.mark.parametrize(("fn", "count"), [(read_before_and_after_a_write, 1), (read_before_a_write, 0), (read_through_a_view_made_before_the_write, 1)])
@pytest.mark.parametrize("own", [False, True], ids=["given", "made here"])
def test_memory_that_is_written_is_read_as_the_code_reads_it(fn, count, own):
    """As a cache of keys is: what reads it after the last write is a site, and nothing before is."""
    program = (lambda q, k, v, cache: fn(q, k, v, cache * 1)) if own else fn
    q, k, v, cache = torch.randn(4, 2, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    fast = kpt_torch.optimize(program)
    mine, its = cache.clone(), cache.clone()
    torch.testing.assert_close(fast(q, k, v, mine), program(q, k, v, its), rtol=1e-5, atol=1e-6)
    assert torch.equal(mine, its)
    assert [s.op for p in fast._backend.plans for s in p.sites] == ["attention"] * count


def turned(u):
    angles = torch.arange(T)[:, None, None] * 1e-5 * torch.ones(H // 2)
    (a, b), cos, sin = u.chunk(2, -1), angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def normed(u):
    return u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("f", [turned, normed])
@pytest.mark.parametrize(("body", "why"), [
    (lambda f, x: f(x.float()), ""),
    (lambda f, x: (lambda u: f(u) - u)(x.float()), "widened to float32"),
    (lambda f, x: (lambda u: f(u) - u)(x.float().view(2, T, 2, H)), "widened to float32"),
    (lambda f, x: f(x.to(torch.float8_e4m3fn).float()), "which no kernel does"),
], ids=["alone", "read elsewhere", "a view read elsewhere", "rounded to 8 bits"])  # fmt: skip
def test_casts_that_kernels_cannot_honour(f, body, why):
    class Program(torch.nn.Module):
        def forward(self, x):
            return body(f, x)

    x = torch.randn(2, T, 2, H, generator=torch.Generator().manual_seed(0)).bfloat16()
    plan = kpt_torch.plan(Program(), x)
    assert bool(plan.sites) == (not why) and (not why or any(why in s.reason for s in plan.skipped)), plan.explain()
