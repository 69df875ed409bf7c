"""A gated MLP's glu and the linear layer that reads it as one call: where it is made, what it keeps, and that the program is what it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import kpt_torch
from kpt.kernels import KernelSpec, registry
from kpt_torch import pairs
from kpt_torch.triton_kernels import glu

WIDTH, HIDDEN = 24, 40


@pytest.fixture(autouse=True)
def by_formula(monkeypatch):
    """The Triton kernel's two launches as formulas, so that all around them runs on a CPU, where it is said to be the best of glu."""

    def product(gate, up, y, activation):
        assert activation == "silu"
        y.view(-1).copy_((F.silu(gate.float()) * up.float()).view(-1))

    def gradients(gate, up, dy, dgate, dup, activation, y=None):
        g, u, d = (t.to(torch.float32, copy=True).view(-1) for t in (gate, up, dy))  # which may be written over
        s = torch.sigmoid(g)
        dgate.view(-1).copy_(d * u * s * (1 + g * (1 - s)))
        dup.view(-1).copy_(d * (g * s))
        if y is not None:
            y.view(-1).copy_(F.silu(g) * u)

    monkeypatch.setattr(glu, "put_product", product)
    monkeypatch.setattr(glu, "put_gradients", gradients)
    monkeypatch.setattr(registry, "_kernels", dict(registry._kernels))
    registry.register(KernelSpec("glu.formula", "glu", 1, "test", "torch", ("cpu",), "kpt_torch.triton_kernels.glu:glu",
                                 ("float32", "bfloat16"), efficiency=1.0))  # fmt: skip
    pairs._differs_with_linear.cache_clear()
    torch._dynamo.reset()
    yield
    pairs._differs_with_linear.cache_clear()


class MLP(torch.nn.Module):
    def __init__(self, how="alone", layers=1):
        super().__init__()
        self.how = how
        self.gate, self.up = (torch.nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(HIDDEN, WIDTH, bias=how == "a bias")
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        h = F.silu(self.gate(x)) * self.up(x)
        if self.how == "a write between":
            self.count.add_(1)
        if self.how == "another width":
            h = h.double()
            return F.linear(h, self.down.weight.double()).float() + x
        y = F.linear(h[0], h[0]).sum() if self.how == "read as the weight" else self.down(h)
        if self.how == "read twice":
            y = y + h.mean()
        return y + x


def given(requires_grad=True):
    return torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_(requires_grad)


def stepped(module, x):
    out = module(x)
    out.float().square().mean().backward()
    return out.detach(), {n.removeprefix("_orig_mod."): p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}, x.grad


def joined(plan):
    return [n for n in plan.notes if "in one call with the linear layer" in n]


@pytest.mark.parametrize("how,one_call", [("alone", True), ("a bias", False), ("a write between", False), ("read twice", False),
                                          ("read as the weight", False), ("another width", False)])  # fmt: skip
def test_one_call_where_it_can_be(how, one_call, monkeypatch):
    torch.manual_seed(0)
    module = MLP(how)
    want = stepped(module, given())
    module.zero_grad()
    calls = []
    monkeypatch.setattr(glu.glu, "then_linear", lambda **a: (calls.append(1), glu.glu_linear(**a))[1])
    plan = kpt_torch.plan(module, given())
    assert [s.kernel for s in plan.sites] == ["glu.formula"] and bool(joined(plan)) is one_call, plan
    calls.clear()
    got = stepped(kpt_torch.optimize(module), given())
    assert bool(calls) is one_call
    torch.testing.assert_close(got, want)


class Tied(MLP):
    """Whose last weight is another one's transpose."""

    def forward(self, x):
        shared = {"gate": self.gate, "up": self.up}[self.how].weight
        return F.linear(F.silu(self.gate(x)) * self.up(x), shared.T)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("shared", ["gate", "up"])
def test_a_weight_that_is_turned_elsewhere_is_one_weight(shared, autocast):
    torch.manual_seed(0)
    module = Tied(shared)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want = stepped(module, given())
        module.zero_grad()
        plan = kpt_torch.plan(module, given())
        assert [s.kernel for s in plan.sites] == ["glu.formula"] and joined(plan), plan.explain()
        got = stepped(kpt_torch.optimize(module), given())
    bound = dict(rtol=2e-2, atol=2e-2) if autocast else {}
    torch.testing.assert_close(got, want, **bound)


def saved(module, x):
    module(x)  # which is planned for, and proved, once
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (shapes.append(tuple(t.shape)), t)[1], lambda t: t):
        module(x)
    return shapes


def test_the_result_of_glu_is_not_kept(monkeypatch):
    """The two factors are, and where the linear layer runs apart, what it multiplies."""

    def of_its_size(module):
        return sum(torch.Size(s).numel() == 2 * 8 * HIDDEN for s in saved(module, given()))

    assert of_its_size(kpt_torch.optimize(MLP())) == 2
    monkeypatch.delattr(glu.glu, "then_linear")
    torch._dynamo.reset()
    assert of_its_size(kpt_torch.optimize(MLP())) == 3


def test_autocast_hands_both_what_it_would(monkeypatch):
    torch.manual_seed(0)
    module = MLP()

    def run(fn):
        with torch.autocast("cpu", torch.bfloat16):
            return stepped(fn, given())

    want = run(module)
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        plan = kpt_torch.plan(module, given())
    assert joined(plan), plan
    got = run(kpt_torch.optimize(module))
    assert got[0].dtype == want[0].dtype and all(g.dtype == torch.float32 for g in got[1].values())
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_frozen_weights_no_gradients_and_checkpoints():
    module = MLP()
    module.down.weight.requires_grad_(False)
    fast = kpt_torch.optimize(module)
    want = stepped(module, given())
    module.zero_grad()
    got = stepped(fast, given())
    torch.testing.assert_close(got, want)
    assert module.down.weight.grad is None and "down.weight" not in got[1]
    with torch.no_grad():
        torch.testing.assert_close(fast(given()), module(given()))
    x = given()
    out = torch.utils.checkpoint.checkpoint(fast, x, use_reentrant=False)
    out.square().mean().backward()
    torch.testing.assert_close(x.grad, want[2])


class Last(MLP):
    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("how", ["optimize", "backend"])
def test_what_it_makes_may_be_written_into(how):
    module = Last()
    want = stepped(torch.nn.Sequential(module, torch.nn.ReLU(inplace=True)), given())
    module.zero_grad()
    fast = kpt_torch.optimize(module) if how == "optimize" else torch.compile(module, backend="kpt")
    got = stepped(torch.nn.Sequential(fast, torch.nn.ReLU(inplace=True)), given())
    torch.testing.assert_close((got[0], list(got[1].values()), got[2]), (want[0], list(want[1].values()), want[2]))
    y = fast(given())
    y += 1
    assert fast(given()).detach_().grad_fn is None


def test_where_the_last_weight_alone_is_learned_one_array_is_kept():
    module = Last()
    for layer in (module.gate, module.up):
        layer.weight.requires_grad_(False)
    fast, x = kpt_torch.optimize(module), given(False)
    assert joined(kpt_torch.plan(module, x))
    assert [s for s in saved(fast, x) if torch.Size(s).numel() == 2 * 8 * HIDDEN] == [(16, HIDDEN)]
    (slope,) = torch.autograd.grad(fast(x).square().sum(), [module.down.weight], create_graph=True)
    (again,) = torch.autograd.grad(module(x).square().sum(), [module.down.weight], create_graph=True)
    for s in (slope, again):
        s.square().sum().backward()
    torch.testing.assert_close(slope, again)


def test_a_weight_whose_size_may_change_runs_apart():
    def program(x, gate, up, down):
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    x, gate, up, down = given(), torch.randn(HIDDEN, WIDTH), torch.randn(HIDDEN, WIDTH), torch.randn(6, HIDDEN)
    torch._dynamo.mark_dynamic(down, 0)
    torch.testing.assert_close(torch.compile(program, backend="kpt")(x, gate, up, down), program(x, gate, up, down))


def test_it_compiles_and_exports_whole():
    module = MLP()
    want = stepped(module, given())
    module.zero_grad()
    torch.testing.assert_close(stepped(torch.compile(module, backend="kpt", fullgraph=True), given()), want)
    torch.testing.assert_close(torch.export.export(MLP(), (given(False),), strict=False).module()(given(False)).shape, want[0].shape)


def test_other_numbers_run_apart(monkeypatch):
    right = glu.glu_linear
    monkeypatch.setattr(glu.glu, "then_linear", lambda **a: right(**a) * (1 + 1e-6))
    assert not joined(kpt_torch.plan(MLP(), given()))


def test_what_raises_runs_apart(monkeypatch, caplog):
    def broken(**arrays):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(glu.glu, "then_linear", broken)
    plan = kpt_torch.plan(MLP(), given())
    assert not joined(plan) and "out of memory" in caplog.text
    assert "A site of glu runs apart from the linear layer that reads it: RuntimeError: out of memory" in plan.notes


@pytest.mark.parametrize("how", ["optimize", "backend"])
def test_every_layer_of_a_llama(how):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=48,
                                      vocab_size=64, max_position_embeddings=32, use_cache=False)  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    tokens, names = torch.randint(64, (2, 16)), list(model.state_dict())
    want = model(input_ids=tokens, labels=tokens).loss
    want.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    plan = kpt_torch.plan(model, input_ids=tokens, labels=tokens)
    assert joined(plan) == ["2 sites run in one call with the linear layer that reads them, and keep no result for it."], plan.notes
    fast = kpt_torch.optimize(model) if how == "optimize" else torch.compile(model, backend="kpt")
    loss = fast(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters()}, gradients, rtol=1e-4, atol=1e-6)
    assert list(model.state_dict()) == names
