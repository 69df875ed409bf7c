"""Detection on made-up hosts: one tree of files, one environment or one NVML for every branch, and garbage."""

import pathlib
import sys
import time
import types

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kpt.errors import HardwareError
from kpt.hardware import PLATFORMS, PROFILES, HardwareProfile, detect_hardware, hardware_profile, planned_elsewhere

GIB = 1 << 30
FLAGS_V3 = "cx16 popcnt ssse3 sse4_1 sse4_2 avx avx2 bmi1 bmi2 f16c fma abm movbe"
FLAGS_V4 = FLAGS_V3 + " avx512f avx512bw avx512cd avx512dq avx512vl"


def host(root: pathlib.Path, files):
    for path, text in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def pci(slot, vendor, device):
    base = f"sys/bus/pci/devices/{slot}"
    return {f"{base}/vendor": f"0x{vendor:04x}\n", f"{base}/device": f"0x{device:04x}\n"}


def drm(card, vendor, device, slot="0000:03:00.0", **more):
    base = f"sys/class/drm/{card}"
    uevent = f"DRIVER=xe\nPCI_SLOT_NAME={slot}\n"
    files = {"device/vendor": f"0x{vendor:04x}\n", "device/device": f"0x{device:04x}\n", "device/uevent": uevent}
    return {f"{base}/{name}": text for name, text in (files | more).items()}


def kfd(node, gfx, cores, memory_gib, device=0, clock=2100, vendor=0x1002):
    base = f"sys/class/kfd/kfd/topology/nodes/{node}"
    properties = {"cpu_cores_count": 0, "simd_count": 4 * cores, "simd_per_cu": 4, "gfx_target_version": gfx,
                  "vendor_id": vendor, "device_id": device, "max_engine_clk_fcompute": clock}  # fmt: skip
    bank = {"heap_type": 1, "size_in_bytes": memory_gib * GIB, "width": 8192}
    return {
        f"{base}/properties": "\n".join(f"{k} {v}" for k, v in properties.items()),
        f"{base}/mem_banks/0/properties": "\n".join(f"{k} {v}" for k, v in bank.items()),
    }


CPU_NODE = {"sys/class/kfd/kfd/topology/nodes/0/properties": "cpu_cores_count 64\nsimd_count 0\n"}


def cpuinfo(count, cores_per_socket=None, flags=FLAGS_V3, **more):
    per = cores_per_socket or count
    rows = [{"processor": i, "physical id": i % count // per, "core id": i % count % per, "flags": flags, **more} for i in range(count)]
    return "\n\n".join("\n".join(f"{k}\t: {v}" for k, v in row.items()) for row in rows)


class Nvml(types.SimpleNamespace):
    """NVML as nvidia-ml-py offers it. A query whose answer is an exception raises it."""

    def __init__(self, gpus):
        self.gpus, self.running = gpus, 0

    def nvmlInit(self):
        self.running += 1

    def nvmlShutdown(self):
        self.running -= 1

    def nvmlDeviceGetCount(self):
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index):
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return next(gpu for gpu in self.gpus if gpu["uuid"] == uuid)

    def answer(self, handle, key):
        if isinstance(handle.get(key), Exception):
            raise handle[key]
        return handle[key]

    def nvmlDeviceGetName(self, handle):
        return self.answer(handle, "name")

    def nvmlDeviceGetCudaComputeCapability(self, handle):
        return self.answer(handle, "capability")

    def nvmlDeviceGetMemoryInfo(self, handle):
        return types.SimpleNamespace(total=self.answer(handle, "memory"))

    def nvmlDeviceGetMigMode(self, handle):
        return self.answer(handle, "mig")

    def nvmlDeviceGetNumGpuCores(self, handle):
        return self.answer(handle, "lanes")


def gpu(name, capability=(9, 0), memory=80 * GIB, **more):
    unasked = {"mig": RuntimeError("Not Supported"), "lanes": 16896, "uuid": "GPU-1"}
    return {"name": name, "capability": capability, "memory": memory, **unasked, **more}


def accelerator(tmp_path, files=None, environ=None, nvml=None, **more):
    return detect_hardware(root=host(tmp_path, files or {}), environ=environ or {}, nvml=nvml, **more)


V5E = {"TPU_ACCELERATOR_TYPE": "v5litepod-4"}
FOUND_IN_FILES = [
    # TPUs
    ("TPU by PCI id", pci("0000:00:04.0", 0x1AE0, 0x0063), {}, "tpu-v5e"),
    ("TPU v4 by PCI id", pci("0000:00:04.0", 0x1AE0, 0x005E), {}, "tpu-v4"),
    ("TPU v5p by PCI id", pci("0000:00:04.0", 0x1AE0, 0x0062), {}, "tpu-v5p"),
    ("TPU v6e by PCI id", pci("0000:00:04.0", 0x1AE0, 0x006F), {}, "tpu-v6e"),
    ("TPU7x by PCI id", pci("0000:00:04.0", 0x1AE0, 0x0076), {}, "tpu-v7x"),
    ("TPU beside Google's network card", pci("0000:00:03.0", 0x1AE0, 0x0042) | pci("0000:00:05.0", 0x1AE0, 0x006F),
     {"TPU_ACCELERATOR_TYPE": "v6e-8"}, "tpu-v6e"),
    ("TPU device file and variable", {"dev/accel0": ""}, V5E, "tpu-v5e"),
    ("TPU behind vfio", {"dev/vfio/0": ""}, {"TPU_ACCELERATOR_TYPE": "v5e-1"}, "tpu-v5e"),
    ("TPU7x behind vfio", {"dev/vfio/12": ""}, {"TPU_ACCELERATOR_TYPE": "tpu7x-8"}, "tpu-v7x"),
    ("TPU before a GPU", pci("0000:00:04.0", 0x1AE0, 0x0063) | kfd(1, 90402, 304, 192, 0x74A1), {}, "tpu-v5e"),
    # AMD
    ("MI210", CPU_NODE | kfd(1, 90010, 104, 64, 0x740F), {}, "mi210"),
    ("MI250X, one of its dies", CPU_NODE | kfd(1, 90010, 110, 64, 0x7408), {}, "mi250x"),
    ("MI250X by compute units", CPU_NODE | kfd(1, 90010, 110, 64), {}, "mi250x"),
    ("MI300X", CPU_NODE | kfd(1, 90402, 304, 192, 0x74A1), {}, "mi300x"),
    ("MI300X, virtual function", CPU_NODE | kfd(1, 90402, 304, 192, 0x74B5), {}, "mi300x"),
    ("MI300X by memory", CPU_NODE | kfd(1, 90402, 304, 192), {}, "mi300x"),
    ("MI325X by memory", CPU_NODE | kfd(1, 90402, 304, 256), {}, "mi325x"),
    ("MI325X", CPU_NODE | kfd(1, 90402, 304, 256, 0x74A5), {}, "mi325x"),
    ("MI355X", CPU_NODE | kfd(1, 90500, 256, 288, 0x75A3, 2400), {}, "mi355x"),
    ("MI355X by clock", CPU_NODE | kfd(1, 90500, 256, 288, 0, 2400), {}, "mi355x"),
    ("second AMD GPU by index", kfd(1, 90402, 304, 192) | kfd(2, 90010, 104, 64, 0x740F), {"HIP_VISIBLE_DEVICES": "1"},
     "mi210"),
    ("AMD nodes in numerical order", kfd(10, 90010, 104, 64, 0x740F) | kfd(9, 90402, 304, 192), {}, "mi300x"),
    # Intel
    ("Max 1550", drm("card1", 0x8086, 0x0BD5), {}, "max-1550"),
    ("Max 1100", drm("card0", 0x8086, 0x0BDA), {}, "max-1100"),
    ("Arc B580", drm("card0", 0x8086, 0xE20B), {}, "arc-b580"),
    ("Arc B580 beside integrated graphics",
     drm("card0", 0x8086, 0x9A49, "0000:00:02.0") | drm("card1", 0x8086, 0xE20B), {}, "arc-b580"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "environ", "name"), [c[1:] for c in FOUND_IN_FILES], ids=[c[0] for c in FOUND_IN_FILES])
def test_a_chip_of_the_table_is_recognised_by_its_files(tmp_path, files, environ, name):
    found = accelerator(tmp_path, files, environ)
    row = hardware_profile(name)
    assert (found.name, found.platform, found.architecture) == (name, row.platform, row.architecture)
    assert (found.peak_flops, found.memory_bandwidth) == (row.peak_flops, row.memory_bandwidth)


NVML_NAMES = [
    ("Tesla T4", (7, 5), "t4"),
    ("NVIDIA A100-SXM4-40GB", (8, 0), "a100-sxm-40gb"),
    ("NVIDIA A100-SXM4-80GB", (8, 0), "a100-sxm-80gb"),
    ("NVIDIA A100-PCIE-40GB", (8, 0), "a100-pcie-40gb"),
    ("NVIDIA A100 80GB PCIe", (8, 0), "a100-pcie-80gb"),
    ("NVIDIA L4", (8, 9), "l4"),
    ("NVIDIA L40S", (8, 9), "l40s"),
    ("NVIDIA GeForce RTX 4090", (8, 9), "rtx-4090"),
    ("NVIDIA GeForce RTX 5090", (12, 0), "rtx-5090"),
    ("NVIDIA H100 80GB HBM3", (9, 0), "h100-sxm"),
    ("NVIDIA H100 PCIe", (9, 0), "h100-pcie"),
    ("NVIDIA H100 NVL", (9, 0), "h100-nvl"),
    ("NVIDIA H200", (9, 0), "h200"),
    ("NVIDIA B200", (10, 0), "b200"),
    ("NVIDIA B300 SXM6 AC", (10, 3), "b300"),
    # Relatives with other figures must not be taken for them.
    ("NVIDIA L40", (8, 9), "cuda-sm89"),
    ("NVIDIA T400", (7, 5), "cuda-sm75"),
    ("NVIDIA GeForce RTX 4090 D", (8, 9), "cuda-sm89"),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9), "cuda-sm89"),
    ("NVIDIA H200 NVL", (9, 0), "cuda-sm90"),
    ("NVIDIA GH200 480GB", (9, 0), "cuda-sm90"),
    ("NVIDIA GB200", (10, 0), "cuda-sm100"),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", (9, 0), "cuda-sm90"),
    ("Tesla V100-SXM2-16GB", (7, 0), "cuda-sm70"),
]


@pytest.mark.parametrize("spell", [str, str.encode], ids=["text", "bytes of older bindings"])
@pytest.mark.parametrize(("model", "capability", "name"), NVML_NAMES, ids=[c[0] for c in NVML_NAMES])
def test_a_gpu_is_recognised_by_its_nvml_name(tmp_path, model, capability, name, spell):
    nvml = Nvml([gpu(spell(model), capability, memory=23 * GIB)])
    found = accelerator(tmp_path, nvml=nvml)
    assert (found.name, found.platform, found.memory_bytes) == (name, "cuda", 23 * GIB)
    assert found.architecture == "sm{}{}".format(*capability)
    assert nvml.running == 0
    if name in PROFILES:
        assert found.peak_flops == PROFILES[name].peak_flops
        assert found.sources["memory_bytes"] == "NVML"
        assert found.notes == PROFILES[name].notes
    else:
        assert (found.model, found.peak_flops, found.memory_bandwidth) == (model, {}, None)
        assert any(model in note for note in found.notes)


def test_the_memory_that_the_host_reports_is_that_of_the_whole_chip(tmp_path):
    found = accelerator(tmp_path, CPU_NODE | kfd(1, 90010, 110, 64, 0x7408))
    assert (found.memory_bytes, found.devices) == (128 * GIB, 2)


def test_the_multiprocessors_of_an_unknown_gpu_are_counted(tmp_path):
    for capability, lanes, cores in (((8, 6), 10496, 82), ((7, 0), 5120, 80), ((9, 0), 16896, 132)):
        found = accelerator(tmp_path, nvml=Nvml([gpu("NVIDIA Something", capability, lanes=lanes)]))
        assert found.cores == cores


TWO = [gpu("NVIDIA H100 80GB HBM3", uuid="GPU-a"), gpu("NVIDIA L4", (8, 9), uuid="GPU-b")]


@pytest.mark.parametrize(
    ("visible", "name"),
    [("0", "h100-sxm"), ("1", "l4"), ("1,0", "l4"), ("GPU-b", "l4"), ("0,-1,1", "h100-sxm"), ("", "cpu"), ("-1", "cpu"),
     ("7", "cpu"), ("GPU-z", "cpu"), ("nonsense", "cpu")],
)  # fmt: skip
def test_the_first_visible_gpu_counts(tmp_path, visible, name):
    found = accelerator(tmp_path, environ={"CUDA_VISIBLE_DEVICES": visible}, nvml=Nvml(TWO))
    assert found.name == name
    assert (name == "cpu") == any(note.startswith("cuda: ") for note in found.notes)


@pytest.mark.parametrize(
    ("model", "visible", "name"),
    [("NVIDIA L4", None, "l4"), ("NVIDIA H100 80GB HBM3", None, "h100-sxm"), ("NVIDIA L4", "1,0", "l4"), ("NVIDIA L4", "0,1", "l4"),
     ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "1,0", "h100-sxm"), ("NVIDIA Unheard Of", None, "h100-sxm"), (None, "1", "l4")],
)  # fmt: skip
def test_of_two_gpus_the_one_that_a_framework_names(tmp_path, model, visible, name):
    """CUDA counts the fastest first, NVML by bus: a number would be another GPU's."""
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert accelerator(tmp_path, environ=environ, nvml=Nvml(TWO), model=model).name == name


NOTED = [
    ("a variable without a TPU", {}, V5E, None, "cpu", "no TPU device is here"),
    ("another accelerator's files", {"dev/accel0": ""}, {}, None, "cpu", None),
    ("a type that is no TPU", {"dev/accel0": ""}, {"TPU_ACCELERATOR_TYPE": "v99-1"}, None, "cpu", "v99-1 names no TPU"),
    ("Google's network card", pci("0000:00:03.0", 0x1AE0, 0x0042), {}, None, "cpu", None),
    ("a TPU v3", pci("0000:00:03.0", 0x1AE0, 0x0027), {}, None, "cpu", "TPU v2 or v3"),
    ("variable against PCI id", pci("0000:00:04.0", 0x1AE0, 0x006F), V5E, None, "tpu-v6e", "contradicts"),
    ("NVML that fails", {}, {}, Nvml([gpu(RuntimeError("lost"))]), "cpu", "cuda: RuntimeError: lost"),
    ("NVML without GPUs", {}, {}, Nvml([]), "cpu", "cuda: IndexError"),
    ("no memory from NVML", {}, {}, Nvml([gpu("NVIDIA L4", (8, 9), RuntimeError("denied"))]), "l4",
     "nvmlDeviceGetMemoryInfo failed: denied"),
    ("no capability from NVML", {}, {}, Nvml([gpu("Odd", RuntimeError("denied"))]), "cuda-unknown", "denied"),
    ("a GPU without a name", {}, {}, Nvml([gpu(" ")]), "cuda-sm90", "no unnamed cuda GPU"),
    ("nonsense from NVML", {}, {}, Nvml([gpu("Odd", memory=-1, lanes=-1)]), "cuda-sm90", "no Odd"),
    ("a capability that surprises", {}, {}, Nvml([gpu("NVIDIA L4", (9, 0))]), "l4", "reports sm90"),
    ("MIG", {}, {}, Nvml([gpu("NVIDIA H100 80GB HBM3", mig=(1, 1))]), "h100-sxm", "MIG is on"),
    ("a partitioned MI300X", kfd(1, 90402, 38, 24, 0x74A1), {}, None, "mi300x", "has 38 of 304"),
    ("an AMD GPU that has no row", kfd(1, 110000, 96, 24, 0x744C), {}, None, "rocm-gfx1100", "no AMD gfx1100"),
    ("an MI350X", kfd(1, 90500, 256, 288, 0x75A0, 2200), {}, None, "rocm-gfx950", "no AMD gfx950"),
    ("AMD integrated graphics", kfd(1, 100306, 2, 1, 0x164E), {}, None, "cpu", "looks integrated"),
    ("hidden AMD GPUs", kfd(1, 90402, 304, 192), {"ROCR_VISIBLE_DEVICES": ""}, None, "cpu", "hides every GPU"),
    ("an AMD GPU by uuid", kfd(1, 90402, 304, 192), {"ROCR_VISIBLE_DEVICES": "GPU-x"}, None, "mi300x", "is no index"),
    ("Intel integrated graphics", drm("card0", 0x8086, 0x9A49, "0000:00:02.0"), {}, None, "cpu", None),
    ("another Intel card", drm("card0", 0x8086, 0x56A0), {}, None, "xpu-unknown", "no Intel GPU 0x56a0"),
    ("a card of another vendor", drm("card0", 0x1A03, 0x2000), {}, None, "cpu", None),
]  # fmt: skip


@pytest.mark.parametrize(("files", "environ", "nvml", "name", "note"), [c[1:] for c in NOTED], ids=[c[0] for c in NOTED])
def test_what_could_not_be_read_is_noted(tmp_path, files, environ, nvml, name, note):
    found = accelerator(tmp_path, files, environ, nvml)
    assert found.name == name
    mine = [n for n in found.notes if not n.startswith("cpu:")]
    assert any(note in n for n in mine) if note else not mine


def test_an_intel_card_reports_its_memory_where_its_driver_does(tmp_path):
    files = drm("card0", 0x8086, 0x0BDA, lmem_total_bytes=str(47 * GIB))
    assert accelerator(tmp_path, files).memory_bytes == 47 * GIB


DRIVER = {"dev/nvidiactl": "", "proc/driver/nvidia/gpus/0000:17:00.0/information": "Model: \t\t NVIDIA L40S\nIRQ: 5\n"}


@pytest.mark.parametrize(
    ("files", "name"),
    [(DRIVER, "l40s"), ({"dev/nvidia0": ""}, "cuda-unknown"), ({"dev/dxg": ""}, "cuda-unknown"), ({}, "cpu")],
)
def test_without_nvml_the_drivers_files_have_to_do(tmp_path, monkeypatch, files, name):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = accelerator(tmp_path, files)
    assert found.name == name
    assert any("nvidia-ml-py" in note for note in found.notes) == (name != "cpu")


def test_nvml_is_not_loaded_where_there_is_no_driver(tmp_path, monkeypatch):
    loaded = Nvml([gpu("NVIDIA L4", (8, 9))])
    monkeypatch.setitem(sys.modules, "pynvml", loaded)
    assert accelerator(tmp_path).name == "cpu"
    assert accelerator(tmp_path, {"dev/nvidiactl": ""}).name == "l4"


@pytest.mark.parametrize("asked", ["h100", "tpu-v5e", "cpu", "abacus"])
def test_the_chip_that_plans_are_for_does_not_change_what_is_there(tmp_path, asked):
    assert accelerator(tmp_path, nvml=Nvml(TWO), environ={"KPT_HARDWARE": asked}) == accelerator(tmp_path, nvml=Nvml(TWO))


@pytest.mark.parametrize("asked, other", [("h100", True), ("cpu", False), ("auto", False), ("", False)])
def test_what_measures_says_where_plans_are_for_another_chip(monkeypatch, recwarn, asked, other):
    monkeypatch.setenv("KPT_HARDWARE", asked)
    assert planned_elsewhere(hardware_profile("cpu")) is other
    said = [str(w.message) for w in recwarn]
    assert said == (["KPT_HARDWARE is h100-sxm; what is measured is this machine, cpu."] if other else [])


def test_one_platform_can_be_asked_for(tmp_path):
    files = pci("0000:00:04.0", 0x1AE0, 0x006F) | kfd(1, 90402, 304, 192) | drm("card0", 0x8086, 0xE20B)
    found = {p: accelerator(tmp_path, files, nvml=Nvml(TWO), platform=p).name for p in PLATFORMS}
    assert found == {"tpu": "tpu-v6e", "cuda": "h100-sxm", "rocm": "mi300x", "xpu": "arc-b580", "cpu": "cpu"}
    absent = accelerator(tmp_path / "empty", platform="tpu")
    assert absent.platform == "cpu"
    assert "tpu: none was found; this is the CPU" in absent.notes
    with pytest.raises(HardwareError, match="abacus"):
        accelerator(tmp_path, platform="abacus")


MEMORY = {"proc/meminfo": "MemTotal:       16777216 kB\nMemFree: 1 kB\n"}
CPUS = [
    ("AVX2", {"proc/cpuinfo": cpuinfo(4, **{"model name": "Some CPU"})}, "x86-64-v3", 4, 4 * 32),
    ("AVX-512", {"proc/cpuinfo": cpuinfo(2, flags=FLAGS_V4)}, "x86-64-v4", 2, 2 * 64),
    ("Zen 4", {"proc/cpuinfo": cpuinfo(2, flags=FLAGS_V4, vendor_id="AuthenticAMD", **{"cpu family": "25"})},
     "x86-64-v4", 2, 2 * 32),
    ("AVX", {"proc/cpuinfo": cpuinfo(1, flags="cx16 popcnt ssse3 sse4_1 sse4_2 avx")}, "x86-64-v2", 1, 16),
    ("SSE2", {"proc/cpuinfo": cpuinfo(1, flags="fpu sse sse2")}, "x86-64", 1, 8),
    ("Arm", {"proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd\n\nprocessor\t: 1\nFeatures\t: fp asimd\n"},
     "aarch64", 2, 2 * 16),
    ("Arm with SVE", {"proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd sve bf16 i8mm\n"}, "aarch64", 1, 32),
    ("two threads a core", {"proc/cpuinfo": cpuinfo(2) + "\n\n" + cpuinfo(2)}, "x86-64-v3", 2, 2 * 32),
    ("two sockets", {"proc/cpuinfo": cpuinfo(8, cores_per_socket=4)}, "x86-64-v3", 8, 8 * 32),
    ("a quota", {"proc/cpuinfo": cpuinfo(8), "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"},
     "x86-64-v3", 3, 2.5 * 32),
    ("no quota", {"proc/cpuinfo": cpuinfo(8), "sys/fs/cgroup/cpu.max": "max 100000\n"}, "x86-64-v3", 8, 8 * 32),
    ("the outer group's quota", {"proc/cpuinfo": cpuinfo(8), "proc/self/cgroup": "0::/a/b\n",
                                 "sys/fs/cgroup/a/b/cpu.max": "400000 100000",
                                 "sys/fs/cgroup/a/cpu.max": "200000 100000"},
     "x86-64-v3", 2, 2 * 32),
    ("a quota of version 1", {"proc/cpuinfo": cpuinfo(8), "proc/self/cgroup": "4:cpu,cpuacct:/pod\n",
                              "sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_quota_us": "50000\n",
                              "sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_period_us": "100000\n"}, "x86-64-v3", 1, 0.5 * 32),
]  # fmt: skip


@pytest.mark.parametrize(("files", "architecture", "cores", "per_clock"), [c[1:] for c in CPUS], ids=[c[0] for c in CPUS])
def test_a_cpu_is_estimated_from_its_cores_instructions_and_clock(tmp_path, files, architecture, cores, per_clock):
    clock = {"sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "2000000\n"}
    found = accelerator(tmp_path, files | clock | MEMORY)
    assert (found.name, found.platform, found.architecture, found.cores) == ("cpu", "cpu", architecture, cores)
    assert found.peak_flops["float32"] == per_clock * 2e9
    assert found.peak_flops["float64"] == per_clock * 1e9
    assert found.memory_bytes == 16 * GIB
    assert {"float32", "memory_bandwidth"} <= set(found.unverified)
    assert any("estimates" in note for note in found.notes)


@pytest.mark.parametrize(
    ("flags", "dtype", "times_float32"),
    [
        (FLAGS_V3, "bfloat16", 1),
        (FLAGS_V3, "float16", 1),
        (FLAGS_V4 + " avx512_bf16", "bfloat16", 2),
        (FLAGS_V4 + " avx512_fp16", "float16", 2),
        (FLAGS_V4 + " avx512_vnni", "int8", 4),
        (FLAGS_V4 + " amx_tile amx_bf16", "bfloat16", 16),
        (FLAGS_V4 + " amx_tile amx_int8", "int8", 32),
    ],
)
def test_instructions_for_narrow_dtypes_raise_their_rate(tmp_path, flags, dtype, times_float32):
    found = accelerator(tmp_path, {"proc/cpuinfo": cpuinfo(2, flags=flags)})
    assert found.peak_flops[dtype] == times_float32 * found.peak_flops["float32"]


CACHE = "sys/devices/system/cpu/cpu0/cache"
LIMITS = [
    ({}, 16),
    ({"sys/fs/cgroup/memory.max": "max"}, 16),
    ({"sys/fs/cgroup/memory.max": str(4 * GIB)}, 4),
    ({"proc/self/cgroup": "3:memory:/x", "sys/fs/cgroup/memory/x/memory.limit_in_bytes": str(2 * GIB)}, 2),
    ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}, 16),
]


@pytest.mark.parametrize(("files", "gib"), LIMITS)
def test_a_control_group_limits_the_memory(tmp_path, files, gib):
    assert accelerator(tmp_path, MEMORY | files).memory_bytes == gib * GIB


def test_caches_are_read_and_instruction_caches_left_out(tmp_path):
    levels = [(1, "Data", "48K"), (1, "Instruction", "32K"), (2, "Unified", "2048K"), (3, "Unified", "105M")]
    files = {
        f"{CACHE}/index{i}/{name}": str(value)
        for i, row in enumerate(levels)
        for name, value in zip(("level", "type", "size"), row, strict=True)
    }
    found = accelerator(tmp_path, files)
    assert found.caches == {"l1": 48 << 10, "l2": 2 << 20, "l3": 105 << 20}


def test_a_clock_is_taken_from_cpuinfo_or_assumed(tmp_path):
    told = accelerator(tmp_path / "a", {"proc/cpuinfo": cpuinfo(1, **{"cpu MHz": "3200.5"})})
    assert told.peak_flops["float32"] == 32 * 3200.5e6
    assumed = accelerator(tmp_path / "b", {"proc/cpuinfo": cpuinfo(1)})
    assert assumed.peak_flops["float32"] == 32 * 2.5e9
    assert any("2.5 GHz is assumed" in note for note in assumed.notes)


PATHS = [*FOUND_IN_FILES[0][1], *kfd(1, 90402, 304, 192), *drm("card0", 0x8086, 0xE20B, lmem_total_bytes=""),
         "dev/accel0", "dev/vfio/0", "dev/nvidia0", "proc/cpuinfo", "proc/meminfo", "proc/self/cgroup",
         "proc/driver/nvidia/gpus/0/information", "sys/fs/cgroup/cpu.max", "sys/fs/cgroup/cpu.cfs_quota_us",
         "sys/fs/cgroup/memory.max", "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq", f"{CACHE}/index0/level",
         f"{CACHE}/index0/type", f"{CACHE}/index0/size"]  # fmt: skip
WORDS = ["0x1ae0", "0x0063", "0x8086", "0xe20b", "0x", "-1", "0", "1", "9" * 30, "9" * 5000, "max", "processor",
         ": ", "::", "/..", "\n", "\n\n", " ", "flags", "fma", "core id", "simd_count", "simd_per_cu",
         "gfx_target_version", "heap_type 1", "size_in_bytes", "device_id", "vendor_id 4098", "MemTotal: ",
         " kB", "Unified", "K",
         "PCI_SLOT_NAME=", "cpu MHz", "1e400", "\0", "٣", "NaN"]  # fmt: skip
CONTENT = st.one_of(
    st.binary(max_size=60),
    st.lists(st.sampled_from(WORDS), max_size=12).map(lambda words: "".join(words).encode()),
    st.lists(st.sampled_from(WORDS), max_size=12).map(lambda words: " ".join(words).encode()),
    st.none(),  # a directory where a file is expected
)
VARIABLES = [
    "TPU_ACCELERATOR_TYPE",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "KPT_HARDWARE",
]
ENVIRONMENTS = st.dictionaries(st.sampled_from(VARIABLES), st.one_of(st.text(max_size=8), st.sampled_from([*WORDS, "v5e-4", "0,1", ","])))
ANSWERS = st.one_of(st.none(), st.integers(), st.text(max_size=8), st.binary(max_size=8), st.just(RuntimeError("no")),
                    st.tuples(st.integers(), st.integers()), st.sampled_from([c[0] for c in NVML_NAMES]))  # fmt: skip
NVMLS = st.one_of(
    st.none(),
    st.just(object()),
    st.builds(lambda **gpu: Nvml([gpu]), **{key: ANSWERS for key in ("name", "capability", "memory", "mig", "lanes", "uuid")}),
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.dictionaries(st.sampled_from(PATHS), CONTENT),
    environ=ENVIRONMENTS,
    nvml=NVMLS,
    platform=st.sampled_from([None, *PLATFORMS]),
)
@example(files={"sys": b"a file"}, environ={}, nvml=None, platform=None)
@example(files={"proc/cpuinfo": b"\xff" * 100, "sys/fs/cgroup/cpu.max": b"1 0"}, environ={}, nvml=None, platform="cpu")
def test_garbage_never_stops_it(tmp_path_factory, files, environ, nvml, platform):
    root = tmp_path_factory.mktemp("host")
    for path, content in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            file.mkdir(exist_ok=True)
        elif not file.exists():
            file.write_bytes(content)
    found = detect_hardware(root=root, environ=environ, nvml=nvml, platform=platform)
    assert found.platform in PLATFORMS
    assert HardwareProfile.from_json(found.to_json()) == found


def test_a_root_that_is_not_there_gives_a_cpu(tmp_path):
    found = detect_hardware(root=tmp_path / "nowhere", environ={})
    assert found.platform == "cpu"
    assert found.memory_bytes is None


def test_this_host_is_described_at_once_and_the_same_each_time():
    first = detect_hardware()
    start = time.process_time()
    again = detect_hardware()
    taken = time.process_time() - start
    assert again == first
    assert taken < 0.2
