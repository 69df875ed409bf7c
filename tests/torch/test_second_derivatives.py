"""Gradients of gradients: those of the op's formula, through whatever kernel computed the first ones; or a refusal in words."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import kpt
import kpt_torch
from kpt import ops
from kpt.errors import KernelError
from kpt.ops import Bias, Causal, Explicit, Lengths, Mask, Segments, Window
from kpt.ops.activations import ACTIVATIONS
from kpt_torch import formulas
from kpt_torch.kernels import rows
from kpt_torch.library import kernel
from kpt_torch.triton_kernels import glu, rope
from tests.torch.spellings import INPUTS

_generator = torch.Generator().manual_seed(0)
N, D, V = 4, 6, 5
IDS = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
KEEP = torch.ones(2, 1, 4, 4, dtype=torch.bool).tril() & (torch.arange(4) != 2)
LABELS = torch.tensor([0, 3, V + 2, -100])


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=_generator, dtype=torch.float64).requires_grad_()


def heads(keys: int = 2) -> dict[str, torch.Tensor]:
    return {"q": normal(2, 4, 2, 3), "k": normal(2, 4, keys, 3), "v": normal(2, 4, keys, 3)}


PROJECTED = {"x": normal(2, 3, D), "w_gate": normal(D, 4), "w_up": normal(D, 4), "b_gate": normal(4), "b_up": normal(4)}
TABLES = {"cos": normal(1, 4, 4), "sin": normal(1, 4, 4)}
# (op, arrays, parameters)
CALLS = [
    ("rms_norm", {"x": normal(2, 3, D), "weight": normal(D)}, {"weight_offset": 1.0}),
    ("rms_norm", {"x": normal(N, D), "residual": normal(N, D)}, {}),
    ("layer_norm", {"x": normal(2, 3, D), "weight": normal(D), "bias": normal(D)}, {}),
    ("layer_norm", {"x": normal(N, D), "residual": normal(N, D)}, {}),
    ("rope", {"x": normal(2, 4, 3, D), **TABLES}, {}),
    ("rope", {"x": normal(2, 4, 3, D), **TABLES}, {"interleaved": True}),
    ("rope_pair", {"x": normal(2, 4, 3, D), "other": normal(2, 4, 2, D), **TABLES}, {}),
    ("cross_entropy", {"logits": normal(N, V), "labels": LABELS}, {"label_smoothing": 0.1, "invalid": "zero", "logits_soft_cap": 3.0}),
    ("linear_cross_entropy", {"x": normal(N, D), "w": normal(D, V), "labels": LABELS, "b": normal(V), "weights": normal(N)}, {"invalid": "drop"}),
    *(("linear_act", {"x": normal(2, 3, D), "w": normal(D, 4), "b": normal(4)}, {"activation": name}) for name in ACTIVATIONS),
    ("glu", PROJECTED, {"activation": "gelu_tanh"}),
    ("glu_linear", {**PROJECTED, "w_down": normal(4, 3)}, {"activation": "silu"}),
    ("matmul", {"a": normal(3, D), "b": normal(D, 4)}, {}),
    ("attention", heads(), {"mask": Mask((Causal(0),)), "scale": 0.4}),
    ("attention", heads(1), {"mask": Mask((Causal(0), Window(1, None, 0))), "logits_soft_cap": 2.0}),
    ("attention", heads() | {"keep": KEEP, "bias": normal(1, 2, 4, 4)}, {"mask": Mask((Explicit(), Bias()))}),
    ("attention", heads() | {"q_segment_ids": IDS, "kv_segment_ids": IDS, "kv_lengths": torch.tensor([4, 3])},
     {"mask": Mask((Segments(), Lengths()), -1e9)}),
]  # fmt: skip
_count = itertools.count()
ALONE = {"glu_linear": glu.LINEAR, "rope_pair": rope.BOTH}


def meaning(op):
    return ALONE.get(op) or ops.op(op)


def agree(fn, arrays, params):
    """First derivatives with differences of results, second ones with differences of first ones."""
    names = [n for n, t in arrays.items() if t.requires_grad]
    given = [arrays[n] for n in names]

    def call(*moved):
        return fn(**arrays | dict(zip(names, moved, strict=True)), **params)

    return gradcheck(call, given, fast_mode=True) and gradgradcheck(call, given, fast_mode=True)


def test_every_op_has_a_formula():
    differentiable = {name for name in ops.OPS if ops.op(name).differentiable}
    assert differentiable - {"ragged_matmul"} <= set(formulas.FORMULAS)  # for which there is no kernel on tensors
    assert set(ACTIVATIONS) == set(formulas.ACTIVATIONS)
    assert {op for op, _, _ in CALLS} == set(formulas.FORMULAS)


@pytest.mark.parametrize("op,arrays,params", CALLS, ids=[f"{op}{i}" for i, (op, _, _) in enumerate(CALLS)])
def test_through_a_kernel_of_any_kind(op, arrays, params):
    """One that computes both passes where autograd does not look, as Triton's do."""
    known = meaning(op)

    def plain(arrays, params):
        return {n: t.numpy() for n, t in arrays.items()} | {n: params[n] for n in known.params}

    def forward(arrays, params):
        return [torch.from_numpy(np.asarray(y)) for y in known.reference(**plain(arrays, params))], []

    def backward(arrays, params, results, kept, cotangents, wanted):
        found = known.reference_vjp(tuple(c.numpy() for c in cotangents), **plain(arrays, params))
        return {n: torch.from_numpy(np.ascontiguousarray(found[n])) for n in wanted}

    fn = kernel(known, f"reference{next(_count)}", forward, backward)
    assert agree(fn, arrays, params)


@pytest.mark.parametrize("op,arrays,params", [c for c in CALLS if hasattr(rows, c[0])], ids=lambda c: c if isinstance(c, str) else "")
def test_through_the_plain_kernels(op, arrays, params):
    assert agree(rows.__dict__.get(f"_{op}", getattr(rows, op)), arrays, params)


@pytest.mark.parametrize("arrays,params", [
    (heads(), {}), (heads(1), {"mask": Mask((Causal(0),)), "scale": 0.7}), (heads() | {"keep": KEEP}, {"mask": Mask((Explicit(),))}),
    (heads() | {"keep": KEEP}, {"mask": Mask((Explicit(),), -1e30, additive=True)}),
    (heads() | {"bias": normal(1, 2, 4, 4)}, {"mask": Mask((Bias(),))}), (heads() | {"bias": normal(1, 2, 4, 4).detach()}, {"mask": Mask((Bias(),))}),
])  # fmt: skip
@pytest.mark.parametrize("recomputed", [False, True])
def test_through_attention_of_torch(arrays, params, recomputed):
    fn = kpt.registry.load("attention.sdpa")
    assert agree(functools.partial(checkpoint, fn, use_reentrant=False) if recomputed else fn, arrays, params)


def penalty(loss, *given):
    """A gradient penalty: the square of gradients, differentiated."""
    slopes = torch.autograd.grad(loss(*given), given, create_graph=True)
    return torch.autograd.grad(sum(s.square().sum() for s in slopes), given)


def test_a_row_that_sees_nothing_is_refused_in_words():
    """Where a finite number was added to all of its scores: they are rounded away, and yet have gradients."""
    arrays = heads() | {"keep": KEEP & (torch.arange(4) > 0)[:, None]}
    attention = kpt.registry.load("attention.sdpa")
    q, k, v = (arrays[n] for n in "qkv")
    with pytest.raises(KernelError, match="gradient of a gradient"):
        penalty(lambda q, k, v: attention(q=q, k=k, v=v, keep=arrays["keep"], mask=Mask((Explicit(),), -1e30, additive=True)).square().sum(), q, k, v)


def test_an_op_without_a_formula_is_refused_in_words():
    unknown = dataclasses.replace(ops.op("rms_norm"), name="of_the_users")
    fn = kernel(unknown, "test", lambda arrays, params: ([arrays["x"] * 3], []), lambda a, p, r, k, cts, wanted: {"x": cts[0] * 3})
    with pytest.raises(KernelError, match="gradient of a gradient"):
        penalty(lambda x: fn(x=x).square().sum(), torch.randn(3, 4, requires_grad=True))


class Small(torch.nn.Module):
    """Attention, a norm and a loss, as written by hand."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = torch.nn.Linear(16, 48), torch.nn.Linear(16, 24)

    def forward(self, x):
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        q, k, v = self.qkv(y).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        s = (q @ k.mT / 2).masked_fill(~torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(), float("-inf"))
        x = x + (s.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return F.cross_entropy(self.head(x).flatten(0, 1), INPUTS["labels"][: len(x), : x.shape[1]].flatten())


WAYS = {
    "penalty": lambda loss, x: penalty(loss, x.requires_grad_())[0], "torch.func.hessian": lambda loss, x: torch.func.hessian(loss)(x),
    "torch.func.jacrev twice": lambda loss, x: torch.func.jacrev(torch.func.jacrev(loss))(x),
    "hessian": lambda loss, x: torch.autograd.functional.hessian(loss, x),
    "hvp": lambda loss, x: torch.autograd.functional.hvp(loss, x, torch.ones_like(x))[1],
    "hessian at once": lambda loss, x: torch.autograd.functional.hessian(loss, x, vectorize=True),
    "jacobian at once": lambda loss, x: torch.autograd.functional.jacobian(lambda x: loss(x).expand(3) * torch.ones(3), x, vectorize=True),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_of_an_optimized_module(way):
    torch.manual_seed(0)
    module, x = Small(), INPUTS["x"][:1, :4].clone()
    fast = kpt_torch.optimize(module)
    assert sorted(s.op for s in fast.plan(x).sites) == ["attention", "linear_cross_entropy", "rms_norm"]
    torch.testing.assert_close(WAYS[way](fast, x.clone()), WAYS[way](module, x.clone()), rtol=1e-4, atol=1e-6)


def test_a_penalty_reaches_the_weights():
    torch.manual_seed(0)
    module, found = Small(), []
    for fn in (module, kpt_torch.optimize(module)):
        module.zero_grad()
        x = INPUTS["x"].clone().requires_grad_()
        (slope,) = torch.autograd.grad(fn(x), x, create_graph=True)
        (slope.norm() - 1).square().backward()
        found.append({n: p.grad.clone() for n, p in module.named_parameters()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
