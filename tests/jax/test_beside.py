"""Queries and keys turned in one call: which sites are paired, and that the program is what it was."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kpt_jax
from kpt.fusion.registry import default_fusion
from kpt.fusion.site import original_bytes
from kpt.kernels import registry
from kpt.kernels.stand_in import stood_for
from kpt_jax import pairs
from kpt_jax.capture import capture
from pallas_kernels.manual_axes import vary_alike
from tests.jax.certified import mesh_of_one, rest_slow

B, T, H, WIDTH = 2, 6, 8, 16
SAYS = {0: [], 1: ["1 pair of sites that share their tables runs as one launch."],
        2: ["2 pairs of sites that share their tables run as one launch each."]}  # fmt: skip


def pair(*, x, other, cos, sin, **params):
    """With one derivative rule. What programs call is found in them by this name."""
    kernel = registry.load("rope.xla")

    def both(x, other, cos, sin):
        return tuple(kernel(x=z, cos=cos, sin=sin, **params) for z in (x, other))

    call = jax.custom_vjp(both)
    call.defvjp(lambda *arrays: jax.vjp(both, *arrays), lambda pull, cotangents: pull(cotangents))
    return call(*vary_alike(x, other, cos, sin))


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    monkeypatch.setenv("KPT_CERTIFY", "random")
    fn = registry.load("rope.xla")
    monkeypatch.setattr(fn, "pair", pair, raising=False)
    return fn


def given(t=T, dtype="float32"):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) * 0.3, dtype)

    weights = {"q": normal(WIDTH, 4 * H), "k": normal(WIDTH, 2 * H), "v": normal(WIDTH, 4 * H)}
    return weights, normal(B, t, WIDTH), normal(1, t, H), normal(1, t, H)


def turn(x, cos, sin):
    a, b = jnp.split(x, 2, -1)
    return x * cos[:, :, None] + jnp.concatenate([-b, a], -1) * sin[:, :, None]


def turn_neighbours(x, cos, sin):
    return x * cos[:, :, None] + jnp.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape) * sin[:, :, None]


def heads(w, x):
    return (x @ w).reshape(*x.shape[:2], -1, H)


def attend(x, q, k):
    return x + jnp.einsum("btgnh,bsnh->bts", q.reshape(*q.shape[:2], -1, *k.shape[2:]), k) @ x


def layer(w, x, cos, sin):
    q, k = heads(w["q"], x), heads(w["k"], x)
    return attend(x, turn(q, cos, sin), turn(k, cos, sin))


def one_after_the_other(w, x, cos, sin):
    q = turn(heads(w["q"], x), cos, sin)
    return attend(x, q, turn(heads(w["k"], x), cos, sin))


def keys_first(w, x, cos, sin):
    k = turn(heads(w["k"], x), cos, sin)
    return attend(x, turn(heads(w["q"], x), cos, sin), k)


def heads_first(w, x, cos, sin):
    def turned(z):
        a, b = jnp.split(z, 2, -1)
        return z * cos[:, None] + jnp.concatenate([-b, a], -1) * sin[:, None]

    q, k = (turned(heads(w[n], x).swapaxes(1, 2)).swapaxes(1, 2) for n in "qk")
    return attend(x, q, k)


def one_head_of_keys(body):
    return lambda w, *args: body({**w, "k": w["k"][:, :H]}, *args)


def several_layers(w, x, cos, sin):
    return layer(w, one_after_the_other(w, x, cos, sin), cos, sin)


def of(first, second):
    """Both results; each turned as it says."""
    return lambda w, x, cos, sin: (first(heads(w["q"], x), cos, sin), second(heads(w["k"], x), cos, sin))


def twice(w, x, cos, sin):
    return turn(turn(heads(w["q"], x), cos, sin), cos, sin)


def of_the_other(w, x, cos, sin):
    q = turn(heads(w["q"], x), cos, sin)
    return q, turn(heads(w["k"], x + q.mean()), cos, sin)


def crossed(w, x, cos, sin):
    """From the first to the last, and from the one between to the one before: a pair of the outer two would wait for that of the inner."""
    d = turn(heads(w["q"], x), cos, sin)
    q, k = heads(w["v"], jnp.tanh(jnp.sin(x))), heads(w["k"], jnp.cos(x) * d.mean())
    a, b = turn(q, cos, sin), turn(k, cos, sin)
    c = turn(heads(w["q"], jnp.tanh(jnp.sin(jnp.cos(x * a.mean())))), cos, sin)
    return a, b, c, d


def two_towers(w, x, cos, sin):
    """No site of one is computed from the other; what stands between them is long."""
    y = jnp.cos(jnp.sin(jnp.tanh(jnp.exp(x))))
    return turn(heads(w["v"], x), cos, sin), layer(w, y, cos, sin)


def three(w, x, cos, sin):
    q, k, v = (heads(w[n], x) for n in "qkv")
    return turn(q, cos, sin), turn(k, cos, sin), jnp.cos(turn(v, cos, sin))


def another_batch(w, x, cos, sin):
    return turn(heads(w["q"], x), cos, sin), turn(heads(w["k"], x[:1]), cos, sin)


def rounded(w, x, cos, sin):
    return turn(heads(w["q"], x), cos, sin), turn(heads(w["k"], x).astype("bfloat16"), cos, sin)


def unused(w, x, cos, sin):
    turn(heads(w["k"], x), cos, sin)
    return turn(heads(w["q"], x), cos, sin)


def in_one_rule(w, x, cos, sin):
    """Both sites read what one call gives, half of which is made of the second one's result."""

    @jax.custom_jvp
    def both(a, b):
        return jnp.sin(a), jnp.cos(b)

    both.defjvp(lambda p, t: (both(*p), (jnp.cos(p[0]) * t[0], -jnp.sin(p[1]) * t[1])))
    k = turn(heads(w["k"], x), cos, sin)
    made, other = both(x, x + k.mean())
    return turn(heads(w["q"], made), cos, sin), k, other


PROGRAMS = {
    "a layer": (layer, 1),
    "one after the other": (one_after_the_other, 1),
    "keys first": (keys_first, 1),
    "heads first": (heads_first, 1),
    "one head of keys": (one_head_of_keys(layer), 1),
    "one head of keys, heads first": (one_head_of_keys(heads_first), 1),
    "two layers": (several_layers, 2),
    "equal heads": (lambda w, x, *t: (turn(heads(w["q"], x), *t), turn(heads(w["v"], x), *t)), 1),
    "three": (three, 1),
    "two towers": (two_towers, 1),
    "neighbours": (of(turn_neighbours, turn_neighbours), 1),
    "no gradient of one": (of(turn, lambda *a: jax.lax.stop_gradient(turn(*a))), 1),
    "turned twice": (twice, 0),
    "one of the other": (of_the_other, 0),
    "crossed": (crossed, 1),
    "by way of a rule": (in_one_rule, 0),
    "other parameters": (of(turn, turn_neighbours), 0),
    "other tables": (of(turn, lambda x, cos, sin: turn(x, jnp.exp(cos), jnp.exp(sin))), 0),
    "one other table": (of(turn, lambda x, cos, sin: turn(x, cos, jnp.exp(sin))), 0),
    "another batch": (another_batch, 0),
    "another dtype": (rounded, 0),
    "not used": (unused, 0),
}


def agree(got, want, bound=2e-5):
    def close(a, b):
        np.testing.assert_allclose(np.asarray(a, "float64"), np.asarray(b, "float64"), rtol=bound, atol=bound * float(jnp.abs(b).max()))

    jax.tree.map(close, got, want)


def total(fn):
    return lambda *args: sum(jnp.sin(y.astype("float32")).sum() for y in jax.tree.leaves(fn(*args)))


def paired(plan):
    assert plan.sites and {s.kernel for s in plan.sites} == {"rope.xla"}, plan.explain()
    return [n for n in plan.notes if "launch" in n or "apart" in n]


def calls(fn, *args):
    return str(jax.make_jaxpr(fn)(*args)).count("name=pair")


@pytest.mark.parametrize("name", PROGRAMS)
def test_one_call_where_it_can_be(name):
    program, count = PROGRAMS[name]
    fn, args = total(program), given()
    fast = kpt_jax.optimize(fn)
    assert paired(fast.plan(*args)) == paired(fast.unproved().plan(*args)) == SAYS[count]
    assert calls(fast, *args) == count
    bound = 0.02 if program is rounded else 2e-5
    agree(jax.value_and_grad(fast, (0, 1, 2, 3))(*args), jax.value_and_grad(fn, (0, 1, 2, 3))(*args), bound)
    agree(kpt_jax.optimize(program)(*args), program(*args), bound)


@pytest.mark.parametrize(("program", "which"), [(two_towers, [(1, 2)]), (several_layers, [(0, 1), (2, 3)]), (crossed, [(1, 2)])])
def test_the_nearest_are_paired(program, which, kernel):
    captured, matches, _ = default_fusion().find(capture(jax.make_jaxpr(program)(*given()), "program"))
    kept = [(m, kernel) for m in sorted(matches, key=lambda m: max(m.results))]
    assert sorted(pairs.beside(captured, kept)) == which
    assert sorted(pairs.beside(captured, kept[::-1])) == sorted((len(kept) - 1 - i, len(kept) - 1 - j) for i, j in which)


def test_they_stay_two_sites_of_the_plan():
    plan = kpt_jax.plan(layer, *given())
    assert [s.path for s in plan.sites] == ["rope0", "rope1"] and all(s.certificate for s in plan.sites)
    fast = kpt_jax.optimize(layer).without({"rope1": "left out"})
    assert paired(fast.plan(*given())) == [] and len(fast.plan(*given()).sites) == 1


def sharded(w, x, cos, sin):
    return jax.shard_map(layer, mesh=mesh_of_one(), in_specs=(P(), P("data"), P(), P()), out_specs=P("data"))(w, x, cos, sin)


def held_alike(w, x, cos, sin):
    """Queries differ from device to device, and keys do not."""

    def both(w, x, y, cos, sin):
        return turn(heads(w["q"], x), cos, sin), turn(heads(w["k"], y), cos, sin)

    specs = P(), P("data"), P(), P(), P()
    return jax.shard_map(both, mesh=mesh_of_one(), in_specs=specs, out_specs=(P("data"), P()))(w, x, jnp.cos(x), cos, sin)


def layers(body):
    def run(w, x, cos, sin):
        two = jax.tree.map(lambda a: jnp.stack([a, -a]), w)
        return jax.lax.scan(lambda x, w: (body(w, x, cos, sin), None), x, two)[0]

    return run


def stepped(w, x, cos, sin):
    value, grads = jax.value_and_grad(lambda w: jnp.square(layer(w, x, cos, sin)).mean())(w)
    return jax.tree.map(lambda a, g: a - 0.1 * g, w, grads), value


INSIDE = {
    "scan": (layers(layer), 1),
    "scan of remat": (layers(jax.checkpoint(one_after_the_other)), 1),
    "remat, products kept": (jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_saveable), 1),
    "jit": (jax.jit(layer), 1),
    "cond": (lambda w, x, *t: jax.lax.cond(x[0, 0, 0] > 9, lambda w, x, *t: x, layer, w, x, *t), 1),
    "vmap": (lambda w, x, *t: jax.vmap(lambda x: layer(w, x[None], *t))(x), 1),
    "shard_map": (sharded, 1),
    "shard_map, one the same on all devices": (held_alike, 0),
}


@pytest.mark.parametrize("name", rest_slow(INSIDE, "scan of remat", "cond", "shard_map, one the same on all devices"))
def test_inside_of_a_program(name):
    program, count = INSIDE[name]
    fn, args = total(program), given()
    fast = kpt_jax.optimize(fn)
    assert paired(fast.plan(*args)) == SAYS[count]
    agree(jax.jit(jax.value_and_grad(fast, (0, 1, 2, 3)))(*args), jax.value_and_grad(fn, (0, 1, 2, 3))(*args))


def test_gradients_inside(kernel, monkeypatch):
    """By the kernel's own rule, in whose code no site is looked for; in that of this test's, one would be."""
    monkeypatch.setattr(kernel, "pair", lambda *, x, other, **rest: (kernel(x=x, **rest), kernel(x=other, **rest)))
    fast, args = kpt_jax.optimize(stepped), given()
    assert paired(fast.plan(*args)) == SAYS[1] and [s.path for s in fast.plan(*args).sites] == ["grad0/rope0", "grad0/rope1"]
    agree(fast(*args), stepped(*args))


OUTSIDE = {
    "vmap": lambda f, w, x, *t: jax.vmap(f, (None, 0, None, None))(w, x[:, None], *t),
    "vmap of one's weights": lambda f, w, *a: jax.vmap(jax.grad(lambda k, *a: f(w | {"k": k}, *a)), (0, None, None, None))(
        jnp.stack([w["k"], 2 * w["k"]]), *a),
    "grad of one's weights": lambda f, w, *a: jax.grad(lambda k: f(w | {"k": k}, *a))(w["k"]),
    "jvp": lambda f, *a: jax.jvp(f, a, a),
    "jvp of one": lambda f, w, *a: jax.jvp(lambda k: f(w | {"k": k}, *a), (w["k"],), (w["k"],)),
    "jvp of jit": lambda f, *a: jax.jvp(jax.jit(f), a, a),
    "linearize": lambda f, *a: jax.linearize(f, *a)[1](*a),
    "jvp of grad": lambda f, w, x, *t: jax.jvp(lambda x: jax.grad(jax.jit(f))(w, x, *t), (x,), (x,))[1],
    "grad of checkpoint": lambda f, *a: jax.grad(jax.checkpoint(f))(*a),
    "scan": lambda f, w, x, *t: jax.lax.scan(lambda s, x: (s + f(w, x[None], *t), None), 0.0, x)[0],
    "shard_map": lambda f, *a: jax.shard_map(lambda *a: jax.lax.psum(f(*a), "data"), mesh=mesh_of_one(),
                                             in_specs=(P(), P("data"), P(), P()), out_specs=P())(*a),
}  # fmt: skip


@pytest.mark.parametrize("name", rest_slow(OUTSIDE, "vmap of one's weights", "jvp of grad", "shard_map"))
def test_transformed_from_outside(name):
    transform = OUTSIDE[name]
    fn, args = total(layer), given()
    fast = kpt_jax.optimize(fn)
    assert paired(fast.plan(*args)) == SAYS[1]
    agree(transform(fast, *args), transform(fn, *args))


def test_results_lie_where_they_did():
    """Their shardings are part of the program's types, and those of two sites differ."""
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=2 * (AxisType.Explicit,))

    def call(w, x, cos, sin):
        q, k = (jax.lax.reshape(x @ w[n], (B, T, w[n].shape[1] // H, H), out_sharding=s)
                for n, s in (("q", P("data", None, "model")), ("k", P("data"))))  # fmt: skip
        return turn(q, cos, sin), turn(k, cos, sin)

    with jax.set_mesh(mesh):
        args = jax.device_put(given(), (NamedSharding(mesh, P()), NamedSharding(mesh, P("data")), *2 * [NamedSharding(mesh, P())]))
        fast = kpt_jax.optimize(call)
        assert paired(fast.plan(*args)) == SAYS[1]
        for of_it in (lambda f: f, lambda f: jax.grad(total(f), (0, 1, 2, 3))):
            got, want = (jax.jit(of_it(f))(*args) for f in (fast, call))
            agree(got, want)
            assert jax.tree.map(jax.typeof, got) == jax.tree.map(jax.typeof, want)


def test_effects_keep_their_order():
    """What one site is computed from would have to run before what reads the other."""
    met = []

    def told(name, x):
        return io_callback(lambda x: (met.append(name), x)[1], jax.ShapeDtypeStruct(x.shape, x.dtype), x, ordered=True)

    def fn(w, x, cos, sin):
        q = turn(heads(w["q"], x), cos, sin)
        q = told("q", q)
        return attend(x, q, turn(heads(w["k"], told("x", x)), cos, sin))

    fast, args = kpt_jax.optimize(fn), given()
    assert paired(fast.plan(*args)) == []
    met.clear()
    agree(jax.jit(fast)(*args), layer(*args))
    jax.effects_barrier()
    assert met == ["q", "x"]


def test_what_only_looks_on_is_in_nobody_s_way(capfd):
    def fn(w, x, cos, sin):
        jax.debug.print("x {}", x.sum() > 1e9, ordered=True)
        q = turn(heads(w["q"], x), cos, sin)
        jax.debug.print("q {}", q.sum() > 1e9, ordered=True)
        k = turn(heads(w["k"], x), cos, sin)
        jax.debug.print("k {}", k.sum() > 1e9, ordered=True)
        return attend(x, q, k)

    fast, args = kpt_jax.optimize(fn), given()
    assert paired(fast.plan(*args)) == SAYS[1]
    agree(jax.jit(fast)(*args), layer(*args))
    jax.effects_barrier()
    assert capfd.readouterr().out.split("\n")[-4:] == ["x False", "q False", "k False", ""]


@pytest.fixture
def proofs(unproved, monkeypatch):
    """Of pairs: the shapes of x and of the other that each is made on, and of the x that it stands for."""
    made, standing = [], []

    def compared(kernel, specs, params, compared=pairs._compared_pair):
        made.append((specs["x"].shape, specs["other"].shape))
        standing.append(stood_for("x", specs["x"].shape))
        return compared(kernel, specs, params)

    monkeypatch.setattr(pairs, "_compared_pair", compared)
    return made, standing


def test_layers_alike_are_proved_once(proofs):
    assert paired(kpt_jax.plan(several_layers, *given())) == SAYS[2] and len(proofs[0]) == 1


def test_a_proof_takes_no_more_memory_than_it_may(proofs, monkeypatch):
    assert paired(kpt_jax.plan(layer, *given(301))) == SAYS[1]
    monkeypatch.setenv("KPT_CERTIFY_BYTES", "1")
    assert paired(kpt_jax.plan(layer, *given(301))) == SAYS[1]
    full, short = (((B, t, 4, H), (B, t, 2, H)) for t in (301, 141))
    assert proofs == ([full, short], 2 * [full[0]])


@pytest.fixture
def alone(monkeypatch):
    """Makes a kernel of what it is given the only one."""
    spec = registry.get("rope.xla")
    monkeypatch.setattr(registry, "_kernels", {})
    return lambda **of: registry.register(dataclasses.replace(spec, **of))


def test_what_takes_no_short_arrays_runs_apart(proofs, alone, monkeypatch):
    """A site alone is small enough to be compared, and two are not."""
    alone(accepts=lambda specs, params: None if specs["x"].shape[1] == 1111 else "is for 1111")
    args = given(1111)
    program, sites, _ = default_fusion().find(capture(jax.make_jaxpr(layer)(*args), "layer"))
    monkeypatch.setenv("KPT_CERTIFY_BYTES", str(max(original_bytes(program, m) for m in sites)))
    (note,) = kpt_jax.plan(layer, *args).notes
    assert note.startswith("A site of rope runs apart from the one that shares its tables") and "is for 1111" in note and proofs == ([], [])


def test_a_plan_for_other_hardware_says_what_will_be_there(proofs, alone):
    alone(platforms=("cuda",), efficiency=1.0)
    plan = kpt_jax.plan(layer, *given(), hardware="h100-sxm")
    assert plan.notes == (f"On h100-sxm, {SAYS[1][0][:-1]}, if that is proved there.",) and proofs == ([], [])


def bits_off(**arrays):
    y, z = pair(**arrays)
    return y, z * (1 + 2.0**-23)


def gradient_off(**arrays):
    y, z = pair(**arrays)
    less = arrays["other"] * 2.0**-22
    return y, z + less - jax.lax.stop_gradient(less)


def tables_off(**arrays):
    y, z = pair(**arrays)
    less = (arrays["cos"] * 1e-2).sum()
    return y + less - jax.lax.stop_gradient(less), z


def broken(**arrays):
    raise RuntimeError("out of registers")


@pytest.mark.parametrize(("other", "says"), [(bits_off, "result1 in other bits"), (gradient_off, "dother"), (tables_off, "dcos"),
                                             (broken, "out of registers")])  # fmt: skip
def test_what_gives_something_else_runs_apart(other, says, kernel, unproved, monkeypatch, caplog):
    monkeypatch.setattr(kernel, "pair", other)
    fast, args = kpt_jax.optimize(layer), given()
    plan = fast.plan(*args)
    (note,) = plan.notes
    assert len(plan.sites) == 2
    (record,) = [r.getMessage() for r in caplog.records if "runs alone" in r.getMessage()]
    assert note.startswith("A site of rope runs apart from") and says in note and says in record
    agree(fast(*args), layer(*args))


def test_a_plan_without_proofs_runs_nothing(kernel, unproved, monkeypatch):
    monkeypatch.setattr(kernel, "pair", broken)
    assert paired(kpt_jax.optimize(layer).unproved().plan(*given())) == SAYS[1]


def test_kernels_that_cannot_run_apart(kernel, monkeypatch):
    monkeypatch.delattr(kernel, "pair")
    assert paired(kpt_jax.plan(layer, *given())) == []
