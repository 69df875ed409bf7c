"""What `kpt bench` measures: for each op its shapes, the code that people write, and other libraries' kernels."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kpt import ops
from kpt.ops.base import Spec, Specs
from kpt.ops.mask import Causal, Mask, Segments, Window

Call = Callable[..., Any]
NO_MASK, CAUSAL = Mask(), Mask((Causal(),))
WINDOW = Mask((Causal(), Window(1023, None)))
DOCUMENTS = Mask((Causal(), Segments()), fill=-1e30)


@dataclasses.dataclass(frozen=True)
class Bench:
    """One op as it is measured.

    Attributes:
      op: the op's name.
      dims: what the numbers of a shape mean, "M K N".
      specs: `specs(dtype, *dims)`.
      params: of the op.
      shapes: measured where none is given, on a GPU or TPU and on a CPU.
      small: `small(*dims)`, a shape that a float64 reference can be had for.
      plain: the code that people write, by the op's arrays.
      peers: other libraries' functions, by name: module to import, and `make(module) -> function of the op's arrays`.
      averaged: whether the results are losses that are averaged, so that all have one cotangent.
      backward: what the backward pass costs, `(times the forward's FLOPs, bytes)` of the specs.
    """

    op: str
    dims: str
    specs: Callable[..., dict[str, Spec]]
    shapes: tuple[tuple[int, ...], ...]
    cpu_shapes: tuple[tuple[int, ...], ...]
    small: Callable[..., tuple[int, ...]]
    plain: Call
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    peers: Mapping[str, tuple[str, Callable[[Any], Call]]] = dataclasses.field(default_factory=dict)
    averaged: bool = False
    backward: Callable[[Specs, Specs], tuple[float, float]] = lambda given, made: (2.0, nbytes(given) + nbytes(made) + nbytes(given))

    def outputs(self, specs: Specs) -> dict[str, Spec]:
        return {str(i): s for i, s in enumerate(ops.op(self.op).infer(specs, **self.params))}

    def cost(self, specs: Specs, backward: bool) -> tuple[float, float]:
        """FLOPs, and the bytes that must cross memory: each array once a pass."""
        forward = ops.op(self.op).cost(specs, **self.params)
        if not backward:
            return forward.flops, forward.bytes
        times, more = self.backward(specs, self.outputs(specs))
        return forward.flops * (1 + times), forward.bytes + more

    def installed_peers(self) -> dict[str, Call]:
        """Peers whose package is here; it is imported by the first call."""
        found = {}
        for name, (module, make) in self.peers.items():
            if importlib.util.find_spec(module):
                found[name] = lambda module=module, make=make, **arrays: make(importlib.import_module(module))(**arrays)
        return found


def nbytes(specs: Specs) -> int:
    return sum(math.prod(s.shape) * jnp.dtype(s.dtype).itemsize for s in specs.values())


def plain_attention(q: Any, k: Any, v: Any, q_segment_ids: Any = None, kv_segment_ids: Any = None, *, mask: Mask = NO_MASK) -> Any:
    k, v = (jnp.repeat(a, q.shape[2] // k.shape[2], 2) for a in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    behind = jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1])
    seen = jnp.ones((1, 1, 1, 1), bool)
    for term in mask.terms:
        if isinstance(term, Causal):
            seen &= behind >= 0
        elif isinstance(term, Window) and term.left is not None:
            seen &= behind <= term.left
        else:
            seen &= (q_segment_ids[:, :, None] == kv_segment_ids[:, None])[:, None]
    scores = jnp.where(seen, scores, mask.fill)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, -1).astype(v.dtype), v)


def plain_layer_norm(x: Any, weight: Any, bias: Any, residual: Any = None) -> Any:
    h = x if residual is None else x + residual
    f = h.astype(jnp.float32)
    f = f - jnp.mean(f, -1, keepdims=True)
    y = f * jax.lax.rsqrt(jnp.mean(f * f, -1, keepdims=True) + 1e-6)
    y = (y * weight + bias).astype(x.dtype)
    return y if residual is None else (y, h)


def plain_rms_norm(x: Any, weight: Any, residual: Any = None) -> Any:
    h = x if residual is None else x + residual
    f = h.astype(jnp.float32)
    y = (f * jax.lax.rsqrt(jnp.mean(f * f, -1, keepdims=True) + 1e-6) * weight).astype(x.dtype)
    return y if residual is None else (y, h)


def plain_cross_entropy(logits: Any, labels: Any) -> Any:
    z = logits.astype(jnp.float32)
    return jax.nn.logsumexp(z, -1) - jnp.take_along_axis(z, labels[..., None], -1)[..., 0]


def plain_linear_cross_entropy(x: Any, w: Any, labels: Any) -> Any:
    return plain_cross_entropy(x @ w, labels)


def plain_rope(x: Any, cos: Any, sin: Any) -> Any:
    a, b = jnp.split(x, 2, -1)
    return (x * cos[:, :, None] + jnp.concatenate([-b, a], -1) * sin[:, :, None]).astype(x.dtype)


def plain_rope_interleaved(x: Any, cos: Any, sin: Any) -> Any:
    turned = jnp.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    return (x * cos[:, :, None] + turned * sin[:, :, None]).astype(x.dtype)


def plain_linear_act(x: Any, w: Any, b: Any) -> Any:
    return jax.nn.gelu(x @ w + b)


def plain_glu(x: Any, w_gate: Any, w_up: Any) -> Any:
    return jax.nn.silu(x @ w_gate) * (x @ w_up)


def _specs(dtype: str, **shapes: tuple[int, ...]) -> dict[str, Spec]:
    return {n: Spec(s, "int32" if n == "labels" else dtype) for n, s in shapes.items()}


def _norm_specs(*names: str, residual: bool = False) -> Callable[..., dict[str, Spec]]:
    def specs(dtype: str, rows: int, width: int) -> dict[str, Spec]:
        more = {"residual": (rows, width)} if residual else {}
        return _specs(dtype, x=(rows, width), **dict.fromkeys(names, (width,)), **more)

    return specs


def _tokamax_attention(implementation: str, mask: Mask) -> Callable[[Any], Call]:
    def make(m: Any) -> Call:
        def attention(q: Any, k: Any, v: Any, q_segment_ids: Any = None, kv_segment_ids: Any = None) -> Any:
            same = None if q_segment_ids is None else (q_segment_ids[:, :, None] == kv_segment_ids[:, None])[:, None]
            window = next(((term.left, 0) for term in mask.terms if isinstance(term, Window)), None)
            return m.dot_product_attention(
                q, k, v, mask=same, is_causal=Causal() in mask.terms, local_window_size=window, implementation=implementation
            )

        return attention

    return make


def _masked_cudnn(m: Any) -> Call:
    """What cuDNN offers for documents: an array of the whole mask."""

    def attention(q: Any, k: Any, v: Any, q_segment_ids: Any, kv_segment_ids: Any) -> Any:
        same = (q_segment_ids[:, :, None] == kv_segment_ids[:, None])[:, None]
        return m.nn.dot_product_attention(q, k, v, mask=same, is_causal=True, implementation="cudnn")

    return attention


def _attention(mask: Mask, shapes: tuple[tuple[int, ...], ...], more: Mapping[str, tuple[str, Callable[[Any], Call]]] = {}) -> Bench:
    def specs(dtype: str, b: int, s: int, n: int, k: int, h: int) -> dict[str, Spec]:
        ids = {f"{side}_segment_ids": Spec((b, s), "int32") for side in ("q", "kv")} if Segments() in mask.terms else {}
        return _specs(dtype, q=(b, s, n, h), k=(b, s, k, h), v=(b, s, k, h)) | ids

    return Bench(
        op="attention",
        dims="B S N K H",
        specs=specs,
        params={"mask": mask},
        shapes=shapes,
        cpu_shapes=((1, 2048, 8, 8, 64),),
        small=lambda b, s, n, k, h: (1, min(s, 384), 2 * n // k, 2, h),
        plain=functools.partial(plain_attention, mask=mask),
        peers={f"tokamax {i}": ("tokamax", _tokamax_attention(i, mask)) for i in ("mosaic", "triton")} | dict(more),
        backward=lambda given, made: (2.5, 2 * nbytes(given) + 2 * nbytes(made)),
    )


def _norm(op: str, plain: Call, names: tuple[str, ...], residual: bool = False) -> Bench:
    def tokamax(m: Any) -> Call:
        return lambda x, weight, bias=None: m.layer_norm(x, weight, bias, subtract_mean=op == "layer_norm")

    def backward(given: Specs, made: Specs) -> tuple[float, float]:
        # What was normalised and the cotangents are read; the gradient of a sum is that of both its terms, and one array.
        return 2.0, nbytes({"h": given["x"], "dx": given["x"], **made})

    return Bench(
        op=op,
        dims="ROWS WIDTH",
        specs=_norm_specs(*names, residual=residual),
        shapes=((16384, 4096), (32768, 8192)),
        cpu_shapes=((4096, 1024),),
        small=lambda rows, width: (min(rows, 64), width),
        plain=plain,
        peers={} if residual else {"tokamax": ("tokamax", tokamax)},
        backward=backward,
    )


def _product(op: str, plain: Call, shape: tuple[int, int, int], specs: Callable[..., dict[str, Spec]], **more: Any) -> Bench:
    return Bench(op=op, dims="M K N", specs=specs, shapes=(shape,), cpu_shapes=((512, 512, 1024),),
                 small=lambda m, k, n: (min(m, 128), min(k, 256), min(n, 256)), plain=plain, **more)  # fmt: skip


def _rope(plain: Call, params: Mapping[str, Any] = {}) -> Bench:
    def specs(dtype: str, b: int, t: int, n: int, h: int) -> dict[str, Spec]:
        table = Spec((1, t, h), "float32")
        return {"x": Spec((b, t, n, h), dtype), "cos": table, "sin": table}

    return Bench(
        op="rope",
        dims="B T N H",
        specs=specs,
        params=params,
        shapes=((4, 4096, 32, 128),),
        cpu_shapes=((1, 1024, 8, 64),),
        small=lambda b, t, n, h: (1, min(t, 64), min(n, 18), h),
        plain=plain,
        # The tables are constants, and the rotation back needs nothing else.
        backward=lambda given, made: (1.0, nbytes(made) + nbytes(given)),
    )


HEADS = ((4, 4096, 16, 16, 128), (1, 16384, 16, 16, 128), (4, 4096, 32, 8, 128), (4, 4096, 32, 32, 64))

BENCHES: dict[str, Bench] = {
    "attention": _attention(NO_MASK, HEADS),
    "attention_causal": _attention(CAUSAL, (*HEADS, (4, 4096, 8, 8, 256))),
    "attention_window": _attention(WINDOW, ((1, 16384, 16, 16, 128),)),
    "attention_documents": _attention(DOCUMENTS, ((1, 8192, 16, 16, 128),), {"cuDNN, mask as an array": ("jax", _masked_cudnn)}),
    "layer_norm": _norm("layer_norm", plain_layer_norm, ("weight", "bias")),
    "layer_norm_residual": _norm("layer_norm", plain_layer_norm, ("weight", "bias"), residual=True),
    "rms_norm": _norm("rms_norm", plain_rms_norm, ("weight",)),
    "rms_norm_residual": _norm("rms_norm", plain_rms_norm, ("weight",), residual=True),
    "cross_entropy": Bench(
        op="cross_entropy",
        dims="ROWS CLASSES",
        specs=lambda dtype, rows, classes: _specs(dtype, logits=(rows, classes), labels=(rows,)),
        shapes=((8192, 128256),),
        cpu_shapes=((512, 32000),),
        small=lambda rows, classes: (min(rows, 16), classes),
        plain=plain_cross_entropy,
    ),
    "linear_cross_entropy": Bench(
        op="linear_cross_entropy",
        dims="TOKENS K CLASSES",
        specs=lambda dtype, m, k, n: _specs(dtype, x=(m, k), w=(k, n), labels=(m,)),
        shapes=((8192, 4096, 128256),),
        cpu_shapes=((512, 256, 32000),),
        small=lambda m, k, n: (min(m, 64), min(k, 256), min(n, 2048)),
        plain=plain_linear_cross_entropy,
        averaged=True,
        peers={
            "tokamax chunked_xla": (
                "tokamax",
                lambda m: lambda x, w, labels: m.linear_softmax_cross_entropy_loss(
                    x, labels, w, reduction="none", implementation="chunked_xla"
                ),
            )
        },
    ),
    "rope": _rope(plain_rope),
    "rope_interleaved": _rope(plain_rope_interleaved, {"interleaved": True}),
    "linear_act": _product(
        "linear_act", plain_linear_act, (8192, 4096, 16384), lambda dtype, m, k, n: _specs(dtype, x=(m, k), w=(k, n), b=(n,))
    ),
    "glu": _product(
        "glu",
        plain_glu,
        (8192, 4096, 14336),
        lambda dtype, m, k, n: _specs(dtype, x=(m, k), w_gate=(k, n), w_up=(k, n)),
        peers={
            "tokamax": (
                "tokamax",
                lambda m: lambda x, w_gate, w_up: m.gated_linear_unit(x, (w_gate, w_up), activation=jax.nn.swish),
            )
        },
    ),
    "matmul": _product("matmul", lambda a, b: a @ b, (8192, 8192, 8192), lambda dtype, m, k, n: _specs(dtype, a=(m, k), b=(k, n))),
    "ragged_matmul": Bench(
        op="ragged_matmul",
        dims="M K N GROUPS",
        specs=lambda dtype, m, k, n, g: _specs(dtype, x=(m, k), w=(g, k, n)) | {"group_sizes": Spec((g,), "int32")},
        shapes=((16384, 2048, 8192, 8),),
        cpu_shapes=((512, 256, 512, 4),),
        small=lambda m, k, n, g: (min(m, 128), min(k, 256), min(n, 256), min(g, 4)),
        plain=lambda x, w, group_sizes: jax.lax.ragged_dot(x, w, group_sizes),
    ),
}
"""By the name that `kpt bench` takes. Documents are eight of one length, packed; a window holds 1024 keys."""
