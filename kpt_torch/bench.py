"""Triton kernels beside PyTorch's own code, eager and compiled, and Liger where installed: `python -m kpt_torch.bench [OP]... --json FILE`.

Ours is held to the op's float64 reference at a reduced size; then each contender is timed as a CUDA graph of one call, so that no launch is
waited for (the losses that ask the device something cannot be captured; their kernels last milliseconds): medians of 20 samples of at
least 5 ms each, the contenders in a turning order in one process. Every shape is larger than the L2 cache. A rate counts each array once a
pass, and stands beside what a copy reached in the same run; that of products counts their operations.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
import math
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

import kpt
from kpt.errors import KernelError
from kpt.kernels.stand_in import standing_for
from kpt.kernels.validate import validate
from kpt.ops import Spec
from kpt_torch.library import torch_dtype
from kpt_torch.planner import calls
from kpt_torch.shapes import PARAMS, SHAPES, specs_of
from kpt_torch.triton_kernels import glu

SAMPLES, SAMPLE_MS = 20, 5.0
Arrays = dict[str, torch.Tensor]


def _rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return x * cos[:, :, None] + torch.cat((-b, a), -1) * sin[:, :, None]


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As models write it, who make float32 logits for the loss."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def _linear_cross_entropy(x: torch.Tensor, w: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((x @ w).float(), labels)


def _glu(x: torch.Tensor, w_gate: torch.Tensor, w_up: torch.Tensor) -> torch.Tensor:
    return F.silu(x @ w_gate) * (x @ w_up)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _attention(q, k, v)


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


class Swiglu(torch.autograd.Function):
    """What glu.triton does between its products."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        y = torch.empty_like(gate)
        glu.put_product(gate, up, y, "silu")
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        glu.put_gradients(gate, up, dy, dgate, dup, "silu")
        return dgate, dup


def _our_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return Swiglu.apply(gate, up)


PLAIN: dict[str, Callable[..., torch.Tensor]] = {
    "layer_norm": _layer_norm, "rms_norm": _rms_norm, "cross_entropy": _cross_entropy, "rope": _rope,
    "linear_cross_entropy": _linear_cross_entropy, "glu": _glu, "swiglu": _swiglu, "attention": _attention,
}  # fmt: skip
# Module and function of Liger, and how it is called. Its cross entropy makes the gradient in the forward pass, in place of the logits, and
# its rope turns q and k in place: it is given arrays of its own, and half of the heads as either.
LIGER: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "layer_norm": ("layer_norm", "LigerLayerNormFunction", lambda f, x, weight, bias: f(x, weight, bias, 1e-6)),
    "rms_norm": ("rms_norm", "LigerRMSNormFunction", lambda f, x, weight: f(x, weight, 1e-6, 0.0, "llama", False)),
    "cross_entropy": ("cross_entropy", "LigerCrossEntropyFunction",
                      lambda f, logits, labels: f(logits, labels, None, -100, 0.0, 0.0, "none")[0]),
    "rope": ("rope", "LigerRopeFunction", lambda f, x, cos, sin: f(*x.transpose(1, 2).chunk(2, 1), cos, sin)),
    "linear_cross_entropy": ("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction",
                             lambda f, x, w, labels: f(x, w.t(), labels)[0]),
    "glu": ("swiglu", "LigerSiLUMulFunction", lambda f, x, w_gate, w_up: f(x @ w_gate, x @ w_up)),
    "swiglu": ("swiglu", "LigerSiLUMulFunction", lambda f, gate, up: f(gate, up)),
}  # fmt: skip
UNCAPTURED = {"linear_cross_entropy", ("cross_entropy", "liger")}


def _liger(op: str) -> dict[str, Callable[..., Any]]:
    """Liger's kernel of the op, where Liger is installed."""
    if op not in LIGER:
        return {}
    module, name, call = LIGER[op]
    try:
        function = getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)
    except ImportError:
        return {}
    return {"liger": functools.partial(call, function.apply)}


def _random(specs: dict[str, Spec], both: bool) -> Arrays:
    made: Arrays = {}
    for n, s in specs.items():
        if s.dtype == "int64":
            made[n] = torch.randint(0, specs["logits" if "logits" in specs else "w"].shape[-1], s.shape, device="cuda")
            continue
        turned = n.startswith("w") and len(s.shape) == 2
        made[n] = torch.randn(s.shape[::-1] if turned else s.shape, device="cuda", dtype=torch_dtype(s.dtype))
        if turned:  # the transpose of what lies in memory, as torch's linear layers have it
            made[n] = made[n].mul_(s.shape[0] ** -0.5).t()
        made[n].requires_grad_(both and n not in ("cos", "sin"))
    return made


def _bytes(op: str, arrays: Arrays, out: Spec, both: bool) -> int:
    """Bytes that must cross memory: inputs and the result; backward inputs but a rotated x, the cotangent and gradients."""
    inputs = sum(t.nbytes for t in arrays.values())
    result = math.prod(out.shape) * torch_dtype(out.dtype).itemsize
    again = inputs - (arrays["x"].nbytes if op == "rope" else 0)
    return inputs + result + (again + result + sum(t.nbytes for t in arrays.values() if t.requires_grad) if both else 0)


def _error(op: str, fn: Callable[..., Any], dtype: str, shape: Sequence[int]) -> float:
    """Largest certified error relative to float64, at fewer rows."""
    small = {"rope": (1, 64, *shape[2:]), "linear_cross_entropy": (512, 256, 16384), "glu": (64, 512, 1024),
             "attention": (1, 300, 2, shape[-1])}.get(op, (64, *shape[1:]))
    run, run_vjp = calls(kpt.ops.op(op).differentiable, "cuda")
    with standing_for(specs_of(op, shape, dtype)):
        got = validate(fn, kpt.ops.op(op), specs_of(op, small, dtype), PARAMS.get(op, {}), run=run, run_vjp=run_vjp, seeds=[0])
    if not got.passed:
        raise KernelError(f"{op} was to be timed", got.summary(), "A kernel that is wrong is not timed")
    return max(got.worst(gradient=False) or 0.0, got.worst(gradient=True) or 0.0)


def _passes(fn: Callable[..., Any], arrays: Arrays, cotangent: torch.Tensor | None) -> Any:
    """Forward, and backward where a cotangent is given."""
    if cotangent is None:
        with torch.no_grad():
            return fn(**arrays)
    out = fn(**arrays)
    given = cotangent.transpose(1, 2).chunk(2, 1) if isinstance(out, tuple) else cotangent  # q and k of Liger's rope
    return torch.autograd.grad(out, [t for t in arrays.values() if t.requires_grad], given)


def _peak(call: Callable[[], Any]) -> int:
    """Bytes that a call takes beyond its arrays; its gradients are among them."""
    for _ in range(2):  # the first one compiles
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
    return torch.cuda.max_memory_allocated() - before


def _graph(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def _sample(replay: Callable[[], Any], times: int) -> float:
    """Milliseconds of a call, over `times` of them."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / times


def timed(replays: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Samples of each, in turning order."""
    times = {n: max(1, int(SAMPLE_MS / max(_sample(r, 3), 1e-3))) for n, r in replays.items()}
    names = list(replays)
    found: dict[str, list[float]] = {n: [] for n in replays}
    for i in range(SAMPLES):
        for n in names[i % len(names) :] + names[: i % len(names)]:
            found[n].append(_sample(replays[n], times[n]))
    return found


def measure(op: str, shape: Sequence[int], dtype: str, both: bool) -> list[dict[str, Any]]:
    """A row for each contender at one shape; `problem` in place of figures where one fails."""
    specs = specs_of(op, shape, dtype)
    arrays = _random(specs, both)
    out = {"linear_cross_entropy": Spec((), "float32"), "swiglu": Spec(tuple(shape), dtype)}.get(op) or kpt.ops.op(op).infer(specs)[0]
    # One for all graphs, as long as they are: making a graph gives unused memory back, and what another still reads with it.
    cotangent = torch.randn(out.shape, device="cuda", dtype=torch_dtype(out.dtype)) if both else None
    plain, triton_kernel = PLAIN[op], kpt.registry.load(f"{op}.triton") if op != "swiglu" else _our_swiglu
    contenders = {f"{op}.triton": triton_kernel, "eager": plain, "torch.compile": torch.compile(plain)} | _liger(op)
    if op == "linear_cross_entropy":  # under a mean, as models have it
        contenders[f"{op}.triton"] = lambda **given: triton_kernel(**given).mean()
    if op == "attention":
        contenders = {f"{op}.triton": functools.partial(triton_kernel, **PARAMS[op]), "eager": plain, "cudnn": _cudnn}
    its_own = {n: t.detach().clone().requires_grad_(t.requires_grad) for n, t in arrays.items()} if "liger" in contenders else {}
    rows, replays = [], {}
    for name, fn in contenders.items():
        row: dict[str, Any] = {"op": op, "shape": list(shape), "dtype": dtype, "passes": "both" if both else "forward", "contender": name}
        rows.append(row)
        try:
            if name == f"{op}.triton" and op != "swiglu":  # a part of glu, which is held to float64
                row["error"] = _error(op, triton_kernel, dtype, shape)
            call = functools.partial(_passes, fn, its_own if name == "liger" else arrays, cotangent)
            row["peak_bytes"] = _peak(call)
            replays[name] = call if op in UNCAPTURED or (op, name) in UNCAPTURED else _graph(call).replay
        except Exception as e:  # one contender that fails is a row that says so
            row["problem"] = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
    moved = _bytes(op, arrays, out, both)
    for name, samples in timed(replays).items():
        low, median, high = (float(q) for q in np.percentile(samples, [25, 50, 75]))
        row = next(r for r in rows if r["contender"] == name)
        row |= {"ms": median, "low": low, "high": high}
        if op == "attention":  # four products' operations, half of them hidden; 3.5 times as many with the backward pass
            batch, length, heads, width = shape
            row["tflop_per_s"] = 2 * batch * heads * length**2 * width * (3.5 if both else 1) / median / 1e9
        elif len(shape) == 3:
            row["tflop_per_s"] = 2 * math.prod(shape) * (3 if both else 1) * (2 if op == "glu" else 1) / median / 1e9
        else:
            row["gb_per_s"] = moved / median / 1e6
    return rows


def copy_rate() -> float:
    """GB/s of a copy of a gigabyte, bytes read and written."""
    a = torch.randn(2**28, device="cuda")
    b = torch.empty_like(a)
    samples = timed({"copy": _graph(lambda: b.copy_(a)).replay})["copy"]
    return 2 * 4 * a.numel() / statistics.median(samples) / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kpt_torch.bench", description=__doc__.splitlines()[0])
    parser.add_argument("op", nargs="*", choices=[*PLAIN, []], help="default: all")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    copied = copy_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, copy {copied:.0f} GB/s")
    rows = []
    for op in given.op or PLAIN:
        for shape in SHAPES[op]:
            for both in (False, True):
                torch.compiler.reset()
                for row in measure(op, shape, given.dtype, both):
                    rows.append(row)
                    rate = f"{row['gb_per_s']:6.0f} GB/s" if "gb_per_s" in row else f"{row.get('tflop_per_s', 0):6.0f} TFLOP/s"
                    peak = f"{row.get('peak_bytes', 0) / 2**30:6.2f} GiB"
                    figures = f"{row['ms']:8.4f} ms {rate} {peak}" if "ms" in row else row.get("problem", "")
                    print(f"{op:14} {'x'.join(map(str, shape)):16} {row['passes']:8} {row['contender']:22} {figures}", flush=True)
                torch.cuda.empty_cache()
    if given.json:
        about = {
            "kind": "kpt_torch.bench",
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "clock": "CUDA events around graph replays",
            "copy_gb_per_s": copied,
        }
        given.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
