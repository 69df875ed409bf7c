"""Flax modules through `optimize`: the same type of use, the same parameters, the same state."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import kpt_jax
from kpt.errors import InputError

B, T, D = 2, 6, 16


@pytest.fixture(autouse=True)
def without_example(monkeypatch):
    monkeypatch.setenv("KPT_CERTIFY", "random")


def attend(q, k, v):
    scores = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e30)
    return jax.nn.softmax(scores, axis=-1) @ v


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.qkv = nnx.Linear(D, 3 * D, rngs=rngs)
        self.norm = nnx.BatchNorm(D, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls.value += 1
        return x + self.drop(attend(*jnp.split(self.qkv(self.norm(x)), 3, -1)))

    def twice(self, x):
        return self(self(x))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Layer(rngs) for _ in range(2)]) if hasattr(nnx, "List") else [Layer(rngs), Layer(rngs)]

    def __call__(self, x, *, scale=1.0):
        for layer in self.layers:
            x = layer(x)
        return x * scale


def inputs():
    return jnp.asarray(np.random.default_rng(0).standard_normal((B, T, D)), jnp.float32)


def close(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(
        np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2e-4, atol=2e-5),
        jax.tree.map(raw, got), jax.tree.map(raw, want))  # fmt: skip


def raw(a):
    return jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a


def pair(mode="train"):
    """The original, and an optimized one with variables of its own."""
    models = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    for m in models:
        m.train() if mode == "train" else m.eval()
    return models[0], kpt_jax.optimize(models[1])


def pure(m):
    return nnx.to_pure_dict(nnx.state(m))


def mean_square(m, x):
    return jnp.mean(jnp.square(m(x)))


def calls(m, x):
    return [m(x), m(x, scale=2.0), m(x, scale=jnp.float32(3))]


def under_jit(m, x):
    return [nnx.jit(lambda m, x: m(x))(m, x) for _ in range(2)]


def gradients(m, x):
    return nnx.grad(mean_square)(m, x)


def trained(m, x):
    optimizer = nnx.Optimizer(m, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def step(m, optimizer, x):
        value, grads = nnx.value_and_grad(mean_square)(m, x)
        optimizer.update(m, grads)
        return value

    return [step(m, optimizer, x) for _ in range(3)]


def split_and_merged(m, x):
    graphdef, params, rest = nnx.split(m, nnx.Param, ...)
    return nnx.merge(graphdef, params, rest)(x), params


def updated(m, x):
    nnx.update(m, jax.tree.map(lambda a: a * 0.5 if a.dtype == jnp.float32 else a, nnx.state(m, nnx.Param)))
    return m(x)


def vmapped(m, x):
    m.eval()
    graphdef, state = nnx.split(m)
    return jax.vmap(lambda state, x: nnx.merge(graphdef, state)(x[None]), (None, 0))(state, x)


def through_a_method(m, x):
    return m.layers[0].twice(x)


def cloned(m, x):
    return nnx.clone(m)(x)


USES = [calls, under_jit, gradients, trained, split_and_merged, updated, vmapped, through_a_method, cloned]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("use", USES, ids=lambda f: f.__name__)
def test_nnx(use, mode):
    if (use, mode) == (vmapped, "train"):
        mode = "eval"
    plain, fast = pair(mode)
    close(use(fast, inputs()), use(plain, inputs()))
    close(pure(fast), pure(plain))  # batch statistics, dropout counts, the counter


class Reader(nnx.Module):
    """What changes nothing when it is called."""

    def __init__(self, rngs):
        self.qkv, self.norm = nnx.Linear(D, 3 * D, rngs=rngs), nnx.RMSNorm(D, rngs=rngs)

    def __call__(self, x):
        return x + attend(*jnp.split(self.qkv(self.norm(x)), 3, -1))


CLOSED_OVER = {
    "jit": lambda f, x: jax.jit(lambda x: f(x))(x),
    "jit of it": lambda f, x: jax.jit(f)(x),
    "grad": lambda f, x: jax.grad(lambda x: f(x).sum())(x),
    "grad of remat": lambda f, x: jax.jit(jax.grad(lambda x: jax.checkpoint(lambda x: f(x))(x).sum()))(x),
    "vmap": lambda f, x: jax.vmap(lambda x: f(x))(x),
    "scan": lambda f, x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0],
    "nnx.jit": lambda f, x: nnx.jit(lambda x: f(x))(x),
    "nnx.vmap": lambda f, x: nnx.vmap(lambda x: f(x))(x),
}


@pytest.mark.parametrize("taken", ["the module", pytest.param("a function that takes it", marks=pytest.mark.slow)])
@pytest.mark.parametrize("transform", [t if t in ("jit", "vmap") else pytest.param(t, marks=pytest.mark.slow) for t in CLOSED_OVER])
def test_nnx_closed_over(transform, taken):
    """flax lets nothing be written there: what only reads its variables is not to write them back."""
    module, x = Reader(nnx.Rngs(0)), jnp.asarray(np.random.default_rng(0).standard_normal((B, T, D)), jnp.float32)
    if taken == "the module":
        fast = kpt_jax.optimize(module)
    else:
        of_both = kpt_jax.optimize(lambda m, x: m(x))
        fast = lambda x: of_both(module, x)  # noqa: E731
    run = CLOSED_OVER[transform]
    np.testing.assert_allclose(run(fast, x), run(module, x), rtol=1e-5, atol=1e-5)


def test_nnx_writes_what_a_call_has_changed_and_leaves_the_rest():
    plain, fast = Net(nnx.Rngs(0)), kpt_jax.optimize(Net(nnx.Rngs(0)))
    x = jnp.ones((B, T, D))
    kernel = fast.layers[0].qkv.kernel[...]
    for _ in range(2):
        np.testing.assert_allclose(fast(x), plain(x), rtol=1e-5, atol=1e-5)
    assert fast.layers[0].qkv.kernel[...] is kernel
    assert int(fast.layers[1].calls[...]) == 2
    np.testing.assert_allclose(fast.layers[0].norm.mean[...], plain.layers[0].norm.mean[...], rtol=1e-6)


def test_nnx_is_still_that_module():
    plain, fast = pair()
    assert isinstance(fast, Net) and type(fast).__name__ == "Net"
    paths = [[p for p, _ in nnx.to_flat_state(nnx.state(m))] for m in (plain, fast)]
    assert paths[0] == paths[1]
    assert [s.op for s in fast.plan(inputs()).sites] == ["attention"] * 2
    assert "attention" in fast.explain(inputs())
    fast.eval()
    assert fast.layers[0].drop.deterministic and not plain.layers[0].drop.deterministic


def test_nnx_shares_the_parameters():
    plain = Net(nnx.Rngs(0))
    fast = kpt_jax.optimize(plain)
    plain.layers[0].qkv.bias.value += 1.0
    plain.eval()
    fast.eval()
    close(fast(inputs()), plain(inputs()))


def test_nnx_inside_an_optimized_step():
    plain, other = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))

    def step(graphdef, state, x):
        m = nnx.merge(graphdef, state)
        value, grads = nnx.value_and_grad(mean_square)(m, x)
        return value, grads, nnx.state(m)

    fast = kpt_jax.optimize(step)
    close(fast(*nnx.split(other), inputs()), step(*nnx.split(plain), inputs()))
    assert [s.path.split("/")[0] for s in fast.plan(*nnx.split(other), inputs()).sites] == ["grad0"] * 2


@pytest.mark.parametrize("wrap", [kpt_jax.optimize, lambda f: nnx.jit(kpt_jax.optimize(f)), lambda f: kpt_jax.optimize(nnx.jit(f))],
                         ids=["step", "jit around", "jit inside"])  # fmt: skip
def test_a_step_that_takes_nnx_objects_changes_them(wrap):
    """A module and an optimizer are references: what a step does to them is done to the caller's."""

    def step(model, optimizer, x):
        value, grads = nnx.value_and_grad(mean_square)(model, x)
        optimizer.update(model, grads)
        return value

    def losses(step):
        model = Net(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
        return [step(model, optimizer, inputs()) for _ in range(3)]

    want = losses(step)
    assert want[2] < want[0]
    close(losses(wrap(step)), want)


class Block(linen.Module):
    width: int = D
    rate: float = 0.3

    @linen.compact
    def __call__(self, x, train=False):
        h = linen.BatchNorm(use_running_average=not train)(x)
        q, k, v = jnp.split(linen.Dense(3 * self.width)(h), 3, -1)
        y = linen.Dropout(self.rate, deterministic=not train)(attend(q, k, v))
        self.sow("intermediates", "y", y)
        return x + y

    def doubled(self, x):
        return 2 * self(x)


def linen_pair():
    plain = Block()
    return plain, kpt_jax.optimize(plain), plain.init(jax.random.key(0), inputs())


APPLIES = {
    "apply": lambda m, v, x: m.apply(v, x),
    "mutable": lambda m, v, x: m.apply(v, x, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(1)}),
    "capture": lambda m, v, x: m.apply(v, x, mutable="intermediates"),
    "mutable true": lambda m, v, x: m.apply(v, x, mutable=True),
    "method by name": lambda m, v, x: m.apply(v, x, method="doubled"),
    "method by function": lambda m, v, x: m.apply(v, x, method=Block.doubled),
    "positional flag": lambda m, v, x: m.apply(v, x, False),
    "jit": lambda m, v, x: jax.jit(m.apply)(v, x),
    "grad": lambda m, v, x: jax.grad(lambda p: jnp.mean(m.apply({**v, "params": p}, x) ** 2))(v["params"]),
    "vmap": lambda m, v, x: jax.vmap(lambda x: m.apply(v, x[None]))(x),
    "init": lambda m, v, x: m.init(jax.random.key(0), x),
    "init_with_output": lambda m, v, x: m.init_with_output(jax.random.key(0), x),
    "bind": lambda m, v, x: m.bind(v)(x),
    "clone": lambda m, v, x: m.clone(rate=0.1).apply(v, x, train=True, mutable=["batch_stats"],
                                                     rngs={"dropout": jax.random.key(1)}),
    "copy": lambda m, v, x: m.copy().apply(v, x),
    "inside another module": lambda m, v, x: linen.Sequential([m, jnp.sin]).init_with_output(jax.random.key(0), x),
}  # fmt: skip


@pytest.mark.parametrize("use", APPLIES.values(), ids=APPLIES)
def test_linen(use):
    plain, fast, variables = linen_pair()
    close(use(fast, variables, inputs()), use(plain, variables, inputs()))


LINEN_TAKES = "Pass the arguments of one typical call: its_variables, x, train=False"


@pytest.mark.parametrize(("inputs", "keywords", "advice"), [
    ((), {}, LINEN_TAKES), (({},), {}, LINEN_TAKES), (({}, 1, 2, 3), {}, LINEN_TAKES), (({}, 1), {"levle": "balanced"}, "levle may be level, misspelt"),
    (({}, 1), {"budgt": 3, "rngs": {}}, "budgt may be budget, misspelt"), ((({}, 1),), {}, "Unpack it: (function, *inputs)"),
])  # fmt: skip
def test_inputs_that_a_linen_module_does_not_take_are_explained(inputs, keywords, advice):
    with pytest.raises(InputError, match=re.escape(advice)):
        kpt_jax.plan(Block(), *inputs, **keywords)


def test_an_error_inside_of_a_linen_module_stays():
    class Fails(linen.Module):
        def __call__(self, batch):
            raise TypeError("dicts differ")

    with pytest.raises(TypeError, match="dicts differ") as raised:
        kpt_jax.plan(Fails(), {}, jnp.ones(2))
    assert not isinstance(raised.value, InputError)


def test_linen_is_still_that_module():
    plain, fast, variables = linen_pair()
    assert isinstance(fast, Block) and type(fast).__name__ == "Block" and fast.width == plain.width
    assert [s.op for s in fast.plan(variables, inputs()).sites] == ["attention"]


class Widths(linen.Module):
    widths: list  # not hashable, and common

    @linen.compact
    def __call__(self, x):
        for width in self.widths:
            x = linen.gelu(linen.Dense(width)(x))
        return x


def test_linen_with_a_list_among_its_fields():
    plain = Widths([16, 8])
    fast, variables = kpt_jax.optimize(plain), plain.init(jax.random.key(0), inputs())
    close(fast.apply(variables, inputs()), plain.apply(variables, inputs()))
    close(fast.clone(widths=[16, 8]).apply(variables, inputs()), plain.apply(variables, inputs()))
    assert [s.op for s in fast.plan(variables, inputs()).sites] == ["linear_act"] * 2


def test_linen_train_state():
    plain, fast, variables = linen_pair()

    def losses(m):
        state = TrainState.create(apply_fn=m.apply, params=variables["params"], tx=optax.sgd(0.1))

        @jax.jit
        def step(state, x):
            def loss(params):
                v = {"params": params, "batch_stats": variables["batch_stats"]}
                return jnp.mean(jnp.square(state.apply_fn(v, x)))

            value, grads = jax.value_and_grad(loss)(state.params)
            return state.apply_gradients(grads=grads), value

        out = []
        for _ in range(3):
            state, value = step(state, inputs())
            out.append(value)
        return out

    close(losses(fast), losses(plain))


class NnxNormed(nnx.Module):
    def __init__(self):
        self.norm = nnx.RMSNorm(D, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(x) * 2  # the user's line


class LinenNormed(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.RMSNorm()(x) * 2  # the user's line


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_a_site_in_a_layer_shows_the_users_line(kind):
    if kind == "nnx":
        plan = kpt_jax.plan(NnxNormed(), inputs())
    else:
        model = LinenNormed()
        plan = kpt_jax.plan(model, model.init(jax.random.key(0), inputs()), inputs())
    (site,) = plan.sites
    found = re.fullmatch(r"test_modules\.py:(\d+) \(__call__\) through normalization\.py:\d+ \(\w+\)", site.source)
    assert found, site.source
    assert Path(__file__).read_text(encoding="utf-8").splitlines()[int(found[1]) - 1].endswith("# the user's line")


class Counting(nnx.Module):
    """Python attributes that the call reads and changes."""

    def __init__(self, rngs):
        self.norm = nnx.Linear(D, D, rngs=rngs)
        self.n, self.seen = 0, ()

    def __call__(self, x):
        self.n += 1
        self.seen = (*self.seen, x.shape)
        if self.n == 2:
            self.extra = nnx.Param(jnp.full((), 3.0))
        y = self.norm(x) * self.n
        return y * self.extra if self.n >= 2 else y


def as_module(m):
    return m, kpt_jax.optimize(m)


def in_arguments(m):
    fast = kpt_jax.optimize(lambda m, x: m(x))
    return m, lambda x: fast(m, x)


def in_a_list(m):
    fast = kpt_jax.optimize(lambda held, x: held["layers"][0](x))
    return m, lambda x: fast({"layers": [m], "x": x}, x)


@pytest.mark.parametrize("use", [as_module, in_arguments, in_a_list])
def test_nnx_attributes_that_the_call_changes(use):
    want, (held, got) = Counting(nnx.Rngs(0)), use(Counting(nnx.Rngs(0)))
    for _ in range(4):
        close(got(inputs()), want(inputs()))
    held = got if isinstance(got, nnx.Module) else held
    assert (held.n, held.seen) == (want.n, want.seen)
    close(nnx.state(held), nnx.state(want))


def test_nnx_objects_inside_of_arguments_are_changed():
    models = [Net(nnx.Rngs(0)), Net(nnx.Rngs(0))]

    def step(held, x):
        """One object under two names."""
        assert held["a"][0] is held["b"]
        return held["a"][0](x) + held["b"](x)

    want = step({"a": [models[0]], "b": models[0]}, inputs())
    fast = kpt_jax.optimize(step)
    close(fast({"a": [models[1]], "b": models[1]}, inputs()), want)
    close(nnx.state(models[1]), nnx.state(models[0]))


def test_nnx_objects_inside_of_arguments_of_a_later_call():
    fast = kpt_jax.optimize(lambda held, x: held[0](x) if held else x * 2)
    close(fast([], inputs()), inputs() * 2)
    model = Counting(nnx.Rngs(0))
    close(fast([model], inputs()), Counting(nnx.Rngs(0))(inputs()))
    assert model.n == 1


class Product(nnx.Module):
    """Flax 0.11 cannot pickle its own layers: their initializers are local functions."""

    def __init__(self):
        self.w, self.calls = nnx.Param(jnp.ones((D, D))), 0

    def __call__(self, x):
        self.calls += 1
        return jax.nn.silu(x @ self.w[...]) * self.calls


@pytest.mark.parametrize("copied", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy, copy.copy])
def test_optimized_modules_are_pickled_and_copied(copied):
    fast, plain = kpt_jax.optimize(Product()), Product()
    close(fast(inputs()), plain(inputs()))
    again = copied(fast)
    close(again(inputs()), plain(inputs()))
    assert again.calls == 2
    assert [s.op for s in again.plan(inputs()).sites] == ["linear_act"]
    plain, variables = Widths([4, 8]), Widths([4, 8]).init(jax.random.key(0), inputs())
    again = copied(kpt_jax.optimize(plain))
    close(again.apply(variables, inputs()), plain.apply(variables, inputs()))
    assert len(again.plan(variables, inputs()).sites) == 2


class Parent(linen.Module):
    """Optimizes a layer inside of its own call."""

    inner: Any = kpt_jax.optimize

    @linen.compact
    def __call__(self, x):
        return self.inner(linen.Dense(D))(x) + self.inner(linen.LayerNorm())(x)


def test_linen_module_optimized_in_its_parents_call(caplog):
    plain = Parent(inner=lambda m: m)
    variables = plain.init(jax.random.key(0), inputs())
    with caplog.at_level("WARNING", "kpt"):
        close(Parent().init(jax.random.key(0), inputs()), variables)
    assert "Optimize the outermost module" in caplog.text
    close(Parent().apply(variables, inputs()), plain.apply(variables, inputs()))
    whole = kpt_jax.optimize(Parent())
    close(whole.apply(variables, inputs()), plain.apply(variables, inputs()))
    assert "layer_norm" in {s.op for s in whole.plan(variables, inputs()).sites}
