"""A kernel differentiated in both modes: backwards by its own rule, forwards as the code that it replaces.

A kernel carries a backward pass alone (`jax.custom_vjp`), for which jax refuses `jvp`, `jacfwd` and `linearize`. The code
that it replaces has both. So a site is a `custom_jvp` function whose linear part

    tangents  ->  J tangents,  J the Jacobian at the inputs

is one primitive, `site_tangents`: evaluated, it is the forward derivative of the user's code; transposed, it is the kernel's
backward pass. Reverse mode never evaluates it, and then the user's code is not even traced.

(`jax.custom_derivatives.linear_call` is the same idea; it cannot be vmapped, nor differentiated again.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching, mlir

from kpt_jax import _compat

Flat = Callable[..., list[Any]]


def both_modes(kernel: Flat, original: Flat, floats: Sequence[int]) -> Flat:
    """`kernel`, with forward derivatives too.

    Args:
      kernel, original: the same function of flat arrays, to a flat list of arrays.
      floats: positions of the arguments that have derivatives.
    """
    if not floats:
        return kernel

    @jax.custom_jvp
    def site(*args: Any) -> list[Any]:
        return kernel(*args)

    @site.defjvp
    def site_jvp(args: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        from kpt_jax.planner import active

        def primal(*given: Any) -> tuple[list[Any], list[Any]]:
            outs = kernel(*_with(args, floats, given))
            return [x for x in outs if _is_float(x)], outs

        token = active.set(None)  # what is differentiated here is a kernel, not the user's
        try:
            _, pull, outs = jax.vjp(primal, *(args[i] for i in floats), has_aux=True)
        finally:
            active.reset(token)
        residuals, tree = jax.tree.flatten(pull)
        n, m = len(args), len(args) + len(residuals)

        def forward(*xs: Any) -> list[Any]:
            """From arguments, residuals and tangents to the tangents of the results."""

            def floating(*given: Any) -> list[Any]:
                return [x for x in original(*_with(xs[:n], floats, given)) if _is_float(x)]

            return jax.jvp(floating, [xs[i] for i in floats], list(xs[m:]))[1]

        def backward(*xs: Any) -> list[Any]:
            """From arguments, residuals and cotangents of the results to cotangents of the arguments."""
            return list(jax.tree.unflatten(tree, xs[n:m])(list(xs[m:])))

        avals = tuple(jax.typeof(x) for x in outs if _is_float(x))
        moved = iter(_site_tangents.bind(*args, *residuals, *(tangents[i] for i in floats), count=len(floats),
                                         forward=forward, backward=backward, out_avals=avals))  # fmt: skip
        return outs, [next(moved) if _is_float(x) else np.zeros(x.shape, jax.dtypes.float0) for x in outs]

    return site


def _with(args: Sequence[Any], places: Sequence[int], given: Sequence[Any]) -> list[Any]:
    """`args` with those at `places` replaced."""
    new = dict(zip(places, given, strict=True))
    return [new.get(i, x) for i, x in enumerate(args)]


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


# The primitive: `forward(*constants, *tangents)`, linear in the last `count` of its operands, and
# `backward(*constants, *cotangents)`, its transpose in them.
_site_tangents = jex.Primitive("site_tangents")
_site_tangents.multiple_results = True


def _evaluate(*xs: Any, forward: Flat, **_: Any) -> list[Any]:
    return forward(*xs)


_site_tangents.def_impl(_evaluate)
_site_tangents.def_abstract_eval(lambda *_, out_avals, **__: list(out_avals))
@functools.partial(mlir.register_lowering, _site_tangents)
def _lowered(ctx: Any, *xs: Any, forward: Flat, **_: Any) -> Any:
    """What is traced here is beyond any mesh of which types speak: they would hold for the arguments and for nothing else."""

    def evaluate(*xs: Any) -> list[Any]:
        with _compat.without_typed_mesh():
            return forward(*xs)

    types = [_compat.without_mesh(a) for a in ctx.avals_in]
    return mlir.lower_fun(evaluate, multiple_results=True)(ctx.replace(avals_in=types), *xs)


def _transposed(cotangents: Sequence[Any], *xs: Any, count: int, backward: Flat, out_avals: Any, **_: Any) -> list[Any]:
    constants = xs[: len(xs) - count]
    given = [
        _compat.placed(jnp.zeros(a.shape, a.dtype), a) if type(ct) is ad.Zero else ct
        for ct, a in zip(cotangents, out_avals, strict=True)
    ]
    found = backward(*constants, *given)
    moved = zip(found, xs[len(xs) - count :], strict=True)  # jax 0.7 loses under vmap how a gradient lies
    return [None] * len(constants) + [_compat.placed(ct, x.aval) if ad.is_undefined_primal(x) else None for ct, x in moved]


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, count: int, forward: Flat, **params: Any) -> tuple[Any, Any]:
    def moves(t: Any) -> bool:
        return type(t) is not ad.Zero and t.dtype != jax.dtypes.float0

    bind = functools.partial(_site_tangents.bind, count=count, forward=forward, **params)
    first = len(primals) - count
    if not any(map(moves, tangents[:first])):
        return bind(*primals), bind(*primals[:first], *map(ad.instantiate_zeros, tangents[first:]))
    moving = [i for i, t in enumerate(tangents) if moves(t)]

    return jax.jvp(lambda *given: forward(*_with(primals, moving, given)), [primals[i] for i in moving],
                   [tangents[i] for i in moving])  # fmt: skip


def _batched(
    axis: Any, xs: Sequence[Any], dims: Sequence[Any], *, count: int, forward: Flat, backward: Flat, out_avals: Any
) -> tuple[Any, Any]:
    first = len(xs) - count
    linear = [
        _compat.repeated(axis, x) if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(xs[first:], dims[first:], strict=True)
    ]

    def mapped(fn: Flat) -> Flat:
        def call(*given: Any) -> list[Any]:
            axes = (*dims[:first], *(0 for _ in given[first:]))
            return jax.vmap(fn, axes, 0, axis_size=axis.size)(*given)

        return call

    outs = _site_tangents.bind(*xs[:first], *linear, count=count, forward=mapped(forward), backward=mapped(backward),
                               out_avals=tuple(_compat.with_leading(axis, a) for a in out_avals))  # fmt: skip
    return outs, [0] * len(outs)


ad.primitive_transposes[_site_tangents] = _transposed
ad.primitive_jvps[_site_tangents] = _jvp
batching.fancy_primitive_batchers[_site_tangents] = _batched
