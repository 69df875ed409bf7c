"""The figures of each chip, grouped by the source they come from. Data only; `profiles` turns it into profiles.

Rates are dense, in FLOP/s (integer dtypes: operations/s), one multiply-add counted as two. All figures are per chip,
except caches that `profiles.CACHES` says are per core. A product such as `132 * 4096 * 1.83e9` is cores x FLOP per core
and clock x clock: it shows where a data sheet's rounded figure comes from. bfloat16 and float16 rates accumulate in
float32, which on GeForce cards is half of what their data sheets print first.

A group whose source starts with `UNVERIFIED` was written down from a data sheet that has not been read again since.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
UNVERIFIED = "unverified: "

JAX = "jax/_src/tpu_info.py, per TensorCore there, https://github.com/jax-ml/jax/blob/main/jax/_src/tpu_info.py"
GOOGLE = "Google Cloud TPU documentation, https://cloud.google.com/tpu/docs/"
# jax's default precision multiplies float32 in one bfloat16 pass; Precision.HIGHEST takes six.
ONE_PASS = "derived: float32 at jax's default matmul precision is one bfloat16 pass, https://docs.jax.dev/en/latest/jax.lax.html"
INDUCTOR = "https://github.com/pytorch/pytorch/blob/main/torch/_inductor/analysis/device_info.py"
ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf, times SMs and clock"
BLACKWELL_RTX = "NVIDIA RTX Blackwell GPU architecture white paper, https://www.nvidia.com/, times SMs and clock"
L4 = "NVIDIA L4 data sheet, https://www.nvidia.com/en-us/data-center/l4/ (halved: it prints sparse rates)"
L40S = "NVIDIA L40S data sheet, https://www.nvidia.com/en-us/data-center/l40s/"
FLASH_ATTENTION = "https://github.com/Dao-AILab/flash-attention/blob/main/hopper/benchmark_attn.py"
HGX = "NVIDIA HGX platform page, https://www.nvidia.com/en-us/data-center/hgx/, an eighth of eight GPUs, dense"
ROCM = "AMD GPU specifications, https://rocm.docs.amd.com/en/latest/reference/gpu-specs.html"
CDNA = "CDNA matrix core rates, https://rocm.docs.amd.com/en/latest/conceptual/gpu-arch.html, times CUs and clock"
AMD = "AMD Instinct product pages, https://www.amd.com/en/products/accelerators/instinct.html"
INTEL = "Intel XMX rates, https://www.intel.com/content/www/us/en/products/details/discrete-gpus.html, times clock"
NVIDIA_SHEET = UNVERIFIED + "NVIDIA data sheet, https://www.nvidia.com/en-us/data-center/"
AMD_SHEET = UNVERIFIED + "AMD data sheet, https://www.amd.com/en/products/accelerators/instinct.html"
ASSUMED = "estimate: 8 cores with AVX2 at 3 GHz (2 FMA units of 8 lanes), two channels of DDR4-3200"


def xla(spec: str) -> str:
    """XLA's device description of that name: clocks, units per core, memory and caches as the driver reports them."""
    return f"https://github.com/openxla/xla/blob/main/xla/backends/gpu/target_config/specs/{spec}.txtpb"


class Chip(NamedTuple):
    """One row: `figures` maps a source to what it says, by dtype name, field name, or cache name."""

    name: str
    model: str
    platform: str
    architecture: str
    figures: Mapping[str, Mapping[str, float]]
    devices: int = 1
    remarks: tuple[str, ...] = ()


_HOPPER: dict[str, Any] = {"l2": 50 * MiB, "shared": 228 * KiB, "shared_block": 227 * KiB}
_BLACKWELL: dict[str, Any] = {"shared": 228 * KiB, "shared_block": 227 * KiB}
_ADA: dict[str, Any] = {"shared": 100 * KiB, "shared_block": 99 * KiB}


def _gh100(cores: int, tensor_clock: float, clock: float) -> dict[str, float]:
    """4 tensor cores an SM with 512 bfloat16 multiply-adds a clock each; 128 float32 ones on the vector units."""
    bf16 = cores * 4096 * tensor_clock
    return {"cores": cores, "float32": cores * 256 * clock, "tf32": bf16 / 2, "bfloat16": bf16, "float16": bf16,
            "float8": 2 * bf16, "int8": 2 * bf16}  # fmt: skip


def _a100(spec: str) -> dict[str, Mapping[str, float]]:
    return {
        xla(spec): {"cores": 108, "float32": 108 * 128 * 1.41e9, "l2": 40 * MiB, "shared": 164 * KiB,
                    "shared_block": 163 * KiB},
        INDUCTOR: {"tf32": 156e12, "bfloat16": 312e12, "float16": 312e12, "int8": 624e12},
    }  # fmt: skip


def _with(base: Mapping[str, Mapping[str, float]], *more: tuple[str, Mapping[str, float]]) -> dict[str, Any]:
    merged: dict[str, Any] = {source: dict(figures) for source, figures in base.items()}
    for source, figures in more:
        merged.setdefault(source, {}).update(figures)
    return merged


def _cdna2(cores: int) -> dict[str, float]:
    bf16 = cores * 1024 * 1.7e9
    return {"float32": bf16 / 4, "bfloat16": bf16, "float16": bf16, "int8": bf16}


_MI300: dict[str, float] = {"float32": 304 * 256 * 2.1e9, "tf32": 304 * 1024 * 2.1e9, "bfloat16": 304 * 2048 * 2.1e9,
                            "float16": 304 * 2048 * 2.1e9, "float8": 304 * 4096 * 2.1e9,
                            "int8": 304 * 4096 * 2.1e9}  # fmt: skip
_FNUZ = "float8 is the fnuz flavour (float8_e4m3fnuz, float8_e5m2fnuz)"
_STORAGE = "float8 is stored and converted; the rate is that of bfloat16"


def _xe(cores: int, clock: float, width: int) -> dict[str, float]:
    bf16 = cores * width * clock
    return {"float32": cores * 256 * clock, "bfloat16": bf16, "float16": bf16, "int8": 2 * bf16}


TPUS = (
    Chip("tpu-v4", "TPU v4", "tpu", "tpu-v4", {
        JAX: {"cores": 2, "bfloat16": 275e12, "memory_bytes": 32 * GiB, "memory_bandwidth": 1230e9, "vmem": 16 * MiB,
              "cmem": 128 * MiB, "smem": MiB},
        GOOGLE + "v4": {"int8": 275e12},
        ONE_PASS: {"float32": 275e12},
        "six links, https://jax-ml.github.io/scaling-book/tpus/": {"interconnect": 6 * 90e9},
    }),
    Chip("tpu-v5e", "TPU v5e", "tpu", "tpu-v5e", {
        JAX: {"cores": 1, "int8": 394e12, "int4": 788e12, "vmem": 128 * MiB, "smem": MiB},
        GOOGLE + "v5e": {"bfloat16": 197e12, "memory_bytes": 16 * GiB, "memory_bandwidth": 819e9,
                         "interconnect": 400e9},
        ONE_PASS: {"float32": 197e12},
    }, remarks=("the documentation's newer table prints 800 GiB/s (859 GB/s), which its older 819 GB/s contradicts",)),
    Chip("tpu-v5p", "TPU v5p", "tpu", "tpu-v5p", {
        JAX: {"cores": 2, "int8": 918e12, "int4": 1840e12, "vmem": 64 * MiB, "smem": MiB},
        GOOGLE + "v5p": {"bfloat16": 459e12, "float8": 459e12, "memory_bytes": 95 * GiB, "memory_bandwidth": 2765e9,
                         "interconnect": 1200e9},
        ONE_PASS: {"float32": 459e12},
    }, remarks=("jax's table says 2460 GB/s of memory bandwidth; the documentation 2765 GB/s (2575 GiB/s)", _STORAGE)),
    Chip("tpu-v6e", "TPU v6e (Trillium)", "tpu", "tpu-v6e", {
        JAX: {"cores": 1, "int4": 3680e12, "vmem": 128 * MiB, "smem": MiB},
        GOOGLE + "v6e": {"bfloat16": 918e12, "float8": 918e12, "int8": 1836e12, "memory_bytes": 32 * GiB,
                         "memory_bandwidth": 1638e9, "interconnect": 800e9},
        ONE_PASS: {"float32": 918e12},
    }, remarks=(_STORAGE, "the MXU is 256 wide: pad to 256")),
    Chip("tpu-v7x", "TPU7x (Ironwood)", "tpu", "tpu-v7x", {
        JAX: {"cores": 2, "vmem": 64 * MiB, "smem": MiB},
        GOOGLE + "tpu7x": {"bfloat16": 2307e12, "float8": 4614e12, "memory_bytes": 192 * GiB,
                           "memory_bandwidth": 7380e9, "interconnect": 1200e9},
        ONE_PASS: {"float32": 2307e12},
    }, devices=2, remarks=("each TensorCore is a device of its own, with half of the chip's memory and bandwidth",)),
)  # fmt: skip

NVIDIA = (
    Chip("t4", "NVIDIA T4", "cuda", "sm75", {
        NVIDIA_SHEET + "tesla-t4/": {
            "cores": 40, "float32": 8.1e12, "float16": 65e12, "int8": 130e12, "memory_bytes": 16 * GiB,
            "memory_bandwidth": 320e9, "l2": 4 * MiB, "shared": 64 * KiB, "shared_block": 64 * KiB,
            "interconnect": 32e9},
    }, remarks=("no bfloat16 arithmetic",)),
    Chip("a100-sxm-40gb", "NVIDIA A100 SXM 40 GB", "cuda", "sm80", _with(
        _a100("a100_sxm_40"), (xla("a100_sxm_40"), {"memory_bytes": 42331013120, "memory_bandwidth": 1555.2e9}),
        (NVIDIA_SHEET + "a100/", {"interconnect": 600e9}))),
    Chip("a100-sxm-80gb", "NVIDIA A100 SXM 80 GB", "cuda", "sm80", _with(
        _a100("a100_sxm_80"), (xla("a100_sxm_80"), {"memory_bytes": 85100068864, "memory_bandwidth": 2039.04e9}),
        (NVIDIA_SHEET + "a100/", {"interconnect": 600e9}))),
    Chip("a100-pcie-40gb", "NVIDIA A100 PCIe 40 GB", "cuda", "sm80", _with(
        _a100("a100_sxm_40"), (NVIDIA_SHEET + "a100/", {"memory_bytes": 40 * GiB, "memory_bandwidth": 1555e9,
                                                        "interconnect": 64e9}))),
    Chip("a100-pcie-80gb", "NVIDIA A100 PCIe 80 GB", "cuda", "sm80", _with(
        _a100("a100_pcie_80"), (xla("a100_pcie_80"), {"float32": 108 * 128 * 1.41e9}),
        (NVIDIA_SHEET + "a100/", {"memory_bytes": 80 * GiB, "memory_bandwidth": 1935e9, "interconnect": 64e9}))),
    Chip("l4", "NVIDIA L4", "cuda", "sm89", {
        L4: {"cores": 58, "float32": 30.3e12, "tf32": 60e12, "bfloat16": 121e12, "float16": 121e12, "float8": 242e12,
             "int8": 242e12, "memory_bytes": 24 * GiB, "memory_bandwidth": 300e9, "interconnect": 64e9},
        ADA: {"l2": 48 * MiB, **_ADA},
    }),
    Chip("l40s", "NVIDIA L40S", "cuda", "sm89", {
        L40S: {"cores": 142, "float32": 91.6e12, "tf32": 183e12, "bfloat16": 362e12, "float16": 362e12,
               "float8": 733e12, "int8": 733e12, "memory_bytes": 48 * GiB, "memory_bandwidth": 864e9,
               "interconnect": 64e9},
        ADA: {"l2": 96 * MiB, **_ADA},
    }),
    Chip("rtx-4090", "NVIDIA GeForce RTX 4090", "cuda", "sm89", {
        ADA: {"cores": 128, "float32": 82.6e12, "tf32": 82.6e12, "bfloat16": 165.2e12, "float16": 165.2e12,
              "float8": 330.3e12, "int8": 660.6e12, "memory_bytes": 24 * GiB, "memory_bandwidth": 1008e9,
              "l2": 72 * MiB, "interconnect": 64e9, **_ADA},
    }),
    Chip("rtx-5090", "NVIDIA GeForce RTX 5090", "cuda", "sm120", {
        BLACKWELL_RTX: {"cores": 170, "float32": 104.8e12, "tf32": 104.8e12, "bfloat16": 209.5e12,
                        "float16": 209.5e12, "float8": 419e12, "int8": 838e12, "memory_bytes": 32 * GiB,
                        "memory_bandwidth": 1792e9, "l2": 96 * MiB, "interconnect": 128e9, **_ADA},
    }),
    Chip("h100-sxm", "NVIDIA H100 SXM", "cuda", "sm90", {
        xla("h100_sxm"): {**_gh100(132, 1.8295201e9, 1.98e9), **_HOPPER, "memory_bytes": 84942979072,
                          "memory_bandwidth": 3352.32e9, "interconnect": 18 * 50e9},
    }),
    Chip("h100-pcie", "NVIDIA H100 PCIe", "cuda", "sm90", {
        xla("h100_pcie"): {**_gh100(114, 1.62162e9, 1.755e9), **_HOPPER, "memory_bytes": 84942979072,
                           "memory_bandwidth": 2039.04e9},
        NVIDIA_SHEET + "h100/": {"interconnect": 600e9},
    }),
    Chip("h100-nvl", "NVIDIA H100 NVL", "cuda", "sm90", {
        FLASH_ATTENTION: {"tf32": 418e12, "bfloat16": 835e12, "float16": 835e12, "float8": 1671e12},
        xla("h100_sxm"): {"cores": 132, **_HOPPER},
        NVIDIA_SHEET + "h100/": {"float32": 60e12, "int8": 1671e12, "memory_bytes": 94 * GiB,
                                 "memory_bandwidth": 3938e9, "interconnect": 600e9},
    }, remarks=("the source of the rates takes 3350 GB/s for its memory bandwidth",)),
    Chip("h200", "NVIDIA H200 SXM", "cuda", "sm90", {
        xla("h200"): {**_gh100(132, 1.8295201e9, 1.98e9), **_HOPPER, "memory_bytes": 151397597184,
                      "memory_bandwidth": 4800e9, "interconnect": 18 * 50e9},
    }, remarks=("the source's L2 is the H100's; H200s have been seen to report 60 MiB",)),
    Chip("b200", "NVIDIA B200", "cuda", "sm100", {
        xla("b200"): {"cores": 148, "float32": 148 * 256 * 1.965e9, "memory_bytes": 191514411008,
                      "memory_bandwidth": 7672.32e9, "l2": 132644864, "interconnect": 18 * 100e9, **_BLACKWELL},
        HGX: {"tf32": 1125e12, "bfloat16": 2250e12, "float16": 2250e12, "float8": 4500e12, "int8": 4500e12},
        "https://docs.nvidia.com/cuda/parallel-thread-execution/ (tcgen05)": {"tensor_memory": 256 * KiB},
    }),
    Chip("b300", "NVIDIA B300", "cuda", "sm103", {
        xla("b300"): {"memory_bytes": 297021865984, "memory_bandwidth": 7936e9, "l2": 135528448, **_BLACKWELL},
        HGX: {"tf32": 1125e12, "bfloat16": 2250e12, "float16": 2250e12, "float8": 4500e12, "interconnect": 1800e9},
        UNVERIFIED + "sources say 148 to 160 SMs, https://www.nvidia.com/en-us/data-center/hgx/": {
            "cores": 148, "float32": 148 * 256 * 1.965e9},
        "https://docs.nvidia.com/cuda/parallel-thread-execution/ (tcgen05)": {"tensor_memory": 256 * KiB},
    }, remarks=("int8 is left out: it is reported to be cut, and sources disagree",)),
)  # fmt: skip

AMD_GPUS = (
    Chip("mi210", "AMD Instinct MI210", "rocm", "gfx90a", {
        ROCM: {"cores": 104, "memory_bytes": 64 * GiB, "l2": 8 * MiB, "shared": 64 * KiB},
        CDNA: _cdna2(104),
        xla("mi200"): {"memory_bandwidth": 1638.4e9},
        AMD_SHEET: {"interconnect": 300e9},
    }),
    Chip("mi250x", "AMD Instinct MI250X", "rocm", "gfx90a", {
        ROCM: {"cores": 220, "memory_bytes": 128 * GiB, "l2": 16 * MiB, "shared": 64 * KiB},
        CDNA: _cdna2(220),
        xla("mi200"): {"memory_bandwidth": 2 * 1638.4e9},
        AMD_SHEET: {"interconnect": 800e9},
    }, devices=2, remarks=("each of the two dies is a device of its own, with half of the chip's figures",)),
    Chip("mi300x", "AMD Instinct MI300X", "rocm", "gfx942", {
        ROCM: {"cores": 304, "memory_bytes": 192 * GiB, "l2": 32 * MiB, "l3": 256 * MiB, "shared": 64 * KiB},
        CDNA: _MI300,
        AMD: {"memory_bandwidth": 5300e9},
        AMD_SHEET: {"interconnect": 896e9},
    }, remarks=(_FNUZ,)),
    Chip("mi325x", "AMD Instinct MI325X", "rocm", "gfx942", {
        ROCM: {"cores": 304, "memory_bytes": 256 * GiB, "l2": 32 * MiB, "l3": 256 * MiB, "shared": 64 * KiB},
        CDNA: _MI300,
        AMD: {"memory_bandwidth": 6000e9},
        AMD_SHEET: {"interconnect": 896e9},
    }, remarks=(_FNUZ,)),
    Chip("mi355x", "AMD Instinct MI355X", "rocm", "gfx950", {
        ROCM: {"cores": 256, "memory_bytes": 288 * GiB, "l2": 32 * MiB, "l3": 256 * MiB, "shared": 160 * KiB},
        CDNA: {"float32": 256 * 256 * 2.4e9, "bfloat16": 256 * 4096 * 2.4e9, "float16": 256 * 4096 * 2.4e9,
               "float8": 256 * 8192 * 2.4e9, "int8": 256 * 8192 * 2.4e9},
        AMD: {"memory_bandwidth": 8000e9},
        AMD_SHEET: {"interconnect": 1075e9},
    }, remarks=("float8 is the OCP flavour (float8_e4m3fn, float8_e5m2)",)),
)  # fmt: skip

INTEL_GPUS = (
    Chip("max-1550", "Intel Data Center GPU Max 1550", "xpu", "pvc", {
        INTEL: {"cores": 128, **_xe(128, 1.6e9, 4096), "tf32": 128 * 2048 * 1.6e9, "memory_bytes": 128 * GiB,
                "memory_bandwidth": 3276.8e9, "l2": 408 * MiB, "shared": 128 * KiB},
    }, devices=2, remarks=("each of the two stacks is a device of its own (ZE_FLAT_DEVICE_HIERARCHY=FLAT)",
                           "the bandwidth of its 16 Xe Link ports is not known here")),
    Chip("max-1100", "Intel Data Center GPU Max 1100", "xpu", "pvc", {
        xla("pvc"): {"cores": 56, "memory_bytes": 48946688000, "memory_bandwidth": 1228.8e9, "shared": 128 * KiB},
        INTEL: {**_xe(56, 1.55e9, 4096), "tf32": 56 * 2048 * 1.55e9},
        UNVERIFIED + "Intel's product page says 108 MB, " + xla("pvc"): {"l2": 192 * MiB},
    }),
    Chip("arc-b580", "Intel Arc B580", "xpu", "bmg", {
        xla("bmg_g21"): {"cores": 20, "memory_bytes": 12168933376, "memory_bandwidth": 456e9, "l2": 18 * MiB,
                         "shared": 128 * KiB},
        INTEL: {**_xe(20, 2.85e9, 2048), "interconnect": 32e9},
    }),
)  # fmt: skip

CPUS = (
    Chip("cpu", "generic CPU", "cpu", "generic", {
        UNVERIFIED + ASSUMED: {
            "cores": 8, "float64": 8 * 16 * 3e9, "float32": 8 * 32 * 3e9, "bfloat16": 8 * 32 * 3e9,
            "float16": 8 * 32 * 3e9, "memory_bytes": 16 * GiB, "memory_bandwidth": 51.2e9, "l1": 32 * KiB,
            "l2": MiB, "l3": 16 * MiB},
    }, remarks=("a stand-in for a CPU that is not here; detect_hardware() estimates the one that is",)),
)  # fmt: skip

CHIPS: tuple[Chip, ...] = TPUS + NVIDIA + AMD_GPUS + INTEL_GPUS + CPUS
