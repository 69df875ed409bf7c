"""The row kernels for Hopper without one: interpreted against float64, lowered for CUDA, and what they refuse."""

from __future__ import annotations

import functools
import threading
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import kpt
from kpt.hardware import hardware_profile
from kpt.kernels.spec import refusal, unmet
from kpt.ops import Spec, op
from kpt.ops.mask import Bias, Causal, Explicit, Lengths, Mask, Segments, Window
from kpt.strategy import choose
from tests import fuzz
from tests.cases import CASES as DRAWN
from tests.jax.certified import certify, mesh_of_one, rest_slow, specs_of

H100, A100 = hardware_profile("h100-sxm"), hardware_profile("a100-sxm-80gb")
CAUSAL = Mask((Causal(),))
TOO_OLD = unmet("jax>=0.11.1")
needs_mosaic = pytest.mark.skipif(TOO_OLD is not None, reason=TOO_OLD or "")


def rows(dtype="bfloat16", n=3, width=1024, names=("weight",), **more):
    return specs_of(dtype, x=(n, width), **dict.fromkeys(names, ((width,), "float32")), **more)


def losses(dtype="bfloat16", n=3, classes=5000):
    return specs_of(dtype, logits=(n, classes)) | {"labels": Spec((n,), "int32")}


def turned(dtype="bfloat16", b=2, t=21, n=17, h=128, r=None, tables=1, of="float32"):
    return specs_of(dtype, x=(b, t, n, h), **dict.fromkeys(("cos", "sin"), ((tables, t, r or h), of)))


CASES = {
    "layer_norm": ("layer_norm", rows(names=("weight", "bias")), {}),
    "layer_norm, no piece divides, residual": ("layer_norm", rows("float16", 5, 1000, ("weight", "bias"), residual=(5, 1000)), {}),
    "layer_norm, odd width": ("layer_norm", rows("float32", 2, 513, ()), {"eps": 1e-3, "out_dtype": "bfloat16"}),
    "layer_norm, two kernels": ("layer_norm", rows("bfloat16", 5, 1800, ("weight", "bias"), residual=(5, 1800)), {}),
    "layer_norm, two warpgroups": ("layer_norm", rows("bfloat16", 5, 2048, ("weight", "bias")), {}),
    "rms_norm": ("rms_norm", rows(), {"weight_offset": 1.0}),
    "rms_norm, several rows to a block": ("rms_norm", rows("float16", 5, 1800), {}),
    "rms_norm, residual, three axes": ("rms_norm", specs_of("bfloat16", x=(2, 2, 640), residual=(2, 2, 640)), {"out_dtype": "float32"}),
    "rms_norm, a cluster": ("rms_norm", rows(n=5, width=2048), {}),
    "layer_norm, a cluster, no piece divides": (
        "layer_norm", rows("bfloat16", 5, 4104, ("weight", "bias"), residual=(5, 4104)), {}),
    "cross_entropy": ("cross_entropy", losses(), {}),
    "cross_entropy, all parameters": (
        "cross_entropy",
        losses("float16", 2, 5001),
        {"label_smoothing": 0.1, "logits_soft_cap": 5.0, "invalid": "drop"},
    ),
    "cross_entropy, few loads": ("cross_entropy", losses("float32", 2, 1024), {"label_smoothing": 0.1, "invalid": "clip"}),
    "rope, neither positions nor heads divide": ("rope", turned(), {}),
    "rope, a part of the head, tables of each example": ("rope", turned("float16", t=70, n=3, h=80, r=32, tables=2, of="float16"), {}),
    "rope, neighbours": ("rope", turned("float32", t=19, n=2), {"interleaved": True, "out_dtype": "bfloat16"}),
    "rope, neighbours, a part of the head": ("rope", turned(t=130, n=3, h=40, r=16), {"interleaved": True}),
    "rope, as many positions as a tile": ("rope", turned("float16", b=1, t=128, n=1, h=16), {}),
}
LARGE = {
    f"{name} {width} {dtype}": (name, rows(dtype, 300, width, names, **({"residual": (300, width)} if width != 4096 else {})), {})
    for name, names, width, dtype in (
        ("layer_norm", ("weight", "bias"), 4096, "bfloat16"),
        ("layer_norm", ("weight",), 2880, "bfloat16"),
        ("rms_norm", ("weight",), 8192, "bfloat16"),
        ("rms_norm", (), 5120, "float32"),
        ("layer_norm", ("weight", "bias"), 16384, "bfloat16"),
        ("layer_norm", ("weight", "bias"), 65536, "bfloat16"),
        ("rms_norm", ("weight",), 20000, "float32"),
    )
} | {f"cross_entropy {n}": ("cross_entropy", losses("bfloat16", 8192, n), {}) for n in (128256, 50257)} | {
    f"rope {h}, {r} turn, {dtype}, interleaved {interleaved}": ("rope", turned(dtype, 4, 4096, n, h, r), {"interleaved": interleaved})
    for dtype, n, h, r, interleaved in (
        ("bfloat16", 32, 128, 128, False),
        ("bfloat16", 32, 128, 128, True),
        ("float32", 5, 96, 96, False),
        ("float16", 28, 80, 32, False),
        ("bfloat16", 16, 256, 64, True),
        ("float32", 1, 64, 64, True),
    )
}


@pytest.fixture
def interpreted(monkeypatch):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels import rows as rows_of
    from pallas_kernels.rope import gpu

    def quarter(z, held):
        """What Mosaic does in registers, which are not interpreted: the same elements of every vector."""
        both = jnp.concatenate([z.reshape(-1, held.vector), -z.reshape(-1, held.vector)], 1)
        return jnp.stack([both[:, i] for i in gpu.neighbours(held.vector)], 1).reshape(z.shape)

    slots, barriers = {}, {}

    def add(share, warpgroups, own):
        """What a block reads of its peers' memory, which the interpreter does not have: blocks of a cluster are its threads."""
        barrier = barriers.setdefault(int(warpgroups), threading.Barrier(int(warpgroups), timeout=60))
        slots[int(share)] = own
        barrier.wait()
        total = np.float32(sum(slots.values()))
        barrier.wait()
        return total

    def over_cluster(half, own, held, boxes):
        return jax.experimental.io_callback(add, jax.ShapeDtypeStruct((), own.dtype), held.share(), held.shares * held.warpgroups, own)

    monkeypatch.setattr(gpu, "_quarter", quarter)
    monkeypatch.setattr(rows_of, "over_cluster", over_cluster)
    monkeypatch.setattr(rows_of, "meet", lambda: None)
    jax.clear_caches()
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield
    jax.clear_caches()


@needs_mosaic
@pytest.mark.parametrize(
    "case",
    rest_slow(CASES, "layer_norm, no piece divides, residual", "rms_norm", "rms_norm, a cluster", "cross_entropy, all parameters",
              "rope, neither positions nor heads divide", "rope, neighbours, a part of the head"),
)  # fmt: skip
def test_agrees_with_float64(case, interpreted, monkeypatch):
    import pallas_kernels.norm_rows

    monkeypatch.setattr(pallas_kernels.norm_rows, "BACKWARD_BLOCKS", 2)  # several rows each
    monkeypatch.setattr(pallas_kernels.norm_rows, "COLUMN_BLOCKS", 4)
    if "two warpgroups" in case:
        monkeypatch.setattr(pallas_kernels.norm_rows, "FORWARD", 1024)
        monkeypatch.setattr(pallas_kernels.norm_rows, "BACKWARD", 1024)
    if "cluster" in case:
        for constant, value in {"FORWARD": 1024, "BACKWARD": 512, "WIDEST": 1024, "SHARED": 1024, "CLUSTERED_BLOCKS": 8}.items():
            monkeypatch.setattr(pallas_kernels.norm_rows, constant, value)
    if "two kernels" in case:
        monkeypatch.setattr(pallas_kernels.norm_rows, "ONE_PASS", 1024)
    name, specs, params = CASES[case]
    certify(name, specs, params, fn=kpt.registry.load(f"{name}.pallas_gpu"), seeds=(0,))


def rotations(seed):
    """Cases of the shared table that the kernel takes."""
    drawn = (DRAWN["rope"](np.random.default_rng([seed, i])) for i in range(1000))
    kernels = {False: "rope.pallas_gpu", True: "rope.pallas_gpu_interleaved"}
    return (case for case in drawn if refused(kernels[case.params["interleaved"]], case.specs, case.params, H100) is None)


@needs_mosaic
@pytest.mark.parametrize("seed", range(3))
def test_random_rotations(seed, interpreted):
    case = next(rotations(seed))
    with mock.patch.dict(fuzz.KINDS, {kind: (1, *how[1:]) for kind, how in fuzz.KINDS.items()}):
        assert list(fuzz.check(kpt.registry.get("rope.pallas_gpu"), case, seed)) == []


def spread(x_axes, table_axes):
    return lambda f: jax.shard_map(f, mesh=mesh_of_one(), in_specs=(x_axes, table_axes, table_axes), out_specs=x_axes)


@needs_mosaic
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: lambda x, cos, sin: jax.vmap(f, (0, None, None))(x[:, None], cos, sin)[:, 0],
        spread(P("data"), P()),
        spread(P(None, "data"), P(None, "data")),
        spread(P(None, None, "data"), P()),
    ],
    ids=["vmap", "batch", "positions", "heads"],
)
def test_a_transformed_rotation_agrees_with_float64(transform, interpreted):
    fn = transform(lambda x, cos, sin: kpt.registry.load("rope.pallas_gpu")(x=x, cos=cos, sin=sin))
    certify("rope", turned("float32", t=35, n=2, h=64), {}, fn=lambda x, cos, sin: fn(x, cos, sin), seeds=(0,))


def queries_and_keys(dtype="bfloat16", b=2, t=35, n=5, k=2, h=64, r=64):
    return specs_of(dtype, x=(b, t, n, h), other=(b, t, k, h), **dict.fromkeys(("cos", "sin"), ((1, t, r), "float32")))


def pair_and_two_calls(specs, params):
    """Results and gradients of rope of two arrays by one launch, and by two."""
    fn, rng = kpt.registry.load("rope.pallas_gpu"), np.random.default_rng(0)
    arrays = {n: rng.standard_normal(s.shape).astype(s.dtype) for n, s in specs.items()}
    g, h = (rng.standard_normal(specs[n].shape) for n in ("x", "other"))

    def two(x, other, **tables):
        return fn(x=x, **tables, **params), fn(x=other, **tables, **params)

    def both(turn):
        out, pull = jax.vjp(lambda arrays: turn(**arrays), arrays)
        return out, pull((g.astype(out[0].dtype), h.astype(out[1].dtype)))

    return [jax.jit(functools.partial(both, turn))() for turn in (functools.partial(fn.pair, **params), two)]


@needs_mosaic
@pytest.mark.parametrize("params", [{}, {"interleaved": True, "out_dtype": "float32"}], ids=str)
def test_two_arrays_by_one_launch_have_the_bits_of_two(params, interpreted):
    pair, two = pair_and_two_calls(queries_and_keys(), params)
    jax.tree.map(np.testing.assert_array_equal, pair, two)
    assert float(jnp.abs(pair[0][1].astype(jnp.float32)).max()) > 0.1


def both_passes_of_a_pair(x, other, cos, sin):
    out, pull = jax.vjp(lambda x, other: kpt.registry.load("rope.pallas_gpu").pair(x=x, other=other, cos=cos, sin=sin), x, other)
    return out, pull(out)


@needs_mosaic
@pytest.mark.parametrize(("n", "k"), [(32, 8), (32, 1), (3, 3)])
def test_two_arrays_are_one_launch_in_either_pass(n, k):
    arrays = (jax.ShapeDtypeStruct(s.shape, s.dtype) for s in queries_and_keys(t=4096, n=n, k=k, h=128, r=128).values())
    text = jax.jit(both_passes_of_a_pair).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 2


@needs_mosaic
@pytest.mark.parametrize(
    ("over", "mapped", "launches"),
    [
        ([(0, 0, None, None)], (0, 0), 2),
        ([(None, 0, None, None)], (None, 0), 4),
        ([(0, None, None, None), (0, 0, None, None)], (0, None), 4),
        ([(0, 0, None, None), (None, 0, None, None)], (0, 0), 4),
        ([(None, 0, 0, None)], (0, 0), 3),
        ([(None, None, 0, 0)], (0, 0), 2),
    ],
)
def test_vmap_maps_of_two_arrays_what_it_is_asked_to(over, mapped, launches):
    """Levels from the outermost to the innermost; `mapped` is the outermost's."""
    step, lead = both_passes_of_a_pair, [(3,) * sum(level[i] is not None for level in over) for i in range(4)]
    for level in reversed(over):
        out = tuple(0 if a is not None or any(t is not None for t in level[2:]) else None for a in level[:2])
        step = jax.vmap(step, level, (out, out))
    assert out == mapped
    arrays = [jax.ShapeDtypeStruct(more + s.shape, s.dtype) for more, s in zip(lead, queries_and_keys(t=64).values(), strict=True)]
    made = jax.eval_shape(step, *arrays)
    if len(over) == 1:
        assert [a.ndim for a in jax.tree.leaves(made)] == [4 + (a is not None) for a in (*mapped, *mapped)]
    assert jax.jit(step).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == launches


@needs_mosaic
def test_two_arrays_that_vmap_maps_apart_agree(interpreted):
    pair, x = kpt.registry.load("rope.pallas_gpu").pair, {n: np.zeros(s.shape, s.dtype) for n, s in queries_and_keys(b=1).items()}
    rng = np.random.default_rng(0)
    x = {n: rng.standard_normal(a.shape).astype(a.dtype) for n, a in x.items()}
    others = np.stack([x["other"], 2 * x["other"]])
    y, z = jax.vmap(lambda other: pair(**x | {"other": other}), out_axes=(None, 0))(others)
    want = pair(**x)
    np.testing.assert_array_equal(y, want[0])
    np.testing.assert_array_equal(z[0], want[1])
    np.testing.assert_allclose(z[1].astype(np.float32), 2 * want[1].astype(np.float32))


@needs_mosaic
def test_a_rotation_keeps_the_tables_alone_where_they_are_constants():
    fn, specs = kpt.registry.load("rope.pallas_gpu"), turned()

    def kept(x, cos, sin):
        return jax.tree.leaves(jax.vjp(lambda x: fn(x=2 * x, cos=cos, sin=sin), x)[1])

    found = jax.eval_shape(kept, *(jax.ShapeDtypeStruct(s.shape, s.dtype) for s in specs.values()))
    assert {a.shape for a in found if a.ndim} == {specs["cos"].shape}


@needs_mosaic
@pytest.mark.parametrize("case", LARGE)
def test_lowers_for_cuda_in_both_passes(case):
    name, specs, params = LARGE[case]
    fn = kpt.registry.load(f"{name}.pallas_gpu")
    arrays, outputs = ({n: jax.ShapeDtypeStruct(s.shape, s.dtype) for n, s in d.items()}
                       for d in (specs, dict(enumerate(op(name).infer(specs, **params)))))  # fmt: skip

    def step(arrays, cotangents):
        fixed = {n: a for n, a in arrays.items() if n == "labels"}
        out, pull = jax.vjp(lambda d: fn(**d, **fixed, **params), {n: a for n, a in arrays.items() if n != "labels"})
        return out, pull(cotangents if isinstance(out, tuple) else cotangents[0])

    text = jax.jit(step).trace(arrays, tuple(outputs.values())).lower(lowering_platforms=("cuda",)).as_text()
    kernels = 1 if name == "cross_entropy" else 3 if specs["x"].shape[-1] == 16384 else 2
    assert text.count("@mosaic_gpu_v2") == kernels


@needs_mosaic
@pytest.mark.parametrize("transform", ["shard_map", "vmap"])
@pytest.mark.parametrize("case", ["layer_norm", "rms_norm 20000 float32", "cross_entropy", "rope, neighbours"])
def test_lowers_under_transformations(case, transform):
    name, specs, params = (CASES | LARGE)[case]
    fn, first = kpt.registry.load(f"{name}.pallas_gpu"), op(name).arrays[0]
    shared = tuple(n for n in ("weight", "bias", "cos", "sin") if n in specs)

    def gradients(arrays):
        moving = {n: a for n, a in arrays.items() if n != "labels"}
        return jax.grad(lambda d: sum(a.astype("float32").sum() for a in jax.tree.leaves(fn(**arrays | d, **params))))(moving)

    lead = (2,) if transform == "vmap" else ()
    arrays = {n: jax.ShapeDtypeStruct(s.shape if n in shared else (*lead, *s.shape), s.dtype) for n, s in specs.items()}
    if transform == "vmap":
        f = jax.vmap(gradients, ({n: None if n in shared else 0 for n in specs},))
    else:
        places = {n: P() if n in shared else P("data") for n in specs}
        grads = {n: p for n, p in places.items() if n != "labels"}
        f = jax.shard_map(gradients, mesh=mesh_of_one(), in_specs=(places,), out_specs=grads)
    lowered = jax.jit(f).trace(arrays).lower(lowering_platforms=("cuda",))
    assert "@mosaic_gpu_v2" in lowered.as_text()
    assert lowered.out_info[first].shape == arrays[first].shape


def attended(dtype="bfloat16", t=256, s=256, h=64, hv=None, **more):
    return specs_of(dtype, q=(2, t, 4, h), k=(2, s, 2, h), v=(2, s, 2, hv or h), **more)


KV_LENGTHS = {"kv_lengths": ((2,), "int32")}
ACCEPTED = [
    ("attention.cudnn", attended(), {"mask": CAUSAL}, A100),
    ("attention.cudnn", attended("float16", t=2, s=334, h=8), {"scale": 0.5, "out_dtype": "bfloat16"}, H100),
    ("attention.cudnn", attended(), {"mask": Mask((Causal(), Window(50, None)))}, H100),
    ("attention.cudnn", attended(**KV_LENGTHS), {"mask": Mask((Causal(), Lengths()), -1e9)}, H100),
    ("attention.cudnn_wide", attended(h=256), {"mask": CAUSAL}, H100),
]
REFUSED = [
    ("attention.cudnn", attended(), {}, hardware_profile("cpu"), "runs on cuda"),
    ("attention.cudnn", attended(), {}, hardware_profile("t4"), "is built for sm80"),
    ("attention.cudnn_wide", attended(h=256), {}, A100, "is built for sm90"),
    ("attention.cudnn", attended("float32"), {}, H100, "computes in bfloat16, float16"),
    ("attention.cudnn", attended(h=256), {}, H100, "head dims of 8 to 128"),
    ("attention.cudnn_wide", attended(h=128), {}, H100, "head dims of 136 to 256"),
    ("attention.cudnn", attended(h=20), {}, H100, "8 divides"),
    ("attention.cudnn", attended(hv=128), {}, H100, "head dim of q"),
    ("attention.cudnn", attended(t=255), {}, H100, "even numbers"),
    ("attention.cudnn", attended(s=512), {"mask": Mask((Causal(256),))}, H100, "first position"),
    ("attention.cudnn", attended(), {"mask": Mask((Window(8, 8),))}, H100, "under causality"),
    ("attention.cudnn", attended(), {"mask": Mask((Window(None, 8),))}, H100, "bounded on the left"),
    ("attention.cudnn", attended(**KV_LENGTHS), {"mask": Mask((Lengths(),))}, H100, "NaN"),
    ("attention.cudnn", attended(**KV_LENGTHS), {"mask": Mask((Causal(), Window(9, 0), Lengths()), -1e9)}, H100, "past the length"),
    ("attention.cudnn", attended(), {"mask": Mask((Segments(),))}, H100, "segments masks"),
    ("attention.cudnn", attended(), {"mask": Mask((Bias(),))}, H100, "bias masks"),
    ("attention.cudnn", attended(), {"mask": Mask((Explicit(),))}, H100, "explicit masks"),
    ("attention.cudnn", attended(), {"mask": Mask((Causal(),), -1e9, True)}, H100, "adds to them"),
    ("attention.cudnn", attended(), {"logits_soft_cap": 30.0}, H100, "logits_soft_cap"),
    ("attention.cudnn", attended(), {"out_dtype": "float32"}, H100, "rounds its output"),
    ("rms_norm.pallas_gpu", rows(width=256), {}, H100, "too few"),
    ("rms_norm.pallas_gpu", rows(width=20000), {}, H100, "slower than XLA on rows wider than 16384"),
    ("rms_norm.pallas_gpu", rows(n=0), {}, H100, "empty"),
    ("rms_norm.pallas_gpu", rows("float64"), {}, H100, "computes in"),
    ("layer_norm.pallas_gpu", rows(residual=((3, 1024), "float32")), {}, H100, "one dtype"),
    ("layer_norm.pallas_gpu", rows(), {}, A100, "is built for sm90"),
    ("rms_norm.pallas_gpu_wide", rows(width=16384), {}, H100, "rows of 16385 to 65536 elements"),
    ("rms_norm.pallas_gpu_wide", rows(width=65544), {}, H100, "rows of 16385 to 65536 elements"),
    ("layer_norm.pallas_gpu_wide", rows(width=50257), {}, H100, "do not begin there"),
    ("layer_norm.pallas_gpu_wide", rows(n=0, width=20000), {}, H100, "empty"),
    ("cross_entropy.pallas_gpu", losses(classes=1000), {}, H100, "too few"),
    ("rope.pallas_gpu", turned(), {}, A100, "is built for sm90"),
    ("rope.pallas_gpu", turned(t=0), {}, H100, "empty"),
    ("rope.pallas_gpu", turned(of="float64"), {}, H100, "float64"),
    ("rope.pallas_gpu", turned(t=1), {}, H100, "turns 16 positions at a time, and these are 1; XLA fuses"),
    ("rope.pallas_gpu", turned(h=40), {}, H100, "has no tile for heads of 40 with halves of 20 elements"),
    ("rope.pallas_gpu", turned(h=104), {}, H100, "has no tile for heads of 104 with halves of 52"),
    ("rope.pallas_gpu", turned(h=512), {}, H100, "has no tile for heads of 512"),
    ("rope.pallas_gpu", turned(), {"interleaved": True}, H100, "takes interleaved of False"),
    ("rope.pallas_gpu_interleaved", turned(), {}, H100, "takes interleaved of True, and this is False"),
    ("rope.pallas_gpu_interleaved", turned(h=104), {"interleaved": True}, H100, "heads of 104 with 104 elements that turn"),
]  # fmt: skip


def refused(kernel, specs, params, hardware):
    spec = kpt.registry.get(kernel)
    return refusal(spec, spec.op, hardware, next(iter(specs.values())).dtype, specs, params, "conservative", "jax")


@needs_mosaic
@pytest.mark.parametrize(("kernel", "specs", "params", "hardware"), ACCEPTED)
def test_accepted(kernel, specs, params, hardware):
    assert refused(kernel, specs, params, hardware) is None


@needs_mosaic
@pytest.mark.parametrize(("kernel", "specs", "params", "hardware", "why"), REFUSED)
def test_refused(kernel, specs, params, hardware, why):
    assert why in refused(kernel, specs, params, hardware)


@needs_mosaic
@pytest.mark.parametrize(
    ("kernel", "specs"),
    [
        ("layer_norm.pallas_gpu", rows(n=64, width=4096)),
        ("cross_entropy.pallas_gpu", losses(n=64, classes=4096)),
        ("rope.pallas_gpu", turned()),
    ],
)
def test_refused_where_xla_may_partition(kernel, specs, monkeypatch):
    assert refused(kernel, specs, {}, H100) is None
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert "shard_map" in refused(kernel, specs, {}, H100)


IDS = {f"{n}_segment_ids": Spec((2, 4096), "int32") for n in ("q", "kv")}


@needs_mosaic
@pytest.mark.parametrize(
    ("name", "specs", "params", "hardware", "kernel"),
    [
        ("attention", attended(t=4096, s=4096, h=128), {"mask": CAUSAL}, A100, "attention.cudnn"),
        ("attention", attended(t=4096, s=4096, h=128) | IDS, {"mask": Mask((Segments(),))}, A100, None),
        ("attention", attended("float32", t=200_000, s=200_000), {"mask": CAUSAL}, H100, "attention.xla"),
        ("rms_norm", rows(n=16384, width=4096), {}, H100, "rms_norm.pallas_gpu"),
        ("rms_norm", rows(n=4096, width=65536), {}, H100, None),
        ("layer_norm", rows(n=16384, width=4096), {}, A100, None),
        ("rope", turned(b=4, t=4096, n=32), {}, H100, None),
        ("rope", turned(b=4, t=4096, n=32), {"interleaved": True}, H100, "rope.pallas_gpu_interleaved"),
        ("rope", turned(b=1, t=512, n=8), {"interleaved": True}, H100, "rope.pallas_gpu_interleaved"),
        ("rope", turned(b=1, t=128, n=8, h=64), {"interleaved": True}, H100, None),
        ("cross_entropy", losses(n=8192, classes=128256), {}, H100, "cross_entropy.pallas_gpu"),
    ],
)
def test_the_planner_takes_it_where_it_wins(name, specs, params, hardware, kernel):
    chosen, reason, _ = choose(name, specs, params, hardware=hardware, level="conservative")
    assert (chosen and chosen.name) == kernel
    assert kernel is not None or f"no kernel is estimated to be faster on {hardware.name}" in reason


@needs_mosaic
@pytest.mark.parametrize(
    ("name", "specs", "kernel"),
    [
        ("rope", turned(t=4096, n=32), "rope.pallas_gpu"),
        ("rms_norm", rows(n=4096, width=65536), "rms_norm.pallas_gpu_wide"),
        ("layer_norm", rows(n=4096, width=20000), "layer_norm.pallas_gpu_wide"),
    ],
)
def test_a_measurement_takes_what_no_estimate_does(name, specs, kernel):
    times = {kernel: 90e-6, "original": 95e-6}
    chosen, why, _ = choose(name, specs, {}, hardware=H100, level="conservative", measurements=times)
    assert chosen.name == kernel and why.startswith("Measured")


@needs_mosaic
def test_the_gradient_of_donated_logits_is_in_their_place():
    def step(logits, labels):
        return jax.value_and_grad(lambda z: kpt.registry.load("cross_entropy.pallas_gpu")(logits=z, labels=labels).mean())(logits)

    given = jax.ShapeDtypeStruct((64, 5003), "bfloat16"), jax.ShapeDtypeStruct((64,), "int32")
    lowered = jax.jit(step, donate_argnums=0).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    assert "@main(%arg0: tensor<64x5003xbf16> {tf.aliasing_output = 1 : i32}" in lowered
