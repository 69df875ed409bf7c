"""A small byte-level language model, as a Flax user would write it. This file knows nothing of kpt."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model; `context` is the number of tokens in one sequence."""

    vocab: int = 256
    context: int = 1536
    width: int = 64
    heads: int = 2
    hidden: int = 192
    layers: int = 2


def rotary(x: jax.Array) -> jax.Array:
    """Rotates `x` [B, T, N, H] by position; the halves of H form the pairs (Su et al. 2021)."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-jnp.arange(half) / half)
    angle = jnp.arange(x.shape[1])[:, None] * frequency
    cos = jnp.concatenate([jnp.cos(angle)] * 2, axis=-1)[None, :, None, :]
    sin = jnp.concatenate([jnp.sin(angle)] * 2, axis=-1)[None, :, None, :]
    turned = jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return x * cos + turned * sin


class Attention(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.heads = config.heads
        self.qkv = nnx.Linear(config.width, 3 * config.width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(config.width, config.width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        query, key, value = jnp.split(self.qkv(x), 3, axis=-1)
        query = rotary(query.reshape(batch, length, self.heads, -1))
        key = rotary(key.reshape(batch, length, self.heads, -1))
        value = value.reshape(batch, length, self.heads, -1)
        scores = jnp.einsum("btnh,bsnh->bnts", query, key) / jnp.sqrt(query.shape[-1])
        visible = jnp.tril(jnp.ones((length, length), dtype=bool))
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        return self.out(jnp.einsum("bnts,bsnh->btnh", weights, value).reshape(batch, length, width))


class FeedForward(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.gate = nnx.Linear(config.width, config.hidden, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(config.width, config.hidden, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(config.hidden, config.width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.norm_attention = nnx.RMSNorm(config.width, rngs=rngs)
        self.attention = Attention(config, rngs)
        self.norm_feed_forward = nnx.RMSNorm(config.width, rngs=rngs)
        self.feed_forward = FeedForward(config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm_attention(x))
        return x + self.feed_forward(self.norm_feed_forward(x))


class LanguageModel(nnx.Module):
    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.embed = nnx.Embed(config.vocab, config.width, rngs=rngs)
        self.blocks = nnx.Sequential(*(Block(config, rngs) for _ in range(config.layers)))
        self.norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.head = nnx.Linear(config.width, config.vocab, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.head(self.norm(self.blocks(self.embed(tokens))))


def next_token_loss(model: LanguageModel, tokens: jax.Array) -> jax.Array:
    """Mean cross entropy, in nats, of predicting `tokens[:, 1:]` from `tokens[:, :-1]`."""
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
