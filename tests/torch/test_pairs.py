"""Queries and keys turned in one launch: which sites are paired, and that the program is what it was."""

from __future__ import annotations

import pytest
import torch

import kpt
import kpt_torch
from kpt_torch import pairs

B, T, H, WIDTH = 2, 16, 8, 32


def half_turned(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


class Layer(torch.nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.register_buffer("count", torch.zeros(()))
        self.q, self.k = torch.nn.Linear(WIDTH, 4 * H), torch.nn.Linear(WIDTH, 2 * H)

    def forward(self, x, cos, sin):
        q = self.q(x).view(B, T, 4, H).transpose(1, 2)
        if self.how == "read later":
            q = q * cos + half_turned(q) * sin
            k = self.k(x + q.mean()).view(B, T, 2, H).transpose(1, 2)
            return q.sum(1) + (k * cos + half_turned(k) * sin).sum(1)
        k = self.k(x).view(B, T, 2, H).transpose(1, 2)
        turned = q * cos + half_turned(q) * sin
        if self.how == "a write between":
            self.count.add_(1)
        if self.how == "other tables":
            cos, sin = cos + 1, sin + 1
        if self.how == "no gradient of keys":
            with torch.no_grad():
                k = k * cos + half_turned(k) * sin
        else:
            k = k * cos + half_turned(k) * sin
        return turned.sum(1) * k.sum(1) + x.mean()


@pytest.fixture
def launches(monkeypatch):
    """A kernel that runs here as one that can turn two arrays in a launch; the head counts of each."""
    kernel, seen = kpt.registry.load("rope.torch"), []

    def pair(*, x, other, **rest):
        seen.append((x.shape[2], other.shape[2]))
        return kernel(x=x, **rest), kernel(x=other, **rest)

    monkeypatch.setattr(kernel, "pair", pair, raising=False)
    pairs._differs.cache_clear()
    yield seen
    pairs._differs.cache_clear()


def stepped(module, how):
    generator = torch.Generator().manual_seed(0)
    dtype = module.q.weight.dtype
    x, cos, sin = (torch.randn(*s, generator=generator, dtype=dtype) for s in ((B, T, WIDTH), (1, 1, T, H), (1, 1, T, H)))
    out = module(x.requires_grad_(), cos, sin)
    out.square().sum().backward()
    return out.detach(), [p.grad.clone() for p in module.parameters() if p.grad is not None], x.grad


@pytest.mark.parametrize("how,paired", [("side by side", True), ("read later", False), ("a write between", False), ("other tables", False),
                                        ("no gradient of keys", False)])  # fmt: skip
def test_two_rotations_are_one_launch_where_they_can_be(how, paired, launches):
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = Layer(how).double()  # the kernel rounds where the code does not
    want = stepped(module, how)
    fast = kpt_torch.optimize(module, hardware="cpu")
    module.zero_grad()
    got = stepped(fast, how)
    plan = kpt_torch.plan(module, *(torch.randn(s, dtype=torch.float64) for s in ((B, T, WIDTH), (1, 1, T, H), (1, 1, T, H))))
    assert [s.kernel for s in plan.sites].count("rope.torch") == (1 if how == "no gradient of keys" else 2), plan
    assert (launches.count((4, 2)) > 1) is paired  # one is the comparison with two launches
    assert any("one launch" in n for n in plan.notes) is paired
    torch.testing.assert_close(got, want)


def test_a_pair_of_other_numbers_is_not_made(launches, monkeypatch, caplog):
    kernel = kpt.registry.load("rope.torch")
    right = kernel.pair
    monkeypatch.setattr(kernel, "pair", lambda **given: tuple(y * (1 + 1e-6) for y in right(**given)))
    torch._dynamo.reset()
    plan = kpt_torch.plan(Layer("side by side"), torch.randn(B, T, WIDTH), torch.randn(1, 1, T, H), torch.randn(1, 1, T, H))
    assert len(plan.sites) == 2 and not any("one launch" in n for n in plan.notes) and "have other bits" in caplog.text
    assert "A site of rope runs apart from the one that shares its tables: its results or gradients have other bits" in plan.notes


def test_a_pair_that_raises_costs_a_launch_and_no_site(launches, monkeypatch):
    def broken(**given):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(kpt.registry.load("rope.torch"), "pair", broken)
    torch._dynamo.reset()
    plan = kpt_torch.plan(Layer("side by side"), torch.randn(B, T, WIDTH), torch.randn(1, 1, T, H), torch.randn(1, 1, T, H))
    assert len(plan.sites) == 2 and not any("one launch" in n for n in plan.notes)
