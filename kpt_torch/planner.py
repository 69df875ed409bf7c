"""PyTorch as a front end of the planner: proofs by running both sides, and the rewrite of a graph by what is planned."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from kpt import ops
from kpt.fusion.program import Match, Program
from kpt.fusion.site import fingerprint, leaf_values, specs_of
from kpt.kernels import KernelSpec
from kpt.kernels.validate import validate
from kpt.ops.base import Spec
from kpt.ops.mask import Bias, Explicit
from kpt.strategy.certify import Leaves, Sides, certify_site, moving_leaves, rounds_on_the_way
from kpt.strategy.explain import LINEAR, SHARING, apart, joined, paired
from kpt.strategy.planner import Planner
from kpt.tuning.settings import Setting
from kpt.validation import Certificate
from kpt_torch.apply import Eager, Rewrite, Unavailable, misplaced, positions, rebuilt
from kpt_torch.capture import from_numpy, to_numpy
from kpt_torch.lower import aten
from kpt_torch.on_device import OnDevice
from kpt_torch.pairs import found as kept_together
from kpt_torch.pairs import read_by_linear
from kpt_torch.settings import SETTINGS

log = logging.getLogger("kpt")

# What a provider calls: a site that is this call already gains nothing by it.
ONE_CALL = {
    "attention.sdpa": aten.scaled_dot_product_attention.default, "layer_norm.torch": aten.layer_norm.default,
    "cross_entropy.torch": aten.cross_entropy_loss.default,
}  # fmt: skip


_SDPA = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclasses.dataclass(eq=False)
class Front:
    """One lowered graph, for the planner to prove its sites by."""

    module: fx.GraphModule
    captured: Any  # a `Captured`
    device: torch.device
    framework: str = "torch"
    packages: tuple[str, ...] = ("torch", "triton", "transformers", "numpy")
    compilers: tuple[str, ...] = ("torch", "triton")
    settings: tuple[Setting, ...] = SETTINGS

    @property
    def arrays(self) -> OnDevice:
        return OnDevice(self.device)

    def backend(self) -> str:
        return str(self.device.type)

    def rules_text(self, program: Program, match: Match) -> str:
        """Autograd's rules are those of the ops; a rule of the user's (`autograd.Function`) is opaque. Autocast counts as code."""
        at = [self.captured.autocast.get(n.payload, {}) for n in program.consumed(match)]
        return repr(sorted({repr(sorted(map(repr, a.items()))) for a in at}))

    def uncertifiable(self, program: Program, match: Match) -> str | None:
        return rounds_on_the_way(program, match)

    def ahead(self, chosen: Iterable[tuple[Match, Callable[..., Any]]]) -> None:
        """Triton's compiler takes longer than all else in planning: what both passes of kernels launch is compiled side by side."""
        calls = {(id(fn), repr(specs), repr(m.params)): (fn, specs, m.params) for m, fn in chosen
                 if hasattr(fn, "ahead") for specs in (specs_of(m),)}  # fmt: skip
        if self.device.type != "cuda" or torch.version.hip or not calls:
            return
        from kpt_torch.triton_kernels.launch import compiled_ahead

        with compiled_ahead(self.device):
            for fn, specs, params in calls.values():
                try:
                    fn.ahead(specs, params, self.device)
                except Exception as problem:  # then what it launches is compiled when it is launched
                    log.info("%s was not compiled ahead: %s", fn, problem)

    def certify(self, program: Program, match: Match, kernel: Callable[..., Any], example: Mapping[int, Any] | None) -> Certificate:
        return certify_site(program, match, self.sides(program, match, kernel), example=example)

    def against_reference(self, match: Match, specs: dict[str, Spec], kernel: Callable[..., Any]) -> Certificate:
        run, run_vjp = calls(ops.op(match.op).differentiable, self.device)
        return validate(kernel, ops.op(match.op), specs, match.params, run=run, run_vjp=run_vjp)

    @contextlib.contextmanager
    def proving(self) -> Any:
        """Without cuDNN's attention: of a call's shapes it keeps the backward pass as it was made for the first layout of a cotangent, and
        runs that for every other (torch 2.11: gradients off by 140%). The layouts of a proof are not those of the program after it.
        """
        kind = self.device.type
        attention = sdpa_kernel(_SDPA) if kind == "cuda" else contextlib.nullcontext()
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(kind, enabled=False), attention:
            yield

    def sides(self, program: Program, match: Match, kernel: Callable[..., Any]) -> Sides:
        wrt = moving_leaves(program, match)
        made = {v for n in program.consumed(match) for v in n.outputs}

        def emission(leaves: Leaves, sites: Sequence[Any]) -> tuple[Eager, dict[int, torch.Tensor]]:
            given = {v: a.detach().clone() for v, a in leaves.items()}  # code may write into what it is given
            for v in wrt:
                given[v].requires_grad_()
            # A leaf may go by several names (a copy, a view of its own shape); the code may read it under any of them.
            named = {o: t for v, t in given.items() for o in program.env[v].origins if o not in made or o == v}
            e = Eager(self.captured, program, sites, named, self.device, module=self.module)
            e.by_formula(leaves)
            return e, given

        def side(sites: Sequence[Any]) -> Callable[..., Any]:
            def run(leaves: Leaves, cotangents: Sequence[torch.Tensor]) -> Any:
                e, given = emission(leaves, sites)
                outs = [e.value(v) for v in match.results]
                moving = [i for i, o in enumerate(outs) if o.requires_grad]
                grads: Sequence[Any] = [None] * len(wrt)
                if moving and wrt:
                    grads = torch.autograd.grad([outs[i] for i in moving], [given[v] for v in wrt],
                                                [cotangents[i].clone() for i in moving], allow_unused=True)
                shown = [torch.zeros_like(given[v]) if g is None else g for v, g in zip(wrt, grads, strict=True)]
                return [o.detach().clone() for o in outs], [g.clone() for g in shown]  # code may return the same memory again

            return run

        def of_op(leaves: Leaves) -> dict[str, torch.Tensor]:
            e, _ = emission(leaves, ())
            return {name: e.expr(x).detach() for name, x in match.arrays.items()}

        return Sides(side(()), side([(match, _bound(kernel, match))]), of_op, self.arrays)


def calls(differentiable: Sequence[str], device: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(run, run_vjp) for `kpt.kernels.validate`: a torch kernel on NumPy arrays."""

    def run(kernel: Callable[..., Any], arrays: Mapping[str, np.ndarray], params: Mapping[str, Any]) -> Any:
        out = kernel(**{n: from_numpy(a, device) for n, a in arrays.items()}, **params)
        return tuple(to_numpy(o) for o in (out if isinstance(out, tuple) else (out,)))

    def run_vjp(kernel: Callable[..., Any], arrays: Mapping[str, np.ndarray], params: Mapping[str, Any], cts: Any) -> dict[str, Any]:
        given = {n: from_numpy(a, device) for n, a in arrays.items()}
        wanted = [n for n in given if n in differentiable and given[n].is_floating_point()]
        for n in wanted:
            given[n].requires_grad_()
        out = kernel(**given, **params)
        outs = out if isinstance(out, tuple) else (out,)
        grads = torch.autograd.grad(outs, [given[n] for n in wanted], [from_numpy(c, device) for c in cts], allow_unused=True)
        return {n: to_numpy(torch.zeros_like(given[n]) if g is None else g) for n, g in zip(wanted, grads, strict=True)}

    return run, run_vjp


def _bound(kernel: Callable[..., Any], match: Match) -> Callable[..., Any]:
    """The kernel with its parameters, as a target of an FX node: autocast is off in it, for its arrays have been cast already."""
    params = dict(match.params)
    bind = getattr(kernel, "bind", None)
    bound = bind(**params) if bind is not None else functools.partial(kernel, **params)

    def site(**arrays: torch.Tensor) -> Any:
        if bind is not None:  # it sees to autocast itself
            return bound(**arrays)
        kind = next(iter(arrays.values())).device.type
        if not torch.is_autocast_enabled(kind):
            return bound(**arrays)
        with torch.autocast(kind, enabled=False):
            return bound(**arrays)

    site.__name__ = site.__qualname__ = f"kpt_{match.op}"
    return site


def rewritten(
    planner: Planner, front: Front, path: str, example: Sequence[Any] | None,
    steady: Callable[[Program, Match], str | None] = lambda program, match: None,
) -> fx.GraphModule | None:  # fmt: skip
    """The graph with the kernels that were chosen and proved; None where there are none.

    Args:
      example: real tensors for the graph's placeholders.
      steady: why a site does not hold for all sizes that the graph is for.
    """
    order = positions(front.module)

    def fits(program: Program, match: Match, kernel: KernelSpec) -> str | None:
        call = ONE_CALL.get(kernel.name)
        steps = {n.payload for n in program.consumed(match)}
        if call is not None and any(isinstance(n, fx.Node) and n.target is call and not _masked_by_words(n, match) for n in steps):
            return f"The original stays: it is one call of {call} already, which is what {kernel.name} would be."
        return misplaced(front.captured, program, match, order) or steady(program, match)

    planner.front = front
    program, kept = planner.sites_of(front.captured.graph, path, _Example(front, example).leaves, fits=fits)
    if not kept:
        return None
    sites = [(m, _bound(fn, m)) for m, fn in kept]

    def noted(beside: str, i: int, why: str) -> None:
        planner.notes.append(apart(kept[i][0].op, beside, why))

    pairs: dict[int, tuple[int, int, Any]] = {}
    for i, j in kept_together(front.captured, program, kept, order, front.device, functools.partial(noted, SHARING)):
        pairs[i] = pairs[j] = i, j, _bound(kept[i][1].pair, kept[i][0])  # type: ignore[attr-defined]
    if pairs:
        planner.notes.append(paired(len(pairs) // 2))
    layers = read_by_linear(front.captured, program, kept, order, front.device, functools.partial(noted, LINEAR))
    if layers:
        planner.notes.append(joined(len(layers)))
    read = {n: (i, _bound(kept[i][1].then_linear, kept[i][0])) for n, i in layers.items()}  # type: ignore[attr-defined]
    return rebuilt(Rewrite(front.module, front.captured, program, sites, pairs, read), front.device)


def _masked_by_words(n: fx.Node, match: Match) -> bool:
    """Whether the call reads a mask from an array that the site knows in words: causal, which costs a kernel half, not twice the work."""
    if n.target is not aten.scaled_dot_product_attention.default:
        return False
    given = n.args[3] if len(n.args) > 3 else n.kwargs.get("attn_mask")
    return given is not None and not any(isinstance(t, Explicit | Bias) for t in match.params["mask"].terms)


class _Example:
    """The values that a graph takes on the user's inputs, computed when a certificate first asks."""

    def __init__(self, front: Front, inputs: Sequence[Any] | None):
        self.front, self.inputs = front, inputs
        self.seen: set[str] = set()

    def leaves(self, program: Program, match: Match) -> dict[int, Any] | None:
        """Values of a match's leaves, for the first site of each shape of site; None where they are not known."""
        if self.inputs is None:
            return None
        print_ = fingerprint(program, match)
        if print_ in self.seen:
            return None
        self.seen.add(print_)
        captured = self.front.captured
        holders = [n for n in self.front.module.graph.nodes if n.op == "placeholder"]
        given = {captured.values[n].id: t.detach() for n, t in zip(holders, self.inputs, strict=True) if n in captured.values}
        e = Eager(captured, program, (), given, self.front.device, module=self.front.module, pure=True)
        try:
            with torch.no_grad():
                return {v: e.value(v) for v in leaf_values(program, match)}
        except Unavailable:
            return None
