"""Run by test_sharding.py in a process of its own, on eight simulated devices: meshes whose axes are Explicit; prints one JSON line a case."""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kpt_jax
from kpt.validation import tolerance

B, T, N, H, K, V = 8, 16, 2, 8, 16, 32
MESHES = {"data": ((8,), ("data",)), "data and model": ((4, 2), ("data", "model"))}


def norm(x, w):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * w


def layer_norm(x, w, b):
    centred = x - jnp.mean(x, -1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + 1e-5) * w + b


def glu(x, gate, up):
    return jax.nn.silu(x @ gate) * (x @ up)


def glu_then_down(x, gate, up, down):
    return jnp.matmul(glu(x, gate, up), down, out_sharding=P("data"))


def rope(x, cos, sin):
    a, b = jnp.split(x, 2, -1)
    return x * cos[:, :, None] + jnp.concatenate([-b, a], -1) * sin[:, :, None]


def attention(q, k, v):
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), v)


def linear_cross_entropy(x, w, labels):
    return optax.softmax_cross_entropy_with_integer_labels(x @ w, labels)


X, ROWS, COLUMN, HEADS = ((B, T, K), P("data")), ((B, T), P("data")), P(None, "model"), P("data", None, "model")
CASES = {  # what is computed, and of each array its shape and where it lies
    "linear_act": (lambda x, w, b: jax.nn.gelu(x @ w + b), [X, ((K, 2 * K), COLUMN), ((2 * K,), P("model"))]),
    "glu": (glu, [X, ((K, 2 * K), COLUMN), ((K, 2 * K), COLUMN)]),
    "glu then down": (glu_then_down, [X, ((K, 2 * K), COLUMN), ((K, 2 * K), COLUMN), ((2 * K, K), P("model"))]),
    "linear_cross_entropy": (linear_cross_entropy, [X, ((K, V), COLUMN), ROWS]),
    "cross_entropy": (optax.softmax_cross_entropy_with_integer_labels, [((B, T, V), HEADS), ROWS]),
    "matmul": (lambda a, b: (a @ b).astype(jnp.float32), [((B * T, K), P("data")), ((K, V), COLUMN)]),
    "rms_norm": (norm, [X, ((K,), P())]),
    "layer_norm": (layer_norm, [X, ((K,), P()), ((K,), P())]),
    "rope": (rope, [((B, T, N, H), HEADS), ((1, T, H), P()), ((1, T, H), P())]),
    "attention": (attention, [((B, T, N, H), HEADS)] * 3),
}


def along(mesh, spec):
    """Without the axes that the mesh has not."""
    return NamedSharding(mesh, P(*(a if a in mesh.axis_names else None for a in spec)))


def close(got, want):
    """Equal up to rounding, and of equal shardings."""
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert jax.typeof(g).sharding == jax.typeof(w).sharding, (jax.typeof(g), jax.typeof(w))
        bound = tolerance(w.dtype.name, 4 * K * B * T, gradient=True)
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert np.abs(g - w).max() <= 2 * bound.allowed_max(float(np.abs(w).max()))


def run(mesh, name):
    fn, arrays = CASES[name]
    rng = np.random.default_rng(0)
    host = [rng.integers(0, V, s).astype(np.int32) if s == (B, T) else rng.standard_normal(s).astype(np.float32) for s, _ in arrays]
    args = [jax.device_put(a, along(mesh, spec)) for a, (_, spec) in zip(host, arrays, strict=True)]
    fast = kpt_jax.optimize(fn)
    diff = tuple(i for i, a in enumerate(host) if a.dtype == np.float32)

    def gradients(f):
        return jax.value_and_grad(lambda *a: jnp.sum(f(*a) ** 2), diff)

    close(fast(*args), jax.jit(fn)(*args))
    want = jax.jit(gradients(fn))(*args)
    close(jax.jit(gradients(fast))(*args), want)
    inside = kpt_jax.optimize(gradients(fn))
    close(inside(*args), want)
    plans = fast.plan(*args), inside.plan(*args)
    return {"ops": [[s.op for s in p.sites] for p in plans], "certified": all(s.certificate for p in plans for s in p.sites)}


if __name__ == "__main__":
    import os, traceback
    for where, (shape, axes) in MESHES.items():
        mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Explicit,) * len(axes))
        with jax.set_mesh(mesh):
            for case in sys.argv[1:] or CASES:
                try:
                    print(json.dumps({"case": f"{case} over {where}", **run(mesh, case)}), flush=True)
                except Exception as e:
                    if len(sys.argv) == 2: traceback.print_exc()
                    print(case, where, type(e), str(e)[:300])
