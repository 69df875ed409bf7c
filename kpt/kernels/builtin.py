"""The kernels that come with kpt, as data."""

from collections.abc import Mapping
from typing import Any

from kpt.kernels.spec import KernelSpec
from kpt.ops.base import Specs

EVERYWHERE = ("cpu", "cuda", "rocm", "tpu", "xpu")
FLOATS = ("float32", "bfloat16", "float16", "float64")
ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "quick_gelu", "relu2", "softplus",
               "elu", "mish")  # fmt: skip
EVERY_MASK = frozenset({"causal", "window", "segments", "lengths", "explicit", "bias"})
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


def _sum_outside(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """XLA fuses the sum before a norm by itself: a call that returns two arrays would only stand in its way."""
    return "leaves the sum before the norm to XLA, which fuses it by itself" if "residual" in specs else None


KERNELS: tuple[KernelSpec, ...] = (
    _xla("attention", masks=EVERY_MASK, additive=True),
    _xla("rms_norm", accepts=_sum_outside),
    _xla("layer_norm", accepts=_sum_outside),
    _xla("linear_act", level="balanced", params={"activation": ACTIVATIONS}),
    _xla("glu", level="balanced", params={"activation": ACTIVATIONS}),
    _xla("rope", params={"interleaved": (False, True)}),
    _xla("cross_entropy", version=2, params={"invalid": INVALID_LABELS}),
    _xla("linear_cross_entropy", version=3, params={"invalid": INVALID_LABELS}),
    _xla("matmul", level="balanced"),
    _xla("ragged_matmul", level="balanced"),
)
