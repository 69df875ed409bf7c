"""What can be set in torch that changes times or numbers of kernels."""

from __future__ import annotations

import functools
import operator
import warnings
from typing import Any

import torch

from kpt.tuning.settings import Setting, variable


def _backend(path: str, default: Any, **more: Any) -> Setting:
    """An attribute under `torch.backends`."""
    owner, _, attribute = f"backends.{path}".rpartition(".")

    def put(value: Any) -> None:
        setattr(operator.attrgetter(owner)(torch), attribute, value)

    return Setting(path, functools.partial(operator.attrgetter(f"{owner}.{attribute}"), torch), put, default, **more)


def _precision(path: str, **more: Any) -> Setting:
    """How float32 is multiplied: "ieee", "tf32" or "bf16", whichever of torch's two interfaces set it."""
    made = _backend(path, "ieee", **more)
    return Setting(made.name, lambda: {"none": "ieee"}.get(found := made.get(), found), made.set, "ieee", made.counts, made.dtype,
                   made.platforms)  # fmt: skip


def _legacy() -> str:
    """The older of the two interfaces, which refuses to answer where the newer one was used: then that says all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.get_float32_matmul_precision()
        except RuntimeError:
            return "highest"


def _attention(kind: str) -> Setting:
    """Whether scaled_dot_product_attention may take a kernel of that kind."""
    cuda = torch.backends.cuda  # where PyTorch has them, those for the CPU included
    return Setting(f"{kind}_sdp", getattr(cuda, f"{kind}_sdp_enabled"), getattr(cuda, f"enable_{kind}_sdp"), True)


_GPUS = ("cuda", "rocm")
SETTINGS: tuple[Setting, ...] = (
    Setting("num_threads", torch.get_num_threads, torch.set_num_threads, counts=False),
    # The first two set what follows them, which is what counts.
    Setting("float32_matmul_precision", _legacy, torch.set_float32_matmul_precision, "highest", counts=False),
    _precision("fp32_precision", counts=False),
    _precision("cuda.matmul.fp32_precision", dtype="float32", platforms=_GPUS),
    _precision("mkldnn.matmul.fp32_precision", dtype="float32", platforms=("cpu",)),
    _backend("cuda.matmul.allow_fp16_reduced_precision_reduction", True, dtype="float16", platforms=_GPUS),
    _backend("cuda.matmul.allow_bf16_reduced_precision_reduction", True, dtype="bfloat16", platforms=_GPUS),
    _backend("cuda.matmul.allow_fp16_accumulation", False, dtype="float16", platforms=_GPUS),
    # No op of kpt is a convolution.
    _backend("cudnn.allow_tf32", True, counts=False),
    _backend("cudnn.benchmark", False, counts=False),
    _backend("cudnn.deterministic", False, counts=False),
    Setting("deterministic_debug_mode", torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 0),
    *map(_attention, ("flash", "mem_efficient", "math", "cudnn")),
    variable("NVIDIA_TF32_OVERRIDE", dtype="float32", platforms=("cuda",)),
    variable("TORCH_BLAS_PREFER_CUBLASLT", platforms=_GPUS),
)
