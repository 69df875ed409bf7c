"""Run by test_sharding.py in a process of its own, on eight simulated devices; prints one JSON line a case."""

from __future__ import annotations

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import kpt_jax
from kpt.validation import tolerance

B, T, N, H, W, V = 8, 16, 4, 8, 32, 64
LONG = 1280  # more than one block of any provider


def attend(q, k, v):
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), v)


def norm(x, w):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * w


def mlp(x, up, down):
    return jax.nn.gelu(x @ up) @ down


def loss(logits, labels):
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def mapped(mesh):
    """Attention inside a shard_map of the user's."""
    spec = P("data", None, "model", None)
    return jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)


def cases(mesh):
    qkv = [(B, T, N, H)] * 3
    data, heads, sequence = P("data"), P("data", None, "model"), P("data", "model")
    return {
        "attention over batch": (attend, qkv, [data] * 3, True),
        "attention over batch and heads": (attend, qkv, [heads] * 3, True),
        "attention over sequence": (attend, qkv, [sequence] * 3, False),
        "long attention over sequence": (attend, [(4, LONG, 2, H)] * 3, [sequence] * 3, True),
        "attention in shard_map": (mapped(mesh), qkv, [heads] * 3, True),
        "norm over batch and sequence": (norm, [(B, T, W), (W,)], [sequence, P()], True),
        "norm over features": (norm, [(B, T, W), (W,)], [P(None, None, "model"), P("model")], False),
        "mlp over batch": (mlp, [(B, T, W), (W, 4 * W), (4 * W, W)], [data, P(), P()], True),
        "mlp over columns and rows": (mlp, [(B, T, W), (W, 4 * W), (4 * W, W)],
                                      [data, P(None, "model"), P("model")], True),
        "loss over batch and sequence": (loss, [(B, T, V), (B, T)], [sequence] * 2, True),
    }  # fmt: skip


def gathered(compiled) -> int:
    """Elements of the largest all-gather."""
    found = re.findall(r"= \w+\[([\d,]*)\][^=]* all-gather", compiled.as_text())
    return max((int(np.prod([int(d) for d in f.split(",") if d])) for f in found), default=0)


def close(got, want):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        bound = tolerance("float32", 4 * W * max((T, *w.shape[1:2])), gradient=True)
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert np.abs(g - w).max() <= 2 * bound.allowed_max(float(np.abs(w).max()))


def run(mesh, name):
    fn, shapes, specs, no_gather = cases(mesh)[name]
    rng = np.random.default_rng(0)
    host = [rng.integers(0, V, s).astype(np.int32) if s == (B, T) else rng.standard_normal(s).astype(np.float32)
            for s in shapes]  # fmt: skip
    args = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(host, specs, strict=True)]
    fast = kpt_jax.optimize(fn)
    diff = tuple(i for i, a in enumerate(host) if a.dtype == np.float32)

    def gradients(f):
        return jax.jit(jax.grad(lambda *a: jnp.sum(f(*a) ** 2), diff))

    want, got = jax.jit(fn)(*args), fast(*args)
    close(got, want)
    close(gradients(fast)(*args), gradients(fn)(*args))
    largest = max(a.size for a in host)
    plain, swapped = (jax.jit(f).lower(*args).compile() for f in (fn, fast))
    backward = [gradients(f).lower(*args).compile() for f in (fn, fast)]
    return {
        "ops": sorted({s.op for s in fast.plan(*args).sites}),
        "same sharding": got.sharding.is_equivalent_to(want.sharding, got.ndim),
        "gathered": [gathered(c) for c in (plain, swapped, *backward)],
        "largest": largest,
        "no gather expected": no_gather,
    }


if __name__ == "__main__":
    eight = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    for case in sys.argv[1:] or cases(eight):
        print(json.dumps({"case": case, **run(eight, case)}), flush=True)
