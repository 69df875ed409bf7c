"""Hardware profiles: what a chip can do at most, every figure with its source."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from kpt.errors import HardwareError
from kpt.hardware.chips import CHIPS, UNVERIFIED, Chip

PLATFORMS = ("tpu", "cuda", "rocm", "xpu", "cpu")
DTYPES = ("float64", "float32", "tf32", "bfloat16", "float16", "float8", "int8", "int4")
CACHES: Mapping[str, str] = MappingProxyType(
    {
        "l1": "bytes per core",
        "l2": "bytes per chip (a CPU's: per core)",
        "l3": "bytes per chip",
        "shared": "bytes of shared memory (LDS, SLM) per core",
        "shared_block": "bytes of shared memory that one thread block may take",
        "tensor_memory": "bytes of tensor memory per core (Blackwell)",
        "vmem": "bytes of vector memory per TensorCore",
        "cmem": "bytes of common memory per chip (TPU v4)",
        "smem": "bytes of scalar memory per TensorCore",
    }
)
_SCALARS = ("cores", "memory_bytes", "memory_bandwidth", "interconnect")
# A dtype that a chip does not multiply natively is widened to the first of these that it does.
_WIDER: Mapping[str, tuple[str, ...]] = {
    "int4": ("int8", "bfloat16", "float16", "float32"),
    "int8": ("bfloat16", "float16", "float32"),
    "float8": ("bfloat16", "float16", "float32"),
    "float16": ("float32",),
    "bfloat16": ("float32",),
    "tf32": ("float32",),
}


@dataclasses.dataclass(frozen=True)
class HardwareProfile:
    """What one chip can do at most.

    Attributes:
      name: "tpu-v5e", "h100-sxm", "mi300x", "cpu"; of a chip that is not in the table "cuda-sm86" or the like.
      model: what its maker calls it.
      platform: "tpu", "cuda", "rocm", "xpu" or "cpu".
      architecture: "tpu-v5e", "sm90", "gfx942", "pvc", "x86-64-v3", ...
      cores: TensorCores, streaming multiprocessors, compute units, Xe cores, or CPU cores; None
        where unknown.
      peak_flops: dense FLOP/s (integer operations/s) by dtype, of `DTYPES`; a dtype without native rate is absent.
      memory_bytes: of device memory; None where unknown.
      memory_bandwidth: bytes/s between the chip and its memory; None where unknown.
      caches: bytes by name, see `CACHES`.
      interconnect: bytes/s to other chips, both directions together; None where unknown.
      devices: how many devices a framework sees on the chip. Figures are of the whole chip, see `per_device`.
      sources: where each figure is from, by dtype, field or cache name.
      notes: what to know of the figures, and what detection could not read.
    """

    name: str
    model: str
    platform: str
    architecture: str
    cores: int | None
    peak_flops: Mapping[str, float] = dataclasses.field(hash=False)
    memory_bytes: int | None
    memory_bandwidth: float | None
    caches: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)
    interconnect: float | None = None
    devices: int = 1
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    notes: tuple[str, ...] = ()

    @property
    def unverified(self) -> tuple[str, ...]:
        """Names of the figures that nobody has checked against their source."""
        return tuple(sorted(figure for figure, source in self.sources.items() if source.startswith(UNVERIFIED)))

    def peak(self, dtype: str) -> float | None:
        """FLOP/s at `dtype` ("float8_e4m3fn" and its kin count as "float8", "uint8" as "int8"); None where unknown.

        A dtype that the chip does not multiply natively runs at the rate of the next wider one that it does.
        """
        family = "float8" if dtype.startswith("float8") else dtype.removeprefix("u")
        for candidate in (family, *_WIDER.get(family, ())):
            if candidate in self.peak_flops:
                return self.peak_flops[candidate]
        return None

    def ridge(self, dtype: str) -> float | None:
        """FLOP per byte from which on a kernel is bound by arithmetic rather than by memory; None where unknown."""
        peak = self.peak(dtype)
        return peak / self.memory_bandwidth if peak and self.memory_bandwidth else None

    def per_device(self) -> HardwareProfile:
        """The figures of one device, where a framework sees several on the chip (TPU7x, MI250X, Max 1550)."""
        n = self.devices
        if n == 1:
            return self
        shared = {"l2", "l3", "cmem"}
        return dataclasses.replace(
            self,
            cores=self.cores and self.cores // n,
            peak_flops={dtype: rate / n for dtype, rate in self.peak_flops.items()},
            memory_bytes=self.memory_bytes and self.memory_bytes // n,
            memory_bandwidth=self.memory_bandwidth and self.memory_bandwidth / n,
            caches={name: size // n if name in shared else size for name, size in self.caches.items()},
            interconnect=self.interconnect and self.interconnect / n,
            devices=1,
        )

    def to_json(self) -> str:
        """The profile as JSON that `from_json` reads back to an equal profile."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> HardwareProfile:
        """Reads what `to_json` wrote. A chip that the table lacks can be described this way.

        Raises:
          HardwareError: the text is not JSON, lacks a field, has an unknown one, or a value has the wrong type.
        """
        try:
            fields = json.loads(text)
        except ValueError as e:
            raise _unreadable(f"it is not JSON ({e})") from None
        if not isinstance(fields, dict):
            raise _unreadable("it is not a JSON object")
        known = {f.name: f for f in dataclasses.fields(cls)}
        required = [f.name for f in known.values() if f.default is f.default_factory is dataclasses.MISSING]
        for complaint, names in (
            ("it lacks", [n for n in required if n not in fields]),
            ("it has the unknown fields", [n for n in fields if n not in known]),
            ("of the wrong type are", [n for n, v in fields.items() if n in known and not _is_of_field(n, v)]),
        ):
            if names:
                raise _unreadable(f"{complaint} {', '.join(names)}")
        if "notes" in fields:
            fields["notes"] = tuple(fields["notes"])
        return cls(**fields)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_of_field(name: str, value: Any) -> bool:
    match name:
        case "platform":
            return value in PLATFORMS
        case "name" | "model" | "architecture":
            return isinstance(value, str) and bool(value)
        case "devices":
            return _is_number(value) and isinstance(value, int)
        case "cores" | "memory_bytes":
            return value is None or (_is_number(value) and isinstance(value, int))
        case "memory_bandwidth" | "interconnect":
            return value is None or _is_number(value)
        case "peak_flops":
            return isinstance(value, dict) and all(k in DTYPES and _is_number(v) for k, v in value.items())
        case "caches":
            return isinstance(value, dict) and all(k in CACHES and _is_number(v) for k, v in value.items())
        case "sources":
            return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
        case _:
            return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _unreadable(reason: str) -> HardwareError:
    return HardwareError(
        "A hardware profile was read from JSON",
        f"This text is none: {reason}",
        "Start from hardware_profile(name).to_json() and change its figures",
    )


def profile_of(chip: Chip) -> HardwareProfile:
    """The profile of one row of the table."""
    figures = {figure: value for group in chip.figures.values() for figure, value in group.items()}
    return HardwareProfile(
        name=chip.name,
        model=chip.model,
        platform=chip.platform,
        architecture=chip.architecture,
        cores=int(figures["cores"]),
        peak_flops={dtype: float(figures[dtype]) for dtype in DTYPES if dtype in figures},
        memory_bytes=int(figures["memory_bytes"]),
        memory_bandwidth=float(figures["memory_bandwidth"]),
        caches={cache: int(figures[cache]) for cache in CACHES if cache in figures},
        interconnect=figures.get("interconnect"),
        devices=chip.devices,
        sources={figure: source for source, group in chip.figures.items() for figure in group},
        notes=chip.remarks,
    )


PROFILES: Mapping[str, HardwareProfile] = MappingProxyType({chip.name: profile_of(chip) for chip in CHIPS})
"""Every profile of the table, by name."""

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        **{name.removeprefix("tpu-"): name for name in PROFILES if name.startswith("tpu-")},
        "tpu7x": "tpu-v7x",
        "7x": "tpu-v7x",
        "ironwood": "tpu-v7x",
        "trillium": "tpu-v6e",
        "v5litepod": "tpu-v5e",
        "tesla-t4": "t4",
        "a100": "a100-sxm-80gb",
        "a100-40gb": "a100-sxm-40gb",
        "a100-80gb": "a100-sxm-80gb",
        "a100-sxm": "a100-sxm-80gb",
        "a100-pcie": "a100-pcie-80gb",
        "4090": "rtx-4090",
        "rtx4090": "rtx-4090",
        "5090": "rtx-5090",
        "rtx5090": "rtx-5090",
        "h100": "h100-sxm",
        "h200-sxm": "h200",
        "pvc": "max-1550",
        "b580": "arc-b580",
    }
)
"""Other names that `hardware_profile` takes."""


def _as_typed(name: str) -> str:
    """A profile's name with the short one that it goes by."""
    short = min((alias for alias, of in ALIASES.items() if of == name), key=len, default=name)
    return f"{name} ({short})" if len(short) < len(name) else name


def hardware_profile(name: str) -> HardwareProfile:
    """The profile of that name or alias ("h100" is "h100-sxm", "v5e" is "tpu-v5e"), in any case, with any separators.

    Raises:
      HardwareError: the table has no such chip. `possible` has the names near to it.
    """
    key = "-".join(name.lower().replace("_", " ").replace("-", " ").split())
    key = ALIASES.get(key, key)
    if key not in PROFILES:
        near = difflib.get_close_matches(name.lower(), [*PROFILES, *ALIASES], n=3, cutoff=0.5)
        near = list(dict.fromkeys(ALIASES.get(n, n) for n in near))
        raise HardwareError(
            f"Hardware {name!r} was asked for",
            f"Near it {'is' if len(near) == 1 else 'are'} {', '.join(map(_as_typed, near))}" if near
            else f"Known are {', '.join(map(_as_typed, PROFILES))}",
            "Pass one of kpt.hardware.PROFILES (`kpt hardware list`), or describe yours with HardwareProfile.from_json",
        )
    return PROFILES[key]
