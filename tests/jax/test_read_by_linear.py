"""A gated MLP's glu and the product that reads it as one site: where it is made, what it keeps, and that the program is what it was."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kpt_jax
from kpt.fusion.registry import default_fusion
from kpt.fusion.site import original_bytes
from kpt.kernels import KernelSpec, registry
from kpt.kernels.stand_in import stood_for
from kpt_jax import pairs
from kpt_jax.capture import capture
from kpt_jax.demo_model import Config, FeedForward
from tests.jax import plain_kernels
from tests.jax.certified import mesh_of_one

WIDTH, HIDDEN, ROWS = 24, 40, 16
SAYS = "1 site runs in one call with the linear layer that reads it, and keeps no result for it."


def projected(x, w_gate, w_up):
    return x @ w_gate, x @ w_up


def product(gate, up):
    return jax.nn.silu(gate) * up


def down(gate, up, w_down):
    return product(gate, up) @ w_down


def keeping_projections(last):
    """`last` of both projections and further weights; its backward pass keeps the projections of what it computes."""

    @jax.custom_vjp
    def fn(x, w_gate, w_up, *rest):
        return last(*projected(x, w_gate, w_up), *rest)

    def forward(x, w_gate, w_up, *rest):
        made = projected(x, w_gate, w_up)
        return last(*made, *rest), (x, w_gate, w_up, made, rest)

    def backward(kept, g):
        *arrays, made, rest = kept
        d_gate, d_up, *others = jax.vjp(last, *made, *rest)[1](g)
        return *jax.vjp(projected, *arrays)[1]((d_gate, d_up)), *others

    fn.defvjp(forward, backward)
    return fn


ALONE, TOGETHER = keeping_projections(product), keeping_projections(down)


def glu(*, x, w_gate, w_up, activation="silu", out_dtype=None):
    return ALONE(x, w_gate, w_up)


def then_linear(*, x, w_gate, w_up, w_down, activation="silu", out_dtype=None):
    return TOGETHER(x, w_gate, w_up, w_down)


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """The function above as the best of glu on a CPU; gives it as programs get it. What is proved is proved once for all tests of this file."""
    monkeypatch.setenv("KPT_CERTIFY", "random")
    monkeypatch.setitem(sys.modules, "glu_of_this_test", sys.modules[__name__])
    monkeypatch.setattr(registry, "_kernels", dict(registry._kernels))
    registry.register(KernelSpec("glu.fake", "glu", 1, "test", "jax", ("cpu",), "glu_of_this_test:glu", ("float32", "bfloat16"),
                                 arrays=frozenset({"x", "w_gate", "w_up"}), params={"activation": ("silu",)}, efficiency=1.0))  # fmt: skip
    fn = registry.load("glu.fake")
    monkeypatch.setattr(fn, "then_linear", then_linear, raising=False)
    return fn


def given(dtype="float32"):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) * shape[-2] ** -0.5, dtype)

    weights = {"gate": normal(WIDTH, HIDDEN), "up": normal(WIDTH, HIDDEN), "down": normal(HIDDEN, WIDTH)}
    return weights, normal(2, ROWS // 2, WIDTH)


def gated(w, x):
    return jax.nn.silu(x @ w["gate"]) * (x @ w["up"])


def dot(dims=((2,), (0,)), batch=((), ()), **more):
    return functools.partial(jax.lax.dot_general, dimension_numbers=(dims, batch), **more)


def mlp(w, x):
    return x + gated(w, x) @ w["down"]


def read_twice(w, x):
    h = gated(w, x)
    return h @ w["down"] + h.mean()


def returned(w, x):
    h = gated(w, x)
    return h @ w["down"], h


def read_by_two_layers(w, x):
    h = gated(w, x)
    return h @ w["down"] + h @ (2 * w["down"])


def both_ways(w, x):
    turned = jnp.cumsum(w["down"].T, 1)  # which no formula looks into
    return dot(((2,), (1,)))(gated(w, x), turned), jnp.cos(turned.T)


def twice_written(w, x):
    return gated(w, x) @ w["down"], gated(w, x).sum()


def reshaped(w, x):
    return (gated(w, x).reshape(ROWS, HIDDEN) @ w["down"]).reshape(x.shape)


def of_shape(*shape, program=mlp):
    return lambda w, x: program(w, x.reshape(-1)[: math.prod(shape)].reshape(shape))


PROGRAMS = {
    "alone": (mlp, True),
    "a transposed weight": (lambda w, x: gated(w, x) @ jnp.tanh(w["down"].T).T, True),
    "the weight's last dimension": (lambda w, x: dot(((2,), (1,)))(gated(w, x), jnp.tanh(w["down"].T)), True),
    "a weight that lies both ways": (both_ways, True),
    "a weight that is another's transpose": (lambda w, x: gated(w, x) @ w["gate"].T, True),
    "a weight made of what stands after": (lambda w, x: (lambda h: h @ (w["down"] * jnp.exp(x).mean()))(gated(w, x)), True),
    "a constant weight": (lambda w, x: gated(w, x) @ np.ones((HIDDEN, 8), x.dtype), True),
    "rows": (lambda w, x: mlp(w, x.reshape(ROWS, WIDTH)), True),
    "a batch of 1": (of_shape(1, ROWS, WIDTH), True),
    "sequences of 1": (of_shape(ROWS, 1, WIDTH), True),
    "one token": (of_shape(1, 1, WIDTH), True),
    "merged rows": (reshaped, True),
    "merged rows, a batch of 1": (of_shape(1, ROWS, WIDTH, program=reshaped), True),
    "rows split": (lambda w, x: gated(w, x.reshape(ROWS, WIDTH)).reshape(4, 4, HIDDEN) @ w["down"], True),
    "a dimension dropped": (of_shape(1, ROWS, WIDTH, program=lambda w, x: gated(w, x)[0] @ w["down"]), True),
    "a dimension added": (lambda w, x: gated(w, x)[:, None] @ w["down"], True),
    "rows spread": (lambda w, x: jnp.broadcast_to(gated(w, x), (3, 2, ROWS // 2, HIDDEN)) @ w["down"], False),
    "the last dimension cut": (lambda w, x: gated(w, x).reshape(2, ROWS, 20) @ w["down"][:20], False),
    "merged rows, returned": (lambda w, x: (lambda h: (h @ w["down"], h))(gated(w, x).reshape(ROWS, HIDDEN)), False),
    "merged rows, read twice": (lambda w, x: (lambda h: h.reshape(ROWS, HIDDEN) @ w["down"] + h.mean())(gated(w, x)), False),
    "written twice": (twice_written, False),
    "read twice": (read_twice, False),
    "read by two layers": (read_by_two_layers, False),
    "returned": (returned, False),
    "both factors": (lambda w, x: dot(((2,), (2,)), ((0,), (0,)))(*2 * [gated(w, x)]), False),
    "both factors, no batch": (lambda w, x: dot(((1,), (1,)))(*2 * [gated(w, x.reshape(ROWS, WIDTH))]), False),
    "as the right factor": (lambda w, x: dot(((0,), (2,)))(w["down"], gated(w, x)), False),
    "another dimension": (lambda w, x: dot(((1,), (0,)))(gated(w, x), x[0]), False),
    "a weight for each sequence": (lambda w, x: jnp.einsum("bth,bhw->btw", gated(w, x), jnp.stack([w["down"], -w["down"]])), False),
    "a weight of three dimensions": (lambda w, x: dot()(gated(w, x), w["down"].reshape(HIDDEN, 4, 6)), False),
    "more precise": (lambda w, x: dot(precision=jax.lax.Precision.HIGHEST)(gated(w, x), w["down"]), False),
    "an effect on it": (lambda w, x: (lambda h: (jax.debug.callback(lambda h: None, h), h @ w["down"])[1])(gated(w, x)), False),
}


def agree(got, want, bound=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a, "float64"), np.asarray(b, "float64"), rtol=bound,
                                                         atol=bound * float(jnp.abs(b).max())), got, want)  # fmt: skip


def total(fn):
    return lambda *args: sum(jnp.sin(y.astype("float32")).sum() for y in jax.tree.leaves(fn(*args)))


def one_call(plan):
    assert any(s.kernel == "glu.fake" for s in plan.sites), plan.explain()
    return SAYS in plan.notes


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", PROGRAMS)
def test_one_call_where_it_can_be(name):
    program, together = PROGRAMS[name]
    fn, args = total(program), given()
    fast = kpt_jax.optimize(fn)
    assert one_call(fast.plan(*args)) is one_call(fast.unproved().plan(*args)) is together
    agree(jax.value_and_grad(fast, (0, 1))(*args), jax.value_and_grad(fn, (0, 1))(*args))


@pytest.mark.parametrize("wide", [False, True], ids=["bfloat16", "summed to float32"])
def test_what_rounds_as_the_kernel_does(wide):
    def fn(w, x):
        return dot(preferred_element_type="float32" if wide else None)(gated(w, x), w["down"])

    args = given("bfloat16")
    fast = kpt_jax.optimize(fn)
    assert one_call(fast.plan(*args)) is not wide
    agree(fast(*args), fn(*args), 0.05)
    assert fast(*args).dtype == ("float32" if wide else "bfloat16")


def test_float32_parameters_in_bfloat16():
    config = Config(width=WIDTH, hidden=HIDDEN)
    model = FeedForward(config, nnx.Rngs(0))
    for layer in (model.gate, model.up, model.down):
        layer.dtype = jnp.bfloat16
    plan = kpt_jax.plan(model, given("bfloat16")[1])
    assert one_call(plan), plan.explain()


def test_rows_that_are_laid_out_anew_are_no_same_rows():
    """Their sharding is part of the program's types."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))

    def gathered(w, x):
        return jax.lax.reshape(gated(w, x), (ROWS, HIDDEN), out_sharding=P()) @ w["down"]

    with jax.set_mesh(mesh):
        w, x = jax.device_put(given(), (NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))))
        fast = kpt_jax.optimize(gathered)
        assert not one_call(fast.plan(w, x))
        assert jax.typeof(fast(w, x)) == jax.typeof(gathered(w, x))


def test_a_product_that_is_another_site_is_that():
    registry.register(KernelSpec("linear_act.fake", "linear_act", 1, "test", "jax", ("cpu",), f"{plain_kernels.__name__}:linear_act",
                                 ("float32",), efficiency=1.0))  # fmt: skip
    plan = kpt_jax.plan(lambda w, x: jax.nn.gelu(gated(w, x) @ w["down"]), *given())
    assert {s.kernel for s in plan.sites} == {"glu.fake", "linear_act.fake"} and not one_call(plan)


def layers(body):
    def run(w, x):
        two = jax.tree.map(lambda a: jnp.stack([a, -a]), w)
        return jax.lax.scan(lambda x, w: (body(w, x), None), x, two)[0]

    return run


def sharded(w, x):
    return jax.shard_map(mlp, mesh=mesh_of_one(), in_specs=(P(), P("data")), out_specs=P("data"))(w, x)


def stepped(w, x):
    value, grads = jax.value_and_grad(lambda w: jnp.square(mlp(w, x)).mean())(w)
    return optax.apply_updates(w, optax.sgd(0.1).update(grads, optax.sgd(0.1).init(w))[0]), value


INSIDE = {
    "scan": layers(mlp),
    "scan of remat": layers(jax.checkpoint(mlp)),
    "remat, products kept": jax.checkpoint(mlp, policy=jax.checkpoint_policies.dots_saveable),
    "cond": lambda w, x: jax.lax.cond(x[0, 0, 0] > 9, lambda w, x: x, mlp, w, x),
    "vmap": lambda w, x: jax.vmap(lambda x: mlp(w, x))(x),
    "shard_map": sharded,
}


@pytest.mark.parametrize("program", INSIDE.values(), ids=INSIDE)
def test_inside_of_a_program(program):
    fn, args = total(program), given()
    fast = kpt_jax.optimize(fn)
    assert one_call(fast.plan(*args))
    agree(jax.jit(jax.value_and_grad(fast, (0, 1)))(*args), jax.value_and_grad(fn, (0, 1))(*args))


def test_gradients_inside():
    fast, args = kpt_jax.optimize(stepped), given()
    plan = fast.plan(*args)
    assert one_call(plan) and [s.path for s in plan.sites] == ["grad0/glu0"]
    agree(fast(*args), stepped(*args))


OUTSIDE = {
    "vmap": lambda f, w, x: jax.vmap(f, (None, 0))(w, x[:, None]),
    "vmap of weights": lambda f, w, x: jax.vmap(jax.grad(f), (0, None))(jax.tree.map(lambda a: jnp.stack([a, 2 * a]), w), x),
    "jvp": lambda f, w, x: jax.jvp(f, (w, x), (w, x)),
    "jvp of jit": lambda f, w, x: jax.jvp(jax.jit(f), (w, x), (w, x)),
    "linearize": lambda f, w, x: jax.linearize(f, w, x)[1](w, x),
    "jacfwd": lambda f, w, x: jax.jacfwd(jax.jit(lambda s: f(w, s * x)))(1.0),
    "jvp of grad": lambda f, w, x: jax.jvp(lambda x: jax.grad(jax.jit(f))(w, x), (x,), (x,))[1],
    "grad of checkpoint": lambda f, w, x: jax.grad(jax.checkpoint(f))(w, x),
    "scan": lambda f, w, x: jax.lax.scan(lambda s, x: (s + f(w, x[None]), None), 0.0, x)[0],
    "shard_map": lambda f, w, x: jax.shard_map(lambda w, x: jax.lax.psum(f(w, x), "data"), mesh=mesh_of_one(),
                                               in_specs=(P(), P("data")), out_specs=P())(w, x),
}  # fmt: skip


@pytest.mark.parametrize("transform", OUTSIDE.values(), ids=OUTSIDE)
def test_transformed_from_outside(transform):
    fn, args = total(mlp), given()
    fast = kpt_jax.optimize(fn)
    assert one_call(fast.plan(*args))
    agree(transform(fast, *args), transform(fn, *args))


def test_what_makes_a_weight_is_no_part_of_the_site(kernel):
    """Though the program makes the weight's transpose for something else, and the product reads the weight as it lies."""
    program, matches, _ = default_fusion().find(capture(jax.make_jaxpr(both_ways)(*given()), "both_ways"))
    ((site, _),) = pairs.read_by_linear(program, [(m, kernel) for m in matches]).values()
    assert [n.op for n in program.consumed(site)].count("dot_general") == 3
    assert "opaque:cumsum" not in [n.op for n in program.consumed(site)]


def of_its_size(fn, *args):
    """Arrays of an MLP's width that a forward pass leaves for the backward one."""
    return sum(a.size == ROWS * HIDDEN for a in jax.tree.leaves(jax.vjp(fn, *args)[1]))


@pytest.mark.parametrize("batch", [2, 1])
def test_the_result_of_glu_is_not_kept(kernel, monkeypatch, batch):
    """The projections are, and where the product runs apart, what it multiplies."""
    w, x = given()
    args = w, x.reshape(batch, -1, WIDTH)
    assert of_its_size(kpt_jax.optimize(mlp), *args) == 2
    monkeypatch.delattr(kernel, "then_linear")
    assert of_its_size(kpt_jax.optimize(mlp), *args) == 3


@pytest.mark.parametrize("reader", [jnp.sum, lambda h: h], ids=["read", "returned"])
def test_an_expression_written_twice_is_computed_once(reader):
    fast = kpt_jax.optimize(lambda w, x: (gated(w, x) @ w["down"], reader(gated(w, x))))
    assert str(jax.make_jaxpr(fast)(*given())).count("dot_general") == 3


@pytest.fixture
def proofs(unproved, monkeypatch):
    """Of sites with their products: the shapes of what each is made on, and of the x that it stands for."""
    made, standing = [], []

    def compared(kernel, specs, params, compared=pairs._compared):
        made.append({n: s.shape for n, s in specs.items()})
        standing.append(stood_for("x", specs["x"].shape))
        return compared(kernel, specs, params)

    monkeypatch.setattr(pairs, "_compared", compared)
    return made, standing


def wide(hidden=203, tokens=301):
    def zeros(*shape):
        return jnp.zeros(shape, "float32")

    return {"gate": zeros(WIDTH, hidden), "up": zeros(WIDTH, hidden), "down": zeros(hidden, WIDTH)}, zeros(2, tokens, WIDTH)


def test_a_proof_takes_no_more_memory_than_it_may(proofs, monkeypatch):
    assert one_call(kpt_jax.plan(mlp, *wide()))
    monkeypatch.setenv("KPT_CERTIFY_BYTES", "1")
    assert one_call(kpt_jax.plan(mlp, *wide()))
    full = {"x": (2, 301, WIDTH), "w_gate": (WIDTH, 203), "w_up": (WIDTH, 203), "w_down": (203, WIDTH)}
    short = {"x": (2, 205, WIDTH), "w_gate": (WIDTH, 107), "w_up": (WIDTH, 107), "w_down": (107, WIDTH)}
    assert proofs == ([full, short], 2 * [full["x"]])


def test_what_takes_no_short_arrays_runs_apart(proofs, monkeypatch):
    """The site alone is small enough to be compared, and with its product it is not."""
    registry.register(dataclasses.replace(registry.get("glu.fake"), version=2,
                                          accepts=lambda specs, params: None if specs["w_up"].shape[1] == 1111 else "is for 1111"))  # fmt: skip
    args = wide(1111, 8)
    program, (site,), _ = default_fusion().find(capture(jax.make_jaxpr(mlp)(*args), "mlp"))
    monkeypatch.setenv("KPT_CERTIFY_BYTES", str(original_bytes(program, site)))
    plan = kpt_jax.plan(mlp, *args)
    assert not one_call(plan) and proofs == ([], []) and [note for note in plan.notes if "runs apart" in note and "is for 1111" in note]


def test_a_proof_is_of_the_settings_it_was_made_under(proofs, monkeypatch):
    for value in ("", "0", ""):
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", value)
        assert one_call(kpt_jax.plan(mlp, *given()))
    assert len(proofs[0]) == 2


def test_a_plan_for_other_hardware_says_what_will_be_there(proofs, monkeypatch):
    monkeypatch.setattr(registry, "_kernels", {})
    registry.register(KernelSpec("glu.fake", "glu", 1, "test", "jax", ("cuda",), "glu_of_this_test:glu", ("float32",), efficiency=1.0))
    plan = kpt_jax.plan(mlp, *given(), hardware="h100-sxm")
    assert plan.notes == (f"On h100-sxm, {SAYS[:-1]}, if that is proved there.",) and proofs == ([], [])


def test_other_numbers_run_apart(kernel, unproved, monkeypatch, caplog):
    monkeypatch.setattr(kernel, "then_linear", lambda **a: 1.001 * then_linear(**a))
    plan = kpt_jax.plan(mlp, *given())
    assert not one_call(plan) and "A site of glu runs apart from" in plan.explain() and "runs alone" in caplog.text


def test_what_raises_runs_apart(kernel, unproved, monkeypatch, caplog):
    def broken(**arrays):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(kernel, "then_linear", broken)
    assert not one_call(kpt_jax.plan(mlp, *given())) and "out of memory" in caplog.text
    assert not one_call(kpt_jax.plan(mlp, *given()))


def test_a_plan_without_proofs_runs_nothing(kernel, unproved, monkeypatch):
    def broken(**arrays):
        raise RuntimeError("it was run")

    monkeypatch.setattr(kernel, "then_linear", broken)
    assert one_call(kpt_jax.optimize(mlp).unproved().plan(*given()))


def test_a_small_gradient_of_the_wrong_sign_is_found_beside_a_large_one(kernel, unproved, monkeypatch):
    """By the proof of the whole program, where that of the site did not see it."""
    @jax.custom_vjp
    def wrong(x, w_gate, w_up, w_down):
        return down(*projected(x, w_gate, w_up), w_down)

    def backward(arrays, g):
        dx, d_gate, *others = jax.vjp(lambda x, w_gate, w_up, w_down: down(*projected(x, w_gate, w_up), w_down), *arrays)[1](g)
        return dx, -d_gate, *others

    wrong.defvjp(lambda *arrays: (wrong(*arrays), arrays), backward)
    monkeypatch.setenv("KPT_CERTIFY", "off")
    monkeypatch.setattr(kernel, "then_linear", lambda *, x, w_gate, w_up, w_down, **_: wrong(x, w_gate, w_up, w_down))
    fast = kpt_jax.optimize(lambda w, x, s: mlp(w, x).astype("float32").mean() + s.astype("float32").sum())
    weights, x = given("bfloat16")
    args = weights, x, jnp.ones(4, "bfloat16")
    assert one_call(fast.plan(*args))
    assert not fast.certify(*args).sites
