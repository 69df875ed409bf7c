"""Launches that pass Triton by: what one compilation is for, and what is handed to it."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import threading
import types

import pytest
import torch

pytest.importorskip("triton", reason="launches of the Triton kernels are tested; it comes with PyTorch for Linux")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

import kpt
from kpt.ops import Spec
from kpt_torch.library import torch_dtype
from kpt_torch.shapes import PARAMS, specs_of
from kpt_torch.triton_kernels import launch

BUFFER = torch.zeros(64, dtype=torch.float32)
ARGUMENTS = [
    None, 0, 1, 2, 16, 17, 32, -16, 2**31 - 1, 2**31, 2**31 + 16, 2**40, -(2**31) - 16, 1.0, 0.5, True, False,
    BUFFER, BUFFER[1:], BUFFER[4:], BUFFER.to(torch.bfloat16), BUFFER.to(torch.int64), torch.nn.Parameter(BUFFER),
]  # fmt: skip


def test_what_triton_compiles_anew_for_is_told_apart():
    def kernel(x):
        pass

    fn = triton.jit(kernel)
    bind = create_function_from_signature(fn.signature, fn.params, make_backend(GPUTarget("cuda", 90, 32)))
    seen = [(repr(bind(a, debug=False)[1]), launch._kind(a)) for a in ARGUMENTS]
    apart = [(a, b) for a, b in itertools.combinations(seen, 2) if a[0] != b[0]]
    assert len(apart) > 100
    assert not [(a, b) for a, b in apart if a[1] == b[1]]


class Compiled:
    def __init__(self):
        self.launches = []
        self.function, self.packed_metadata = "function", "metadata"

    def run(self, *given):
        self.launches.append(given)


class Kernel:
    """As Triton's, of arguments `x`, `n` and `SIZE`."""

    arg_names = ("x", "n", "SIZE")

    def __init__(self):
        self.made, self.asked = [], 0

    def __getitem__(self, grid):
        def start(*args, **constants):
            self.asked += 1
            self.made.append(Compiled())
            return self.made[-1]

        return start


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(launch, "_LAUNCHES", True)
    monkeypatch.setattr(launch, "_COMPILED", {})
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)


def test_the_second_launch_is_of_what_the_first_one_compiled(on_gpu):
    kernel, x = Kernel(), BUFFER
    launch.run(kernel, (3,), x, 20, SIZE=64, num_warps=4)
    launch.run(kernel, (5, 2), x, 36, SIZE=64, num_warps=4)
    assert kernel.asked == 1
    assert kernel.made[0].launches == [(5, 2, 1, 7, "function", "metadata", None, None, None, x, 36, 64)]


@pytest.mark.parametrize(
    "other", [{"x": BUFFER[1:]}, {"x": BUFFER.half()}, {"n": 16}, {"n": 1}, {"n": 2**33 + 1}, {"SIZE": 32}, {"num_warps": 8}], ids=str
)
def test_what_is_another_compilation_goes_to_triton(on_gpu, other):
    kernel, at = Kernel(), {"x": BUFFER, "n": 20, "SIZE": 64, "num_warps": 4}
    for given in (at, at | other):
        launch.run(kernel, (1,), given["x"], given["n"], SIZE=given["SIZE"], num_warps=given["num_warps"])
    assert kernel.asked == 2


def test_a_profiler_of_triton_sees_every_launch(on_gpu, monkeypatch):
    kernel = Kernel()
    monkeypatch.setattr(launch, "_is_watched", lambda: True)
    for _ in range(3):
        launch.run(kernel, (1,), BUFFER, 20, SIZE=64)
    assert kernel.asked == 3


def test_hooks_are_seen():
    hooks = triton.knobs.runtime.launch_enter_hook
    assert not launch._is_watched()
    watch = lambda metadata: None  # noqa: E731
    hooks.add(watch)
    try:
        assert launch._is_watched()
    finally:
        hooks.remove(watch)


SHAPES = {
    "rms_norm": (64, 256), "layer_norm": (64, 256), "cross_entropy": (32, 512), "rope": (2, 64, 4, 64), "linear_cross_entropy": (64, 128, 512),
    "glu": (64, 128, 256), "attention": (2, 64, 4, 64),
}  # fmt: skip
PRODUCTS = {"linear_act": ("x", "w"), "matmul": ("a", "b")}


def keys_of(monkeypatch, call):
    """What Triton would compile for the launches of a call, none of which runs."""
    found = set()

    def note(kernel, grid, *args, **constants):
        kinds = [(a.dtype, True) if isinstance(a, torch.Tensor) else launch._kind(a) for a in args]
        found.add((kernel.fn.__name__, *kinds, *constants.items()))

    with monkeypatch.context() as patch:
        patch.setattr(launch, "run", note)
        call()
    return found


@pytest.mark.parametrize("op", [*SHAPES, *PRODUCTS])
def test_what_is_compiled_ahead_is_what_both_passes_launch(monkeypatch, op):
    params = PARAMS.get(op, {})
    if op in PRODUCTS:
        specs = dict(zip(PRODUCTS[op], (Spec((64, 128), "bfloat16"), Spec((128, 256), "bfloat16")), strict=True))
    else:
        specs = specs_of(op, SHAPES[op], "bfloat16")
    if op == "linear_cross_entropy":
        params = {"invalid": "drop"}  # else the backward pass asks the device what it was given
    fn = kpt.registry.load(f"{op}.triton")

    def both():
        arrays = {n: torch.zeros(s.shape, dtype=torch_dtype(s.dtype)) for n, s in specs.items()}
        for a in arrays.values():
            a.requires_grad_(a.is_floating_point())
        out = fn(**arrays, **params)
        out.mean().backward() if "labels" in arrays else out.backward(torch.ones_like(out))

    launched = keys_of(monkeypatch, both)
    ahead = functools.partial(keys_of, monkeypatch, lambda: fn.ahead(specs, params, torch.device("cpu")))
    assert launched and launched <= ahead()
    with torch.autocast("cpu", torch.float16):  # a model is planned within its caller's; its kernels turn that off
        assert launched <= ahead()


def test_layer_norm_rounds_its_products(monkeypatch):
    specs = specs_of("layer_norm", (64, 256), "bfloat16")
    launched = keys_of(monkeypatch, lambda: kpt.registry.load("layer_norm.triton").ahead(specs, {}, torch.device("cpu")))
    assert [key[0] for key in launched if ("enable_fp_fusion", False) in key] == ["backward_whole"]


def test_kernels_are_compiled_side_by_side_and_none_runs(on_gpu):
    started, both = [], threading.Barrier(2, timeout=30)

    class Compiles(Kernel):
        device_caches = collections.defaultdict(dict)

        def warmup(self, *given, grid, **constants):
            started.append(given)
            both.wait()  # until the other one is being compiled, too
            return types.SimpleNamespace(run=None)

    with launch.compiled_ahead(torch.device("cuda", 0)):
        kernel = Compiles()
        for x in (BUFFER, BUFFER.half(), BUFFER):
            launch.run(kernel, (1,), x, 20, SIZE=64)
        elsewhere = threading.Thread(target=launch.run, args=(kernel, (1,), BUFFER, 20), kwargs={"SIZE": 64})
        elsewhere.start()
        elsewhere.join()
    assert sorted(map(repr, started)) == [repr((torch.float16, 20)), repr((torch.float32, 20))]
    assert kernel.asked == 1  # by the thread that does not compile ahead
    launch.run(kernel, (1,), BUFFER, 20, SIZE=64)
    assert kernel.asked + len(kernel.made[0].launches) == 2


def test_what_cannot_be_compiled_ahead_is_left_to_its_launch(on_gpu):
    class Fails(Kernel):
        device_caches = collections.defaultdict(dict)

        def warmup(self, *given, grid, **constants):
            raise RuntimeError("out of registers")

    kernel = Fails()
    with launch.compiled_ahead(torch.device("cuda", 0)):
        launch.run(kernel, (1,), BUFFER, 20, SIZE=64)
    launch.run(kernel, (1,), BUFFER, 20, SIZE=64)
    assert kernel.asked == 1


def test_an_interrupt_waits_for_no_compilation_that_has_not_begun(on_gpu):
    begun, end = [], threading.Event()

    class Compiles(Kernel):
        device_caches = collections.defaultdict(dict)

        def warmup(self, *given, grid, **constants):
            begun.append(given)
            end.wait(1)

    with pytest.raises(KeyboardInterrupt), launch.compiled_ahead(torch.device("cuda", 0)):
        for size in range(4 * launch.COMPILERS):
            launch.run(Compiles(), (1,), BUFFER, 20, SIZE=size)
        raise KeyboardInterrupt
    end.set()
    assert len(begun) <= launch.COMPILERS
