"""Everything that depends on the version of jax, and nothing else. Tried on 0.7.2, 0.11.2 and 0.12."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax._src.api
import jax._src.config
import jax._src.core
import jax._src.mesh
import jax.extend.core as jex

ClosedJaxpr = jex.ClosedJaxpr
JIT_NAMES = frozenset({"pjit", "jit"})  # renamed in 0.7
REMAT_NAMES = frozenset({"checkpoint", "remat", "remat2"})
PVARY_NAMES = frozenset({"pvary", "pcast"})
PLACING_NAMES = PVARY_NAMES | {"reshard", "mesh_cast", "sharding_constraint"}  # what says only where an array lies


_literals = getattr(jax._src, "literals", None)
CONSTANTS: tuple[type, ...] = tuple(filter(None, [getattr(_literals, "LiteralArray", None)]))  # of jax 0.7, beside arrays and scalars


def is_literal(atom: Any) -> bool:
    return isinstance(atom, jex.Literal)


def open_jaxpr(j: Any) -> tuple[Any, tuple]:
    """`(jaxpr, consts)` of a Jaxpr or ClosedJaxpr (one class since 0.12)."""
    consts = tuple(getattr(j, "consts", ()) or ())
    return (j.jaxpr if hasattr(j, "jaxpr") else j), consts


def dtype_name(aval: Any) -> str:
    """NumPy-style dtype name; extended dtypes such as PRNG keys are "key"."""
    dtype = getattr(aval, "dtype", None)
    return "token" if dtype is None else _dtype_name(dtype)


@functools.cache
def _dtype_name(dtype: Any) -> str:
    return "key" if jax.dtypes.issubdtype(dtype, jax.dtypes.extended) else dtype.name


_SITE = os.path.join("kpt_jax", "apply.py"), "_run_site"  # where kernels are called
_LAYERS = "flax haiku equinox optax pallas_kernels".split()  # whose lines say little without the line that called them


def source_of(eqn: Any) -> tuple[str, bool]:
    """Where in the user's code an equation comes from, and through which line of a library of layers; "" if unknown.

    And whether it is part of a kernel of kpt's, which has nothing left to find.
    """
    tb = getattr(getattr(eqn, "source_info", None), "traceback", None)
    try:
        return ("", False) if tb is None else _place(tb)
    except Exception:  # no public way to read a jaxpr's source; a missing one costs only a comment
        return "", False


@functools.lru_cache(4096)
def _place(tb: Any) -> tuple[str, bool]:
    from jax._src import source_info_util

    library = None
    libraries = _folders(*_LAYERS)
    for frame in source_info_util.user_frames(tb):  # innermost first
        if frame.file_name.endswith(_SITE[0]) and frame.function_name.startswith(_SITE[1]):
            return "", True  # what stands in for a site, traced again: a rematerialised block's derivative, say
        if not frame.file_name.startswith(libraries):
            return _line(frame) + (f" through {_line(library)}" if library else ""), _is_kernel(library)
        library = library or frame
    return _line(library) if library else "", _is_kernel(library)


def _folders(*packages: str) -> tuple[str, ...]:
    return tuple(p + os.sep for n in packages if n in sys.modules for p in sys.modules[n].__path__)


def _is_kernel(frame: Any) -> bool:
    return frame is not None and frame.file_name.startswith(_folders("pallas_kernels"))


def _line(frame: Any) -> str:
    name = frame.file_name.rsplit("/", 1)[-1]
    return f"{name}:{getattr(frame, 'start_line', 0)} ({frame.function_name.rsplit('.', 1)[-1]})"


def is_tracer(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)


@contextlib.contextmanager
def concrete() -> Iterator[None]:
    """Inside: computations on arrays run now, on one device, even while an outer function is being traced."""
    with jax._src.core.eval_context(), without_typed_mesh():
        yield


@contextlib.contextmanager
def without_typed_mesh() -> Iterator[None]:
    """Inside: no `shard_map` is under way, and no mesh is there whose shardings are part of types, nor do arrays bring one."""
    token = meshless.set(True)
    try:
        with _within(jax._src.mesh.empty_abstract_mesh if typed(jax.sharding.get_abstract_mesh()) else None):
            yield
    finally:
        meshless.reset(token)


@contextlib.contextmanager
def with_mesh_of(arrays: Sequence[Any]) -> Iterator[None]:
    """Inside: the mesh of these arrays is there again, if their types have one."""
    token = meshless.set(False)
    try:
        with _within(next((s.mesh for x in arrays if (s := placement(jax.typeof(x))[0]) is not None), None)):
            yield
    finally:
        meshless.reset(token)


def _within(mesh: Any) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if mesh is None else jax._src.mesh.use_abstract_mesh(mesh)


meshless: contextvars.ContextVar[bool] = contextvars.ContextVar("kpt_meshless", default=False)
"""Whether equations run without the mesh of their trace."""


def under(mesh: Any) -> contextlib.AbstractContextManager:
    """Inside: this is the mesh of what is traced."""
    return jax._src.mesh.use_abstract_mesh(mesh)


def mesh_of(eqn: Any) -> Any:
    """The mesh under which an equation was traced, an empty one where none was set."""
    return eqn.ctx.cur_abstract_mesh


def mesh_in(eqn: Any, body: Any) -> Any:
    """The mesh under which the function that an equation calls was traced: its own; in a `shard_map`, that of a device's parts."""
    if eqn.primitive.name != "shard_map":
        return mesh_of(eqn)
    given = (getattr(v.aval, "sharding", None) for v in body.invars)
    return next((s.mesh for s in given if s is not None), mesh_of(body.eqns[-1]) if body.eqns else None)


def typed(mesh: Any) -> bool:
    """Whether types speak of axes of this mesh."""
    return bool(manual_axes(mesh) or explicit_axes(mesh))


def explicit_axes(mesh: Any) -> frozenset[str]:
    """The axes of a mesh whose shardings are part of types."""
    return frozenset(getattr(mesh, "explicit_axes", ()))


def manual_axes(mesh: Any) -> frozenset[str]:
    """The axes of a context's mesh over which a `shard_map` is under way."""
    return frozenset(getattr(mesh, "manual_axes", ()))


def derivative_rule(eqn: Any, fixed: list[bool]) -> tuple[Any, Any, list[bool]]:
    """The rule of a custom_jvp call in a `shard_map`: `(jaxpr, consts, which tangents of its results are zero)`.

    jax traces it once, for the program and for us, with types that vary over the manual axes; so it has to stand among these.
    """
    mesh = eqn.ctx.cur_abstract_mesh
    axes = [(n, mesh.shape[n]) for n in mesh.manual_axes]
    checked = any(varying_axes(v.aval) for v in eqn.invars)
    with eqn.ctx.manager, jax._src.core.extend_axis_env_nd(axes), jax._src.config._check_vma(checked):
        jaxpr, consts, zeros = eqn.params["jvp_jaxpr_fun"].call_wrapped(*fixed)
    return jaxpr, consts, list(zeros)


def bind(eqn: Any, args: Sequence[Any], meshless: bool = False) -> list[Any]:
    """Run one equation as it stands, in the context (mesh, precision, ...) in which it was traced, or in that without its mesh."""
    params = eqn.primitive.get_bind_params(eqn.params)
    subfuns, params = params if isinstance(params, tuple) else ((), params)  # one dict since 0.11
    if meshless:
        params = {k: None if k in ("sharding", "out_sharding") else x for k, x in params.items()}
    with eqn.ctx.manager, without_typed_mesh() if meshless else contextlib.nullcontext(), _at_source_of(eqn):
        out = eqn.primitive.bind(*subfuns, *args, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def _at_source_of(eqn: Any) -> contextlib.AbstractContextManager:
    """Keeps the user's own line as the source of what is bound, for profiles, error messages and plans."""
    try:
        from jax._src import source_info_util

        stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
        return source_info_util.user_context(eqn.source_info.traceback, name_stack=stack)
    except (ImportError, AttributeError):
        return contextlib.nullcontext()


def scan_layout(eqn: Any) -> tuple[int, int]:
    """How many constants and carries lead a scan's inputs (kept in trees since 0.11)."""
    p = eqn.params
    if "num_consts" in p:
        return p["num_consts"], p["num_carry"]
    consts, carry, _ = p["ft_in"].unpack()
    return len(consts), len(carry)


def custom_vjp_body(eqn: Any) -> Any:
    """The primal function of a custom_vjp call, or None where this jax keeps it elsewhere."""
    return eqn.params.get("call_jaxpr", eqn.params.get("fun_jaxpr"))


def rule_sources(eqn: Any) -> tuple[str, ...]:
    """Where the function and the derivative rule of a custom_jvp call were written, as jax describes them."""
    body, _ = open_jaxpr(eqn.params["call_jaxpr"])
    found = (getattr(x, "debug_info", None) for x in (body, eqn.params["jvp_jaxpr_fun"]))
    return tuple(str(getattr(d, "func_src_info", None) or "") for d in found)


def is_jitted(fn: Any) -> bool:
    """Whether `fn` came from `jax.jit`."""
    return hasattr(fn, "trace") and hasattr(fn, "lower") and hasattr(fn, "clear_cache")


def donated_inputs(closed: Any) -> tuple[int, ...]:
    """Which inputs of a program that is one jitted call are donated by it."""
    jaxpr, _ = open_jaxpr(closed)
    calls = [e for e in jaxpr.eqns if e.primitive.name in JIT_NAMES]
    if len(calls) != 1:
        return ()
    flags = calls[0].params.get("donated_invars", ())
    given = {v for v, d in zip(calls[0].invars, flags, strict=False) if d and not is_literal(v)}
    return tuple(i for i, v in enumerate(jaxpr.invars) if v in given)


# Whether no function is being traced, differentiated or mapped in this thread. jax's own, for a call must not pay for two.
outside_of_traces = jax._src.core.trace_state_clean


def trace_context() -> Any:
    """The settings that a trace depends on: x64, promotion rules, matmul precision, mesh, ..."""
    return jax._src.config.trace_context()


def with_64_bits() -> contextlib.AbstractContextManager:
    """Inside: float64 and int64 are what they say."""
    home: Any = jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")  # of older ones
    context: contextlib.AbstractContextManager = home.enable_x64(True)
    return context


_TRACE = jax.make_user_context(None)


def apart(token: object) -> contextlib.AbstractContextManager:
    """Inside: inner `jit`s are traced anew, and what they were traced to is kept apart from the user's own."""
    return _TRACE(token)


def reverse_mode_entries() -> list[tuple[Any, str]]:
    """Where every reverse-mode derivative passes: (module, function name)."""
    api = jax._src.api
    if hasattr(api, "_vjp"):  # until 0.7: takes a wrapped function
        return [(api, "_vjp")]
    return [(api, "vjp"), (jax, "vjp")]


def like_function(fun: Any, change: Any) -> Any:
    """`change(fun)`, where `fun` may be jax's own wrapping of a function."""
    if not hasattr(fun, "call_wrapped"):
        return change(fun)
    from jax._src import linear_util

    return linear_util.wrap_init(change(lambda *args: fun.call_wrapped(*args)), debug_info=fun.debug_info)


def forward_mode(values: Any) -> bool:
    """Whether some value carries a tangent of `jax.jvp` or `jax.linearize`, beneath any number of `vmap`s.

    Until 0.8 a linearization cannot be told from the first half of a gradient, and counts as one.
    """
    from jax._src.interpreters import ad, batching

    for x in values:
        while isinstance(x, batching.BatchTracer):
            x = x.val
        if isinstance(x, ad.JVPTracer):
            return True
        if isinstance(x, getattr(ad, "LinearizeTracer", ())) and not getattr(getattr(x, "_trace", None), "is_vjp", True):
            return True
    return False


def placement(aval: Any) -> tuple[Any, Any]:
    """What a type says of where an array lies: its explicit sharding, and the mesh axes over which it varies."""
    sharding = getattr(aval, "sharding", None)
    return sharding if explicit_axes(getattr(sharding, "mesh", None)) else None, _manual_type(aval)


def _manual_type(aval: Any) -> Any:
    """What a type says of the manual axes of a `shard_map`: the axes it varies over, since 0.9 in a type of its own."""
    kind = getattr(aval, "vma", None) or getattr(aval, "manual_axis_type", None)
    return frozenset() if kind is None or getattr(kind, "empty", not kind) else kind


def varying_axes(aval: Any) -> frozenset[str]:
    """The manual axes over which an array of this type differs from device to device."""
    kind = _manual_type(aval)
    return frozenset(getattr(kind, "varying", kind))


def without_mesh(aval: Any) -> Any:
    """The type of such an array, or in a `shard_map` of a device's part of it, where nothing is said of a mesh."""
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    return jax.core.ShapedArray(aval.shape, aval.dtype) if typed(mesh) else aval


def vary(x: Any, axes: frozenset[str]) -> Any:
    """`x`, varying over these axes too; as it is where no `shard_map` is under way."""
    missing = tuple(sorted((axes - varying_axes(jax.typeof(x))) & manual_axes(jax.sharding.get_abstract_mesh())))
    if not missing:
        return x
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, missing, to="varying")
    pvary: Any = jax.lax.pvary  # type: ignore[attr-defined]  # before pcast, jax 0.7
    return pvary(x, missing)


def mapped_over_mesh() -> bool:
    """Whether a `vmap` is under way over a dimension with an explicit sharding, or a `shard_map`; jax 0.7 does not say of the first."""
    mapped = getattr(jax._src.core.get_axis_env(), "explicit_mesh_axis_names", True)
    return bool(mapped or manual_axes(jax.sharding.get_abstract_mesh()))


def placed(x: Any, aval: Any) -> Any:
    """`x`, lying and varying as an array of this type does."""
    sharding, _ = placement(aval)
    there = sharding is None or jax.typeof(x).sharding == sharding
    return vary(x if there else jax.sharding.reshard(x, sharding), varying_axes(aval))


def repeated(axis: Any, x: Any) -> Any:
    """`x`, once for each position of the axis that a `vmap` maps over, which lies as that axis does."""
    from jax._src.interpreters import batching

    return batching.broadcast(x, axis.size, 0, axis.explicit_mesh_axis)


def with_leading(axis: Any, aval: Any) -> Any:
    """The type of such arrays, stacked along the axis that a `vmap` maps over."""
    return jax._src.core.unmapped_aval(axis.size, 0, aval, axis.explicit_mesh_axis)
