"""What can be set in jax that changes times or numbers of kernels."""

from __future__ import annotations

import functools
from typing import Any

import jax

from kpt.tuning.settings import Setting, variable


def _get(name: str) -> Any:
    """In force in this thread, be it by `jax.config`, a context manager or the environment; None where this jax has no such setting."""
    return getattr(jax.config, name, None) if hasattr(jax.config, name) else jax.config.values.get(name)


def _setting(name: str, default: Any, **more: Any) -> Setting:
    return Setting(name, functools.partial(_get, name), functools.partial(jax.config.update, name), default, **more)


def _precision() -> Any:
    return {"default": None, "fastest": None, "bfloat16": None}.get(found := _get("jax_default_matmul_precision"), found)


_PRECISION = "jax_default_matmul_precision"
SETTINGS: tuple[Setting, ...] = (
    # Which devices there are; nothing is slower or faster by that alone.
    _setting("jax_platforms", None, counts=False),
    _setting("jax_cuda_visible_devices", "all", counts=False),
    _setting("jax_rocm_visible_devices", "all", counts=False),
    _setting("jax_num_cpu_devices", -1, counts=False),
    # The dtypes of a call are in its key.
    _setting("jax_enable_x64", False, counts=False),
    Setting(_PRECISION, _precision, functools.partial(jax.config.update, _PRECISION), dtype="float32"),
    _setting("jax_disable_most_optimizations", False),
    _setting("jax_optimization_level", "UNKNOWN"),
    _setting("jax_memory_fitting_level", "O2"),
    _setting("jax_ragged_dot_use_gpu_pallas_triton_lowering", False),
    variable("XLA_FLAGS", ("--xla_dump", "--xla_force_host_platform_device_count")),
    variable("LIBTPU_INIT_ARGS", ("--xla_dump",), platforms=("tpu",)),
    variable("NVIDIA_TF32_OVERRIDE", dtype="float32", platforms=("cuda",)),
)
