"""Rotary embeddings as people write them."""



import jax
import jax.numpy as jnp

from tests.jax.spellings.table import H, N, T, Table, site

table = Table()
half = site("rope", interleaved=False, arrays="x cos sin", x=(2, T, N, H), cos=(1, T, H), sin=(1, T, H))
pairs = site("rope", interleaved=True, arrays="x cos sin", x=(2, T, N, H), cos=(1, T, H), sin=(1, T, H))


def rotate_half(x):
    return jnp.concatenate([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)


def tables(a):
    a = jnp.concatenate([a, a], -1)[:, None]
    return jnp.cos(a), jnp.sin(a)


@table(half)
def rotate_half_whole(q, angles):
    cos, sin = tables(angles)
    return q * cos + rotate_half(q) * sin

@table(half)
def rotate_half_split(q, angles):
    cos, sin = tables(angles)
    a, b = jnp.split(q, 2, -1)
    return sin * jnp.concatenate((-b, a), axis=-1) + cos * q

@table(half)
def two_halves(q, angles):
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(q, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

@table(half)
def two_halves_by_slices(q, angles):
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    a, b = q[..., : H // 2], q[..., H // 2 :]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

@table(site("rope", x=(2, T, 1, H), cos=(1, T, H)))
def one_head(q, angles):
    cos, sin = tables(angles)
    return q[:, :, :1] * cos + rotate_half(q[:, :, :1]) * sin

@table(site("rope", x=(2, T, N, H), cos=(1, T, H)))
def heads_before_time(q, angles):
    cos, sin = (t[:, 0] for t in tables(angles))
    q = q.transpose(0, 2, 1, 3)
    return q * cos + rotate_half(q) * sin

@table(site("rope", x=(2, T, N, H), cos=(2, T, H)))
def positions_by_row(q, angles, positions):
    a = (positions[..., None] * angles[0])[:, :, None]
    a = jnp.concatenate([a, a], -1)
    return q * jnp.cos(a) + rotate_half(q) * jnp.sin(a)

@table(half, half)
def queries_and_keys(q, k, angles):
    cos, sin = tables(angles)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin

@table(pairs)
def pairs_by_strides(q, angles):
    cos, sin = (jnp.repeat(f(angles), 2, -1)[:, None] for f in (jnp.cos, jnp.sin))
    turned = jnp.stack([-q[..., 1::2], q[..., ::2]], -1).reshape(q.shape)
    return q * cos + turned * sin

@table(pairs)
def pairs_by_reshape(q, angles):
    cos, sin = (jnp.repeat(f(angles), 2, -1)[:, None] for f in (jnp.cos, jnp.sin))
    p = q.reshape(2, T, N, H // 2, 2)
    turned = jnp.stack([-p[..., 1], p[..., 0]], -1).reshape(q.shape)
    return q * cos + turned * sin

@table(pairs)
def pairs_combined(q, angles):
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = q[..., ::2], q[..., 1::2]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(q.shape)

@table(pairs)
def pairs_combined_reshape(q, angles):
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    p = q.reshape(2, T, N, H // 2, 2)
    a, b = p[..., 0], p[..., 1]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(q.shape)

@table(site("rope", interleaved=False, x=(2, T, N, 4), cos=(1, T, 4)))
def partial(q, angles):
    cos, sin = (t for t in tables(angles[:, :2]))
    turned, rest = q[..., :4], q[..., 4:]
    return jnp.concatenate([turned * cos + rotate_half(turned) * sin, rest], -1)

@table(half, dtype="bfloat16")
def bf16_by_f32(q, angles):
    cos, sin = tables(angles.astype(jnp.float32))
    wide = q.astype(jnp.float32)
    return (wide * cos + rotate_half(wide) * sin).astype(q.dtype)

@table(half, site("attention", q=(2, T, N, H)))
def before_attention(q, k, v, angles):
    cos, sin = tables(angles)
    q = q * cos + rotate_half(q) * sin
    w = jnp.exp(s := jnp.einsum("btnh,bsnh->bnts", q, k)) / jnp.exp(s).sum(-1, keepdims=True)
    return jnp.einsum("bnts,bsnh->btnh", w, v)


# By complex numbers: made of pairs or of halves, the turn as exp(1j angle), from cosines and sines, or a table computed before.
def complex_pairs(q, turn):
    c = jax.lax.complex(q[..., ::2], q[..., 1::2]) * turn
    return jnp.stack([c.real, c.imag], -1).reshape(q.shape)


def complex_pairs_of_a_reshape(q, turn):
    p = q.reshape(*q.shape[:-1], -1, 2)
    c = jax.lax.complex(p[..., 0], p[..., 1]) * turn
    return jnp.stack((jnp.real(c), jnp.imag(c)), axis=-1).reshape(*q.shape)


def complex_sum(q, turn):
    c = (q[..., ::2] + 1j * q[..., 1::2]) * turn
    return jnp.stack([c.real, c.imag], -1).reshape(q.shape)


def complex_halves(q, turn):
    c = jax.lax.complex(q[..., : H // 2], q[..., H // 2 :]) * turn
    return jnp.concatenate([c.real, c.imag], -1)


TURNS = {"exp": lambda a: jnp.exp(1j * a)[:, None], "cis": lambda a: jax.lax.complex(jnp.cos(a), jnp.sin(a))[None, :, None],
         "ones": lambda a: (jnp.ones_like(a) * jnp.exp(1j * a))[:, None]}  # fmt: skip
for how, turn in TURNS.items():
    for f in (complex_pairs, complex_pairs_of_a_reshape, complex_sum, complex_halves):
        table.add(f"{f.__name__}_{how}", lambda q, angles, f=f, turn=turn: f(q, turn(angles)), half if f is complex_halves else pairs)
table.add("complex_table", lambda q, cis: complex_pairs(q, cis[:, None]), pairs)
