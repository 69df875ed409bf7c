"""One probe per kind of accelerator: each returns the profile of the first chip that it finds, or None."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import re
from collections.abc import Mapping
from typing import Any

from kpt.hardware.chips import GiB
from kpt.hardware.host import Host, fields, integer
from kpt.hardware.profiles import PROFILES, HardwareProfile, hardware_profile

# PCI ids: jax/_src/hardware_utils.py for TPUs, the PCI ID Repository (https://pci-ids.ucw.cz/) for AMD and Intel.
_GOOGLE, _AMD, _INTEL = 0x1AE0, 0x1002, 0x8086
_TPU_IDS = {0x005E: "tpu-v4", 0x0062: "tpu-v5p", 0x0063: "tpu-v5e", 0x006F: "tpu-v6e", 0x0076: "tpu-v7x"}
_OTHER_TPUS = {0x0027: "TPU v2 or v3", 0x0056: "TPU (plc)", 0x0083: "TPU8i", 0x007C: "TPU8t"}
_AMD_IDS = {0x7408: "mi250x", 0x740C: "mi250x", 0x740F: "mi210", 0x74A1: "mi300x", 0x74A9: "mi300x", 0x74B5: "mi300x",
            0x74BD: "mi300x", 0x74A5: "mi325x", 0x74B9: "mi325x", 0x75A3: "mi355x", 0x75B3: "mi355x"}  # fmt: skip
_INTEL_IDS = {0x0BD5: "max-1550", 0x0BD6: "max-1550", 0x0BD9: "max-1100", 0x0BDA: "max-1100", 0x0BDB: "max-1100",
              0xE20B: "arc-b580"}  # fmt: skip
# NVML's names. The anchors keep out relatives with other figures: RTX 4090 D and Laptop GPU, H200 NVL, GB200.
_NVIDIA_NAMES = (
    (r"\bT4$", "t4"),
    (r"\bA100-SXM4-40GB$", "a100-sxm-40gb"),
    (r"\bA100-SXM4-80GB$", "a100-sxm-80gb"),
    (r"\bA100-PCIE-40GB$", "a100-pcie-40gb"),
    (r"\bA100(-PCIE-80GB| 80GB PCIe)$", "a100-pcie-80gb"),
    (r"\bL4$", "l4"),
    (r"\bL40S$", "l40s"),
    (r"\bRTX 4090$", "rtx-4090"),
    (r"\bRTX 5090$", "rtx-5090"),
    (r"\bH100 80GB HBM3$", "h100-sxm"),
    (r"\bH100 (PCIe|80GB HBM2e)$", "h100-pcie"),
    (r"\bH100 NVL$", "h100-nvl"),
    (r"\bH200( 141GB HBM3e)?$", "h200"),
    (r"\bB200\b", "b200"),
    (r"\bB300\b", "b300"),
)
_TPU_TYPES = r"(?:tpu)?-?(v4|v5litepod|v5e|v5p|v6e|7x|v7x)(?:-|$)"  # "v5litepod-4", "v6e-8", "tpu7x-8"


def tpu(host: Host) -> HardwareProfile | None:
    """A TPU's PCI id; where sysfs is hidden, its device files together with TPU_ACCELERATOR_TYPE.

    The variable alone proves nothing: it is also set to compile for a TPU that is elsewhere. Nor do device files alone:
    other accelerators have /dev/accel* and /dev/vfio/* too. The metadata server is never asked.
    """
    kind = host.environ.get("TPU_ACCELERATOR_TYPE", "").strip().lower()
    match = re.match(_TPU_TYPES, kind)
    named = hardware_profile(match[1]) if match else None
    for vendor in host.glob("sys/bus/pci/devices/*/vendor"):
        if host.number(vendor) != _GOOGLE:
            continue
        device = host.number(vendor.parent / "device")
        if device in _OTHER_TPUS:
            host.notes.append(f"tpu: a {_OTHER_TPUS[device]} is here, of which there is no profile")
        elif device in _TPU_IDS:
            found = PROFILES[_TPU_IDS[device]]
            if named and named.name != found.name:
                host.notes.append(f"tpu: TPU_ACCELERATOR_TYPE={kind} contradicts the PCI id of a {found.model}")
            return found
    files = [*host.glob("dev/accel[0-9]*"), *host.glob("dev/vfio/[0-9]*")]
    if files and named:
        return named
    if kind:
        why = "names no TPU that has a profile" if files else "is set, but no TPU device is here"
        host.notes.append(f"tpu: TPU_ACCELERATOR_TYPE={kind} {why}")
    return None


def _nvml_handle(nvml: Any, visible: list[str] | None, model: str | None) -> Any:
    """That of the first visible GPU of a model, or of the first where no other one is meant."""

    def handle(name: str) -> Any:
        index = integer(name)
        return nvml.nvmlDeviceGetHandleByUUID(name) if index is None else nvml.nvmlDeviceGetHandleByIndex(index)

    first = handle("0" if visible is None else visible[0])
    if model is None or _is_model(nvml, first, model):
        return first
    # The variable's numbers are CUDA's, which need not be the driver's: all GPUs are looked at.
    for i in range(nvml.nvmlDeviceGetCount()):
        if _is_model(nvml, found := handle(str(i)), model):
            return found
    return first


def _is_model(nvml: Any, handle: Any, model: str) -> bool:
    name = _nvml_name(nvml, handle)
    return model == name or model.startswith(f"{name} MIG ")


def _nvml_name(nvml: Any, handle: Any) -> str:
    name = nvml.nvmlDeviceGetName(handle)
    return (name.decode(errors="replace") if isinstance(name, bytes) else str(name)).strip()


def _ask(host: Host, nvml: Any, question: str, *args: Any) -> Any:
    """The answer to one NVML query, or None: older drivers and virtual GPUs leave some unanswered."""
    try:
        return getattr(nvml, question)(*args)
    except Exception as e:
        host.notes.append(f"cuda: {question} failed: {e or type(e).__name__}")
        return None


def cuda(host: Host, nvml: Any, model: str | None = None) -> HardwareProfile | None:
    """The GPU of that model, or the first that CUDA_VISIBLE_DEVICES leaves visible, as NVML describes it."""
    visible = host.visible("CUDA_VISIBLE_DEVICES")
    if visible == []:
        host.notes.append("cuda: CUDA_VISIBLE_DEVICES hides every GPU")
        return None
    if nvml is None:
        # Starting NVML costs time; without one of these files there is no driver that it could reach.
        if not any((host.root / "dev" / file).exists() for file in ("nvidiactl", "nvidia0", "dxg")):
            return None
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            host.notes.append("cuda: an NVIDIA driver is here; install nvidia-ml-py to have it described in full")
            return _cuda_without_nvml(host)
    nvml.nvmlInit()
    try:
        handle = _nvml_handle(nvml, visible, model)
        name = _nvml_name(nvml, handle)
        capability = _ask(host, nvml, "nvmlDeviceGetCudaComputeCapability", handle)
        memory = _ask(host, nvml, "nvmlDeviceGetMemoryInfo", handle)
        total = int(memory.total) if memory is not None else None
        architecture = f"sm{int(capability[0])}{int(capability[1])}" if capability else "unknown"
        with contextlib.suppress(Exception):  # most GPUs have no MIG, and say so by an error
            if nvml.nvmlDeviceGetMigMode(handle)[0]:
                host.notes.append("cuda: MIG is on; the figures are those of the whole GPU")
        row = _nvidia_row(name)
        if row is None:
            return _unknown(host, "cuda", architecture, name, _cuda_cores(host, nvml, handle, capability), total)
        if capability and row.architecture != architecture:
            host.notes.append(f"cuda: {name} reports {architecture} where {row.architecture} was expected")
        return _with_memory(row, total, "NVML")
    finally:
        nvml.nvmlShutdown()


def _cuda_without_nvml(host: Host) -> HardwareProfile | None:
    for file in host.glob("proc/driver/nvidia/gpus/*/information"):
        name = fields(host.read(file), ":").get("Model", "")
        if name:
            return _nvidia_row(name) or _unknown(host, "cuda", "unknown", name, None, None)
    return _unknown(host, "cuda", "unknown", "unknown NVIDIA GPU", None, None)


def _nvidia_row(name: str) -> HardwareProfile | None:
    return next((PROFILES[row] for pattern, row in _NVIDIA_NAMES if re.search(pattern, name.strip())), None)


def _cuda_cores(host: Host, nvml: Any, handle: Any, capability: Any) -> int | None:
    lanes = _ask(host, nvml, "nvmlDeviceGetNumGpuCores", handle)
    if not lanes or not capability:
        return None
    # CUDA C++ Programming Guide, "Compute Capabilities": float32 lanes of a streaming multiprocessor.
    per_sm = 64 if tuple(capability) in ((6, 0), (7, 0), (7, 2), (7, 5), (8, 0)) else 128
    return int(lanes) // per_sm


def rocm(host: Host) -> HardwareProfile | None:
    """The first GPU in the topology of AMD's kernel driver that HIP programs see."""
    paths = list(host.glob("sys/class/kfd/kfd/topology/nodes/*/properties"))
    nodes = [(fields(host.read(path)), path.parent) for path in paths]
    gpus = [(node, path) for node, path in nodes if (integer(node.get("simd_count", "")) or 0) > 0]
    if not gpus:
        return None
    visible = host.visible("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
    if visible == []:
        host.notes.append("rocm: the environment hides every GPU")
        return None
    index = integer(visible[0]) if visible else 0
    if index is None or not 0 <= index < len(gpus):
        host.notes.append(f"rocm: the visible device {visible} is no index into the topology; its first GPU is taken")
        index = 0
    node, path = gpus[index]
    cores = (integer(node["simd_count"]) or 0) // (integer(node.get("simd_per_cu", "")) or 4)
    version = integer(node.get("gfx_target_version", "")) or 0
    architecture = f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}" if version > 0 else "unknown"
    # Heap types 1 and 2 are the device's own memory: struct kfd_mem_properties, drivers/gpu/drm/amd/amdkfd of Linux.
    banks = [fields(host.read(bank)) for bank in host.glob(f"{path.relative_to(host.root)}/mem_banks/*/properties")]
    memory = sum(integer(bank.get("size_in_bytes", "")) or 0 for bank in banks if bank.get("heap_type") in ("1", "2"))
    if not memory:
        host.notes.append("rocm: the topology gives no memory size")
    row = _amd_row(node, architecture, cores, memory)
    if row is not None:
        whole = (row.cores or 0) // row.devices
        if cores == whole:
            return _with_memory(row, memory * row.devices, "the KFD topology")
        host.notes.append(f"rocm: this partition has {cores} of {whole} compute units; figures are of the whole chip")
        return row
    if memory < 4 * GiB:  # a processor's own graphics take less than this for themselves
        host.notes.append(f"rocm: an {architecture} GPU with {cores} compute units looks integrated and is passed over")
        return None
    return _unknown(host, "rocm", architecture, f"AMD {architecture}", cores, memory)


def _amd_row(node: Mapping[str, str], architecture: str, cus: int, memory: int) -> HardwareProfile | None:
    device = integer(node.get("device_id", ""))
    if integer(node.get("vendor_id", "")) == _AMD and device in _AMD_IDS:
        return PROFILES[_AMD_IDS[device]]
    clock = integer(node.get("max_engine_clk_fcompute", "")) or 0
    match architecture, cus:
        case "gfx90a", 110:
            return PROFILES["mi250x"]
        case "gfx942", 304 if memory:
            return PROFILES["mi325x" if memory > 220 * GiB else "mi300x"]
        case "gfx950", 256 if clock >= 2400:  # the MI350X has the same units and memory, and 2200 MHz
            return PROFILES["mi355x"]
    return None


def xpu(host: Host) -> HardwareProfile | None:
    """The first discrete Intel GPU that DRM lists. Level Zero itself is not loaded: that would start its driver."""
    for vendor in host.glob("sys/class/drm/card[0-9]*/device/vendor"):
        if host.number(vendor) != _INTEL:
            continue
        device = host.number(vendor.parent / "device")
        if device in _INTEL_IDS:
            memory = host.number(vendor.parent.parent / "lmem_total_bytes")  # i915; xe has no such file
            return _with_memory(PROFILES[_INTEL_IDS[device]], memory, "DRM lmem_total_bytes")
        slot = fields(host.read(vendor.parent / "uevent"), "=").get("PCI_SLOT_NAME", "")
        if device is not None and slot and not slot.endswith(":00:02.0"):  # where integrated graphics always are
            return _unknown(host, "xpu", "unknown", f"Intel GPU {device:#06x}", None, None)
    return None


def _with_memory(row: HardwareProfile, memory: int | None, source: str) -> HardwareProfile:
    if not memory or memory <= 0:
        return row
    return dataclasses.replace(row, memory_bytes=memory, sources={**row.sources, "memory_bytes": source})


def _unknown(host: Host, platform: str, architecture: str, model: str, cores: int | None, memory: int | None) -> HardwareProfile:
    model = model.strip() or f"unnamed {platform} GPU"
    host.notes.append(f"{platform}: the table has no {model}; its peak rates and memory bandwidth are not known")
    read = {"cores": cores, "memory_bytes": memory}
    read = {figure: value for figure, value in read.items() if value and value > 0}
    return HardwareProfile(
        name=f"{platform}-{architecture}",
        model=model,
        platform=platform,
        architecture=architecture,
        cores=read.get("cores"),
        peak_flops={},
        memory_bytes=read.get("memory_bytes"),
        memory_bandwidth=None,
        sources=dict.fromkeys(read, "the driver"),
    )
