"""An optimized module is used like the original: parameters, state, hooks, copies, autocast, checkpoints, transforms, torch.compile."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import logging
import math
import pickle
import re
import subprocess
import sys
import threading
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

import kpt
import kpt_torch
from kpt import Plan, cli, console
from kpt.errors import ConfigError, InputError, KptError, PlanError
from kpt.kernels import KernelSpec, registry
from kpt.tuning import gain
from kpt_torch import backend, quiet, shapes
from kpt_torch.backend import kpt as compile_backend


class Block(nn.Module):
    """A layer as people write it, with a norm, attention and dropout."""

    def __init__(self, width: int = 32, heads: int = 4, recompute: bool = False, counts: bool = True):
        super().__init__()
        self.heads, self.recompute, self.counts = heads, recompute, counts
        self.weight = nn.Parameter(torch.ones(width))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)
        self.out_twin = self.out  # shared
        self.drop = nn.Dropout(0.2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def attend(self, x):
        n = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype) * self.weight
        q, k, v = (a.unflatten(-1, (self.heads, -1)).transpose(1, 2) for a in self.qkv(n).chunk(3, -1))
        s = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), float("-inf"))
        return x + self.drop(self.out((s.softmax(-1) @ v).transpose(1, 2).flatten(2)))

    def forward(self, x):
        if self.counts:
            self.calls += 1
        return checkpoint(self.attend, x, use_reentrant=False) if self.recompute else self.attend(x)


def block(**options):
    torch.manual_seed(0)
    return Block(**options)


def inputs(t=16, b=2):
    return torch.randn(b, t, 32, generator=torch.Generator().manual_seed(t))


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **({"rtol": 1e-5, "atol": 1e-5} | tolerance))


def gradients(module, x, seed=1):
    module.zero_grad()
    torch.manual_seed(seed)
    out = module(x)
    out.float().square().mean().backward()
    return out, {n: p.grad.clone() for n, p in module.named_parameters()}


def ops(plan):
    return sorted(s.op for s in plan.sites)


def test_it_is_the_same_module_to_whoever_looks():
    module = block()
    fast = kpt_torch.optimize(module)
    assert isinstance(fast, Block) and type(fast).__name__ == "Block"
    assert [n for n, _ in fast.named_modules()] == [n for n, _ in module.named_modules()]
    assert list(fast.state_dict()) == list(module.state_dict())
    assert all(a is b for a, b in zip(fast.parameters(), module.parameters(), strict=True))
    assert fast.out_twin is fast.out
    fast.load_state_dict(module.state_dict())


def test_numbers_gradients_and_buffers():
    module, fast = block(), kpt_torch.optimize(block())
    assert ops(fast.plan(inputs())) == ["attention", "rms_norm"]
    assert int(fast.calls) == 0, "planning is no call"
    for mode in (True, False):
        module.train(mode), fast.train(mode)
        (want, dwant), (got, dgot) = gradients(module, inputs()), gradients(fast, inputs())
        close(got, want)
        close(dgot, dwant)
    assert int(fast.calls) == int(module.calls) == 2


def test_train_and_eval_are_told_apart():
    fast = kpt_torch.optimize(block())
    fast.eval()
    assert torch.equal(fast(inputs()), fast(inputs()))
    fast.train()
    assert not torch.equal(fast(inputs()), fast(inputs()))


def test_hooks_run():
    module, seen = block().eval(), []
    module.register_forward_hook(lambda m, args, out: seen.append("forward"))
    module.register_forward_pre_hook(lambda m, args: seen.append("before"))
    fast = kpt_torch.optimize(module)
    fast.out.register_forward_hook(lambda m, args, out: out * 2)
    close(fast(inputs()), module(inputs()))
    assert seen == ["before", "forward"] * 2


def test_what_somebody_changes_in_one_is_changed_in_both():
    module = nn.Dropout(0.5)
    fast = kpt_torch.optimize(module)
    module.eval()
    assert not fast.training and torch.equal(fast(inputs()), inputs())
    fast.twin = nn.Linear(2, 2)
    assert list(module.state_dict()) == ["twin.weight", "twin.bias"]


def test_callers_see_the_arguments_of_forward():
    """transformers asks: to make an attention mask in `generate`, and to pass a data set's columns."""
    assert inspect.signature(kpt_torch.optimize(block()).forward) == inspect.signature(block().forward)


def _normed_twice(self, x):
    return _normed(x, self.weight) * 2


@pytest.mark.parametrize("given", [types.MethodType, functools.partial])
def test_a_forward_that_somebody_gave_to_one_module_is_its_forward(given):
    module = block()
    module.forward = given(_normed_twice, module)
    fast = kpt_torch.optimize(module)
    close(fast(inputs()), module(inputs()))
    assert [ops(p) for p in fast._kpt_backend.plans] == [["rms_norm"]] == [ops(kpt_torch.plan(module, inputs()))]
    twin = copy.deepcopy(fast)
    close(twin(inputs()), fast(inputs()))
    assert twin.weight is not fast.weight


def test_a_module_may_have_a_plan_of_its_own():
    class Trip(Block):
        def plan(self):
            return "a holiday"

    assert ops(kpt_torch.plan(Trip(), inputs())) == ["attention", "rms_norm"] and kpt_torch.optimize(Trip()).plan() == "a holiday"


def test_a_method_may_be_optimized():
    class Scaled:
        weight = torch.ones(32)

        @kpt_torch.optimize
        def normed(self, x):
            return _normed(x, self.weight)

    close(Scaled().normed(inputs()), _normed(inputs(), Scaled.weight))


def _normed(x, weight):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def copied(x, weight):
    y = _normed(x, weight)
    return y, y.clone()


def written_twice(x, weight):
    return _normed(x, weight), _normed(x, weight)


def viewed(x, weight):
    y = _normed(x, weight)
    return y, y.contiguous()


@pytest.mark.parametrize("fn", [copied, written_twice, viewed])
def test_results_share_memory_where_they_did(fn):
    fast, given = kpt_torch.optimize(fn), (inputs(), torch.ones(32))
    kept, written = fast(*given)
    want, changed = fn(*given)
    written.add_(1), changed.add_(1)
    close(kept, want)
    assert [ops(p) for p in fast._backend.plans] == [["rms_norm"]]


def test_dynamo_keeps_its_settings_whatever_the_threads_do(monkeypatch):
    settings = torch._dynamo.config
    fast, before, both = kpt_torch.optimize(lambda x: waiting(x)), (settings.optimize_ddp, settings.suppress_errors), threading.Barrier(2)

    @torch._dynamo.disable
    def waiting(x):
        both.wait(60)
        if threading.current_thread() is second:
            first.join(60)
        return x

    first, second = (threading.Thread(target=fast, args=(inputs(),)) for _ in range(2))
    first.start(), second.start()
    first.join(60), second.join(60)
    assert (settings.optimize_ddp, settings.suppress_errors) == before


def test_traced_by_others_it_is_the_code_as_it_was_written():
    module = block(counts=False).eval()
    fast, x = kpt_torch.optimize(module), inputs()
    close(torch.export.export(fast, (x,)).module()(x), module(x))
    close(torch.jit.trace(fast, x, check_trace=False)(x), module(x))
    assert fx.symbolic_trace(kpt_torch.optimize(nn.Linear(32, 4)))(x).shape == (2, 16, 4)


def test_without_memory_there_is_nothing_to_plan():
    fast = kpt_torch.optimize(block().to("meta"))
    assert fast(inputs().to("meta")).shape == inputs().shape
    assert "tensors that have no memory" in fast._kpt_backend.plans[0].notes[0]


@torch.library.custom_op("kpt_tests::grown", mutates_args=())
def grown(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@grown.register_fake
def _(x):
    return x.new_empty(*x.shape[:-1], x.shape[-1] + 1)  # wrong


def test_what_dynamo_cannot_trace_runs_as_it_was_written():
    """As BART does, whose masks are of a wrong size to it; what it calls is still looked at."""
    close(kpt_torch.optimize(lambda x: grown(x) + x)(inputs()), 2 * inputs())


def test_a_wrong_setting_is_told_at_once(monkeypatch):
    monkeypatch.setenv("KPT_HARDWARE", "abacus")
    with pytest.raises(KptError, match="abacus"):
        kpt_torch.optimize(block())


def test_the_setting_plans_for_a_chip_as_the_argument_does(monkeypatch):
    asked = kpt_torch.plan(block(), inputs(), hardware="h100")
    monkeypatch.setattr(backend, "_PROFILES", {})
    monkeypatch.setenv("KPT_HARDWARE", "h100")
    assert kpt_torch.plan(block(), inputs()) == asked and asked.hardware == "h100-sxm"
    with pytest.warns(UserWarning, match="this machine, cpu"):
        measured = kpt.auto_optimize(block(), inputs(), budget=0)
    assert measured.report.hardware == measured.plan.hardware == "cpu"


def test_a_class_is_no_model():
    with pytest.raises(KptError, match=r"the class Linear\. .*Pass a model: Linear\(\.\.\.\)"):
        kpt_torch.optimize(torch.nn.Linear)


def test_copies_are_independent_and_optimized():
    fast = kpt_torch.optimize(block()).eval()
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        close(twin(inputs()), fast(inputs()))
        assert ops(twin.plan(inputs())) == ["attention", "rms_norm"]
        assert twin.weight is not fast.weight and twin.out_twin is twin.out
    shallow = copy.copy(fast)
    shallow.heads = 2
    assert fast.heads == 4 and shallow.weight is fast.weight


def test_no_grad_and_inference_mode():
    module = block().eval()
    fast = kpt_torch.optimize(module)
    with torch.no_grad():
        close(fast(inputs()), module(inputs()))
    with torch.inference_mode():
        close(fast(inputs()), module(inputs()))
    assert fast(inputs()).requires_grad


def test_autocast_is_what_it_was():
    module = block().eval()
    fast = kpt_torch.optimize(module)
    with torch.autocast("cpu", torch.bfloat16):
        plan = fast.plan(inputs())
        site = next(s for s in plan.sites if s.op == "attention")
        assert site.specs["q"].dtype == "bfloat16" and site.params["out_dtype"] == "bfloat16"
        (want, dwant), (got, dgot) = gradients(module, inputs()), gradients(fast, inputs())
    assert got.dtype == want.dtype
    close(got, want, rtol=2e-2, atol=2e-2)
    close(dgot, dwant, rtol=4e-2, atol=4e-2)
    assert {g.dtype for g in dgot.values()} == {torch.float32}


class CastInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = block().eval()

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = self.block(x)
        return x @ x.transpose(1, 2)


def test_autocast_inside():
    module = CastInside()
    fast = kpt_torch.optimize(module)
    assert ops(fast.plan(inputs())) == ["attention", "rms_norm"]
    want, got = module(inputs()), fast(inputs())
    assert got.dtype == want.dtype
    close(got, want, rtol=2e-2, atol=2e-2)


def test_where_dynamo_is_disabled_a_program_runs_as_it_was_written(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    module = block().eval()
    fast = kpt_torch.optimize(module)
    assert torch.equal(fast(inputs()), module(inputs()))
    assert not fast.plan(inputs()).sites


def test_a_checkpointed_region_stays_one():
    module = block(recompute=True)
    fast = kpt_torch.optimize(module)
    plan = fast.plan(inputs())
    assert [s.path for s in plan.sites] == ["remat0/rms_norm0", "remat0/attention1"], plan.explain()
    fast(inputs())  # compiled
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        out = fast(inputs())
    assert (2, 4, 16, 16) not in [tuple(s) for s in kept]
    out.sum().backward()
    (want, dwant), (got, dgot) = gradients(module, inputs()), gradients(fast, inputs())
    close(got, want)
    close(dgot, dwant)


def test_a_write_in_a_checkpointed_region_stays_there():
    def dropped(x):
        keep = 0.5 + torch.rand(x.shape[0], 1, 1)
        keep.floor_()  # as transformers drops paths: what it returns nobody uses
        return x * keep

    def program(x):
        return checkpoint(dropped, x, use_reentrant=False)

    want, got = (torch.random.manual_seed(0) and f(inputs(b=8)) for f in (program, kpt_torch.optimize(program)))
    close(got, want)


def test_functional_call_and_torch_func():
    module = block(counts=False).eval()
    fast = kpt_torch.optimize(module)
    state = {n: p.detach() * 1.1 for n, p in module.named_parameters()}
    close(torch.func.functional_call(fast, state, (inputs(),)), torch.func.functional_call(module, state, (inputs(),)))

    def loss(m):
        return lambda p: torch.func.functional_call(m, p, (inputs(),)).square().mean()

    close(torch.func.grad(loss(fast))(state), torch.func.grad(loss(module))(state))


@pytest.fixture
def sizes_may_change():
    """torch's default, which torch_xla turns off for the whole process when it is imported (tests/torch/test_xla_bridge.py)."""
    with torch._dynamo.config.patch(automatic_dynamic_shapes=True):
        yield


@pytest.mark.usefixtures("sizes_may_change")
def test_other_sizes_are_not_compiled_one_by_one():
    fast, module = kpt_torch.optimize(block().eval()), block().eval()
    for t in (16, 21, 30, 47, 64):
        close(fast(inputs(t)), module(inputs(t)))
    plans = fast._kpt_backend.plans
    assert len(plans) == 2, [p.explain() for p in plans]
    assert ops(plans[1]) == ["attention", "rms_norm"]
    assert next(s for s in plans[1].sites if s.op == "attention").params["mask"].kinds == {"causal"}


@pytest.mark.usefixtures("sizes_may_change")
def test_a_mask_that_depends_on_a_size_keeps_its_code_when_the_size_may_change():
    def attend(q, k, v):
        i = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
        s = (q @ k.mT).masked_fill(torch.arange(k.shape[2])[None] > i, float("-inf"))
        return s.softmax(-1) @ v

    fast = kpt_torch.optimize(attend)
    for t, s in ((4, 9), (5, 11), (6, 13)):
        args = torch.randn(1, 2, t, 8), torch.randn(1, 2, s, 8), torch.randn(1, 2, s, 8)
        close(fast(*args), attend(*args))
    first, second = fast._backend.plans
    assert ops(first) == ["attention"] and ops(second) == []
    assert "other sizes" in second.skipped[0].reason


def rms(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def asked(x):
    torch._check(x.shape[1] % 8 == 0)
    return rms(x.unflatten(1, (-1, 8)))


def shifted(x, y):
    torch._check(x.shape[1] == y.shape[1] + 1)
    return rms(x[:, 1:] + y)


def bounded(x):
    torch._check(x.shape[1] <= 30)
    return rms(x[:, :30] + x)


@pytest.mark.parametrize("program,lengths", [
    (asked, (16, 24, 40)), (lambda x: rms(x.view(x.shape[0], x.shape[1] // 128, 128, 16)), (256, 384, 512)),
    (lambda x: rms(sum(x.chunk(2, 1))), (16, 24, 32)), (shifted, (16, 21, 30)), (bounded, (16, 29, 30)),
], ids=["multiples of 8", "multiples of 128", "halves", "tied", "bounded"])  # fmt: skip
@pytest.mark.usefixtures("sizes_may_change")
def test_other_sizes_are_such_as_the_program_asks_for(program, lengths, caplog):
    fast = kpt_torch.optimize(program)
    for t in lengths:
        args = [torch.randn(2, n, 16) for n in ((t, t - 1) if program is shifted else (t,))]
        close(fast(*args), program(*args))
    assert [ops(p) for p in fast._backend.plans] == [["rms_norm"]] * 2, [p.explain() for p in fast._backend.plans]
    assert not [r for r in caplog.records if r.name == "kpt"]


@pytest.mark.usefixtures("sizes_may_change")
@pytest.mark.parametrize("flat", [lambda t: t.flatten(), lambda t: t.reshape(-1)], ids=["flatten", "reshape"])
def test_labels_flattened_beside_logits_have_the_sizes_of_these(flat):
    def loss(x, labels):
        return F.cross_entropy(rms(x).flatten(0, 1), flat(labels))

    def given(*sizes, labels=None):
        return torch.randn(*sizes, 16), torch.randint(0, 16, labels or sizes)

    fast = kpt_torch.optimize(loss)
    for sizes in ((2, 12), (3, 7), (5, 9)):
        x, labels = given(*sizes)
        close(fast(x, labels), loss(x, labels))
    assert [ops(p) for p in fast._backend.plans] == [["rms_norm"]] * 2, "of one size, and of all"
    x, labels = given(2, 6, labels=(3, 4))  # as many
    close(fast(x, labels), loss(x, labels))


@pytest.mark.usefixtures("sizes_may_change")
def test_sizes_that_leave_no_other_are_told_in_a_line(caplog, monkeypatch):
    for name in quiet.LOGGERS:  # the command line, which tests run too, lets plans alone tell it
        monkeypatch.setattr(logging.getLogger(name), "filters", [])

    def small(x):
        torch._check(x.shape[1] <= 16)
        return rms(x.view(x.shape[0], x.shape[1] // 8, 8, 16))

    def of_one_size(x):
        return rms(x + 1) if x.shape[1] == 16 else x

    x = torch.randn(2, 16, 16)
    torch._dynamo.maybe_mark_dynamic(x, 1)
    fast = kpt_torch.optimize(small)
    close(fast(x), small(x))
    (plan,) = fast._backend.plans
    assert not plan.sites and "GraphError: A size that may change" in plan.notes[0]
    torch._dynamo.mark_dynamic(x, 1)  # which Dynamo refuses where the program makes a constant of it
    fast = kpt_torch.optimize(of_one_size)
    close(fast(x), of_one_size(x))
    assert [ops(p) for p in fast._backend.plans] == [["rms_norm"]]  # of the function that it calls
    plan = kpt_torch.plan(of_one_size, x)
    assert ops(plan) == ["rms_norm"] and "of_one_size (" in plan.notes[0] and "marked L['x'].size()[1] as dynamic" in plan.notes[0]
    said = [r for r in caplog.records if r.levelname in ("WARNING", "ERROR") and r.name.startswith(("kpt", "torch._"))]
    assert [r.name for r in said] == ["kpt"] * 3 and all("\n" not in r.getMessage() and not r.exc_info for r in said)


def test_a_number_of_another_module_is_no_reason_to_make_a_symbol_of_this_ones():
    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = scale

        def forward(self, q, k, v):
            return (q @ k.mT * self.scale).softmax(-1) @ v

    arrays = torch.randn(3, 1, 2, 8, 4)
    for scale in (0.5, 0.25, 0.125):
        fast = kpt_torch.optimize(Scaled(scale))
        fast(*arrays)
        (plan,) = fast._kpt_backend.plans
        assert [s.params["scale"] for s in plan.sites] == [scale]


class Straight(torch.autograd.Function):
    """A rule of the user's, which is not the derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return 3 * g + 0 * ctx.saved_tensors[0]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_derivative_rule_of_the_users_stays_beside_the_sites(inner):
    def program(x, w):
        y = Straight.apply(x) + x
        return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * w

    x, w = inputs().requires_grad_(), torch.ones(32)
    assert ops(kpt_torch.plan(program, x, w)) == ["rms_norm"]
    fast = torch.compile(program, backend=compile_backend, options={"inner": inner})
    want, got = (torch.autograd.grad((f(x, w) * inputs(b=2).cos()).sum(), x) for f in (program, fast))
    close(got, want)


def test_a_branch_costs_no_sites_beside_it():
    def program(x, weight):
        return _normed(torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x * 2, (x,)), weight)

    fast, weight = kpt_torch.optimize(program), torch.ones(32)
    for x in (inputs(), -inputs()):
        close(fast(x, weight), program(x, weight))
    assert [ops(p) for p in fast._backend.plans] == [["rms_norm"]]


def test_graph_breaks_are_tolerated_and_named():
    inner = block().eval()

    def program(x):
        x = inner(x)
        torch._dynamo.graph_break()
        return inner(x)

    fast = kpt_torch.optimize(program)
    plan = fast.plan(inputs())
    assert ops(plan) == ["attention", "attention", "rms_norm", "rms_norm"]
    assert any("2 graphs" in n for n in plan.notes)
    close(fast(inputs()), program(inputs()))


# -- torch.compile ---------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("sizes_may_change")
def test_a_graph_that_reads_no_tensor_is_planned():
    """A mask made of positions alone, between two breaks; in place, so that ops of it are computed anew."""

    def program(x):
        torch._dynamo.graph_break()
        t = x.shape[-2]
        mask = torch.full((t, t), -1e30)
        mask.masked_fill_(torch.arange(t) < (torch.arange(t) + 1).view(t, 1), 0.0)
        torch._dynamo.graph_break()
        return (x @ x.mT + mask).softmax(-1) @ x

    fast = kpt_torch.optimize(program)
    for t in (5, 7, 8):
        x = torch.randn(2, t, 4)
        close(fast(x), program(x))
        assert not [n for n in fast.plan(x).notes if "as it was written" in n], fast.plan(x).notes


def test_sizes_that_depend_on_data_cost_no_sites_beside_them():
    """As many tokens as chose an expert, told by `tolist`, which Dynamo keeps in the graph."""
    experts = [nn.Linear(32, 32) for _ in range(3)]

    def program(x):
        y = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).flatten(0, -2)
        chosen = y[:, :3].argmax(-1)
        order, sizes = chosen.argsort(), torch.nn.functional.one_hot(chosen, 3).sum(0).tolist()
        parts = [e(part) for e, part in zip(experts, y[order].split(sizes), strict=True)]
        return torch.zeros_like(y).index_add(0, order, torch.cat(parts))

    fast, x = kpt_torch.optimize(program), inputs().requires_grad_()
    plan = fast.plan(x)
    assert [s.op for s in plan.sites] == ["rms_norm"], plan.explain()
    for x in (inputs(), inputs().flip(-1) + 1):
        x.requires_grad_()
        want, got = program(x), fast(x)
        close(got, want)
        close(*(torch.autograd.grad(y.square().sum(), x) for y in (got, want)))


def test_every_layer_has_kernels_where_each_is_a_graph_of_its_own():
    class Layer(nn.Module):
        def __init__(self, index):
            super().__init__()
            self.index, self.weight = index, nn.Parameter(torch.ones(32))

        def forward(self, x, seen):
            torch._dynamo.graph_break()
            seen[self.index] = True
            return _normed(x, self.weight)

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Layer(i) for i in range(10)])

        def forward(self, x):
            seen = {}
            for layer in self.layers:
                x = layer(x, seen)
            return x

    assert ops(kpt_torch.plan(Deep(), inputs())) == ["rms_norm"] * 10


def test_the_backend_is_an_entry_point():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["torch_dynamo_backends"] == {"kpt": "kpt_torch.backend:kpt"}


def test_compiled_without_another_compiler():
    module = block()
    fast = torch.compile(module, backend=compile_backend, options={"inner": "eager"})
    (want, dwant), (got, dgot) = gradients(module, inputs()), gradients(fast, inputs())
    close(got, want)
    close(dgot, {f"_orig_mod.{n}": g for n, g in dwant.items()})


def test_compiled_through_autograd_ahead_of_time():
    """Fake tensors, functionalization, partition: what Inductor asks of a graph and its custom ops, without a C++ compiler."""
    module = block().eval()
    fast = torch.compile(module, backend=compile_backend, options={"inner": "aot_eager"})
    (want, dwant), (got, dgot) = gradients(module, inputs()), gradients(fast, inputs())
    close(got, want)
    close(dgot, {f"_orig_mod.{n}": g for n, g in dwant.items()})


@pytest.mark.slow
def test_compiled_by_inductor():
    module = block().eval()
    fast = torch.compile(module, backend=compile_backend)
    close(gradients(fast, inputs())[0], gradients(module, inputs())[0])


def test_an_optimized_module_inside_of_a_compiled_one():
    module = block().eval()
    fast = kpt_torch.optimize(module)
    outer = torch.compile(lambda x: fast(x) * 2, backend="aot_eager")
    close(outer(inputs()), module(inputs()) * 2)


def test_an_unknown_option_is_named():
    with pytest.raises(Exception, match="inne") as error:
        torch.compile(lambda x: x + 1, backend=compile_backend, options={"inne": "eager"})(torch.ones(2))
    assert isinstance(error.value.__cause__ or error.value, ConfigError) or "Options are" in str(error.value)


# -- plans -----------------------------------------------------------------------------------------------------------------------


def test_a_plan_travels_and_is_followed():
    module = block().eval()
    plan = Plan.from_json(kpt_torch.plan(module, inputs()).to_json())
    assert ops(kpt_torch.plan(module, inputs(), plan=plan)) == ["attention", "rms_norm"]
    less = Plan.from_json(plan.to_json())
    less = Plan(**{**vars(less), "sites": less.sites[:1], "skipped": ()})
    followed = kpt_torch.plan(module, inputs(), plan=less)
    assert ops(followed) == ["rms_norm"]
    assert any("no such site" in s.reason for s in followed.skipped)


def test_a_plan_for_other_code_is_named():
    plan = kpt_torch.plan(block().eval(), inputs())
    other = kpt_torch.plan(nn.Linear(32, 32), inputs(), plan=plan)
    assert other.sites == () and any("which this program does not have" in n for n in other.notes)


def test_a_plan_made_for_jax_applies_as_far_as_sites_correspond():
    jax = pytest.importorskip("jax")
    import kpt_jax

    def in_jax(q, k, v, x):
        s = jax.numpy.einsum("bnth,bnsh->bnts", q, k) * 0.5
        n = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)
        return jax.numpy.einsum("bnts,bnsh->bnth", jax.nn.softmax(s, -1), v), n

    def in_torch(q, k, v, x):
        s = torch.einsum("bnth,bnsh->bnts", q, k) * 0.5
        n = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5)  # another epsilon
        return torch.einsum("bnts,bnsh->bnth", s.softmax(-1), v), n

    arrays = [*np.ones((3, 1, 2, 16, 8), np.float32), np.ones((4, 8), np.float32)]
    given = Plan.from_json(kpt_jax.plan(in_jax, *arrays).to_json())
    assert ops(given) == ["attention", "rms_norm"]
    plan = kpt_torch.plan(in_torch, *map(torch.from_numpy, arrays), plan=given)
    assert ops(plan) == ["attention"]
    assert any("rms_norm" in n and "no counterpart" in n for n in plan.notes)


def test_what_is_no_module_or_plan_is_refused():
    with pytest.raises(KptError, match="nn.Module or a function"):
        kpt_torch.optimize(3)
    with pytest.raises(PlanError):
        kpt_torch.optimize(block(), plan="plan.json")
    with pytest.raises(ConfigError):
        kpt_torch.optimize(block(), level="bold")
    with pytest.raises(KptError):
        kpt_torch.optimize(block(), hardware="abacus")


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch):
    import kpt_torch.kernels.attention as room
    from kpt.strategy import planner

    monkeypatch.setattr(planner, "_CERTIFICATES", {})
    honest = room.attention
    monkeypatch.setattr(room, "attention", lambda **given: honest(**given) * 1.01)
    plan = kpt_torch.plan(block().eval(), inputs())
    assert ops(plan) == ["rms_norm"]
    assert any("disagrees with the original" in s.reason for s in plan.skipped)


def test_a_proof_holds_where_a_query_sees_nothing(monkeypatch):
    """Its scores drown in the fill, which is no excuse: a kernel that goes by them is not used."""
    def program(x, pad):
        s = x @ x.mT + torch.where(pad[:, None] & torch.ones(8, 8, dtype=torch.bool).tril(), 0.0, torch.finfo(x.dtype).min)
        return s.softmax(-1) @ x

    given = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) >= torch.tensor([[0], [3]])
    monkeypatch.setattr("kpt_torch.kernels.attention._drowns", lambda fill, dtype: False)
    (left,) = kpt_torch.plan(program, *given).skipped
    assert "attention.sdpa disagrees with the original" in left.reason


def test_auto_optimize_measures_and_keeps_what_wins():
    def attend(q, k, v):
        s = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        return s.softmax(-1) @ v

    result = kpt.auto_optimize(attend, *torch.randn(3, 1, 8, 512, 32))
    assert len(result.report.seconds_before) == len(result.report.seconds_after) >= 9
    assert result.report.max_error is not None and result.report.max_error < 1e-5
    assert (result.fn is attend) != result.report.kept
    nothing = kpt.auto_optimize(F.relu, torch.randn(8))
    assert nothing.fn is F.relu and "no site has a kernel" in nothing.plan.notes[-1]


def halved(x):
    return torch.relu(x) / 2


@pytest.mark.parametrize(
    ("program", "inputs", "keywords", "words"),
    [(nn.Linear(2, 2), (), {}, "missing 1 required positional argument: 'input'.* input"), (nn.Linear(2, 2), ((torch.ones(2),),), {}, "Unpack"),
     (nn.Linear(2, 2), (np.ones(2),), {}, "must be Tensor, not numpy.ndarray.*Pass tensors"), (halved, (np.ones(2),), {}, "Pass tensors"),
     (nn.Linear(2, 2), (torch.ones(2),), {"bugdet": "10s"}, "bugdet may be budget"), (halved, (), {}, "typical call: x")],
)  # fmt: skip
def test_inputs_that_do_not_fit_say_what_to_do(program, inputs, keywords, words):
    with pytest.raises(InputError, match=f"(?s){words}") as raised:
        kpt.auto_optimize(program, *inputs, **keywords)
    assert str(raised.value.__cause__) in str(raised.value)


def test_tensors_in_a_batch_tell_whose_a_function_is():
    """One that names nothing of torch's; what it raises is its own."""

    def fails(batch):
        return batch["x"].relu() + batch["missing"]

    for inputs, keywords in ((({"x": torch.ones(2)},), {}), ((), {"batch": {"x": torch.ones(2)}})):
        with pytest.raises(KeyError, match="missing"):
            kpt.auto_optimize(fails, *inputs, **keywords)


def test_an_error_of_the_module_stays_its_own():
    for run in (kpt.auto_optimize, kpt_torch.plan, lambda m, x: kpt_torch.optimize(m)(x)):
        with pytest.raises(RuntimeError, match="^mat1 and mat2 shapes cannot be multiplied"):
            run(nn.Linear(2, 2), torch.ones(1, 3))


class Trained(nn.Module):
    """Changes running statistics, random states and its input when it runs."""

    def __init__(self):
        super().__init__()
        self.weight, self.norm, self.drop = nn.Parameter(torch.ones(32)), nn.BatchNorm1d(32), nn.Dropout(0.5)

    def forward(self, x):
        x.add_(1)
        x = self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.drop(self.norm(x)).square().mean()


@pytest.fixture
def briefly(monkeypatch):
    monkeypatch.setattr("kpt_torch.auto.rounds", lambda samples: {n: tuple(s(1) for _ in range(9)) for n, s in samples.items()})


@pytest.mark.parametrize("closed_over", [False, True])
def test_auto_optimize_leaves_all_as_it_was(closed_over, briefly):
    module, x = Trained(), torch.randn(16, 32)
    expanded = torch.ones(1, requires_grad=True).expand(16, 32)
    kept, given, random = copy.deepcopy(module.state_dict()), x.clone(), torch.get_rng_state()
    program, inputs = (lambda x, e: module(x), (x, expanded)) if closed_over else (module, (x,))
    report = kpt.auto_optimize(program, *inputs, budget=0).report
    assert all(torch.equal(v, kept[n]) for n, v in module.state_dict().items()) and torch.equal(x, given)
    assert torch.equal(torch.get_rng_state(), random)
    assert report.measured == "forward and backward" and any("within tolerance" in n for n in report.plan.notes), "the same random numbers"


def test_auto_optimize_takes_a_module_that_learns_its_sizes_first(briefly):
    lazy = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d())
    assert kpt.auto_optimize(lazy, torch.randn(4, 8), budget=0).fn is lazy


def test_a_step_that_differentiates_itself(briefly):
    """Autograd calls a kernel's backward pass while Dynamo runs the step; it is no code of the user's."""
    model, x = nn.Linear(32, 1), torch.randn(8, 32)

    def step(x):
        loss = normalised(x, model.weight)
        loss.backward()
        return loss

    def update(x):
        step(x)
        with torch.no_grad():
            model.weight -= 0.1 * model.weight.grad

    step(x)
    wanted, model.weight.grad = model.weight.grad, None
    kpt_torch.optimize(step)(x)
    close(model.weight.grad, wanted)
    assert kpt.auto_optimize(step, x, budget=0).report.measured == "as called"
    with pytest.raises(KptError, match="updates the parameters"):
        kpt.auto_optimize(update, x)


@pytest.fixture
def with_slow(monkeypatch, tmp_path):
    """A kernel that is said to be the best and is not, and where measurements go."""
    monkeypatch.setenv("KPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(registry, "_kernels", dict(registry._kernels))
    registry.register(KernelSpec("rms_norm.slow", "rms_norm", 1, "test", "torch", ("cpu",), "tests.slow_kernels:torch_rms_norm", ("float32",),
                                 efficiency=1.0))  # fmt: skip


def normalised(x, w):
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * w).sum()


def arguments():
    return torch.randn(64, 32), torch.ones(32, requires_grad=True)


def told(*command):
    done = CliRunner().invoke(cli.app, ["tune", *command, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.slow
def test_kpt_tune_times_kernels_for_pytorch(with_slow):
    command = "--framework", "torch", "--op", "rms_norm", "--budget", "60s"
    first, again = told(*command), told(*command)
    assert (first["measured"], first["known"], first["dropped"]) == (2, 0, {}) and (again["measured"], again["known"]) == (0, 2)
    (site,) = kpt_torch.plan(normalised, torch.randn(2048, 1024), torch.ones(1024, requires_grad=True)).sites
    assert site.kernel == "rms_norm.torch" and site.reason.startswith("Measured ")
    refused = CliRunner().invoke(cli.app, ["tune", "--framework", "torch", "--op", "abacus"])
    assert refused.exit_code == console.REFUSED and "For PyTorch there are" in refused.output


def test_kpt_tune_times_the_calls_of_a_program(with_slow):
    command = "--program", f"{__name__}:normalised", "--args-from", f"{__name__}:arguments"
    assert (told(*command)["measured"], told(*command)["known"]) == (1, 1)
    (site,) = kpt_torch.plan(normalised, *arguments()).sites
    assert site.kernel == "rms_norm.torch" and site.reason.startswith("Measured ")


def test_kpt_plan_of_a_program_for_pytorch():
    done = CliRunner().invoke(cli.app, ["plan", f"{__name__}:normalised", "--args-from", f"{__name__}:arguments", "--json"])
    assert done.exit_code == 0, done.output
    assert ops(Plan.from_json(done.stdout)) == ["rms_norm"]


@pytest.mark.parametrize("op", shapes.CPU_SHAPES)
def test_shapes_that_are_tuned_at_are_calls_of_their_op(op):
    for table, dtype in ((shapes.CPU_SHAPES, "float32"), (shapes.SHAPES, "bfloat16")):
        for dims in table[op]:
            kpt.ops.op(op).infer(shapes.specs_of(op, dims, dtype), **shapes.PARAMS.get(op, {}))


def test_candidates_are_timed_and_the_faster_one_is_taken(with_slow):
    x, w = arguments()
    assert [s.kernel for s in kpt_torch.plan(normalised, x, w).sites] == ["rms_norm.slow"]
    result = kpt.auto_optimize(normalised, x, w)
    (site,) = kpt_torch.plan(normalised, x, w).sites
    assert site.kernel == "rms_norm.torch" and site.reason.startswith("Measured ")
    assert any("Kernels of 1 kind of call were timed" in n for n in result.plan.notes)


def test_a_kernel_that_loses_beside_one_that_wins_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setenv("KPT_CACHE_DIR", str(tmp_path))
    # It loses tenfold at the least; what a busy machine does to a median is less than threefold.
    monkeypatch.setattr("kpt.strategy.leave_out.gain", lambda before, after: (gain(before, after)[0], math.log(3)))
    monkeypatch.setattr("kpt.strategy.leave_out.sigmas", lambda count: 1.0)
    monkeypatch.setattr("kpt_torch.auto.rounds", lambda samples: {n: (2.0 if n == "original" else 1.0,) * 9 for n in samples})
    monkeypatch.setattr(registry, "_kernels", {k: s for k, s in registry._kernels.items() if s.op != "rms_norm"})
    registry.register(KernelSpec("rms_norm.late_at_32", "rms_norm", 1, "test", "torch", ("cpu",), "tests.slow_kernels:torch_rms_norm_late_at_32",
                                 ("float32",), efficiency=1.0))  # fmt: skip

    def both(x, w, wide, v):
        return normalised(x, w) + normalised(wide, v)

    given = *arguments(), torch.randn(64, 48), torch.ones(48, requires_grad=True)
    result = kpt.auto_optimize(both, *given, budget="200s")
    (site,), (left,) = result.plan.sites, result.plan.skipped
    assert site.specs["x"].shape == (64, 48) and site.certificate is not None and result.report.kept
    assert left.specs["x"].shape == (64, 32) and re.search("Measured: the program is .*% faster without rms_norm.late_at_32", left.reason)
    assert any(n.startswith("rms_norm (1 site): left as written, the program is") for n in result.plan.notes)
    assert any(n.startswith("The whole program on example inputs") for n in result.plan.notes)
    close(result.fn(*given), both(*given))
    assert len(kpt.auto_optimize(both, *given, budget=0).plan.sites) == 2, "nothing is left out where there is no time to find out"


def test_a_hook_that_a_submodule_gets_later_runs():
    model = block().eval()
    fast = kpt_torch.optimize(model)
    before = fast(inputs())
    with_hook = next(m for m in model.modules() if m is not model and not list(m.children())).register_forward_hook(lambda m, i, o: o * 3)
    assert not torch.allclose(fast(inputs()), before)
    torch.testing.assert_close(fast(inputs()), model(inputs()))
    with_hook.remove()
    torch.testing.assert_close(fast(inputs()), before)


def test_a_forward_derivative_is_that_of_the_code_as_it_was_written():
    module = block(counts=False).eval()
    fast, t = kpt_torch.optimize(module), inputs(b=2).flip(0)
    close(fast(inputs()), module(inputs()))
    close(torch.func.jvp(fast, (inputs(),), (t,)), torch.func.jvp(module, (inputs(),), (t,)))

    def dual(m):
        with forward_ad.dual_level():
            return tuple(forward_ad.unpack_dual(m(forward_ad.make_dual(inputs(), t))))

    close(dual(fast), dual(module))


def test_optimize_is_a_function_whatever_was_imported_before():
    code = "import kpt, torch; kpt.auto_optimize(torch.nn.ReLU(), torch.ones(2), budget=0); import kpt_torch; kpt_torch.optimize(torch.nn.ReLU())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_sources_name_functions_as_they_were_written():
    def scaled(x):
        y = rms(x + 1)
        torch._dynamo.graph_break()
        return rms(y * 2)

    sources = [s.source for s in kpt_torch.plan(scaled, torch.randn(2, 12, 16)).sites]
    assert len(sources) == 2 and all(re.fullmatch(r"test_modules\.py:\d+ \((rms|scaled)\)", s) for s in sources), sources
