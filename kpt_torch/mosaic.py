"""The Pallas kernels for NVIDIA Hopper, on tensors: JAX traces them, Mosaic compiles them, PyTorch runs them.

    attention = library.kernel("attention", "mosaic", ...)      # the custom op kpt::attention_mosaic, behind `attention.mosaic`

`plgpu.as_torch_kernel` makes a function of tensors of one that is a single kernel and nothing else. A pass of ours is a few kernels,
tables that say which block does what, and small sums between them. So a pass is traced to a jaxpr once for each set of shapes: its kernels
go through `as_torch_kernel`, its constants become tensors, and the handful of elementwise ops that stand between are torch's. jax is
imported when the first kernel is asked for, never with kpt_torch.

The kernels of norms are not among them: on an H100 six small calls ended with jax's "Failed to compile the module", and large
ones took longer than the kernels in Triton.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from kpt.errors import KernelError
from kpt.ops.base import Spec, Specs
from kpt.ops.mask import Mask
from kpt_torch import library
from kpt_torch.library import Tensors, spec_of, torch_dtype

ALIGNED = 16
"""Bytes at whose multiples the copy engine and the widest loads begin. XLA's buffers all do; a view of a tensor may not."""
INLINED = {"jit": "jaxpr", "custom_vmap_call": "call"}
"""Calls of one jaxpr, and the parameter that holds it."""


def _broadcast(p: Any, x: torch.Tensor) -> torch.Tensor:
    shape = [1] * len(p["shape"])
    for axis, size in zip(p["broadcast_dimensions"], x.shape, strict=True):
        shape[axis] = size
    return x.reshape(shape).expand(p["shape"])


def _padded(p: Any, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    config = p["padding_config"]
    assert all(inner == 0 for _, _, inner in config)
    return F.pad(x, [n for low, high, _ in reversed(config) for n in (low, high)], value=float(value))


OPS: dict[str, Callable[..., torch.Tensor]] = {
    "broadcast_in_dim": _broadcast,
    "convert_element_type": lambda p, x: x.to(torch_dtype(str(p["new_dtype"]))),
    "eq": lambda p, x, y: x == y,
    "mul": lambda p, x, y: x * y,
    "pad": _padded,
    "reduce_sum": lambda p, x: x.sum(p["axes"], dtype=x.dtype),
    "select_n": lambda p, which, no, yes: torch.where(which, yes, no),
    "slice": lambda p, x: x[tuple(map(slice, p["start_indices"], p["limit_indices"], p["strides"] or [1] * x.dim()))],
    "transpose": lambda p, x: x.permute(p["permutation"]),
}
"""What stands between kernels, as torch ops: `op(the primitive's parameters, *operands)`."""


class Program:
    """A function of JAX arrays, traced, as one of tensors.

    Args:
      traced: its `ClosedJaxpr`.
    """

    def __init__(self, traced: Any):
        self.traced = traced
        self.kernels: dict[int, Callable[..., Any]] = {}
        self.constants: dict[tuple[int, torch.device], torch.Tensor] = {}

    def __call__(self, *arrays: torch.Tensor) -> list[torch.Tensor]:
        device = arrays[0].device
        with _as_mosaic_launches(device) as hand_over:
            return hand_over(self._run(self.traced.jaxpr, self.traced.consts, arrays, device))

    def _run(self, jaxpr: Any, consts: Sequence[Any], arrays: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        env = dict(zip(jaxpr.constvars, (self._constant(c, device) for c in consts), strict=True))
        env |= zip(jaxpr.invars, arrays, strict=True)

        def read(v: Any) -> torch.Tensor:
            if hasattr(v, "val"):  # a literal
                number = v.val.item() if hasattr(v.val, "item") else v.val
                return torch.full((), number, dtype=torch_dtype(str(v.aval.dtype)), device=device)
            return env[v]

        for eqn in jaxpr.eqns:
            given, name = [read(v) for v in eqn.invars], eqn.primitive.name
            if name in OPS:
                made: Sequence[torch.Tensor] = [OPS[name](eqn.params, *given)]
            elif name in INLINED:
                body = eqn.params[INLINED[name]]
                made = self._run(body.jaxpr, body.consts, given, device)
            else:
                made = self._kernel(eqn)(*map(_in_place, given))
            env |= zip(eqn.outvars, made, strict=True)
        return [read(v) for v in jaxpr.outvars]

    def _constant(self, c: Any, device: torch.device) -> torch.Tensor:
        import numpy as np

        key = id(c), device  # of what `traced` keeps alive
        if key not in self.constants:
            self.constants[key] = torch.from_numpy(np.array(c)).to(device)
        return self.constants[key]

    def _kernel(self, eqn: Any) -> Callable[..., Any]:
        if id(eqn) not in self.kernels:

            def alone(*arrays: Any) -> tuple[Any, ...]:
                return tuple(eqn.primitive.bind(*arrays, **eqn.params))

            self.kernels[id(eqn)] = as_torch_kernel(alone, str(eqn.params.get("name", eqn.primitive.name)))
        return self.kernels[id(eqn)]


def as_torch_kernel(fn: Callable[..., Any], name: str) -> Callable[..., Any]:
    """jax's, whose words for what is no kernel are a program of MLIR.

    Raises:
      KernelError: when it is called, if this is neither a kernel nor something that stands between kernels here.
    """
    import jax.experimental.pallas.mosaic_gpu as plgpu

    launch = plgpu.as_torch_kernel(fn)

    def call(*arrays: torch.Tensor) -> Any:
        try:
            return launch(*arrays)
        except ValueError as error:
            raise KernelError(f"{name} of a kernel's program was to run on tensors", f"plgpu.as_torch_kernel said: {str(error)[:300]}",
                              "Keep the original there, or another kernel, and report this call") from error  # fmt: skip

    return call


def _in_place(t: torch.Tensor) -> torch.Tensor:
    """As a kernel reads it: by its address alone."""
    t = t.contiguous()
    return t if t.data_ptr() % ALIGNED == 0 else t.clone()


@contextlib.contextmanager
def _as_mosaic_launches(device: torch.device) -> Iterator[Callable[[list[torch.Tensor]], list[torch.Tensor]]]:
    """jax (0.11) launches on the current device's default stream, whatever the current stream is: so all of a program runs there.

    Raises:
      KernelError: a CUDA graph is being captured, to which the default stream does not belong.
    """
    if device.type != "cuda":
        yield lambda made: made
        return
    with torch.cuda.device(device):
        current, default = torch.cuda.current_stream(), torch.cuda.default_stream()
        if current == default:
            yield lambda made: made
            return
        if torch.cuda.is_current_stream_capturing():
            raise KernelError("A Mosaic kernel was to run while a CUDA graph is captured", "as_torch_kernel launches on the default stream",
                              "Capture no graph, or leave this module as it was written")  # fmt: skip

        def hand_over(made: list[torch.Tensor]) -> list[torch.Tensor]:
            current.wait_stream(default)
            for t in made:
                t.record_stream(current)
            return made

        default.wait_stream(current)
        with torch.cuda.stream(default):
            yield hand_over


@functools.cache
def program(fn: Callable[..., Any], static: Any, specs: tuple[Spec | None, ...]) -> Program:
    """`fn(static, *arrays)` for arrays of these specs, traced once; results are those of its pytree that are not None."""
    import jax

    shapes = [None if s is None else jax.ShapeDtypeStruct(s.shape, s.dtype) for s in specs]
    return Program(jax.make_jaxpr(functools.partial(fn, static))(*shapes))


def run(fn: Callable[..., Any], static: Any, *tensors: torch.Tensor | None) -> list[torch.Tensor]:
    """`fn(static, *arrays)` of a JAX function on tensors; None is an array that is not there."""
    specs = tuple(None if t is None else spec_of(t) for t in tensors)
    return program(fn, static, specs)(*[t for t in tensors if t is not None])


def unavailable() -> str | None:
    """Why no Mosaic kernel runs on tensors in this process, in one clause, or None: by what is installed, without importing jax."""
    if not any(_is_there(f"jax_plugins.xla_cuda{major}") for major in (13, 12)):
        return "is compiled by jax's CUDA plugin, which is not installed: pip install 'jax[cuda13]', or cuda12 as your PyTorch has it"
    if "jax" not in sys.modules:
        # jax takes three quarters of the memory when it first looks at a GPU, and here it is to compile only.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return None


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package it is in
        return False


def _scores(q: torch.Tensor | Spec, k: torch.Tensor | Spec, params: Mapping[str, Any]) -> Any:
    """What the kernels of attention know before tracing."""
    from pallas_kernels.attention.calls import Static

    scale = q.shape[3] ** -0.5 if params.get("scale") is None else float(params["scale"])
    return Static(params.get("mask") or Mask(), scale, params.get("logits_soft_cap"), q.shape[1], k.shape[1])


def _attention_forward(static: Any, q: Any, k: Any, v: Any) -> Any:
    from pallas_kernels.attention.gpu import forward_rule

    return forward_rule(static, q, k, v, None)


def _attention_backward(static: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, g: Any) -> Any:
    from pallas_kernels.attention.gpu import backward_rule

    return backward_rule(static, q, k, v, None, out, lse, g)


def _attend(arrays: Tensors, params: dict[str, Any]) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    q, k, v = (arrays[n] for n in "qkv")
    out, lse = run(_attention_forward, _scores(q, k, params), q, k, v)
    return [out], [lse]


def _attend_backward(arrays: Tensors, params: Any, results: Any, kept: Any, cotangents: Any, wanted: Sequence[str]) -> Tensors:
    q, k, v = (arrays[n] for n in "qkv")
    found = run(_attention_backward, _scores(q, k, params), q, k, v, results[0], kept[0], cotangents[0])
    return dict(zip("qkv", found, strict=True))


def _sums_of_queries(specs: dict[str, Spec], params: dict[str, Any]) -> Sequence[Spec]:
    from pallas_kernels.attention.hopper_forward import forward_tiles

    (b, t, n, head), head_v = specs["q"].shape, specs["v"].shape[3]
    tile = forward_tiles(head, head_v, t).queries
    return (Spec((b, n, -(-t // tile) * tile), "float32"),)


attention = library.kernel("attention", "mosaic", _attend, _attend_backward, kept=_sums_of_queries, reads=(0,))


def refuse_attention(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why the kernels of attention cannot take a call, in one clause, or None: JAX pads and gathers what is refused here."""
    if (why := unavailable()) is not None:
        return why
    from pallas_kernels.attention.calls import HEADS, LONGEST_TILE, refused_on_one_hopper

    if (why := refused_on_one_hopper(specs, params)) is not None:
        return why
    q, k, v = (specs[n] for n in "qkv")
    if v.shape[3] != q.shape[3] or q.shape[3] not in HEADS:
        heads = " or ".join(map(str, HEADS))
        return f"is not given padded arrays here: takes head dims of {heads}, and these are {q.shape[3]} and {v.shape[3]}"
    for length in (q.shape[1], k.shape[1]):
        if length % 8 or length < LONGEST_TILE:
            return f"is not given padded arrays here: takes lengths from {LONGEST_TILE} on that 8 divides, and one is {length}"
    if params.get("out_dtype") not in (None, q.dtype):
        return f"rounds its output to {q.dtype} here, and {params['out_dtype']} was asked for"
    static = _scores(q, k, params)
    if static.scale <= 0:
        return f"multiplies scores with a positive scale, and this is {static.scale}"
    if static.by_data or static.may_be_blind:
        return "takes masks of positions here under which every query sees a key"
    return None
