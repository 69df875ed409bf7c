"""What a TPU kernel's schedule says: cycles, time, how full the units are, and what bounds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from kpt.errors import HardwareError
from kpt.hardware import hardware_profile
from kpt.tpu.bundles import parse
from kpt.tpu.simulate import DELAY_SLOTS, Run, simulate

# Seconds between the end of a transfer and its wait. From one published measurement: the matmul of the Pallas documentation with
# blocks of 128, which waits for a DMA in every grid step, reaches 6% of a v5e's peak at 4096.
DMA_LATENCY = 0.55e-6


@dataclasses.dataclass(frozen=True)
class Generation:
    """A TPU generation as its compiler sees it.

    Attributes:
      name: "v5e".
      profile: of the hardware table.
      kind: what jax calls its devices.
      topology: the smallest that libtpu describes.
      flops_per_cycle: bfloat16 operations of one TensorCore's MXUs in a cycle: 2 for each of their cells.
      mxu: rows and columns of one.
      granule: bytes in which DMA instructions count.
      delay_slots: bundles issued after a branch before it takes effect: the last of them that schedules predicate by the branch.
    """

    name: str
    profile: str
    kind: str
    topology: str
    flops_per_cycle: int
    mxu: int
    granule: int
    delay_slots: int = DELAY_SLOTS

    @property
    def clock(self) -> float:
        """Cycles a second of a TensorCore: peak / cores / operations a cycle."""
        chip = hardware_profile(self.profile)
        return chip.peak("bfloat16") / (chip.cores or 1) / self.flops_per_cycle  # type: ignore[operator]

    @property
    def product_cycles(self) -> float:
        """What a product of 16 rows of bfloat16 with an MXU's matrix takes at the peak rate, all MXUs at work."""
        return 2 * 16 * self.mxu**2 / self.flops_per_cycle


GENERATIONS = MappingProxyType({
    g.name: g
    for g in (
        Generation("v4", "tpu-v4", "TPU v4", "v4:2x2x1", 2 * 4 * 128**2, 128, 512),
        Generation("v5e", "tpu-v5e", "TPU v5 lite", "v5e:2x2", 2 * 4 * 128**2, 128, 32),
        Generation("v5p", "tpu-v5p", "TPU v5", "v5p:2x2x1", 2 * 4 * 128**2, 128, 32),
        Generation("v6e", "tpu-v6e", "TPU v6 lite", "v6e:2x2", 2 * 4 * 256**2, 256, 32),
        Generation("v7x", "tpu-v7x", "TPU7x", "tpu7x:2x2x1", 2 * 4 * 256**2, 256, 32, delay_slots=6),
    )
})  # fmt: skip
# Slots of a bundle, by the unit they belong to.
UNITS = {
    "VPU": ("VALU",), "XLU": ("XLU",), "EUP": ("EUP",), "load": ("VLOAD",), "store": ("VSTORE",), "scalar": ("SALU",),
}  # fmt: skip


def generation(name: str) -> Generation:
    """By its name or that of its hardware profile, in any case: "v5e", "V5E", "tpu_v5e", "trillium".

    Raises:
      HardwareError: there is none of that name.
    """
    try:
        profile = hardware_profile(name).name
    except HardwareError:
        profile = None
    found = next((g for g in GENERATIONS.values() if g.profile == profile), None)
    if found is None:
        raise HardwareError(f"TPU generation {name!r} was asked for", f"There are {', '.join(GENERATIONS)}", "Choose one of them")
    return found


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Neighbouring bundles that are issued equally often, a hundredth of the program at most.

    Attributes:
      start: address of the first.
      bundles: how many there are.
      issued: how often.
      occupancy: share of each unit's slots that they use. Of the MXU, share of its cycles: products that are issued faster than the
        MXUs do them keep these busy in the bundles after, as far as those are issued as often.
    """

    start: int
    bundles: int
    issued: int
    occupancy: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """One kernel on one TensorCore.

    Attributes:
      kernel: name of the call in the compiled program.
      generation: "v5e".
      cores: TensorCores that share the grid, and the chip's memory bandwidth: 2 where the compiler split it (megacore). 1 where the other
        core has nothing to do.
      bundles: length of the program.
      cycles: of one run, stalls included.
      stalled: of those, cycles that wait for DMAs while the MXUs have nothing left to do.
      seconds: cycles over the clock.
      read, written: bytes between HBM and this core.
      vmem: bytes allocated in vector memory.
      spills: registers stored to and filled from vector memory, in one run.
      occupancy: by unit, used slots over all that the cycles offer; of the MXU, products over the peak rate.
      bound: the unit that limits it: "MXU", "VPU", "XLU", "EUP", "load", "store", "scalar", "HBM" (bandwidth), "DMA latency", or
        "dependencies" where bundles are not full of anything.
      unknown: branches and DMAs that depend on data, counted as if nothing were skipped, and DMAs of unknown size, as if they cost nothing.
      stretches: the program from start to end.
      calls: how often one call of the program runs the kernel: the trips of the loops around it (`lax.scan`). Every other figure is of
        one run. None where it is not known: a `while_loop`, a branch, or several kernels of one name.
    """

    kernel: str
    generation: str
    cores: int
    bundles: int
    cycles: float
    stalled: float
    seconds: float
    read: int
    written: int
    vmem: int
    spills: int
    occupancy: dict[str, float]
    bound: str
    unknown: int
    stretches: tuple[Stretch, ...]
    calls: int | None = None

    @property
    def loops(self) -> list[Stretch]:
        """The stretches with those joined that are issued equally often, side by side: the levels of the program's loops, in its order."""
        found: list[Stretch] = []
        for s in self.stretches:
            if not found or found[-1].issued != s.issued:
                found.append(s)
                continue
            last = found[-1]
            bundles = last.bundles + s.bundles
            occupancy = {u: (last.occupancy[u] * last.bundles + s.occupancy[u] * s.bundles) / bundles for u in s.occupancy}
            found[-1] = Stretch(last.start, bundles, s.issued, occupancy)
        return found

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Schedule:
        return cls(**{**found, "stretches": tuple(Stretch(**s) for s in found["stretches"])})


def schedule(
    kernel: str, on: Generation, bundles: str, utilization: str, vmem: int = 0, scalars: Sequence[np.ndarray | None] = ()
) -> Schedule:
    """Reads and runs the final schedule that libtpu dumped for one kernel.

    Args:
      bundles, utilization: texts of `*-final_bundles.txt` and `*-final_hlo-static-per-bundle-utilization.txt`.
      vmem: bytes that its allocations take.
      scalars: its operands; None for one that is not known, or is no integers.

    Raises:
      ScheduleError: the texts cannot be read, or a loop's end depends on data.
    """
    program = parse(bundles, utilization)
    chip = hardware_profile(on.profile)
    device_cores = (chip.cores or 1) // chip.devices

    def run_on(core: int, cores: int) -> Run:
        return simulate(program, bytes_per_cycle=bandwidth(cores) / on.clock, latency=DMA_LATENCY * on.clock, granule=on.granule,
                        delay_slots=on.delay_slots, scalars=scalars, core=core)  # fmt: skip

    def bandwidth(cores: int) -> float:
        return (chip.memory_bandwidth or 0.0) / chip.devices / cores

    # A kernel that asks which core it runs on shares its grid with the other, or sends the other to its end.
    shared = any(i.op == "sld" and i.operands == ("[smem:[#allocation0]]",) for found in program.instructions for i in found)
    cores = device_cores if shared and device_cores > 1 and _works(run_on(1, device_cores)) else 1
    run = run_on(0, cores)
    column = {name: i for i, name in enumerate(program.slots)}
    used = (run.issued[:, None] * program.use).sum(0)

    def share(use: np.ndarray, products: float, cycles: float) -> dict[str, float]:
        slots = {
            unit: float(sum(use[column[s]] for s in slots) / max(1.0, cycles * sum(program.capacity[column[s]] for s in slots)))
            for unit, slots in UNITS.items()
        }
        return slots | {"MXU": products * on.product_cycles / max(1.0, cycles)}

    n = len(run.issued)
    cuts = sorted({0, n, *(np.flatnonzero(np.diff(run.issued)) + 1).tolist(), *range(0, n, max(1, -(-n // 100)))})
    stretches, left, level = [], 0.0, -1  # what the MXUs have still to do, in cycles, and how often what asked for it is issued
    for a, b in zip(cuts, cuts[1:], strict=False):
        issued = int(run.issued[a])
        todo = float(program.products[a:b].sum()) * on.product_cycles + (left if issued == level else 0.0)
        left, level = max(0.0, todo - (b - a)), issued
        stretches.append(Stretch(a, b - a, issued, share(program.use[a:b].sum(0), min(todo, b - a) / on.product_cycles, b - a)))
    # The MXUs wait where products are issued faster than the peak rate, which the schedule does not show.
    products = float((run.issued * program.products).sum())
    cycles = max(run.cycles, products * on.product_cycles)
    stalled = min(run.stalled, cycles - products * on.product_cycles)
    occupancy = share(used, products, cycles)
    spills = int(used[column["VLOAD:FILL"]] + used[column["VSTORE:SPILL"]])
    moved = (run.read + run.written) * on.clock / bandwidth(cores) if bandwidth(cores) else 0.0  # cycles that the transfers take
    return Schedule(
        kernel, on.name, cores, n, cycles, stalled, cycles / on.clock, run.read, run.written, vmem, spills,
        occupancy, _bound(occupancy, stalled / max(cycles, 1.0), moved / max(cycles, 1.0)), run.unknown, tuple(stretches),
    )  # fmt: skip


def _works(run: Run) -> bool:
    """Whether a core has a part of the grid: it moves something, or gets to most of the program."""
    return run.read + run.written > 0 or 2 * int(np.count_nonzero(run.issued)) > len(run.issued)


def _bound(occupancy: dict[str, float], stalled: float, moved: float) -> str:
    if stalled > 0.2:
        return "HBM" if moved > 0.75 else "DMA latency"
    unit = max(occupancy, key=lambda u: occupancy[u])
    return unit if occupancy[unit] > 0.5 else "dependencies"
