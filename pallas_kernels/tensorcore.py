"""What the Pallas kernels for TPU share: the chip they are traced for, blocks that fit its VMEM, and the call itself."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp

from kpt.errors import KernelError
from kpt.ops.base import Specs
from pallas_kernels.manual_axes import unpartitioned, vary_alike

LANES, SUBLANES = 128, 16
"""Of a tile: elements along the last axis, and along the one before it for the narrowest dtype taken, bfloat16."""
DTYPES = ("bfloat16", "float32")
_RESERVED = 4
"""One part in so many of VMEM is left to the compiler, for values between a kernel's operations."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """What blocks depend on.

    Attributes:
      name: as `kpt.hardware_profile` takes it.
      mxu: rows and columns of a matrix unit.
      vmem: bytes of vector memory of a TensorCore.
      cores: TensorCores that one device joins (megacore): dimensions of a grid marked parallel are spread over them.
      int8: whether the matrix units multiply it; the compiler has no such product for v4.
    """

    name: str
    mxu: int
    vmem: int
    cores: int
    int8: bool = True


V4 = Generation("tpu-v4", 128, 16 << 20, 2, int8=False)
V5E = Generation("tpu-v5e", 128, 128 << 20, 1)
V5P = Generation("tpu-v5p", 128, 64 << 20, 2)
V6E = Generation("tpu-v6e", 256, 128 << 20, 1)
V7X = Generation("tpu-v7x", 256, 64 << 20, 1, int8=False)
DEVICE_KINDS = {"TPU v4": V4, "TPU v5 lite": V5E, "TPU v5e": V5E, "TPU v5": V5P, "TPU v5p": V5P, "TPU v6 lite": V6E, "TPU v6e": V6E,
                "TPU7x": V7X}  # fmt: skip
"""By `jax.Device.device_kind`."""


def generation() -> Generation:
    """Of the abstract mesh's device if one is in use (`jax.sharding.use_abstract_mesh`), else of the first device; v5e where that is no
    TPU, as in interpret mode."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None) or jax.devices()[0]
    return DEVICE_KINDS.get(device.device_kind, V5E)


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why no Pallas kernel for TPU takes these arrays, or None."""
    if (why := unpartitioned()) is not None:
        return why
    if any(0 in s.shape for s in specs.values()):
        return "has no empty arrays"
    dtypes = {s.dtype for s in specs.values() if s.dtype.startswith(("float", "bfloat"))} | {params.get("out_dtype") or DTYPES[0]}
    if extra := sorted(dtypes - set(DTYPES)):
        return f"computes in {' and '.join(DTYPES)}, and there is {' and '.join(extra)}"
    return None


def budget() -> int:
    """Bytes of VMEM that blocks and scratch may take."""
    vmem = generation().vmem
    return vmem - vmem // _RESERVED


def fits(need: int) -> bool:
    """Whether blocks that take so many bytes of VMEM leave the compiler its part."""
    return need <= budget()


def require_fit(blocks: Any, need: int) -> None:
    """Refuses blocks before anything is compiled.

    Raises:
      KernelError: `need` bytes are more than `budget()`.
    """
    if not fits(need):
        chip = generation()
        raise KernelError(
            f"{blocks} was asked for: {need} bytes of VMEM",
            f"A kernel on {chip.name} has {budget()} of {chip.vmem} bytes for its blocks",
            "Pass smaller blocks, or none for the defaults",
        )


def require_multiples(blocks: Any) -> None:
    """Raises:
    KernelError: a field of the dataclass `blocks` is no positive multiple of its class's `MULTIPLE`.
    """
    of = blocks.MULTIPLE
    for name, value in dataclasses.asdict(blocks).items():
        if type(value) is not int or value <= 0 or value % of:
            raise KernelError(
                f"{type(blocks).__name__} with {name}={value!r} was asked for", f"Sizes are positive multiples of {of}", "Correct it"
            )


def cut(size: int, block: int, tile: int = LANES) -> int:
    """The block of an axis: all of a short one, else the largest multiple of `tile` down to half of `block` that divides it, or `block`."""
    if size <= block:
        return size
    return next((b for b in range(block, block // 2 - 1, -tile) if size % b == 0), block)


def padded_bytes(shape: Any, dtype: Any) -> int:
    """Bytes that a block takes in VMEM, whose last two axes come in whole tiles."""
    *lead, rows, lanes = (1, *shape) if len(shape) == 1 else shape
    itemsize = jnp.dtype(dtype).itemsize
    sublanes = 8 * 4 // itemsize
    size = -(-rows // sublanes) * sublanes * -(-lanes // LANES) * LANES * itemsize
    return functools.reduce(lambda a, b: a * b, lead, size)


def precision(dtype: Any) -> jax.lax.Precision:
    """Of products of such factors: float32 ones are made of several bfloat16 products, as the op's float32 accuracy needs."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def dot(a: jax.Array, b: jax.Array, a_axis: int = 1, b_axis: int = 0) -> jax.Array:
    """Product of two matrices over the axes named, in float32, or of int8 in int32."""
    compute = jnp.promote_types(a.dtype, b.dtype)
    dims = (((a_axis,), (b_axis,)), ((), ()))
    total = jnp.int32 if compute == jnp.int8 else jnp.float32
    return jax.lax.dot_general(a.astype(compute), b.astype(compute), dims, precision=precision(compute), preferred_element_type=total)


def once(arrays: Sequence[jax.Array], out: Sequence[tuple[Sequence[int], Any]], flops: int, transcendentals: int) -> pl.CostEstimate:
    """What XLA is told of a kernel that reads each array once and writes each result once; it holds one of which it knows nothing for
    free."""
    nbytes = sum(a.nbytes for a in arrays) + sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in out)
    return pl.CostEstimate(flops=flops, bytes_accessed=nbytes, transcendentals=transcendentals)


def launch(
    kernel: Callable[..., None],
    *arrays: jax.Array,
    out: Sequence[tuple[Sequence[int], Any]],
    in_specs: Sequence[Any],
    out_specs: Sequence[Any],
    grid: Sequence[int],
    semantics: Sequence[Any],
    scratch: Sequence[Any] = (),
    prefetch: int = 0,
    cost: pl.CostEstimate | None = None,
    name: str,
) -> list[jax.Array]:
    """Calls `kernel(*inputs, *outputs, *scratch)` over a grid, with 15 of 16 parts of VMEM allowed.

    Args:
      out: shape and dtype of each result.
      semantics: "parallel" or "arbitrary", for each dimension of the grid.
      prefetch: how many of `arrays` are integers in SMEM, which index maps get after the grid's indices.
    """
    arrays = vary_alike(*arrays)
    call = pl.pallas_call(
        kernel,
        out_shape=[_struct(tuple(shape), dtype, arrays) for shape, dtype in out],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=prefetch,
            grid=tuple(grid),
            in_specs=list(in_specs),
            out_specs=list(out_specs),
            scratch_shapes=list(scratch),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=tuple(semantics), vmem_limit_bytes=generation().vmem * 15 // 16),
        cost_estimate=cost,
        name=name,
    )
    return list(vary_alike(*call(*arrays), *arrays)[: len(out)])


def _struct(shape: tuple[int, ...], dtype: Any, arrays: Sequence[jax.Array]) -> jax.ShapeDtypeStruct:
    """A result's type; inside `shard_map` it varies as the arrays do."""
    kind = jax.typeof(arrays[0])
    takes = inspect.signature(jax.ShapeDtypeStruct).parameters
    field = next((n for n in ("manual_axis_type", "vma") if n in takes and hasattr(kind, n)), None)
    return jax.ShapeDtypeStruct(shape, dtype, **({field: getattr(kind, field)} if field else {}))
