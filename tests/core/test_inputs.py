"""Example inputs that a program does not take: told with what to do, and its own errors left as they are."""

import functools

import numpy as np
import pytest

from kpt.errors import InputError, KptError, PlanError
from kpt.inputs import explained


class Tensor:
    """As far as arrays tell their framework."""

    shape, dtype = (2,), "float32"


Tensor.__module__ = "torch"


def two(x, w):
    return x.missing + w


def one(x):
    return x.missing


def fails(x):
    raise TypeError("vocabulary sizes differ")


def with_a_key(fn):
    @functools.wraps(fn)  # which says that the key is one of its arguments
    def call(*inputs):
        return fn(*inputs, 3)

    return call


@with_a_key
def keyed(x, key):
    return x.missing


@with_a_key
def keyed_and_fails(x, key):
    raise ValueError("vocabulary sizes differ")


def batch_fails(batch, train=True):
    raise TypeError("vocabulary sizes differ")


def lengths_fail(x, lengths):
    raise TypeError("vocabulary sizes differ")


class Module:
    """As far as a torch.nn.Module tells its parameters."""

    def __call__(self, *inputs):
        return self.forward(*inputs)

    def forward(self, x):
        return x.missing

    def state_dict(self):
        return {}


X = np.ones(2)
# (program, inputs, keywords, framework, what the message ends with)
EXPLAINED = [
    (two, (), {}, "jax", "Pass the arguments of one typical call: x, w."),
    (two, (X,), {}, "jax", "Pass the arguments of one typical call: x, w."),
    (two, ((X, X),), {}, "jax", "Unpack it: (function, *inputs) and not (function, inputs)."),
    (one, ((X,),), {}, "jax", "Unpack it: (function, *inputs) and not (function, inputs)."),
    (one, ([X],), {}, "torch", "Unpack it: (function, *inputs) and not (function, inputs)."),
    (two, ({"x": X, "w": X},), {}, "torch", "Unpack it: (function, **inputs) and not (function, inputs)."),
    (two, (X, X), {"bugdet": "10s"}, "jax", "bugdet may be budget, misspelt."),
    (two, (X, X), {"other": 1}, "jax", "Pass the arguments of one typical call: x, w."),
    (Module(), (), {}, "torch", "Pass the arguments of one typical call: x."),
    (Module(), (X,), {}, "torch", "Pass tensors: torch.as_tensor(numpy.array(array))."),
    (Module(), (X,), {"hardwear": "cpu"}, "torch", "hardwear may be hardware, misspelt."),
    (keyed, (X, X, X), {}, "jax", "Pass the arguments of one typical call: x, key."),
    (functools.partial(lambda w, x, *, scale, train=True: x @ w, scale=X), (X,), {}, "jax", "Pass the arguments of one typical call: w, x, scale=..., train=True."),
]


@pytest.mark.parametrize(("program", "inputs", "keywords", "framework", "advice"), EXPLAINED)
def test_inputs_that_do_not_fit_are_explained(program, inputs, keywords, framework, advice):
    with pytest.raises(InputError) as raised, explained(program, inputs, keywords, framework):
        program(*inputs, **keywords)
    assert str(raised.value).endswith(advice) and str(raised.value.__cause__) in str(raised.value)
    assert isinstance(raised.value, TypeError), "what it was before"


def test_tensors_are_no_constants_of_a_jax_program():
    with pytest.raises(InputError, match=r"\(dict, torch.Tensor\)\. .*constant.*jax\.numpy\.asarray"), explained(one, ({}, Tensor()), {}, "jax"):
        raise AssertionError("it is not run")


@pytest.mark.parametrize(
    ("program", "inputs", "framework", "kind"),
    [(fails, (X,), "jax", TypeError), (fails, (Tensor(),), "torch", TypeError), (one, (X,), "jax", AttributeError),
     (lambda x: 1 // 0, ((X,),), "jax", ZeroDivisionError), (lambda x: 1 // 0, (X,), "torch", ZeroDivisionError),
     (keyed, (X,), "jax", AttributeError), (keyed_and_fails, (X,), "jax", ValueError), (functools.partial(keyed_and_fails, X), (), "jax", ValueError),
     (batch_fails, ((X, X),), "jax", TypeError), (batch_fails, ({"batch": X},), "torch", TypeError), (lengths_fail, (Tensor(), X), "torch", TypeError)],
)  # fmt: skip
def test_an_error_that_the_inputs_do_not_explain_stays(program, inputs, framework, kind):
    with pytest.raises(kind) as raised, explained(program, inputs, {}, framework):
        program(*inputs)
    assert not isinstance(raised.value, KptError)


def test_an_error_of_kpt_stays():
    with pytest.raises(PlanError), explained(two, (), {}, "jax"):
        raise PlanError("It has advice of its own")
