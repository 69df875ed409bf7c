"""What the TPU compiler says where something does not fit its memory, in words that say by how much, and what to do."""

from __future__ import annotations

import re

from kpt.hardware.chips import MiB

# libtpu 0.0.48. One array is larger than VMEM; all of a program are larger than VMEM or HBM; a kernel's are more than it may take of VMEM.
_ARRAY = re.compile(r"Allocation \(size=(?P<need>\d+)\) would exceed memory \(size=(?P<have>\d+)\)")
_NEED, _HAVE, _OVER = (rf"(?P<{name}>[\d.]+[KMG]?)" for name in ("need", "have", "over"))
_PROGRAM = re.compile(rf"in memory space (?P<memory>\w+)\. Used {_NEED} of {_HAVE} \w+\. Exceeded \w+ capacity by {_OVER}")
_SCOPED = re.compile(rf"Scoped allocation with size {_NEED} and limit {_HAVE} exceeded scoped vmem limit by {_OVER}")
_KERNEL = re.compile(r":: (?P<at_end>[\w.-]+)\s*$|on stack for %(?P<on_stack>[\w.-]+)|XLA label: (?P<label>[\w.-]+) = custom-call")
_WHAT = re.compile(r"[tT]ag(?: =|:) '?(?P<what>[^'.]*)")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_SMALLER = "Take smaller blocks (block_shape of its BlockSpecs; those of a grid are there twice) or less scratch"


def in_short(words: str) -> tuple[str, str]:
    """A message of the compiler as (what is wrong, what to do); the message itself and "" where it is about something else."""
    m = _ARRAY.search(words) or _PROGRAM.search(words) or _SCOPED.search(words)
    if m is None or (m.re is _ARRAY and "vmem" not in words):
        return words, ""
    need, have = _bytes(m["need"]), _bytes(m["have"])
    # Where it writes units the compiler rounds, to hundredths.
    over = f"{need - have:,}" if m.re is _ARRAY else f"about {_bytes(m['over']):,}"
    memory = m["memory"].upper() if m.re is _PROGRAM else "VMEM"
    kernel = next((next(filter(None, k.groups())) for k in [_KERNEL.search(words)] if k), None)
    who = "The program" if memory != "VMEM" or kernel is None else f"Kernel {kernel}"
    largest = _WHAT.search(words)
    said = f"{who} takes {over} bytes more of {memory} than there are for it: {need:,} of {have:,}"
    said += f" ({need / MiB:,.1f} of {have / MiB:,.1f} MiB)"
    said += ", the limit that a kernel has, not the chip's" * (m.re is _SCOPED)
    said += f"; the largest is the {largest['what']}" if largest else ""
    said += " (RESOURCE_EXHAUSTED)" * ("RESOURCE_EXHAUSTED" in words)  # by which tables know it
    if memory == "SMEM":
        return said, "Take shorter arrays of integers: larger blocks make fewer of them"
    if memory != "VMEM":
        return said, "Take smaller arrays, or fewer that live at a time"
    return said, _SMALLER + "; or allow the kernel more, pltpu.CompilerParams(vmem_limit_bytes=...)" * (m.re is _SCOPED)


def _bytes(text: str) -> int:
    return round(float(text.rstrip("KMG")) * _UNITS.get(text[-1], 1))
