"""The CPU of this host. Its peaks are estimates: cores x SIMD width x clock."""

from __future__ import annotations

import math
import os
import pathlib
import platform
import re
from collections.abc import Iterator

from kpt.hardware.chips import UNVERIFIED, KiB, MiB
from kpt.hardware.host import Host, fields, integer
from kpt.hardware.profiles import HardwareProfile

# What each level adds, as /proc/cpuinfo spells it (abm stands for lzcnt): x86-64 psABI, "Micro-Architecture Levels".
_X86_LEVELS = (
    {"cx16", "popcnt", "ssse3", "sse4_1", "sse4_2"},
    {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"},
    {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
)
_CLOCK = 2.5e9  # where neither cpufreq nor /proc/cpuinfo gives one
_MACHINES = {"amd64": "x86-64", "x86_64": "x86-64", "arm64": "aarch64"}


def _architecture(flags: set[str], features: set[str]) -> str:
    if flags:
        level = 1
        for needed in _X86_LEVELS:
            if not needed <= flags:
                break
            level += 1
        return f"x86-64-v{level}" if level > 1 else "x86-64"
    if features:
        return "aarch64"
    machine = platform.machine().lower()
    return _MACHINES.get(machine, machine) or "unknown"


def _flops_per_clock(flags: set[str], features: set[str], half_width_avx512: bool) -> dict[str, float]:
    """FLOP per core and clock by dtype, for a core that issues two vector operations a clock."""
    if features:  # two pipes of 128 bits; with SVE two of 256, or four of 128
        base = 32.0 if "sve" in features else 16.0
        rates = {"float64": base / 2, "float32": base, "bfloat16": base, "float16": base}
        rates["float16"] *= 2 if "asimdhp" in features else 1
        rates["bfloat16"] *= 4 if "bf16" in features else 1
        if "i8mm" in features or "asimddp" in features:
            rates["int8"] = base * (8 if "i8mm" in features else 4)
        return rates
    if "avx512f" in flags and not half_width_avx512:
        base = 64.0
    elif "fma" in flags:
        base = 32.0
    else:
        base = 16.0 if "avx" in flags else 8.0
    # Without instructions of their own, bfloat16 and float16 are widened to float32 and multiplied there.
    rates = {"float64": base / 2, "float32": base, "bfloat16": base, "float16": base}
    if "avx512_bf16" in flags or "avx_ne_convert" in flags:
        rates["bfloat16"] = 2 * base
    if "avx512_fp16" in flags:
        rates["float16"] = 2 * base
    if "avx512_vnni" in flags or "avx_vnni" in flags:
        rates["int8"] = 4 * base
    # An AMX tile product is 16 x 16 x 64 bytes in 16 clocks: Intel 64 and IA-32 Optimization Reference Manual.
    amx = {"amx_bf16": ("bfloat16", 1024.0), "amx_fp16": ("float16", 1024.0), "amx_int8": ("int8", 2048.0)}
    rates.update(rate for flag, rate in amx.items() if flag in flags)
    return rates


def _clock(host: Host, blocks: list[dict[str, str]]) -> float:
    kilohertz = host.number("sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    if kilohertz and kilohertz > 0:
        return kilohertz * 1e3
    megahertz = [float(m[0]) for b in blocks if (m := re.match(r"\d{1,6}(\.\d+)?", b.get("cpu MHz", "")))]
    if megahertz and max(megahertz) > 0:
        return max(megahertz) * 1e6
    host.notes.append(f"cpu: no clock in cpufreq or /proc/cpuinfo; {_CLOCK / 1e9:g} GHz is assumed")
    return _CLOCK


def _cgroups(host: Host, controller: str) -> Iterator[pathlib.Path]:
    """Directories with this process's limits: those of its own control group and of all that contain it."""
    mount = pathlib.Path("sys/fs/cgroup")
    for line in host.read("proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        base = mount / controllers if controllers else mount
        parts = [part for part in path.split("/") if part not in ("", "..")]
        yield from (base.joinpath(*parts[:i]) for i in range(len(parts), -1, -1))
    yield from (mount, mount / controller)


def _cpu_quota(host: Host) -> float | None:
    """How many CPUs' worth of time the control groups grant; None for no limit."""
    granted = []
    for directory in _cgroups(host, "cpu"):
        quota, _, period = host.read(directory / "cpu.max").partition(" ")  # version 2
        quota = quota or host.read(directory / "cpu.cfs_quota_us")  # version 1
        period = period or host.read(directory / "cpu.cfs_period_us")
        q, p = integer(quota), integer(period)
        if q and p and q > 0 and p > 0:
            granted.append(q / p)
    return min(granted, default=None)


def _memory(host: Host) -> int | None:
    total = re.search(r"^MemTotal:\s*(\d{1,15}) kB", host.read("proc/meminfo"), re.MULTILINE)
    if not total:
        host.notes.append("cpu: /proc/meminfo gives no MemTotal")
        return None
    limits = [int(total[1]) * KiB]
    for directory in _cgroups(host, "memory"):
        for file in ("memory.max", "memory.limit_in_bytes"):
            limit = host.number(directory / file)
            if limit and limit > 0:
                limits.append(limit)
    return min(limits)


def _caches(host: Host) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for index in host.glob("sys/devices/system/cpu/cpu0/cache/index[0-9]*"):
        level, kind = host.number(index / "level"), host.read(index / "type")
        size = re.fullmatch(r"(\d{1,12})([KM]?)", host.read(index / "size"))
        if level in (1, 2, 3) and kind in ("Data", "Unified") and size and int(size[1]):
            sizes[f"l{level}"] = int(size[1]) * {"": 1, "K": KiB, "M": MiB}[size[2]]
    return sizes


def cpu_profile(host: Host) -> HardwareProfile:
    """The CPU of a host, with what control groups and affinity leave of it.

        peak = cores * (FLOP per core and clock of the widest instructions) * clock

    Its memory bandwidth cannot be read: 12.8 GB/s a core is assumed, but no less than one channel of DDR4-3200
    (25.6 GB/s) and no more than eight a socket.
    """
    blocks = [fields(block, ":") for block in host.read("proc/cpuinfo").split("\n\n")]
    blocks = [block for block in blocks if "processor" in block]
    if not blocks:
        host.notes.append("cpu: /proc/cpuinfo lists no processor; instructions and model are unknown")
    first = blocks[0] if blocks else {}
    flags, features = set(first.get("flags", "").split()), set(first.get("Features", "").split())
    physical = {(b.get("physical id"), b["core id"]) for b in blocks if "core id" in b}
    listed = len(physical) or len(blocks) or os.cpu_count() or 1
    usable = min(listed, host.logical_cpus or listed)
    quota = _cpu_quota(host)
    cores = max(1, min(usable, math.ceil(quota)) if quota else usable)
    sockets = len({socket for socket, _ in physical}) or 1
    clock = _clock(host, blocks)
    # Zen 4 (family 25) issues a 512-bit operation as two of 256 bits: AMD, Software Optimization Guide 57647.
    zen4 = first.get("vendor_id") == "AuthenticAMD" and first.get("cpu family") == "25"
    per_clock = _flops_per_clock(flags, features, half_width_avx512=zen4)
    running = min(float(cores), quota or float(cores))
    peaks = {dtype: running * rate * clock for dtype, rate in per_clock.items()}
    caches, memory = _caches(host), _memory(host)
    estimate = f"{UNVERIFIED}estimate: {running:g} cores x SIMD width x {clock / 1e9:.3g} GHz"
    sources = dict.fromkeys(peaks, estimate)
    sources["cores"] = "/proc/cpuinfo, affinity and control groups"
    sources["memory_bandwidth"] = f"{UNVERIFIED}estimate: DDR4-3200 channels by cores"
    sources |= dict.fromkeys(caches, "/sys/devices/system/cpu/cpu0/cache")
    if memory is not None:
        sources["memory_bytes"] = "/proc/meminfo and control groups"
    host.notes.append("cpu: peak rates and memory bandwidth are estimates, not measurements")
    return HardwareProfile(
        name="cpu",
        model=first.get("model name") or first.get("Model") or "unknown CPU",
        platform="cpu",
        architecture=_architecture(flags, features),
        cores=cores,
        peak_flops=peaks,
        memory_bytes=memory,
        memory_bandwidth=min(204.8e9 * sockets, max(25.6e9, 12.8e9 * cores)),
        caches=caches,
        sources=sources,
    )
