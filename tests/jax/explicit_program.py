"""Run by test_sharding.py in a process of its own, on eight simulated devices: meshes whose axes are Explicit; prints one JSON line a case."""

from __future__ import annotations

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kpt_jax
from kpt.kernels import registry
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


def queries_and_keys(q, k, cos, sin):
    return jnp.sum(rope(q, cos, sin), 2) + jnp.sum(rope(k, cos, sin), 2)


def attention(q, k, v):
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, axis=-1), v)


def linear_cross_entropy(x, w, labels):
    logits = x @ w
    classes = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2, out_sharding=jax.typeof(logits).sharding)
    return jax.nn.logsumexp(logits, -1) - jnp.sum(jnp.where(classes == labels[..., None], logits, 0), -1)


def linear(x, w, b):
    return jax.nn.gelu(x @ w + b)


def by_rows(x, w, b):
    """What is summed over is cut."""
    return jax.nn.gelu(jnp.matmul(x, w, out_sharding=P("data")) + b)


def layers(x, ws, bs):
    return jax.lax.scan(lambda x, wb: (x + linear(x, *wb), None), x, (ws, bs))[0]


def mapped(x, w, b):
    spec = P("data")
    return jax.shard_map(linear, in_specs=(spec, P(), P()), out_specs=spec, axis_names={"data"})(x, w, b)


def automatic(f):
    return jax.sharding.auto_axes(f, axes=("data", "model"), out_sharding=P("data"))


def by_data(f):
    return jax.sharding.auto_axes(f, axes=("data",), out_sharding=HEADS)


def explicit(f):
    return jax.sharding.explicit_axes(f, axes=("data", "model"), in_sharding=(P("data"), P()))


def in_and_out_of_them(x, cos, sin):
    """The tables are the same numbers on both sides, known while it is traced."""
    cos, sin = (np.cos(np.arange(T * H, dtype=np.float32).reshape(1, T, H) + i) for i in range(2))
    return rope(by_data(rope)(rope(x, cos, sin), cos, sin), cos, sin)


def gradient(x, w):
    return automatic(jax.grad(lambda x, w: jnp.sum(norm(x, w) ** 2)))(x, w)


def doubled(x):
    return jax.shard_map(lambda x: 2 * x, in_specs=P("data"), out_specs=P("data"), axis_names={"data"})(x)


def beside_a_shard_map(x, w):
    return doubled(automatic(lambda x, w: norm(doubled(x), w))(doubled(x), w))


@jax.custom_jvp
def norm_with_a_rule(x, w):
    return automatic(norm)(x, w)


norm_with_a_rule.defjvp(lambda primals, tangents: (norm_with_a_rule(*primals), 3 * jax.jvp(automatic(norm), primals, tangents)[1]))


X, ROWS, COLUMN, HEADS = ((B, T, K), P("data")), ((B, T), P("data")), P(None, "model"), P("data", None, "model")
LINEAR = [X, ((K, 2 * K), COLUMN), ((2 * K,), P("model"))]
ROPE = [((B, T, N, H), HEADS), ((1, T, H), P()), ((1, T, H), P())]
CASES = {  # what is computed, and of each array its shape and where it lies
    "linear_act": (linear, LINEAR),
    "glu": (glu, [X, ((K, 2 * K), COLUMN), ((K, 2 * K), COLUMN)]),
    "glu, then down": (glu_then_down, [X, ((K, 2 * K), COLUMN), ((K, 2 * K), COLUMN), ((2 * K, K), P("model"))]),
    "linear_cross_entropy": (linear_cross_entropy, [X, ((K, V), COLUMN), ROWS]),
    "cross_entropy": (optax.softmax_cross_entropy_with_integer_labels, [((B, T, V), P("data")), ROWS]),
    "rms_norm": (norm, [X, ((K,), P())]),
    "layer_norm": (layer_norm, [X, ((K,), P()), ((K,), P())]),
    "rope": (rope, ROPE),
    "rope, of queries and keys": (queries_and_keys, [((B, T, 2 * N, H), HEADS), ((B, T, N, H), P("data")), *2 * [((1, T, H), P())]]),
    "attention": (attention, [((B, T, N, H), HEADS)] * 3),
    "linear_act, by rows": (by_rows, [((B, T, K), HEADS), ((K, V), P("model")), ((V,), P())]),
    "linear_act, in a scan": (layers, [X, ((2, K, K), P()), ((2, K), P())]),
    "linear_act, in a shard_map": (mapped, [X, ((K, V), P()), ((V,), P())]),
    "linear_act, beside automatic axes": (linear, LINEAR),
    "linear_act, where no mesh is set": (linear, LINEAR),
    "rope, under automatic axes": (automatic(rope), ROPE),
    "rope, under an automatic axis": (by_data(jax.jit(rope)), ROPE),
    "rope, in and out of an automatic axis": (in_and_out_of_them, ROPE),
    "linear_act, in a scan under automatic axes": (automatic(layers), [X, ((2, K, K), P()), ((2, K), P())]),
    "rms_norm, under automatic axes in a checkpoint": (jax.checkpoint(automatic(norm)), [X, ((K,), P())]),
    "rms_norm, differentiated under automatic axes": (gradient, [X, ((K,), P())]),
    "rms_norm, beside a shard_map": (beside_a_shard_map, [X, ((K,), P())]),
    "rms_norm, under automatic axes and a derivative rule": (norm_with_a_rule, [X, ((K,), P())]),
    "rms_norm, under explicit axes": (explicit(norm), [X, ((K,), P())]),
    "linear_act, mapped": (lambda x, w, b: jax.vmap(linear, (0, None, None))(x, w, b), LINEAR),
}
ON_BOTH = [name for name in CASES if "," not in name or name == "glu, then down"]
ALL = [(name, "data") for name in ON_BOTH] + [(name, "data and model") for name in CASES]


def along(mesh, spec):
    """Without the axes that the mesh has not."""
    return NamedSharding(mesh, P(*(a if a in mesh.axis_names else None for a in spec)))


def close(got, want):
    """Equal up to rounding, and of equal shardings."""
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.sharding.is_equivalent_to(w.sharding, w.ndim), (g.sharding, w.sharding)
        assert jax.typeof(g).sharding == jax.typeof(w).sharding, (jax.typeof(g), jax.typeof(w))
        bound = tolerance(w.dtype.name, 4 * K * B * T, gradient=True)
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert np.abs(g - w).max() <= 2 * bound.allowed_max(float(np.abs(w).max()))


def run(mesh, name):
    fn, arrays = CASES[name]
    rng = np.random.default_rng(0)
    host = [rng.integers(0, V, s).astype(np.int32) if s == (B, T) else rng.standard_normal(s).astype(np.float32) for s, _ in arrays]
    args = [jax.device_put(a, along(mesh, spec)) for a, (_, spec) in zip(host, arrays, strict=True)]
    diff = tuple(i for i, a in enumerate(host) if a.dtype == np.float32)

    def gradients(f):
        return jax.value_and_grad(lambda *a: jnp.sum(f(*a) ** 2), diff)

    def both(f):
        return lambda *args: (f(*args), gradients(f)(*args))

    fast = kpt_jax.optimize(linear if name.endswith("mapped") else fn)
    outside = jax.vmap(fast, (0, None, None)) if name.endswith("mapped") else fast
    inside = kpt_jax.optimize(gradients(fn))
    want = jax.jit(both(fn))(*args)
    close(jax.jit(both(outside))(*args), want)
    close(inside(*args), want[1])
    assert name != "rope, of queries and keys" or all("one launch" in " ".join(f.plan(*args).notes) for f in (inside, fast))
    sites = [*inside.plan(*args).sites, *([] if name.endswith("mapped") else fast.plan(*args).sites)]
    assert "a derivative rule" not in name or all("custom_jvp0/" in s.path for s in sites)  # what runs whole keeps none
    return {"ops": sorted({s.op for s in sites}), "certified": all(s.certificate for s in sites)}


def main():
    kernel = registry.load("rope.xla")
    kernel.pair = lambda *, x, other, **rest: (kernel(x=x, **rest), kernel(x=other, **rest))
    for name, where in ALL:
        shape, axes = MESHES[where]
        automatic = axes if name.endswith("under explicit axes") else ["model"] if name.endswith("beside automatic axes") else []
        kinds = [AxisType.Auto if a in automatic else AxisType.Explicit for a in axes]
        mesh = jax.make_mesh(shape, axes, axis_types=tuple(kinds))
        with contextlib.nullcontext() if name.endswith("no mesh is set") else jax.set_mesh(mesh):
            print(json.dumps({"case": f"{name}, over {where}", **run(mesh, name)}), flush=True)


if __name__ == "__main__":
    main()
