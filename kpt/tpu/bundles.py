"""The final VLIW schedule of a TPU kernel, as libtpu prints it (`*-final_bundles.txt` and the utilization file beside it).

A TensorCore is scheduled statically: it issues one bundle a cycle and never stalls but to wait for a DMA. What a kernel costs is
therefore how often each bundle is issued, which the scalar unit decides. `kpt.tpu.simulate` runs that unit's instructions.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from kpt.errors import KptError

# `0x1f LB: >> { ... }`; the address is printed without 0x where it is 0.
_BUNDLE = re.compile(r"^ *(?:0x)?([0-9a-f]+) +(?:[A-Z]{2})? *: *>* *\{", re.MULTILINE)
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_INSTRUCTION = re.compile(r"%(\w+) = ([a-z_0-9]+(?:\.\w+)*) ?(.*)", re.DOTALL)
_NAMED = re.compile(r"/\*(\w+)=\*/ *([^,\s]+)")
_PREDICATE = re.compile(r"(\[[^(]*\] )?\((!?)%(p\w+)\),? *")
# A register of rows: 8 of float32, 16 of bfloat16, 32 of bytes, which a matrix unit that has them takes twice as fast.
_PRODUCT = re.compile(r"= vmatmul(?:\.[ms]ubr)?\.(\w+)")
# The vector unit's share of a kernel is not the sequencer's business.
_VECTOR = re.compile(r"v(?!delay)|set|trace")


class ScheduleError(KptError):
    """A dump of the TPU compiler that kpt cannot read."""


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """One scalar or DMA instruction.

    Attributes:
      result: SSA name of what it defines.
      op: "sadd.s32", "scmp.ge.s32.totalorder", "sbr.rel", "dma.hbm_to_vmem".
      operands: SSA names (with %), integers, or other text; of a DMA, (size, sync flag), and source and destination if that is SMEM.
      predicate: `(name, wanted)`: issued where the predicate is `wanted`; None where always.
    """

    result: str
    op: str
    operands: tuple[str | int, ...]
    predicate: tuple[str, bool] | None = None


@dataclasses.dataclass(frozen=True)
class Bundles:
    """A kernel's schedule.

    Attributes:
      instructions: for each bundle, its scalar and DMA instructions.
      regions: region number -> bundle it starts at: where branches go.
      slots: names of the columns of `use`.
      capacity: how many of each slot a bundle has.
      use: `[bundles, slots]`, how many of each slot a bundle uses.
      products: `[bundles]`, how many products of a block of rows with an MXU's matrix a bundle starts.
    """

    instructions: tuple[tuple[Instruction, ...], ...]
    regions: dict[int, int]
    slots: tuple[str, ...]
    capacity: np.ndarray
    use: np.ndarray
    products: np.ndarray


def parse(bundles: str, utilization: str) -> Bundles:
    """Reads the two dumps of one kernel.

    Raises:
      ScheduleError: they are not what libtpu 0.0.48 prints.
    """
    found = list(_BUNDLE.finditer(bundles))
    if not found:
        raise ScheduleError("The TPU compiler's schedule was read", "It has no bundle", "Use the libtpu that kpt was tested with, 0.0.48")
    ends = [m.start() for m in found[1:]] + [len(bundles)]
    instructions: list[tuple[Instruction, ...]] = []
    products = []
    regions: dict[int, int] = {}
    for i, (m, end) in enumerate(zip(found, ends, strict=True)):
        if int(m[1], 16) != i:
            raise ScheduleError("The TPU compiler's schedule was read", f"Bundle {i:#x} is numbered {m[1]}", "Dump it again")
        text = bundles[m.end() : end]
        for comment in _COMMENT.findall(text):
            for number in _REGION.findall(comment):
                regions.setdefault(int(number), i)
        products.append(sum(0.5 if kind == "f32" else 1.0 for kind in _PRODUCT.findall(text)))
        found_here = [got for part in text.split(";;") if (got := _instruction(part)) is not None]
        # What costs no cycle may read in its own bundle what is defined there; phis come before all.
        instructions.append(tuple(sorted(found_here, key=lambda n: n.op != "sphi")))
    slots, capacity, use = _utilization(utilization)
    if len(use) != len(instructions):
        raise ScheduleError(
            "The TPU compiler's schedule was read", f"{len(instructions)} bundles, and the use of {len(use)}", "Dump it again"
        )
    return Bundles(tuple(instructions), regions, slots, capacity, use, np.array(products))


_DIVIDES = {"kRem": "srem.u32", "kDivAndRem": "sdivrem.u32"}


def _instruction(text: str) -> Instruction | None:
    named = dict(_NAMED.findall(text))
    m = _INSTRUCTION.match(_COMMENT.sub("", text).replace("\n", " ").strip().removesuffix("}"))
    if m is None or _VECTOR.match(m[2]):
        return None
    result, op, rest = m.groups()
    # `smov (%p, %a), b` and `scalar_select%p,%a,b` choose; `op (%p), a` and `sst [a] (%p), b` are issued or not.
    rest = re.sub(r"\[(?:thread|resolvable):\S*\]", "", rest)
    predicate = None
    if got := _PREDICATE.match(rest.strip()):
        predicate = got[3], got[2] == ""
        rest = (got[1] or "") + rest.strip()[got.end() :]
    if op.startswith("dma.") and op != "dma.done.wait":
        ends = op[4:].split("_to_") if op.endswith("_to_smem") else []
        wanted = ["size_in_granules", "dst_syncflagno", *ends]
        return Instruction(result, op, tuple(_operand(named.get(n, "")) for n in wanted), predicate)
    if op.startswith("inlined_call_operand"):
        found = re.search(r"index: (\d+)", rest)
        # Of one integer, what is in no memory is handed over in a register.
        where = op.removeprefix("inlined_call_")
        return Instruction(result, where, (int(found[1]),) if found else (), predicate)
    if op == "sbr.rel":
        target = re.search(r"\$region(\d+)", rest)
        return Instruction(result, op, (int(target[1]),) if target else (), predicate)
    if op == "sdivrem.u32":  # what it leaves in the queue that spop.drf reads
        op = next((name for mark, name in _DIVIDES.items() if f"/* {mark} */" in text), "sdiv")
    operands = tuple(_operand(o) for o in re.findall(r"\[[^\]]*\[[^\]]*\][^\]]*\]|\[[^\]]*\]|!?%\w+|0x[0-9a-f]+|-?\d+", rest))
    return Instruction(result, op, operands, predicate)


def _operand(text: str) -> str | int:
    if text.lstrip("-").isdigit() or text.startswith("0x"):
        n = int(text, 0)
        return n - (1 << 32) if n >= 1 << 31 else n
    return text


def _utilization(text: str) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    lines = text.split("\n")
    try:
        slots = tuple(s.strip() for s in lines[1].split(","))
        capacity = np.array(lines[2].split(), int)
        use = np.array([line.split() for line in lines[4:] if line.strip()], int)
        return slots, capacity, use.reshape(-1, len(slots))
    except (IndexError, ValueError) as e:
        raise ScheduleError("The TPU compiler's use of slots was read", f"It is no table ({e})", "Dump it again") from e
