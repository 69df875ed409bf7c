"""Kernels in JAX called from PyTorch on torch_xla's CPU device: against the float64 references, and against eager PyTorch."""

from __future__ import annotations

import functools
import re
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

pytestmark = pytest.mark.xla
torch = pytest.importorskip("torch")
torch_xla = pytest.importorskip("torch_xla")

import jax  # noqa: E402
from jax.experimental import pallas as pl  # noqa: E402

import kpt  # noqa: E402
from kpt.errors import KernelError, MissingDependencyError  # noqa: E402
from kpt.install import install  # noqa: E402
from kpt.kernels.validate import validate  # noqa: E402
from kpt.ops import Causal, Lengths, Mask, Segments, Spec, op  # noqa: E402
from kpt_torch import xla  # noqa: E402
from kpt_torch.xla import kernel  # noqa: E402

CASES = {
    "attention": ({"q": (1, 40, 4, 16), "k": (1, 40, 2, 16), "v": (1, 40, 2, 16)}, {"mask": Mask((Causal(),))}),
    "attention, lengths": (
        {"q": (2, 9, 2, 8), "k": (2, 20, 2, 8), "v": (2, 20, 2, 8), "kv_lengths": ((2,), "int32")},
        {"mask": Mask((Lengths(),), -1e30), "logits_soft_cap": 20.0},
    ),
    "attention, segments": (
        {"q": (1, 24, 2, 8), "k": (1, 24, 2, 8), "v": (1, 24, 2, 8), "q_segment_ids": ((1, 24), "int32"), "kv_segment_ids": ((1, 24), "int32")},
        {"mask": Mask((Causal(), Segments()), -1e30)},
    ),
    "rms_norm": ({"x": (5, 96), "weight": (96,), "residual": (5, 96)}, {"eps": 1e-5}),
    "layer_norm": ({"x": (2, 7, 33), "weight": (33,), "bias": (33,)}, {}),
    "rope": ({"x": (1, 20, 2, 64), "cos": ((1, 20, 64), "float32"), "sin": ((1, 20, 64), "float32")}, {}),
    "cross_entropy": ({"logits": (9, 150), "labels": ((9,), "int32")}, {"label_smoothing": 0.1}),
    "linear_cross_entropy": ({"x": (9, 40), "w": (40, 150), "labels": ((9,), "int32")}, {}),
    "matmul": ({"a": (20, 40), "b": (40, 30)}, {}),
    "linear_act": ({"x": (20, 40), "w": (40, 30), "b": (30,)}, {"activation": "gelu"}),
    "glu": ({"x": (20, 40), "w_gate": (40, 30), "w_up": (40, 30)}, {"activation": "silu"}),
    "ragged_matmul": ({"x": (40, 16), "w": (3, 16, 24), "group_sizes": ((3,), "int32")}, {}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def interpreted():
    """Pallas kernels for TPU run as plain XLA on a CPU."""
    with mock.patch.object(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True)):
        yield


def tensor(a, grad=False):
    """NumPy to the XLA device; torch knows no ml_dtypes."""
    a = np.asarray(a)
    made = torch.from_numpy(a.astype(np.float32)).to(torch.bfloat16) if a.dtype == ml_dtypes.bfloat16 else torch.from_numpy(np.array(a))
    return made.to("xla").requires_grad_(grad)


def array(t):
    t = t.detach().cpu()
    return t.float().numpy().astype(ml_dtypes.bfloat16) if t.dtype == torch.bfloat16 else t.numpy()


def specs_of(shapes, dtype):
    return {n: Spec(*s) if isinstance(s[0], tuple) else Spec(s, dtype) for n, s in shapes.items()}


@pytest.mark.parametrize(("provider", "dtype"), [("xla", "float32"), ("pallas_tpu", "float32"), ("pallas_tpu", "bfloat16")])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_float64(case, provider, dtype):
    name = case.split(",")[0]
    shapes, params = CASES[case]
    specs = specs_of(shapes, dtype)
    call = kernel(f"{name}.{provider}", **params)

    def run(_, arrays, __):
        out = call(**{n: tensor(a) for n, a in arrays.items()})
        return tuple(map(array, out if isinstance(out, tuple) else (out,)))

    def run_vjp(_, arrays, __, cotangents):
        tensors = {n: tensor(a, n in op(name).differentiable) for n, a in arrays.items()}
        out = call(**tensors)
        torch.autograd.backward(out if isinstance(out, tuple) else (out,), [tensor(c) for c in cotangents])
        return {n: array(tensors[n].grad) for n in op(name).differentiable if n in tensors}

    certificate = validate(call, op(name), specs, params, run=run, run_vjp=run_vjp, seeds=(0,))
    assert certificate.passed, certificate.summary()


def close(a, b, at=2e-5):
    torch.testing.assert_close(a.detach().cpu(), b.detach().cpu(), rtol=at, atol=at)


F = torch.nn.functional
EAGER = {
    "attention": (
        {"q": (2, 30, 4, 16), "k": (2, 30, 4, 16), "v": (2, 30, 4, 16)}, {"mask": Mask((Causal(),))},
        lambda q, k, v: F.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v)), is_causal=True).transpose(1, 2),
    ),
    "rms_norm": ({"x": (5, 96), "weight": (96,)}, {"eps": 1e-6}, lambda x, weight: F.rms_norm(x, (96,), weight, 1e-6)),
    "layer_norm": ({"x": (5, 96), "weight": (96,), "bias": (96,)}, {"eps": 1e-5}, lambda x, weight, bias: F.layer_norm(x, (96,), weight, bias, 1e-5)),
    "linear_act": ({"x": (20, 40), "w": (40, 30), "b": (30,)}, {"activation": "gelu"}, lambda x, w, b: F.gelu(x @ w + b)),
    "glu": ({"x": (20, 40), "w_gate": (40, 30), "w_up": (40, 30)}, {"activation": "silu"}, lambda x, w_gate, w_up: F.silu(x @ w_gate) * (x @ w_up)),
    "matmul": ({"a": (20, 40), "b": (40, 30)}, {}, lambda a, b: a @ b),
}  # fmt: skip


@pytest.mark.parametrize("name", EAGER)
def test_agrees_with_eager_pytorch(name):
    shapes, params, eager = EAGER[name]
    rng = np.random.default_rng(0)
    arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    here = {n: torch.tensor(a, requires_grad=True) for n, a in arrays.items()}
    there = {n: tensor(a, True) for n, a in arrays.items()}
    expected, got = eager(**here), kernel(f"{name}.pallas_tpu", **params)(**there)
    close(got, expected)
    g = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    expected.backward(g)
    got.backward(g.to("xla"))
    for n in shapes:
        close(there[n].grad, here[n].grad)


def test_a_step_of_training():
    """A module's parameters, an optimizer's step, and one more call that traces nothing."""

    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(64))
            self.up = torch.nn.Linear(64, 64, bias=False)

        def forward(self, x):
            normed = F.rms_norm(x, (64,), self.weight, 1e-6) if x.device.type == "cpu" else kernel("rms_norm.pallas_tpu")(x=x, weight=self.weight)
            return self.up(normed).square().mean()

    torch.manual_seed(0)
    here = Norm()
    there = Norm()
    there.load_state_dict(here.state_dict())
    there.to("xla")
    x = torch.randn(8, 64)
    for model, batch in ((here, x), (there, x.to("xla"))):
        steps = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            steps.zero_grad()
            model(batch).backward()
            steps.step()
        torch_xla.sync()
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        close(b, a)


def test_what_is_traced_and_kept():
    x, weight = tensor(np.ones((4, 64), np.float32), True), tensor(np.ones(64, np.float32))
    call = kernel("rms_norm.pallas_tpu", eps=1e-3)
    load = kpt.registry.load
    with mock.patch.object(kpt.registry, "load", side_effect=load) as traced:
        for _ in range(3):
            call(x=x, weight=weight).sum().backward()
        assert traced.call_count <= 2  # forward, by jit and to HLO
        with torch.no_grad():
            assert not call(x=x, weight=weight).requires_grad
    assert weight.grad is None and x.grad is not None


def test_a_kernel_for_another_chip_is_refused_in_words():
    with mock.patch.object(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=False)), pytest.raises(KernelError, match="rms_norm.xla"):
        xla.kernel("rms_norm.pallas_tpu")(x=tensor(np.ones((8, 128), np.float32)))


def test_refused():
    with pytest.raises(KernelError, match="on cpu"):
        kernel("matmul.xla")(a=torch.ones(2, 2), b=torch.ones(2, 2))
    with pytest.raises(KernelError, match="no_such"):
        kernel("no_such.pallas_tpu")
    find = xla.importlib.util.find_spec
    with (
        mock.patch.object(xla.importlib.util, "find_spec", lambda n: None if n == "torch_xla" else find(n)),
        pytest.raises(MissingDependencyError, match=re.escape(install("xla"))),
    ):
        kernel("matmul.xla")(a=torch.ones(2, 2), b=torch.ones(2, 2))
    assert jax.default_backend() == "cpu"


@pytest.mark.parametrize("kind, chip", [("TPU v4", "tpu-v4"), ("TPU v6 lite", "tpu-v6e")])
def test_blocks_are_for_the_chip_that_torch_has(monkeypatch, kind, chip):
    """jax sees no TPU beside torch_xla; what a kernel asks about its chip is answered for the device of the tensors."""
    from torch_xla.core import xla_model

    from pallas_kernels import tensorcore

    seen = []

    def ask(x):
        seen.append(tensorcore.generation().name)
        return [x * 2]

    monkeypatch.setattr(xla_model, "xla_device_kind", lambda device: kind)
    (doubled,) = xla.run(ask, [tensor(np.ones((4, 8), np.float32))], f"ask {kind}")
    assert set(seen) == {chip} and array(doubled).sum() == 64
