"""Every op as the shortest jnp code that computes it, to stand in for kernels where what is tested is the matching."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kpt.fusion.program import Match, NearMiss
from kpt.fusion.registry import default_fusion
from kpt.graph.graph import Graph
from kpt.ops.mask import Causal, Mask, Window
from kpt.validation import tolerance
from kpt_jax.apply import REBUILT, Rewrite, run
from kpt_jax.capture import capture

ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu2": lambda x: jax.nn.relu(x) ** 2,
    "softplus": jax.nn.softplus,
    "elu": jax.nn.elu,
    "mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
}


def attention(q, k, v, bias=None, keep=None, q_segment_ids=None, kv_segment_ids=None, kv_lengths=None, *, mask=Mask(),  # noqa: B008
              scale=None, logits_soft_cap=None, out_dtype=None):  # fmt: skip
    t, s, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, groups, 2), jnp.repeat(v, groups, 2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if logits_soft_cap is not None:
        scores = logits_soft_cap * jnp.tanh(scores / logits_soft_cap)
    if bias is not None:
        scores = scores + bias
    i, j = jnp.arange(t)[:, None], jnp.arange(s)[None]
    seen = jnp.ones((1, 1, t, s), bool)
    for term in mask.terms:
        match term:
            case Causal(offset):
                seen &= j <= i + offset
            case Window(left, right, offset):
                seen &= (left is None) | (j >= i + offset - (left or 0))
                seen &= (right is None) | (j <= i + offset + (right or 0))
    if keep is not None:
        seen = seen & keep
    if q_segment_ids is not None:
        seen = seen & (q_segment_ids[:, None, :, None] == kv_segment_ids[:, None, None])
    if kv_lengths is not None:
        seen = seen & (j < kv_lengths[:, None, None, None])
    scores = jnp.where(seen, scores, scores + mask.fill if mask.additive else mask.fill)
    weights = jax.nn.softmax(scores, -1).astype(v.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights, v).astype(out_dtype or q.dtype)


def linear_act(x, w, b=None, *, activation="gelu_tanh", out_dtype=None):
    y = x @ w if b is None else x @ w + b
    return ACTIVATIONS[activation](y).astype(out_dtype or x.dtype)


def glu(x, w_gate, w_up, b_gate=None, b_up=None, *, activation="silu", out_dtype=None):
    up = x @ w_up if b_up is None else x @ w_up + b_up
    return (linear_act(x, w_gate, b_gate, activation=activation) * up).astype(out_dtype or x.dtype)


def rms_norm(x, weight=None, residual=None, *, eps=1e-6, weight_offset=0.0, out_dtype=None):
    if residual is not None:
        h = x + residual
        return rms_norm(h, weight, eps=eps, weight_offset=weight_offset, out_dtype=out_dtype), h
    wide = x.astype(jnp.float32)
    y = wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return (y if weight is None else y * (weight_offset + weight)).astype(out_dtype or x.dtype)


def layer_norm(x, weight=None, bias=None, residual=None, *, eps=1e-6, out_dtype=None):
    if residual is not None:
        h = x + residual
        return layer_norm(h, weight, bias, eps=eps, out_dtype=out_dtype), h
    wide = x.astype(jnp.float32)
    y = (wide - wide.mean(-1, keepdims=True)) * jax.lax.rsqrt(wide.var(-1, keepdims=True) + eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).astype(out_dtype or x.dtype)


def rope(x, cos, sin, *, interleaved=False, out_dtype=None):
    r = cos.shape[-1]
    turned, rest = x[..., :r], x[..., r:]
    if interleaved:
        half = jnp.stack([-turned[..., 1::2], turned[..., ::2]], -1).reshape(turned.shape)
    else:
        half = jnp.concatenate([-turned[..., r // 2 :], turned[..., : r // 2]], -1)
    y = turned * cos[:, :, None] + half * sin[:, :, None]
    return jnp.concatenate([y.astype(out_dtype or x.dtype), rest.astype(out_dtype or x.dtype)], -1)


def cross_entropy(logits, labels, *, label_smoothing=0.0, logits_soft_cap=None, invalid="nan"):
    logits = logits.astype(jnp.float32)
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    mode = {"nan": {"mode": "fill", "fill_value": jnp.nan}, "clip": {"mode": "clip"}, "zero": {"mode": "fill", "fill_value": 0}}
    mode["drop"] = mode["zero"]
    valid = (labels >= 0) & (labels < logits.shape[-1])
    labels = jnp.where(labels < 0, logits.shape[-1], labels) if invalid != "clip" else labels
    chosen = jnp.take_along_axis(logits, labels[..., None], -1, **mode[invalid])[..., 0]
    target = (1 - label_smoothing) * chosen + label_smoothing * logits.mean(-1)
    share = jnp.where(valid, 1, label_smoothing) if invalid == "drop" else 1
    return share * jax.nn.logsumexp(logits, -1) - target


def linear_cross_entropy(x, w, b=None, *, labels, weights=None, **params):
    loss = cross_entropy(x @ w if b is None else x @ w + b, labels, **params)
    return loss if weights is None else loss * weights


KERNELS = {
    f.__name__: f for f in (attention, linear_act, glu, rms_norm, layer_norm, rope, cross_entropy, linear_cross_entropy)
}


@dataclasses.dataclass
class Found:
    """What matching found in a program and its bodies, and the program with the plain kernels in place."""

    sites: list[Match]
    missed: list[NearMiss]
    rewrite: Rewrite

    def ops(self) -> list[str]:
        return sorted(m.op for m in self.sites)


def search(graph: Graph) -> Found:
    program, sites, missed = default_fusion().find(graph)
    rewrite = Rewrite(graph, program, [(m, KERNELS[m.op]) for m in sites])
    for n in graph.nodes:
        if n.op in REBUILT:
            inner = [search(b) for b in n.bodies]
            sites, missed = sites + [m for f in inner for m in f.sites], missed + [m for f in inner for m in f.missed]
            rewrite.bodies[id(n)] = tuple(f.rewrite for f in inner)
    return Found(sites, missed, rewrite)


def rewritten(fn, *args):
    """(what was found in `fn`, `fn` with the plain kernels in place), for arguments like these."""
    flat, tree = jax.tree.flatten(args)
    closed, shape = jax.make_jaxpr(lambda *xs: fn(*jax.tree.unflatten(tree, xs)), return_shape=True)(*flat)
    found = search(capture(closed, "fn"))
    out_tree = jax.tree.structure(shape)
    return found, lambda *xs: jax.tree.unflatten(out_tree, run(found.rewrite, jax.tree.leaves(xs)))


def differentiate(fn, args):
    """Outputs, and the gradients of a random linear function of the float outputs in every float argument."""
    flat, tree = jax.tree.flatten(args)
    at = [i for i, x in enumerate(flat) if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)]

    def call(floats):
        full = list(flat)
        for i, x in zip(at, floats, strict=True):
            full[i] = x
        outs = [jnp.asarray(o) for o in jax.tree.leaves(fn(*jax.tree.unflatten(tree, full)))]
        return [o for o in outs if jnp.issubdtype(o.dtype, jnp.floating)], outs

    floats, vjp, outs = jax.vjp(call, [flat[i] for i in at], has_aux=True)
    rng = np.random.default_rng(5)
    (grads,) = vjp([jnp.asarray(rng.normal(size=o.shape), o.dtype) for o in floats])
    return outs, grads


def assert_same(fn, fast, args, length=64, gradients=True):
    """`fast` gives what `fn` gives: each may err by the tolerance for sums of `length` terms."""

    def both(*args):
        if gradients:
            return differentiate(fn, args), differentiate(fast, args)
        return (jax.tree.leaves(fn(*args)), []), (jax.tree.leaves(fast(*args)), [])

    # One compilation, not optimised: what is compared is the meaning.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    (want, dwant), (got, dgot) = jax.jit(both, compiler_options=quick)(*args)
    dtypes = {str(x.dtype) for x in jax.tree.leaves(args) + want if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)}
    narrow = min(dtypes, key=lambda d: -float(jnp.finfo(d).eps), default="float32")
    for gradient, pairs in ((False, zip(got, want, strict=True)), (True, zip(dgot, dwant, strict=True))):
        for a, b in pairs:
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            a, b = np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64)
            np.testing.assert_array_equal(np.isfinite(a), np.isfinite(b))
            a, b = a[np.isfinite(a)], b[np.isfinite(b)]
            size = float(np.abs(b).max(initial=0.0))
            allowed = 2 * tolerance(narrow, length, gradient=gradient).allowed_max(size, 1.0)
            np.testing.assert_allclose(a, b, rtol=0, atol=allowed, err_msg="gradient" if gradient else "output")
