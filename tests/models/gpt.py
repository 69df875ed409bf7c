"""A GPT-class model written twice: learned positions, layer norms, one product for q, k and v, tanh gelu, tied embedding.

Weights are named and laid out as PyTorch's modules have them; the JAX half multiplies by their transposes.
"""

from __future__ import annotations

import numpy as np

from kpt.twin import Twin
from tests.models.data import CONTEXT, VOCABULARY, batch, normal

LAYERS, WIDTH, HEADS = 2, 64, 4


def weights(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    found = {"tokens.weight": normal(rng, VOCABULARY, WIDTH), "positions.weight": normal(rng, CONTEXT, WIDTH)}
    for i in range(LAYERS):
        for norm in ("norm1", "norm2"):
            found |= {f"layers.{i}.{norm}.weight": 1 + normal(rng, WIDTH), f"layers.{i}.{norm}.bias": normal(rng, WIDTH)}
        for name, into, out in (("qkv", WIDTH, 3 * WIDTH), ("out", WIDTH, WIDTH), ("up", WIDTH, 4 * WIDTH), ("down", 4 * WIDTH, WIDTH)):
            found |= {f"layers.{i}.{name}.weight": normal(rng, out, into), f"layers.{i}.{name}.bias": normal(rng, out)}
    return found | {"norm.weight": 1 + normal(rng, WIDTH), "norm.bias": normal(rng, WIDTH)}


def jax_loss(w, batch, tap):
    import jax
    import jax.numpy as jnp
    import optax

    def norm(name, x):
        mean = x.mean(-1, keepdims=True)
        variance = jnp.square(x - mean).mean(-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    tokens = batch["tokens"]
    b, t = tokens.shape
    x = tap("embedding", w["tokens.weight"][tokens] + w["positions.weight"][:t])
    for i in range(LAYERS):
        h = tap(f"layers.{i}/norm1", norm(f"layers.{i}.norm1", x))
        q, k, v = jnp.split(linear(f"layers.{i}.qkv", h).reshape(b, t, 3 * HEADS, -1), 3, 2)
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / jnp.sqrt(q.shape[-1])
        scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -jnp.inf)
        mixed = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v).reshape(x.shape)
        mixed = tap(f"layers.{i}/attention", mixed)
        x = tap(f"layers.{i}/out", x + linear(f"layers.{i}.out", mixed))
        h = tap(f"layers.{i}/norm2", norm(f"layers.{i}.norm2", x))
        h = tap(f"layers.{i}/up", jax.nn.gelu(linear(f"layers.{i}.up", h), approximate=True))
        x = tap(f"layers.{i}/down", x + linear(f"layers.{i}.down", h))
    logits = tap("logits", norm("norm", x) @ w["tokens.weight"].T)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()


def torch_loss(w, batch, tap):
    import torch
    import torch.nn.functional as F

    tokens, labels = batch["tokens"].long(), batch["labels"].long()
    b, t = tokens.shape

    def norm(name, x):
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    x = tap("embedding", F.embedding(tokens, w["tokens.weight"]) + w["positions.weight"][:t])
    for i in range(LAYERS):
        h = tap(f"layers.{i}/norm1", norm(f"layers.{i}.norm1", x))
        q, k, v = (a.unflatten(-1, (HEADS, -1)).transpose(1, 2) for a in linear(f"layers.{i}.qkv", h).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, WIDTH)
        mixed = tap(f"layers.{i}/attention", mixed)
        x = tap(f"layers.{i}/out", x + linear(f"layers.{i}.out", mixed))
        h = tap(f"layers.{i}/norm2", norm(f"layers.{i}.norm2", x))
        h = tap(f"layers.{i}/up", F.gelu(linear(f"layers.{i}.up", h), approximate="tanh"))
        x = tap(f"layers.{i}/down", x + linear(f"layers.{i}.down", h))
    logits = tap("logits", norm("norm", x) @ w["tokens.weight"].T)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


TWIN = Twin("GPT class", weights, batch, jax_loss, torch_loss)
