"""The bridge to XLA devices: kernels that are written in JAX, called with PyTorch tensors, forward and backward.

`run` is the one place that knows how a JAX function meets torch_xla; another package that runs JAX functions on tensors joins there.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch

import kpt
from kpt.errors import KernelError, MissingDependencyError
from kpt.install import install


def run(fn: Callable[..., Any], tensors: Sequence[torch.Tensor], key: str) -> list[torch.Tensor]:
    """The arrays that a JAX function makes of tensors on an XLA device, as tensors there.

    Args:
      fn: of arrays, returns a flat list of arrays. Traced once for each shape and dtype.
      key: names `fn`: functions of one key are one function.

    Raises:
      MissingDependencyError: torch_xla or jax is not installed.
      KernelError: a tensor is on another device, or the function calls kernels that are not for this one.
    """
    if missing := [n for n in ("torch_xla", "jax") if importlib.util.find_spec(n) is None]:
        raise MissingDependencyError("A JAX kernel was called with PyTorch tensors", f"{missing[0]} is not installed", install("xla"))
    if other := [t.device for t in tensors if t.device.type != "xla"]:
        raise KernelError(
            f"A kernel for XLA devices was called with a tensor on {other[0]}", "All tensors are on one XLA device",
            "Move module and inputs there: x.to('xla'), after import torch_xla",
        )  # fmt: skip
    from torch_xla.core import xla_builder, xla_model

    kind = xla_model.xla_device_kind(tensors[0].device) if tensors else ""
    try:
        made = xla_builder.call_jax(_on(kind, fn), tuple(tensors), override_hash=f"{key} {kind}")
    except ValueError as error:
        if "Only interpret mode is supported" not in str(error):  # what jax says of a kernel for another kind of chip
            raise
        raise KernelError(f"A Pallas kernel was called on {kind or 'a device without name'}", "It is compiled for TPUs alone",
                          "Take a kernel in plain JAX here, such as rms_norm.xla; `kpt kernels list` has them all") from error  # fmt: skip
    return list(made) if isinstance(made, tuple | list) else [made]


def _on(kind: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it is traced for a chip: torch_xla holds the TPU, so that what a kernel asks jax about its chip is told here."""
    if not kind.startswith("TPU"):
        return fn
    import jax

    about = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform="tpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=about)

    def traced(*arrays: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh):
            return fn(*arrays)

    return traced


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel with its parameters, as a function of the tensors that an op's arrays name.

    Attributes:
      name: in kpt's registry, "rms_norm.pallas_tpu".
      params: of the op.
    """

    name: str
    params: tuple[tuple[str, Any], ...] = ()

    def __call__(self, **tensors: torch.Tensor | None) -> Any:
        """The op's results. Gradients flow to tensors that ask for them, and only these are computed.

        Raises:
          MissingDependencyError: torch_xla or jax is not installed.
          KernelError: a tensor is not on an XLA device, or the kernel refuses the call.
        """
        given = {n: t for n, t in tensors.items() if t is not None}
        differentiable = kpt.ops.op(kpt.registry.get(self.name).op).differentiable
        wanted = torch.is_grad_enabled()
        moving = tuple(n for n, t in given.items() if wanted and n in differentiable and t.requires_grad)
        call = _call(self.name, self.params, tuple(given), moving)
        made = _Differentiable.apply(call, *given.values()) if moving else tuple(call.forward(list(given.values())))
        return made[0] if len(made) == 1 else made


def kernel(name: str, **params: Any) -> Kernel:
    """A kernel of kpt's registry for tensors on an XLA device.

    Args:
      name: "attention.pallas_tpu", or a kernel in plain JAX, "attention.xla".
      params: of the op: strings, numbers, a `kpt.ops.Mask`.

    Raises:
      KernelError: there is no such kernel, or it is none for JAX.

    Example: `kernel("rms_norm.pallas_tpu", eps=1e-5)(x=x, weight=weight)`
    """
    spec = kpt.registry.get(name)
    if spec.framework != "jax":
        raise KernelError(f"{name} was asked for on an XLA device", f"It is a kernel for {spec.framework}", "See `kpt kernels list`")
    return Kernel(name, tuple(sorted(params.items())))


class _Call:
    """The JAX functions of one kernel, its parameters, the arrays that are there, and those that want a gradient."""

    def __init__(self, name: str, params: tuple[tuple[str, Any], ...], names: tuple[str, ...], moving: tuple[str, ...]):
        self.name, self.names, self.moving, self.params = name, names, moving, dict(params)
        self.key = f"kpt {name} {params} {names} {moving}"
        self.pulls: dict[Any, Any] = {}  # by shapes and dtypes: how results and what is kept for the backward pass are laid out

    def _function(self, arrays: Any) -> tuple[Any, ...]:
        out = kpt.registry.load(self.name)(**arrays, **self.params)
        return out if isinstance(out, tuple) else (out,)

    def forward(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return run(self._forward, tensors, f"{self.key} forward")

    def _forward(self, *arrays: Any) -> list[Any]:
        return list(self._function(dict(zip(self.names, arrays, strict=True))))

    def forward_and_kept(self, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        made = run(self._forward_and_kept, tensors, f"{self.key} kept")
        count = self.pulls[_signature(tensors)][0]
        return made[:count], made[count:]

    def _forward_and_kept(self, *arrays: Any) -> list[Any]:
        import jax

        given = dict(zip(self.names, arrays, strict=True))
        still = {n: a for n, a in given.items() if n not in self.moving}
        out, pull = jax.vjp(lambda moving: self._function(moving | still), {n: given[n] for n in self.moving})
        kept, layout = jax.tree.flatten(pull)
        self.pulls[_signature(arrays)] = len(out), layout
        return [*out, *kept]

    def backward(self, signature: Any, kept: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        function = self._backward(signature, len(kept))
        return run(function, [*kept, *cotangents], f"{self.key} {signature} backward")

    def _backward(self, signature: Any, kept: int) -> Callable[..., list[Any]]:
        layout = self.pulls[signature][1]

        def pull(*arrays: Any) -> list[Any]:
            import jax

            gradients = jax.tree.unflatten(layout, arrays[:kept])(tuple(arrays[kept:]))[0]
            return [gradients[n] for n in self.moving]

        return pull


def _signature(arrays: Sequence[Any]) -> tuple[Any, ...]:
    return tuple((tuple(a.shape), str(a.dtype).removeprefix("torch.")) for a in arrays)


@functools.cache
def _call(name: str, params: tuple[tuple[str, Any], ...], names: tuple[str, ...], moving: tuple[str, ...]) -> _Call:
    return _Call(name, params, names, moving)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: torch.Tensor) -> Any:
        made, kept = call.forward_and_kept(tensors)
        ctx.call, ctx.signature = call, _signature(tensors)
        ctx.save_for_backward(*kept)
        return tuple(made)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        gradients = dict(zip(ctx.call.moving, ctx.call.backward(ctx.signature, ctx.saved_tensors, cotangents), strict=True))
        return None, *(gradients.get(n) for n in ctx.call.names)
