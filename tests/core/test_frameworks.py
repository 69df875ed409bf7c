"""A program given to the other front end is sent back, with no framework imported to find out."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest

from kpt.errors import KptError
from kpt.frameworks import framework_of

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")
jnp = jax.numpy
F = torch.nn.functional
layer = torch.nn.Linear(2, 2)


def plain(x):
    return x * x + 1


def of_jax(x):
    return jnp.sum(x)


def of_torch(x):
    return F.relu(x)


def through(x):
    return plain(of_jax(x))


def inner(x):
    return (lambda y: jnp.sum(y))(x)


def by_closure(fn):
    return lambda x: fn(x)


def both(x):
    return of_torch(jax.tree.map(torch.as_tensor, x))


def around(x):
    return by_layer(jax.tree.map(plain, x))


def by_layer(x):
    return layer(x)


def again(x):
    return again(x - 1) if x else x


class Model:
    def loss(self, x):
        return jnp.sum(x)

    def __call__(self, x):
        return x


def linen():
    from flax import linen

    return linen.Dense(2)


def nnx():
    from flax import nnx

    return nnx.Linear(2, 2, rngs=nnx.Rngs(0))


PROGRAMS = {
    "flax linen": (linen, "jax"),
    "flax nnx": (nnx, "jax"),
    "jitted": (lambda: jax.jit(plain), "jax"),
    "gradient": (lambda: jax.grad(plain), "jax"),
    "custom rule": (lambda: jax.custom_vjp(plain), "jax"),
    "function": (lambda: of_jax, "jax"),
    "partial": (lambda: functools.partial(of_jax, 1), "jax"),
    "by another function": (lambda: through, "jax"),
    "inner function": (lambda: inner, "jax"),
    "closure": (lambda: by_closure(of_jax), "jax"),
    "method": (lambda: Model().loss, "jax"),
    "jax's own": (lambda: jax.nn.relu, "jax"),
    "module": (lambda: layer, "torch"),
    "module's method": (lambda: layer.forward, "torch"),
    "torch function": (lambda: of_torch, "torch"),
    "torch's own": (lambda: F.relu, "torch"),
}
NEITHER = {"plain": plain, "both": both, "around": around, "recursive": again, "object": Model(), "built in": abs, "number": 3}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_other_front_end_says_where_it_belongs(name):
    import kpt_jax
    import kpt_torch

    make, framework = PROGRAMS[name]
    program = make()
    wrong, right = (kpt_torch, "kpt_jax") if framework == "jax" else (kpt_jax, "kpt_torch")
    for call in (wrong.optimize, wrong.plan):
        with pytest.raises(KptError, match=f"{wrong.__name__}.optimize was given .*Call {right}.optimize with it"):
            call(program)


@pytest.mark.parametrize("name", NEITHER)
def test_what_does_not_tell_is_left_to_the_caller(name):
    assert framework_of(NEITHER[name]) is None


def test_looking_imports_neither():
    code = "import sys, kpt.frameworks as f\nassert f.framework_of(lambda x: x) is None\nprint({'jax', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
