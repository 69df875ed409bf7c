"""Run by test_sharding.py in a process of its own, on eight simulated devices: optimized functions and the user's `shard_map`.

Each function is optimized inside of `shard_map`, and with it. Prints one JSON line a case; a wrong number is an AssertionError.
"""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import kpt_jax
from kpt_jax._compat import vary
from tests.jax.sharded_program import attend, close, norm

N, T, W, H = 8, 12, 16, 4


def attention(x, w):
    return attend(*jnp.split(jnp.einsum("btd,dnh->btnh", x, w), 3, axis=2))


def mlp(x, w):
    """silu carries a derivative rule of its own."""
    return jax.nn.silu(x @ w)


@jax.custom_jvp
def act(x):
    return jax.nn.relu(x)


@act.defjvp
def act_jvp(primals, tangents):
    """A rule with a rule in it."""
    return act(*primals), tangents[0] * (primals[0] > 0)


def total(x, w):
    return jax.lax.psum(jnp.sum(norm(x, w) ** 2), "i")


def layers(x, w):
    return jax.lax.scan(lambda x, w: (x + norm(x, w), None), x, w)[0]


def replicated(x, w):
    return x * norm(w, w[0])


def cast(x, w):
    """What the site reads is the same on every device, what the user makes of it may differ.

    A matter of checked types alone: without, jax 0.7 itself sums the gradient of `pvary` once too often.
    """
    return x + norm(vary(w, frozenset({"i"})), w[0])


# function, shape of the weight that every device holds, what comes out, the op in it
CASES = {
    "rms_norm": (norm, (W,), P("i"), "rms_norm"),
    "attention": (attention, (W, 3 * H, 4), P("i"), "attention"),
    "linear with silu": (mlp, (W, 24), P("i"), "linear_act"),
    "rule in a rule": (lambda x, w: act(x @ w), (W, 24), P("i"), "linear_act"),
    "psum": (total, (W,), P(), "rms_norm"),
    "scan": (layers, (2, W), P("i"), "rms_norm"),
    "replicated": (replicated, (T, W), P("i"), "rms_norm"),
    "cast": (cast, (T, W), P("i"), "rms_norm"),
}
FORWARD = ("linear with silu", "rule in a rule")


def run(mesh, name, where, check_vma):
    fn, shape, out, op = CASES[name]
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((N, T, W), shape))

    def mapped(f, out=out):
        return jax.shard_map(f, mesh=mesh, in_specs=(P("i"), P()), out_specs=out, check_vma=check_vma)

    def loss(f):
        return lambda x, w: jnp.sum(jnp.sin(f(x, w)))

    def inside(f):
        """What a device's own loss gives for the weight is its own with check_vma=False, the sum over all with it."""

        def body(x, w):
            dx, dw = jax.grad(loss(f), (0, 1))(x, w)
            return dx, dw if check_vma else jax.lax.psum(dw, "i")

        return jax.jit(mapped(body, (P("i"), P())))(x, w)

    fast = kpt_jax.optimize(fn if where == "inside" else mapped(fn))
    plain, swapped = mapped(fn), mapped(fast) if where == "inside" else fast
    close(swapped(x, w), plain(x, w))
    close(jax.jit(swapped)(x, w), plain(x, w))
    plans = [t.plan for t in fast._traces.values()] if where == "inside" else [fast.plan(x, w)]
    gradients = [jax.jit(jax.grad(loss(f), (0, 1)))(x, w) for f in (swapped, plain)]
    close(*gradients)
    if where == "inside" and out != P():
        close(inside(fast), inside(fn))
    if name in FORWARD:
        close(*(jax.jit(lambda f=f: jax.jvp(jax.jit(f), (x, w), (w[0, 0] * x, w)))() for f in (swapped, plain)))
    sites = [s for p in plans for s in p.sites]
    return {"swapped": [s.op for s in sites], "certified": all(s.certificate for s in sites), "op": op,
            "why": [s.reason for p in plans for s in p.skipped]}  # fmt: skip


if __name__ == "__main__":
    eight = Mesh(np.array(jax.devices()), ("i",))
    for case in sys.argv[1:] or CASES:
        for where in ("inside", "outside"):
            for check_vma in (True,) if case == "cast" else (True, False):
                found = run(eight, case, where, check_vma)
                print(json.dumps({"case": f"{case}, {where}, check_vma={check_vma}", **found}), flush=True)
