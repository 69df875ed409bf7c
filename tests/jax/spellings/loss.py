"""Softmax cross entropy, alone and on a language-model head, as people write it."""



import jax
import jax.numpy as jnp
import optax

from tests.jax.spellings.table import D, T, Table, V, site

table = Table()


def ce(invalid="nan", **more):
    return site("cross_entropy", invalid=invalid, **({"arrays": "logits labels", "logits": (2, T, V), "labels": (2, T)} | more))


def head(invalid="nan", **more):
    return site("linear_cross_entropy", invalid=invalid, **({"arrays": "x w labels", "x": (2, T, D), "w": (D, V), "labels": (2, T)} | more))


def weighted(invalid="nan", **more):
    return head(invalid, **({"arrays": "x w labels weights", "weights": (2, T)} | more))


integer, onehot = optax.softmax_cross_entropy_with_integer_labels, optax.softmax_cross_entropy


def log_softmax_take(z, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(z), labels[..., None], -1)[..., 0]


def logsumexp_minus(z, labels):
    return jax.nn.logsumexp(z, -1) - jnp.take_along_axis(z, labels[..., None], axis=-1).squeeze(-1)


def hot_sum(z, labels):
    return -jnp.sum(jax.nn.one_hot(labels, V) * jax.nn.log_softmax(z, -1), -1)


def by_hand(z, labels):
    z = z - jax.lax.stop_gradient(z.max(-1, keepdims=True))
    return jnp.log(jnp.exp(z).sum(-1)) - jnp.take_along_axis(z, labels[..., None], -1)[..., 0]


def log_of_softmax(z, labels):
    return -jnp.log(jnp.take_along_axis(jax.nn.softmax(z), labels[..., None], -1)[..., 0])


def hot_einsum(z, labels):
    return -jnp.einsum("btv,btv->bt", jax.nn.log_softmax(z), jax.nn.one_hot(labels, V))


def hot_where(z, labels):
    return -jnp.where(labels[..., None] == jnp.arange(V), jax.nn.log_softmax(z), 0).sum(-1)


def eye(z, labels):
    return -(jnp.eye(V)[labels] * jax.nn.log_softmax(z)).sum(-1)


def vmapped(z, labels):
    return jax.vmap(jax.vmap(lambda z, y: -jax.nn.log_softmax(z)[y]))(z, labels)


def indexed(z, labels):
    z, labels = z.reshape(-1, V), labels.reshape(-1)
    return -jax.nn.log_softmax(z)[jnp.arange(2 * T), labels]


SPELLED = {"optax_integer": (integer, "nan"), "log_softmax_take": (log_softmax_take, "drop"), "logsumexp_minus": (logsumexp_minus, "nan"),
           "by_hand": (by_hand, "nan"), "optax_onehot": (lambda z, y: onehot(z, jax.nn.one_hot(y, V)), "drop"), "onehot_sum": (hot_sum, "drop"),
           "onehot_einsum": (hot_einsum, "drop"), "onehot_where": (hot_where, "drop"), "vmapped": (vmapped, "clip")}  # fmt: skip
for name, (f, invalid) in SPELLED.items():
    table.add(name, lambda logits, labels, f=f: f(logits, labels).mean(), ce(invalid))
    table.add(f"{name}_head", lambda x, head, labels, f=f: f(x @ head, labels).mean(), head(invalid))
table.add("indexed", lambda logits, labels: indexed(logits, labels), ce("clip", logits=(2 * T, V), labels=(2 * T,)))
table.add("per_token", lambda logits, labels: integer(logits, labels), ce())
table.add("mean_of_picked", lambda logits, labels: -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)), ce("drop"))
table.add("masked_mean", lambda x, head, labels, weights: (
    (integer(x @ head, labels) * weights).sum() / weights.sum()), weighted())
table.add("masked_where", lambda x, head, labels, weights: jnp.where(weights, integer(x @ head, labels), 0).sum() / weights.sum(), weighted())
table.add("weighted_mean", lambda x, head, labels, bias: (integer(x @ head, labels) * bias[0, 0, :2]).mean(), weighted())
table.add("weighted_after_a_cast", lambda x, head, labels, weights: (
    weights.astype(x.dtype) * integer((x @ head).astype(jnp.float32), labels)).sum(), weighted(), dtype="bfloat16")
table.add("masked_flat", lambda x, head, labels, weights: jnp.where(
    weights.reshape(-1), integer((x @ head).reshape(-1, V), labels.reshape(-1)), 0).sum(),
          weighted(x=(2 * T, D), labels=(2 * T,), weights=(2 * T,)))
table.add("loss_also_returned", lambda x, head, labels, weights: (
    ((each := integer(x @ head, labels)) * weights).sum(), each), head())
table.add("weighted_by_itself", lambda x, head, labels: ((each := integer(x @ head, labels)) * jnp.exp(-each)).sum(), head())
table.add("ignore_index", lambda x, head, labels: jnp.where(
    labels > 3, integer(x @ head, jnp.where(labels > 3, labels, 0)), 0).sum(), weighted())
table.add("shifted", lambda x, head, labels: integer((x @ head)[:, :-1], labels[:, 1:]).mean(), head(x=(2, T - 1, D), labels=(2, T - 1)))
table.add("shifted_x", lambda x, head, labels: integer(x[:, :-1] @ head, labels[:, 1:]).mean(), head(x=(2, T - 1, D), labels=(2, T - 1)))
table.add("flattened", lambda x, head, labels: integer((x @ head).reshape(-1, V), labels.reshape(-1)).mean(), head(x=(2 * T, D), labels=(2 * T,)))
table.add("tied", lambda x, table, labels: integer(x @ table.T, labels).mean(), head())
table.add("tied_einsum", lambda x, table, labels: integer(jnp.einsum("btd,vd->btv", x, table), labels).mean(), head())
table.add("biased", lambda x, head, bv, labels: integer(x @ head + bv, labels).mean(), head(arrays="x w b labels", b=(V,)))
table.add("soft_cap", lambda x, table, labels: integer(30 * jnp.tanh(x @ table.T / 30), labels).mean(), head(logits_soft_cap=30.0))
table.add("soft_cap_alone", lambda logits, labels: integer(jnp.tanh(logits / 5.0) * 5.0, labels), ce(logits_soft_cap=5.0))
table.add("bf16_logits", lambda logits, labels: integer(logits.astype(jnp.float32), labels).mean(), ce(), dtype="bfloat16")
table.add("bf16_head_f32_loss", lambda x, head, labels: integer((x @ head).astype(jnp.float32), labels).mean(), head(), dtype="bfloat16")
table.add("logits_also_returned", lambda x, head, labels: (integer(z := x @ head, labels).mean(), z), ce())
table.add("accuracy_as_well", lambda x, head, labels: (
    integer(z := x @ head, labels).mean(), (z.argmax(-1) == labels).mean()), ce())


# Label smoothing, and one-hot losses summed over everything at once.
def smoothed_by_hand(z, labels):
    lp = jax.nn.log_softmax(z)
    return 0.9 * -jnp.take_along_axis(lp, labels[..., None], -1)[..., 0] - 0.1 * lp.mean(-1)


def smoothed_target(z, labels):
    return -((0.9 * jax.nn.one_hot(labels, V) + 0.1 / V) * jax.nn.log_softmax(z)).sum(-1)


def low_confidence(z, labels):
    target = jnp.where(labels[..., None] == jnp.arange(V), 0.9, 0.1 / (V - 1))
    return -jnp.sum(target * jax.nn.log_softmax(z), -1)


SMOOTHED = {"smoothed_optax": (lambda z, y: onehot(z, optax.smooth_labels(jax.nn.one_hot(y, V), 0.1)), "drop", 0.1),
            "smoothed_by_hand": (smoothed_by_hand, "drop", 0.1), "smoothed_target": (smoothed_target, "drop", 0.1),
            "smoothed_t5x": (low_confidence, "drop", 0.1 * V / (V - 1))}  # fmt: skip
for name, (f, invalid, share) in SMOOTHED.items():
    table.add(name, lambda logits, labels, f=f: f(logits, labels).mean(), ce(invalid, label_smoothing=share))
    table.add(f"{name}_head", lambda x, head, labels, f=f: f(x @ head, labels).mean(), head(invalid, label_smoothing=share))
hot = lambda y: jax.nn.one_hot(y, V)  # noqa: E731
TOGETHER = {"sum": lambda z, y: -(hot(y) * jax.nn.log_softmax(z)).sum(), "mean": lambda z, y: -(hot(y) * jax.nn.log_softmax(z)).mean(),
            "negated_inside": lambda z, y: (hot(y) * -jax.nn.log_softmax(z)).sum() / y.size,
            "vdot": lambda z, y: -jnp.vdot(hot(y), jax.nn.log_softmax(z)),
            "einsum": lambda z, y: -jnp.einsum("btv,btv->", hot(y), jax.nn.log_softmax(z)),
            "smoothed": lambda z, y: -((0.9 * hot(y) + 0.1 / V) * jax.nn.log_softmax(z)).sum()}  # fmt: skip
for name, f in TOGETHER.items():
    table.add(f"together_{name}", lambda logits, labels, f=f: f(logits, labels), ce("drop"))
    table.add(f"together_{name}_head", lambda x, head, labels, f=f: f(x @ head, labels), head("drop"))
table.add("together_weighted", lambda logits, labels, weights: -(
    hot(labels) * jax.nn.log_softmax(logits) * weights[..., None]).sum() / weights.sum(), ce("drop"))
table.add("weighted_by_token", lambda x, head, labels, bias: ((hot(labels) * -jax.nn.log_softmax(x @ head)).sum(-1) * bias[0, :2, :, 0]).sum(),
          weighted("drop"))
table.add("mean_where", lambda logits, labels, weights: jnp.mean(integer(logits, labels), where=weights), ce())
table.add("labels_outside_onehot", lambda logits, labels: onehot(logits, hot(labels - 8)).sum(), ce("drop"))
table.add("labels_outside_smoothed", lambda logits, labels: onehot(logits, optax.smooth_labels(hot(labels - 8), 0.1)), ce("drop"))
table.add("labels_outside_together", lambda x, head, labels: -(hot(labels - 8) * jax.nn.log_softmax(x @ head)).sum(), head("drop"))
table.add("labels_outside_lse", lambda logits, labels: jax.nn.logsumexp(logits, -1) - (hot(labels - 8) * logits).sum(-1), ce("zero"))
table.add("z_loss_beside", lambda logits, labels: (integer(logits, labels) + 1e-4 * jax.nn.logsumexp(logits, -1) ** 2).mean(), ce())
