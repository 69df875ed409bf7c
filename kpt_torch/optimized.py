"""`optimize`: a module, or a function, used like the original, rewritten when Dynamo captures it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import itertools
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn.parameter import is_lazy

from kpt.config import config, start_logging
from kpt.errors import KptError, PlanError
from kpt.frameworks import refuse_other
from kpt.hardware import HardwareProfile
from kpt.inputs import explained
from kpt.strategy import Plan, level_named
from kpt_torch.backend import Backend, profile
from kpt_torch.quiet import FRESH, in_a_line


def optimize(
    module: Any, level: str | None = None, hardware: str | HardwareProfile = "auto", plan: Plan | None = None
) -> Any:
    """Rewrites a PyTorch module, or a function of tensors, so that better kernels compute what they can.

    The result is used exactly like the original: it is an instance of the module's class that shares its parameters, buffers,
    submodules and hooks, with the same names and `state_dict`. Its first call for each kind of input is captured by Dynamo, matched
    and certified; where Dynamo breaks the graph, each piece is rewritten on its own, and the plan's notes say so.

    Args:
      module: an `nn.Module`, or a function of tensors.
      level: "conservative", "balanced" or "aggressive"; `KPT_LEVEL` or "balanced" by default.
      hardware: "auto", a profile name ("h100-sxm") or a `HardwareProfile`.
      plan: a plan to follow; only the sites it names are swapped.

    Returns:
      The module with `.plan(*inputs)` and `.explain(*inputs)`; a function with the same.

    Raises:
      KptError: at once, for an unknown level or hardware, a `plan` that is none, a Flax module or JAX function, or a class.
    """
    start_logging()
    level = level_named(level or config().level).name
    if plan is not None and not isinstance(plan, Plan):
        raise PlanError(f"kpt_torch.optimize was given an object of type {type(plan).__name__} as its plan", "It follows a kpt.Plan",
                        "Read it with Plan.from_json(text) or Plan.load(path)")  # fmt: skip
    if hardware != "auto" or config().hardware != "auto":
        hardware = profile(hardware, torch.device("cpu"))
    if isinstance(module, torch.nn.Module):
        if hasattr(module, "_kpt_original"):  # optimized already: planned anew, from what it was made of
            original: Any = module._kpt_original
            module = original()
        return _module(module, Settings(level, hardware, plan))
    refuse_other(module, "torch")
    if isinstance(module, type):
        raise KptError(f"kpt_torch.optimize was given the class {module.__name__}", "It is no model yet: there may be many of it",
                       f"Pass a model: {module.__name__}(...)")  # fmt: skip
    if not callable(module):
        raise KptError(f"kpt_torch.optimize was given an object of type {type(module).__name__}", "It takes an nn.Module or a function",
                       "Pass the module, or the function that computes")  # fmt: skip
    return Optimized(module, Settings(level, hardware, plan))


def plan(
    module: Any, *inputs: Any, level: str | None = None, hardware: str | HardwareProfile = "auto", plan: Plan | None = None, **keywords: Any
) -> Plan:
    """What `optimize` would do to `module` for these inputs: the Plan alone.

    The module runs once, as it was written, for Dynamo captures a program by running it; buffers and random states are put back.

    Raises:
      InputError: the module does not take these inputs.
      KptError: as `optimize`.
    """
    rewritten = optimize(module, level, hardware, plan)
    with explained(module, inputs, keywords, "torch"):
        made: Plan = rewritten._kpt_plan(*inputs, **keywords)  # the module may have a `plan` of its own
    return made


def explain(module: Any, *inputs: Any, **keywords: Any) -> str:
    """The plan for these inputs in words."""
    return plan(module, *inputs, **keywords).explain()


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `optimize` was called with."""

    level: str
    hardware: str | HardwareProfile
    given: Plan | None
    banned: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    dropped: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    certify: str | None = None

    def backend(self, name: str, inner: Any = None) -> Backend:
        return Backend(self.level, self.hardware, self.given, inner, self.banned, name, self.dropped, self.certify)

    def without(self, kernels: Mapping[str, str]) -> Settings:
        return dataclasses.replace(self, dropped={**self.dropped, **kernels})


# By default Dynamo does not look again whether a submodule has got hooks since it was captured. It cuts what DistributedDataParallel wraps
# at its buckets, so that a compiled backward pass has places to send them from; ours is autograd's, which has them anyway. The cuts would
# cost sites, and regions that are checkpointed cannot be cut. What Dynamo cannot trace it leaves, with a warning, and looks at what that
# calls: the program runs, whatever becomes of the search. Where graphs break, each layer of a model is a frame of the same code, and counts
# as its recompilation: from the ninth layer on, none would have kernels.
_DYNAMO = {"skip_nnmodule_hook_guards": False, "optimize_ddp": False, "suppress_errors": True, "recompile_limit": 128}
_LOCK = threading.Lock()
_INSIDE: list[None] = []  # one for each call under way, in any thread


@contextlib.contextmanager
def _dynamo_told() -> Iterator[None]:
    """Dynamo's settings as `_DYNAMO` has them. All threads have the same: the first one in sets them, the last one out puts them back."""
    with _LOCK:
        if not _INSIDE:
            _patch().__enter__()
        _INSIDE.append(None)
    try:
        yield
    finally:
        with _LOCK:
            _INSIDE.pop()
            if not _INSIDE:
                _patch().__exit__(None, None, None)


@functools.cache
def _patch() -> Any:
    return torch._dynamo.config.patch(_DYNAMO)  # which makes a class


def _captured(fn: Callable[..., Any], backend: Backend, dynamic: bool | None = None) -> Callable[..., Any]:
    """`torch.compile(fn, backend=backend)`, under Dynamo's settings as above while it captures: a call that it knows pays nothing."""
    context: Any = torch._dynamo.optimize(backend=backend, dynamic=dynamic)
    capture = getattr(context, "callback", None)
    if capture is None:  # TORCHDYNAMO_DISABLE is set: programs run as they were written
        return fn

    @functools.wraps(capture)
    def told(*frame: Any) -> Any:
        plans, left = len(backend.plans), len(backend.left)
        with _dynamo_told(), in_a_line(backend.left):
            made = capture(*frame)
        if len(backend.left) > left:
            del backend.plans[plans:]  # of a graph that will not run
        return made

    context.callback = told
    made: Callable[..., Any] = context(fn)
    return made


def compiled(fn: Callable[..., Any], settings: Settings, name: str, inner: Any = None) -> tuple[Callable[..., Any], Backend]:
    """`fn` under a backend of its own."""
    backend = settings.backend(name, inner)
    run = _captured(_fresh(fn), backend)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        # The code as it was written: for a program that is exported or traced by others; and a kernel has no forward derivative.
        if torch.compiler.is_exporting() or torch.jit.is_tracing() or is_fx_symbolic_tracing() or forward_ad._current_level >= 0:
            return fn(*args, **kwargs)
        return run(*args, **kwargs)

    return call, backend


_COUNT = itertools.count()


def _fresh(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a code object of its own: Dynamo counts recompilations by code, and other users of `fn` are no business of ours.

    And with a name of its own, for by file, line and name Dynamo remembers which numbers differed between calls, and makes symbols of
    them. Where models share a decorated `forward`, as those of transformers do, the scale of one's attention would be none in the next.
    """
    if not isinstance(fn, types.FunctionType):
        return fn
    code = fn.__code__.replace(co_name=f"{fn.__code__.co_name}{FRESH}{next(_COUNT)}")
    made = types.FunctionType(code, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    made.__kwdefaults__ = fn.__kwdefaults__
    made.__dict__.update({k: v for k, v in fn.__dict__.items() if k != "__wrapped__"})
    return made


def planned(
    fn: Callable[..., Any], settings: Settings, name: str, args: Sequence[Any], kwargs: dict, tensors: Sequence[torch.Tensor]
) -> Plan:
    """Captures `fn` on these arguments and plans; what runs is the code as written."""
    backend = settings.backend(name, inner=_as_written)
    run = _captured(_fresh(fn), backend, dynamic=False)  # the plan is for these sizes
    with put_back(tensors):
        run(*args, **kwargs)
    return whole(backend, settings, name)


@contextlib.contextmanager
def put_back(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Afterwards, these tensors and the random states are what they were before."""
    kept = [(t, t.detach().clone()) for t in tensors if can_change(t)]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for t, old in kept:
                    # A write, be it of the same values, would invalidate what autograd keeps of a tensor for the user's own graphs.
                    if not torch.equal(_bits(t), _bits(old)):
                        t.copy_(old)


def can_change(t: torch.Tensor) -> bool:
    """Whether the tensor can be written to: it is there, is no other's view many times over, and is not sealed by inference mode."""
    if is_lazy(t) or t.device.type == "meta" or t.layout != torch.strided or t.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return all(step or size < 2 for step, size in zip(t.stride(), t.shape, strict=True))


def _bits(t: torch.Tensor) -> torch.Tensor:
    """As integers, which equal themselves where numbers do not."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(t.element_size())
    return t.detach() if width is None else t.detach().view(width)


def modules_of(fn: Any) -> list[torch.nn.Module]:
    """The modules that a program runs: itself, the one whose method it is, and those that it closes over or names as globals."""
    if isinstance(fn, torch.nn.Module):
        return [fn]
    if isinstance(fn, functools.partial):
        return [m for held in (fn.func, *fn.args, *fn.keywords.values()) for m in modules_of(held)]
    try:
        seen = inspect.getclosurevars(fn)
    except (TypeError, ValueError):  # no Python function, or a cell that is still empty
        return []
    held = {id(x): x for x in (getattr(fn, "__self__", None), *seen.nonlocals.values(), *seen.globals.values())}
    return [x for x in held.values() if isinstance(x, torch.nn.Module)]


def _as_written(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    return gm.forward


def whole(backend: Backend, settings: Settings, name: str) -> Plan:
    """The plans of a program's graphs as one."""
    plans = backend.plans
    if not plans:
        from kpt_torch.backend import detected

        here = profile(settings.hardware, torch.device("cpu")) if settings.hardware != "auto" else detected(torch.device("cpu"))
        none = tuple(backend.left) or ("Dynamo captured no graph: nothing in it computes with tensors.",)
        return Plan(name, settings.level, here.name, "torch", notes=none)
    first = max(plans, key=lambda p: len(p.sites) + len(p.skipped))  # a graph of sizes alone is on a CPU, whatever the program is on
    notes = tuple(dict.fromkeys(n for p in plans for n in p.notes)) + tuple(backend.left)
    if backend.foreign is not None and settings.given is not None:
        notes += tuple(f"The {settings.given.framework} plan names {s}, which has no counterpart here." for s in backend.foreign)
    elif settings.given is not None:
        met = {(s.path, s.op, s.fingerprint) for p in plans for s in (*p.sites, *p.skipped)}
        notes = tuple(n for n in notes if not n.startswith("The plan that was given names"))
        notes += tuple(
            f"The plan that was given names {s.op} at {s.path}{f' ({s.source})' if s.source else ''}, which this program does not have."
            for s in settings.given.sites
            if (s.path, s.op, s.fingerprint) not in met
        )
    if len(plans) > 1:
        why = f" ({'; '.join(backend.breaks)})" if backend.breaks else ""
        notes += (f"Dynamo breaks the program into {len(plans)} graphs{why}; each was rewritten on its own, and no site spans two.",)
    return dataclasses.replace(first, sites=tuple(s for p in plans for s in p.sites), skipped=tuple(s for p in plans for s in p.skipped),
                               notes=notes)  # fmt: skip


class Optimized:
    """A function with kernels in place of what they compute. Made by `optimize`; call it like the original."""

    def __init__(self, fn: Callable[..., Any], settings: Settings):
        self._fn, self._settings = fn, settings
        functools.update_wrapper(self, fn, updated=())
        self._run, self._backend = compiled(fn, self._settings, self._name)

    @property
    def _name(self) -> str:
        return getattr(self._fn, "__name__", "function")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def __reduce__(self) -> Any:
        return Optimized, (self._fn, self._settings)

    def __deepcopy__(self, memo: dict) -> Optimized:
        return Optimized(copy.deepcopy(self._fn, memo), self._settings)

    def _kpt_with(self, change: Callable[[Settings], Settings]) -> Optimized:
        return Optimized(self._fn, change(self._settings))

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """The plan for these inputs."""
        buffers = [b for m in modules_of(self._fn) for b in m.buffers()]
        return planned(self._fn, self._settings, self._name, args, kwargs, buffers)

    _kpt_plan = plan

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)  # a method, where a class holds it

    def explain(self, *args: Any, **kwargs: Any) -> str:
        """The plan for these inputs in words."""
        return self.plan(*args, **kwargs).explain()

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The function as it was given."""
        return self._fn(*args, **kwargs)


# -- modules -------------------------------------------------------------------------------------------------------------------


def without(optimized: Any, kernels: Mapping[str, str]) -> Any:
    """The same, planned anew: without these kernels, for the reasons given, and by what was measured meanwhile."""
    return optimized._kpt_with(lambda settings: settings.without(kernels))


def leaving(optimized: Any, sites: Mapping[str, str]) -> Any:
    """The same, with these sites, by path, left as they were written, for the reasons given."""
    return optimized._kpt_with(lambda settings: dataclasses.replace(settings, banned={**settings.banned, **sites}))


def unproved(optimized: Any) -> Any:
    """The same, whose plans run no kernel."""
    return optimized._kpt_with(lambda settings: dataclasses.replace(settings, certify="off"))


def _module(module: torch.nn.Module, settings: Settings) -> Any:
    """An instance of a subclass of the module's class with a rewritten forward. All that the module holds is the same: one `__dict__`."""
    base: Any = type(module)
    written = _forward(module)
    run, backend = compiled(written, settings, base.__name__)

    @functools.wraps(written)  # callers ask what arguments it takes
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self, *args, **kwargs)

    def again(self: Any, protocol: Any = None) -> Any:
        """For pickle: the class is made here, and cannot be found by name."""
        return _module, (as_base(self), settings)

    def deep(self: Any, memo: dict) -> Any:
        return _module(copy.deepcopy(as_base(self), memo), settings)

    def shallow(self: Any) -> Any:
        return _module(copy.copy(as_base(self)), settings)

    def with_(self: Any, change: Callable[[Settings], Settings]) -> Any:
        return _module(as_base(self), change(settings))

    def as_base(self: Any) -> Any:
        twin = object.__new__(base)
        here = vars(self)
        if "_kpt_forward" in here:
            here = {"forward" if k == "_kpt_forward" else k: v for k, v in here.items()}
        object.__setattr__(twin, "__dict__", here)
        return twin

    def plan_(self: Any, *args: Any, **kwargs: Any) -> Plan:
        """The plan for these inputs."""
        return planned(written, settings, base.__name__, (as_base(self), *args), kwargs, list(self.buffers()))

    def explain_(self: Any, *args: Any, **kwargs: Any) -> str:
        """The plan for these inputs in words."""
        return plan_(self, *args, **kwargs).explain()

    members: dict[str, Any] = {"forward": forward, "__doc__": base.__doc__, "__module__": base.__module__, "__reduce_ex__": again,
               "__deepcopy__": deep, "__copy__": shallow, "_kpt_original": as_base, "_kpt_backend": backend, "_kpt_plan": plan_,
               "_kpt_with": with_}  # fmt: skip
    for name, method in (("plan", plan_), ("explain", explain_)):
        if not hasattr(base, name):
            members[name] = method
    made = object.__new__(type(base)(base.__name__, (base,), members))
    here = vars(module)
    if "forward" in here:  # which would go before that of the class
        here = {"_kpt_forward" if k == "forward" else k: v for k, v in here.items()}
    object.__setattr__(made, "__dict__", here)
    _shard_alike(made, module)
    return made


def _forward(module: torch.nn.Module) -> Callable[..., Any]:
    """What a call of the module runs, as a function of it: its class's `forward`, or one that somebody gave to it alone."""
    own = vars(module).get("forward")
    if own is None:
        return type(module).forward
    if isinstance(own, types.MethodType) and own.__self__ is module:
        return own.__func__
    return lambda self, *args, **kwargs: own(*args, **kwargs)


def _shard_alike(made: torch.nn.Module, module: torch.nn.Module) -> None:
    """Gives `made` what FSDP2 knows of `module`, which it keeps beside modules, by identity: its hooks came along with the rest."""
    if torch.distributed.is_available():
        from torch.distributed import _composable_state as kept

        state = kept._get_module_state(module)
        if state is not None:
            kept._insert_module_state(made, state)
