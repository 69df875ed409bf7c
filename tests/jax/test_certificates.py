"""What a site's certificate allows, and on how much it looks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import kpt
from kpt.strategy.planner import patterns
from kpt_jax import on_device
from kpt_jax.capture import capture
from kpt_jax.certify import certify_site
from kpt_jax.planner import Example


@pytest.fixture(params=["host", "device"], autouse=True)
def where(request, monkeypatch):
    if request.param == "device":
        monkeypatch.setattr(on_device, "_PLATFORMS", ("cpu",))
        monkeypatch.setattr(on_device, "_FEW", 0)


def loss(logits, labels):
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]


def norm(x, w):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * w


def site(fn, *args):
    graph = capture(jax.make_jaxpr(fn)(*args), fn.__name__)
    program, (match,), _ = patterns().find(graph, lambda match: None)
    return program, match


@pytest.mark.parametrize(("off", "passes"), [(0.0, True), (2.0**-23 * 1e4, True), (1.0, False)])
def test_what_cancels_inside_is_allowed_for(off, passes):
    """A confident classifier: `logsumexp - logit` is the zero difference of terms of 1e4, and no input shows it."""
    labels = jnp.arange(12, dtype=jnp.int32) % 5
    logits = 1e4 * jax.nn.one_hot(labels, 5, dtype=jnp.float32)
    program, match = site(loss, logits, labels)
    assert match.op == "cross_entropy"
    kernel = kpt.registry.load("cross_entropy.xla")

    def rounded(**arrays):
        out = kernel(**arrays)
        return jax.tree.map(lambda x: x + off, out)

    certificate = certify_site(program, match, rounded, seeds=(), example=Example(program.graph, (logits, labels)).leaves(program, match))
    assert certificate.passed == passes, certificate.summary()


@pytest.mark.parametrize(("rows", "draws"), [(2, 4), (200, 1)])
def test_few_elements_are_drawn_more_than_once(rows, draws):
    program, match = site(norm, jnp.ones((rows, 16)), jnp.ones(16))
    certificate = certify_site(program, match, kpt.registry.load("rms_norm.xla"))
    assert certificate.passed
    assert {c.where for c in certificate.checks} == {f"seed {i}" for i in range(draws)}
