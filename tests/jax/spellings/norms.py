"""Layer norm and RMS norm as people write them."""



import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from tests.jax.spellings.table import D, Table, site

table = Table()
rms = site("rms_norm", eps=1e-6, weight_offset=0.0, arrays="x weight", x=(2, 12, D), weight=(D,))
bare = site("rms_norm", eps=1e-6, arrays="x")
layer = site("layer_norm", eps=1e-5, arrays="x weight bias", x=(2, 12, D), weight=(D,), bias=(D,))


def mean_square(x):
    return jnp.mean(x * x, -1, keepdims=True)


table.add("rms", lambda x, g: x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * g, rms)
table.add("rms_weight_first", lambda x, g: g * (x * jax.lax.rsqrt(mean_square(x) + 1e-6)), rms)
table.add("rms_divided", lambda x, g: x / jnp.sqrt(mean_square(x) + 1e-6) * g, rms)
table.add("rms_weight_over_root", lambda x, g: x * (g / jnp.sqrt(mean_square(x) + 1e-6)), rms)
table.add("rms_one_over_root", lambda x, g: x * (1 / jnp.sqrt(mean_square(x) + 1e-6)) * g, rms)
table.add("rms_power", lambda x, g: x * (mean_square(x) + 1e-6) ** -0.5 * g, rms)
table.add("rms_jnp_power", lambda x, g: x * jnp.power(mean_square(x) + 1e-6, -0.5) * g, rms)
table.add("rms_sum_over_n", lambda x, g: x * jax.lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True) / D + 1e-6) * g, rms)
table.add("rms_expand_dims", lambda x, g: x * jax.lax.rsqrt(jnp.square(x).mean(-1) + 1e-6)[..., None] * g, rms)
table.add("rms_einsum", lambda x, g: x * jax.lax.rsqrt(jnp.einsum("btd,btd->bt", x, x) / D + 1e-6)[..., None] * g, rms)
table.add("rms_bare", lambda x: x * jax.lax.rsqrt(mean_square(x) + 1e-6), bare)
table.add("rms_no_epsilon", lambda x: x * jax.lax.rsqrt(mean_square(x)), site("rms_norm", eps=0.0))
table.add("rms_gemma", lambda x, g: x * jax.lax.rsqrt(mean_square(x) + 1e-6) * (1 + g),
          site("rms_norm", weight_offset=1.0, arrays="x weight", weight=(D,)))
table.add("rms_2d", lambda x2, g: x2 * jax.lax.rsqrt(mean_square(x2) + 1e-6) * g, site("rms_norm", x=(12, D)))
table.add("rms_on_the_first_axis", lambda x2: x2 * jax.lax.rsqrt(jnp.mean(x2 * x2, 0) + 1e-6), site("rms_norm", x=(D, 12)))
table.add("rms_of_heads", lambda q: q * jax.lax.rsqrt(mean_square(q) + 1e-6), site("rms_norm", x=(2, 12, 4, 8)))
table.add("rms_of_heads_of_a_projection", lambda x: (lambda h: h * jax.lax.rsqrt(mean_square(h) + 1e-6))(x.reshape(2, 12, 2, D // 2)),
          site("rms_norm", x=(2, 12, 2, D // 2)))
table.add("rms_of_a_sum", lambda x, h, g: (y := x + h) * jax.lax.rsqrt(mean_square(y) + 1e-6) * g, rms)
table.add("rms_vmapped", lambda x, g: jax.vmap(jax.vmap(lambda r: r * jax.lax.rsqrt(jnp.mean(r * r) + 1e-6) * g))(x), rms)


@table(site("rms_norm", eps=1e-6, out_dtype="bfloat16", arrays="x weight"), dtype="bfloat16")
def rms_llama_bf16(x, g):
    wide = x.astype(jnp.float32)
    return g * (wide * jax.lax.rsqrt(mean_square(wide) + 1e-6)).astype(x.dtype)


@table(site("rms_norm", eps=1e-6, out_dtype="bfloat16", arrays="x weight"), dtype="bfloat16")
def rms_cast_last(x, g):
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(mean_square(wide) + 1e-6) * g.astype(jnp.float32)).astype(x.dtype)


@table(site("rms_norm", weight_offset=1.0, out_dtype="bfloat16", arrays="x weight"), dtype="bfloat16")
def rms_gemma_bf16(x, g):
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(mean_square(wide) + 1e-6) * (1.0 + g.astype(jnp.float32))).astype(x.dtype)


def by_hand(x, root):
    return (x - x.mean(-1, keepdims=True)) * root


table.add("layer", lambda x, g, b: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * g + b, layer)
table.add("layer_rsqrt", lambda x, g, b: by_hand(x, jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)) * g + b, layer)
table.add("layer_bias_first", lambda x, g, b: b + g * by_hand(x, jax.lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-5)), layer)
table.add("layer_centred_once", lambda x, g, b: (
    (c := x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(mean_square(c) + 1e-5) * g + b), layer)
table.add("layer_fast_variance", lambda x, g, b: by_hand(x, jax.lax.rsqrt(
    jnp.mean(x * x, -1, keepdims=True) - jnp.mean(x, -1, keepdims=True) ** 2 + 1e-5)) * g + b, layer)
table.add("layer_weight_on_root", lambda x, g, b: by_hand(x, jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * g) + b, layer)
table.add("layer_no_bias", lambda x, g: by_hand(x, jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)) * g,
          site("layer_norm", arrays="x weight"))
table.add("layer_bare", lambda x: by_hand(x, jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)), site("layer_norm", arrays="x"))
table.add("standardize", lambda x: jax.nn.standardize(x, axis=-1, epsilon=1e-5), site("layer_norm", eps=1e-5, arrays="x"))
table.add("layer_then_rms", lambda x, g, b: (
    lambda y: y * jax.lax.rsqrt(mean_square(y) + 1e-6))(by_hand(x, jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)) * g + b), layer, bare)
table.add("norm_feeding_a_projection", lambda x, g, w1: jax.nn.relu(
    (x * jax.lax.rsqrt(mean_square(x) + 1e-6) * g) @ w1), rms, site("linear_act", activation="relu"))



def normed(x, g=1.0):
    return x * jax.lax.rsqrt(mean_square(x) + 1e-6) * g


def folded(x, g, b):
    scale = jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * g
    return x * scale + (b - x.mean(-1, keepdims=True) * scale)


def fast(x):
    return jnp.maximum(0.0, mean_square(x) - jnp.square(x.mean(-1, keepdims=True)))


table.add("layer_folded", folded, layer)
table.add("layer_folded_in_a_row", lambda x, g, b: (
    x * (s := g / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)) - x.mean(-1, keepdims=True) * s + b), layer)
table.add("layer_fast_clipped", lambda x, g, b: by_hand(x, jax.lax.rsqrt(fast(x) + 1e-5) * g) + b, layer)
table.add("layer_fast_clipped_root", lambda x, g, b: by_hand(x, 1 / jnp.sqrt(fast(x) + 1e-5)) * g + b, layer)
table.add("layer_std_squared", lambda x, g, b: by_hand(x, 1 / jnp.sqrt(jnp.std(x, -1, keepdims=True) ** 2 + 1e-5)) * g + b, layer)
table.add("layer_std", lambda x, g, b: by_hand(x, 1 / jnp.std(x, -1, keepdims=True)) * g + b, site("layer_norm", eps=0.0))
table.add("layer_one_plus_scale", lambda x, g, b: by_hand(x, jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)) * (1 + g) + b, layer)
table.add("rms_scale_plus_one", lambda x, g: (g + 1) * (x / jnp.sqrt(mean_square(x) + 1e-6)),
          site("rms_norm", weight_offset=1.0, arrays="x weight", weight=(D,)))


# The sum before a norm, where it is used again.
fused = site("rms_norm", eps=1e-6, arrays="x residual weight", x=(2, 12, D), residual=(2, 12, D))
table.add("residual_rms", lambda x, h, g: ((y := x + h), normed(y, g)), fused)
table.add("residual_rms_stream", lambda x, h, g, w1, w2: (y := x + h) + jnp.tanh(normed(y, g) @ w1) @ w2, fused, site("linear_act"))
table.add("residual_layer", lambda x, h, g, b: ((y := h + x), folded(y, g, b)), site("layer_norm", arrays="x residual weight bias"))
table.add("residual_normed_twice", lambda x, h, g, b: ((y := x + h), normed(y, g), normed(y, b)), fused, rms)
table.add("two_norms_of_one_array", lambda x, g, b: (normed(x, g), normed(x, b)), rms, rms)
table.add("two_layer_norms_of_one_array", lambda x, g, b: (folded(x, g, b), folded(x, b, g)), layer, layer)
table.add("residual_rms_bf16", lambda x, h, g: ((y := x + h), (normed(y.astype(jnp.float32)) * g).astype(x.dtype)),
          site("rms_norm", out_dtype="bfloat16", arrays="x residual weight"), dtype="bfloat16")
table.add("residual_of_a_row", lambda x, h, g: ((y := x + h[:, :1]), normed(y, g)), rms)


# A norm that is queries and keys at once, in one spelling and dtype after the other.
def attend(h, v):
    return jax.nn.softmax(h @ h.mT) @ v


alone = site("attention", q=(2, 12, 1, D), k=(2, 12, 1, D))
table.add("rms_is_queries_and_keys", lambda x, g: attend(normed(x, g), x), rms, alone)
table.add("rms_is_queries_keys_values", lambda x, g: x + attend(h := normed(x, g), h), rms, alone)
table.add("rms_bare_is_queries_and_keys", lambda x: attend(normed(x), x), bare, alone)
table.add("rms_is_queries_and_keys_bf16", lambda x, g: attend(normed(x.astype(jnp.float32), g).astype(x.dtype), x),
          site("rms_norm", out_dtype="bfloat16"), alone, dtype="bfloat16")
table.add("layer_is_queries_and_keys", lambda x, g, b: attend(folded(x, g, b), x), layer, alone)

nnx_layer, nnx_rms = nnx.LayerNorm(D, rngs=nnx.Rngs(0)), nnx.RMSNorm(D, rngs=nnx.Rngs(0))
linen_layer, linen_rms = nn.LayerNorm(), nn.RMSNorm()
ones = jnp.ones(D)
table.add("nnx_layer", lambda x: nnx_layer(x), site("layer_norm", eps=1e-6, arrays="x weight bias"))
table.add("nnx_rms", lambda x: nnx_rms(x), site("rms_norm", eps=1e-6, arrays="x weight"))
table.add("linen_layer", lambda x, g, b: linen_layer.apply({"params": {"scale": g, "bias": b}}, x), site("layer_norm", eps=1e-6, arrays="x weight bias"))
table.add("linen_layer_slow", lambda x, g, b: nn.LayerNorm(use_fast_variance=False).apply({"params": {"scale": g, "bias": b}}, x),
          site("layer_norm", eps=1e-6, arrays="x weight bias"))
table.add("linen_layer_bare", lambda x: nn.LayerNorm(use_bias=False, use_scale=False).apply({}, x), site("layer_norm", arrays="x"))
table.add("linen_rms", lambda x, g: linen_rms.apply({"params": {"scale": g}}, x), rms)
table.add("linen_layer_bf16", lambda x, g, b: nn.LayerNorm(dtype=jnp.bfloat16).apply({"params": {"scale": g, "bias": b}}, x),
          site("layer_norm", out_dtype="bfloat16"), dtype="bfloat16")
