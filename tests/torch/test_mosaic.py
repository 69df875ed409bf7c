"""The Pallas kernels for Hopper on tensors, without a Hopper: their programs between the kernels, what `as_torch_kernel` is given, refusals.

The kernels of norms run in Mosaic's interpreter. Those of attention have none, and are their formulas here: what stands between them,
and which array goes where, is held to float64.
"""

from __future__ import annotations

import math
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import kpt
from kpt import ops
from kpt.kernels.spec import refusal, unmet
from kpt.kernels.validate import validate
from kpt.ops import Causal, Lengths, Mask, Spec, Window
from kpt.ops.mask import visible
from kpt.strategy.levels import choose
from kpt_torch import mosaic
from kpt_torch.library import _encoded
from kpt_torch.planner import calls, from_numpy

TOO_OLD = unmet("jax>=0.11.2")
pytestmark = pytest.mark.skipif(TOO_OLD is not None, reason=TOO_OLD or "")
H100, A100 = kpt.hardware_profile("h100"), kpt.hardware_profile("a100")
CAUSAL = Mask((Causal(),))


def attended(dtype="bfloat16", t=256, s=None, n=4, k=2, h=64, hv=None):
    s = s or t
    return {"q": Spec((2, t, n, h), dtype), "k": Spec((2, s, k, h), dtype), "v": Spec((2, s, k, hv or h), dtype)}


ATTENTION = {
    "attention": ("attention", attended(), {"mask": CAUSAL}),
    "attention, lengths that no tile divides": ("attention", attended(t=264, s=272, h=128), {"mask": Mask((Causal(8),)), "scale": 0.2}),
    "attention, head dim 96": ("attention", attended(t=200, h=96), {"mask": CAUSAL}),
    "attention, window": ("attention", attended("float16", n=2, k=2), {"mask": Mask((Causal(), Window(40, None)))}),
    "attention, groups in parts": ("attention", attended(t=264, n=8, k=1, h=128), {"mask": CAUSAL}),
    "attention, cap": ("attention", attended(t=200), {"mask": CAUSAL, "logits_soft_cap": 5.0}),
}


def to_jax(t):
    import jax.numpy as jnp

    return jnp.asarray(t.float().numpy() if t.is_floating_point() else t.numpy()).astype(str(t.dtype).removeprefix("torch."))


def from_jax(a):
    return from_numpy(np.asarray(a), "cpu")


def weighed(static, q, k, lse=None):
    """(scores before the mask as torch sees them, weights) `[B, N, T, S]`, and the logarithms of sums to base 2."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    s = torch.einsum("btnh,bsnh->bnts", q, k) * static.scale
    tanh = torch.tanh(s / static.cap) if static.cap else s
    seen = torch.from_numpy(visible(static.mask, 1, 1, static.queries, static.keys, {}))
    s = torch.where(seen, tanh * static.cap if static.cap else tanh, -math.inf)
    if lse is None:
        lse = torch.logsumexp(s, -1) * math.log2(math.e)
    return tanh, torch.exp2(s * math.log2(math.e) - lse[..., None]), lse


@pytest.fixture
def by_formula(monkeypatch):
    """The three kernels of attention as what they compute, in float64."""
    from pallas_kernels.attention.hopper_backward import TILE, TILE_COST, steps_of_queries
    from pallas_kernels.attention.hopper_forward import forward_tiles
    from pallas_kernels.attention.hopper_plan import plan_of_keys

    static = None
    real = mosaic._scores

    def scores(*given):
        nonlocal static
        static = real(*given)
        return static

    def behind(a, like):
        return torch.cat([a, torch.full((*a.shape[:2], like - a.shape[2]), 7.0)], 2)

    def gradients(q, k, v, g, lse, delta):
        q, k, v, g, lse, delta = (a.double() for a in (q, k, v, g, lse, delta))
        t, group = q.shape[1], q.shape[2] // k.shape[2]
        tanh, p, _ = weighed(static, q, k, lse[:, :, :t])
        dv = torch.einsum("bnts,btnh->bsnh", p, g)
        dp = torch.einsum("btnh,bsnh->bnts", g, v.repeat_interleave(group, 2))
        ds = p * (dp - delta[:, :, :t, None]) * static.scale
        ds = ds * (1 - tanh**2) if static.cap else ds
        dq = torch.einsum("bnts,bsnh->btnh", ds, k.repeat_interleave(group, 2))
        dk = torch.einsum("bnts,btnh->bsnh", ds, q)
        return dq, dk, dv  # of each query head

    def kernel(fn, name):
        def call(*given):
            *arrays, table = given
            assert table.dtype == torch.int32 and all(a.is_contiguous() for a in given)
            if name == "attention":
                q, k, v = (a.double() for a in arrays)
                _, p, lse = weighed(static, q, k)
                out = torch.einsum("bnts,bsnh->btnh", p, v.repeat_interleave(q.shape[2] // v.shape[2], 2))
                tile = forward_tiles(q.shape[3], v.shape[3], q.shape[1]).queries
                return out.to(arrays[0].dtype), behind(lse.float(), -(-q.shape[1] // tile) * tile)
            *others, delta = arrays
            if name == "attention_dq":
                assert arrays[4].shape[2] % 128 == 0
                if delta.ndim == 4:  # the results
                    made = (delta.double() * arrays[3].double()).sum(-1).transpose(1, 2)
                    delta = behind(made.float(), -(-made.shape[2] // 128) * 128)
                assert delta.shape[2] % 128 == 0
            q, _, v = arrays[:3]
            dq, *of_heads = gradients(*others, delta)
            if name == "attention_dk_dv":
                steps = steps_of_queries(q.shape[3], v.shape[3]).queries
                parts = plan_of_keys(static, q, v, None, TILE, steps, TILE_COST)[0]
                sums = [a.unflatten(2, (v.shape[2], parts, -1)).sum(4).movedim(3, 0) for a in of_heads]
                return [a.float() for a in sums] if parts > 1 else [a[0].to(q.dtype) for a in sums]
            dq = dq.to(q.dtype)
            return (dq,) if delta is arrays[5] else (dq, delta)

        return call

    monkeypatch.setattr(mosaic, "_scores", scores)
    monkeypatch.setattr(mosaic, "as_torch_kernel", kernel)
    mosaic.program.cache_clear()
    yield
    mosaic.program.cache_clear()


def held_to_float64(name, specs, params):
    op, kernel = ops.op(name), kpt.registry.load(f"{name}.mosaic")
    run, run_vjp = calls(op.differentiable, "cpu")
    certificate = validate(kernel, op, specs, params, run=run, run_vjp=run_vjp, seeds=(0,))
    assert certificate.passed, certificate.summary()


def checked_by_torch(name, specs, params):
    op, kernel = ops.op(name), kpt.registry.load(f"{name}.mosaic")
    arrays = {n: from_numpy(a, "cpu") for n, a in op.sample(np.random.default_rng(0), specs, **params).items()}
    given = [arrays[n].requires_grad_(n in op.differentiable) if n in arrays else None for n in (*op.arrays, *op.optional)]
    torch.library.opcheck(kernel.definition, (*given, _encoded(params)))


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_agrees_with_float64(case, by_formula):
    held_to_float64(*ATTENTION[case])


def test_opcheck_of_attention(by_formula):
    checked_by_torch(*ATTENTION["attention"])


@pytest.fixture
def compiled(monkeypatch):
    """jax's `as_torch_kernel` up to where it would compile for the GPU that is here; says how many buffers each launch was given."""
    import jax
    import jax._src.pallas.mosaic_gpu.torch as bridge
    from jax.experimental.mosaic.gpu import core

    launches = []

    def for_cuda(fn):
        def trace(*structs):
            traced = jax.jit(fn).trace(*structs)
            return types.SimpleNamespace(lower=lambda: traced.lower(lowering_platforms=("cuda",)), out_info=traced.out_info)

        return types.SimpleNamespace(trace=trace)

    device = torch.device
    monkeypatch.setattr(bridge, "jax", types.SimpleNamespace(**{**vars(jax), "jit": for_cuda}))
    monkeypatch.setattr(core, "_compile_as_torch_gpu_kernel", lambda module: (lambda buffers, _: launches.append(len(buffers)), None))
    monkeypatch.setattr(torch, "device", lambda *_: device("cpu"))
    mosaic.program.cache_clear()
    yield launches
    mosaic.program.cache_clear()


@pytest.mark.parametrize("case", ATTENTION)
def test_every_kernel_is_one_that_jax_can_launch(case, compiled):
    """Kernels alone are left, without an op of XLA's among them: results are memory that nobody wrote."""
    name, specs, params = ATTENTION[case]
    op, kernel = ops.op(name), kpt.registry.load(f"{name}.mosaic")
    arrays = {n: from_numpy(a, "cpu").requires_grad_() for n, a in op.sample(np.random.default_rng(0), specs, **params).items()}
    made = kernel(**arrays, **params)
    made = made if isinstance(made, tuple) else (made,)
    assert [tuple(m.shape) for m in made] == [s.shape for s in op.infer(specs, **params)]
    torch.autograd.backward(made, [torch.ones_like(m) for m in made])
    assert all(a.grad.shape == a.shape for a in arrays.values())
    assert len(compiled) == 3


def test_what_is_no_kernel_is_refused_by_name(compiled):
    import jax.numpy as jnp

    with pytest.raises(kpt.errors.KernelError, match="sin of a kernel's program"):
        mosaic.run(lambda static, x: (jnp.sin(x),), None, torch.ones(4))


def test_a_kernel_reads_aligned_memory():
    memory = torch.arange(64, dtype=torch.bfloat16)
    moved = mosaic._in_place(memory[1:33])
    assert memory[1:33].data_ptr() % mosaic.ALIGNED and moved.data_ptr() % mosaic.ALIGNED == 0 and torch.equal(moved, memory[1:33])
    assert mosaic._in_place(memory[8:40]).data_ptr() == memory[8:40].data_ptr()


def refused(name, specs, params=None, hardware=H100):
    spec = kpt.registry.get(name)
    return refusal(spec, spec.op, hardware, next(iter(specs.values())).dtype, specs, params or {}, "conservative", "torch")


@pytest.fixture
def plugin(monkeypatch):
    monkeypatch.setattr(mosaic, "_is_there", lambda module: True)


def test_neither_importing_nor_planning_imports_jax():
    code = (
        "import sys, kpt, kpt_torch, kpt_torch.mosaic as m; kpt.registry.load('attention.mosaic'); m._is_there = lambda module: True;"
        "from kpt.ops.base import Spec; from kpt.ops.mask import *; x = Spec((1, 512, 2, 64), 'bfloat16');"
        "assert m.refuse_attention(dict(q=x, k=x, v=x), {'mask': Mask((Causal(),))}) is None; print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)})
    assert done.stdout.strip() == "False", done.stdout + done.stderr


def test_refused_where_it_cannot_run(monkeypatch):
    name, specs = "attention.mosaic", attended()
    assert "sm80" in refused(name, specs, hardware=A100)
    assert "float64" in refused(name, {n: Spec(s.shape, "float64") for n, s in specs.items()})
    monkeypatch.setattr(mosaic, "_is_there", lambda module: False)
    assert "jax's CUDA plugin, which is not installed" in refused(name, specs)
    monkeypatch.setattr(mosaic, "_is_there", lambda module: module.endswith("12"))
    assert refused(name, specs, {"mask": CAUSAL}) is None
    monkeypatch.setattr("kpt.kernels.spec._installed", lambda package: None if package == "jax" else "99")
    assert "jax is not installed" in refused(name, specs)


@pytest.mark.parametrize("specs,params,why", [
    (attended(h=80), {"mask": CAUSAL}, "head"),
    (attended(h=64, hv=128), {"mask": CAUSAL}, "head dims"),
    (attended(t=257), {"mask": CAUSAL, "logits_soft_cap": 3.0}, "8 divides"),
    (attended(t=120), {"mask": CAUSAL}, "from 128 on"),
    (attended(), {"mask": Mask((Causal(-5),))}, "every query sees a key"),
    (attended(), {"mask": Mask((Lengths(),))}, "lengths"),
    (attended(), {"mask": CAUSAL, "scale": -1.0}, "positive scale"),
    (attended(), {"mask": CAUSAL, "out_dtype": "float16"}, "rounds its output"),
    (attended(), {}, "cuDNN is faster"),
])  # fmt: skip
def test_refused_calls_of_attention(specs, params, why, plugin):
    assert why in refused("attention.mosaic", specs, params)


def test_it_is_a_candidate_and_no_estimate_chooses_it(plugin):
    op = "attention"
    chosen, _, others = choose(op, attended(t=4096), {"mask": CAUSAL}, hardware=H100, level="balanced", framework="torch")
    assert chosen is None or chosen.provider != "mosaic"
    assert "estimated" in others[f"{op}.mosaic"], others


def test_sizes_that_change_leave_it_out(plugin):
    from kpt_torch.backend import Backend

    class Net(torch.nn.Module):
        def forward(self, x):
            q = x.transpose(1, 2)
            scores = (q @ q.transpose(-1, -2)) * 0.125
            seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            return torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ q

    for dynamic in (False, True):
        backend = Backend("balanced", H100, certify="off")
        torch._dynamo.reset()
        x = torch.randn(2, 256, 4, 64, dtype=torch.bfloat16)
        if dynamic:
            torch._dynamo.mark_dynamic(x, 0)
        torch.compile(Net(), backend=backend)(x)
        (site,) = [s for s in (*backend.plans[0].sites, *backend.plans[0].skipped) if s.op == "attention"]
        assert ("compiled for each set of sizes" in site.alternatives["attention.mosaic"]) is dynamic, site
