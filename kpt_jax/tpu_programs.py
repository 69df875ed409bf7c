"""The programs that `kpt tpu` compiles by itself: every op at its benchmark shapes, by kpt's kernels, by other people's and by XLA."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kpt
from kpt.errors import KptError
from kpt.ops.base import Spec, Specs
from kpt.ops.mask import Causal, Mask, Window
from kpt.tpu import Generation
from kpt_jax.bench_ops import BENCHES, Bench, Call
from kpt_jax.tpu import Program
from pallas_kernels import tuned

OURS, XLA = "kpt", "xla"
PASSES = ("forward", "both")
"""The forward pass, and it with the backward pass."""
DOCUMENTS = 8
MOE = (65536, 2048, 1408, 64)
"""A shape of ragged_matmul beside that of `kpt bench`: 64 experts."""
# What decides a schedule.
_SOURCES = (
    "kpt/tpu/[bs]*.py", "kpt/hardware/*.py", "kpt/ops/*.py", "kpt/kernels/*.py", "kpt/tuning/bucket.py", "kpt_jax/tpu.py",
    "kpt_jax/prefetched.py", "kpt_jax/pallas_calls.py", "kpt_jax/_compat.py", "kpt_jax/tpu_programs.py", "kpt_jax/bench_ops.py",
)  # fmt: skip
_KERNELS = ("pallas_kernels/**/*.py",)
_DEFAULTS = ("pallas_kernels/tuned_tpu.json",)
Make = Callable[..., Call]


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another library's kernel.

    Attributes:
      module: to import.
      make: `make(module, params, **blocks) -> function of the op's arrays`.
      blocks: for each name, the sizes to try; every combination is, and the best one counts.
    """

    module: str
    make: Make
    blocks: Mapping[str, Sequence[Any]]

    def settings(self) -> Iterator[dict[str, Any]]:
        for values in itertools.product(*self.blocks.values()):
            yield dict(zip(self.blocks, values, strict=True))


def cases(names: Sequence[str], every_shape: bool = False) -> list[tuple[str, tuple[int, ...]]]:
    """Benchmarks and shapes, the first one of each or all.

    Args:
      names: benchmarks, or ops, which stand for all their benchmarks; none for everything.

    Raises:
      KptError: no benchmark has that name.
    """
    if unknown := [n for n in names if n not in BENCHES and all(b.op != n for b in BENCHES.values())]:
        raise KptError(f"{unknown[0]!r} was asked for", f"There are {', '.join(BENCHES)}", "Choose among these")
    chosen = [n for n, b in BENCHES.items() if not names or n in names or b.op in names]
    return [(n, dims) for n in chosen for dims in (BENCHES[n].shapes if every_shape else BENCHES[n].shapes[:1])]


def program(
    name: str,
    dims: Sequence[int],
    *,
    dtype: str = "bfloat16",
    passes: str = "both",
    provider: str = OURS,
    blocks: Mapping[str, Any] | None = None,
) -> Program:
    """What `kpt_jax.tpu.compile_programs` takes: one benchmark at one shape by one provider.

    Args:
      blocks: None for what the kernel takes by itself, from the table of tuned blocks or by its rule; an empty one for the rule.

    Raises:
      KptError: the passes are unknown, or the shape is none of that benchmark.
    """
    if passes not in PASSES:
        raise KptError(f"Passes {passes!r} were asked for", f"There are {' and '.join(PASSES)}", "Choose one")
    if len(dims) != len((known := BENCHES[name].dims).split()):
        asked = f"{name} was asked for at {'x'.join(map(str, dims))}"
        raise KptError(asked, f"Its shapes are {known.replace(' ', 'x')}", "Give one number for each, and other ops by themselves")
    if min(dims) < 1:
        raise KptError(f"{name} was asked for at {'x'.join(map(str, dims))}", "Kernels take no empty arrays", "Give positive numbers")
    given = {"name": name, "dims": list(dims), "dtype": dtype, "passes": passes, "provider": provider, "blocks": blocks}
    label = f"{name} {'x'.join(map(str, dims))} {dtype} {passes}" + ("" if provider == OURS else f" by {provider}")
    sources = _SOURCES if provider != OURS else (*_SOURCES, *_KERNELS, *(_DEFAULTS if blocks is None else ()))
    return Program(label, "kpt_jax.tpu_programs:make", given, sources)


def make(
    name: str, dims: Sequence[int], dtype: str, passes: str, provider: str, blocks: Mapping[str, Any] | None
) -> tuple[Any, tuple[Any, ...]]:
    """The function of a program and its arguments."""
    bench = BENCHES[name]
    specs = bench.specs(dtype, *dims)
    fn = _function(bench, provider, blocks)
    arrays = {n: _argument(n, s, specs) for n, s in specs.items()}
    if passes == "forward":
        return lambda arrays: fn(**arrays), (arrays,)
    moving = {n: a for n, a in arrays.items() if n in kpt.ops.op(bench.op).learned and jnp.issubdtype(a.dtype, jnp.floating)}
    still = {n: a for n, a in arrays.items() if n not in moving}

    def both(moving: Any, still: Any, cotangents: Any) -> Any:
        out, pull = jax.vjp(lambda moving: fn(**moving, **still), moving)
        return out, pull(cotangents)[0]

    outputs = jax.eval_shape(lambda arrays: _plain(bench)(**arrays), arrays)
    return both, (moving, still, outputs)


def _argument(name: str, spec: Spec, specs: Specs) -> Any:
    """Integers that decide which blocks count are real, others are a shape."""
    if name.endswith("segment_ids"):
        return np.broadcast_to(np.arange(spec.shape[1], dtype=np.int32) // (spec.shape[1] // DOCUMENTS), spec.shape)
    if name == "group_sizes":
        groups = spec.shape[0]
        return np.full(groups, specs["x"].shape[0] // groups, np.int32)
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype)


def _plain(bench: Bench) -> Call:
    return bench.plain


def _function(bench: Bench, provider: str, blocks: Mapping[str, Any] | None) -> Call:
    if provider == XLA:
        return _plain(bench)
    if provider == OURS:
        kernel = kpt.registry.load(f"{bench.op}.pallas_tpu")
        more = {"blocks": blocks_class(bench.op)(**blocks)} if blocks else {}

        def ours(**arrays: Any) -> Any:
            with contextlib.nullcontext() if blocks is None else tuned.unused():
                return kernel(**arrays, **bench.params, **more)

        return ours
    peer = PEERS[bench.op][provider]
    return peer.make(importlib.import_module(peer.module), bench.params, **(blocks or {}))


def blocks_class(op: str) -> Any:
    """The dataclass of block sizes that an op's TPU kernel takes."""
    return importlib.import_module(f"pallas_kernels.{op}.tpu").Blocks


def installed_peers(name: str) -> dict[str, Peer]:
    """Of a benchmark: those whose package is here."""
    return {n: p for n, p in PEERS.get(BENCHES[name].op, {}).items() if importlib.util.find_spec(p.module.split(".")[0])}


# Other people's kernels, as their documentation calls them -----------------------------------------------------


def _mask(m: Any, mask: Mask, t: int, s: int) -> Any:
    window = next((w.left for w in mask.terms if isinstance(w, Window)), None)
    if window is not None:
        return m.LocalMask((t, s), (window, 0), 0)
    return m.CausalMask((t, s)) if Causal() in mask.terms else m.FullMask((t, s))


def _flash(m: Any, params: Mapping[str, Any], block_q: int, block_k: int) -> Call:
    mask = params["mask"]
    if any(isinstance(t, Window) for t in mask.terms):
        raise KptError("A window was asked of jax's flash attention", "It has none", "Compare with splash attention")
    names = ("block_q_major_dkv", "block_k_major_dkv", "block_k_dkv", "block_q_dkv", "block_k_major_dq", "block_k_dq", "block_q_dq")
    sizes = m.BlockSizes(
        block_q=block_q, block_k_major=block_k, block_k=block_k, block_b=1, **{n: block_q if "_q_" in n else block_k for n in names}
    )

    def attention(q: Any, k: Any, v: Any, q_segment_ids: Any = None, kv_segment_ids: Any = None) -> Any:
        q, k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], 2).swapaxes(1, 2) for a in (q, k, v))
        ids = None if q_segment_ids is None else m.SegmentIds(q_segment_ids, kv_segment_ids)
        out = m.flash_attention(
            q, k, v, segment_ids=ids, causal=Causal() in mask.terms, sm_scale=q.shape[-1] ** -0.5, block_sizes=sizes
        )
        return out.swapaxes(1, 2)

    return attention


def _splash(m: Any, params: Mapping[str, Any], block_q: int, block_kv: int, compute: int, fused: bool) -> Call:
    masks = importlib.import_module(m.__name__.replace("_kernel", "_mask"))
    sizes = m.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_kv_compute=compute, block_q_dkv=block_q, block_kv_dkv=block_kv,
        block_kv_dkv_compute=compute, block_q_dq=None if fused else block_q, block_kv_dq=None if fused else block_kv,
        use_fused_bwd_kernel=fused,
    )  # fmt: skip

    def attention(q: Any, k: Any, v: Any, q_segment_ids: Any = None, kv_segment_ids: Any = None) -> Any:
        (b, t, n, h), (s, kv) = q.shape, k.shape[1:3]
        group = n // kv
        make = m.make_splash_mha if group == 1 else m.make_splash_mqa
        mask = masks.MultiHeadMask([_mask(masks, params["mask"], t, s)] * (n if group == 1 else group))
        call = make(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
        q, k, v = ((a * scale).astype(a.dtype).swapaxes(1, 2) for a, scale in ((q, h**-0.5), (k, 1), (v, 1)))
        if group > 1:
            call = jax.vmap(call, (0, 0, 0, None))
            q = q.reshape(b, kv, group, t, h)
        ids = None if q_segment_ids is None else m.SegmentIds(q_segment_ids, kv_segment_ids)
        out = jax.vmap(call, (0, 0, 0, None if ids is None else 0))(q, k, v, ids)
        return out.reshape(b, n, t, -1).swapaxes(1, 2)

    return attention


def _tokamax_splash(m: Any, params: Mapping[str, Any], block_q: int, block_kv: int, compute: int) -> Call:
    masks = importlib.import_module(m.__name__.replace("_kernel", "_mask"))
    config = m.SplashConfig(
        block_q=block_q, block_kv=block_kv, block_kv_compute=compute, block_q_dkv=block_q, block_kv_dkv=block_kv,
        block_kv_dkv_compute=compute, use_base2_exp=True,
    )  # fmt: skip

    def attention(q: Any, k: Any, v: Any, q_segment_ids: Any = None, kv_segment_ids: Any = None) -> Any:
        (b, t, n, h), (s, kv) = q.shape, k.shape[1:3]
        mask = _mask(masks, params["mask"], t, s)
        call = (m.make_splash_mha if n == kv else m.make_splash_mqa)(mask, config=config, q_seq_shards=1)
        q, k, v = ((a * scale).astype(a.dtype).swapaxes(1, 2) for a, scale in ((q, h**-0.5), (k, 1), (v, 1)))
        if n > kv:
            call = jax.vmap(call, (0, 0, 0, None))
            q = q.reshape(b, kv, n // kv, t, h)
        ids = None if q_segment_ids is None else m.SegmentIds(q_segment_ids, kv_segment_ids)
        out = jax.vmap(call, (0, 0, 0, None if ids is None else 0))(q, k, v, ids)
        return out.reshape(b, n, t, -1).swapaxes(1, 2)

    return attention


def _jax_matmul(m: Any, params: Mapping[str, Any], block_m: int, block_n: int, block_k: int) -> Call:
    return lambda a, b: m.matmul(a, b, block_shape=(block_m, block_n), block_k=block_k, out_dtype=a.dtype)


def _megablox(m: Any, params: Mapping[str, Any], block_m: int, block_k: int, block_n: int) -> Call:
    return lambda x, w, group_sizes: m.gmm(x, w, group_sizes, x.dtype, (block_m, block_k, block_n))


def _tokamax_loss(m: Any, params: Mapping[str, Any]) -> Call:
    def settings(find: Any, x: Any, w: Any) -> dict[str, Any]:
        config = find(*x.shape, w.shape[1], dtype=x.dtype)
        return {n: getattr(config, n) for n in ("b_block_size", "h_block_size", "v_block_size")}

    @jax.custom_vjp
    def loss(x: Any, w: Any, labels: Any) -> Any:
        return forward(x, w, labels)[0]

    def forward(x: Any, w: Any, labels: Any) -> Any:
        sizes = settings(m.get_heuristic_fwd_config, x, w)
        out, lse = m.linear_softmax_cross_entropy_loss_fwd_pallas_mosaic_tpu(x, labels, w, reduction="sum", **sizes)
        return out, (x, w, labels, lse)

    def backward(kept: Any, g: Any) -> Any:
        x, w, labels, lse = kept
        sizes = settings(m.get_heuristic_bwd_config, x, w)
        dx, dw = m.linear_softmax_cross_entropy_loss_bwd_pallas_mosaic_tpu(g, lse, x, labels, w, reduction="sum", **sizes)
        return dx, dw, None

    loss.defvjp(forward, backward)
    # It sums the tokens' losses; ours gives each, which costs nothing beside the products.
    return lambda x, w, labels: jnp.broadcast_to(loss(x, w, labels), labels.shape)


_HEADS = {"block_q": (512, 1024), "block_kv": (1024,), "compute": (512, 1024)}
PEERS: dict[str, dict[str, Peer]] = {
    "attention": {
        "jax flash": Peer(
            "jax.experimental.pallas.ops.tpu.flash_attention", _flash, {"block_q": (512, 1024), "block_k": (512, 1024)}
        ),
        "jax splash": Peer(
            "jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel", _splash, {**_HEADS, "fused": (True,)}
        ),
        "tokamax splash": Peer("tokamax._src.ops.experimental.tpu.splash_attention.splash_attention_kernel", _tokamax_splash, _HEADS),
    },
    "matmul": {
        "jax matmul": Peer(
            "jax.experimental.pallas.ops.tpu.matmul",
            _jax_matmul,
            {"block_m": (512, 1024), "block_n": (1024, 2048), "block_k": (512, 1024)},
        )
    },
    "ragged_matmul": {
        "jax megablox": Peer(
            "jax.experimental.pallas.ops.tpu.megablox.ops",
            _megablox,
            {"block_m": (256, 512), "block_k": (512, 1024, 2048), "block_n": (1024, 1408)},  # 1408: all columns of MOE
        )
    },
    "linear_cross_entropy": {
        "tokamax": Peer("tokamax._src.ops.linear_softmax_cross_entropy_loss.pallas_mosaic_tpu_kernel", _tokamax_loss, {})
    },
}
"""By op, then by name."""


def specs_of(name: str, dims: Sequence[int], dtype: str) -> Specs:
    return BENCHES[name].specs(dtype, *dims)


def default_blocks(name: str, dims: Sequence[int], dtype: str, on: Generation) -> dict[str, int]:
    """What the rules of a benchmark's kernel choose on that generation, by field."""
    bench = BENCHES[name]
    module = importlib.import_module(f"pallas_kernels.{bench.op}.tpu")
    about = jax.sharding.AbstractDevice(device_kind=on.kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=about)):
        return dataclasses.asdict(module.default_blocks(specs_of(name, dims, dtype), bench.params))
