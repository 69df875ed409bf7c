"""kpt as a backend of torch.compile: swaps its sites in Dynamo's graphs, and hands what is left to another backend."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint
from torch import fx
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import kpt.hardware as hardware_room
from kpt.config import config
from kpt.errors import ConfigError, HardwareError
from kpt.fusion.program import Match, Program
from kpt.hardware import HardwareProfile
from kpt.kernels import registry
from kpt.strategy import Plan, Site, level_named
from kpt.strategy.planner import Planner
from kpt_torch.autocast import in_force, under
from kpt_torch.capture import capture, mutated_storages, to_numpy
from kpt_torch.direct import direct
from kpt_torch.held import Held, held, while_held
from kpt_torch.lower import lower, storage
from kpt_torch.other_sizes import other_sizes
from kpt_torch.planner import Front, rewritten

log = logging.getLogger("kpt")
Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


@dataclasses.dataclass(eq=False)
class Backend:
    """What torch.compile calls with each graph of a program.

    Attributes:
      inner: compiles the rewritten graph; None runs it as it is.
      plans: one for each graph so far, in the order of compilation.
      banned: sites that keep their own code, by path, and why.
      dropped: kernels that are not to be used, by name, and why.
      certify: instead of the setting.
      foreign: sites of a given plan of another framework that have found no counterpart yet.
      breaks: why Dynamo broke the program into several graphs, in its words.
      left: the functions that Dynamo could not capture, and why.
    """

    level: str
    hardware: str | HardwareProfile = "auto"
    given: Plan | None = None
    inner: Compiler | None = None
    banned: Mapping[str, str] = dataclasses.field(default_factory=dict)
    name: str = "function"
    dropped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    certify: str | None = None
    plans: list[Plan] = dataclasses.field(default_factory=list)
    foreign: list[Site] | None = None
    breaks: dict[str, None] = dataclasses.field(default_factory=dict)
    left: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.before = dict(counters["graph_break"])
        if self.given is not None and self.given.framework != "torch":
            self.foreign = list(self.given.sites)

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        part = len(self.plans)
        met = (reason for reason, times in counters["graph_break"].items() if times > self.before.get(reason, 0))
        self.breaks.update(dict.fromkeys(reason.partition("\n")[0].strip() for reason in met))
        self.plans.append(self._planner(gm, inputs).plan(self.name))  # its place; what the inner compiler does may call this again
        return self._while_held(gm, inputs, part, held(gm, inputs))

    def _while_held(self, gm: fx.GraphModule, inputs: Sequence[Any], part: int, known: dict[int, Held]) -> Callable[..., Any]:
        self.plans[part], run = self._part(gm, inputs, part, known)
        if not known or not self.plans[part].sites:
            return run
        return while_held(known, run, lambda args, still: self._while_held(gm, args, part, still))

    def _part(
        self, gm: fx.GraphModule, inputs: Sequence[Any], part: int, known: dict[int, Held]
    ) -> tuple[Plan, Callable[..., Any]]:  # fmt: skip
        """The plan of one graph, and what runs in its place."""
        made: fx.GraphModule | None = None
        planner = self._planner(gm, inputs)
        wrapped = _wrapped(gm, inputs)
        try:
            if wrapped or device_of(inputs).type == "meta":
                kinds = ", ".join(wrapped) or "tensors that have no memory"
                planner.notes.append(f"Graph {part} runs as it was written: it computes with {kinds}, and kernels are for plain tensors.")
            else:
                made = self._rewritten(planner, gm, inputs, f"graph{part}" if part else "", known)
        except Exception as error:  # the user's program runs, whatever becomes of the search
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            log.warning("kpt left a graph of %s as it was written: %s", self.name, said)
            log.debug("The graph of %s that was left:", self.name, exc_info=True)
            planner.sites.clear()
            planner.notes.append(f"Graph {part} runs as it was written: {said}")
        run = gm if made is None else made
        if self.inner is not None:
            return planner.plan(self.name), self.inner(run, inputs)
        _checkpoints(run)
        if made is not None:
            direct(run)
        return planner.plan(self.name), run.forward

    def _planner(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Planner:
        wanted: Mapping[tuple[str, str, str], Site] | None = None
        if self.given is not None and self.foreign is None:
            wanted = {(s.path, s.op, s.fingerprint): s for s in self.given.sites}
        device = device_of(inputs)
        here = detected(device)
        front = Front(gm, None, device)  # the graph that is planned first brings its own
        return Planner(front, self.level, profile(self.hardware, device), wanted, self.banned,
                       self.certify or config().certify, here, self.foreign, self.dropped)  # fmt: skip

    def _rewritten(
        self, planner: Planner, gm: fx.GraphModule, inputs: Sequence[Any], path: str, known: dict[int, Held]
    ) -> fx.GraphModule | None:  # fmt: skip
        holders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        fakes = [n.meta.get("example_value", t) for n, t in zip(holders, inputs, strict=True)]
        real = all(isinstance(t, torch.Tensor) and not isinstance(t, torch._subclasses.FakeTensor) for t in inputs)
        values = {i: to_numpy(h.values) for i, h in known.items()}
        made = transformed(planner, gm, fakes, list(inputs) if real else None, device_of(inputs), path, values)
        for i in [i for i in known if i not in values]:
            del known[i]
        return made


def transformed(
    planner: Planner, gm: fx.GraphModule, fakes: Sequence[Any], real: Sequence[Any] | None, device: torch.device, path: str,
    values: dict[int, np.ndarray],
) -> fx.GraphModule | None:  # fmt: skip
    """The graph with kernels in it and in the bodies of its higher-order ops; None where nothing changed.

    Args:
      values: what some of the graph's inputs are known to hold, by number. Those that the graph writes into are taken out.
    """
    module = lower(gm, fakes)
    holders = [n for n in module.graph.nodes if n.op == "placeholder"]
    written = mutated_storages(module)
    for i in [i for i in values if storage(holders[i].meta["val"]) in written]:
        del values[i]
    known = {n: values[i] for i, n in enumerate(holders) if i in values}
    sizes = other_sizes(module)
    on = in_force()
    captured = capture(module, planner_name(path), on, torch.is_grad_enabled(), sizes[0], known)
    changed = _bodies(planner, module, device, path, known, captured.autocast)
    front = Front(module, captured, device)
    if not sizes[0].at:
        made = rewritten(planner, front, path, real)
    else:
        other = capture(module, planner_name(path), on, torch.is_grad_enabled(), sizes[1], known)
        planner.dropped = {**planner.dropped, **_of_fixed_sizes()}
        made = rewritten(planner, front, path, None, Steady(captured, other))
    return made if made is not None else module if changed else None


def _of_fixed_sizes() -> dict[str, str]:
    """Kernels for calls whose sizes do not change, and why no other one has them."""
    why = "is compiled for each set of sizes, in seconds, and these may change"
    return {k.name: why for k in registry.kernels() if k.framework == "torch" and k.provider == "mosaic"}


def _wrapped(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[str]:
    """The kinds of tensors in a graph that are made of others and say themselves what an op on them is: DTensor, nested tensors."""
    there = [*inputs, *(n.meta.get("example_value") for n in gm.graph.nodes)]
    return sorted({type(t).__name__ for t in pytree.tree_leaves(there) if is_traceable_wrapper_subclass(t)})


def _checkpoints(module: fx.GraphModule) -> None:
    """Regions that recompute themselves, for a graph that runs as it is: what Dynamo records of them only AOTAutograd heeds."""
    found = [n for n in module.graph.nodes if n.target is torch.ops.higher_order.tag_activation_checkpoint]
    for n in found:
        n.target = _checkpointed
        _checkpoints(getattr(module, str(n.args[0].target)))
    if found:
        module.recompile()


def _checkpointed(body: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    op: Any = torch.ops.higher_order.tag_activation_checkpoint
    options, named = op.divide_kwargs(kwargs)
    return torch.utils.checkpoint.checkpoint(body, *args, **(options | {"use_reentrant": False}), **named)


def planner_name(path: str) -> str:
    return path or "graph"


def _bodies(
    planner: Planner, module: fx.GraphModule, device: torch.device, path: str, known: Mapping[fx.Node, np.ndarray],
    autocast: Mapping[fx.Node, Mapping[str, torch.dtype]],
) -> bool:  # fmt: skip
    """Rewrites the bodies of checkpointed regions where they are kept, under the autocast that they run under."""
    changed, count = False, 0
    for n in list(module.graph.nodes):
        if n.op != "call_function" or n.target is not torch.ops.higher_order.tag_activation_checkpoint:
            continue
        body = n.args[0]
        assert isinstance(body, fx.Node)
        fakes = [a.meta["val"] if isinstance(a, fx.Node) else a for a in n.args[1:]]
        where = f"{path}/remat{count}" if path else f"remat{count}"
        count += 1
        values = {i: known[a] for i, a in enumerate(n.args[1:]) if isinstance(a, fx.Node) and a in known}
        with under(autocast[n]):
            made = transformed(planner, getattr(module, str(body.target)), fakes, None, device, where, values)
        if made is not None:
            setattr(module, str(body.target), made)
            changed = True
    return changed


class Steady:
    """Whether a site is the same site at other sizes: same op, parameters and views, its shapes apart by what the sizes are apart."""

    def __init__(self, captured: Any, other: Any):
        self.captured, self.other = captured, other
        self.program: Program | None = None
        self.matches: list[Match] = []

    def __call__(self, program: Program, match: Match) -> str | None:
        if self.program is None:
            from kpt.strategy.planner import patterns

            self.program, self.matches, _ = patterns().find(self.other.graph)
        mine = self._nodes(self.captured, match)
        twin = next((m for m in self.matches if m.op == match.op and self._nodes(self.other, m) == mine), None)
        why = "with other sizes it is another site (its sizes may change, and a kernel is put in where it holds for all of them)"
        if twin is None or match.params != twin.params or set(match.arrays) != set(twin.arrays):
            return why
        sizes = self._numbers()
        pairs = [(match.arrays[n], twin.arrays[n]) for n in match.arrays]
        pairs += list(zip(match.results.values(), twin.results.values(), strict=True))
        return None if all(self._alike(a, b, sizes) for a, b in pairs) else why

    def _nodes(self, captured: Any, match: Match) -> set[Any]:
        return {captured.made[v] for v in match.results if v in captured.made}

    def _numbers(self) -> dict[int, set[int]]:
        """Number here -> what the same size is there."""
        found: dict[int, set[int]] = {}
        for n, v in self.captured.values.items():
            w = self.other.values.get(n)
            for a, b in zip(v if isinstance(v, list) else [v], w if isinstance(w, list) else [w], strict=False):
                for x, y in zip(getattr(a, "shape", ()), getattr(b, "shape", ()), strict=False):
                    found.setdefault(x, set()).add(y)
        return found

    def _alike(self, a: Any, b: Any, sizes: dict[int, set[int]]) -> bool:
        def same(x: int, y: int) -> bool:
            return sizes.get(x, {x}) == {y} if x != y else sizes.get(x, {x}) <= {x}

        if a.op != b.op or len(a.args) != len(b.args) or len(a.shape) != len(b.shape) or not all(map(same, a.shape, b.shape)):
            return False
        if a.origins and a.op != "out":
            return {self.captured.made.get(v) for v in a.origins} == {self.other.made.get(v) for v in b.origins}
        for (name, x), (_, y) in zip(a.attrs, b.attrs, strict=True):
            if isinstance(x, tuple) and name in ("shape", "start", "limit"):
                if not all(map(same, x, y)):
                    return False
            elif name not in ("key", "id") and x != y:
                return False
        return all(self._alike(x, y, sizes) for x, y in zip(a.args, b.args, strict=True))


def device_of(inputs: Sequence[Any]) -> torch.device:
    """Where a graph computes: the device of its first tensor that is not on the CPU, else the CPU."""
    devices = [t.device for t in inputs if isinstance(t, torch.Tensor)]
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


def detected(device: torch.device) -> HardwareProfile:
    """The profile of a device that is here."""
    platform = {"cuda": "rocm" if torch.version.hip else "cuda", "xpu": "xpu", "xla": "tpu"}.get(device.type, "cpu")
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    if (platform, model) not in _PROFILES:
        _PROFILES[platform, model] = hardware_room.detect_hardware(platform=platform, model=model)
    return _PROFILES[platform, model]


_PROFILES: dict[tuple[str, str | None], HardwareProfile] = {}


def profile(hardware: str | HardwareProfile, device: torch.device) -> HardwareProfile:
    """The profile that a `hardware=` argument names; "auto" is the device that the graph is on."""
    if isinstance(hardware, HardwareProfile):
        return hardware
    if not isinstance(hardware, str):
        raise HardwareError(f"A {type(hardware).__name__} was given as the hardware", "It is a name or a HardwareProfile",
                            "Pass one of kpt.hardware.PROFILES, or describe yours with HardwareProfile.from_json")  # fmt: skip
    if hardware == "auto":
        named = config().hardware
        return detected(device) if named == "auto" else hardware_room.hardware_profile(named)
    return hardware_room.hardware_profile(hardware)


def kpt(gm: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, **_: Any) -> Callable[..., Any]:
    """`torch.compile(module, backend="kpt")`: kpt swaps its sites, Inductor compiles the rest.

    Options, as in `torch.compile(..., options={"level": "conservative"})`: `level`, `hardware`, and `inner`, the name of the backend for
    the rest; "eager" to have none. Where Inductor cannot compile (no C++ compiler for a CPU, no Triton for a GPU), the rest runs as it is.

    Raises:
      ConfigError: an option has another name.
    """
    given = dict(options or {})
    if unknown := sorted(set(given) - {"level", "hardware", "inner"}):
        raise ConfigError(f"torch.compile(backend='kpt') was given {', '.join(unknown)}", "Options are level, hardware and inner")
    name = given.get("inner", "inductor")
    inner = None if name == "eager" else _inner(name, device_of(inputs))
    level = level_named(given.get("level") or config().level).name
    return Backend(level, given.get("hardware", "auto"), inner=inner, name="compiled")(gm, inputs)


def _inner(name: str, device: torch.device) -> Compiler | None:
    from torch._dynamo import lookup_backend

    if name == "inductor" and (missing := _no_inductor(device)) is not None:
        log.warning("Inductor is left out: %s. kpt's kernels run, and the rest runs eagerly.", missing)
        return None
    found: Any = lookup_backend(name)
    return found


def _no_inductor(device: torch.device) -> str | None:
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception as error:
            return f"there is no C++ compiler ({type(error).__name__})"
        return None
    from torch.utils._triton import has_triton

    return None if has_triton() else "Triton is not installed for this device"
