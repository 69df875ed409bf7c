"""A projection followed by an activation, and gated units, as people write them."""



import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.jax.plain_kernels import ACTIVATIONS
from tests.jax.spellings.table import D, F, Table, site

table = Table()


def act(name, arrays="x w b", **more):
    return site("linear_act", activation=name, arrays=arrays, x=(2, 12, D), w=(D, F), **more)


SPELLED = {
    "relu": [jax.nn.relu, lambda y: jnp.maximum(y, 0), lambda y: jnp.where(y > 0, y, 0), lambda y: y * (y > 0), lambda y: jnp.clip(y, 0)],
    "gelu": [lambda y: jax.nn.gelu(y, approximate=False), lambda y: 0.5 * y * (1 + jax.lax.erf(y / np.sqrt(2))),
             lambda y: y * jax.scipy.stats.norm.cdf(y), lambda y: y * 0.5 * jax.lax.erfc(-y * np.sqrt(0.5))],
    "gelu_tanh": [jax.nn.gelu, lambda y: 0.5 * y * (1 + jnp.tanh(0.7978845608 * (y + 0.044715 * y * y * y))),
                  lambda y: 0.5 * y * (1 + jnp.tanh(jnp.sqrt(2 / jnp.pi) * (y + 0.044715 * jnp.power(y, 3)))),
                  lambda y: y * jax.nn.sigmoid(2 * 0.7978845608 * (y + 0.044715 * y**3))],
    "silu": [jax.nn.silu, lambda y: y * jax.nn.sigmoid(y), lambda y: y / (1 + jnp.exp(-y)), nn.swish],
    "sigmoid": [jax.nn.sigmoid, lambda y: 1 / (1 + jnp.exp(-y)), lambda y: 0.5 * (jnp.tanh(y / 2) + 1)],
    "tanh": [jnp.tanh],
    "quick_gelu": [lambda y: y * jax.nn.sigmoid(1.702 * y)],
    "relu2": [lambda y: jnp.square(jax.nn.relu(y)), lambda y: jax.nn.relu(y) * jnp.maximum(y, 0)],
    "softplus": [jax.nn.softplus, lambda y: jnp.log1p(jnp.exp(y)), lambda y: jnp.logaddexp(y, 0.0)],
    "elu": [jax.nn.elu],
    "mish": [lambda y: y * jnp.tanh(jax.nn.softplus(y)), jax.nn.mish],
}  # fmt: skip
for name, spelled in SPELLED.items():
    for i, f in enumerate(spelled):
        table.add(f"{name}_{i}", lambda x, w1, b1, f=f: f(x @ w1 + b1), act(name))

table.add("no_bias", lambda x, w1: jax.nn.relu(x @ w1), act("relu", "x w"))
table.add("bias_first", lambda x, w1, b1: jax.nn.relu(b1 + x @ w1), act("relu"))
table.add("einsum", lambda x, w1: jax.nn.silu(jnp.einsum("btd,df->btf", x, w1)), act("silu", "x w"))
table.add("transposed_weight", lambda x, wt: jax.nn.silu(jnp.einsum("btd,fd->btf", x, wt)), act("silu", "x w"))
table.add("weight_T", lambda x, wt: jax.nn.silu(x @ wt.T), act("silu", "x w"))
table.add("weight_first", lambda x2, wt: jax.nn.silu(wt @ x2.T), site("linear_act", x=(F, D), w=(D, 12)))
table.add("flattened_rows", lambda x, w1, b1: jax.nn.gelu(x.reshape(-1, D) @ w1 + b1).reshape(2, 12, F), site("linear_act", w=(D, F)))
table.add("reshaped_before_activation", lambda x, w1: jax.nn.gelu((x.reshape(-1, D) @ w1).reshape(2, 12, F)), site("linear_act", w=(D, F)))
table.add("vmapped", lambda x, w1, b1: jax.vmap(jax.vmap(lambda r: jax.nn.relu(w1.T @ r + b1)))(x), act("relu"))
table.add("vector", lambda g, w1, b1: jax.nn.relu(g @ w1 + b1), site("linear_act", w=(D, F)))
table.add("mlp", lambda x, w1, b1, w2: jax.nn.gelu(x @ w1 + b1) @ w2, act("gelu_tanh"))
table.add("two_layers", lambda x, w1, b1, w2: jnp.tanh(jax.nn.gelu(x @ w1 + b1) @ w2), act("gelu_tanh"), site("linear_act", activation="tanh"))
table.add("bf16", lambda x, w1, b1: jax.nn.gelu(x @ w1 + b1), act("gelu_tanh", out_dtype="bfloat16"), dtype="bfloat16")
table.add("bf16_silu_in_f32", lambda x, w1: jax.nn.silu((x @ w1).astype(jnp.float32)).astype(jnp.bfloat16),
          act("silu", "x w", out_dtype="bfloat16"), dtype="bfloat16")

linen_dense, nnx_dense = nn.Dense(F), nnx.Linear(D, F, rngs=nnx.Rngs(0))
table.add("linen_dense", lambda x, w1, b1: nn.relu(linen_dense.apply({"params": {"kernel": w1, "bias": b1}}, x)), act("relu"))
table.add("nnx_linear", lambda x: nnx.gelu(nnx_dense(x)), act("gelu_tanh"))


def unit(name, arrays="x w_gate w_up", **more):
    return site("glu", activation=name, arrays=arrays, x=(2, 12, D), w_gate=(D, F), w_up=(D, F), **more)


for short, name in {"swiglu": "silu", "geglu": "gelu_tanh", "geglu_exact": "gelu", "reglu": "relu", "glu": "sigmoid"}.items():
    f = ACTIVATIONS[name]
    table.add(short, lambda x, w1, w3, f=f: f(x @ w1) * (x @ w3), unit(name))
    table.add(f"{short}_fused", lambda x, w13, f=f: f((y := jnp.split(x @ w13, 2, -1))[0]) * y[1], unit(name))

table.add("up_first", lambda x, w1, w3: (x @ w3) * jax.nn.silu(x @ w1), unit("silu"))
table.add("with_biases", lambda x, w1, b1, w3, b3: jax.nn.silu(x @ w1 + b1) * (x @ w3 + b3), unit("silu", "x w_gate w_up b_gate b_up"))
table.add("one_bias", lambda x, w1, b1, w3: jax.nn.silu(x @ w1 + b1) * (x @ w3), unit("silu", "x w_gate w_up b_gate"))
table.add("then_down", lambda x, w1, w3, w2: (jax.nn.silu(x @ w1) * (x @ w3)) @ w2, unit("silu"))
table.add("fused_sliced", lambda x, w13: jax.nn.silu((y := x @ w13)[..., :F]) * y[..., F:], unit("silu"))
table.add("fused_second_half_gates", lambda x, w13: (y := x @ w13)[..., :F] * jax.nn.silu(y[..., F:]), unit("silu"))
table.add("fused_biased", lambda x, w13, b13: jax.nn.silu((y := x @ w13 + b13)[..., :F]) * y[..., F:],
          unit("silu", "x w_gate w_up b_gate b_up"))
table.add("fused_stacked", lambda x, w13: jax.nn.silu((y := (x @ w13).reshape(2, 12, 2, F))[:, :, 0]) * y[:, :, 1], unit("silu"))
table.add("fused_einsum", lambda x, w13: jax.nn.silu((y := jnp.einsum("btd,dcf->cbtf", x, w13.reshape(D, 2, F)))[0]) * y[1], unit("silu"))
table.add("jax_nn_glu", lambda x, w13: jax.nn.glu(x @ w13), unit("sigmoid"))
table.add("silu_spelled_out", lambda x, w1, w3: (a := x @ w1) * jax.nn.sigmoid(a) * (x @ w3), unit("silu"))
table.add("bf16_glu", lambda x, w1, w3: jax.nn.silu(x @ w1) * (x @ w3), unit("silu", out_dtype="bfloat16"), dtype="bfloat16")

# The factors in any order, the activation written out, two projections or one that is split, either half the gate.
MINGLED = {
    "a_up_sigmoid": ("silu", lambda a, u: a * u * jax.nn.sigmoid(a)),
    "sigmoid_of_both": ("silu", lambda a, u: jax.nn.sigmoid(a) * (a * u)),
    "swish_by_exp": ("silu", lambda a, u: a * u / (1 + jnp.exp(-a))),
    "swish_inverse": ("silu", lambda a, u: u * (a * (1 / (1 + jnp.exp(-a))))),
    "geglu_tanh": ("gelu_tanh", lambda a, u: 0.5 * a * u * (1 + jnp.tanh(0.7978845608 * (a + 0.044715 * a**3)))),
    "geglu_erf": ("gelu", lambda a, u: u * 0.5 * a * (1 + jax.lax.erf(a / np.sqrt(2)))),
    "reglu_squared": ("relu2", lambda a, u: jax.nn.relu(a) * u * jax.nn.relu(a)),
}  # fmt: skip
for short, (name, f) in MINGLED.items():
    table.add(short, lambda x, w1, w3, f=f: f(x @ w1, x @ w3), unit(name))
    table.add(f"{short}_split", lambda x, w13, f=f: f(*jnp.split(x @ w13, 2, -1)), unit(name))
table.add("a_up_sigmoid_second_half", lambda x, w13: MINGLED["a_up_sigmoid"][1](*jnp.split(x @ w13, 2, -1)[::-1]), unit("silu"))
table.add("a_up_sigmoid_biased", lambda x, w1, b1, w3, b3: MINGLED["a_up_sigmoid"][1](x @ w1 + b1, x @ w3 + b3),
          unit("silu", "x w_gate w_up b_gate b_up"))
table.add("a_up_sigmoid_bf16", lambda x, w1, w3: MINGLED["a_up_sigmoid"][1](x @ w1, x @ w3), unit("silu"), dtype="bfloat16")
