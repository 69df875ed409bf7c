"""The kernels for Hopper that multiply, without one: interpreted against float64, lowered for CUDA, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import kpt
from kpt.errors import KernelError
from kpt.fusion.program import Match
from kpt.fusion.site import reduced_specs
from kpt.graph.expr import Exprs
from kpt.hardware import hardware_profile
from kpt.kernels.spec import refusal, unmet
from kpt.kernels.stand_in import standing_for
from kpt.ops import Spec, op
from kpt.ops.activations import ACTIVATIONS
from kpt.ops.glu import LINEAR
from kpt.strategy import choose
from tests.jax.certified import certify, mesh_of_one, rest_slow, specs_of

H100, A100 = hardware_profile("h100-sxm"), hardware_profile("a100-sxm-80gb")
TOO_OLD = unmet("jax>=0.11.2")
pytestmark = pytest.mark.skipif(TOO_OLD is not None, reason=TOO_OLD or "")


def linear(dtype="bfloat16", m=200, k=192, n=320, bias=True, lead=()):
    return specs_of(dtype, x=(*lead, m, k), w=(k, n), **({"b": (n,)} if bias else {}))


def gated(dtype="bfloat16", m=136, k=128, n=192, **biases):
    return specs_of(dtype, x=(m, k), w_gate=(k, n), w_up=(k, n), **biases)


def product(dtype="bfloat16", m=136, k=192, n=320):
    return specs_of(dtype, a=(m, k), b=(k, n))


def head(dtype="bfloat16", tokens=300, k=64, classes=1030, **more):
    return specs_of(dtype, x=(tokens, k), w=(k, classes), labels=((tokens,), "int32"), **more)


BIASES = {"b_gate": (192,), "b_up": (192,)}
CASES = {f"linear_act {a}": ("linear_act", linear(m=72, k=64, n=192), {"activation": a}) for a in ACTIVATIONS} | {
    "linear_act, batch, no bias": ("linear_act", linear("float16", 24, 128, 64, False, (2,)), {}),
    "linear_act, several tiles": ("linear_act", linear(m=264, k=320, n=576), {}),
    "glu": ("glu", gated(), {}),
    "glu, biases": ("glu", gated("float16", **BIASES), {"activation": "gelu"}),
    "glu, one bias": ("glu", gated(b_up=((192,), "float32")), {"activation": "gelu_tanh"}),
    "glu_linear": ("glu_linear", gated(w_down=(192, 64)), {}),
    "glu_linear, biases": ("glu_linear", gated("float16", w_down=(192, 128), **BIASES), {"activation": "gelu"}),
    "glu_linear, tiles": ("glu_linear", gated(m=264, k=64, n=320, w_down=(320, 128)), {}),
    "glu_linear, 64 columns": ("glu_linear", gated(m=72, k=64, n=64, w_down=(64, 192)), {"activation": "quick_gelu"}),
    "glu_linear, rows of 72": ("glu_linear", gated(m=72, w_down=(192, 72)), {}),
    "matmul": ("matmul", product(), {}),
    "matmul float16": ("matmul", product("float16", 64, 64, 64), {}),
    "linear_cross_entropy": ("linear_cross_entropy", head(), {}),
    "linear_cross_entropy, all": (
        "linear_cross_entropy",
        head("float16", 100, b=(1030,), weights=((100,), "float32")),
        {"label_smoothing": 0.1, "logits_soft_cap": 5.0, "invalid": "drop"},
    ),
    "linear_cross_entropy, chunks": ("linear_cross_entropy", head(tokens=304, classes=1088), {}),
    "linear_cross_entropy, chunks, all": (
        "linear_cross_entropy",
        head(tokens=304, classes=1088, b=(1088,), weights=((304,), "float32")),
        {"label_smoothing": 0.1, "logits_soft_cap": 5.0, "invalid": "clip"},
    ),
}


def kernel_of(name):
    """The kernel of an op, or of its own name; that of "glu_linear" is part of another."""
    if name == "glu_linear":
        return kpt.registry.load("glu.pallas_gpu").then_linear
    return kpt.registry.load(name if "." in name else f"{name}.pallas_gpu")


def meaning_of(name):
    return LINEAR if name == "glu_linear" else op(name.split(".")[0])


@pytest.fixture
def interpreted(monkeypatch):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    monkeypatch.setattr(plgpu, "async_prefetch", lambda ref, **_: None)  # which the interpreter lacks, and which changes no value
    jax.clear_caches()
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield
    jax.clear_caches()


@pytest.fixture
def in_chunks(monkeypatch):
    """Chunks of 128 tokens. The interpreter has no copies that add, so that the sum over chunks is jax's here."""
    import pallas_kernels.linear_cross_entropy.gpu as gpu

    monkeypatch.setattr(gpu, "CHUNK_BYTES", 2 * 128 * 1088)
    monkeypatch.setattr(gpu, "add_product", lambda total, a, b: total + (a.T @ b).astype(total.dtype))


@pytest.mark.parametrize("case", rest_slow(CASES, "linear_act gelu", "linear_act, several tiles", "glu", "glu_linear, tiles", "matmul", "linear_cross_entropy, all"))
def test_agrees_with_float64(case, interpreted, request, monkeypatch):
    if "chunks" in case:
        request.getfixturevalue("in_chunks")
    if case == "glu, biases" or "glu_linear, " in case:  # gradients by kernels: the one that adds two products, and that of then_linear
        monkeypatch.setattr("pallas_kernels.hopper_gemm.FEWEST", 1)
    name, specs, params = CASES[case]
    certify(meaning_of(name), specs, params, fn=kernel_of(name), seeds=(0,))


@pytest.mark.parametrize("tokens_differ", [False, True])
def test_one_cotangent_or_one_a_token(tokens_differ, interpreted, in_chunks):
    """Under a mean the gradients made in the forward pass are scaled; where tokens differ, they are made anew."""
    fn = kpt.registry.load("linear_cross_entropy.pallas_gpu")
    arrays = op("linear_cross_entropy").sample(np.random.default_rng(0), head(tokens=304, classes=1088))
    g = np.full(304, 1 / 304, np.float32) * (1 + np.arange(304) % 3 if tokens_differ else 1)
    want = op("linear_cross_entropy").reference_vjp((g,), **arrays)
    got = jax.jit(jax.grad(lambda d: jnp.sum(fn(**d, labels=arrays["labels"]) * g)))({n: arrays[n] for n in "xw"})
    for n in "xw":
        error = np.linalg.norm(np.asarray(got[n], np.float64) - want[n]) / np.linalg.norm(want[n])
        assert error < kpt.validation.tolerance("bfloat16", 1088, gradient=True).rtol_l2


def kernels_of(kernel, specs, params={}):  # noqa: B006  (read only)
    """How many Mosaic kernels both passes launch, lowered for CUDA."""
    fn, moving = kernel_of(kernel), meaning_of(kernel).learned
    arrays = {n: jax.ShapeDtypeStruct(s.shape, s.dtype) for n, s in specs.items()}

    def both(arrays):
        fixed = {n: a for n, a in arrays.items() if n not in moving}
        out, pull = jax.vjp(lambda d: fn(**d, **fixed, **params), {n: arrays[n] for n in moving if n in arrays})
        return out, pull(jnp.ones_like(out))

    return jax.jit(both).trace(arrays).lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2")


@pytest.mark.parametrize(
    ("name", "long", "short", "kernels"),
    [
        ("glu", gated(m=8192, k=4096, n=14336), gated(m=136, k=128, n=192), (1, 2)),
        ("glu_linear", gated(m=8192, k=4096, n=14336, w_down=(14336, 4096)), gated(w_down=(192, 128)), (1, 3)),
        ("glu_linear", gated(m=8192, k=4096, n=14336, w_down=(14336, 4100)), gated(w_down=(192, 128)), (1, 2)),
        ("linear_cross_entropy", head(tokens=8192, k=4096, classes=128256), head(tokens=1056, k=1024, classes=1088), (1, 4)),
    ],
)
def test_a_short_call_goes_the_way_of_the_long_one_that_it_stands_for(name, long, short, kernels):
    found = [kernels_of(name, short)]
    with standing_for(long):
        found.append(kernels_of(name, short))
    assert tuple(found) == kernels and kernels_of(name, long) == kernels[1]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("transposed", ["neither", "left", "right", "both"])
@pytest.mark.parametrize("tiles", [{}, {"split": "n"}, {"m": 256, "n": 128}, {"along": "n", "width": 2, "stages": 2}])
def test_products_of_transposed_factors(transposed, tiles, interpreted):
    from pallas_kernels import hopper_gemm

    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=s), "bfloat16") for s in ((264, 192), (192, 320)))
    want = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    a_axis, b_axis = int(transposed in ("neither", "right")), int(transposed in ("right", "both"))
    got = hopper_gemm.product(a if a_axis else a.T, b.T if b_axis else b, a_axis=a_axis, b_axis=b_axis, tiles=hopper_gemm.Tiles(**tiles))
    assert np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want) < kpt.validation.tolerance("bfloat16", 192).rtol_l2


TIMED = json.loads((Path(__file__).parents[2] / "docs/benchmarks/hopper-tiles.json").read_text(encoding="utf-8"))["rows"]


@pytest.mark.parametrize("found", TIMED, ids=lambda found: f"{found['op']} {'x'.join(map(str, found['shape']))}")
def test_the_rule_takes_tiles_that_were_among_the_fastest(found):
    from kpt_jax.bench_tiles import rule

    tiled = {name: ms for name, ms in found["ms"].items() if name != "plain"}
    assert tiled[rule(found["op"], found["shape"])] <= 1.03 * min(tiled.values())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("factors", [2, 1])
def test_every_tiling(factors, interpreted):
    from pallas_kernels import hopper_gemm

    rng = np.random.default_rng(0)
    a, *bs = (jnp.asarray(rng.normal(size=s), "bfloat16") for s in ((264, 192), *[(192, 320)] * factors))
    want = np.asarray(a, np.float64) @ sum(np.asarray(b, np.float64) for b in bs)
    for tiles in (t for t in hopper_gemm.BED if t.takes(factors)):
        (got,) = hopper_gemm.products(a, bs, lambda *sums: [sum(sums)], 1, tiles=tiles)
        error = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
        assert error < kpt.validation.tolerance("bfloat16", 192).rtol_l2, tiles


@pytest.mark.sampled(5)
@pytest.mark.parametrize("tiles", [{}, {"split": "n"}, {"m": 256, "n": 128}, {"m": 64, "n": 256, "split": "n", "stages": 2}])
@pytest.mark.parametrize(("m", "n"), [(72, 320), (264, 64), (8, 128), (264, 576)])
def test_an_epilogue_reads_what_lies_beside_the_sums(m, n, tiles, interpreted, monkeypatch):
    from pallas_kernels import hopper_gemm

    monkeypatch.setattr(hopper_gemm, "MULTIPROCESSORS", 2)  # so that one makes several tiles
    rng = np.random.default_rng(0)
    a, b, x, y = (jnp.asarray(rng.normal(size=s), "bfloat16") for s in ((m, 192), (n, 192), (m, n), (m, n)))
    row = jnp.asarray(rng.normal(size=n), "float32")
    wide = [np.asarray(array, np.float64) for array in (a, b, x, y, row)]
    sums = wide[0] @ wide[1].T
    got = hopper_gemm.products(
        a, [b], lambda acc, row, x, y: [acc * x + row, y, acc * y - x], 3, [row], [x, y], b_axis=1, tiles=hopper_gemm.Tiles(**tiles)
    )
    rtol = kpt.validation.tolerance("bfloat16", 192).rtol_l2
    for made, want in zip(got, (sums * wide[2] + wide[4], wide[3], sums * wide[3] - wide[2]), strict=True):
        assert np.linalg.norm(np.asarray(made, np.float64) - want) / np.linalg.norm(want) < rtol


@pytest.mark.parametrize("tiles", [{}, {"m": 64, "split": "n", "stages": 2}])
def test_no_piece_lands_on_one_that_is_still_read(tiles, interpreted, monkeypatch):
    from jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks import get_races  # public under no name
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels import hopper_gemm

    monkeypatch.setattr(hopper_gemm, "MULTIPROCESSORS", 2)
    rng = np.random.default_rng(0)
    a, b, x, y = (jnp.asarray(rng.normal(size=s), "bfloat16") for s in ((264, 64), (320, 64), (264, 320), (264, 320)))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        wanted = {"beside": [x, y], "b_axis": 1, "tiles": hopper_gemm.Tiles(**tiles)}
        jax.block_until_ready(hopper_gemm.products(a, [b], lambda acc, x, y: [acc * x, y], 2, **wanted))
        assert not get_races().races_found


@pytest.mark.parametrize("tiles", [{}, {"split": "n"}])
def test_64_columns_are_written_once(tiles, interpreted, monkeypatch):
    """On a chip jax drops the one group of 64 columns, and with it where a copy begins. The interpreter does not: it is done here."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels import hopper_gemm

    real, copied = plgpu.copy_smem_to_gmem, []

    def copy(buffer, there, **more):
        rows, columns = there.transforms[-1].indices
        copied.append(columns)
        real(buffer, there.ref.at[rows, columns.__class__(0, 64)], **more)

    monkeypatch.setattr(plgpu, "copy_smem_to_gmem", copy)
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=s), "bfloat16") for s in ((264, 192), (192, 64)))
    want = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    got = hopper_gemm.product(a, b, tiles=hopper_gemm.Tiles(**tiles))
    assert copied
    assert np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want) < kpt.validation.tolerance("bfloat16", 192).rtol_l2


@pytest.mark.parametrize(
    ("tiles", "why"),
    [
        ({"m": 100}, "m=100"),
        ({"k": 0}, "k=0"),
        ({"split": "k"}, "split='k'"),
        ({"m": 64, "n": 512}, "warpgroups share"),
        ({"m": 256}, "more than 128 sums"),
        ({"stages": 5}, "bytes of shared memory"),
    ],
)
def test_impossible_tiles(tiles, why):
    from pallas_kernels.hopper_gemm import Tiles

    with pytest.raises(KernelError, match=why):
        Tiles(**tiles)


LARGE = {
    "linear_act": (linear(m=8192, k=4096, n=16384), 2),
    "linear_act no bias": (linear("float16", 1000, 768, 3072, False), 2),
    "glu": (gated(m=8192, k=4096, n=14336), 2),
    "glu_linear": (gated(m=8192, k=4096, n=14336, w_down=(14336, 4096)), 3),
    "glu_linear rows of 4100": (gated(m=8192, k=4096, n=14336, w_down=(14336, 4100)), 2),
    "matmul": (product(m=4096, k=4096, n=4096), 3),
    "linear_cross_entropy": (head(tokens=8192, k=4096, classes=128256), 4),
    "linear_cross_entropy one chunk": (head("float16", 4096, 2048, 50257, b=(50257,)), 1),
}


def gradients_of(name, **params):
    fn = kernel_of(name)

    def gradients(arrays):
        moving = {n: a for n, a in arrays.items() if n != "labels"}
        return jax.value_and_grad(lambda d: fn(**arrays | d, **params).astype("float32").sum())(moving)

    return gradients


@pytest.mark.parametrize("case", LARGE)
def test_lowers_for_cuda_in_both_passes(case):
    specs, kernels = LARGE[case]
    arrays = {n: jax.ShapeDtypeStruct(s.shape, s.dtype) for n, s in specs.items()}
    text = jax.jit(gradients_of(case.split()[0])).trace(arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == kernels


@pytest.mark.sampled(5)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("name", "specs", "kernels"),
    [("linear_act", linear(m=1024, k=64, n=2048), 2), ("glu_linear", gated(m=1024, n=2048, w_down=(2048, 64)), 2)],
)
def test_every_activation_lowers_for_cuda(name, specs, kernels, activation):
    kernels -= (name, activation) == ("linear_act", "identity")
    assert kernels_of(name, specs, {"activation": activation}) == kernels


@pytest.mark.sampled(3)
@pytest.mark.parametrize("transform", ["shard_map", "vmap", "remat", "scan"])
@pytest.mark.parametrize("case", ["linear_act", "glu", "glu_linear", "matmul", "linear_cross_entropy"])
def test_lowers_under_transformations(case, transform, monkeypatch):
    if case == "glu_linear":
        monkeypatch.setattr("pallas_kernels.hopper_gemm.FEWEST", 1)
    if case == "linear_cross_entropy":
        monkeypatch.setattr("pallas_kernels.linear_cross_entropy.gpu.CHUNK_BYTES", 2 * 128 * 1088)
    specs = {"linear_act": linear(), "glu": gated(), "glu_linear": gated(w_down=(192, 64)), "matmul": product(),
             "linear_cross_entropy": head(tokens=304, classes=1088)}[case]  # fmt: skip
    gradients, first = gradients_of(case), meaning_of(case).arrays[0]
    cut = (first, "labels")
    lead = (2,) if transform in ("vmap", "scan") else ()
    arrays = {n: jax.ShapeDtypeStruct((*lead, *s.shape) if n in cut else s.shape, s.dtype) for n, s in specs.items()}
    if transform == "vmap":
        f = jax.vmap(lambda arrays: gradients(arrays)[1], ({n: 0 if n in cut else None for n in specs},))
    elif transform == "scan":

        def f(arrays):
            return jax.lax.scan(lambda _, some: (None, gradients(arrays | some)[1]), None, {n: arrays[n] for n in cut if n in arrays})[1]

    elif transform == "remat":
        f = jax.checkpoint(lambda arrays: gradients(arrays)[1])
    else:
        places = {n: P("data") if n in cut else P() for n in specs}
        grads = {n: p for n, p in places.items() if n != "labels"}
        f = jax.shard_map(lambda arrays: gradients(arrays)[1], mesh=mesh_of_one(), in_specs=(places,), out_specs=grads)
    lowered = jax.jit(f).trace(arrays).lower(lowering_platforms=("cuda",))
    assert "@mosaic_gpu_v2" in lowered.as_text()
    assert lowered.out_info[first].shape == arrays[first].shape


def test_glu_and_what_reads_it_keep_the_projections_alone():
    arrays = {n: jax.ShapeDtypeStruct(s.shape, s.dtype) for n, s in gated(w_down=(192, 64)).items()}

    def kept(fn):
        left = jax.eval_shape(lambda d: jax.tree.leaves(jax.vjp(lambda d: fn(**d), d)[1]), arrays)
        return sum(a.shape == (136, 192) for a in left)

    glu = kernel_of("glu")
    assert kept(kernel_of("glu_linear")) == 2
    assert kept(lambda w_down, **rest: glu(**rest) @ w_down) == 3


BIG = {"m": 4096, "k": 512, "n": 4096}
REFUSED = [
    ("linear_act.pallas_gpu", linear(**BIG), {}, A100, "is built for sm90"),
    ("linear_act.pallas_gpu", linear("float32", **BIG), {}, H100, "computes in bfloat16, float16"),
    ("linear_act.pallas_gpu", linear(**BIG) | {"w": Spec((512, 4096), "float16")}, {}, H100, "arrays of one dtype"),
    ("linear_act.pallas_gpu", linear(**BIG), {"out_dtype": "float32"}, H100, "rounds its result to bfloat16"),
    ("linear_act.pallas_gpu", linear(m=4096, k=500, n=4096), {}, H100, "those of x have 500"),
    ("linear_act.pallas_gpu", linear(m=4096, k=512, n=4000), {}, H100, "those of w have 4000"),
    ("linear_act.pallas_gpu", linear(m=4097, k=512, n=4096), {}, H100, "x has 4097"),
    ("linear_act.pallas_gpu", linear(m=64, k=4096, n=4096), {}, H100, "below 64 tiles"),
    ("glu.pallas_gpu", gated(m=0, k=512, n=4096), {}, H100, "empty"),
    ("glu.pallas_gpu", gated(k=4096, n=14336) | {"x": Spec((4096,), "bfloat16")}, {}, H100, "x has 1"),
    ("glu.pallas_gpu", gated("float16", k=4096, n=14336) | {"x": Spec((4096,), "bfloat16")}, {}, H100, "arrays of one dtype"),
    ("matmul.pallas_gpu", product(m=4100, k=512, n=4096), {}, H100, "a has 4100"),
    ("linear_cross_entropy.pallas_gpu", head(classes=1000), {}, H100, "too few"),
    ("linear_cross_entropy.pallas_gpu", head(tokens=40000, classes=50257), {}, H100, "those of w have 50257"),
    ("linear_cross_entropy.pallas_gpu", head() | {"w": Spec((64, 1030), "float32")}, {}, H100, "one dtype"),
    ("linear_cross_entropy.pallas_gpu", head(tokens=0), {}, H100, "empty"),
]  # fmt: skip


def refused(kernel, specs, params, hardware):
    spec = kpt.registry.get(kernel)
    return refusal(spec, spec.op, hardware, next(iter(specs.values())).dtype, specs, params, "balanced", "jax")


@pytest.mark.parametrize(("kernel", "specs", "params", "hardware", "why"), REFUSED)
def test_refused(kernel, specs, params, hardware, why):
    assert why in refused(kernel, specs, params, hardware)


@pytest.mark.parametrize(
    ("name", "specs"),
    [("linear_act", linear(**BIG)), ("glu", gated(**BIG)), ("matmul", product(**BIG)), ("linear_cross_entropy", head())],
)
def test_refused_where_xla_may_partition(name, specs, monkeypatch):
    assert refused(f"{name}.pallas_gpu", specs, {}, H100) is None
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert "shard_map" in refused(f"{name}.pallas_gpu", specs, {}, H100)


@pytest.mark.parametrize(
    ("name", "specs", "hardware", "kernel"),
    [
        ("linear_act", LARGE["linear_act"][0], H100, "linear_act.pallas_gpu"),
        ("glu", LARGE["glu"][0], H100, "glu.pallas_gpu"),
        ("linear_cross_entropy", LARGE["linear_cross_entropy"][0], H100, "linear_cross_entropy.pallas_gpu"),
        ("matmul", LARGE["matmul"][0], H100, None),
        ("linear_act", LARGE["linear_act"][0], A100, None),
    ],
)
def test_the_planner_takes_it_where_it_wins(name, specs, hardware, kernel):
    chosen, _, _ = choose(name, specs, {}, hardware=hardware, level="balanced")
    assert (chosen and chosen.name) == kernel


@pytest.mark.parametrize("op_name", ["cross_entropy", "linear_cross_entropy", "attention"])
def test_a_proof_at_reduced_size_lets_a_kernel_have_axes_of_its_own(op_name):
    """It is made while the user's own function is traced, and a kernel for Hopper is lowered in it."""
    from kpt_jax.planner import FRONT

    specs = {"cross_entropy": specs_of("bfloat16", logits=(64, 1024), labels=((64,), "int32")), "linear_cross_entropy": head(),
             "attention": specs_of("bfloat16", **dict.fromkeys("qkv", (1, 128, 2, 64)))}[op_name]  # fmt: skip
    kernel = kpt.registry.load(f"{op_name}.pallas_gpu")
    seen = []

    def stand_in(**arrays):
        like = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in arrays.items()}
        seen.append(jax.jit(lambda given: kernel(**given)).trace(like).lower(lowering_platforms=("cuda",)))
        return kpt.registry.load(f"{op_name}.xla")(**arrays)

    match = type("Match", (), {"op": op_name, "params": {}})
    assert FRONT.against_reference(match, specs, stand_in).passed and seen


@pytest.mark.parametrize(("x", "n"), [((8, 4096, 4096), 11008), ((16, 2048, 2048), 8192), ((8192, 4096), 14336)])
def test_a_reduced_size_is_one_that_the_kernel_takes(x, n):
    """That of a proof against float64, where the call is too large to be run beside its own code."""
    specs = {"x": Spec(x, "bfloat16"), "w_gate": Spec((x[-1], n), "bfloat16"), "w_up": Spec((x[-1], n), "bfloat16")}
    match = Match("glu", {name: Exprs().out(0, s) for name, s in specs.items()}, {}, {}, (), "")
    assert any(refused("glu.pallas_gpu", reduced_specs(match, largest), {}, H100) is None for largest in (96, 512, 1024))
