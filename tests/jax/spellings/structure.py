"""The same sites inside what programs are made of: jit, scan, while, cond, remat, derivative rules, vmap."""



import jax
import jax.numpy as jnp
import optax

from kpt.ops.mask import Causal
from tests.jax.spellings.table import D, N, T, Table, site

table = Table()
attention, rms = site("attention", terms=(Causal(),)), site("rms_norm", arrays="x weight")
relu = site("linear_act", activation="relu")


def attend(x):
    q = x.reshape(2, T, N, D // N)
    s = jnp.einsum("btnh,bsnh->bnts", q, q) / 2
    p = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((T, T), bool)), s, -1e9), -1)
    return jnp.einsum("bnts,bsnh->btnh", p, q).reshape(2, T, D)


def norm(x, g):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * g


def block(x, g):
    return x + attend(norm(x, g))


table.add("jit", lambda x, g: jax.jit(block)(x, g), attention, rms)
table.add("jit_in_jit", lambda x, g: jax.jit(lambda x: jax.jit(attend)(jax.jit(norm)(x, g)))(x), attention, rms)
table.add("remat", lambda x, g: jax.checkpoint(block)(x, g), attention, rms)
table.add("remat_policy", lambda x, g: jax.checkpoint(block, policy=jax.checkpoint_policies.dots_saveable)(x, g), attention, rms)
table.add("scan_over_layers", lambda x, g, layers: jax.lax.scan(lambda h, w: (block(h, g) @ w, None), x, layers)[0], attention, rms)
table.add("scan_of_remat", lambda x, layers: jax.lax.scan(jax.checkpoint(lambda h, w: (jax.nn.relu(attend(h) @ w), None)), x, layers)[0],
          attention, relu)
table.add("scan_mask_from_outside", lambda x, layers: (lambda mask: jax.lax.scan(lambda h, w: (_masked(h, mask) @ w, None), x, layers)[0])(
    jnp.tril(jnp.ones((T, T), bool))), attention)
table.add("cond", lambda x, g: jax.lax.cond(x.sum() > 0, attend, lambda x: norm(x, g), x), attention, rms)
table.add("while", lambda x: jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, attend(c[1])), (0, x))[1], attention, gradients=False)
table.add("fori", lambda x: jax.lax.fori_loop(0, 2, lambda i, h: attend(h), x), attention)
table.add("map", lambda x, g: jax.lax.map(lambda r: norm(r, g), x), rms)
table.add("vmap", lambda layers, g: jax.vmap(lambda w: norm(w, g))(layers), rms)
table.add("vmap_of_a_projection", lambda x, w1: jax.vmap(lambda r: jax.nn.relu(r @ w1))(x), relu)
table.add("named_call", lambda x: jax.named_call(attend, name="attend")(x), attention)
table.add("two_layers", lambda x, g: block(block(x, g), g), attention, rms, attention, rms)


def _masked(x, mask):
    q = x.reshape(2, T, N, D // N)
    p = jax.nn.softmax(jnp.where(mask, jnp.einsum("btnh,bsnh->bnts", q, q) / 2, -1e9), -1)
    return jnp.einsum("bnts,bsnh->btnh", p, q).reshape(2, T, D)


@jax.custom_vjp
def clipped(x, g):
    return norm(x, g)


clipped.defvjp(lambda x, g: (norm(x, g), (x, g)), lambda res, ct: jax.vjp(norm, *res)[1](jnp.clip(ct, -1, 1)))
table.add("custom_vjp", lambda x, g: clipped(x, g), rms)


@table(attention, rms, relu, site("linear_cross_entropy", arrays="x w labels"))
def a_language_model(x, g, w1, w2, head, labels):
    h = x + attend(norm(x, g))
    h = h + jax.nn.relu(h @ w1) @ w2
    return optax.softmax_cross_entropy_with_integer_labels(h @ head, labels).mean()
