"""What an ATen op is written as computes what the op does: every rule, by its formula alone, beside torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kpt.fusion.program import Program
from kpt_torch.apply import Eager
from kpt_torch.capture import capture
from kpt_torch.lower import lower
from kpt_torch.vocabulary import TABLE

_g = torch.Generator().manual_seed(0)
X, Y, W, P = (torch.randn(*s, generator=_g) for s in ((3, 4, 6), (3, 4, 6), (5, 6), (6,)))
Q, K = torch.randn(2, 4, 5, 8, generator=_g), torch.randn(2, 2, 5, 8, generator=_g)
INT = torch.randint(-3, 9, (3, 4), generator=_g)
BOOL = X > 0
HALF = X.bfloat16()
LABELS = torch.randint(0, 6, (3, 4), generator=_g).masked_fill(INT > 6, -100)

CASES = {
    "promotion": (lambda x, i, h: x * i[..., None] + h / 3 - 2, X, INT, HALF),
    "a number keeps bfloat16": (lambda h: h * 0.1 + 1, HALF),
    "integers divide to floats": (lambda i: i / 2, INT),
    "alpha": (lambda x, y: torch.sub(torch.add(x, y, alpha=2), y, alpha=0.5), X, Y),
    "rsub": (lambda x: 1 - x, X),
    "unary": (lambda x: torch.exp(x).log().tanh().sin().cos().abs().sqrt().reciprocal().sigmoid().neg().square().erf(), X),
    "powers": (lambda x: x.abs() ** 1.5 + x**2 + x**3 + (x.abs() + 1) ** -0.5 + 2.0**x, X),
    "compare": (lambda x, y: (x > y) & ~(x <= 0.5) | (y == 0) ^ (x != y), X, Y),
    "where": (lambda b, x, h: torch.where(b, x, h) + torch.where(b, 1.0, 0.0), BOOL, X, HALF),
    "masked_fill": (lambda x, b: x.masked_fill(b, -1e9), X, BOOL),
    "clamp": (lambda x: x.clamp(-0.5, 0.5) + x.clamp(min=0) + torch.relu(x), X),
    "maximum": (lambda x, y: torch.maximum(x, y) - torch.minimum(x, y) + torch.max(x, y) / torch.min(x, y), X, Y),
    "silu": (lambda x, h: F.silu(x) + F.silu(h), X, HALF),
    "gelu": (lambda x, h: F.gelu(x) + F.gelu(x, approximate="tanh") + F.gelu(h), X, HALF),
    "mish": (lambda x: F.mish(x), X),
    "views": (lambda x: x.view(12, -1).t().reshape(6, 3, 4).permute(2, 0, 1).unsqueeze(1).squeeze(1).flatten(1).unflatten(-1, (3, -1)), X),
    "expand": (lambda p, x: p.expand(3, 4, -1) + p.expand_as(x), P, X),
    "repeat": (lambda x: x.repeat(2, 1, 3).repeat_interleave(2, 1), X),
    "slices": (lambda x: x[..., 1:5:2] + x[:, -1:, :2] + x.narrow(2, 3, 2) + x.select(1, -2)[:, None, :2], X),
    "split": (lambda x: torch.cat([*x.split(4, -1)[::-1], *x.chunk(4, -1), x.unbind(0)[1].expand(3, 4, 6)], -1), X),
    "stack and roll": (lambda x, y: torch.stack([x, y], 1).roll(2, -1), X, Y),
    "pad": (lambda x: F.pad(x, (1, 2, -1, 0), value=7.0), X),
    "arange": (lambda x: x + torch.arange(6) + torch.arange(2, 14, 2)[None], X),
    "triangles": (lambda x: x.tril(1) + torch.ones(4, 6).triu(-1), X),
    "made": (lambda x: x + torch.full((6,), 2.0) + torch.zeros_like(x) + x.new_ones(6) + torch.full_like(x, 3), X),
    "sums": (lambda x, i: x.sum() + x.sum((0, 2), keepdim=True) + i.sum(-1)[:, None, None] + x.mean(-1, keepdim=True) + x.mean(), X, INT),
    "sum in another dtype": (lambda h: h.sum(-1, dtype=torch.float32), HALF),
    "maxima": (lambda x: x.amax(-1) + x.max(-1).values + x.amax((0, 1), keepdim=True).sum(), X),
    "any and all": (lambda b: b.any(-1) & b.all(1).any(), BOOL),
    "variance": (lambda x: x.var(-1) + x.var(-1, unbiased=False) + x.var(1, correction=0).sum(), X),
    "softmax": (lambda x, h: x.softmax(1) + x.log_softmax(-1) + h.softmax(-1, dtype=torch.float32) + h.softmax(-1), X, HALF),
    "logsumexp": (lambda x: torch.logsumexp(x, -1, keepdim=True) + torch.logsumexp(x, -1)[..., None], X),
    "layer_norm": (lambda x, p: F.layer_norm(x, (6,), p, p) + F.layer_norm(x, (6,)), X, P),
    "rms_norm": (lambda x, p: F.rms_norm(x, (6,), p, 1e-5) + F.rms_norm(x, (6,)), X, P),
    "linear": (lambda x, w: F.linear(x, w, w[:, 0]), X, W),
    "products": (lambda x, y: x @ y.mT + torch.bmm(x, y.transpose(1, 2)) + x.matmul(y[0].T) + torch.mm(x[0], y[0].T), X, Y),
    "addmm": (lambda x, w: torch.addmm(w[:, 0], x[0], w.t()) + torch.baddbmm(x[:, :, :5], x, w.t().expand(3, 6, 5), alpha=0.5), X, W),
    "einsum": (lambda q, k: torch.einsum("bnth,bnsh->bnts", q, q) + torch.einsum("bthn,bshn->bnts", q.permute(0, 2, 3, 1), q.permute(0, 2, 3, 1)), Q, K),
    "gather": (lambda x, i: x.gather(-1, i.clamp(min=0, max=5)[..., None] if i.is_floating_point() else (i * 0)[..., None]), X, INT),
    "cross_entropy": (lambda x, y: F.cross_entropy(x.transpose(1, 2), y) + F.cross_entropy(x.view(-1, 6), y.view(-1), label_smoothing=0.2), X, LABELS),
    "cross_entropy by row": (lambda x, y: F.cross_entropy(x.view(-1, 6), y.view(-1), reduction="none"), X, LABELS),
    "nll_loss": (lambda x, y: F.nll_loss(x.log_softmax(-1).transpose(1, 2), y, reduction="sum", ignore_index=2), X, LABELS.clamp(min=0)),
    "attention": (lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True) + F.scaled_dot_product_attention(q, q, q, scale=0.3), Q),
    "grouped attention": (lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True), Q, K),
    "masked attention": (lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(5, 5).tril(-1).bool()), Q),
    "added mask": (lambda q, x: F.scaled_dot_product_attention(q, q, q, attn_mask=x.flatten()[:25].view(5, 5)), Q, X),
    "dropout that is off": (lambda x: F.dropout(x, 0.5, training=False) + F.dropout(x, 0.0), X),
    "vmap": (lambda x, p: torch.vmap(lambda a: a * p + a.sum())(x), X, P),
    "complex": (lambda x, y: torch.view_as_real(torch.complex(x, y) * torch.polar(y, x)), X, Y),
    "parts": (lambda q: torch.view_as_complex(q.view(2, 4, 5, 4, 2)).real + torch.view_as_complex(q.view(2, 4, 5, 4, 2).contiguous()).imag, Q),
    "in place": (lambda x: x.clone().mul_(2).add_(1).masked_fill_(x > 0, 0.0), X),
}  # fmt: skip


class Formula(Eager):
    """Every value by its formula; an op that has none is an error."""

    def value(self, v):
        if v not in self.done and v in self.maker:
            assert not self.maker[v].op.startswith("opaque:"), self.maker[v].op
            made, self.captured.made = self.captured.made, {}
            try:
                return super().value(v)
            finally:
                self.captured.made = made
        return super().value(v)


@pytest.mark.parametrize("name", CASES)
def test_the_formula_is_the_op(name):
    fn, *args = CASES[name]
    seen = {}

    def backend(gm, inputs):
        module = lower(gm, [n.meta["example_value"] for n in gm.graph.nodes if n.op == "placeholder"])
        captured = capture(module, name)
        seen["targets"] = {n.target for n in module.graph.nodes if n.op == "call_function"}
        given = {v: t for v, t in zip(captured.graph.inputs, inputs, strict=True)}
        e = Formula(captured, Program(captured.graph), (), given, "cpu", module=module)
        seen["out"] = e.value(captured.graph.outputs[0])
        return gm

    torch._dynamo.reset()
    want = torch.compile(fn, backend=backend, dynamic=False)(*args)
    got = seen["out"]
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    tolerance = 2e-2 if torch.bfloat16 in {a.dtype for a in args} else 1e-5
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_rules_name_ops_that_there_are():
    assert len(TABLE) > 150
