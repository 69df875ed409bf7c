"""Blocked matrix products for TPU: a float32 accumulator in VMEM, and an epilogue on it before anything is written."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp

from kpt.ops.base import Specs
from pallas_kernels import tensorcore, tuned
from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.tensorcore import LANES, budget, cut, dot, launch, padded_bytes, require_fit, require_multiples


def refusal(specs: Specs, params: Mapping[str, Any]) -> str | None:
    """Why these arrays cannot be taken, or None."""
    if specs["a"].dtype == "int8" and not tensorcore.generation().int8:
        return f"multiplies no int8 on {tensorcore.generation().name}, whose matrix units have none"
    return tensorcore.refusal(specs, params)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks of a product `[m, k] [k, n]`, each a multiple of 128; an axis that is shorter is one block.

    A block of the result is made of `m n` sums over blocks of k. Its factors come from HBM once for each step, which is
    `2 m n / (m + n)` operations an element read: 683 for 512 x 1024.
    """

    MULTIPLE: ClassVar[int] = LANES
    m: int
    n: int
    k: int

    def __post_init__(self) -> None:
        require_multiples(self)


class Start(Blocks):
    """Blocks that nobody asked for: where VMEM does not hold those of a product, they are halved."""


def default_blocks(specs: Specs, params: Mapping[str, Any]) -> Blocks:
    """Of products of these arrays, before they are cut to what VMEM holds."""
    return _rule(jnp.result_type(*(s.dtype for s in specs.values() if len(s.shape) > 1)))


def _rule(compute: Any) -> Start:
    """By the operations a byte that the chip can do: 240 on v5e, 560 on v6e. In float32, where a product is six of bfloat16, 40 and 93."""
    if compute == jnp.float32:
        return Start(512, 512, 512)
    chip = tensorcore.generation()
    if chip.mxu == 128:
        return Start(512, 1024, 1024)
    return Start(2048, 2048, 1024) if chip.vmem >= 128 << 20 else Start(1024, 2048, 1024)


def tuned_start(op: str, out_dtype: Any, **arrays: Any) -> Start | None:
    """The table's blocks for a call of an op whose products are these."""
    found: Start | None = tuned.blocks(op, Start, {"out_dtype": out_dtype}, lambda _: True, **arrays)
    return found


Sums = Sequence[Sequence[tuple[int, int]]]
Epilogue = Callable[..., Sequence[jax.Array]]


def matmul(*, a: jax.Array, b: jax.Array, out_dtype: str | None = None, blocks: Blocks | None = None) -> jax.Array:
    """`a b`, summed in float32; of int8, in int32, exact and without a gradient.

    Args:
      a: `[M, K]`. b: `[K, N]`. bfloat16 or float32, or both int8.
      out_dtype: of the result; a's by default, int32 for int8.
      blocks: of this product and of those of the backward pass.

    Raises:
      KernelError: the blocks do not fit VMEM.
    """
    blocks = blocks or tuned_start("matmul", out_dtype, a=a, b=b)
    if a.dtype == jnp.int8:
        return product(a, b, jnp.int32, blocks=blocks)
    return _matmul((str(jnp.dtype(out_dtype or a.dtype)), blocks), *vary_alike(a, b))


def products(
    lhs: Sequence[jax.Array],
    rhs: Sequence[jax.Array],
    sums: Sums,
    epilogue: Epilogue,
    out_dtypes: Sequence[Any],
    extras: Sequence[jax.Array] = (),
    *,
    lhs_axis: int = 1,
    rhs_axis: int = 0,
    blocks: Blocks | None = None,
    name: str = "matmul",
) -> list[jax.Array]:
    """Sums of products of matrices, and what an epilogue makes of them.

    `acc[s] = sum(lhs[i] rhs[j] for i, j in sums[s])` and `results = epilogue(*acc, *extras)`, block by block.

    Args:
      lhs: matrices of one shape, summed over their axis `lhs_axis`.
      rhs: the same with `rhs_axis`.
      epilogue: elementwise; gets float32 sums, and each extra as it is stored.
      out_dtypes: of the results of the epilogue, each `[M, N]`.
      extras: `[M, N]` or `[1, N]`.

    Raises:
      KernelError: the blocks do not fit VMEM.
    """
    m, k, n = lhs[0].shape[1 - lhs_axis], lhs[0].shape[lhs_axis], rhs[0].shape[1 - rhs_axis]

    compute = functools.reduce(jnp.promote_types, (a.dtype for a in (*lhs, *rhs)))
    total = jnp.int32 if compute == jnp.int8 else jnp.float32

    def specs(block: Blocks) -> tuple[tuple[int, int, int], list[Any], list[Any], int]:
        bm, bn, bk = cut(m, block.m), cut(n, block.n), cut(k, block.k)
        left = pl.BlockSpec((bm, bk), lambda i, j, p: (i, p)) if lhs_axis == 1 else pl.BlockSpec((bk, bm), lambda i, j, p: (p, i))
        right = pl.BlockSpec((bk, bn), lambda i, j, p: (p, j)) if rhs_axis == 0 else pl.BlockSpec((bn, bk), lambda i, j, p: (j, p))
        here = pl.BlockSpec((bm, bn), lambda i, j, p: (i, j))
        row = pl.BlockSpec((1, bn), lambda i, j, p: (0, j))
        inputs = [left] * len(lhs) + [right] * len(rhs) + [row if e.shape[0] == 1 else here for e in extras]
        outputs = [here] * len(out_dtypes)
        held = zip([*inputs, *outputs], [*(a.dtype for a in (*lhs, *rhs, *extras)), *out_dtypes], strict=True)
        need = sum(2 * padded_bytes(s.block_shape, d) for s, d in held) + (1 + len(sums)) * padded_bytes((bm, bn), jnp.float32)
        if compute == jnp.float32:  # each factor is split into three of bfloat16
            need += len(lhs) * 2 * padded_bytes((bm, bk), compute) + len(rhs) * 2 * padded_bytes((bk, bn), compute)
        return (bm, bn, bk), inputs, outputs, need

    chosen = blocks or _rule(compute)
    (bm, bn, bk), inputs, outputs, need = specs(chosen)
    while isinstance(chosen, Start) and need > budget():  # the rule is for one sum and one result
        axis = "k" if chosen.k > 256 else "n" if chosen.n > chosen.m else "m"
        chosen = dataclasses.replace(chosen, **{axis: getattr(chosen, axis) // 2})
        (bm, bn, bk), inputs, outputs, need = specs(chosen)
    require_fit(chosen, need)
    steps, ragged = pl.cdiv(k, bk), k % bk

    def kernel(*refs: Any) -> None:
        queue = iter(refs)
        lhs_refs, rhs_refs, extra_refs, out_refs, acc_refs = ([next(queue) for _ in a] for a in (lhs, rhs, extras, out_dtypes, sums))
        step = pl.program_id(2)

        def factor(ref: Any, axis: int) -> jax.Array:
            block = ref[...]
            if not ragged:
                return block
            place = step * bk + jax.lax.broadcasted_iota(jnp.int32, block.shape, axis)
            return jnp.where(place < k, block, jnp.zeros_like(block))

        @pl.when(step == 0)
        def _() -> None:
            for ref in acc_refs:
                ref[...] = jnp.zeros_like(ref)

        left, right = [factor(r, lhs_axis) for r in lhs_refs], [factor(r, rhs_axis) for r in rhs_refs]
        for ref, pairs in zip(acc_refs, sums, strict=True):
            for i, j in pairs:
                ref[...] += dot(left[i], right[j], lhs_axis, rhs_axis)

        @pl.when(step == steps - 1)
        def _() -> None:
            results = epilogue(*(ref[...] for ref in acc_refs), *(ref[...] for ref in extra_refs))
            for ref, result in zip(out_refs, results, strict=True):
                ref[...] = result.astype(ref.dtype)

    terms = sum(len(pairs) for pairs in sums)
    read = sum(a.nbytes for a in lhs) * pl.cdiv(n, bn) + sum(a.nbytes for a in rhs) * pl.cdiv(m, bm) + sum(e.nbytes for e in extras)
    written = sum(m * n * jnp.dtype(d).itemsize for d in out_dtypes)
    return launch(
        kernel,
        *lhs,
        *rhs,
        *extras,
        out=[((m, n), d) for d in out_dtypes],
        in_specs=inputs,
        out_specs=outputs,
        grid=(pl.cdiv(m, bm), pl.cdiv(n, bn), steps),
        semantics=("parallel", "parallel", "arbitrary"),
        scratch=[pltpu.VMEM((bm, bn), total)] * len(sums),
        cost=pl.CostEstimate(flops=2 * m * n * k * terms, bytes_accessed=read + written, transcendentals=0),
        name=name,
    )


def product(
    a: jax.Array, b: jax.Array, dtype: Any, *, a_axis: int = 1, b_axis: int = 0, blocks: Blocks | None = None, name: str = "matmul"
) -> jax.Array:
    """One product of two matrices over the axes named, rounded once to `dtype`."""
    return products([a], [b], [[(0, 0)]], lambda acc: [acc], [dtype], lhs_axis=a_axis, rhs_axis=b_axis, blocks=blocks, name=name)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(static, a, b):
    out_dtype, blocks = static
    return product(a, b, out_dtype, blocks=blocks)


def _fwd(static, a, b):
    return _matmul(static, a, b), (a, b)


def _bwd(static, residuals, g):
    (a, b), (_, blocks) = residuals, static
    dz = g.astype(jnp.promote_types(a.dtype, b.dtype))
    da = product(dz, b, a.dtype, b_axis=1, blocks=blocks, name="matmul_da")
    db = product(a, dz, b.dtype, a_axis=0, blocks=blocks, name="matmul_db")
    return da, db


_matmul.defvjp(_fwd, _bwd)
