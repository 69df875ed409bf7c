"""How JAX launches a Triton kernel: by the arguments that PyTorch launches it with, through jax-triton.

jax-triton tells the compiler nothing of an integer's divisors, and a row of 4096 would be read element by element where its length might be
4095. The sizes of arrays are known while JAX traces, so integers are constants of the kernel.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax_triton
import triton

from kpt_torch.triton_kernels.jitted import bounds
from pallas_kernels.manual_axes import vary_alike

Out = jax.ShapeDtypeStruct
"""Among the arguments of a kernel: an array that it writes."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """What tiles and grids go by.

    Attributes:
      family: as `bounds.family` names it.
      processors: multiprocessors.
      shared: bytes of shared memory on one of them; 0 where that is not known.
    """

    family: str
    processors: int
    shared: int


@functools.cache
def chip() -> Chip:
    """The GPU that jax has; where it has none, what Triton's interpreter is given: two processors, so that loops over rows turn twice."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return Chip("ampere", 2, 0)
    amd = "rocm" in device.client.platform_version
    major = 0 if amd else int(str(device.compute_capability).partition(".")[0])
    optin = getattr(device, "shared_memory_per_block_optin", 0)  # and 1 KiB that CUDA keeps for each block
    return Chip(bounds.family(major, amd), int(device.core_count), optin + 1024 if optin else 0)


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, stages: int | None = None, **constants: Any
) -> dict[str, jax.Array]:
    """Runs a kernel and returns what it wrote, by the names of its arguments.

    Args:
      arguments: those of the kernel that are no constants, in its order: arrays, numbers, None, and `Out` for an array that it writes.
    """
    named = dict(zip(kernel.arg_names, arguments, strict=False))
    out = {n: a for n, a in named.items() if isinstance(a, Out)}
    sizes = tuple(n for n, a in named.items() if isinstance(a, int))
    made = jax_triton.triton_call(
        kernel=_of_constant(kernel, sizes), grid=grid, out_type=list(out.values()), num_warps=warps, num_stages=stages,
        **{n: a for n, a in named.items() if n not in out}, **constants,
    )  # fmt: skip
    # Inside `shard_map` a kernel's results are typed as if all devices held the same.
    made = vary_alike(*made, *(a for a in arguments if isinstance(a, jax.Array)))[: len(out)]
    return dict(zip(out, made, strict=True))


def zeros(out: Any, *arrays: jax.Array) -> Any:
    """Zeros for every `Out` of a tree, where there is nothing to launch, typed as results of these arrays."""
    leaves, tree = jax.tree.flatten(out)
    made = vary_alike(*(jnp.zeros(a.shape, a.dtype) for a in leaves), *arrays)
    return jax.tree.unflatten(tree, made[: len(leaves)])


@functools.cache
def _of_constant(kernel: Any, names: tuple[str, ...]) -> Any:
    """The kernel, for which these arguments are constants. They follow its arrays: jax-triton counts alignments without constants."""
    fn = kernel.fn
    twin = types.FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    twin.__annotations__ = fn.__annotations__ | dict.fromkeys(names, "tl.constexpr")
    twin.__qualname__, twin.__module__ = fn.__qualname__, fn.__module__
    return triton.jit(twin)


def over_rows(fn: Callable[..., Any], shared: int = 0) -> Callable[..., Any]:
    """`fn` of arrays whose first axis is of rows, as that of its results is, but for the last `shared` arrays, which all rows share.

    What `vmap` maps over becomes part of the rows. Where it maps over an array that rows share, one call follows the other.
    """

    @jax.custom_batching.custom_vmap
    def call(*arrays: Any) -> Any:
        return fn(*arrays)

    @call.def_vmap
    def _(size: int, mapped: Any, *arrays: Any) -> Any:
        own = len(arrays) - shared
        if any(jax.tree.leaves(tuple(mapped)[own:])):
            return _one_by_one(call, size, mapped, arrays)

        def fold(a: jax.Array, is_mapped: bool) -> jax.Array:
            a = a if is_mapped else jnp.broadcast_to(a, (size, *a.shape))
            return a.reshape(a.shape[0] * a.shape[1], *a.shape[2:])

        out = call(*jax.tree.map(fold, arrays[:own], tuple(mapped)[:own]), *arrays[own:])
        return jax.tree.map(lambda a: a.reshape(size, a.shape[0] // size, *a.shape[1:]), out), jax.tree.map(lambda _: True, out)

    return call


def one_by_one(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` of arrays over which it sums: where `vmap` maps, one call follows the other."""

    @jax.custom_batching.custom_vmap
    def call(*arrays: Any) -> Any:
        return fn(*arrays)

    call.def_vmap(lambda size, mapped, *arrays: _one_by_one(call, size, mapped, arrays))
    return call


def _one_by_one(call: Callable[..., Any], size: int, mapped: Any, arrays: Any) -> Any:
    leaves, tree = jax.tree.flatten(arrays)
    moves = jax.tree.leaves(tuple(mapped))

    def at(moving: list[jax.Array]) -> Any:
        queue = iter(moving)
        return call(*jax.tree.unflatten(tree, [next(queue) if m else a for a, m in zip(leaves, moves, strict=True)]))

    out = jax.lax.map(at, [a for a, m in zip(leaves, moves, strict=True) if m])
    return out, jax.tree.map(lambda _: True, out)


def as_rows(a: jax.Array) -> jax.Array:
    """The array as a matrix, `[rows, last dim]`."""
    return a.reshape(math.prod(a.shape[:-1]), a.shape[-1])
