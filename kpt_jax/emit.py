"""Expressions as jax code: the views and small formulas that stand between a program and a kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kpt.graph.expr import Expr, Exprs, numpy_dtype

_OPS: dict[str, Callable[..., Any]] = {
    "neg": jnp.negative, "exp": jnp.exp, "log": jnp.log, "tanh": jnp.tanh, "logistic": jax.nn.sigmoid,
    "sqrt": jnp.sqrt, "rsqrt": jax.lax.rsqrt, "sin": jnp.sin, "cos": jnp.cos, "abs": jnp.abs, "sign": jnp.sign,
    "floor": jnp.floor, "not": jnp.logical_not, "is_finite": jnp.isfinite, "square": jnp.square,
    "stop_gradient": jax.lax.stop_gradient,
    "add": jnp.add, "sub": jnp.subtract, "mul": jnp.multiply, "div": jax.lax.div, "max": jnp.maximum,
    "min": jnp.minimum, "rem": jax.lax.rem, "and": jnp.bitwise_and, "or": jnp.bitwise_or, "xor": jnp.bitwise_xor,
    "eq": jnp.equal, "ne": jnp.not_equal, "ge": jnp.greater_equal, "gt": jnp.greater, "le": jnp.less_equal,
    "lt": jnp.less, "real": jnp.real, "imag": jnp.imag, "select": jnp.where, "clamp": jax.lax.clamp,
}  # fmt: skip
_REDUCTIONS: dict[str, Callable[..., Any]] = {"reduce_sum": jnp.sum, "reduce_or": jnp.any}
EMITTABLE = frozenset(_OPS) | frozenset(_REDUCTIONS) | frozenset(
    "full const iota reshape transpose broadcast slice convert concatenate value out".split())


def emit(e: Expr, exprs: Exprs, known: Callable[[Expr], Any | None], memo: dict[int, Any]) -> Any:
    """The array that `e` stands for.

    Args:
      known: gives the array of an expression that the program has already computed, else None.
      memo: arrays computed so far, by `id(expr)`.
    """
    if id(e) in memo:
        return memo[id(e)]
    got = known(e)
    if got is None:
        args = [emit(a, exprs, known, memo) for a in e.args]
        got = _compute(e, args, exprs.consts)
    memo[id(e)] = got
    return got


def _compute(e: Expr, args: list, consts: Mapping[int, Any]) -> Any:
    dtype = numpy_dtype(e.dtype)
    if e.op == "full":
        return jnp.full(e.shape, e["value"], dtype)
    if e.op == "const":
        return jnp.asarray(consts[e["key"]])
    if e.op == "iota":
        return jax.lax.broadcasted_iota(dtype, e.shape, e["dimension"])
    if e.op == "reshape":
        return jnp.reshape(args[0], e.shape)
    if e.op == "transpose":
        return jnp.transpose(args[0], e["perm"])
    if e.op == "broadcast":
        order = sorted(range(len(e["dims"])), key=lambda i: e["dims"][i])  # jax 0.7 takes increasing dims alone
        return jax.lax.broadcast_in_dim(jax.lax.transpose(args[0], order), e.shape, sorted(e["dims"]))
    if e.op == "slice":
        return jax.lax.slice(args[0], e["start"], e["limit"], e["stride"])
    if e.op == "convert":
        return args[0].astype(dtype)
    if e.op in _REDUCTIONS:
        return _REDUCTIONS[e.op](args[0], axis=e["axes"])
    if e.op == "concatenate":
        return jnp.concatenate(args, axis=e["axis"])
    return _OPS[e.op](*args).astype(dtype)
