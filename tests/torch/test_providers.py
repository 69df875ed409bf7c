"""The providers in plain torch: custom ops as torch.library wants them; chunks; what each refuses."""

from __future__ import annotations

import dataclasses
import json
import weakref

import numpy as np
import pytest
import torch
from functorch.compile import aot_function, nop
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import kpt
from kpt.errors import KernelError, OpError
from kpt.kernels.spec import refusal
from kpt.kernels.stand_in import standing_for
from kpt.ops import Bias, Causal, Explicit, Lengths, Mask, Spec
from kpt_torch.kernels import rows
from kpt_torch.library import kernel
from kpt_torch.planner import Front

N, D, V = 6, 8, 11
LABELS = torch.tensor([0, 3, V + 5, -100, 7, 10], dtype=torch.int32)


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=dtype).requires_grad_()


CALLS = {
    "rms_norm": (rows.rms_norm, [normal(2, 3, D), normal(D), None], {"eps": 1e-5}),
    "rms_norm with residual": (rows.rms_norm, [normal(2, 3, D), normal(D), normal(2, 3, D)], {"eps": 1e-5, "weight_offset": 1.0}),
    "layer_norm": (rows.layer_norm, [normal(N, D), normal(D), normal(D), None], {"out_dtype": "bfloat16"}),
    "rope": (rows.rope, [normal(2, 5, 3, D), normal(1, 5, 6), normal(1, 5, 6)], {"interleaved": True}),
    "cross_entropy": (rows.cross_entropy, [normal(N, V), LABELS], {"label_smoothing": 0.1, "invalid": "zero"}),
    "linear_cross_entropy": (rows.linear_cross_entropy, [normal(N, D), normal(D, V), LABELS, normal(V), normal(N)],
                             {"logits_soft_cap": 4.0, "invalid": "drop"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    fn, arrays, params = CALLS[name]
    torch.library.opcheck(fn.definition, (*arrays, json.dumps(params)))


@pytest.mark.parametrize("name,given,says", [
    ("rms_norm.torch", {"x": normal(N, D), "epz": 1e-5}, "given epz.*mean eps"), ("layer_norm.torch", {"x": normal(N, D), "epz": 1e-5}, "mean eps"),
    ("layer_norm.torch", {"weight": normal(D)}, "called without x"), ("rope.torch", {"x": normal(2, 5, 3, D), "sine": normal(1, 5, 6)}, "mean sin"),
    ("attention.sdpa", dict.fromkeys("qkv", normal(2, 5, 3, D)) | {"scala": 1.0}, "given scala.*mean scale"),
    ("matmul.triton", {"a": normal(N, D)}, "called without b"),
])  # fmt: skip
def test_a_kernel_called_by_hand_checks_its_names(name, given, says):
    with pytest.raises(OpError, match=says):
        kpt.registry.load(name)(**given)


def test_logits_are_never_whole(monkeypatch):
    """Chunks of 64 rows give what one chunk gives, and no tensor as large as the logits is made."""
    x, w, labels = normal(512, D), normal(D, 1000), torch.randint(0, 1000, (512,))
    whole = rows.linear_cross_entropy(x=x, w=w, labels=labels)
    grads = torch.autograd.grad(whole.sum(), [x, w])
    monkeypatch.setattr(rows, "CHUNK_BYTES", 1)
    largest = 0
    real = rows._product

    def product(a, b):
        nonlocal largest
        out = real(a, b)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(rows, "_product", product)
    pieces = rows.linear_cross_entropy(x=x, w=w, labels=labels)
    again = torch.autograd.grad(pieces.sum(), [x, w])
    assert largest == 64 * 1000
    for got, want in zip((pieces, *again), (whole, *grads), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fill", [float("-inf"), -1e30])
def test_a_query_that_sees_nothing_is_what_the_mask_says(fill):
    attention, op = kpt.registry.load("attention.sdpa"), kpt.ops.op("attention")
    q, k, v = (torch.randn(2, 5, 2, 4) for _ in range(3))
    params = {"mask": Mask((Causal(0), Lengths()), fill)}
    lengths = torch.tensor([5, 0], dtype=torch.int32)
    got = attention(q=q, k=k, v=v, kv_lengths=lengths, **params)
    (want,) = op.reference(q=q.numpy(), k=k.numpy(), v=v.numpy(), kv_lengths=lengths.numpy(), **params)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, -1e9])
@pytest.mark.parametrize("said", ["as numbers", "as numbers that move", "as a mask"])
def test_scores_that_drown_in_a_mask_have_the_gradients_of_the_code(said, low):
    """A padded query's keys may all be hidden by the smallest float: softmax is even then, and yet has gradients through its scores."""
    g = torch.Generator().manual_seed(0)
    numbers = said != "as a mask"
    q, k, v = (torch.randn(2, 6, heads, 4, generator=g) for heads in (4, 2, 2))
    keep = (torch.arange(6) >= torch.tensor([[0], [3]]))[:, None, None] & torch.ones(6, 6, dtype=torch.bool).tril()
    bias = torch.where(keep, torch.randn(2, 1, 6, 6, generator=g) if numbers else 0.0, low)

    def written(q, k, v, bias):
        k, v = (a.repeat_interleave(2, 2).transpose(1, 2) for a in (k, v))
        return ((q.transpose(1, 2) @ k.mT / 2 + bias).softmax(-1) @ v).transpose(1, 2)

    def kernel(q, k, v, bias):
        attention = kpt.registry.load("attention.sdpa")
        if numbers:
            return attention(q=q, k=k, v=v, bias=bias, mask=Mask((Bias(),)))
        return attention(q=q, k=k, v=v, keep=keep, mask=Mask((Explicit(),), low, additive=True))

    def pulled(fn):
        given = [a.clone().requires_grad_() for a in (q, k, v)] + [bias.clone().requires_grad_(said == "as numbers that move")]
        out = fn(*given)
        return out, *torch.autograd.grad((out * torch.arange(6.0)[:, None, None]).sum(), [a for a in given if a.requires_grad])

    for got, want in zip(pulled(kernel), pulled(written), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


LOW, HIDDEN = float(torch.finfo(torch.float32).min), float("-inf")
ROWS = {
    "the smallest float and -inf": [LOW, HIDDEN, LOW, LOW, HIDDEN, HIDDEN], "one key": [HIDDEN, HIDDEN, LOW, HIDDEN, HIDDEN, HIDDEN],
    "the smallest float": [LOW] * 6, "-inf": [HIDDEN] * 6, "halves": [LOW] * 3 + [HIDDEN] * 3, "seen keys too": [LOW, 0.5, HIDDEN, LOW, 0.0, -1.0],
    "a lower one beside": [-3e38, LOW, -3e38, LOW, HIDDEN, -3e38], "beyond float16": [-1e5, HIDDEN, -1e5, LOW, -1e5, HIDDEN],
}  # fmt: skip


def drowned(row, dtype, words=Mask(), **given):  # noqa: B008
    """q, k, v and bias, of which the first and last query have this row and the others none, and the call of them."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, t, heads, 4, generator=g).to(dtype).requires_grad_() for t, heads in ((3, 4), (6, 2), (6, 2)))
    bias = torch.randn(2, 1, 3, 6, generator=g)
    bias[:, :, ::2] = torch.tensor(row)
    return {"q": q, "k": k, "v": v, "bias": bias} | given, {"mask": words & Mask((Bias(),))}


def held(arrays, params, dtype, kernel=None):
    """Holds result and gradients to the reference."""
    op, g = kpt.ops.op("attention"), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = (kernel or kpt.registry.load("attention.sdpa"))(**arrays, **params)
    moving = [n for n in ("q", "k", "v", "bias") if arrays[n].requires_grad]
    got = dict(zip(moving, torch.autograd.grad(out, [arrays[n] for n in moving], g), strict=True)) | {"out": out.detach()}
    plain = {n: a.detach().double().numpy() if a.is_floating_point() else a.numpy() for n, a in arrays.items()}
    want = op.reference_vjp((g.double().numpy(),), **plain, **params) | {"out": op.reference(**plain, **params)[0]}
    near = 1e-5 if dtype == torch.float32 else 0.03
    for n, a in got.items():
        np.testing.assert_allclose(a.double().numpy(), want[n], rtol=near, atol=near, err_msg=n)


@pytest.mark.parametrize("moves", [False, True])  # torch takes another back end for a bias that does
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row", ROWS)
def test_rows_of_a_mask_that_came_as_numbers(row, dtype, moves):
    arrays, params = drowned(ROWS[row], dtype)
    held(arrays | {"bias": arrays["bias"].requires_grad_(moves)}, params, dtype)


@pytest.mark.parametrize("row", [[-3e38] * 6, [LOW] * 6, [-3e38, LOW, HIDDEN, -3e38, LOW, LOW], [HIDDEN] * 6])
@pytest.mark.parametrize("keep", [[0, 1, 1, 0, 1, 1], [0] * 6])
@pytest.mark.parametrize("fill", [LOW, -1e30])
def test_numbers_may_hide_what_words_show(fill, row, keep):
    """What a query sees is not known by words alone: hidden keys weigh where the bias of all others is no higher than the fill."""
    keep = torch.tensor(keep, dtype=torch.bool).expand(2, 1, 3, 6)
    arrays, params = drowned(row, torch.float32, Mask((Explicit(),), fill), keep=keep)
    held(arrays, params, torch.float32)


def test_scores_that_drowned_where_a_compiler_traces():
    attention = kpt.registry.load("attention.sdpa")
    arrays, params = drowned(ROWS["halves"], torch.float32)
    g, q, k, v, bias = (a.detach().transpose(1, 2) for a in (arrays["q"], *list(arrays.values())[:3], arrays["bias"].transpose(1, 2)))
    torch.library.opcheck(torch.ops.kpt.attention_drowned, (g, q, k, v, bias, None, bias[..., :1] < -1, bias[..., :1] < -torch.inf, 0.5))
    traced = aot_function(lambda q, k, v, bias: attention(q=q, k=k, v=v, bias=bias, **params), nop)
    held(arrays, {"mask": params["mask"]}, torch.float32, lambda q, k, v, bias, mask: traced(q, k, v, bias))


@pytest.mark.parametrize("row", ["halves", "the smallest float", "seen keys too"])
def test_scores_that_drowned_while_a_graph_is_captured(row, monkeypatch):
    """Values cannot be asked for there: no row is left out."""
    monkeypatch.setattr("kpt_torch.kernels.attention._may_look", lambda t: False)
    held(*drowned(ROWS[row], torch.float32), torch.float32)


def test_a_soft_cap_is_refused():
    specs = dict.fromkeys(("q", "k", "v"), Spec((1, 8, 2, 16), "float32"))
    spec = kpt.registry.get("attention.sdpa")
    why = refusal(spec, "attention", kpt.hardware_profile("cpu"), "float32", specs, {"mask": Mask(), "logits_soft_cap": 30.0}, "balanced", "torch")
    assert why is not None and "logits_soft_cap" in why


def test_a_kernel_may_return_what_aliases():
    """Results and gradients of a custom op have memory of their own, whatever a kernel gives back."""

    def forward(arrays, params):
        return [arrays["x"]], []

    def backward(arrays, params, results, kept, cotangents, wanted):
        return dict.fromkeys(("x", "weight"), cotangents[0])

    copy = kernel("rms_norm", "test_alias", forward, backward)
    x = torch.randn(8, 8, requires_grad=True)
    y = copy(x=x)
    assert y.data_ptr() != x.data_ptr()
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(8, 8))


def early_thrice(name, last=None):
    """3 x, by a kernel that makes the gradient but for a factor in its forward pass, and writes it over what it kept in the last backward pass."""

    def forward(arrays, params):
        return [arrays["x"] * 3], [torch.full_like(arrays["x"], 3.0)] if params["early"] else []

    def backward(arrays, params, results, kept, cotangents, wanted):
        over = params.get("last", False)
        if last is not None:
            last.append((over, weakref.ref(kept[0])))
        made = kept[0].data.mul_(cotangents[0]) if over else kept[0] * cotangents[0]  # as a Triton kernel, unseen by torch
        return {"x": made}

    return kernel("rms_norm", name, forward, backward, kept=lambda specs, params: (specs["x"],) if params["early"] else (),
                  early=lambda arrays, names: " ".join(names))  # fmt: skip


def test_what_somebody_else_holds_is_not_written_over():
    last, held = [], []
    thrice = early_thrice("test_held", last)
    x = normal(4, D)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.detach()) or t, lambda t: t):
        y = thrice(x=x)
    was = [t.clone() for t in held]
    y.backward(torch.full((4, D), 2.0))
    assert torch.equal(x.grad, torch.full((4, D), 6.0))
    assert any(torch.equal(t, torch.full((4, D), 3.0)) for t in held), "hooks see what is kept"
    assert all(torch.equal(a, b) for a, b in zip(held, was, strict=True))
    z = thrice(x=x)
    shown = z.grad_fn.saved_tensors
    was = [t.clone() for t in shown]
    z.backward(torch.full((4, D), 2.0))
    assert all(torch.equal(a, b) for a, b in zip(shown, was, strict=True))
    assert [over for over, _ in last] == [False, True]
    assert last[1][1]() is None and z.grad_fn is not None, "freed with what autograd saved"


def test_forward_derivatives_are_refused_in_words():
    x, w = normal(4, D).detach(), normal(D).detach()
    norm = lambda x: rows.rms_norm(x=x, weight=w)  # noqa: E731
    with pytest.raises(KernelError, match="forward derivative"):
        torch.func.jvp(norm, (x,), (x,))
    with forward_ad.dual_level():
        norm(x)  # has no tangent
        with pytest.raises(KernelError, match="forward derivative"):
            norm(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("compiled", [False, True])
def test_what_was_kept_is_written_over_once_at_most(compiled):
    """A kernel whose forward pass makes the gradient but for a factor: told only where it is asked for, and overwritten in the last pass alone."""
    told, last = [], []

    def forward(arrays, params):
        told.append(params["early"])
        return [arrays["x"] * 3], [torch.full_like(arrays["x"], 3.0)] if params["early"] else []

    def backward(arrays, params, results, kept, cotangents, wanted):
        last.append(params.get("last", False))
        return {"x": torch.mul(kept[0], cotangents[0], out=kept[0] if last[-1] else torch.empty_like(kept[0]))}

    thrice = kernel(
        "rms_norm", f"test_early_{compiled}".lower(), forward, backward,
        kept=lambda specs, params: (specs["x"],) if params["early"] else (), early=lambda arrays, names: " ".join(names),
    )  # fmt: skip
    call, without = (aot_function(lambda x: thrice(x=x), nop) if compiled else lambda x: thrice(x=x) for _ in range(2))
    x = torch.randn(4, 8).t().requires_grad_()
    with torch.no_grad():
        without(x)
    y = call(x)
    (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(2 * y.sum(), x)
    assert torch.equal(first, torch.full((8, 4), 3.0)) and torch.equal(second, torch.full((8, 4), 6.0))
    assert first.stride() == second.stride() == x.stride()
    assert told[0] == "" and told[-1] == "x"
    assert last == [False, not compiled]


class Seen(TorchDispatchMode):
    """The custom ops that pass the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names += [func.name()] if func.namespace == "kpt" else []
        return func(*args, **(kwargs or {}))


def test_both_ways_to_run_a_kernel_agree():
    """Straight where nobody watches; through the dispatcher for modes and tracers, with the same bits."""
    x, w = normal(4, D), normal(D)

    def both(x, w):
        loss = (rows.rms_norm(x=x, weight=w, eps=1e-5) ** 2).sum()
        return loss, *torch.autograd.grad(loss, [x, w])

    straight = both(x, w)
    assert type(rows.rms_norm(x=x, weight=w).grad_fn).__name__ == "rms_norm_torchBackward"
    with Seen() as seen:
        watched = both(x, w)
    assert seen.names == ["kpt::rms_norm_torch", "kpt::rms_norm_torch_backward"]
    assert all(torch.equal(a, b) for a, b in zip(straight, watched, strict=True))
    traced = make_fx(lambda x: rows.rms_norm(x=x, weight=w.detach()))(x.detach())
    assert any(n.target is torch.ops.kpt.rms_norm_torch.default for n in traced.graph.nodes)


def test_a_failed_backward_pass_is_not_repeated_on_what_it_wrote_over():
    fails = [True, False]

    def backward(arrays, params, results, kept, cotangents, wanted):
        made = kept[0].data.mul_(cotangents[0]) if params.get("last") else kept[0] * cotangents[0]  # as a Triton kernel, unseen by torch
        if fails.pop(0):
            raise MemoryError("for a test")
        return {"x": made}

    thrice = kernel(
        dataclasses.replace(kpt.ops.op("rms_norm"), name="thrice"), "test_failing", lambda arrays, params: ([arrays["x"] * 3], [torch.full_like(arrays["x"], 3.0)] if params["early"] else []),
        backward, kept=lambda specs, params: (specs["x"],) if params["early"] else (), early=lambda arrays, names: " ".join(names),
    )  # fmt: skip
    x = normal(4, D)
    y = (2 * thrice(x=x)).sum()
    with pytest.raises(MemoryError):
        y.backward(retain_graph=True)  # nothing is written over
    y.backward(retain_graph=True)
    assert torch.equal(x.grad, torch.full((4, D), 6.0))
    fails[:] = [True]
    s = thrice(x=x)
    with pytest.raises(MemoryError):
        s.backward(torch.ones(4, D))
    with pytest.raises(KernelError, match="failed half way"):
        s.backward(torch.ones(4, D))
    fails[:] = [False]
    (g,) = torch.autograd.grad(thrice(x=x).sum(), x, create_graph=True, retain_graph=False)
    with pytest.raises(KernelError, match="gradient of a gradient"):
        g.sum().backward()


class Wrapped(torch.Tensor):
    pass


def test_who_watches():
    from torch.func import vmap

    from kpt_torch.library import nobody_watches

    plain = torch.ones(4, 4)
    with torch.inference_mode():
        inferred = torch.ones(2)
    assert nobody_watches([plain, None, torch.nn.Parameter(plain), plain.t()[1:], (plain.requires_grad_() * 2), inferred])
    lazy = torch._neg_view(torch.ones(2)), torch.ones(2, dtype=torch.complex64).conj(), torch._efficientzerotensor(2)
    for other in (*lazy, torch.ones(2, device="meta"), torch.ones(2).to_sparse(), torch.ones(2).as_subclass(Wrapped)):
        assert not nobody_watches([plain, other])
    seen = []
    vmap(lambda v: (seen.append(nobody_watches([v])), v)[1])(torch.ones(2, 3))
    with Seen():
        seen.append(nobody_watches([plain]))
    with torch.device("cpu"):
        seen.append(nobody_watches([plain]))
    torch.jit.trace(lambda v: (seen.append(nobody_watches([v])), v * 2)[1], torch.ones(2), check_trace=False)
    make_fx(lambda v: (seen.append(nobody_watches([v])), v * 2)[1], pre_dispatch=True)(torch.ones(2))
    assert seen == [False] * 5


def test_gradients_have_memory_of_their_own():
    x, w, r = normal(4, D), normal(D), normal(4, D)
    y, h = rows.rms_norm(x=x, weight=w, residual=r)
    (dx, dr) = torch.autograd.grad(y.sum() + h.sum(), (x, r))
    assert torch.equal(dx, dr) and dx.data_ptr() != dr.data_ptr()


def test_a_result_that_no_backward_pass_reads_may_be_written_into():
    """As that of the code: a program may scale what a norm returns, or a loss, and differentiate it."""
    x, w, r = normal(4, D), normal(D), normal(4, D)
    for arrays in ({"x": x, "weight": w}, {"x": x, "weight": w, "residual": r}):
        (want,) = torch.autograd.grad(3 * y.sum() if torch.is_tensor(y := rows.rms_norm(**arrays)) else 3 * y[0].sum(), x)
        y = rows.rms_norm(**arrays)
        y = y if torch.is_tensor(y) else y[0]
        y.mul_(3)
        (got,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(got, want)
    _, h = rows.rms_norm(x=x, weight=w, residual=r)
    h.mul_(3)  # which is read
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_several_cotangents_at_once():
    x, w, r, g = normal(4, D), normal(D), normal(4, D), normal(3, 4, D).detach()
    for y in (rows.rms_norm(x=x, weight=w), rows.rms_norm(x=x, weight=w, residual=r)[1]):
        pulled = lambda v, y=y: torch.autograd.grad(y, x, v, retain_graph=True)[0]  # noqa: E731
        torch.testing.assert_close(torch.func.vmap(pulled)(g), torch.stack([pulled(v) for v in g]))
        batched = lambda v, y=y: torch.autograd.grad(y, x, v, retain_graph=True, is_grads_batched=True)[0]  # noqa: E731
        torch.testing.assert_close(batched(g), torch.stack([pulled(v) for v in g]))
        nested = torch._vmap_internals._vmap(batched)(torch.stack([g, 2 * g]))
        torch.testing.assert_close(nested, torch.stack([batched(g), batched(2 * g)]))


def test_what_was_kept_is_freed_where_the_backward_pass_is_watched():
    kept = []

    def forward(arrays, params):
        kept.append(torch.ones_like(arrays["x"]))
        return [arrays["x"] * 2], [kept[-1]]

    twice = kernel("rms_norm", "test_freed", forward, lambda arrays, params, results, kept, cotangents, wanted: {"x": cotangents[0] * 2},
                   kept=lambda specs, params: (specs["x"],))  # fmt: skip
    y = twice(x=normal(4, D))
    held = weakref.ref(kept.pop())
    with Seen():
        y.sum().backward()
    assert held() is None


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_a_proof_leaves_nothing_in_cudnn():
    front = Front(torch.fx.GraphModule({}, torch.fx.Graph()), None, torch.device("cuda"))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with front.proving():
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_a_short_call_is_cut_as_the_long_one_that_it_stands_for(monkeypatch):
    monkeypatch.setattr(rows, "CHUNK_BYTES", 1 << 20)
    count = len(rows._chunks(8192, 4000))
    assert count > 100 and len(rows._chunks(1000, 80)) < 10
    with standing_for({"x": Spec((8, 1024, 16), "float32"), "w": Spec((16, 4000), "float32")}):
        chunks = rows._chunks(1000, 80)
    assert 0.8 * count < len(chunks) <= count and [i for c in chunks for i in range(c.start, c.stop)] == list(range(1000))
