"""A Llama-class model written twice: RMS norms, rotary positions, grouped queries, gated units, a head of its own.

Weights are named and laid out as PyTorch's modules have them; the JAX half multiplies by their transposes.
"""

from __future__ import annotations

import numpy as np

from kpt.twin import Twin
from tests.models.data import VOCABULARY, batch, normal

LAYERS, WIDTH, HEADS, KV_HEADS, HIDDEN = 2, 64, 4, 2, 160
HEAD = WIDTH // HEADS
EPS = 1e-6


def weights(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    found = {"embed.weight": normal(rng, VOCABULARY, WIDTH)}
    shapes = {"q": (WIDTH, WIDTH), "k": (KV_HEADS * HEAD, WIDTH), "v": (KV_HEADS * HEAD, WIDTH), "o": (WIDTH, WIDTH),
              "gate": (HIDDEN, WIDTH), "up": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN)}  # fmt: skip
    for i in range(LAYERS):
        found |= {f"layers.{i}.{name}.weight": 1 + normal(rng, WIDTH) for name in ("norm1", "norm2")}
        found |= {f"layers.{i}.{name}.weight": normal(rng, *shape) for name, shape in shapes.items()}
    return found | {"norm.weight": 1 + normal(rng, WIDTH), "head.weight": normal(rng, VOCABULARY, WIDTH)}


def jax_loss(w, batch, tap):
    import jax
    import jax.numpy as jnp
    import optax

    def norm(name, x):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + EPS) * w[f"{name}.weight"]

    def linear(name, x):
        return x @ w[f"{name}.weight"].T

    def rotated(x):
        angle = jnp.arange(x.shape[1])[:, None] * 10000.0 ** (-jnp.arange(HEAD // 2) / (HEAD // 2))
        cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    tokens = batch["tokens"]
    b, t = tokens.shape
    x = tap("embedding", w["embed.weight"][tokens])
    for i in range(LAYERS):
        h = tap(f"layers.{i}/norm1", norm(f"layers.{i}.norm1", x))
        q, k, v = (linear(f"layers.{i}.{n}", h).reshape(b, t, -1, HEAD) for n in "qkv")
        q, k = tap(f"layers.{i}/rope q", rotated(q)), tap(f"layers.{i}/rope k", rotated(k))
        k, v = (jnp.repeat(a, HEADS // KV_HEADS, 2) for a in (k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) * HEAD**-0.5
        scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -jnp.inf)
        mixed = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v).reshape(x.shape)
        mixed = tap(f"layers.{i}/attention", mixed)
        x = tap(f"layers.{i}/o", x + linear(f"layers.{i}.o", mixed))
        h = tap(f"layers.{i}/norm2", norm(f"layers.{i}.norm2", x))
        h = tap(f"layers.{i}/glu", jax.nn.silu(linear(f"layers.{i}.gate", h)) * linear(f"layers.{i}.up", h))
        x = tap(f"layers.{i}/down", x + linear(f"layers.{i}.down", h))
    logits = tap("logits", linear("head", norm("norm", x)))
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()


def torch_loss(w, batch, tap):
    import torch
    import torch.nn.functional as F

    tokens, labels = batch["tokens"].long(), batch["labels"].long()
    b, t = tokens.shape

    def norm(name, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w[f"{name}.weight"]

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"])

    angle = torch.arange(t)[:, None] * 10000.0 ** (-torch.arange(HEAD // 2) / (HEAD // 2))
    angle = torch.cat([angle, angle], -1)
    cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]

    def rotated(x):
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    x = tap("embedding", F.embedding(tokens, w["embed.weight"]))
    for i in range(LAYERS):
        h = tap(f"layers.{i}/norm1", norm(f"layers.{i}.norm1", x))
        q, k, v = (linear(f"layers.{i}.{n}", h).unflatten(-1, (-1, HEAD)) for n in "qkv")
        q, k = tap(f"layers.{i}/rope q", rotated(q)), tap(f"layers.{i}/rope k", rotated(k))
        k, v = (a.repeat_interleave(HEADS // KV_HEADS, 2) for a in (k, v))
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, WIDTH)
        mixed = tap(f"layers.{i}/attention", mixed)
        x = tap(f"layers.{i}/o", x + linear(f"layers.{i}.o", mixed))
        h = tap(f"layers.{i}/norm2", norm(f"layers.{i}.norm2", x))
        h = tap(f"layers.{i}/glu", F.silu(linear(f"layers.{i}.gate", h)) * linear(f"layers.{i}.up", h))
        x = tap(f"layers.{i}/down", x + linear(f"layers.{i}.down", h))
    logits = tap("logits", linear("head", norm("norm", x)))
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


TWIN = Twin("Llama class", weights, batch, jax_loss, torch_loss)
