"""Graphs that run as they are: torch's own functions for the ops of aten, with the same bits, and what does nothing left out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import fx

import kpt_torch
from kpt_torch.direct import FUNCTIONS, METHODS, direct
from kpt_torch.lower import aten


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(math.prod(shape)))


A, B, W, POSITIVE = normal(4, 6), normal(4, 6), normal(5, 6), normal(4, 6).abs() + 0.1
HEADS = [normal(2, 3, 8, 16) for _ in range(3)]
# The arguments as they stand in graphs: the least that an op takes, and all.
CALLS = {
    aten.add.Tensor: [((A, B), {}), ((A, 2.5), {}), ((A, B), {"alpha": 2})],
    aten.sub.Tensor: [((A, B), {}), ((A, B), {"alpha": 2})],
    aten.mul.Tensor: [((A, B), {}), ((A, 3), {})],
    aten.div.Tensor: [((A, B), {}), ((A, 3), {})],
    **{op: [((A,), {})] for op in (aten.neg.default, aten.exp.default, aten.tanh.default, aten.sigmoid.default, aten.sin.default,
                                   aten.cos.default, aten.relu.default, aten.silu.default, aten.mean.default)},
    **{op: [((POSITIVE,), {})] for op in (aten.rsqrt.default, aten.sqrt.default)},
    aten.pow.Tensor_Scalar: [((A, 2), {}), ((POSITIVE, 0.5), {})],
    aten.mean.dim: [((A, [-1], True), {}), ((A, [0, 1]), {}), ((A, [-1]), {"dtype": torch.float64})],
    aten.where.self: [((A > 0, A, B), {})],
    aten.matmul.default: [((A, W.t()), {}), ((HEADS[0], HEADS[1].transpose(-1, -2)), {})],
    aten.mm.default: [((A, W.t()), {})],
    aten.bmm.default: [((HEADS[0][0], HEADS[1][0].transpose(-1, -2)), {})],
    aten.addmm.default: [((normal(5), A, W.t()), {}), ((normal(5), A, W.t()), {"beta": 2, "alpha": 0.5})],
    aten.cat.default: [(([A, B],), {}), (([A, B], -1), {})],
    aten.softmax.int: [((A, -1), {}), ((A, 0, torch.float64), {})],
    aten.layer_norm.default: [((A, [6]), {}), ((A, [6], normal(6), normal(6), 1e-3), {}), ((A, [6], None, None, 1e-5, False), {})],
    aten.embedding.default: [((W, torch.tensor([[0, 3], [2, 2]])), {}), ((W, torch.tensor([1, 0]), 1), {})],
    aten.linear.default: [((A, W), {}), ((A, W, normal(5)), {})],
    aten.gelu.default: [((A,), {}), ((A,), {"approximate": "tanh"})],
    aten.scaled_dot_product_attention.default: [
        (tuple(HEADS), {}), ((*HEADS, torch.ones(8, 8, dtype=torch.bool).tril()), {"scale": 0.3}), ((*HEADS, None, 0.0, True), {})],
    aten.view.default: [((A, [2, -1]), {})],
    aten.reshape.default: [((A.t(), [2, -1]), {})],
    aten.expand.default: [((A[:1], [3, -1]), {})],
    aten.permute.default: [((HEADS[0], [0, 2, 1, 3]), {})],
    aten.transpose.int: [((HEADS[0], 1, 2), {})],
    aten.unsqueeze.default: [((A, -1), {})],
    aten.squeeze.dim: [((A[:1], 0), {})],
    aten.select.int: [((A, 1, -2), {})],
    aten.contiguous.default: [((A.t(),), {}), ((normal(2, 3, 4, 5),), {"memory_format": torch.channels_last})],
    aten.to.dtype: [((A, torch.bfloat16), {}), ((A, torch.float32, False, True), {})],
    aten.t.default: [((A,), {})],
    aten.flatten.using_ints: [((HEADS[0],), {}), ((HEADS[0], 1, 2), {})],
    aten.masked_fill.Scalar: [((A, A > 0, -1.5), {})],
    aten.clone.default: [((A.t(),), {}), ((A.t(),), {"memory_format": torch.contiguous_format})],
    aten.chunk.default: [((A, 2), {}), ((A, 3, -1), {})],
}  # fmt: skip


def test_every_op_has_a_call():
    assert set(CALLS) == set(FUNCTIONS) | set(METHODS)


@pytest.mark.parametrize("op", CALLS, ids=str)
def test_the_function_is_the_op(op):
    for args, kwargs in CALLS[op]:
        fn = FUNCTIONS.get(op) or getattr(torch.Tensor, METHODS[op])
        for want, got in zip(*(r if isinstance(r, (tuple, list)) else [r] for r in (op(*args, **kwargs), fn(*args, **kwargs))), strict=True):
            assert want.dtype == got.dtype and want.stride() == got.stride() and torch.equal(want, got)
            assert (want.data_ptr() == args[0].data_ptr()) == (got.data_ptr() == args[0].data_ptr()) if torch.is_tensor(args[0]) else True


def test_a_cast_to_its_own_dtype_is_left_out_and_others_are_not():
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(3)
    same, other = graph.call_function(aten.to.dtype, (x, torch.float32)), graph.call_function(aten.to.dtype, (x, torch.bfloat16))
    copied = graph.call_function(aten.to.dtype, (x, torch.float32, False, True))
    graph.output((same, other, copied))
    module = fx.GraphModule({}, graph)
    direct(module)
    given = torch.ones(3)
    a, b, c = module(given)
    assert a is given and b.dtype == torch.bfloat16 and c is not given and torch.equal(c, given)


def test_a_rewritten_program_runs_no_op_that_has_a_function(monkeypatch):
    seen = []
    real = torch._ops.OpOverload.__call__

    def counted(self, *args, **kwargs):
        seen.append(self)
        return real(self, *args, **kwargs)

    def program(x, w):
        h = torch.nn.functional.rms_norm(x, (64,), w, 1e-6)
        return (torch.nn.functional.linear(h, w[None]).transpose(0, 1) * 2).float()

    fast, x, w = kpt_torch.optimize(program), normal(512, 64), normal(64)
    want = fast(x, w)
    assert [s.op for s in fast.plan(x, w).sites] == ["rms_norm"]
    monkeypatch.setattr(torch._ops.OpOverload, "__call__", counted)
    assert torch.equal(fast(x, w), want)
    assert not set(seen) & (set(FUNCTIONS) | set(METHODS))
