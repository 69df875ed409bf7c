"""Under autocast, with masks that a model writes out: attention is causal, in the dtype that autocast hands over, and what is around it stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import kpt_torch
from kpt.ops.mask import Causal, Segments
from kpt_torch.backend import Backend

B, T, N, H = 2, 32, 2, 16


def half_turned(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def documents(how, positions):
    """Which document a position belongs to, as transformers counts it."""
    if how == "given":
        return (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    own = torch.arange(T)[None].expand(B, T)
    starts = (torch.diff(own, prepend=own[:, :1] - 1, dim=-1) != 1).long()
    if how == "written into":
        starts = torch.zeros(B, T, dtype=torch.long)
        starts[:, T // 2] = 1
    return starts.cumsum(-1)


class Layer(torch.nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(N * H, N * H, bias=False) for _ in range(3))

    def forward(self, x, cos, sin, positions):
        q, k, v = (p(x).view(B, T, N, H).transpose(1, 2) for p in self.qkv)
        q, k = (y * cos + half_turned(y) * sin for y in (q, k))  # float32, for the tables are
        of = documents(self.how, positions)
        i = torch.arange(T)
        see = (i[None, :] <= i[:, None])[None, None] & (of[:, None, :, None] == of[:, None, None, :])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=see).transpose(1, 2).reshape(B, T, -1)


def inputs():
    generator = torch.Generator().manual_seed(0)
    angle = torch.rand(1, 1, T, H // 2, generator=generator).repeat(1, 1, 1, 2)
    packed = torch.arange(T).remainder(T // 4)[None].repeat(B, 1)
    return torch.randn(B, T, N * H, generator=generator), angle.cos(), angle.sin(), packed


def planned(how, **options):
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        return kpt_torch.plan(Layer(how), *inputs(), **options)


def test_a_mask_written_out_is_causal_and_read_as_autocast_rounds():
    plan = planned("alone")
    by_op = {op: [s for s in plan.sites if s.op == op] for op in ("attention", "rope")}
    (attention,) = by_op["attention"]
    assert attention.params["mask"].terms == (Causal(),)
    assert {attention.specs[n].dtype for n in "qkv"} == {"bfloat16"} and attention.params["out_dtype"] == "bfloat16"
    assert [s.params["out_dtype"] for s in by_op["rope"]] == ["bfloat16"] * 2


@pytest.mark.parametrize("how", ["given", "written into"])
def test_documents_that_are_there_are_kept(how, monkeypatch):
    """Also with no proof that would catch it."""
    monkeypatch.setenv("KPT_CERTIFY", "off")
    for site in [s for s in planned(how).sites if s.op == "attention"]:
        assert any(isinstance(t, Segments) for t in site.params["mask"].terms) or len(site.params["mask"].terms) > 1


@pytest.mark.parametrize("how", ["alone", "given", "written into"])
@pytest.mark.parametrize("certify", ["full", "off"])
def test_numbers_are_those_of_the_original(how, certify, monkeypatch):
    monkeypatch.setenv("KPT_CERTIFY", certify)
    torch._dynamo.reset()
    torch.manual_seed(0)
    module, given = Layer(how), inputs()
    fast = kpt_torch.optimize(module)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(*given), module(*given), rtol=2e-2, atol=2e-2)


def test_calls_that_autocast_casts_for_stay_calls():
    graphs = []
    torch._dynamo.reset()
    backend = Backend("balanced", certify="off", inner=lambda gm, _: graphs.append(gm) or gm)

    def model(x, scale, w):
        norm = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * scale
        return F.linear(norm, w) + F.linear(norm, w.t())

    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(model, backend=backend)(torch.randn(4, 64), torch.ones(64), torch.randn(64, 64))
    assert [s.op for s in backend.plans[0].sites] == ["rms_norm"] and backend.plans[0].sites[0].params["out_dtype"] == "bfloat16"
    assert sum(n.target is torch.ops.aten.linear.default for n in graphs[0].graph.nodes) == 2


X, W = (torch.randn(*shape, generator=torch.Generator().manual_seed(1)) for shape in ((512, 64), (64, 64)))


def rounded_on_the_way(x):
    """The product is bfloat16 in a region, and what follows is not."""
    return F.linear(x, W).float() * 1.001


def recomputed(x):
    def body(x):
        return rounded_on_the_way(x) + F.rms_norm(x, (64,), None, 1e-6)

    with torch.autocast("cpu", torch.bfloat16):
        return checkpoint(body, x, use_reentrant=False)


def left_for_a_while(x):
    with torch.autocast("cpu", torch.bfloat16):
        inside = recomputed(x)
        with torch.autocast("cpu", enabled=False):
            return inside + checkpoint(rounded_on_the_way, x, use_reentrant=False)


def batched(x):
    with torch.autocast("cpu", torch.bfloat16):
        rows = torch.vmap(lambda row: rounded_on_the_way(row[None])[0])(x)
    return rows + F.rms_norm(x, (64,), None, 1e-6)


def in_place(x):
    """Autocast casts for no op that writes into its argument, and does for its twin."""
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.zeros(512, 64)
        y.addmm_(x, W)
        y.pow_(2)
        return y + F.rms_norm(x, (64,), None, 1e-6)


@pytest.mark.parametrize("program", [recomputed, left_for_a_while, batched, in_place])
def test_regions_hold_for_what_is_traced_again(program):
    torch._dynamo.reset()
    fast, given, own = kpt_torch.optimize(program), X.clone().requires_grad_(), X.clone().requires_grad_()
    assert [s.op for s in fast.plan(X).sites] == ["rms_norm"]
    want, got = program(own), fast(given)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for out in (want, got):
        out.sum().backward()
    torch.testing.assert_close(given.grad, own.grad, rtol=1e-4, atol=1e-4)
