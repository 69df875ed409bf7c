"""Attention as people write it."""



import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kpt.ops.mask import Bias, Causal, Explicit, Lengths, Segments, Window
from tests.jax.spellings.table import D, H, K, N, S, T, Table, site

table = Table()
R = 1 / math.sqrt(H)
LOW = float(np.finfo(np.float32).min)
plain = site("attention", scale=R, terms=(), logits_soft_cap=None, arrays="q k v")
causal = site("attention", scale=R, terms=(Causal(),), logits_soft_cap=None, arrays="q k v")
padded = site("attention", scale=R, terms=(Explicit(),), arrays="q k v keep", keep=(2, 1, 1, T))
padded_causal = site("attention", scale=R, terms=(Causal(), Explicit()), arrays="q k v keep", keep=(2, 1, 1, T))
grouped = site("attention", scale=R, terms=(), arrays="q k v", q=(2, T, N, H), k=(2, T, K, H), v=(2, T, K, H))


def tril():
    return jnp.tril(jnp.ones((T, T), bool))


def attend(q, k, v, change=lambda s: s * R, normalise=lambda s: jax.nn.softmax(s, -1)):
    """[B,T,N,H] throughout; `change` is what happens to the scores [B,N,T,S]."""
    return jnp.einsum("bnts,bsnh->btnh", normalise(change(jnp.einsum("btnh,bsnh->bnts", q, k))), v)


def scored(name, change, expect, *extra, dtype=None):
    """A spelling that differs in what it does between q k^T and softmax; `extra` names its further inputs."""
    def fn(q, k, v): return attend(q, k, v, change)  # noqa: E704
    if extra == ("pad",):
        def fn(q, k, v, pad): return attend(q, k, v, lambda s: change(s, pad))  # noqa: E704
    elif extra == ("segments",):
        def fn(q, k, v, segments): return attend(q, k, v, lambda s: change(s, segments))  # noqa: E704
    elif extra == ("lengths",):
        def fn(q, k, v, lengths): return attend(q, k, v, lambda s: change(s, lengths))  # noqa: E704
    elif extra == ("bias",):
        def fn(q, k, v, bias): return attend(q, k, v, lambda s: change(s, bias))  # noqa: E704
    table.add(name, fn, expect, dtype=dtype)


# Scale: before, after, by multiplication, by division, folded into q or k, as an array, none.
scored("scale_multiplied", lambda s: s * R, plain)
scored("scale_divided", lambda s: s / np.sqrt(H), plain)
scored("scale_divided_by_jnp_sqrt", lambda s: s / jnp.sqrt(H), plain)
scored("scale_rsqrt", lambda s: s * jax.lax.rsqrt(jnp.float32(H)), plain)
scored("scale_power", lambda s: s * (H**-0.5), plain)
scored("scale_none", lambda s: s, site("attention", scale=1.0))
scored("scale_negative", lambda s: -s, site("attention", scale=-1.0))
scored("scale_twice", lambda s: s / 2 * 0.5, site("attention", scale=0.25))
table.add("scale_in_q", lambda q, k, v: attend(q * R, k, v, lambda s: s), plain)
table.add("scale_in_k", lambda q, k, v: attend(q, k / math.sqrt(H), v, lambda s: s), plain)
table.add("scale_in_both", lambda q, k, v: attend(q * H**-0.25, k * H**-0.25, v, lambda s: s), plain)

# Products: @, dot_general, matmul, tensordot by head, transposed layouts.
@table(plain)
def matmul_bhtd(q, k, v):
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    return (jax.nn.softmax(q @ k.swapaxes(-1, -2) * R, -1) @ v).transpose(0, 2, 1, 3)

@table(plain)
def output_left_in_bhtd(q, k, v):
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q, k, v))
    return jnp.matmul(jax.nn.softmax(jnp.matmul(q, k.mT) / math.sqrt(H)), v)

@table(plain)
def time_first(q, k, v):
    q, k, v = (x.transpose(1, 0, 2, 3) for x in (q, k, v))
    weights = jax.nn.softmax(jnp.einsum("tbnh,sbnh->bnts", q, k) * R, axis=-1)
    return jnp.einsum("bnts,sbnh->tbnh", weights, v)

@table(plain)
def scores_transposed(q, k, v):
    s = jnp.einsum("bsnh,btnh->bnst", k, q) * R
    return jnp.einsum("bnst,bsnh->btnh", jax.nn.softmax(s, axis=2), v)

@table(plain)
def heads_last(q, k, v):
    s = jnp.einsum("btnh,bsnh->btsn", q, k) * R
    return jnp.einsum("btsn,bsnh->btnh", jax.nn.softmax(s, axis=-2), v)

@table(plain)
def dot_general(q, k, v):
    s = jax.lax.dot_general(q, k, (((3,), (3,)), ((0, 2), (0, 2)))) * R
    return jax.lax.dot_general(jax.nn.softmax(s, -1), v, (((3,), (1,)), ((0, 1), (0, 2))))

@table(plain)
def batch_and_heads_merged(q, k, v):
    q, k, v = (x.transpose(0, 2, 1, 3).reshape(8, T, H) for x in (q, k, v))
    return jax.nn.softmax(q @ k.transpose(0, 2, 1) * R, -1) @ v

@table(plain)
def vmapped_over_batch_and_head(q, k, v):
    one = lambda q, k, v: jax.nn.softmax(q @ k.T * R) @ v  # noqa: E731
    return jax.vmap(jax.vmap(one, in_axes=1, out_axes=1))(q, k, v)

@table(*[site("attention", scale=R, q=(2, T, 1, H))] * N)
def a_loop_over_heads(q, k, v):
    outs = []
    for n in range(N):
        s = q[:, :, n] @ k[:, :, n].swapaxes(1, 2) * R
        outs.append(jax.nn.softmax(s, -1) @ v[:, :, n])
    return jnp.stack(outs, 2)

@table(site("attention", scale=R, q=(N, T, 1, H), k=(N, T, 1, H)))  # heads do as a batch
def no_batch(q, k, v):
    return jnp.einsum("nts,snh->tnh", jax.nn.softmax(jnp.einsum("tnh,snh->nts", q[0], k[0]) * R, -1), v[0])

@table(site("attention", scale=R, q=(1, T, 1, H), k=(1, T, 1, H)))
def one_head_no_batch(q, k, v):
    return jax.nn.softmax(q[0, :, 0] @ k[0, :, 0].T * R) @ v[0, :, 0]

@table(site("attention", scale=R, v=(2, T, N, 5)))
def values_of_another_size(q, k, v5):
    return attend(q, k, v5)

# Softmax by hand.
table.add("softmax_by_hand", lambda q, k, v: attend(q, k, v, normalise=lambda s: (
    (e := jnp.exp(s - s.max(-1, keepdims=True))) / e.sum(-1, keepdims=True))), plain)
table.add("softmax_by_hand_unshifted", lambda q, k, v: attend(q, k, v, normalise=lambda s: (
    jnp.exp(s) / jnp.sum(jnp.exp(s), -1, keepdims=True))), plain)
table.add("softmax_by_hand_inverse", lambda q, k, v: attend(q, k, v, normalise=lambda s: (
    (e := jnp.exp(s - jax.lax.stop_gradient(s.max(-1, keepdims=True)))) * (1 / e.sum(-1, keepdims=True)))), plain)
table.add("softmax_by_logsumexp", lambda q, k, v: attend(q, k, v, normalise=lambda s: (
    jnp.exp(s - jax.nn.logsumexp(s, -1, keepdims=True)))), plain)
table.add("softmax_by_log_softmax", lambda q, k, v: attend(q, k, v, normalise=lambda s: jnp.exp(jax.nn.log_softmax(s))), plain)

@table(causal)
def normalised_late(q, k, v):
    s = jnp.where(tril(), jnp.einsum("btnh,bsnh->bnts", q, k) * R, -jnp.inf)
    e = jnp.exp(s - s.max(-1, keepdims=True))
    return jnp.einsum("bnts,bsnh->btnh", e, v) / e.sum(-1).transpose(0, 2, 1)[..., None]

@table(plain)
def normalised_late_matmul(q, k, v):
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    e = jnp.exp(q @ k.mT * R)
    return (e @ v) / e.sum(-1, keepdims=True)

# Dtypes.
table.add("bf16_softmax_in_f32", lambda q, k, v: attend(q, k, v, change=lambda s: s, normalise=lambda s: (
    jax.nn.softmax(s.astype(jnp.float32), -1).astype(jnp.bfloat16))), site("attention", out_dtype="bfloat16", scale=1.0), dtype="bfloat16")

@table(site("attention", out_dtype="bfloat16", scale=R, terms=(Causal(),)), dtype="bfloat16")
def bf16_scores_in_f32(q, k, v):
    s = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32) * R
    p = jax.nn.softmax(jnp.where(tril(), s, -1e30), -1)
    return jnp.einsum("bnts,bsnh->btnh", p.astype(v.dtype), v)

@table(site("attention", out_dtype="float32", scale=R), dtype="bfloat16")
def bf16_upcast_before(q, k, v):
    return attend(q.astype(jnp.float32), k.astype(jnp.float32), v.astype(jnp.float32)).astype(jnp.bfloat16)

# Causal masks.
scored("causal_where_tril", lambda s: jnp.where(tril(), s * R, -jnp.inf), causal)
scored("causal_where_tril_4d", lambda s: jnp.where(tril()[None, None], s * R, LOW), causal)
scored("causal_where_tril_ones_eq_0", lambda s: jnp.where(jnp.tril(jnp.ones((T, T))) == 0, -jnp.inf, s * R), causal)
scored("causal_where_triu", lambda s: jnp.where(jnp.triu(jnp.ones((T, T), bool), 1), -1e10, s * R), causal)
scored("causal_where_iota", lambda s: jnp.where(jnp.arange(T)[:, None] >= jnp.arange(T), s * R, -jnp.inf), causal)
scored("causal_where_iota_strict", lambda s: jnp.where(jnp.arange(T)[None] < jnp.arange(T)[:, None] + 1, s * R, -1e9), causal)
scored("causal_broadcasted_iota", lambda s: jnp.where(
    jax.lax.broadcasted_iota(jnp.int32, s.shape, 3) > jax.lax.broadcasted_iota(jnp.int32, s.shape, 2), -1e9, s * R), causal)
scored("causal_numpy_constant", lambda s: jnp.where(np.tril(np.ones((T, T), bool)), s * R, -np.inf), causal)
scored("causal_buffer_slice", lambda s: jnp.where(jnp.asarray(np.tril(np.ones((1, 1, 32, 32), bool)))[:, :, :T, :T], s * R, LOW), causal)
scored("causal_buffer_dynamic_slice", lambda s: jnp.where(jax.lax.dynamic_slice(
    jnp.asarray(np.tril(np.ones((1, 1, 32, 32), bool))), (0, 0, 0, 0), (1, 1, T, T)), s * R, LOW), causal)
scored("causal_added", lambda s: s * R + jnp.where(tril(), 0.0, -jnp.inf), causal)
scored("causal_added_finite", lambda s: s * R + jnp.where(tril(), 0.0, -1e9), causal)
scored("causal_added_triu_full", lambda s: s * R + jnp.triu(jnp.full((T, T), -jnp.inf), 1), causal)
scored("causal_added_numpy", lambda s: s * R + np.triu(np.full((T, T), -1e9, np.float32), 1), causal)
scored("causal_one_minus_mask", lambda s: s * R - 1e10 * (1 - jnp.tril(jnp.ones((T, T)))), causal)
scored("causal_gpt2", lambda s: s * R * (m := jnp.tril(jnp.ones((T, T)))) - 1e10 * (1 - m), causal)
scored("causal_before_scale", lambda s: jnp.where(tril(), s, -jnp.inf) * R, causal)
scored("causal_masked_twice", lambda s: jnp.where(tril(), jnp.where(tril(), s * R, -1e9), -1e9), causal)
scored("causal_flax_bias", lambda s: s * R + jax.lax.select(
    jnp.broadcast_to(tril(), s.shape), jnp.zeros(s.shape), jnp.full(s.shape, LOW)), causal)
scored("window", lambda s: jnp.where(jnp.arange(T)[:, None] - jnp.arange(T)[None] < 4, s * R, -jnp.inf),
       site("attention", terms=(Window(3, None),)))
scored("causal_window", lambda s: jnp.where(((d := jnp.arange(T)[:, None] - jnp.arange(T)) >= 0) & (d < 4), s * R, LOW),
       site("attention", terms=(Causal(), Window(3, None))))
scored("causal_window_tril_xor", lambda s: jnp.where(tril() & jnp.triu(jnp.ones((T, T), bool), -3), s * R, LOW),
       site("attention", terms=(Causal(), Window(3, None))))
scored("window_both_sides", lambda s: jnp.where(jnp.abs(jnp.arange(T)[:, None] - jnp.arange(T)) <= 3, s * R, LOW),
       site("attention", terms=(Causal(3), Window(3, None))))
scored("prefix", lambda s: jnp.where(tril() | (jnp.arange(T) < 5), s * R, LOW), site("attention", terms=(Explicit(),), keep=(1, 1, T, T)))

# Padding, segments, lengths, biases.
scored("padding_where", lambda s, pad: jnp.where(pad[:, None, None], s * R, -1e9), padded, "pad")
scored("padding_added", lambda s, pad: s * R + jnp.where(pad, 0.0, LOW)[:, None, None], padded, "pad")
scored("padding_one_minus", lambda s, pad: s * R + (1.0 - pad[:, None, None].astype(jnp.float32)) * -1e9, padded, "pad")
scored("padding_as_int", lambda s, pad: jnp.where(pad.astype(jnp.int32)[:, None, None] == 0, LOW, s * R), padded, "pad")
scored("padding_and_causal", lambda s, pad: jnp.where(tril() & pad[:, None, None], s * R, LOW), padded_causal, "pad")
scored("padding_then_causal", lambda s, pad: jnp.where(
    tril(), jnp.where(pad[:, None, None], s * R, LOW), LOW), padded_causal, "pad")
scored("padding_times_causal", lambda s, pad: jnp.where(
    (tril().astype(jnp.float32) * pad[:, None, None].astype(jnp.float32)) > 0, s * R, LOW), padded_causal, "pad")
scored("padding_both_ways", lambda s, pad: jnp.where(pad[:, None, None] & pad[:, None, :, None], s * R, -1e9),
       site("attention", terms=(Explicit(),)), "pad")
scored("flax_combined_masks", lambda s, pad: jnp.where(nn.combine_masks(
    nn.make_attention_mask(pad, pad), nn.make_causal_mask(pad)) > 0, s * R, LOW), site("attention", terms=(Causal(), Explicit())), "pad")
segmented = site("attention", terms=(Segments(),), arrays="q k v q_segment_ids kv_segment_ids", q_segment_ids=(2, T), kv_segment_ids=(2, T))
scored("segments", lambda s, segments: jnp.where(
    (segments[:, :, None] == segments[:, None])[:, None], s * R, -1e9), segmented, "segments")
scored("segments_not_equal", lambda s, segments: jnp.where(
    segments[:, None, :, None] != segments[:, None, None], -jnp.inf, s * R), segmented, "segments")
scored("segments_causal", lambda s, segments: jnp.where(
    tril() & (segments[:, None, :, None] == segments[:, None, None]), s * R, LOW),
    site("attention", terms=(Causal(), Segments())), "segments")
scored("segments_flax", lambda s, segments: jnp.where(
    nn.make_attention_mask(segments, segments, jnp.equal) > 0, s * R, LOW), segmented, "segments")
by_length = site("attention", terms=(Lengths(),), arrays="q k v kv_lengths", kv_lengths=(2,))
scored("lengths", lambda s, lengths: jnp.where(jnp.arange(T) < lengths[:, None, None, None], s * R, LOW), by_length, "lengths")
scored("lengths_or_equal", lambda s, lengths: jnp.where(jnp.arange(T) > lengths[:, None, None, None] - 1, LOW, s * R), by_length, "lengths")
scored("lengths_listed", lambda s, lengths: jnp.where(jnp.array(range(T)) < lengths[:, None, None, None], s * R, LOW), by_length, "lengths")
scored("lengths_shared", lambda s, lengths: jnp.where(jnp.arange(T) < lengths[0], s * R, LOW), by_length, "lengths")
biased = site("attention", scale=R, terms=(Bias(),), arrays="q k v bias", bias=(1, N, T, T))
scored("bias", lambda s, bias: s * R + bias, biased, "bias")
scored("bias_subtracted", lambda s, bias: s * R - bias, biased, "bias")
scored("bias_before_scale", lambda s, bias: (s + bias) * R, biased, "bias")
scored("bias_causal", lambda s, bias: jnp.where(tril(), s * R + bias, -jnp.inf), site("attention", terms=(Causal(), Bias())), "bias")

@table(site("attention", terms=(Explicit(), Bias()), fill=-1e9, additive=False, bias=(1, N, T, T), keep=(2, 1, 1, T)))
def bias_then_padding(q, k, v, pad, bias):
    return attend(q, k, v, lambda s: jnp.where(pad[:, None, None], s * R + bias, -1e9))

@table(site("attention", terms=(Causal(), Explicit(), Bias()), additive=True, bias=(1, N, T, T), keep=(2, 1, 1, T)))
def bias_and_masks_joined_before(q, k, v, pad, bias):
    hidden = jnp.where(pad[:, None, None] & tril(), 0.0, -1e9)
    return attend(q, k, v, lambda s: s * R + (bias + hidden))

@table(site("attention", terms=(Causal(), Bias()), bias=(1, N, 1, T)))
def alibi(q, k, v, slopes):
    s = jnp.einsum("btnh,bsnh->bnts", q, k) * R + slopes[:, None, None] * jnp.arange(T)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(tril(), s, LOW), -1), v)

# Soft cap.
scored("soft_cap", lambda s: 30 * jnp.tanh(s * R / 30), site("attention", scale=R, logits_soft_cap=30.0))
scored("soft_cap_causal", lambda s: jnp.where(tril(), jnp.tanh(s * R / 5) * 5, LOW), site("attention", scale=R, logits_soft_cap=5.0, terms=(Causal(),)))
scored("soft_cap_in_place", lambda s: jnp.tanh(s * (R / 5)) * 5, site("attention", scale=R, logits_soft_cap=5.0))

# Grouped queries.
@table(grouped)
def gqa_repeat(q, k2, v2):
    return attend(q, jnp.repeat(k2, N // K, axis=2), jnp.repeat(v2, N // K, axis=2))

@table(grouped)
def gqa_broadcast(q, k2, v2):
    wide = lambda x: jnp.broadcast_to(x[:, :, :, None], (2, T, K, N // K, H)).reshape(2, T, N, H)  # noqa: E731
    return attend(q, wide(k2), wide(v2))

@table(grouped)
def gqa_reshaped_queries(q, k2, v2):
    s = jnp.einsum("btkgh,bskh->bkgts", q.reshape(2, T, K, N // K, H), k2) * R
    return jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(s, -1), v2).reshape(2, T, N, H)

@table(grouped)
def gqa_repeat_bhtd(q, k2, v2):
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k2, v2))
    k, v = (jnp.repeat(x, N // K, axis=1) for x in (k, v))
    return (jax.nn.softmax(q @ k.mT * R, -1) @ v).transpose(0, 2, 1, 3)

@table(grouped)  # the query heads are reordered for it
def gqa_tiled(q, k2, v2):
    return attend(q, jnp.tile(k2, (1, 1, N // K, 1)), jnp.tile(v2, (1, 1, N // K, 1)))

mqa = site("attention", scale=R, q=(2, T, N, H), k=(2, T, 1, H), v=(2, T, 1, H))

@table(mqa)
def mqa_einsum(q, k1, v1):
    return jnp.einsum("bnts,bsh->btnh", jax.nn.softmax(jnp.einsum("btnh,bsh->bnts", q, k1) * R, -1), v1)

@table(mqa)
def mqa_broadcast(q, k1, v1):
    return attend(q, jnp.broadcast_to(k1[:, :, None], q.shape), jnp.broadcast_to(v1[:, :, None], q.shape))

# Lengths that differ: cross attention, decoding.
@table(site("attention", q=(2, T, N, H), k=(2, S, N, H), terms=()))
def cross(q, kx, vx):
    return attend(q, kx, vx)

@table(site("attention", q=(2, T, N, H), k=(2, S, N, H), terms=(Explicit(),), keep=(2, 1, 1, S)))
def cross_padded(q, kx, vx, padx):
    return attend(q, kx, vx, lambda s: jnp.where(padx[:, None, None], s * R, -1e9))

@table(site("attention", q=(2, 1, N, H), k=(2, S, N, H), terms=()))
def decode(q1, kx, vx):
    return attend(q1, kx, vx)

@table(site("attention", q=(2, 1, N, H), k=(2, T, N, H), terms=(Lengths(),)))
def decode_from_cache(q1, k, v, position):
    return attend(q1, k, v, lambda s: jnp.where(jnp.arange(T) <= position, s * R, LOW))

# With one query, the heads of a group do as queries of their kv head.
@table(site("attention", q=(2, N // K, K, H), k=(2, T, K, H), terms=()))
def decode_grouped(q1, k2, v2):
    s = jnp.einsum("btkgh,bskh->bkgts", q1.reshape(2, 1, K, N // K, H), k2) * R
    return jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(s, -1), v2)

@table(site("attention", q=(2, 4, N, H), k=(2, T, N, H), terms=(Causal(8),)))
def last_queries(q, k, v):
    return attend(q[:, -4:], k, v, lambda s: jnp.where(jnp.arange(8, T)[:, None] >= jnp.arange(T), s * R, LOW))

# What the libraries do.
dpa = jax.nn.dot_product_attention
table.add("dpa", lambda q, k, v: dpa(q, k, v), plain)
table.add("dpa_3d", lambda q, k, v: dpa(q[0], k[0], v[0]), plain)
table.add("dpa_scale", lambda q, k, v: dpa(q, k, v, scale=0.5), site("attention", scale=0.5))
table.add("dpa_causal", lambda q, k, v: dpa(q, k, v, is_causal=True), causal)
table.add("dpa_grouped", lambda q, k2, v2: dpa(q, k2, v2), grouped)
table.add("dpa_bias", lambda q, k, v, bias: dpa(q, k, v, bias=bias), biased)
table.add("dpa_mask", lambda q, k, v, pad: dpa(q, k, v, mask=pad[:, None, None]), padded)
table.add("dpa_mask_causal", lambda q, k, v, pad: dpa(q, k, v, mask=pad[:, None, None], is_causal=True), padded_causal)
table.add("dpa_lengths", lambda q, k, v, lengths: dpa(q, k, v, key_value_seq_lengths=lengths), by_length)
table.add("dpa_both_lengths", lambda q, k, v, lengths: dpa(q, k, v, key_value_seq_lengths=lengths, query_seq_lengths=lengths), site("attention"))
# jax 0.7.2 does nothing with a window that comes without mask, causality or lengths: there, the program is plain attention.
probe = jnp.eye(8)[:, None]
applied = bool(jnp.any(dpa(probe, probe, probe, local_window_size=3) != dpa(probe, probe, probe)))
table.add("dpa_window", lambda q, k, v: dpa(q, k, v, local_window_size=3),
          site("attention", terms=(Causal(3), Window(3, None)) if applied else ()))
table.add("dpa_causal_window", lambda q, k, v: dpa(q, k, v, local_window_size=(3, 0), is_causal=True),
          site("attention", terms=(Causal(), Window(3, None))))
table.add("dpa_bf16", lambda q, k, v: dpa(q, k, v, is_causal=True), site("attention", out_dtype="bfloat16"), dtype="bfloat16")
table.add("nnx_dpa", lambda q, k, v: nnx.dot_product_attention(q, k, v, mask=nnx.make_causal_mask(q[..., 0, 0])), causal)
table.add("linen_dpa", lambda q, k, v: nn.dot_product_attention(q, k, v), plain)

nnx_mha = nnx.MultiHeadAttention(N, D, decode=False, rngs=nnx.Rngs(0))
linen_mha = nn.MultiHeadDotProductAttention(N)
linen_variables = linen_mha.init(jax.random.key(0), jnp.zeros((2, T, D)))
small = {"scale": 1 / math.sqrt(D // N), "q": (2, T, N, D // N)}
table.add("nnx_mha", lambda x: nnx_mha(x), site("attention", terms=(), **small))
table.add("nnx_mha_causal", lambda x: nnx_mha(x, mask=nnx.make_causal_mask(x[..., 0])), site("attention", terms=(Causal(),), **small))
table.add("nnx_mha_cross", lambda x, h: nnx_mha(x, h[:, :S]), site("attention", terms=(), k=(2, S, N, D // N)))
table.add("nnx_mha_padded", lambda x, pad: nnx_mha(x, mask=nnx.make_attention_mask(pad, pad)), site("attention", terms=(Explicit(),), **small))
table.add("linen_mha", lambda x: linen_mha.apply(linen_variables, x), site("attention", terms=(), **small))
table.add("linen_mha_causal", lambda x: linen_mha.apply(
    linen_variables, x, mask=nn.make_causal_mask(x[..., 0])), site("attention", terms=(Causal(),), **small))
