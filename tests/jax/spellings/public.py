"""Blocks as well-known public code writes them: its shapes, its masks and its order of operations, not its names."""



import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kpt.ops.mask import Bias, Causal, Explicit, Lengths, Segments, Window
from tests.jax.spellings.table import D, H, K, N, S, T, Table, site

table = Table()
R = 1 / math.sqrt(H)
LOW = float(np.finfo(np.float32).min)


def merged(y):
    return y.reshape(*y.shape[:2], -1)


@table(site("attention", scale=1 / math.sqrt(D // N), terms=(Causal(),), arrays="q k v", q=(2, T, N, D // N)))
def nanogpt(x, w33, w44):
    """One projection, split in three, heads by reshape and swapaxes, a buffer of ones, masked where it is 0."""
    q, k, v = jnp.split(x @ w33, 3, axis=2)
    q, k, v = (a.reshape(2, T, N, D // N).swapaxes(1, 2) for a in (q, k, v))
    att = (q @ k.swapaxes(-2, -1)) * (1.0 / math.sqrt(k.shape[-1]))
    mask = jnp.tril(jnp.ones((1, 1, 32, 32)))[:, :, :T, :T]
    att = jax.nn.softmax(jnp.where(mask == 0, float("-inf"), att), axis=-1)
    return (att @ v).swapaxes(1, 2).reshape(2, T, D) @ w44


@table(site("attention", scale=1.0, terms=(Causal(), Segments()), q=(2, T, N, H), k=(2, T, K, H), v=(2, T, K, H)))
def maxtext_packed(q, k2, v2, segments):
    """Grouped heads by a reshape of the queries, scores in float32, one big negative number added for two masks."""
    qg = q.reshape(2, T, K, N // K, H)
    weights = jnp.einsum("btkgd,bskd->bkgts", qg, k2).astype(jnp.float32)
    rows, cols = jax.lax.broadcasted_iota(jnp.int32, (T, T), 0), jax.lax.broadcasted_iota(jnp.int32, (T, T), 1)
    same = segments[:, :, None] == segments[:, None, :]
    seen = jnp.logical_and(same[:, None, None], (cols <= rows)[None, None, None])
    weights = weights + jnp.where(seen, 0.0, -0.7 * LOW * -1)
    weights = jnp.exp(weights - jnp.max(weights, -1, keepdims=True))
    return (jnp.einsum("bkgts,bskd->btkgd", weights, v2) / weights.sum(-1).transpose(0, 3, 1, 2)[..., None]).reshape(2, T, N, H)


@table(site("attention", scale=1.0, terms=(Explicit(), Bias()), bias=(1, N, T, T), keep=(2, 1, 1, T)))
def t5_relative_bias(q, k, v, pad, relative):
    """Unscaled scores; a bias looked up by bucketed distance, with the padding mask added to it."""
    distance = jnp.arange(T)[None] - jnp.arange(T)[:, None]
    far = 4 + (jnp.log(jnp.maximum(jnp.abs(distance), 1) / 4) / math.log(16 / 4) * 4).astype(jnp.int32)
    bucket = jnp.where(jnp.abs(distance) < 4, jnp.abs(distance), jnp.minimum(far, 7)) + 8 * (distance > 0)
    bias = relative[bucket].transpose(2, 0, 1)[None] + jnp.where(pad, 0.0, -1e10)[:, None, None]
    return jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) + bias), v)


@table(site("attention", scale=R, terms=(Causal(), Bias()), bias=(1, N, 1, T)))
def alibi_of_distances(q, k, v, slopes):
    """Slopes times the position of the key, known when traced; masked afterwards."""
    bias = slopes[None, :, None, None] * jnp.arange(1 - T, 1)[None, None, None, :]
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * R + bias
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(np.tril(np.ones((T, T), bool)), s, -1e30)), v)


@table(site("attention", scale=R, terms=(Causal(), Bias()), bias=(1, N, T, T)))
def alibi_over_queries_and_keys(q, k, v, slopes):
    distance = jnp.minimum(jnp.arange(T)[None] - jnp.arange(T)[:, None], 0)
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * R + slopes[:, None, None] * distance
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((T, T), bool)), s, -1e30)), v)


@table(site("attention", scale=R, logits_soft_cap=50.0, terms=(Causal(), Window(3, None)), q=(2, T, N, H), k=(2, T, K, H)))
def gemma2(q, k2, v2):
    """Queries scaled first, grouped by reshape, soft cap, a sliding window as a product of triangles."""
    qg = (q * R).reshape(2, T, K, N // K, H)
    s = jnp.einsum("BTKGH,BSKH->BTKGS", qg, k2)
    s = jnp.tanh(s / 50.0) * 50.0
    ones = jnp.ones((1, T, T), bool)
    mask = jnp.tril(ones) * (jnp.triu(ones, -3) * jnp.tril(ones, 3))
    s = jnp.where(mask[:, :, None, None, :], s, -2.3819763e38)
    return jnp.einsum("BTKGS,BSKH->BTKGH", jax.nn.softmax(s, -1).astype(k2.dtype), v2).reshape(2, T, N, H)


@table(site("rms_norm", eps=1e-6, weight_offset=0.0, arrays="x weight"), site("rms_norm", x=(2, T, N, H)),
       site("attention", scale=R, terms=(Causal(),), arrays="q k v"))  # fmt: skip
def qk_norm(q, k, v, wh, wh2):
    def norm(a, w):
        wide = a.astype(jnp.float32)
        return (wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + 1e-6)).astype(a.dtype) * w

    s = jnp.einsum("bqhd,bkhd->bhqk", norm(q, wh), norm(k, wh2)) * R
    return jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(jnp.where(nn.make_causal_mask(q[..., 0, 0], dtype=bool), s, LOW)), v)


@table(site("attention", scale=R, q=(2, T, N, H), k=(2, T, 1, H), v=(2, T, 1, H), terms=(Causal(),)))
def palm_multi_query(q, k1, v1):
    s = jnp.einsum("bnhd,bmd->bhnm", q * R, k1)
    s = s - 1e10 * (1.0 - jnp.tril(jnp.ones((T, T))))
    return jnp.einsum("bhnm,bmd->bnhd", jax.nn.softmax(s - s.max(-1, keepdims=True), -1), v1)


@table(site("attention", scale=R, q=(2, T, N, H), k=(2, T, N, H), v=(2, T, N, H), terms=()))
def vit_fused_qkv(qkv):
    """(B, T, 3, N, H), taken apart along the third axis."""
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    return (jax.nn.softmax((q * R) @ k.swapaxes(-2, -1), -1) @ v).transpose(0, 2, 1, 3).reshape(2, T, N * H)


@table(site("attention", scale=R, terms=(), arrays="q k v"))
def fused_qkv_indexed(qkv):
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    return jax.nn.dot_product_attention(q, k, v)


@table(site("attention", q=(2, N // K, K, H), k=(2, T, K, H), terms=(Lengths(),)))
def decode_with_cache(q1, k2, v2, k_new, v_new, position):
    """One token; keys and values written into a cache of fixed length, what lies behind the position hidden."""
    ck = jax.lax.dynamic_update_slice(k2, k_new, (0, position, 0, 0))
    cv = jax.lax.dynamic_update_slice(v2, v_new, (0, position, 0, 0))
    ks, vs = jnp.repeat(ck, N // K, 2), jnp.repeat(cv, N // K, 2)
    s = jnp.einsum("bthd,bshd->bhts", q1, ks) * R
    s = jnp.where((jnp.arange(T) <= position)[None, None, None], s, jnp.finfo(s.dtype).min)
    return merged(jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(s, -1), vs)), ck, cv


@table(site("attention", q=(2, 1, N, H), k=(2, T, N, H)))
def decode_linen_cache(q1, k, v, position):
    """flax's own decoding: the mask is made from the cache's index and combined with another."""
    mask = jnp.broadcast_to(jnp.arange(T) <= position, (2, 1, 1, T))
    return nn.dot_product_attention(q1, k, v, mask=nn.combine_masks(mask, jnp.ones((2, 1, 1, T))))


@table(site("attention", q=(2, 4, N, H), k=(2, T, N, H), terms=(Explicit(),)))
def chunk_of_a_prefill(q, k, v, position):
    """Four queries that start at a position known only at run time."""
    rows = jnp.arange(4) + position - 4
    s = jnp.einsum("bthd,bshd->bhts", q[:, :4], k) * R
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(jnp.arange(T)[None] <= rows[:, None], s, LOW), -1), v)


@table(site("attention", scale=R, terms=(Causal(),), arrays="q k v"))
def haiku(q, k, v):
    """Heads left in place, "htT" by einsum, the causal mask broadcast, -1e30."""
    logits = jnp.einsum("...thd,...Thd->...htT", q, k) * np.sqrt(1 / H)
    mask = np.tril(np.ones((1, 1, T, T)))
    weights = jax.nn.softmax(jnp.where(mask, logits, -1e30))
    return merged(jnp.einsum("...htT,...Thd->...thd", weights, v))


@table(site("attention", scale=R, terms=(Explicit(),), arrays="q k v keep"))
def flaxformer(q, k, v, pad):
    """The bias is made of masks first, in the scores' dtype; queries carry the scale; softmax shifted by hand."""
    bias = jax.lax.select(jnp.broadcast_to(pad[:, None, None] & pad[:, None, :, None], (2, 1, T, T)),
                          jnp.full((2, 1, T, T), 0.0), jnp.full((2, 1, T, T), -1e10))  # fmt: skip
    s = jnp.einsum("...qhd,...khd->...hqk", q / jnp.sqrt(H).astype(q.dtype), k) + bias
    e = jnp.exp(s - jax.lax.stop_gradient(s.max(axis=-1, keepdims=True)))
    return jnp.einsum("...hqk,...khd->...qhd", e / jnp.sum(e, axis=-1, keepdims=True), v)


@table(site("attention", scale=R, terms=(Causal(), Window(3, None)), arrays="q k v"))
def band_mask(q, k, v):
    rows, cols = jnp.meshgrid(jnp.arange(T), jnp.arange(T), indexing="ij")
    band = (cols > rows - 4) & (cols <= rows)
    return jax.nn.dot_product_attention(q, k, v, mask=jnp.broadcast_to(band, (2, N, T, T)))


@table(site("attention", terms=(Segments(),), arrays="q k v q_segment_ids kv_segment_ids"))
def packed_by_cumulative_sum(q, k, v, labels):
    ids = jnp.cumsum((labels == 0).astype(jnp.int32), axis=1)
    s = jnp.einsum("bqhd,bkhd->bhqk", q, k) * R
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(ids[:, None, :, None] == ids[:, None, None], s, LOW)), v)


@table(site("attention", q=(2, T, N, H), k=(2, S, N, H), terms=(Explicit(),), keep=(2, 1, 1, S)))
def perceiver_cross(q, kx, vx, padx):
    s = jnp.einsum("bqhd,bkhd->bhqk", q, kx) * R
    s = s * padx[:, None, None] + (1 - padx[:, None, None]) * -1e9
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), vx)


# softmax(where=): "hidden" has a row that sees nothing, which gives 0.
def heed(where, q, k, v, **more):
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * R, where=where, **more), v)


tril = np.tril(np.ones((T, T), bool))
padded = site("attention", scale=R, terms=(Explicit(),), arrays="q k v keep", keep=(2, 1, 1, T))
table.add("softmax_where_causal", lambda q, k, v: heed(tril, q, k, v), site("attention", scale=R, terms=(Causal(),), arrays="q k v"))
table.add("softmax_where_padded", lambda q, k, v, hidden: heed(hidden[:, None, None], q, k, v), padded)
table.add("softmax_where_padded_causal", lambda q, k, v, hidden: heed(hidden[:, None, None] & tril, q, k, v),
          site("attention", scale=R, terms=(Causal(), Explicit()), arrays="q k v keep"))
table.add("softmax_where_segments", lambda q, k, v, segments: heed(segments[:, None, :, None] == segments[:, None, None], q, k, v),
          site("attention", scale=R, terms=(Segments(),)))
table.add("softmax_where_lengths", lambda q, k, v, lengths: heed(jnp.arange(T) < lengths[:, None, None, None] - 5, q, k, v),
          site("attention", scale=R, terms=(Lengths(),)))
table.add("softmax_where_window", lambda q, k, v: heed(tril & ~np.tril(np.ones((T, T), bool), -4) & (np.arange(T) > 2), q, k, v),
          site("attention", scale=R, terms=(Explicit(),)))


@table(padded)
def weights_zeroed_again(q, k, v, hidden):
    seen = hidden[:, None, None]
    s = jnp.where(seen, jnp.einsum("bqhd,bkhd->bhqk", q, k) * R, -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", jnp.where(seen, jax.nn.softmax(s), 0.0), v)


@table(padded)
def weights_times_mask(q, k, v, hidden):
    seen = hidden[:, None, None]
    s = jnp.where(seen, jnp.einsum("bqhd,bkhd->bhqk", q, k) * R, -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s) * seen, v)


@table(site("attention", scale=R, terms=(Causal(),), arrays="q k v"))
def exponentials_times_mask(q, k, v):
    e = jnp.exp(jnp.einsum("bqhd,bkhd->bhqk", q, k) * R) * tril
    return jnp.einsum("bhqk,bkhd->bqhd", e / e.sum(-1, keepdims=True), v)
