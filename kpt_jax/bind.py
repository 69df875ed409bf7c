"""One equation of a program, run again.

An equation that was traced inside `jax.shard_map` remembers a mesh whose axes are manual, and `pvary` beside it says which values
differ from device to device. One that was traced with explicit shardings remembers their mesh, and may say how its result lies.
Where that mesh is there, it runs as it stands. Where it is not (a certificate is made on one device, in a `shard_map` with a device's
shapes), none of that matters: it runs without mesh, `pvary` and `reshard` give what they were given, and calls are taken apart for
the same to hold inside of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from kpt_jax import _compat


def bind(eqn: Any, args: Sequence[Any]) -> list[Any]:
    """The results of one equation for these arguments, arrays or tracers."""
    name = eqn.primitive.name
    if name == "pvary" and _compat.varying_axes(jax.typeof(args[0])) >= set(eqn.params["axes"]):
        return list(args)
    its, here = eqn.ctx.cur_abstract_mesh, jax.sharding.get_abstract_mesh()
    mapped = _compat.manual_axes(its) and not _compat.manual_axes(here)
    if not mapped and not (_compat.meshless.get() and _placing(eqn)):
        return _compat.bind(eqn, args)
    if name in _compat.PLACING_NAMES:
        return list(args)
    if name in _compat.JIT_NAMES:
        return _evaluate(*_compat.open_jaxpr(eqn.params["jaxpr"]), args)
    if name == "custom_jvp_call":
        return _custom_jvp(eqn, args)
    return _compat.bind(eqn, args, meshless=True)


def _placing(eqn: Any) -> bool:
    """Whether it was traced with explicit shardings."""
    return any(_compat.placement(v.aval)[0] is not None for v in (*eqn.invars, *eqn.outvars))


def _evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if _compat.is_literal(atom) else env[atom]

    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, bind(eqn, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _custom_jvp(eqn: Any, args: Sequence[Any]) -> list[Any]:
    @jax.custom_jvp
    def call(*xs: Any) -> list[Any]:
        return _evaluate(*_compat.open_jaxpr(eqn.params["call_jaxpr"]), xs)

    @call.defjvp
    def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        fixed = [t.dtype == jax.dtypes.float0 for t in tangents]
        jaxpr, consts, zeros = _compat.derivative_rule(eqn, fixed)
        outs = _evaluate(jaxpr, consts, [*primals, *(t for t, z in zip(tangents, fixed, strict=True) if not z)])
        results, moved = outs[: len(zeros)], iter(outs[len(zeros) :])
        zero = jax.custom_derivatives.zero_from_primal
        return results, [zero(x) if z else next(moved) for x, z in zip(results, zeros, strict=True)]

    return call(*args)
