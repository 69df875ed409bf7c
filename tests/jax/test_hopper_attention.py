"""Attention for Hopper without one: which tiles are visited, lowered for CUDA in both passes, what is refused, and where it is chosen.

The interpreter has neither the barriers of a thread block nor left factors in registers, so that numerics need a GPU:
`test_hopper_attention_gpu.py`.
"""

from __future__ import annotations

import itertools
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import kpt
from kpt.hardware import hardware_profile
from kpt.kernels.spec import refusal, unmet
from kpt.ops import Spec
from kpt.ops.mask import Bias, Causal, Explicit, Lengths, Mask, Segments, Window, visible
from kpt.strategy import choose
from tests.jax.certified import mesh_of_one, rest_slow, specs_of

H100, A100 = hardware_profile("h100-sxm"), hardware_profile("a100-sxm-80gb")
TOO_OLD = unmet("jax>=0.11.2")
pytestmark = pytest.mark.skipif(TOO_OLD is not None, reason=TOO_OLD or "")
CAUSAL, WINDOW = Mask((Causal(),)), Mask((Causal(), Window(200, None)))
DOCUMENTS = Mask((Causal(), Segments()), fill=-1e30)


def attended(dtype="bfloat16", b=2, t=512, s=None, n=4, k=2, h=128, hv=None, mask=Mask(), **more):  # noqa: B008
    s = s or t
    ids = {"q_segment_ids": ((b, t), "int32"), "kv_segment_ids": ((b, s), "int32"), "kv_lengths": ((b,), "int32")}
    ids = {name: spec for name, spec in ids.items() if name in mask.operands}
    return specs_of(dtype, q=(b, t, n, h), k=(b, s, k, h), v=(b, s, k, hv or h), **ids, **more)


POSITIONS = {
    "nothing": Mask(),
    "causal": CAUSAL,
    "causal, keys behind": Mask((Causal(100),)),
    "causal, blind queries": Mask((Causal(-150),)),
    "window under causality": WINDOW,
    "window": Mask((Window(70, 20),)),
    "window open to the left": Mask((Window(None, 33),)),
    "window open to the right": Mask((Window(33, None),)),
    "the query alone": Mask((Window(0, 0),)),
    "window past the end": Mask((Window(10, -5, offset=300),)),
}


def held_to(span, seen, whole_tiles):
    """Every tile with something visible is visited, and what needs no mask hides nothing."""
    assert 0 <= span.first < span.last <= len(seen)
    visited = np.arange(len(seen))
    assert not np.any(seen & ~((visited >= span.first) & (visited < span.last)))
    unmasked = (visited >= span.first) & (visited < span.last) & ~np.asarray(span.needs_mask(visited))
    assert not np.any(unmasked & ~whole_tiles)


def held_to_parts(span, static, whole_tiles):
    """Its loops go through all steps in order, and those without a mask hide nothing."""
    parts = [(range(int(first), int(last)), hides) for first, last, hides in span.parts(static)]
    assert [step for steps, _ in parts for step in steps] == list(range(int(span.first), int(span.last)))
    assert all(whole_tiles[step] for steps, hides in parts if not hides for step in steps)


def tiles_of(see, rows, keys):
    """Of `[T, S]`: which tiles have something visible, and which hide nothing, also of what is past the ends of keys."""
    t, s = see.shape
    padded = np.zeros((-(-t // rows) * rows, -(-s // keys) * keys), bool)
    padded[:t, :s] = see
    padded[t:, :s] = see[-1:]  # queries past the end may be seen or not
    tiles = padded.reshape(-1, rows, padded.shape[1] // keys, keys)
    return tiles.any((1, 3)), tiles.all((1, 3))


@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize("sizes", [(512, 512), (300, 700), (700, 300), (37, 37)])
@pytest.mark.parametrize("tile", [(128, 128), (192, 128), (64, 128), (128, 64), (64, 64)])
def test_spans_hold_what_is_visible(name, sizes, tile):
    from pallas_kernels.attention.calls import Static
    from pallas_kernels.attention.hopper import span_of_keys, span_of_queries

    static = Static(POSITIONS[name], 1.0, None, *sizes)
    see = visible(static.mask, 1, 1, *sizes, {})[0, 0]
    for row in range(0, sizes[0], tile[0]):
        some, _ = tiles_of(see[row : row + tile[0]], tile[0], tile[1])
        whole = [see[row : row + tile[0], k : k + tile[1]].all() and k + tile[1] <= sizes[1] for k in range(0, sizes[1], tile[1])]
        held_to(span_of_keys(static, row, *tile), some[0], np.array(whole))
    for key in range(0, sizes[1], tile[1]):
        keys = see[:, key : key + tile[1]].T
        some, _ = tiles_of(keys, tile[1], tile[0])
        inside = key + tile[1] <= sizes[1]
        whole = [keys[:, q : q + tile[0]].all() and inside for q in range(0, sizes[0], tile[0])]
        span = span_of_queries(static, key, tile[1], tile[0])
        held_to(span, some[0], np.array(whole))
        if static.masks(tile[1]):
            held_to_parts(span, static, np.array(whole))


UNSEEN = Mask((Window(-62, -286),))


@pytest.mark.parametrize("name", [*POSITIONS, "no key at all"])
@pytest.mark.parametrize("sizes", [(512, 512), (300, 700), (700, 300), (37, 37), (647, 800)])
def test_a_warpgroup_takes_what_of_a_tile_its_own_keys_are_seen_by(name, sizes):
    from pallas_kernels.attention.calls import ROWS, Static
    from pallas_kernels.attention.hopper import span_of_queries
    from pallas_kernels.attention.hopper_backward import TILE

    static = Static(POSITIONS.get(name, UNSEEN), 1.0, None, *sizes)
    see = visible(static.mask, 1, 1, *sizes, {})[0, 0]
    for key in range(0, -(-sizes[1] // TILE) * TILE, ROWS):
        of_tile = span_of_queries(static, key // TILE * TILE, TILE, ROWS)
        mine = span_of_queries(static, key, ROWS, ROWS).within(of_tile)
        assert of_tile.first <= mine.first < mine.last <= of_tile.last
        keys = see[:, key : key + ROWS].T
        steps = range(0, sizes[0], ROWS)
        some = np.array([keys[:, q : q + ROWS].any() for q in steps])
        whole = np.array([keys[:, q : q + ROWS].all() and key + ROWS <= sizes[1] for q in steps])
        held_to(mine, some, whole)
        if static.masks(TILE):
            held_to_parts(mine, static, whole)


@pytest.mark.parametrize(("mask", "steps"), [(CAUSAL, [32, 31]), (Mask((Causal(), Window(1023, None))), [17, 17]), (Mask((Window(63, 64),)), [3, 3])])
def test_a_warpgroup_leaves_out_what_only_the_other_needs(mask, steps):
    """Of the steps of 64 queries of the tile of keys 2,048 to 2,175."""
    from pallas_kernels.attention.calls import Static
    from pallas_kernels.attention.hopper import span_of_queries

    static = Static(mask, 1.0, None, 4096, 4096)
    of_tile = span_of_queries(static, 2048, 128, 64)
    spans = [span_of_queries(static, key, 64, 64).within(of_tile) for key in (2048, 2112)]
    assert [int(span.steps) for span in spans] == steps
    assert min(int(s.first) for s in spans) == of_tile.first and max(int(s.last) for s in spans) == of_tile.last


def ids(rng, kind, batch, length):
    many = rng.integers(0, 5, (batch, length))
    return np.sort(many, -1) if kind == "sorted" else many


@pytest.mark.parametrize("mask", [Mask((Segments(),)), DOCUMENTS, Mask((Lengths(),)), Mask((Causal(), Segments(), Lengths()))])
@pytest.mark.parametrize("kind", ["sorted", "mixed"])
@pytest.mark.parametrize("length", [512, 300])
def test_spans_of_data_hold_what_is_visible(mask, kind, length):
    from pallas_kernels.attention.calls import Static
    from pallas_kernels.attention.hopper import Span, numbers_in_tiles, numbers_of, spans_by_data

    rng = np.random.default_rng(0)
    same = ids(rng, kind, 2, length)
    arrays = {"q_segment_ids": same, "kv_segment_ids": same, "kv_lengths": np.array([0, length * 2 // 3])}
    static = Static(mask, 1.0, None, length, length)
    see = visible(mask, 2, 1, length, length, arrays)[:, 0]
    given = {name: jax.numpy.asarray(a) if name in mask.operands else None for name, a in arrays.items()}
    of_length = np.empty((2, length))
    numbers = numbers_in_tiles(numbers_of(static, *given.values(), 2), of_length, of_length, 128, 64)
    for of_keys in (False, True):
        spans = np.asarray(spans_by_data(static, *numbers, 128, 64, of_keys))
        for batch, per_tile in enumerate(spans):
            some, whole = tiles_of(see[batch], 128, 64)
            for i, span in enumerate(per_tile):
                held_to(Span(*span), (some.T if of_keys else some)[i], (whole.T if of_keys else whole)[i])
                if of_keys:
                    held_to_parts(Span(*span), static, whole.T[i])


def test_packed_documents_visit_their_own_tiles_alone():
    from pallas_kernels.attention.calls import Static
    from pallas_kernels.attention.hopper import numbers_in_tiles, numbers_of, spans_by_data

    documents = np.repeat(np.arange(4), 256)[None]
    static = Static(DOCUMENTS, 1.0, None, 1024, 1024)
    numbers = numbers_in_tiles(numbers_of(static, documents, documents, None, 1), documents, documents, 128, 128)
    spans = np.asarray(spans_by_data(static, *numbers, 128, 128, of_keys=False))[0]
    assert spans[:, :2].tolist() == [[2 * (i // 2), i + 1] for i in range(8)]


@pytest.mark.parametrize(("tiles", "outer", "inner", "weight"), [(32, 16, 1, 1), (32, 8, 4, 2**21), (3, 2, 1, 2**30), (128, 16, 4, 2**23)])
def test_a_plan_gives_every_item_to_one_worker(tiles, outer, inner, weight):
    from pallas_kernels.attention.hopper_plan import plan

    costs = np.arange(tiles) + 2
    table, most = plan(tiles, outer, inner, weight, costs)
    items = np.concatenate([row[1 : 1 + row[0]] for row in table])
    assert sorted(items) == list(range(tiles * outer * inner))
    loads = [costs[row[1 : 1 + row[0]] % tiles].sum() for row in table]
    assert max(loads) - min(loads) <= costs.max() and max(loads) == most


@pytest.mark.parametrize("mask", [CAUSAL, WINDOW, Mask()], ids=["causal", "window", "all"])
@pytest.mark.parametrize(("b", "t", "n", "k", "h"), [(1, 4096, 32, 8, 128), (4, 4096, 32, 8, 128), (2, 4096, 16, 1, 128), (8, 1024, 64, 8, 128),
                                                     (1, 131072, 32, 2, 128), (1, 12288, 16, 16, 128), (4, 4096, 16, 16, 128), (2, 4096, 8, 1, 256)])  # fmt: skip
def test_work_on_keys_is_shared_out_evenly(mask, b, t, n, k, h):
    """Of few key heads of many queries one multiprocessor had up to four times its share."""
    from pallas_kernels.attention.calls import ROWS, Static
    from pallas_kernels.attention.hopper import span_of_queries
    from pallas_kernels.attention.hopper_backward import TILE, TILE_COST, steps_of_queries
    from pallas_kernels.attention.hopper_plan import MOST_SUMS, plan_of_keys

    keys, rows = (ROWS, ROWS) if h > 128 else (TILE, steps_of_queries(h, h).queries)
    static = Static(mask, 1.0, None, t, t)
    q, v = (jax.ShapeDtypeStruct((b, t, heads, h), "bfloat16") for heads in (n, k))
    parts, table = plan_of_keys(static, q, v, None, keys, rows, TILE_COST)
    tiles, heads = t // keys, n // k // parts
    items = [row[1 : 1 + row[0]] for row in table]
    assert sorted(np.concatenate(items)) == list(range(b * k * parts * tiles))
    steps = np.broadcast_to(span_of_queries(static, np.arange(tiles) * keys, keys, rows).steps, tiles)
    loads = np.array([np.sum(heads * steps[mine % tiles] + TILE_COST) for mine in items])
    assert loads.max() <= 1.08 * loads.sum() / 132
    assert parts == 1 or parts * k * b * t * 2 * h * 4 <= MOST_SUMS


def test_data_says_what_is_work_and_so_parts_are_for_idle_multiprocessors_alone():
    from pallas_kernels.attention.calls import Static
    from pallas_kernels.attention.hopper import numbers_in_tiles
    from pallas_kernels.attention.hopper_plan import plan_of_keys

    def parts(b, t, n, k):
        q, v = (jax.ShapeDtypeStruct((b, t, heads, 128), "bfloat16") for heads in (n, k))
        numbers = numbers_in_tiles((jax.numpy.zeros((b, t), "int32"),) * 2, q, v, 64, 128)
        found, table = plan_of_keys(Static(DOCUMENTS, 1.0, None, t, t), q, v, numbers, 128, 64, 2)
        assert table[:, 0].sum() == found * b * k * t // 128
        return found

    assert [parts(2, 4096, 16, 1), parts(1, 2048, 32, 8), parts(1, 1024, 8, 4)] == [4, 1, 2]


@pytest.mark.parametrize(("n", "k", "parts"), [(16, 1, 4), (4, 4, 1)])
def test_sums_of_parts_are_added_in_float32(n, k, parts):
    from pallas_kernels.attention.gpu import attention

    q, kv = (jax.ShapeDtypeStruct((2, 4096, heads, 128), "bfloat16") for heads in (n, k))

    def grads(q, k, v, g):
        return jax.vjp(lambda q, k, v: attention(q=q, k=k, v=v, mask=CAUSAL), q, k, v)[1](g)

    traced = jax.jit(grads).trace(q, kv, kv, q)
    assert [a.dtype for a in traced.out_info] == ["bfloat16"] * 3
    assert (f"f32[{parts},2,4096,{k},128]" in str(traced.jaxpr)) == (parts > 1)


def test_a_plan_of_data_gives_every_item_to_one_worker():
    from pallas_kernels.attention.hopper_plan import plan_by_data

    rng = np.random.default_rng(0)
    spans = rng.integers(0, 9, (3, 20, 4)).astype(np.int32)
    spans[..., 1] = spans[..., 0] + rng.integers(1, 30, (3, 20))
    table = np.asarray(plan_by_data(jax.numpy.asarray(spans), 5, 20))
    rows = [row[1 : 1 + 5 * row[0]].reshape(-1, 5) for row in table]
    items = np.concatenate(rows)
    assert sorted(items[:, 0]) == list(range(3 * 20 * 5))
    for item, *span in items:
        assert span == spans[item // 20 // 5, item % 20].tolist()
    loads = [(row[:, 2] - row[:, 1]).sum() for row in rows]
    assert max(loads) - min(loads) <= 30


@pytest.mark.parametrize("head", [64, 96, 128, 256])
def test_what_a_thread_block_holds_fits_shared_memory(head):
    from pallas_kernels.attention import hopper_backward_wide
    from pallas_kernels.attention.hopper_backward import steps_of_queries
    from pallas_kernels.attention.hopper_backward_queries import steps_of_keys
    from pallas_kernels.attention.hopper_forward import forward_tiles
    from pallas_kernels.hopper_gemm import SHARED_BYTES

    of_keys = hopper_backward_wide.shared_bytes(head) if head > 128 else steps_of_queries(head, head).shared_bytes(head, head)
    for taken in (forward_tiles(head, head, 4096).shared_bytes(head, head), steps_of_keys(head, head).shared_bytes(head, head), of_keys):
        assert taken <= SHARED_BYTES


MASKS = {
    "full": Mask(),
    "causal": CAUSAL,
    "window": WINDOW,
    "window to both sides": Mask((Window(50, 60),)),
    "segments": DOCUMENTS,
    "lengths": Mask((Lengths(),), fill=-1e30),
    "all": Mask((Causal(), Window(100, None), Segments(), Lengths())),
    "blind queries": Mask((Causal(-5),), fill=-1e30),
}
SHAPES = {
    "128": {},
    "64": {"h": 64, "dtype": "float16"},
    "96": {"h": 96},
    "odd": {"t": 1003, "h": 120, "hv": 80},
    "odd, to 96": {"t": 1003, "h": 96, "hv": 80, "dtype": "float16"},
    "96, multi query, other length": {"t": 300, "s": 1100, "n": 4, "k": 1, "h": 96},
    "multi query, other length": {"t": 300, "s": 1100, "n": 4, "k": 1, "h": 64},
    "short": {"t": 5, "h": 48},
    "many": {"b": 4, "t": 4096, "n": 32, "k": 8},
    "256": {"h": 256},
    "odd, to 256": {"t": 1003, "h": 136, "hv": 208, "dtype": "float16"},
    "256, multi query, other length": {"t": 300, "s": 1100, "n": 4, "k": 1, "h": 256},
    "256, short": {"t": 5, "h": 232},
    "256, many": {"b": 4, "t": 4096, "n": 8, "k": 8, "h": 256},
}
WIDTHS = ("96", "128", "256")
OTHERS = [s for s in SHAPES if s not in WIDTHS]
EACH = ("full", "causal", "segments", "lengths")


def both(mask, **params):
    fn = kpt.registry.load("attention.pallas_gpu")

    def gradients(arrays):
        moving = {n: arrays[n] for n in "qkv"}
        return jax.value_and_grad(lambda d: fn(**arrays | d, mask=mask, **params).astype("float32").sum())(moving)

    return gradients


def lowered(fn, specs):
    return jax.jit(fn).trace({n: jax.ShapeDtypeStruct(s.shape, s.dtype) for n, s in specs.items()}).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    ("mask", "shape"),
    rest_slow(
        [(m, s) for m in MASKS for s in WIDTHS] + [(m, s) for m in EACH for s in OTHERS],
        # Every mask at the width that most have, and every other shape under one mask and the next.
        *((m, "128") for m in MASKS),
        *zip(itertools.cycle(EACH), OTHERS),
    ),
)
def test_lowers_for_cuda_in_both_passes(mask, shape):
    specs = attended(mask=MASKS[mask], **SHAPES[shape])
    assert lowered(both(MASKS[mask]), specs).as_text().count("@mosaic_gpu_v2") == 3


@pytest.mark.parametrize(
    ("h", "hv", "width"), [(40, 64, 64), (72, 24, 96), (96, 96, 96), (64, 96, 96), (96, 104, 128), (128, 128, 128), (96, 136, 256)]
)
def test_head_dims_are_padded_to_the_next_that_kernels_take(h, hv, width):
    text = lowered(lambda arrays: kpt.registry.load("attention.pallas_gpu")(**arrays, mask=CAUSAL), attended(h=h, hv=hv)).as_text()
    (call,) = (line for line in text.splitlines() if "@mosaic_gpu_v2" in line)
    assert set(re.findall(r"tensor<2x512x[24]x(\d+)xbf16>", call)) == {str(width)}


def test_layers_that_are_alike_share_their_kernels():
    fn = kpt.registry.load("attention.pallas_gpu")

    def loss(arrays):
        return fn(**arrays | {"q": fn(**arrays, mask=CAUSAL)}, mask=CAUSAL).astype("float32").sum()

    assert lowered(jax.grad(loss), attended()).as_text().count("@mosaic_gpu_v2") == 3


@pytest.mark.sampled(3)
@pytest.mark.parametrize("params", [{"logits_soft_cap": 30.0}, {"scale": -0.5}, {"scale": 0.0}, {"out_dtype": "float16"}], ids=str)
@pytest.mark.parametrize("shape", WIDTHS)
def test_parameters_lower_for_cuda(params, shape):
    assert lowered(both(CAUSAL, **params), attended(**SHAPES[shape])).as_text().count("@mosaic_gpu_v2") == 3


@pytest.mark.sampled(5)
@pytest.mark.parametrize("transform", ["shard_map", "vmap", "remat", "scan"])
@pytest.mark.parametrize("mask", ["causal", "segments"])
@pytest.mark.parametrize("shape", WIDTHS)
def test_lowers_under_transformations(mask, transform, shape):
    mask = MASKS[mask]
    specs, gradients = attended(mask=mask, **SHAPES[shape]), both(mask)
    if transform in ("vmap", "scan"):
        # Keys and values are shared, as by the samples of one prompt.
        specs = {n: s if n in ("k", "v") else Spec((3, *s.shape), s.dtype) for n, s in specs.items()}
    if transform == "vmap":
        f = jax.vmap(lambda arrays: gradients(arrays)[1], ({n: None if n in ("k", "v") else 0 for n in specs},))
    elif transform == "scan":

        def f(arrays):
            some = {n: a for n, a in arrays.items() if n not in ("k", "v")}
            return jax.lax.scan(lambda _, x: (None, gradients(arrays | x)[1]), None, some)[1]

    elif transform == "remat":
        f = jax.checkpoint(lambda arrays: gradients(arrays)[1])
    else:
        places = {n: P("data") for n in specs}
        f = jax.shard_map(
            lambda arrays: gradients(arrays)[1], mesh=mesh_of_one(), in_specs=(places,), out_specs={n: P("data") for n in "qkv"}
        )
    low = lowered(f, specs)
    assert low.as_text().count("@mosaic_gpu_v2") == 3
    assert low.out_info["q"].shape == specs["q"].shape
    assert low.out_info["k"].shape == ((3,) if transform in ("vmap", "scan") else ()) + specs["k"].shape


REFUSED = [
    (attended(), {}, A100, "is built for sm90"),
    (attended("float32"), {}, H100, "computes in bfloat16, float16"),
    (attended() | {"k": Spec((2, 512, 2, 128), "float16")}, {}, H100, "of one dtype"),
    (attended(t=0, s=8), {}, H100, "no empty arrays"),
    (attended(t=1, s=4096, mask=CAUSAL), {"mask": Mask((Causal(4095),))}, H100, "64 queries at a time, and these are 1"),
    (attended(h=264), {}, H100, "up to 256"),
    (attended(h=128, hv=320), {}, H100, "up to 256"),
    (attended(h=80), {"mask": CAUSAL}, H100, "cuDNN takes 80 as it is"),
    (attended(h=192), {"mask": CAUSAL}, H100, "cuDNN takes 192 as it is"),
    (attended(), {}, H100, "cuDNN is faster where nothing is hidden"),
    (attended(), {"mask": CAUSAL, "out_dtype": "float32"}, H100, "rounds its output"),
    (attended(), {"mask": Mask((Causal(),), fill=-100.0)}, H100, "may have some"),
    (attended(), {"mask": Mask((Causal(),), -1e9, True)}, H100, "adds to them"),
    (attended(), {"mask": Mask((Bias(),))}, H100, "bias masks"),
    (attended(), {"mask": Mask((Explicit(),))}, H100, "explicit masks"),
]  # fmt: skip


def refused(specs, params, hardware):
    wide = max(specs[n].shape[3] for n in "qkv") > 128
    spec = kpt.registry.get("attention.pallas_gpu_wide" if wide else "attention.pallas_gpu")
    return refusal(spec, spec.op, hardware, specs["q"].dtype, specs, params, "conservative", "jax")


@pytest.mark.parametrize(("specs", "params", "hardware", "why"), REFUSED)
def test_refused(specs, params, hardware, why):
    assert why in refused(specs, params, hardware)


@pytest.mark.parametrize(
    ("mask", "h"),
    [(CAUSAL, 128), (WINDOW, 64), (CAUSAL, 96), (DOCUMENTS, 80), (Mask((Window(8, 8),)), 40), (CAUSAL, 256), (DOCUMENTS, 192)],
)
def test_accepted(mask, h):
    assert refused(attended(mask=mask, h=h), {"mask": mask}, H100) is None


@pytest.mark.parametrize(("h", "name"), [(128, "attention.pallas_gpu_wide"), (136, "attention.pallas_gpu")])
def test_narrow_and_wide_heads_are_two_kernels(h, name):
    specs, spec = attended(mask=CAUSAL, h=h), kpt.registry.get(name)
    assert f"this is {h}" in refusal(spec, spec.op, H100, "bfloat16", specs, {"mask": CAUSAL}, "conservative", "jax")


def test_refused_where_xla_may_partition(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert "shard_map" in refused(attended(), {"mask": CAUSAL}, H100)


@pytest.mark.parametrize(
    ("mask", "sizes", "kernel"),
    [
        (CAUSAL, {}, "attention.pallas_gpu"),
        (WINDOW, {}, "attention.pallas_gpu"),
        (CAUSAL, {"h": 96}, "attention.pallas_gpu"),
        (CAUSAL, {"h": 80}, "attention.cudnn"),
        (CAUSAL, {"h": 256}, "attention.pallas_gpu_wide"),
        (CAUSAL, {"h": 192}, "attention.cudnn_wide"),
        (CAUSAL, {"t": 12288}, "attention.pallas_gpu"),
        (CAUSAL, {"t": 16384}, "attention.cudnn"),
        (CAUSAL, {"t": 16384, "h": 64}, "attention.pallas_gpu"),
        (WINDOW, {"t": 32768}, "attention.pallas_gpu"),
        (CAUSAL, {"t": 4090}, "attention.cudnn"),
        (CAUSAL, {"t": 96}, "attention.cudnn"),
        (CAUSAL, {"t": 4096, "s": 8192}, "attention.cudnn"),
        (Mask(), {}, "attention.cudnn"),
        (Mask((Causal(), Lengths()), fill=-1e30), {}, "attention.pallas_gpu"),
        (Mask((Lengths(),), fill=-1e30), {}, "attention.cudnn"),
        (DOCUMENTS, {"h": 256}, "attention.pallas_gpu_wide"),
        (DOCUMENTS, {}, "attention.pallas_gpu"),
        (DOCUMENTS, {"h": 96}, "attention.pallas_gpu"),
        (Mask((Window(64, 64),)), {"h": 64}, "attention.pallas_gpu"),
    ],
)
def test_estimates_take_what_was_faster_in_both_passes(mask, sizes, kernel):
    specs = attended(**{"t": 4096, "mask": mask} | sizes)
    chosen, _, _ = choose("attention", specs, {"mask": mask}, hardware=H100, level="conservative")
    assert (chosen and chosen.name) == kernel


@pytest.mark.parametrize(
    ("h", "name", "other"),
    [(96, "attention.pallas_gpu", "attention.cudnn"), (128, "attention.pallas_gpu", "attention.cudnn"),
     (256, "attention.pallas_gpu_wide", "attention.cudnn_wide")],
)  # fmt: skip
def test_a_measurement_decides_before_any_estimate(h, name, other):
    for fast, slow in ((name, other), (other, name)):
        times = {fast: 0.425e-3, slow: 0.473e-3}
        chosen, why, _ = choose("attention", attended(t=4096, h=h, mask=CAUSAL), {"mask": CAUSAL}, hardware=H100, level="conservative",
                                measurements=times)  # fmt: skip
        assert chosen.name == fast and why.startswith("Measured")
