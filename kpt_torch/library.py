"""Kernels as `torch.library` custom ops: the op, its backward pass as an op of its own, fake implementations, autograd.

    rms_norm = library.kernel("rms_norm", "triton", forward, backward, kept=lambda specs, params: (Spec(rows, "float32"),))
    y = rms_norm(x=x, weight=weight, eps=1e-5)          # what a KernelSpec's loader names

A custom op takes tensors, optional tensors and strings; the parameters of an op, masks included, travel as JSON text, so that one
compiled graph holds one set of them. Shapes of results come from the op's own shape rule (`kpt.ops`), so that a kernel says
only what it keeps for its backward pass.

Where nobody traces and no transformation is under way, the custom op is passed by: the dispatcher and its Python take 0.2 ms for a
kernel's two passes (`python -m kpt_torch.bench_overhead`), and a model of 16 layers has 65. The same functions
then run under a `torch.autograd.Function`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from kpt import ops
from kpt.errors import KernelError
from kpt.ops.base import Op, Spec
from kpt.ops.shapes import keywords
from kpt.strategy import wire
from kpt_torch.one_by_one import of_older_vmap, of_vmap

Tensors = dict[str, torch.Tensor]
Forward = Callable[[Tensors, dict[str, Any]], tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]]
Backward = Callable[..., Mapping[str, torch.Tensor]]
Early = Callable[[Tensors, Sequence[str]], str]
Kept = Callable[[dict[str, Spec], dict[str, Any]], Sequence[Spec]]
_LIBRARY = torch.library.Library("kpt", "FRAGMENT")
PLAIN = (torch.Tensor, torch.nn.Parameter)


def dtype_name(dtype: torch.dtype) -> str:
    """The neutral name of a torch dtype: "bfloat16", "bool"."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a neutral name."""
    return getattr(torch, name)


def spec_of(tensor: torch.Tensor) -> Spec:
    return Spec(tuple(tensor.shape), dtype_name(tensor.dtype))


def kernel(
    op: str | Op, provider: str, forward: Forward, backward: Backward | None = None, kept: Kept = lambda specs, params: (),
    early: Early | None = None, reads: Sequence[int] = (), fresh: bool = False,
) -> Callable[..., Any]:
    """A provider of `op`: a function of its arrays and parameters by keyword, behind the custom op `kpt::<op>_<provider>`.

    Args:
      op: by name; or, for calls that no program is searched for, itself.
      forward: `forward(arrays, params) -> (results, kept)`: `arrays` holds those that were given, `params` all of the op's, defaults
        filled in. `kept` is what the backward pass reads besides arrays and results. No result may be a view of an array.
      backward: `backward(arrays, params, results, kept, cotangents, wanted) -> {name: gradient}`: for at least the arrays named in
        `wanted`, in their shape and dtype. A cotangent is zeros where nothing depends on the result. None: not differentiable.
      kept: the specs of what `forward` keeps. Shapes may hold symbolic sizes.
      early: `early(arrays, names) -> text`: what `forward` keeps where gradients of the arrays `names` can be asked for, and no others:
        some of them made already, perhaps. It is told by `params["early"]`, "" where there will be no gradients. `backward` may write
        over what was kept where `params["last"]`: autograd is about to free it, and nobody else has it. Gradients are in the layout of
        their arrays.
      reads: the numbers of the results that `backward` reads, by which it is given them, where there are so many. Others are not saved
        for it: the program may write into them.
      fresh: results, what is kept and gradients are new memory, each its own, whatever the arrays are; else that is looked after.

    `forward` and `backward` run with autocast off and gradients off, on tensors as they come: strided, on any device.
    """
    meaning = op if isinstance(op, Op) else ops.op(op)
    read = functools.lru_cache(maxsize=256)(functools.partial(_params, meaning))
    names = (*meaning.arrays, *meaning.optional)
    tensors = ", ".join([f"Tensor {n}" for n in meaning.arrays] + [f"Tensor? {n}" for n in meaning.optional])
    name = f"kpt::{meaning.name}_{provider}"

    def run(*given: Any) -> list[torch.Tensor]:
        arrays = _arrays(names, given[:-1])
        with _plain(arrays):
            made, saved = forward(arrays, read(given[-1]))
        # Contiguous: what the fake implementation says. And autograd forbids writes into a view that a function made.
        whole = [torch.ops.aten._unsafe_view(t, t.shape) if t._is_view() else t for t in (t.contiguous() for t in (*made, *saved))]
        return whole if fresh else _apart(whole, given[:-1])

    def fake(*given: Any) -> list[torch.Tensor]:
        arrays, params = _arrays(names, given[:-1]), read(given[-1])
        specs = {n: spec_of(t) for n, t in arrays.items()}
        device = next(iter(arrays.values())).device
        meant = {n: params[n] for n in meaning.params}
        return [_empty(s, device) for s in (*meaning.infer(specs, **meant), *kept(specs, params))]

    definition = torch.library.custom_op(name, run, mutates_args=(), schema=f"({tensors}, str params) -> Tensor[]")
    definition.register_fake(fake)
    straight: Callable[..., Any] = definition
    if backward is not None:
        keep, pull = _differentiable(definition, meaning, names, tensors, backward, early is not None, reads, fresh, read)
        straight = _straight(name, run, keep, pull)

    def bind(**chosen: Any) -> Callable[..., Any]:
        """The kernel with these parameters, of its arrays."""
        texts = {"": _encoded(chosen | {"early": ""} if early is not None else chosen)}

        def bound(**arrays: torch.Tensor | None) -> Any:
            inputs, making = [arrays.get(n) for n in names], ""
            given = [n for n, t in zip(names, inputs, strict=True) if t is not None]
            if early is not None and torch.is_grad_enabled():
                moving = [n for n in given if n in differentiable and arrays[n].requires_grad]  # type: ignore[union-attr]
                making = early({n: arrays[n] for n in given}, moving) if moving else ""  # type: ignore[misc]
            if making not in texts:
                texts[making] = _encoded(chosen | {"early": making})
            if forward_ad._current_level >= 0 and any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in inputs):
                raise _no_forward_mode(name)
            made = (straight if nobody_watches(inputs) else definition)(*inputs, texts[making])
            count = _results(given)
            return made[0] if count == 1 else tuple(made[:count])

        return bound

    differentiable = frozenset(meaning.differentiable)

    @functools.wraps(forward)
    def call(**given: Any) -> Any:
        keywords(meaning, given)
        return bind(**{k: v for k, v in given.items() if k not in names})(**{n: given[n] for n in names if n in given})

    def ahead(specs: Mapping[str, Spec], chosen: Mapping[str, Any], device: torch.device) -> None:
        """Both passes on arrays without memory, for what they launch to be compiled (`launch.compiled_ahead`)."""
        with FakeTensorMode(), torch.no_grad():
            arrays = {n: _empty(s, device) for n, s in specs.items()}
            moving = [n for n in names if n in meaning.differentiable and n in arrays and arrays[n].is_floating_point()]
            params = {**meaning.params, **chosen} | ({"early": early(arrays, moving)} if early is not None else {})
            with _plain(arrays):
                made, saved = forward(arrays, params)
                if backward is not None:
                    read_again = {i: made[i] for i in reads if i < len(made)}
                    # Of losses as of their mean, where nothing of its values is asked; else with memory of its own.
                    cotangents = [t.new_empty(()).expand(t.shape) if "labels" in arrays else torch.empty_like(t) for t in made]
                    backward(arrays, params | {"last": False}, read_again, saved, cotangents, moving)

    call.__name__ = call.__qualname__ = meaning.name
    call.ahead = ahead  # type: ignore[attr-defined]
    call.definition = definition  # type: ignore[attr-defined]  # for opcheck
    call.bind = bind  # type: ignore[attr-defined]  # for a site, whose parameters stay the same
    return call


def _no_forward_mode(name: str) -> KernelError:
    return KernelError(f"A forward derivative was asked for through {name}", "A kernel has a backward pass only",
                       "Differentiate the module as it was written; what kpt_torch.optimize makes of it runs so by itself")  # fmt: skip


def _straight(name: str, run: Callable[..., list[torch.Tensor]], keep: Callable[..., None], pull: Callable[..., Any]) -> Callable[..., Any]:
    """The custom op `name` without the dispatcher.

    What is kept for the backward pass and is no result stays with the node of autograd alone, so that nobody else can hold what is
    written over, but where saved tensors have hooks: whoever set them (a checkpoint, say) is to see everything, and may hold it.
    """

    def forward(ctx: Any, *given: Any) -> tuple[torch.Tensor, ...]:
        made = run(*given)
        keep(ctx, given, made, alone=not _saved_tensors_are_seen())
        return tuple(made[: ctx.count])

    def backward(ctx: Any, *cotangents: Any) -> Any:
        return pull(ctx, cotangents)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    made: Any = type(name.removeprefix("kpt::"), (torch.autograd.Function,), members)
    return super(torch.autograd.Function, made).apply  # without its look for transformations of `torch.func`: there are none


def nobody_watches(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether these are plain tensors with memory, and neither a tracer, a mode nor a transformation of `torch.func` is to see the op.

    By their dispatch keys: other ones have tensors without memory, with a lazy sign or conjugation, batched and wrapped ones.
    """
    if _is_compiling() or _is_tracing() or _modes() or _function_modes() or _early_modes() or _transformed() is not None:
        return False
    for t in tensors:  # no generator: that takes twice as long, and this is on the way of every call
        if t is not None and (type(t) not in PLAIN or _keys(t).raw_repr() not in _PLAIN_KEYS and not _is_memory(t)):
            return False
    return True


# Found once: to look them up takes as long as to call them.
_is_compiling, _is_tracing, _keys = torch.compiler.is_compiling, torch.jit.is_tracing, torch._C._dispatch_keys
_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_early_modes, _transformed = torch._ops._len_torch_dispatch_stack_pre_dispatch, torch._C._functorch.peek_interpreter_stack
_PLAIN_KEYS: set[int] = set()
"""The dispatch keys of tensors that are nothing but memory, of the devices that were met."""


def _is_memory(t: torch.Tensor) -> bool:
    """Whether a tensor has the dispatch keys of a new one on its device, made in or outside of inference mode; then they are known."""
    if t.device.type == "meta":
        return False
    for mode in (False, True):
        with torch.inference_mode(mode):
            _PLAIN_KEYS.add(_keys(torch.empty(1, device=t.device)).raw_repr())
    return _keys(t).raw_repr() in _PLAIN_KEYS


def _differentiable(
    definition: Any, op: Op, names: Sequence[str], tensors: str, backward: Backward, early: bool, reads: Sequence[int], fresh: bool,
    read: Callable[[str], dict[str, Any]],
) -> tuple[Callable[..., None], Callable[..., Any]]:
    """Gives the custom op its derivative; returns what keeps for it, `keep(ctx, inputs, output)`, and `pull(ctx, cotangents)`."""
    moving = [n for n in names if n in op.differentiable]

    def split(given: Sequence[Any]) -> Any:
        arrays, (made, cotangents, params, wanted) = _arrays(names, given[: len(names)]), given[len(names) :]
        return arrays, read(params), *parted(made, len(cotangents)), cotangents, tuple(wanted.split())

    def parted(made: Sequence[torch.Tensor], count: int) -> tuple[dict[int, torch.Tensor], Sequence[torch.Tensor]]:
        """What was saved: (the results that are read, of `count`, by number; what was kept)."""
        numbers = [i for i in reads if i < count]
        return dict(zip(numbers, made, strict=False)), made[len(numbers) :]

    def run(*given: Any) -> list[torch.Tensor]:
        arrays, params, outs, kept, cotangents, wanted = split(given)
        found = pulled_back(arrays, params, outs, kept, cotangents, wanted)
        return _apart(found, [*arrays.values(), *outs.values(), *kept, *cotangents])

    def pulled_back(
        arrays: Tensors, params: dict[str, Any], outs: Any, kept: Any, cotangents: Any, wanted: Sequence[str]
    ) -> list[torch.Tensor]:
        with _plain(arrays):
            found = backward(arrays, params, outs, kept, cotangents, wanted)
        made = [t if (t := found[n]).dtype == arrays[n].dtype else t.to(arrays[n].dtype) for n in wanted]
        return [_laid_out(t, arrays[n]) for n, t in zip(wanted, made, strict=True)] if early else [t.contiguous() for t in made]

    def fake(*given: Any) -> list[torch.Tensor]:
        arrays, _, _, _, _, wanted = split(given)
        if early:
            return [torch.empty_like(arrays[n]) for n in wanted]
        return [torch.empty(arrays[n].shape, dtype=arrays[n].dtype, device=arrays[n].device) for n in wanted]

    schema = f"({tensors}, Tensor[] made, Tensor[] cotangents, str params, str wanted) -> Tensor[]"
    pulled = torch.library.custom_op(f"{definition._qualname}_backward", run, mutates_args=(), schema=schema)
    pulled.register_fake(fake)

    def hold(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.present = [n for n, t in zip(names, inputs, strict=False) if t is not None]
        made, cotangents, ctx.params, ctx.wanted = inputs[len(names) :]
        ctx.made = len(made)
        ctx.save_for_backward(*(t for t in inputs[: len(names)] if t is not None), *cotangents)

    @torch.compiler.disable
    def twice(ctx: Any, slopes: Sequence[torch.Tensor | None]) -> Any:
        from kpt_torch.formulas import FORMULAS, pulled_back

        formula = FORMULAS.get(op.name)
        if formula is None:
            raise KernelError(f"A gradient of a gradient was asked for through {definition._qualname}", "A kernel's backward pass has none",
                              "Differentiate the module as it was written: kpt_torch.optimize leaves it unchanged")  # fmt: skip
        arrays, cotangents = dict(zip(ctx.present, ctx.saved_tensors, strict=False)), ctx.saved_tensors[len(ctx.present) :]
        wanted, params, floats = ctx.wanted.split(), read(ctx.params), [n for n in ctx.present if n in moving]

        def first(*given: torch.Tensor) -> Sequence[torch.Tensor]:
            at, above = arrays | dict(zip(floats, given, strict=False)), given[len(floats) :]
            return pulled_back(lambda *x: formula(at | dict(zip(wanted, x, strict=True)), params), [at[n] for n in wanted], above)

        given = [*(arrays[n] for n in floats), *cotangents]
        with _plain(arrays):
            dense = [torch.zeros_like(arrays[n]) if s is None else s for n, s in zip(wanted, slopes, strict=True)]
            found = pulled_back(first, given, dense)
        of = dict(zip(floats, found, strict=False))
        return (*(of.get(n) for n in names), [None] * ctx.made, list(found[len(floats) :]), None, None)

    pulled.register_autograd(twice, setup_context=hold)
    pulled.register_vmap(functools.partial(of_vmap, pulled))
    _LIBRARY.impl(pulled._name, functools.partial(of_older_vmap, pulled), "Batched")

    def keep(ctx: Any, inputs: tuple, output: list[torch.Tensor], alone: bool = False) -> None:
        ctx.set_materialize_grads(False)  # what was kept has no cotangent, and may be large
        ctx.params, ctx.present = inputs[-1], [n for n, t in zip(names, inputs, strict=False) if t is not None]
        ctx.count, ctx.spent = _results(ctx.present), False
        ctx.alone = output[ctx.count :] if alone else None
        ctx.like = [(t.shape, t.dtype, t.device) for t in output[: ctx.count]] if ctx.count > 1 else ()
        seen = [*(output[i] for i in reads if i < ctx.count), *(() if alone else output[ctx.count :])]
        ctx.save_for_backward(*(t for t in inputs[:-1] if t is not None), *seen)

    def plainly(ctx: Any, cotangents: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        arrays = dict(zip(ctx.present, saved, strict=False))
        made = [*saved[len(ctx.present) :], *(ctx.alone or ())]
        if all(c is None for c in cotangents[: ctx.count]):  # nothing depends on a result
            return (None,) * (len(names) + 1)
        given = [zeros(*ctx.like[i]) if c is None else c for i, c in enumerate(cotangents[: ctx.count])]
        wanted = [n for n, need in zip(names, ctx.needs_input_grad, strict=False) if need and n in arrays and n in moving]
        if ctx.spent:
            raise KernelError(f"A second backward pass was run through {definition._qualname}", "The first one failed half way, and had "
                              "written over what it read", "Run the forward pass again")  # fmt: skip
        freed = _about_to_be_freed()
        # What stayed with the node of autograd is what the forward pass had looked at.
        if not torch.is_grad_enabled() and nobody_watches(given if ctx.alone is not None else [*made, *arrays.values(), *given]):
            ctx.spent = freed and ctx.alone is not None
            outs, kept = parted(made, ctx.count)
            gradients = pulled_back(arrays, read(ctx.params) | {"last": ctx.spent}, outs, kept, given, wanted)
            if not fresh:
                gradients = _apart(gradients, [*arrays.values(), *outs.values(), *given])
        else:
            gradients = pulled(*(arrays.get(n) for n in names), made, given, ctx.params, " ".join(wanted))
        if freed:
            ctx.alone = None  # as autograd frees what it saved
        found = dict(zip(wanted, gradients, strict=True))
        return (*(found.get(n) for n in names), None)

    def zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    untold = torch.compiler.disable(plainly)

    def pull(ctx: Any, cotangents: Sequence[torch.Tensor | None]) -> tuple[Any, ...]:
        """Autograd calls it, within a function of the user's, too, that Dynamo runs: this is no code of theirs."""
        return (plainly if _dynamo_is_off() else untold)(ctx, cotangents)

    definition.register_autograd(pull, setup_context=keep)
    return keep, pull


_dynamo: Any = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", None)  # private; without it Dynamo is taken to be on


def _dynamo_is_off() -> bool:
    """Whether no frame of this thread is looked at by Dynamo."""
    return _dynamo is not None and _dynamo() is None


def _saved_tensors_are_seen() -> bool:
    """Whether tensors that autograd saves here go through hooks."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # private; without it they are taken to
    return top is None or top(True) is not None


def _about_to_be_freed() -> bool:
    """Whether this is the last that anyone sees of what a node of autograd saved: there will be no second backward pass."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # private; without it nothing is written over
    return keeps is not None and not keeps()


def _laid_out(gradient: torch.Tensor, array: torch.Tensor) -> torch.Tensor:
    """The gradient with the strides of `empty_like(array)`."""
    if gradient.stride() == array.stride() and (array.is_contiguous() or array.dim() == 2 and array.t().is_contiguous()):
        return gradient
    like = torch.empty_like(array, device="meta")
    return gradient if gradient.stride() == like.stride() else torch.empty_like(array).copy_(gradient)


def _apart(made: list[torch.Tensor], given: Sequence[Any]) -> list[torch.Tensor]:
    """The results with memory of their own each, as custom ops promise."""
    taken = {t.untyped_storage()._cdata for t in given if t is not None}  # which tells empty ones apart, too
    out = []
    for t in made:
        place = t.untyped_storage()._cdata
        out.append(t.clone() if place in taken else t)
        taken.add(place)
    return out


def _empty(spec: Spec, device: torch.device) -> torch.Tensor:
    return torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device=device)


def _arrays(names: Sequence[str], given: Sequence[Any]) -> Tensors:
    return {n: t for n, t in zip(names, given, strict=True) if t is not None}


def _results(names: Any) -> int:
    """How many an op has of these arrays: a norm returns the sum that it normalised, and a pair is two calls."""
    return 2 if "residual" in names or "other" in names else 1


def _encoded(params: Mapping[str, Any]) -> str:
    return _text(tuple((n, type(p), p) for n, p in params.items()))  # 1 is equal to True


@functools.lru_cache(maxsize=1024)
def _text(params: tuple[tuple[str, type, Any], ...]) -> str:
    return json.dumps(wire.encode({n: p for n, _, p in params}), sort_keys=True)


@functools.lru_cache(maxsize=1024)
def _decoded(text: str) -> Mapping[str, Any]:
    return wire.decode(json.loads(text))


def _params(op: Op, text: str) -> dict[str, Any]:
    return {**op.params, **_decoded(text)}


@functools.cache
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


class _plain:
    """Autocast off for the device of the arrays: a kernel is given the dtypes that it is to compute in."""

    def __init__(self, arrays: Tensors):
        device = next(iter(arrays.values())).device.type
        self.off = device if _has_autocast(device) and torch.is_autocast_enabled(device) else None

    def __enter__(self) -> None:
        if self.off is not None:  # the switch alone: a context would look after the cache of casts, too
            torch.set_autocast_enabled(self.off, False)

    def __exit__(self, *error: Any) -> None:
        if self.off is not None:
            torch.set_autocast_enabled(self.off, True)
