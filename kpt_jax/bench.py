"""`kpt bench`: every kernel that can run here beside the code it replaces and other libraries' kernels, in one process.

A contender is held to the op's float64 reference before it is timed. Rounds go over all contenders in a turning order, on inputs
that rotate past the last-level cache. On an NVIDIA GPU the time is that of the kernels, as CUPTI sees them, and wall time stands
beside it; elsewhere it is wall time. A rate is given with the fraction it is of what a copy or a matrix product reached in the same
run.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kpt
from kpt import ops
from kpt.errors import KptError
from kpt.hardware import planned_elsewhere
from kpt.kernels.spec import refusal
from kpt.kernels.stand_in import standing_for
from kpt.kernels.validate import validate
from kpt.ops.base import Spec, Specs
from kpt.tracking.hooks import record_bench
from kpt_jax.bench_ops import BENCHES, Bench, Call, nbytes
from kpt_jax.devices import here

PLAIN = "plain"
CACHE = 256 * 2**20
"""Bytes of inputs to rotate through: beyond the last-level cache of today's chips."""
SETS = 8
DOCUMENTS = 8
"""Packed into a sequence, where there are segment ids."""
FORWARD, BOTH = "forward", "forward+backward"
UNMEASURED = float("nan")
HEADS = (
    "The fastest first: contender, median time [quartiles], median wall time, rate and its part of the measured ceiling,"
    " against plain JAX code, temporaries and outputs, worst error against float64."
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender at one shape.

    Attributes:
      time, low, high: seconds of a call: median and quartiles; kernel time where CUPTI is, else wall time.
      wall: seconds of a call by the clock, median.
      rate: FLOP/s or bytes/s, whichever binds the op.
      of_ceiling: that rate over the measured matrix product's or copy's.
      memory: bytes of temporaries and outputs.
      error: worst certified relative error against float64, at reduced size.
      problem: why there are no figures.
      seconds: the samples, for the history.
    """

    bench: str
    shape: tuple[int, ...]
    dtype: str
    passes: str
    contender: str
    time: float = UNMEASURED
    low: float = UNMEASURED
    high: float = UNMEASURED
    wall: float = UNMEASURED
    rate: float = UNMEASURED
    unit: str = ""
    of_ceiling: float = UNMEASURED
    memory: int | None = None
    error: float | None = None
    problem: str | None = None
    seconds: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What this chip reached in this run: bytes/s of a copy, read and written, and FLOP/s of a square matrix product."""

    copy: float
    matmul: float


def contenders(bench: Bench, specs: Specs, peers: bool) -> tuple[dict[str, Call], dict[str, str]]:
    """Functions of the op's arrays by name, and the registered kernels that refuse, with their reasons."""
    found, refused = {PLAIN: bench.plain}, {}
    hardware = here()
    dtype = specs[ops.op(bench.op).arrays[0]].dtype
    for kernel in (k for k in kpt.registry.kernels(bench.op) if k.framework == "jax"):
        reason = refusal(kernel, bench.op, hardware, dtype, specs, bench.params, "aggressive", "jax")
        if reason is None:
            fn = kpt.registry.load(kernel)
            found[kernel.name] = lambda fn=fn, **arrays: fn(**arrays, **bench.params)
        else:
            refused[kernel.name] = reason
    return found | (bench.installed_peers() if peers else {}), refused


def passes_of(bench: Bench, fn: Call, backward: bool) -> Call:
    """`(arrays, cotangents) -> outputs`, or outputs and gradients."""
    moving = ops.op(bench.op).learned

    def both(arrays: dict[str, Any], cotangents: Sequence[Any]) -> Any:
        fixed = {n: a for n, a in arrays.items() if n not in moving}
        out, pull = jax.vjp(lambda d: fn(**d, **fixed), {n: a for n, a in arrays.items() if n in moving})
        return out, pull(tuple(cotangents) if isinstance(out, tuple) else cotangents[0])[0]

    return both if backward else lambda arrays, cotangents: fn(**arrays)


def certified(bench: Bench, fn: Call, specs: Specs, long: Specs) -> tuple[float, str | None]:
    """Worst relative error against float64, and what is wrong if it is too large; of a call that goes the way of the `long` one."""

    def run(_: Any, arrays: Any, __: Any) -> Any:
        return jax.device_get(jax.jit(lambda a: fn(**a))(arrays))

    def run_vjp(_: Any, arrays: Any, __: Any, cotangents: Any) -> Any:
        outputs = jax.eval_shape(lambda a: fn(**a), arrays)
        dtypes = [o.dtype for o in jax.tree.leaves(outputs)]
        cotangents = [np.asarray(c).astype(d) for c, d in zip(cotangents, dtypes, strict=True)]
        return jax.device_get(jax.jit(passes_of(bench, fn, True))(arrays, cotangents)[1])

    op = dataclasses.replace(ops.op(bench.op), differentiable=ops.op(bench.op).learned)
    with standing_for(long):
        certificate = validate(fn, op, specs, bench.params, run=run, run_vjp=run_vjp, seeds=(0,))
    worst = max(filter(None, (certificate.worst(gradient=False), certificate.worst(gradient=True))), default=0.0)
    return worst, None if certificate.passed else certificate.summary()


def inputs(bench: Bench, specs: Specs) -> list[tuple[dict[str, Any], list[Any]]]:
    """Normal arrays of the op's domain and cotangents, in sets that together are larger than any cache."""
    outputs = list(bench.outputs(specs).values())
    one = nbytes(specs) + nbytes(bench.outputs(specs))
    count = min(SETS, max(2, math.ceil(CACHE / max(one, 1))))

    def normal(key: Any, spec: Spec, scale: float = 1.0) -> Any:
        return (scale * jax.random.normal(key, spec.shape)).astype(spec.dtype)

    @jax.jit
    def made(seed: Any) -> Any:
        keys = iter(jax.random.split(jax.random.key(seed), len(specs) + len(outputs)))
        arrays: dict[str, Any] = {}
        for name, spec in specs.items():
            if name == "labels":
                classes = specs["logits"].shape[-1] if "logits" in specs else specs["w"].shape[-1]
                arrays[name] = jax.random.randint(next(keys), spec.shape, 0, classes, spec.dtype)
            elif name == "group_sizes":
                arrays[name] = jnp.full(spec.shape, specs["x"].shape[0] // spec.shape[0], spec.dtype)
            elif name.endswith("segment_ids"):
                arrays[name] = jnp.broadcast_to(jnp.arange(spec.shape[1]) * DOCUMENTS // spec.shape[1], spec.shape).astype(spec.dtype)
            else:
                scale = spec.shape[0] ** -0.5 if name.startswith("w") and len(spec.shape) == 2 else 1.0
                arrays[name] = normal(next(keys), spec, scale)
        if bench.averaged:
            return arrays, [jnp.full(spec.shape, 1 / math.prod(spec.shape), spec.dtype) for spec in outputs]
        return arrays, [normal(next(keys), spec) for spec in outputs]

    return [made(seed) for seed in range(count)]


def kernel_seconds(run: Callable[..., Any], args: Sequence[Any]) -> float | None:
    """Time of the GPU kernels that `run(*args)` launches, from CUPTI; None without one."""
    if jax.default_backend() != "gpu":
        return None
    from jax._src.lib import mosaic_gpu as library  # jax's `profiler.Cupti` runs the same inputs once before, into the cache

    library._mosaic_gpu_ext._cupti_init()
    try:
        jax.block_until_ready(run(*args))
    finally:
        timings = library._mosaic_gpu_ext._cupti_get_timings(False)
    return sum(ms for _, ms in timings) / 1e3 if timings else None


def wall_seconds(run: Callable[..., Any], args: Sequence[Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - start


def timed(programs: dict[str, Callable[..., Any]], sets: Sequence[Any], seconds: float) -> dict[str, tuple[list[float], list[float]]]:
    """Kernel times (wall times where there is no CUPTI) and wall times of compiled programs, in rounds over all of them."""
    slowest = 0.0
    for run in programs.values():
        jax.block_until_ready(run(*sets[0]))
        slowest = max(slowest, wall_seconds(run, sets[-1]))
    rounds = min(51, max(7, math.ceil(seconds / max(2 * slowest, 1e-6))))
    taken: dict[str, tuple[list[float], list[float]]] = {n: ([], []) for n in programs}
    names = list(programs)
    for i in range(rounds):
        first = i % len(names)
        for n in names[first:] + names[:first]:
            wall = wall_seconds(programs[n], sets[(2 * i) % len(sets)])
            kernel = kernel_seconds(programs[n], sets[(2 * i + 1) % len(sets)])
            taken[n][0].append(wall if kernel is None else kernel)
            taken[n][1].append(wall)
    return taken


def ceilings(seconds: float) -> Ceilings:
    """Measures a copy and a bfloat16 matrix product (float32 on a CPU), each on rotating inputs."""
    cpu = jax.default_backend() == "cpu"
    n, dtype = (1024, "float32") if cpu else (8192, "bfloat16")
    length = 2**22 if cpu else 2**29
    copied = [(jax.random.normal(jax.random.key(i), (length,), dtype),) for i in range(2)]
    factors = [tuple(jax.random.normal(k, (n, n), dtype) for k in jax.random.split(jax.random.key(i))) for i in range(4)]
    copy = _compiled(lambda a: -a, copied[0])  # a bare copy may be left to a copy engine, or be no kernel at all
    product = _compiled(jnp.matmul, factors[0])
    moved = 2 * copied[0][0].nbytes / statistics.median(timed({"copy": copy}, copied, seconds)["copy"][0])
    return Ceilings(moved, 2 * n**3 / statistics.median(timed({"matmul": product}, factors, seconds)["matmul"][0]))


def _compiled(fn: Callable[..., Any], args: Sequence[Any]) -> Any:
    return jax.jit(fn).lower(*args).compile()


def measure(
    name: str, shape: tuple[int, ...], dtype: str, backward: bool, top: Ceilings, *, peers: bool, seconds: float
) -> list[Row]:
    """Every contender at one shape."""
    bench = BENCHES[name]
    specs, small = bench.specs(dtype, *shape), bench.specs(dtype, *bench.small(*shape))
    fns, refused = contenders(bench, specs, peers)
    base = Row(name, shape, dtype, BOTH if backward else FORWARD, "")
    rows = [dataclasses.replace(base, contender=n, problem=f"refused: {why}") for n, why in refused.items()]
    sets, programs, errors = inputs(bench, specs), {}, {}
    for contender, fn in fns.items():
        try:
            errors[contender], wrong = certified(bench, fn, small, specs)
            if wrong is None:
                programs[contender] = _compiled(passes_of(bench, fn, backward), sets[0])
                jax.block_until_ready(programs[contender](*sets[0]))
        except Exception as error:  # a peer that fails is a row of the table, not the end of it
            wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if wrong is not None:
            programs.pop(contender, None)
            rows.append(dataclasses.replace(base, contender=contender, problem=wrong))
    flops, moved = bench.cost(specs, backward)
    compute = flops / top.matmul > moved / top.copy
    work, unit, ceiling = (flops, "FLOP/s", top.matmul) if compute else (moved, "B/s", top.copy)
    for contender, (kernel, wall) in (timed(programs, sets, seconds) if programs else {}).items():
        quartiles = statistics.quantiles(kernel, n=4)
        memory = programs[contender].memory_analysis()
        rows.append(
            dataclasses.replace(
                base,
                contender=contender,
                time=statistics.median(kernel),
                low=quartiles[0],
                high=quartiles[2],
                wall=statistics.median(wall),
                rate=work / statistics.median(kernel),
                unit=unit,
                of_ceiling=work / statistics.median(kernel) / ceiling,
                memory=None if memory is None else int(memory.temp_size_in_bytes + memory.output_size_in_bytes),
                error=errors[contender],
                seconds=tuple(kernel),
            )
        )
    return sorted(rows, key=lambda r: (r.problem is not None, r.time))


def run(
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]] = (),
    *,
    dtype: str | None = None,
    peers: bool = False,
    seconds: float = 0.5,
    report: Callable[[list[Row], dict[str, Any]], None] = lambda rows, so_far: None,
) -> dict[str, Any]:
    """Measures ops, forward and forward with backward.

    Args:
      names: of `BENCHES`; all of them if empty.
      shapes: for each of the ops; those of the table if empty.
      dtype: bfloat16 by default, float32 on a CPU.
      peers: other libraries' kernels too, where they are installed.
      seconds: for each contender, about.
      report: called with the rows of each shape as they are there, and with what would be returned if they were the last.

    Returns:
      What `--json` prints.

    Raises:
      KptError: an op or a shape that is not understood.
    """
    planned_elsewhere(here())
    cpu = jax.default_backend() == "cpu"
    dtype = dtype or ("float32" if cpu else "bfloat16")
    if dtype == "float64" and not jax.config.jax_enable_x64:
        raise KptError("Kernels were to be measured in float64", "JAX has none here: it would make float32 of it", "Set JAX_ENABLE_X64=1")
    names = list(names) or list(BENCHES)
    for name in names:
        if name not in BENCHES:
            near = difflib.get_close_matches(name, BENCHES, n=1)
            advice = f"Did you mean {near[0]!r}?" if near else "Name some of them"
            raise KptError(f"{name!r} was to be measured", f"Known are {', '.join(BENCHES)}", advice)
        for shape in shapes:
            if len(shape) != len(BENCHES[name].dims.split()):
                asked = f"{name} was to be measured at {'x'.join(map(str, shape))}"
                raise KptError(asked, f"Its shapes are {BENCHES[name].dims.replace(' ', 'x')}", "Give one number for each")
            if min(shape) < 1:
                asked = f"{name} was to be measured at {'x'.join(map(str, shape))}"
                raise KptError(asked, "Arrays without elements take no time", "Give numbers from 1 on")
    top = ceilings(seconds)
    rows: list[Row] = []
    about = {
        "kind": "kpt.bench",
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "clock": "wall" if kernel_seconds(jnp.negative, (jnp.ones(8),)) is None else "kernels (CUPTI)",
        "ceilings": dataclasses.asdict(top),
    }

    def result() -> dict[str, Any]:
        return about | {"rows": [{k: v for k, v in dataclasses.asdict(r).items() if v == v and k != "seconds"} for r in rows]}

    for name in names:
        for shape in shapes or (BENCHES[name].cpu_shapes if cpu else BENCHES[name].shapes):
            for backward in (False, True):
                found = measure(name, tuple(shape), dtype, backward, top, peers=peers, seconds=seconds)
                rows += found
                report(found, result())
    record_bench(rows, here().name, jax.devices()[0].device_kind, {"jax": jax.__version__})
    return result()


def lines(rows: Sequence[Row]) -> list[str]:
    """The rows of one shape for people, the fastest first."""
    first = rows[0]
    out = [f"{first.bench} {'x'.join(map(str, first.shape))} {first.dtype} {first.passes}"]
    fastest_other = min((r.time for r in rows if r.problem is None and r.contender == PLAIN), default=UNMEASURED)
    for r in rows:
        if r.problem is not None:
            out.append(f"  {r.contender:26} {r.problem}")
            continue
        rate = f"{r.rate / 1e12:7.1f} TFLOP/s" if r.unit == "FLOP/s" else f"{r.rate / 1e9:7.1f} GB/s   "
        memory = "" if r.memory is None else f"{r.memory / 2**20:9.1f} MiB"
        beside = f"{fastest_other / r.time:5.2f}x plain" if fastest_other == fastest_other else " " * 12
        out.append(
            f"  {r.contender:26} {r.time * 1e3:10.4f} ms [{r.low * 1e3:.4f}, {r.high * 1e3:.4f}]  wall {r.wall * 1e3:9.3f} ms  {rate}"
            f" {r.of_ceiling:6.1%}  {beside} {memory}  error {r.error:.1e}"
        )
    return out


def plot(result: dict[str, Any], path: Path) -> None:
    """Rates of all contenders as bars, as fractions of the ceiling.

    Raises:
      KptError, MissingDependencyError: as `kpt.report.drawable`, or no contender could be measured.
    """
    from kpt.report import Bar, draw_bars

    measured = [r for r in result["rows"] if not r.get("problem")]
    bars = [
        Bar(f"{r['bench']} {'x'.join(map(str, r['shape']))} {r['passes']}: {r['contender']}", r["of_ceiling"],
            f"{r['of_ceiling']:.0%}", "before" if r["contender"] == PLAIN else "after")
        for r in measured
    ]  # fmt: skip
    description = "; ".join(f"{b.label} {b.text}" for b in bars)
    if not bars:
        raise KptError(f"A chart was to be written to {path}", "No contender could be measured", "The rows say why")
    draw_bars(bars, path, title="Fraction of the measured ceiling", description=description)


def main(names: Sequence[str], shapes: str | None, peers: bool, dtype: str | None, seconds: float, out: Path | None,
         chart: Path | None, say: Callable[[str], None]) -> dict[str, Any]:  # fmt: skip
    """What the command line calls.

    Args:
      shapes: "16384x4096,32768x8192".

    Raises:
      KptError: as `run`, and for shapes that are no numbers.
    """
    try:
        parsed = [tuple(int(n) for n in s.split("x")) for s in shapes.split(",")] if shapes else []
    except ValueError:
        raise KptError(f"Shapes {shapes!r} were given", "A shape is numbers with x between", "Write 16384x4096,32768x8192") from None

    def report(rows: list[Row], so_far: dict[str, Any]) -> None:
        if len(rows) == len(so_far["rows"]):  # the first ones
            say(HEADS)
        say("\n".join(lines(rows)))
        if out:  # after each shape: what was measured outlives a run that is cut short
            part = out.with_name(f"{out.name}.part")
            part.write_text(json.dumps(so_far, indent=1) + "\n", encoding="utf-8")
            part.replace(out)

    result = run(names, parsed, dtype=dtype, peers=peers, seconds=seconds, report=report)
    top = result["ceilings"]
    say(f"measured ceilings: copy {top['copy'] / 1e9:.0f} GB/s, matrix product {top['matmul'] / 1e12:.1f} TFLOP/s"
        f" ({result['device']}, {result['clock']} time)")  # fmt: skip
    if chart:
        plot(result, chart)
    return result
