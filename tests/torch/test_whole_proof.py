"""What the proof of a whole program compares is what each of its two runs made."""

from __future__ import annotations

import pytest
import torch

from kpt.kernels import KernelSpec, registry
from kpt_torch.auto import Session


class Workspace(torch.autograd.Function):
    """Whose gradient is the same memory at each call, as a library's that keeps its buffers."""

    slope = torch.zeros(4)

    @staticmethod
    def forward(ctx, x, b):
        return x + b

    @staticmethod
    def backward(ctx, g):
        torch.sum(g, 0, out=Workspace.slope)
        return g, Workspace.slope


class Shifted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.b = torch.nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return Workspace.apply(x, self.b).square().mean()


def test_memory_that_is_used_again_is_compared_as_it_was():
    module = Shifted()
    session = Session(module, (torch.randn(3, 4),), {}, "balanced", "auto")
    first = session._values(module)
    second = session._values(lambda x: 5 * module(x))
    torch.testing.assert_close(second["d0"], 5 * first["d0"])
    assert first["d0"].abs().max() > 0


class Backwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        return w.clone()

    @staticmethod
    def backward(ctx, g):
        return -g


def normalised(x, weight, eps=1e-6, **_):
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def negated(x, weight, **more):
    """Forwards as it is; of the wrong sign is the gradient of the weight."""
    return normalised(x, Backwards.apply(weight), **more)


class Attending(torch.nn.Module):
    """Its gradient of the key's bias is 0 but for rounding; that of the loss in `large` is a hundred times as large as others."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (torch.nn.Linear(32, 32) for _ in range(3))
        self.weight, self.large = torch.nn.Parameter(torch.linspace(0.5, 2, 32)), torch.nn.Parameter(torch.ones(4))

    def forward(self, x):
        q, k, v = (f(normalised(x, self.weight)) for f in (self.query, self.key, self.value))
        return (torch.softmax(q @ k.mT / 32**0.5, -1) @ v).square().mean() + self.large.sum()


@pytest.mark.parametrize(("kernel", "agrees"), [("normalised", True), ("negated", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_rounding_alone_is_not_held_to_itself_and_what_is_small_is(kernel, agrees, dtype, monkeypatch):
    monkeypatch.setenv("KPT_CERTIFY", "off")
    monkeypatch.setattr(registry, "_kernels", {k: s for k, s in registry._kernels.items() if s.op != "rms_norm"})
    name = str(dtype).removeprefix("torch.")
    registry.register(KernelSpec("rms_norm.of_this_test", "rms_norm", 1, "test", "torch", ("cpu",), f"{__name__}:{kernel}", (name,),
                                 efficiency=1.0))  # fmt: skip
    torch.manual_seed(0)
    module, x = Attending().to(dtype), torch.randn(4, 64, 32, dtype=dtype)
    before = [(p.detach().clone(), p._version) for p in module.parameters()]
    plan, worst = Session(module, (x,), {}, "balanced", "auto").validate()
    assert ("rms_norm.of_this_test" in [s.kernel for s in plan.sites]) is agrees, plan.notes
    assert (worst < 0.02) is agrees
    for p, (value, version) in zip(module.parameters(), before, strict=True):
        assert torch.equal(p, value) and p._version == version, "the weights that were moved are what they were"
