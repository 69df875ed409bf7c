"""A mask in a buffer is known while it is what it was; written to or exchanged, the module still computes what it says."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import kpt_torch
from kpt_torch.backend import kpt as compile_backend


class Attention(nn.Module):
    """As GPT-2 and its children are written: a triangle for all positions there can be, cut to those there are."""

    def __init__(self, fill=float("-inf"), recompute=False, dtype=torch.bool):
        super().__init__()
        self.fill, self.recompute = fill, recompute
        self.register_buffer("triangle", torch.ones(1, 1, 64, 64).tril().to(dtype))
        self.register_buffer("scale", torch.tensor(8.0).sqrt())
        self.qkv = nn.Linear(16, 48)

    def attend(self, x):
        t = x.shape[1]
        q, k, v = (a.unflatten(-1, (2, 8)).transpose(1, 2) for a in self.qkv(x).chunk(3, -1))
        s = (q @ k.mT / self.scale).masked_fill(self.triangle[:, :, :t, :t] == 0, self.fill)
        return (s.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def forward(self, x):
        return checkpoint(self.attend, x, use_reentrant=False) if self.recompute else self.attend(x)


def make(**options):
    torch.manual_seed(0)
    return Attention(**options)


def x(t=16):
    return torch.randn(2, t, 16, generator=torch.Generator().manual_seed(t))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"fill": torch.finfo(torch.float32).min}, {"recompute": True}, {"dtype": torch.float32}], ids=str)
def test_a_triangle_in_a_buffer_is_a_causal_mask(options):
    module = make(**options)
    fast = kpt_torch.optimize(module)
    (site,) = fast.plan(x()).sites
    assert site.op == "attention" and site.params["mask"].kinds == {"causal"}
    assert site.params["scale"] == pytest.approx(8**-0.5)
    for t in (16, 21, 30):  # the second size is the first that may change
        close(fast(x(t)), module(x(t)))
    assert all(len(p.sites) == 1 for p in fast._kpt_backend.plans)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_compiled(inner):
    module = make()
    close(torch.compile(module, backend=compile_backend, options={"inner": inner})(x()), module(x()))


def written(module, mask):
    module.triangle.copy_(mask)


def exchanged(module, mask):
    module.triangle = mask


def loaded(module, mask):
    module.load_state_dict(module.state_dict() | {"triangle": mask})


@pytest.mark.parametrize("change", [written, exchanged, loaded])
def test_another_mask_counts_from_the_next_call_on(change):
    module = make()
    fast = kpt_torch.optimize(module)
    close(fast(x()), module(x()))
    i = torch.arange(64)
    window = ((i[:, None] >= i) & (i[:, None] - i < 3))[None, None]
    change(fast, window)
    close(fast(x()), module(x()))
    (site,) = fast._kpt_backend.plans[-1].sites
    assert site.params["mask"].kinds == {"explicit"}
    fast.triangle.fill_(True)
    close(fast(x()), module(x()))


def test_other_buffers_for_one_call():
    module = make()
    fast = kpt_torch.optimize(module)
    close(fast(x()), module(x()))
    state = {**dict(module.named_parameters()), "triangle": torch.ones(1, 1, 64, 64, dtype=torch.bool), "scale": torch.tensor(2.0)}
    close(torch.func.functional_call(fast, state, (x(),)), torch.func.functional_call(module, state, (x(),)))
    close(fast(x()), module(x()))


def test_a_write_of_the_same_values_changes_nothing():
    fast = kpt_torch.optimize(make())
    want = fast(x())
    fast.load_state_dict(fast.state_dict())
    assert torch.equal(fast(x()), want)
    (plan,) = fast._kpt_backend.plans
    assert plan.sites[0].params["mask"].kinds == {"causal"}


def test_a_tensor_whose_address_is_to_stay_is_no_constant():
    """A static cache, as transformers have it: an attribute of Dynamo's graph, which is written into, within a call and between two."""
    weight = torch.rand(16)

    def step(x, at, cache, scale):
        cache.index_copy_(0, at, x)
        h = cache + 1
        return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * scale * weight

    results = []
    for fn in (step, kpt_torch.optimize(step)):
        cache, scale = torch.zeros(8, 16), torch.ones(16)
        torch._dynamo.mark_static_address(cache)
        torch._dynamo.mark_static_address(scale)
        made = []
        for t in range(4):
            made.append(fn(torch.full((1, 16), 1.0 + t) * torch.arange(16), torch.tensor([t]), cache, scale))
            scale.mul_(2)
        results.append(made + [cache])
    torch.testing.assert_close(*results)
    (plan,) = fn._backend.plans
    assert [s.op for s in plan.sites] == ["rms_norm"] and not plan.notes, plan.explain()
