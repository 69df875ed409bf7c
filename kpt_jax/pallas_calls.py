"""The Pallas calls of a program: what they are called, whether they are interpreted, and how often loops around them run them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend import core as jex

CALLS = "pallas_call", "mpmd_map"
"""Primitives that call a kernel; the second is `pl.kernel` on a mesh of cores."""


@dataclasses.dataclass(frozen=True)
class PallasCall:
    """One place of a program that calls a kernel.

    Attributes:
      name: of the kernel, as its author gave it.
      interpreted: True if XLA gets the kernel's operations instead of the kernel.
      times: how often a call of the program comes by, the trips of `scan`s multiplied; None inside a `while_loop` or a branch.
      cores: TensorCores of the mesh that its author asked for.
    """

    name: str
    interpreted: bool
    times: int | None
    cores: int = 1


def pallas_calls(jaxpr: Any, times: int | None = 1) -> Iterator[PallasCall]:
    """Those of a jaxpr and of all within it, in its order."""
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name in CALLS:
            cores = max((getattr(mesh, "num_cores", 1) for mesh in params.get("meshes", ())), default=1)
            yield PallasCall(call_name(params), bool(params.get("interpret")), times, cores)
            continue
        inside, copies = times, 1
        if name == "scan":
            copies = min(params.get("unroll", 1), params["length"]) or 1
            inside = None if times is None or params["length"] % copies else times * (params["length"] // copies)
        elif name in ("while", "cond"):
            inside = None
        for body, _ in bodies(eqn):
            yield from list(pallas_calls(body, inside)) * copies


def bodies(eqn: Any) -> Iterator[tuple[Any, Sequence[Any]]]:
    """The jaxprs within an equation, with their constants."""
    for value in eqn.params.values():
        for body in value if isinstance(value, tuple | list) else (value,):
            if isinstance(body, jex.ClosedJaxpr):
                yield body.jaxpr, body.consts
            elif isinstance(body, jex.Jaxpr):
                yield body, ()


def call_name(params: Any) -> str:
    """A kernel's name, from the parameters of its `pallas_call`: `name`, or else that of the function, as the compiler is given it."""
    body = params["jaxpr"] if "jaxpr" in params else params["jaxprs"][0]
    return str(params.get("name") or body.debug_info.func_name)


def of_kernel(kernel: str, names: Sequence[str]) -> list[int]:
    """Which of the names the compiler made `transpose_jvp_NAME__.1` of: the places of the longest that is part of it; all where none is."""
    plain = re.sub(r"\W", "_", kernel)
    fit = [re.sub(r"\W", "_", name) for name in names]
    longest = max((len(name) for name in fit if name in plain), default=0)
    return [i for i, name in enumerate(fit) if not longest or (len(name) == longest and name in plain)]


def times_of(kernels: Sequence[str], calls: Sequence[PallasCall]) -> list[int | None]:
    """How often each compiled kernel runs in a call of the program; None where the compiler made more or fewer of it than there are calls,
    or these differ.

    Args:
      kernels: the compiler's names of all kernels that it made.
    """
    calls = [c for c in calls if not c.interpreted]
    mine = [tuple(of_kernel(k, [c.name for c in calls])) for k in kernels]
    every = tuple(range(len(calls)))
    named = {i for places in mine if places != every for i in places}
    # One without a name of its own is, for the compiler, the function around it: of the calls that no name belongs to.
    mine = [tuple(i for i in places if places != every or i not in named) for places in mine]
    known = []
    for places in mine:
        times = {calls[i].times for i in places}
        known.append(times.pop() if len(times) == 1 and mine.count(places) == len(places) else None)
    return known
