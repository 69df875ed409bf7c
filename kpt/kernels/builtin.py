"""The kernels that come with kpt, as data."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from kpt import ops
from kpt.kernels.spec import KernelSpec
from kpt.ops.base import Cost, Specs
from kpt.ops.mask import Causal, Mask, Window

EVERYWHERE = ("cpu", "cuda", "rocm", "tpu", "xpu")
FLOATS = ("float32", "bfloat16", "float16", "float64")
ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "quick_gelu", "relu2", "softplus",
               "elu", "mish")  # fmt: skip
EVERY_MASK = frozenset({"causal", "window", "segments", "lengths", "explicit", "bias"})
NARROW_FLOATS = ("bfloat16", "float16", "float32")
HALVES = ("bfloat16", "float16")
AMPERE, FROM_HOPPER = ("sm80", "sm86", "sm87", "sm89"), ("sm90", "sm100", "sm103", "sm120")
INVALID_LABELS = ("nan", "zero", "clip", "drop")


def _xla(op: str, level: str = "conservative", version: int = 1, **honours: Any) -> KernelSpec:
    """Plain JAX with a backward of its own: compiled by XLA for whatever XLA compiles for."""
    return KernelSpec(
        name=f"{op}.xla",
        op=op,
        version=version,
        provider="xla",
        framework="jax",
        platforms=EVERYWHERE,
        dtypes=FLOATS,
        level=level,
        requires=("jax>=0.7.2",),
        loader=f"pallas_kernels.{op}.xla:{op}",
        **honours,
    )


def _hopper(
    op: str, dtypes: tuple[str, ...], level: str = "conservative", version: int = 1, jax: str = "0.11.1", **honours: Any
) -> KernelSpec:
    """A Mosaic GPU kernel written for NVIDIA Hopper."""
    return KernelSpec(
        name=f"{op}.pallas_gpu",
        op=op,
        version=version,
        provider="pallas_gpu",
        framework="jax",
        platforms=("cuda",),
        architectures=("sm90",),
        dtypes=dtypes,
        level=level,
        requires=(f"jax>={jax}",),
        loader=f"pallas_kernels.{op}.gpu:{op}",
        accepts=f"pallas_kernels.{op}.gpu:refusal",
        **honours,
    )


def _hopper_wide(op: str) -> KernelSpec:
    """A norm whose rows are shared by the thread blocks of a cluster. Its backward pass loses to plain code: no estimate chooses it."""
    spec = _hopper(op, NARROW_FLOATS, jax="0.11.2", efficiency=0.05)
    return dataclasses.replace(spec, name=f"{op}.pallas_gpu_wide", accepts=f"pallas_kernels.{op}.gpu:refusal_shared")


def _beside_cudnn(specs: Specs, params: Mapping[str, Any]) -> Cost:
    """The op's cost, a tenth more where cuDNN's kernel is faster in both passes, or no more than may be: those are left to a measurement.

    On an H200, with causality and as many queries as keys, both passes were 1.00 to 1.39 times as fast as cuDNN's, and from 14,336 keys on
    that a query may see 0.93 to 0.99 with head dim 128, 1.03 to 1.23 with others (docs/benchmarks/hopper-attention-estimates-h200.json).
    Slower were lengths that 8 does not divide, for which arrays are copied (0.93), and what hides nothing.
    """
    cost, mask = ops.op("attention").cost(specs, **params), params.get("mask") or Mask()
    queries, keys, head = specs["q"].shape[1], specs["k"].shape[1], specs["q"].shape[3]
    windows = [term.left + 1 for term in mask.terms if isinstance(term, Window) and term.left is not None]
    timed = queries == keys and queries >= 128 and queries % 8 == 0 and any(isinstance(term, Causal | Window) for term in mask.terms)
    if not timed or (96 < head <= 128 and min([keys, *windows]) > 12_288):
        return dataclasses.replace(cost, flops=1.1 * cost.flops, bytes=1.1 * cost.bytes)
    return cost


def _hopper_attention(name: str, accepts: str, version: int) -> KernelSpec:
    """Attention with head dims up to 128, or above: two, for they are other kernels."""
    spec = _hopper(
        "attention",
        HALVES,
        version=version,
        jax="0.11.2",
        masks=frozenset({"causal", "window", "segments", "lengths"}),
        arrays=frozenset({"q", "k", "v", "q_segment_ids", "kv_segment_ids", "kv_lengths"}),
        efficiency=0.62,
        cost=_beside_cudnn,
    )
    return dataclasses.replace(spec, name=name, accepts=f"pallas_kernels.attention.gpu:{accepts}")


def _tpu(
    op: str, level: str = "conservative", version: int = 1, dtypes: tuple[str, ...] = ("bfloat16", "float32"), **honours: Any
) -> KernelSpec:
    """A Pallas kernel for TPU, v4 to v7x."""
    return KernelSpec(
        name=f"{op}.pallas_tpu",
        op=op,
        version=version,
        provider="pallas_tpu",
        framework="jax",
        platforms=("tpu",),
        dtypes=dtypes,
        level=level,
        requires=("jax>=0.11.2",),
        loader=f"pallas_kernels.{op}.tpu:{op}",
        accepts=f"pallas_kernels.{op}.tpu:refusal",
        **honours,
    )


def _torch(op: str, provider: str, loader: str, level: str = "conservative", version: int = 1, **honours: Any) -> KernelSpec:
    """PyTorch's own ops, put together: runs wherever PyTorch does."""
    return KernelSpec(
        name=f"{op}.{provider}",
        op=op,
        version=version,
        provider=provider,
        framework="torch",
        platforms=EVERYWHERE,
        dtypes=FLOATS,
        level=level,
        requires=("torch>=2.9",),
        loader=f"kpt_torch.kernels.{loader}",
        **honours,
    )


# A Triton kernel by where it was timed: its name, architectures and dtypes. Turing has no bfloat16.
TRITON = (
    ("triton", ("sm90",), NARROW_FLOATS),
    ("triton_untimed", ("sm80", "sm86", "sm89", "sm100", "gfx90a", "gfx942", "gfx950"), NARROW_FLOATS),
    ("triton_turing", ("sm75",), ("float16", "float32")),
)


def _triton(op: str, efficiency: float, version: int = 1, turing: bool = True, **honours: Any) -> tuple[KernelSpec, ...]:
    """A Triton kernel for GPUs. `efficiency` is the H100's; where it was compiled and never timed, no estimate chooses it."""
    return tuple(
        KernelSpec(
            name=f"{op}.{name}",
            op=op,
            version=version,
            provider="triton",
            framework="torch",
            platforms=tuple(sorted({"rocm" if a.startswith("gfx") else "cuda" for a in architectures})),
            architectures=architectures,
            dtypes=dtypes,
            requires=("triton>=3.5", "torch>=2.9"),
            loader=f"kpt_torch.triton_kernels.{op}:{op}",
            accepts=f"kpt_torch.triton_kernels.{op}:refusal",
            efficiency=efficiency if name == "triton" else 0.05,
            **honours,
        )
        for name, architectures, dtypes in TRITON
        if turing or name != "triton_turing"
    )


# The same kernels in JAX. None was timed there.
JAX_TRITON = (
    ("jax_triton", tuple(a for _, architectures, _ in TRITON[:2] for a in architectures), NARROW_FLOATS),
    ("jax_triton_turing", TRITON[2][1], TRITON[2][2]),
)


def _jax_triton(
    op: str, module: str, version: int = 1, turing: bool = True, accepts: str = "refusal", **honours: Any
) -> tuple[KernelSpec, ...]:
    """A Triton kernel called from JAX through jax-triton, for GPUs that Mosaic does not reach; no estimate chooses it."""
    return tuple(
        KernelSpec(
            name=f"{op}.{name}",
            op=op,
            version=version,
            provider="jax_triton",
            framework="jax",
            platforms=tuple(sorted({"rocm" if a.startswith("gfx") else "cuda" for a in architectures})),
            architectures=architectures,
            dtypes=dtypes,
            requires=("jax-triton>=0.4.1", "triton>=3.7", "jax>=0.11"),
            loader=f"kpt_jax.triton_kernels.{module}:{op}",
            accepts=f"kpt_jax.triton_kernels.{module}:{accepts}",
            efficiency=0.05,
            **honours,
        )
        for name, architectures, dtypes in JAX_TRITON
        if turing or name != "jax_triton_turing"
    )


def _cudnn(name: str, architectures: tuple[str, ...], accepts: str) -> KernelSpec:
    """cuDNN's attention. Head dims above 128 need Hopper, so that there are two."""
    return KernelSpec(
        name=name,
        op="attention",
        version=1,
        provider="cudnn",
        framework="jax",
        platforms=("cuda",),
        architectures=architectures,
        dtypes=("bfloat16", "float16"),
        masks=frozenset({"causal", "window", "lengths"}),
        arrays=frozenset({"q", "k", "v", "kv_lengths"}),
        params={"logits_soft_cap": (None,)},
        requires=("jax>=0.7.2",),
        loader="pallas_kernels.attention.cudnn:attention",
        accepts=f"pallas_kernels.attention.calls:{accepts}",
        efficiency=0.6,
        deterministic=False,
    )


def _sum_outside(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """XLA fuses the sum before a norm by itself: a call that returns two arrays would only stand in its way."""
    return "leaves the sum before the norm to XLA, which fuses it by itself" if "residual" in specs else None


def _with_a_launch(specs: Specs, params: Mapping[str, Any]) -> Cost:
    """The op's cost and a megabyte. Of 0.3 MB plain code took 1.2 µs on an H100, the kernel 1.6; of 2.6 MB 2.3 and 1.8."""
    cost = ops.op("rope").cost(specs, **params)
    return dataclasses.replace(cost, bytes=cost.bytes + 1e6)


KERNELS: tuple[KernelSpec, ...] = (
    # Its blocks suit the caches of a CPU: 18 TFLOP/s on an H100, a third of plain code's.
    _xla("attention", version=2, masks=EVERY_MASK, additive=True, efficiency_on={"cuda": 0.02}),
    # What cuDNN cannot compute, such as documents that are packed together, was 35 times as fast as plain code on an H100, both passes
    # (docs/benchmarks/hopper-attention.json).
    _hopper_attention("attention.pallas_gpu", "refusal", version=4),
    _hopper_attention("attention.pallas_gpu_wide", "refusal_wide", version=3),
    _cudnn("attention.cudnn", (*AMPERE, *FROM_HOPPER), "refused_to_128"),
    _cudnn("attention.cudnn_wide", FROM_HOPPER, "refused_to_256"),
    # On a CPU its forward pass is no faster than plain code's: XLA compiles both to the same. A loss with gradients was 1.14 and 1.32 times
    # as fast where rows do not fit in the caches (docs/benchmarks/README.md), and no faster where they do. This says 1.2 of both.
    _xla("rms_norm", accepts=_sum_outside, efficiency_on={"cpu": 0.4}),
    _xla("layer_norm", version=2, accepts=_sum_outside),
    _hopper("rms_norm", NARROW_FLOATS, efficiency=0.85),
    _hopper("layer_norm", NARROW_FLOATS, efficiency=0.85),
    _hopper_wide("rms_norm"),
    _hopper_wide("layer_norm"),
    # Their backward passes make the products again. On an H100 that is a loss: a Llama-class step went from 33 to 44 ms by glu.xla.
    _xla("linear_act", level="balanced", params={"activation": ACTIVATIONS}, efficiency_on={"cuda": 0.35}),
    _xla("glu", level="balanced", params={"activation": ACTIVATIONS}, efficiency_on={"cuda": 0.35}),
    _xla("rope", params={"interleaved": (False, True)}),
    # On an H100, forward, plain code turns halves at 95% of a copy's speed, rope.xla at 98%, this at 97%: left to a measurement
    # (docs/benchmarks/hopper-rope.json).
    _hopper("rope", NARROW_FLOATS, version=2, jax="0.11.2", params={"interleaved": (False,)}),
    # Neighbours plain code turns at 58%.
    dataclasses.replace(_hopper("rope", NARROW_FLOATS, jax="0.11.2", params={"interleaved": (True,)}, efficiency=0.8),
                        name="rope.pallas_gpu_interleaved", cost=_with_a_launch),
    _xla("cross_entropy", version=3, params={"invalid": INVALID_LABELS}),
    _hopper("cross_entropy", NARROW_FLOATS, params={"invalid": INVALID_LABELS}, efficiency=0.9),
    # Its products are of float32, 204 ms for plain code's 42 on an H100: chosen where the logits would not fit in memory.
    _xla("linear_cross_entropy", version=4, params={"invalid": INVALID_LABELS}, efficiency_on={"cuda": 0.15}),
    # 0.71 of the roofline forward, 0.70 with the backward pass; plain code reaches 0.66 and needs five times the memory.
    _hopper("linear_cross_entropy", HALVES, jax="0.11.2", params={"invalid": INVALID_LABELS}, efficiency=0.7),
    _hopper("linear_act", HALVES, level="balanced", jax="0.11.2", params={"activation": ACTIVATIONS}, efficiency=0.78),
    _hopper("glu", HALVES, level="balanced", version=2, jax="0.11.2", params={"activation": ACTIVATIONS}, efficiency=0.79),
    # As near to the roofline as XLA's product (0.81 and 0.82), which estimates put at 0.5: no faster.
    _hopper("matmul", HALVES, level="balanced", jax="0.11.2", efficiency=0.5),
    _xla("matmul", level="balanced"),
    _xla("ragged_matmul", level="balanced"),
    _tpu(
        "attention",
        masks=frozenset({"causal", "window", "segments", "lengths"}),
        arrays=frozenset({"q", "k", "v", "q_segment_ids", "kv_segment_ids", "kv_lengths"}),
    ),
    _tpu("rms_norm"),
    _tpu("layer_norm", version=2),
    _tpu("rope", params={"interleaved": (False, True)}),
    _tpu("cross_entropy", params={"invalid": INVALID_LABELS}),
    # Its backward pass makes the logits twice again, five products where plain code has three, and their schedules say the same: 0.6 of
    # XLA's products, which estimates put at 0.5. For memory, on request or by measurement.
    _tpu("linear_cross_entropy", params={"invalid": INVALID_LABELS}, efficiency=0.3),
    _tpu("matmul", level="balanced", dtypes=("bfloat16", "float32", "int8")),
    _tpu("ragged_matmul", level="balanced"),
    _tpu("linear_act", level="balanced", params={"activation": ACTIVATIONS}),
    _tpu("glu", level="balanced", params={"activation": ACTIVATIONS}),
    _torch(
        "attention",
        "sdpa",
        "attention:attention",
        version=3,
        masks=EVERY_MASK,
        additive=True,
        params={"logits_soft_cap": (None,)},
        accepts="kpt_torch.kernels.attention:refusal",
        deterministic=False,
    ),
    # On a CPU up to 1.19 times as fast in both passes, and slower where rows fit in the caches. This says 1.23; below 0.4 no estimate would
    # choose it for a sum and its norm.
    _torch("rms_norm", "torch", "rows:rms_norm", efficiency_on={"cpu": 0.41}),
    _torch("layer_norm", "torch", "rows:layer_norm", version=2),
    _torch("rope", "torch", "rows:rope", version=2, params={"interleaved": (False, True)}),
    _torch("cross_entropy", "torch", "rows:cross_entropy", params={"invalid": INVALID_LABELS}),
    _torch("linear_cross_entropy", "torch", "rows:linear_cross_entropy", params={"invalid": INVALID_LABELS}),
    *_triton("rms_norm", 0.8, version=2),
    *_triton("layer_norm", 0.8, version=2),
    *_triton("rope", 0.85, params={"interleaved": (False, True)}),
    *_triton("cross_entropy", 0.9, params={"invalid": INVALID_LABELS}),
    # Triton has no matrix units of Turing: its products there spill. The efficiency is that of both passes; cuDNN's is 1.5 times it.
    *_triton(
        "attention",
        0.32,
        version=3,
        turing=False,
        masks=frozenset({"causal", "window", "segments", "lengths"}),
        arrays=frozenset({"q", "k", "v", "q_segment_ids", "kv_segment_ids", "kv_lengths"}),
    ),
    *_triton("linear_cross_entropy", 0.66, params={"invalid": INVALID_LABELS}),
    *_triton("glu", 0.68, level="balanced", params={"activation": ACTIVATIONS}),
    # Neither has run on a GPU yet: no estimate chooses them over cuBLAS, and where they are measured that counts.
    *_triton("linear_act", 0.05, turing=False, level="balanced", params={"activation": ACTIVATIONS}),
    *_triton("matmul", 0.05, turing=False, level="balanced"),
    *_jax_triton("rms_norm", "norms", version=2),
    *_jax_triton("layer_norm", "norms", version=2),
    *_jax_triton("rope", "rope", params={"interleaved": (False, True)}),
    *_jax_triton("cross_entropy", "cross_entropy", params={"invalid": INVALID_LABELS}),
    *_jax_triton(
        "attention",
        "attention",
        version=2,
        turing=False,
        masks=frozenset({"causal", "window", "segments", "lengths"}),
        arrays=frozenset({"q", "k", "v", "q_segment_ids", "kv_segment_ids", "kv_lengths"}),
    ),
    *_jax_triton("glu", "linear", accepts="refuse_glu", level="balanced", params={"activation": ACTIVATIONS}),
    *_jax_triton(
        "linear_act", "linear", turing=False, accepts="refuse_linear_act", level="balanced", params={"activation": ACTIVATIONS}
    ),
    # The kernel for Hopper above, through `plgpu.as_torch_kernel`. Not timed beside PyTorch's cuDNN as it is: no estimate chooses it.
    KernelSpec(
        name="attention.mosaic",
        op="attention",
        version=4,
        provider="mosaic",
        framework="torch",
        platforms=("cuda",),
        architectures=("sm90",),
        dtypes=HALVES,
        requires=("jax>=0.11.2", "torch>=2.9"),
        loader="kpt_torch.mosaic:attention",
        accepts="kpt_torch.mosaic:refuse_attention",
        efficiency=0.05,
        masks=frozenset({"causal", "window"}),
        arrays=frozenset({"q", "k", "v"}),
    ),
)
